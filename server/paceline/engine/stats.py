"""Plain counters of what a ledger did, for telemetry to read. Not part of the books: a restart begins at zero."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from paceline.engine.answers import Reason, Would
from paceline.engine.audit import Audit
from paceline.engine.hindsight import Hindsight
from paceline.engine.operations import Outcome, Priority, Refusal

WAIT_BOUNDS_US = (1_000, 5_000, 25_000, 100_000, 250_000, 1_000_000, 2_500_000, 10_000_000, 60_000_000, 300_000_000)
"""Upper bounds of the wait histogram, in microseconds; one more cell counts what is above."""


class Stats:
    """Counters by pool and a bounded label. Pools are capped by the engine, so these are too."""

    def __init__(self) -> None:
        self.grants: Counter[tuple[str, Priority]] = Counter()
        self.denials: Counter[tuple[str, Reason]] = Counter()
        self.would_deny: Counter[tuple[str, Reason]] = Counter()
        """In observe mode: granted, where enforcing would have denied."""
        self.would_wait: Counter[str] = Counter()
        self.expiries: Counter[str] = Counter()
        self.settlements: Counter[str] = Counter()
        self.refusals: Counter[tuple[str, Refusal]] = Counter()
        """What upstream refused, as callers reported it."""
        self.corrections: Counter[tuple[str, int]] = Counter()
        """Absolute corrections of levels by readings, by pool and dimension."""
        self.waits: dict[tuple[str, Priority], list[int]] = {}
        self.wait_sum_us: Counter[tuple[str, Priority]] = Counter()
        self.short: Counter[int] = Counter()
        """Denials while a budget for a day or a month had too little left, by the number of its bucket."""
        self.hindsight = Hindsight()
        self.audit = Audit()

    def granted(self, pool: str, priority: Priority, count: int, waited_us: int, would: Would | None) -> None:
        address = (pool, priority)
        cells = self.waits.get(address)
        if cells is None:
            cells = self.waits[address] = [0] * (len(WAIT_BOUNDS_US) + 1)
        self.grants[address] += count
        if waited_us:
            cells[bisect_left(WAIT_BOUNDS_US, waited_us)] += count
            self.wait_sum_us[address] += waited_us * count
        else:
            cells[0] += count
        if would is not None:
            if would.reason is not None:
                self.would_deny[pool, would.reason] += count
            elif would.wait_us:
                self.would_wait[pool] += count

    def denied(self, pool: str, reason: Reason) -> None:
        self.denials[pool, reason] += 1

    def expired(self, pool: str) -> None:
        self.expiries[pool] += 1

    def settled(self, pool: str, outcome: Outcome) -> None:
        self.settlements[pool] += 1
        if outcome.observation is not None and outcome.observation.refusal is not None:
            self.refusals[pool, outcome.observation.refusal] += 1
