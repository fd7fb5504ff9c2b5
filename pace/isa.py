"""The ladder: which instruction set the kernels run on. Chosen once, at import, from CPUID and `PACE_ISA`.

`pace.isa.RUNG` is the rung in use, `pace.isa.AVAILABLE` the rungs that this host and this build could use. `PACE_ISA`
lowers the rung on purpose; asking for one that the host lacks is an error that names what is missing.
"""

import logging
import os
from importlib import import_module
from types import ModuleType

logger = logging.getLogger("pace")

RUNGS = ("reference", "avx2", "avx512")

# (leaf, subleaf, register, bit) of CPUID; registers in the order eax, ebx, ecx, edx.
# The objects of a rung hold instructions of these features and no others (tests/test_instruction_sets.py).
FEATURES = {
    "avx2": {
        "FMA": (1, 0, 2, 12),
        "POPCNT": (1, 0, 2, 23),
        "F16C": (1, 0, 2, 29),
        "BMI1": (7, 0, 1, 3),
        "AVX2": (7, 0, 1, 5),
        "BMI2": (7, 0, 1, 8),
        "LZCNT": (0x80000001, 0, 2, 5),
    },
    "avx512": {
        "AVX512F": (7, 0, 1, 16),
        "AVX512DQ": (7, 0, 1, 17),
        "AVX512CD": (7, 0, 1, 28),
        "AVX512BW": (7, 0, 1, 30),
        "AVX512VL": (7, 0, 1, 31),
        "AVX512_VNNI": (7, 0, 2, 11),
        "AVX512_BF16": (7, 1, 0, 5),
    },
}
# What the operating system must save on a context switch (XCR0): ymm, and for AVX-512 also masks and zmm.
STATE = {"avx2": 0x06, "avx512": 0xE6}


def _load_runtime() -> ModuleType | None:
    try:
        return import_module("pace._kernels.runtime")
    except ModuleNotFoundError:  # a build without native kernels; a broken one raises ImportError and should
        return None


runtime = _load_runtime()


def missing(rung: str) -> list[str]:
    """What this host or build lacks for a rung; empty where the rung can run."""
    if rung == "reference":
        return []
    if runtime is None:
        return ["the native kernels (this is a build without them)"]
    lacking = missing("avx2") if rung == "avx512" else []
    for feature, (leaf, subleaf, register, bit) in FEATURES[rung].items():
        registers = runtime.cpuid(leaf, subleaf)
        if registers is None or not registers[register] >> bit & 1:
            lacking.append(feature)
    if runtime.xcr0() & STATE[rung] != STATE[rung]:
        lacking.append(f"the operating system's support for {rung} registers")
    return lacking


def choose(asked: str | None) -> str:
    """The rung for `asked` (a rung's name, or None or "" for the highest that this host has)."""
    if not asked:
        return AVAILABLE[-1]
    if asked not in RUNGS:
        raise ValueError(f"PACE_ISA is {asked!r}; it must be one of {', '.join(RUNGS)}")
    if asked not in AVAILABLE:
        lacking, runnable = ", ".join(missing(asked)), ", ".join(AVAILABLE)
        raise RuntimeError(f"PACE_ISA is {asked!r}, but this host lacks {lacking}; it can run {runnable}")
    return asked


AVAILABLE = tuple(rung for rung in RUNGS if not missing(rung))
RUNG = choose(os.environ.get("PACE_ISA"))

if runtime is not None and RUNG != "reference":
    runtime.set_rung(RUNG)
elif not os.environ.get("PACE_ISA"):
    logger.warning("running on the slow NumPy reference: this host or build lacks %s", ", ".join(missing("avx2")))


def get_num_threads() -> int:
    """How many threads a kernel call may use; 1 on the reference rung (NumPy's own threads are NumPy's)."""
    return 1 if runtime is None else int(runtime.get_num_threads())


def asked_num_threads() -> int | None:
    """The number of threads that set_num_threads or OMP_NUM_THREADS asks for; None where neither does."""
    return None if runtime is None else runtime.asked_num_threads()


def set_num_threads(num_threads: int | None) -> None:
    """Set how many threads a kernel call may use; None: as many as OMP_NUM_THREADS or the CPUs say. Results do not
    depend on it.
    """
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
    if runtime is not None:
        runtime.set_num_threads(num_threads)
