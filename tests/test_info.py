import io
from dataclasses import fields, replace

from rich.console import Console

from pace import info, isa, kernels
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


def test_roofline_in_units_that_people_use():
    line = info.describe_roofline(Roofline(50.9e9, 227e9, 455e9, 2, "avx512"))
    assert line.startswith("50.9 GB/s read · 227 GFLOP/s fp32 · 455 GFLOP/s bf16")
    assert "avx512, 2 threads" in line
