"""An emulated AVX-512 CPU (Bochs) that executes this process's own machine code in place.

Guest addresses are the host's: a page is mapped into the guest when it is first touched, if the host itself may read
it, and for writing if the host may write it. So an access that would have been a segmentation fault is a `Fault`, and
nothing is copied. Code is executed for as long as it stays within loads, stores and arithmetic: no system calls.
"""

import ctypes
import mmap
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest

from pace import isa

PAGE = 4096
STACK_BYTES = 1 << 20
PAGE_FAULT = 14
PRESENT, WRITABLE = 1, 2  # of a page-table entry
WRITE = 2  # of a page fault's error code
ROOT_TABLE = 0x1000  # the guest-physical address of the first page table; other pages follow it
HLT = b"\xf4"
RETRY = b"\x48\x83\xc4\x08\x48\xcf"  # add rsp, 8 (the error code); iretq
CODE_DESCRIPTOR, DATA_DESCRIPTOR = 0x00AF9B000000FFFF, 0x00CF93000000FFFF
GDT, TSS, IDT = 0x0, 0x100, 0x200  # offsets in the system page
CODE, DATA, TASK = 0x08, 0x10, 0x18  # selectors
EXCEPTIONS = {0: "#DE divide error", 6: "#UD invalid opcode", 13: "#GP general protection", 19: "#XM SIMD arithmetic"}

# Names within the bochscpu library.
ADD_FEATURES = "_ZN8BX_CPU_C25add_remove_cpuid_featuresEPKcb"
VDPBF16PS = "_ZN8BX_CPU_C25VDPBF16PS_MASK_VpsHdqWdqREP15bxInstruction_c"

libc = ctypes.CDLL(None, use_errno=True)


class Fault(RuntimeError):
    """What the emulated CPU raised instead of finishing a call."""


