"""Load or encode: whichever was quicker so far."""

from __future__ import annotations

_NEWEST = 0.2
"""Weight of the latest measurement."""
_SECOND_CHANCE = 16


class Pace:
    """Moving mean of the seconds that a unit takes; 0 before the first was measured."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def measured(self, seconds: float, units: int) -> None:
        """Takes another measurement into account."""
        pace = seconds / units
        self._seconds += _NEWEST * (pace - self._seconds) if self._seconds else pace

    def expected(self, units: int) -> float:
        """Seconds that so many take."""
        return self._seconds * units


class LoadOrEncode:
    """Has a block read unless that would take longer than encoding it.

    Then one in ``_SECOND_CHANCE`` is read all the same, so that what was slow for a while is found to be fast again.
    """

    def __init__(self) -> None:
        self.reading = Pace()
        self.slower = 0
        """Blocks that were not read."""
        self._passed_over = 0

    def load(self, units: int, encode_s: float) -> bool:
        """Whether to read a block that encoding takes ``encode_s`` for."""
        if self.reading.expected(units) <= encode_s:
            return True
        self._passed_over += 1
        if self._passed_over % _SECOND_CHANCE == 0:
            return True
        self.slower += 1
        return False
