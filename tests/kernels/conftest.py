"""Every kernel test runs on every rung that can be executed here (the fixture `rung`).

On a CPU without AVX-512 the avx512 rung is skipped by name in this process; tests/test_emulated.py runs these same
tests once more in a process of their own with PACE_TEST_EMULATE=1, where the true avx512 objects are executed by an
emulated CPU. PACE_REQUIRE_ISA=avx512 turns the skip into a failure.
"""

import pytest

from pace import kernels


@pytest.fixture
def native(rung):
    """native("rms_norm") is the native form of rms_norm, on the rung of the test."""
    return kernels.native
