"""The objects of each rung hold the instructions that `pace.isa` asks the CPU for, and no others."""

import importlib.util
import os
import platform
import shlex
import struct
import subprocess
import sysconfig
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from pace import isa

if platform.machine() != "x86_64" or isa.runtime is None:
    pytest.skip("the native kernels: this is a build without them", allow_module_level=True)

import iced_x86

ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.stem.removesuffix("_kernel") for path in ROOT.glob("pace/_kernels/*/*_kernel.c"))
BINDINGS = sorted(ROOT.glob("build/objects/**/*.o"))
DOT_PRODUCTS = {"attend", "gated_mlp", "linear"}  # rooms whose avx512 form multiplies in bfloat16

X86_64 = set("INTEL8086 INTEL186 INTEL286 INTEL386 INTEL486 FPU CMOV SSE SSE2 X64 MULTIBYTENOP PAUSE CET_IBT".split())
UP_TO_AVX2 = {"SSE3", "SSSE3", "SSE4_1", "SSE4_2", "AVX"}  # no CPU has AVX2 without them
ALLOWED = {"avx2": X86_64 | UP_TO_AVX2 | isa.FEATURES["avx2"].keys()}
ALLOWED["avx512"] = ALLOWED["avx2"] | isa.FEATURES["avx512"].keys()
# Executed only after CPUID has said that they are there.
ALLOWED_IN_RUNTIME = X86_64 | {"CPUID", "XSAVE"}

SYMBOLS_OF_THE_LINKER = {"_GLOBAL_OFFSET_TABLE_"}


@cache
def setup_py():
    spec = importlib.util.spec_from_file_location("pace_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def object_of(room, rung):
    """The object that the build has left, or one compiled here with the build's flags."""
    compiler = shlex.split(" ".join(sysconfig.get_config_vars("CC", "CFLAGS", "CCSHARED")))
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        kernel = Path(f"pace/_kernels/{room}/{room}_kernel.c")
        return setup_py().compile_rung(kernel, rung, compiler).absolute()
    finally:
        os.chdir(before)


def code_of(path):
    """The contents of every executable section of an ELF64 object."""
    data = path.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    for i in range(count):
        flags, _, offset, length = struct.unpack_from("<4Q", data, table + i * size + 8)
        if flags & 4:  # SHF_EXECINSTR
            yield data[offset : offset + length]


@cache
def instructions_of(path):
    """Feature → the instructions that need it, the first of each kind, as text; and "EVEX" → those encoded so."""
    names = {value: name for name, value in vars(iced_x86.CpuidFeature).items() if isinstance(value, int)}
    found, seen = defaultdict(list), set()
    for code in code_of(path):
        for instruction in iced_x86.Decoder(64, code):
            if instruction.code in seen:
                continue
            seen.add(instruction.code)
            assert instruction.code != iced_x86.Code.INVALID, f"{path}: not an instruction at {instruction.ip:#x}"
            for feature in instruction.cpuid_features():
                found[names[feature]].append(str(instruction))
            if instruction.encoding == iced_x86.EncodingKind.EVEX:
                found["EVEX"].append(str(instruction))
    return found


SCALAR = ("pack_experts",)  # moves 32 bits at a time, and is bound by memory all the same


def symbols_of(path, *options):
    lines = subprocess.run(["nm", "-P", *options, path], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[0] for line in lines}


def assert_only(path, allowed):
    above = {name: texts[:3] for name, texts in instructions_of(path).items() if name not in allowed | {"EVEX"}}
    assert not above, f"{path.name} holds instructions above its rung: {above}"


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("rung", ["avx2", "avx512"])
def test_a_rung_holds_its_own_instructions(room, rung):
    path = object_of(room, rung)
    assert_only(path, ALLOWED[rung])
    assert bool(instructions_of(path)["EVEX"]) == (rung == "avx512" and room not in SCALAR)


def test_the_check_sees_what_does_not_belong():
    with pytest.raises(AssertionError, match="AVX512F"):
        assert_only(object_of("rms_norm", "avx512"), ALLOWED["avx2"])
    with pytest.raises(AssertionError, match="AVX2"):
        assert_only(object_of("rms_norm", "avx2"), X86_64)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("rung", ["avx2", "avx512"])
def test_a_worker_is_self_contained_and_its_symbols_name_their_rung(room, rung):
    path = object_of(room, rung)
    assert symbols_of(path, "--undefined-only") <= SYMBOLS_OF_THE_LINKER
    exported = symbols_of(path, "--extern-only", "--defined-only")
    assert exported
    assert all(name.endswith(f"_{rung}") for name in exported), exported


@pytest.mark.parametrize("room", sorted(DOT_PRODUCTS.intersection(ROOMS)))
def test_dot_products_use_the_bf16_instruction(room):
    assert any(text.startswith("vdpbf16ps") for text in instructions_of(object_of(room, "avx512"))["AVX512_BF16"])


@pytest.mark.skipif(not BINDINGS, reason="the bindings' objects: this tree was not built in place")
def test_bindings_run_on_any_x86_64():
    assert any(path.name == "runtime.o" for path in BINDINGS)
    for path in BINDINGS:
        assert_only(path, ALLOWED_IN_RUNTIME if path.name == "runtime.o" else X86_64)
