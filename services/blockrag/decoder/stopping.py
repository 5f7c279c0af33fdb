"""Stop strings: text ends before them, and nothing that may become one is shown too early."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Cuts a stream of text before the stop string that is **completed first**.

    Among stop strings completed by the same character the longest counts. So the result depends on the text alone,
    not on the pieces that it came in. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may be shown now; after a stop string was found, always empty and ``stopped`` is set."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        kept = self._possible_beginning()
        cut = len(self._held) - kept
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            ending = self._held[-length:]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0
