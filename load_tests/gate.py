"""The service level that a run must keep."""

from __future__ import annotations

from dataclasses import dataclass

from locust.stats import RequestStats, StatsEntry

METHOD = "gRPC"


def first_token(mode: str) -> str:
    """Name of the entry that times a mode's first tokens."""
    return f"first token ({mode})"


def whole_answer(mode: str) -> str:
    """Name of the entry that times a mode's whole answers."""
    return f"whole answer ({mode})"


@dataclass(frozen=True)
class ServiceLevel:
    """Limits; a run that breaks one exits with 1."""

    mode: str = "block"
    """The attention mode whose first token is held to the limit."""
    p95_first_token_ms: float = 10_000.0
    """95 % of first tokens must come within this."""
    failure_ratio: float = 0.01
    """Most answers, of all modes, that may fail."""
    least_answers: int = 10
    """A run with fewer answers says nothing."""


@dataclass(frozen=True)
class Verdict:
    """What a run came to."""

    answers: int
    failures: int
    p95_first_token_ms: float | None
    """None: no first token came."""
    problems: tuple[str, ...]
    """Empty: the service level was kept."""

    @property
    def kept(self) -> bool:
        return not self.problems


def judge(stats: RequestStats, level: ServiceLevel, crashes: int = 0) -> Verdict:
    """Holds a run's numbers against the service level; ``crashes`` counts errors of the users' own code."""
    entries: dict[tuple[str, str], StatsEntry] = stats.entries
    answers = [entry for (name, _), entry in entries.items() if name.startswith("whole answer")]
    count = sum(entry.num_requests for entry in answers)
    failures = sum(entry.num_failures for entry in answers)
    first = entries.get((first_token(level.mode), METHOD))
    p95 = float(first.get_response_time_percentile(0.95)) if first is not None and first.num_requests else None
    problems = []
    if count < level.least_answers:
        problems.append(f"{count} answers, at least {level.least_answers} are needed")
    if count and failures / count > level.failure_ratio:
        problems.append(f"{failures} of {count} answers failed, more than {level.failure_ratio:.1%}")
    if p95 is None:
        problems.append(f"no first token in mode {level.mode}")
    elif p95 > level.p95_first_token_ms:
        problems.append(f"p95 of the first token is {p95:.0f} ms, more than {level.p95_first_token_ms:.0f} ms")
    if crashes:
        problems.append(f"{crashes} errors in the users' own code")
    return Verdict(count, failures, p95, tuple(problems))
