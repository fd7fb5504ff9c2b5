"""Every operation has its five addresses, and its two forms the same parameters."""

import inspect
from pathlib import Path

import pytest

from pace import isa, kernels

ROOT = Path(__file__).parent.parent
ADDRESSES = [
    "pace/reference/{}.py",
    "pace/_kernels/{0}/{0}.pyx",
    "tests/kernels/test_{}.py",
    "benchmarks/kernels/bench_{}.py",
]
NOT_OPERATIONS = {"roofline"}  # measures the machine: there is nothing to compute, hence no twin


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("name", kernels.OPERATIONS)
def test_an_operation_is_found_by_its_name(name, address):
    assert (ROOT / address.format(name)).is_file()


@pytest.mark.parametrize("name", kernels.OPERATIONS)
def test_the_index_has_the_form_of_this_host(name):
    form = kernels.reference if isa.RUNG == "reference" else kernels.native
    assert getattr(kernels, name) is form(name)


def test_every_room_is_in_the_index():
    rooms = {path.stem for path in ROOT.glob("pace/_kernels/*/*.pyx")} - NOT_OPERATIONS
    assert rooms == set(kernels.OPERATIONS)
    assert list(kernels.OPERATIONS) == sorted(set(kernels.OPERATIONS))


def parameters(function):
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.mark.skipif(isa.runtime is None, reason="the native kernels: this is a build without them")
@pytest.mark.parametrize("name", kernels.OPERATIONS)
def test_twins_have_the_same_parameters(name):
    assert parameters(kernels.native(name)) == parameters(kernels.reference(name))