def build(source: str, folder: Path) -> Path:
    """The shared library of a source beside this file."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    library = Path(folder, source).with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", Path(__file__).with_name(source), "-o", library], check=True)
    return library


def _load_bochs():
    """The bochscpu package, its CPU model extended by what the avx512 rung needs, its known bug mended."""
    with tempfile.TemporaryDirectory() as folder:
        shim = ctypes.CDLL(str(build("shim.c", Path(folder))), ctypes.RTLD_GLOBAL)
    import bochscpu
    import bochscpu._bochscpu
    import bochscpu.cpu
    import bochscpu.memory

    core = ctypes.CDLL(bochscpu._bochscpu.__file__)
    ctypes.c_void_p.in_dll(shim, "original").value = _address(core[ADD_FEATURES])
    _mend_vdpbf16ps(core)
    return bochscpu


def _mend_vdpbf16ps(core):
    """Bochs 3.0 types VDPBF16PS's memory operand as one dword, so it scales 8-bit displacements by 4 and not by 64.

    Each entry of its opcode table is two handlers and eight bytes of operands, the type in the high half of a byte.
    """
    handler = _address(core[VDPBF16PS])
    table = ctypes.addressof(ctypes.c_char.in_dll(core, "BxOpcodesTable"))
    words = (ctypes.c_uint64 * 30_000).from_address(table)
    operands = next(i for i, word in enumerate(words) if word == handler) + 1
    ctypes.c_uint8.from_address(table + 8 * operands + 2).value &= 0x0F


def _address(function) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value


class _HostMemory:
    """Whether a page of this process may be read or written: the kernel is asked to copy a byte of it by a pipe."""

    def __init__(self):
        self._read_end, self._write_end = os.pipe()

    def allows(self, page: int, *, write: bool) -> bool:
        if libc.write(self._write_end, ctypes.c_void_p(page), 1) != 1:
            return False
        if write and libc.read(self._read_end, ctypes.c_void_p(page), 1) == 1:
            return True
        os.read(self._read_end, 1)
        return not write


class Cpu:
    """The emulated CPU. One a process: Bochs keeps its state in globals."""

    def __init__(self):
        self._bochs = _load_bochs()
        self._host = _HostMemory()
        self._lock = threading.Lock()
        self._session = self._bochs.Session()
        self._kept = []  # what the guest's memory points into
        self._tables = {}  # guest-physical address → the table's 512 entries
        self._physical = {}  # host page → the guest-physical page that stands for it, for good
        self._mapped = {}  # host page → (table, index) of its entry, during one call
        self._next_physical = ROOT_TABLE
        self._fault = None
        self._new_table()
        self._hook = self._bochs.Hook()
        self._hook.exception = self._on_exception
        self._hook.hlt = lambda session, cpu: session.stop()

        self._stack_top = self._memory(STACK_BYTES) + STACK_BYTES
        libc.mprotect(ctypes.c_void_p(self._stack_top - STACK_BYTES), PAGE, 0)
        self._halt = self._code(HLT)
        self._retry = self._code(RETRY)
        self._system = self._memory(PAGE)  # the tables of the privileged architecture, and below its end a stack
        self._map(self._system, write=True)
        self._mapped.clear()  # these three stay
        self._state = self._initial_state()

    def call(self, function: int, *args: int) -> None:
        """Execute the function at this address. Up to six integer or pointer arguments. Fault where it went wrong."""
        with self._lock:
            self._start(function, args)
            self._session.run([self._hook])
            self._forget_pages()
            if self._fault:
                raise Fault(f"{self._fault} at instruction {_place(self._interrupted())}")

    def _start(self, function, args):
        state, stack = self._state, self._stack_top - 8
        ctypes.c_uint64.from_address(stack).value = self._halt  # the return address
        state.rip, state.rsp = function, stack
        for register, value in zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), args, strict=False):
            setattr(state, register, value)
        self._fault = None
        self._set_gate(PAGE_FAULT, self._retry)
        self._session.cpu.state = state  # empties the TLB

    def _initial_state(self):
        """64-bit mode with AVX-512 on, and every exception delivered to HLT, on a stack of its own."""
        state = self._bochs.State()
        self._bochs.cpu.set_long_mode(state)
        monitor, emulate, switched, write_protect, alignment = 1 << 1, 1 << 2, 1 << 3, 1 << 16, 1 << 18
        state.cr0 = (state.cr0 | monitor | write_protect) & ~(emulate | switched | alignment)
        state.cr4 |= 1 << 9 | 1 << 10 | 1 << 18  # SSE, its exceptions, XSAVE
        state.xcr0 = 0xE7  # x87, SSE, AVX, AVX-512
        state.mxcsr, state.mxcsr_mask, state.rflags, state.cr3 = 0x1F80, 0xFFFF, 2, ROOT_TABLE

        words = (ctypes.c_uint64 * 3).from_address(self._system + GDT)
        words[:] = 0, CODE_DESCRIPTOR, DATA_DESCRIPTOR
        ctypes.c_uint64.from_address(self._system + TSS + 36).value = self._system + PAGE  # its IST1
        for vector in range(32):
            self._set_gate(vector, self._halt)
        state.gdtr = self._table(GDT, 24)
        state.idtr = self._table(IDT, 32 * 16)
        state.tr = self._segment(TASK, 0x8B, self._system + TSS, 0x67)
        state.cs = self._segment(CODE, 0x209B)
        state.ds = state.ss = state.es = state.gs = self._segment(DATA, 0xC93)
        state.fs = self._segment(DATA, 0xC93, self._halt)  # where a stack protector would look for its canary
        return state

    def _set_gate(self, vector, handler):
        gate = (ctypes.c_uint64 * 2).from_address(self._system + IDT + 16 * vector)
        present_interrupt_ist1 = 0x8E01
        gate[1] = handler >> 32
        gate[0] = (handler >> 16 & 0xFFFF) << 48 | present_interrupt_ist1 << 32 | CODE << 16 | handler & 0xFFFF

    def _interrupted(self) -> int:
        """The instruction pointer that the last exception pushed."""
        return ctypes.c_uint64.from_address(self._system + PAGE - 40).value

    def _segment(self, selector, attributes, base=0, limit=0xFFFFFFFF):
        segment = self._bochs.Segment()
        segment.present, segment.selector, segment.attr = True, selector, attributes
        segment.base, segment.limit = base, limit
        return segment

    def _table(self, offset, size):
        table = self._bochs.GlobalSegment()
        table.base, table.limit = self._system + offset, size - 1
        return table

    def _on_exception(self, session, _, vector, error):
        """Before the exception is delivered: to RETRY for a page fault that can be served, to HLT for all else."""
        if self._fault:  # a second one, while delivering the first
            session.stop()
        elif vector != PAGE_FAULT:
            self._fault = EXCEPTIONS.get(vector, f"exception {vector}")
        else:
            address, write = session.cpu.cr2, bool(error & WRITE)
            if self._host.allows(address & -PAGE, write=write):
                self._map(address & -PAGE, write)
                return
            full = 0 <= address - (self._stack_top - STACK_BYTES) < PAGE
            self._fault = f"page fault {'writing' if write else 'reading'} {address:#x}" + " (stack full)" * full
            self._set_gate(PAGE_FAULT, self._halt)

    def _map(self, page, write):
        entries = self._tables[ROOT_TABLE]
        for shift in (39, 30, 21):
            index = page >> shift & 511
            if not entries[index]:
                entries[index] = self._new_table() | PRESENT | WRITABLE
            entries = self._tables[entries[index] & -PAGE]
        if page not in self._physical:
            self._physical[page] = self._insert(page)
        index = page >> 12 & 511
        entries[index] = self._physical[page] | PRESENT | (WRITABLE if write else 0)
        self._mapped[page] = entries, index

    def _forget_pages(self):
        """The host may unmap or protect any page before the next call."""
        for entries, index in self._mapped.values():
            entries[index] = 0
        self._mapped.clear()

    def _new_table(self) -> int:
        host = self._memory(PAGE)
        physical = self._insert(host)
        self._tables[physical] = (ctypes.c_uint64 * 512).from_address(host)
        return physical

    def _insert(self, host_page) -> int:
        physical = self._next_physical
        self._next_physical += PAGE
        self._bochs.memory.page_insert(physical, host_page)
        return physical

    def _code(self, instructions: bytes) -> int:
        host = self._memory(PAGE)
        ctypes.memmove(host, instructions.ljust(PAGE, HLT), PAGE)
        self._map(host, write=False)
        return host

    def _memory(self, size) -> int:
        self._kept.append(mmap.mmap(-1, size))
        return ctypes.addressof(ctypes.c_char.from_buffer(self._kept[-1]))


def _place(address: int) -> str:
    """An address with the file that it was loaded from and the offset there, for objdump."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, _, *path = line.split(maxsplit=5)
        begin, end = (int(bound, 16) for bound in span.split("-"))
        if begin <= address < end:
            return f"{address:#x} ({Path(*path).name}+{address - begin + int(offset, 16):#x})"
    return f"{address:#x}"


class Plugin:
    """Of pytest: counts the calls of each test module, and ends the process, for Bochs hangs in its destructors."""

    def __init__(self, cpu: Cpu):
        self.cpu = cpu
        self._calls = Counter()
        self._status = 0

    def hook(self, worker, args, begin, end, scratch):
        module = Path(os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]).stem
        self._calls[module.removeprefix("test_")] += 1
        self.cpu.call(worker, args, begin, end, scratch)

    def pytest_terminal_summary(self, terminalreporter):
        for room, calls in sorted(self._calls.items()):
            terminalreporter.write_line(f"emulated: {room} {calls} calls")

    def pytest_sessionfinish(self, exitstatus):
        self._status = int(exitstatus)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(self._status)


def install(config: pytest.Config) -> None:
    """Route every worker call of every binding through an emulated CPU, until the process ends."""
    plugin = Plugin(Cpu())
    isa.runtime.set_hook(plugin.hook)
    config.pluginmanager.register(plugin, "emulator")
