"""`pytest --benchmark`: run benchmarks/kernels instead of the tests."""

import os
import sys

import pytest

if "--benchmark" in sys.argv:
    # Here, since the libraries look only once, when they are loaded. torch's OpenMP and NumPy's BLAS have threads
    # that spin while they wait for work: by default 3 to 24 ms, on the CPUs that the next form needs. A tenth of a
    # millisecond bridges the calls in a row of a model and of a block of timings. OMP_WAIT_POLICY=PASSIVE would
    # not: waking a thread costs 30 µs a parallel region, and torch, of many regions, 5 times its time.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "18")  # 2^18 cycles

from pace import isa


def pytest_addoption(parser):
    group = parser.getgroup("pace")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="Check every kernel against its twin, then time both beside the machine's limits and torch.",
    )
    group.addoption(
        "--benchmark-rungs",
        metavar="RUNG,...",
        default=isa.RUNG,
        help="The rungs to benchmark, such as avx2,avx512. Default: the rung in use (PACE_ISA, or the highest).",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config):
    if not config.getoption("--benchmark"):
        return
    for rung in config.option.benchmark_rungs.split(","):
        if rung not in isa.AVAILABLE or rung == "reference":
            native = ", ".join(isa.AVAILABLE[1:]) or "none"
            raise pytest.UsageError(
                f"--benchmark cannot run on {rung!r}; native rungs of this host and build: {native}"
            )
    config.option.benchmark_skip = False
    config.option.benchmark_quiet = True  # one table, ours
    if config.args_source is not config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "benchmarks" / "kernels")]
