import io
from dataclasses import fields, replace

from rich.console import Console

from pace import info, isa, kernels
from pace.numa import Place
from pace.roofline import Roofline


def rendered(data):
    console = Console(file=io.StringIO(), width=140)
    console.print(info.render(data))
    return console.file.getvalue()


def test_every_operation_is_listed_with_its_rung():
    data = info.collect()
    assert tuple(data.operations) == kernels.OPERATIONS
    assert set(data.operations.values()) == {isa.RUNG}
    text = rendered(data)
    assert all(name in text for name in kernels.OPERATIONS)


def test_says_why_a_rung_is_out_of_reach():
    data = replace(info.collect(), rung="avx2", missing={"avx512": ["AVX512F", "AVX512_BF16"]})
    assert "not avx512: this host lacks AVX512F, AVX512_BF16" in rendered(data)


def test_an_unknown_host_and_a_missing_torch_render():
    data = info.collect()
    unknown = {field.name: None for field in fields(data.host)} | {"cpu": "arm64", "num_cpus": 8}
    data = replace(data, host=replace(data.host, **unknown), versions={"torch": None})
    text = rendered(data)
    assert "8 CPUs usable" in text
    assert "not installed" in text


def test_a_machine_of_several_nodes_shows_its_place():
    data = info.collect()
    host = replace(data.host, sockets=2, numa_nodes=8, l3_bytes=32 << 20, l3_total_bytes=24 * 32 << 20)
    place = Place((1,), tuple(range(24, 48)), 24, 1)
    text = rendered(replace(data, host=host, num_threads=384, l3_domains=24, place=place))
    assert "2 sockets · 8 NUMA nodes" in text
    assert "L3 32 MiB (24 domains, 768 MiB in all)" in text
    assert "384 · an engine settles on node 1: 24 threads on 24 CPUs" in text
    assert "settles" not in rendered(replace(data, place=None))


def test_roofline_in_units_that_people_use():
    line = info.describe_roofline(Roofline(50.9e9, 227e9, 455e9, 2, "avx512"))
    assert line.startswith("50.9 GB/s read · 227 GFLOP/s fp32 · 455 GFLOP/s bf16")
    assert "avx512, 2 threads" in line
