"""Numbers and names that several parts must agree on. Imports nothing, so that everything may import it."""

MIB = 2**20
"""Bytes of a MiB."""

LOOPBACK_NAMES = ("127.0.0.1", "::1", "localhost")
"""Addresses of this machine that no other reaches."""
TENANT_PATTERN = r"[a-z0-9][a-z0-9_-]{0,62}"
"""All of a tenant's name."""

MAX_TEMPERATURE = 10.0
MAX_CONDITIONS = 32
"""Of a filter."""
MAX_CONDITION_VALUES = 256
"""Of one condition of a filter."""

RETRY_AFTER_MS = 250
"""When to ask again after a refusal for want of room."""
STORE_HEADROOM = 1.5
"""Object stores together, as a multiple of the cache's budget: below it blocks spill to disk."""
DISK_RESERVE = 0.05
"""Fraction of a disk that blocks leave free."""

HEALTH_CHECKS = {"health_check_period_s": 1.0, "health_check_timeout_s": 10.0}
"""How often Serve asks each replica whether it is well: a dead one is noticed within it. One that does not answer for
the second time, three times, is replaced."""
