"""Kernels give the same bits on any number of threads, beside torch's, after a fork, from many Python threads."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pace import isa, kernels

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(isa.RUNG == "reference", reason="the native kernels: this is the reference rung")


def in_a_process(function, **env):
    """What a function of this module prints in a process of its own."""
    code = f"import tests.test_threads as here; here.{function.__name__}()"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def inputs():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((500, 700)).astype(np.float32)
    return x, np.ones(x.shape[1], np.float32)


def alternate_with_torch():
    import torch

    x, weight = inputs()
    matrix = torch.from_numpy(x)
    isa.set_num_threads(1)
    expected, product = kernels.rms_norm(x, weight), matrix @ matrix.T

    def once(_=None):
        torch.testing.assert_close(matrix @ matrix.T, product)
        assert np.array_equal(kernels.rms_norm(x, weight), expected)

    for num_threads in (1, 2, 3, 8):
        for torch_threads in (1, 2, 5):
            isa.set_num_threads(num_threads)
            torch.set_num_threads(torch_threads)
            once()
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(once, range(12)))
    print("same")


def fork_among_kernels():
    isa.set_num_threads(2)
    x, weight = inputs()
    expected = kernels.rms_norm(x, weight)
    busy = True

    def keep_calling():
        while busy:
            kernels.rms_norm(x, weight)

    def same_in_a_child():
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that hangs
            os._exit(not all(np.array_equal(kernels.rms_norm(x, weight), expected) for _ in range(20)))
        return os.waitpid(child, 0)[1] == 0 and np.array_equal(kernels.rms_norm(x, weight), expected)

    assert all(same_in_a_child() for _ in range(5))
    with ThreadPoolExecutor(1) as pool:  # a fork may come in the midst of a call
        pool.submit(keep_calling)
        fine = [same_in_a_child() for _ in range(20)]
        busy = False
    assert all(fine)
    print("same")


def helpers_signals():
    isa.set_num_threads(3)
    kernels.rms_norm(*inputs())
    blocked = [
        int(line.split()[1], 16)
        for task in Path("/proc/self/task").iterdir()
        if task.name != str(os.getpid())
        for line in (task / "status").read_text().splitlines()
        if line.startswith("SigBlk")
    ]
    print(sum(mask >> signal.SIGINT - 1 & 1 and mask >> signal.SIGTERM - 1 & 1 for mask in blocked))


def print_num_threads():
    print(isa.get_num_threads())


def ask_and_cease():
    from pace.roofline import measure

    before = isa.asked_num_threads(), isa.get_num_threads()
    measure(1, seconds=0.02)  # for its own ends, which is not the user's asking
    assert (isa.asked_num_threads(), isa.get_num_threads()) == before
    isa.set_num_threads(5)
    assert isa.asked_num_threads() == isa.get_num_threads() == 5
    isa.set_num_threads(None)
    assert (isa.asked_num_threads(), isa.get_num_threads()) == before
    print(*before)


def test_beside_torch_and_from_many_python_threads():
    pytest.importorskip("torch")
    assert in_a_process(alternate_with_torch) == "same"


def test_after_a_fork():
    assert in_a_process(fork_among_kernels) == "same"


def test_helpers_leave_signals_to_the_program():
    assert in_a_process(helpers_signals, OPENBLAS_NUM_THREADS="1") == "2"


def test_omp_num_threads_is_honoured():
    assert in_a_process(print_num_threads, OMP_NUM_THREADS="1") == "1"
    assert in_a_process(print_num_threads, OMP_NUM_THREADS="3") == "3"
    assert in_a_process(print_num_threads) == str(len(os.sched_getaffinity(0)))


def test_who_asks_for_threads_is_known():
    assert in_a_process(ask_and_cease, OMP_NUM_THREADS="3") == "3 3"
    assert in_a_process(ask_and_cease) == f"None {len(os.sched_getaffinity(0))}"


def test_threads_are_at_least_one():
    for refuses in (isa.set_num_threads, isa.runtime.set_num_threads):
        for count in (0, -1):
            with pytest.raises(ValueError, match=f"num_threads is {count}; it must be at least 1"):
                refuses(count)
