"""What all tests share: property tests that do not measure how busy the machine is."""

from hypothesis import HealthCheck, settings

# The first input of a run builds hypothesis' tables, which on a slow or shared machine alone takes more than its check
# allows; pytest's own timeout ends what hangs.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
