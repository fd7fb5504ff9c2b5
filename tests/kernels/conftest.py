"""Every kernel test runs on every rung that can be executed here.

On a CPU without AVX-512 the avx512 rung is skipped by name in this process; tests/test_emulated.py runs these same
tests once more in a process of their own with PACE_TEST_EMULATE=1, where the true avx512 objects are executed by an
emulated CPU. PACE_REQUIRE_ISA=avx512 turns the skip into a failure.
"""

import os

import pytest

from pace import isa, kernels

EMULATED = os.environ.get("PACE_TEST_EMULATE") == "1"


@pytest.fixture(params=["avx512"] if EMULATED else ["avx2", "avx512"])
def rung(request):
    """The rung that native kernels run on during the test."""
    name = request.param
    if name not in isa.AVAILABLE and not EMULATED:
        if os.environ.get("PACE_REQUIRE_ISA") == name:
            pytest.fail(f"PACE_REQUIRE_ISA={name}, but this host lacks {', '.join(isa.missing(name))}")
        pytest.skip(f"rung {name}: this host lacks {', '.join(isa.missing(name))}")
    before = isa.runtime.get_rung()
    isa.runtime.set_rung(name)
    yield name
    isa.runtime.set_rung(before)


@pytest.fixture
def native(rung):
    """native("rms_norm") is the native form of rms_norm, on the rung of the test."""
    return kernels.native
