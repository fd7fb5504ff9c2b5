"""The kernel tests once more, on the true avx512 objects, executed by an emulated CPU in a process of its own.

So every machine that can run these tests at all runs the AVX-512 code, whatever its own CPU.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pace import isa, kernels

ROOT = Path(__file__).parent.parent
CHECKS = "tests/emulator/checks.py"

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="the CPU emulator is for Linux on x86-64"
    ),
    pytest.mark.skipif(isa.runtime is None, reason="the native kernels: this is a build without them"),
]


def emulated(*parts):
    """Runs each part's files in a process of its own, all at a time, since an emulated CPU is one thread; returns the
    rooms whose workers were called.
    """
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--durations=10", *files],
            cwd=ROOT,
            env={**os.environ, "PACE_TEST_EMULATE": "1", "PYTEST_ADDOPTS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for files in parts
    ]
    called: set[str] = set()
    try:
        for run in runs:
            shown, _ = run.communicate(timeout=600)
            assert run.returncode == 0, shown
            called |= set(re.findall(r"^emulated: (\w+) \d+ calls$", shown, re.MULTILINE))
    finally:
        for run in runs:
            run.kill()
    return called


def test_the_emulated_cpu():
    assert "rms_norm" in emulated([CHECKS, "tests/kernels/test_rms_norm.py"])


@pytest.mark.skipif("avx512" in isa.AVAILABLE, reason="this CPU has AVX-512: the tests of the rooms have run on it")
def test_every_room_on_the_emulated_cpu():
    files = sorted(map(str, ROOT.glob("tests/kernels/test_*.py")))
    called = emulated(files[::2], files[1::2])
    assert set(kernels.OPERATIONS) <= called, "rooms whose tests called no worker on the emulated CPU"
