"""How many machines a load needs."""

from __future__ import annotations

from dataclasses import replace

from blockrag.simulation.cluster import Outcome, simulate
from blockrag.simulation.scenario import Caching, Scenario, StageTimes

MOST_MACHINES = 65_536
CACHINGS: tuple[Caching, ...] = ("block", "prefix", "none")

_SPAN_S = 20.0
"""A run lasts at least so long: a shorter one ends before a queue shows."""
_IDLE = 0.02
"""Where machines compute less than this share of the time, more of them change nothing."""


def smallest(scenario: Scenario, times: StageTimes, target_s: float) -> tuple[Scenario, Outcome] | None:
    """The scenario on the fewest machines whose 95th percentile of the time to first token is within ``target_s``.

    By doubling and halving, so within an eighth of the fewest. None: more than ``MOST_MACHINES`` would be needed, or
    the target is missed where nothing waits.
    """

    def run(machines: int) -> tuple[Scenario, Outcome]:
        questions = max(scenario.questions, int(_SPAN_S * scenario.rate))
        tried = replace(scenario, machines=machines, questions=questions)
        return tried, simulate(tried, times)

    def keeps(outcome: Outcome) -> bool:
        return outcome.ttft_p95 <= target_s and not outcome.growing

    machines, found = 1, run(1)
    while not keeps(found[1]):
        machines *= 2
        if machines > MOST_MACHINES or max(found[1].decoders, found[1].encoders) < _IDLE:
            return None
        found = run(machines)
    too_few = machines // 2
    while machines - too_few > max(1, machines // 8):
        middle = (machines + too_few) // 2
        tried = run(middle)
        if keeps(tried[1]):
            machines, found = middle, tried
        else:
            too_few = middle
    return found


def beside_others(scenario: Scenario, times: StageTimes, target_s: float) -> list[tuple[Scenario, Outcome | None]]:
    """The fewest machines with blocks, with prefix caching and without any; an outcome of None: none are enough."""
    rows: list[tuple[Scenario, Outcome | None]] = []
    for caching in CACHINGS:
        asked = replace(scenario, caching=caching)
        rows.append(smallest(asked, times, target_s) or (asked, None))
    return rows
