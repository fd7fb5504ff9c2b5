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


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the CPU emulator is for Linux on x86-64"
)
@pytest.mark.skipif(isa.runtime is None, reason="the native kernels: this is a build without them")
def test_every_room_on_the_emulated_cpu():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--durations=10", "tests/emulator/checks.py", "tests/kernels"],
        cwd=ROOT,
        env={**os.environ, "PACE_TEST_EMULATE": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    calls = dict(re.findall(r"^emulated: (\w+) (\d+) calls$", run.stdout, re.MULTILINE))
    assert set(kernels.OPERATIONS) <= calls.keys(), "rooms whose tests called no worker on the emulated CPU"
