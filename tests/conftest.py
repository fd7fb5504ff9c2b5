from hypothesis import HealthCheck, settings

# The rung is a fixture: it is set once for all examples of a test, which is what is meant.
settings.register_profile("pace", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("pace")
