import pytest
from hypothesis import HealthCheck, settings

# The rung is a fixture: it is set once for all examples of a test, which is what is meant.
settings.register_profile("pace", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("pace")


@pytest.fixture(scope="session")
def smollm2():
    """The path of the one real model of the tests, fetched where it is not there yet. Fails where it cannot be had."""
    from pace.models.hub import pull

    return pull("smollm2", progress=False)
