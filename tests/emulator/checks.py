"""Checks of the emulated CPU itself, in assembly. tests/test_emulated.py runs them, in a process of their own."""

import ctypes
import mmap

import ml_dtypes
import numpy as np
import pytest

from pace import isa, kernels

from .emulator import PAGE, Fault, build, libc

ALL = 0xFFFF


@pytest.fixture(scope="session")
def code(tmp_path_factory):
    """The address of a function of checks.S by its name."""
    library = ctypes.CDLL(str(build("checks.S", tmp_path_factory.mktemp("checks"))))
    return lambda name: ctypes.cast(library[name], ctypes.c_void_p).value


@pytest.fixture
def cpu(request):
    return request.config.pluginmanager.getplugin("emulator").cpu


@pytest.fixture
def page():
    """The floats of a page that ends at one that nobody may touch."""
    memory = mmap.mmap(-1, 2 * PAGE)
    floats = np.frombuffer(memory, np.float32)
    floats[:] = np.arange(floats.size)
    libc.mprotect(ctypes.c_void_p(floats.ctypes.data + PAGE), PAGE, 0)
    return floats[: PAGE // 4]


def address(array):
    return array.ctypes.data


def test_a_masked_tail_at_the_edge_of_a_page_passes(cpu, code, page):
    to = np.zeros(16, np.float32)
    cpu.call(code("copy_masked"), address(to), address(page[-5:]), 0b11111)
    assert np.array_equal(to[:5], page[-5:])
    assert not to[5:].any()
    cpu.call(code("copy_masked"), address(page[-5:]), address(to), 0b11111)
    assert np.array_equal(to[:5], page[-5:])


def test_an_overrun_is_a_fault_that_names_address_and_instruction(cpu, code, page):
    to, edge = np.zeros(16, np.float32), address(page) + PAGE
    load, store = code("copy_masked") + 4, code("copy_masked") + 10
    with pytest.raises(Fault, match=f"page fault reading {edge:#x} at instruction {load:#x} .checks.so"):
        cpu.call(code("copy_masked"), address(to), address(page[-5:]), 0b111111)
    with pytest.raises(Fault, match=f"page fault writing {edge:#x} at instruction {store:#x} .checks.so"):
        cpu.call(code("copy_masked"), address(page[-5:]), address(to), 0b111111)
    cpu.call(code("copy_masked"), address(to), address(page), ALL)
    assert np.array_equal(to, page[:16])


def test_a_read_only_page_is_not_written(cpu, code, page):
    libc.mprotect(ctypes.c_void_p(address(page)), PAGE, mmap.PROT_READ)
    to = np.zeros(16, np.float32)
    cpu.call(code("copy_masked"), address(to), address(page), ALL)
    with pytest.raises(Fault, match="page fault writing"):
        cpu.call(code("copy_masked"), address(page), address(to) + 4, ALL >> 1)


def test_a_page_that_the_host_has_taken_away_since_is_a_fault(cpu, code, page):
    to = np.zeros(16, np.float32)
    cpu.call(code("copy_masked"), address(to), address(page), ALL)
    libc.mprotect(ctypes.c_void_p(address(page)), PAGE, 0)
    with pytest.raises(Fault, match="page fault reading"):
        cpu.call(code("copy_masked"), address(to), address(page), ALL)
    libc.mprotect(ctypes.c_void_p(address(page)), PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_an_invalid_instruction_is_named(cpu, code):
    with pytest.raises(Fault, match=f"#UD invalid opcode at instruction {code('invalid'):#x}"):
        cpu.call(code("invalid"))


def test_a_full_stack_is_a_fault(cpu, code):
    with pytest.raises(Fault, match=r"page fault writing .* \(stack full\)"):
        cpu.call(code("recurse"))


def test_bf16_dot_product_of_memory_near_by(cpu, code):
    pairs = np.random.default_rng(0).integers(-8, 8, (2, 16, 2)).astype(ml_dtypes.bfloat16)
    to = np.zeros(16, np.float32)
    cpu.call(code("dot_second"), address(to), address(pairs))
    assert np.array_equal(to, np.prod(pairs.astype(np.float32), axis=0).sum(axis=1))


def test_a_fault_reaches_the_caller_of_a_kernel(cpu, code):
    def invalid(*args):
        cpu.call(code("invalid"))

    x = np.ones((2, 8), np.float32)
    hook = isa.runtime.set_hook(invalid)
    try:
        with pytest.raises(Fault, match="#UD"):
            kernels.native("rms_norm")(x, x[0])
    finally:
        isa.runtime.set_hook(hook)
