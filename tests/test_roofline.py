import pytest

from pace import isa
from pace.roofline import Roofline, best, measure

NATIVE = [rung for rung in isa.AVAILABLE if rung != "reference"]


@pytest.fixture(params=NATIVE)
def rung(request, monkeypatch):
    monkeypatch.setattr(isa, "RUNG", request.param)
    before = isa.runtime.get_rung()
    isa.runtime.set_rung(request.param)
    yield request.param
    isa.runtime.set_rung(before)


def assert_sane(roofline):
    """Between a bad day of a small machine and the biggest there is: a wrong unit or a loop that is gone is outside."""
    assert 1e8 < roofline.read_bytes_per_second < 1e13
    assert 1e8 < roofline.fma_flops < 1e14
    assert 1e8 < roofline.bf16_flops < 4e14


def test_native(rung):
    roofline = measure(seconds=0.05)
    assert_sane(roofline)
    assert (roofline.rung, roofline.num_threads) == (rung, isa.get_num_threads())


def test_threads_are_set_for_the_measurement_only(rung):
    before = isa.get_num_threads()
    assert measure(num_threads=before + 1, seconds=0.01).num_threads == before + 1
    assert isa.get_num_threads() == before


def test_reference(monkeypatch):
    monkeypatch.setattr(isa, "RUNG", "reference")
    roofline = measure(seconds=0.05)
    assert_sane(roofline)
    assert roofline.rung == "reference"
    assert roofline.bf16_flops == roofline.fma_flops


def test_the_slower_of_memory_and_arithmetic_is_the_limit():
    roofline = Roofline(10.0, 100.0, 200.0, num_threads=1, rung="avx2")
    assert roofline.shortest_seconds(num_bytes=20) == 2
    assert roofline.shortest_seconds(num_bytes=20, flops=1000) == 10
    assert roofline.shortest_seconds(num_bytes=20, flops=1000, bf16=True) == 5


def test_best_takes_each_number_from_the_better_measurement():
    a, b = Roofline(1.0, 5.0, 6.0, 2, "avx2"), Roofline(3.0, 4.0, 7.0, 2, "avx2")
    assert best(a, b) == Roofline(3.0, 5.0, 7.0, 2, "avx2")
