import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from benchmarks.case import BF16, Result, Runner, assert_twins_agree, cold_copies, copies, kind_of
from benchmarks.table import duration, render
from pace import host
from pace.reference.pack_linear import PackedLinear
from pace.reference.sample import History
from pace.roofline import Roofline

ROOFLINES = {"avx512": Roofline(30e9, 200e9, 400e9, 2, "avx512")}
LINEAR = Result(
    operation="linear",
    shape="512 × 2048 → 8192",
    dtype="bfloat16",
    rung="avx512",
    native_seconds=0.05,
    reference_seconds=1.0,
    torch_seconds=0.04,
    num_bytes=30_000_000,
    flops=16_000_000_000,
    cache=None,
)


def rendered(*results):
    console = Console(file=io.StringIO(), width=120)
    console.print(render(results, ROOFLINES, "a machine"))
    return console.file.getvalue()


def test_arithmetic_is_measured_in_flops_against_the_peak_of_the_dtype():
    assert "320.0 GFLOP/s" in rendered(LINEAR)
    assert "80 %" in rendered(LINEAR)
    assert "160 %" in rendered(replace(LINEAR, dtype="float32"))


def test_memory_is_measured_in_bytes():
    text = rendered(replace(LINEAR, flops=0, native_seconds=0.002))
    assert "15.0 GB/s" in text
    assert "50 %" in text


def test_names_the_cases_where_a_peer_is_faster():
    text = rendered(LINEAR, replace(LINEAR, torch_seconds=None))
    assert "native is not the fastest in 1 of 2 cases" in text
    assert "torch takes 40 ms, native 50 ms" in text
    assert "native is the fastest in all 1 cases" in rendered(replace(LINEAR, torch_seconds=None))


def test_duration():
    assert [duration(s) for s in (2.5, 0.0123, 4.56e-6, 7e-8)] == ["2.5 s", "12.3 ms", "4.56 µs", "70 ns"]


def test_a_form_slower_than_its_budget_is_timed_once():
    calls = []
    runner = Runner(lambda: calls.append(sum(range(200_000))), [()], budget_seconds=1e-6)
    for _ in range(5):
        runner.run_block(1e-6)
    assert len(runner.seconds) == 1


def test_cold_copies_do_not_fit_in_the_last_cache():
    machine = replace(host.describe(), l3_total_bytes=1 << 20)
    sets = cold_copies([np.ones(1 << 16, np.float32), 1e-5], machine)
    assert sum(arrays[0].nbytes for arrays in sets) > 4 << 20
    assert len({arrays[0].ctypes.data for arrays in sets}) == len(sets)


def packed():
    return PackedLinear(np.ones((1, 8, 16, 2), BF16), 16, 16)


def test_copies_reach_into_packed_weights_and_records():
    history = History(np.zeros(3, np.int32), np.ones(3, np.int32), np.array([0, 3]))
    arguments = (packed(), history, None, "relu")
    weight, seen, *rest = copies(arguments)
    assert (weight.out_features, type(seen), rest) == (16, History, [None, "relu"])
    assert np.array_equal(seen.counts, history.counts)
    assert not np.shares_memory(weight.panels, arguments[0].panels)
    assert not np.shares_memory(seen.counts, history.counts)
    assert kind_of((history, packed())) == BF16
    machine = replace(host.describe(), l3_total_bytes=1 << 10)
    assert len(cold_copies((packed(),), machine)) == 1 + 4096 // 512


def test_twins_that_leave_another_weight_do_not_agree():
    def spoil(weight):
        weight.panels[0, 0, 3, 1] = 2

    def keep(weight):
        pass

    assert_twins_agree(spoil, spoil, (packed(),), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="Mismatched elements: 1 / 256"):
        assert_twins_agree(spoil, keep, (packed(),), rtol=0, atol=0)
