import os
from pathlib import Path

# torch, the oracle, computes with what an EPYC has: oneDNN would use an Intel CPU's AMX, which sums in another order.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
from hypothesis import HealthCheck, settings

from pace import isa

# The rung is a fixture: it is set once for all examples of a test, which is what is meant.
settings.register_profile("pace", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("pace")

LIBXSMM = Path(__file__).parents[1] / "build" / "libxsmm.so"  # what the Makefile makes of Debian's archive
EMULATED = os.environ.get("PACE_TEST_EMULATE") == "1"


def pytest_configure(config):
    if LIBXSMM.exists():
        os.environ.setdefault("PACE_LIBXSMM", str(LIBXSMM))
    if EMULATED:
        from tests.emulator import emulator

        emulator.install(config)


def pytest_collection_modifyitems(config, items):
    """The emulated CPU does about 25 million multiply-adds a second."""
    if EMULATED:
        slow = [item for item in items if item.get_closest_marker("native_speed")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


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


@pytest.fixture(scope="session")
def smollm2():
    """The path of a real model, fetched where it is not there yet. Fails where it cannot be had."""
    from pace.models.hub import pull

    return pull("smollm2", progress=False)


@pytest.fixture(scope="session")
def gemma3_270m():
    """The path of another."""
    from pace.models.hub import pull

    return pull("gemma3-270m", progress=False)
