"""A measured stretch of a run: what was asked for in it, what was granted, and what the oracle says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.fairness.ledger import Call, Ledger
from bench.fairness.oracle import Mark, conserved, worst
from bench.fairness.setup import PoolLimits
from bench.lab.clock import SECOND

Figures = dict[str, float]
By = Callable[[Call], str]
"""To whom a call counts."""


def by_tenant(call: Call) -> str:
    """The tenant."""
    return call.tenant


class Recorded(Protocol):
    """A run: of the engine on a virtual clock, or of real processes."""

    @property
    def pools(self) -> Mapping[str, PoolLimits]:
        """The limits of each."""

    @property
    def calls(self) -> Sequence[Call]:
        """All that were offered."""


@dataclass(frozen=True, slots=True)
class Window:
    """What happened from ``begin`` to ``end``."""

    ledger: Recorded
    begin: dict[str, Mark]
    end: dict[str, Mark]

    @property
    def since(self) -> int:
        """The instant at which it begins."""
        return next(iter(self.begin.values())).at

    @property
    def until(self) -> int:
        """The instant at which it has ended."""
        return next(iter(self.end.values())).at

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.until - self.since) / SECOND

    def conserved(self) -> Figures:
        """The oracle's figures: the worst of all pools."""
        pools = self.ledger.pools.items()
        return worst([conserved(limits, self.begin[name], self.end[name]) for name, limits in pools])

    def granted(self) -> list[Call]:
        """Those granted in it."""
        return [one for one in self.ledger.calls if one.granted_at is not None and self._holds(one.granted_at)]

    def offered(self) -> list[Call]:
        """Those offered in it."""
        return [one for one in self.ledger.calls if self._holds(one.offered_at)]

    def service(self, by: By = by_tenant) -> dict[str, tuple[float, ...]]:
        """What each was granted, by dimension, in parts of what refills in the window."""
        return self._parts(self.granted(), by)

    def demand(self, by: By = by_tenant) -> dict[str, tuple[float, ...]]:
        """What each asked for, in the same parts."""
        return self._parts(self.offered(), by)

    def _holds(self, instant: int) -> bool:
        return self.since <= instant < self.until

    def _parts(self, calls: list[Call], by: By) -> dict[str, tuple[float, ...]]:
        limits: PoolLimits = next(iter(self.ledger.pools.values()))
        sums: dict[str, list[int]] = {}
        for call in calls:
            mine = sums.setdefault(by(call), [0] * len(limits.amounts))
            for place, need in enumerate(call.needs):
                mine[place] += need
        refills = [limits.rate(place) * self.seconds for place in range(len(limits.amounts))]
        return {
            name: tuple(amount / refill for amount, refill in zip(mine, refills, strict=True))
            for name, mine in sums.items()
        }


def measure(ledger: Ledger, warmup_s: float, window_s: float) -> Window:
    """Let the run go on for both, and measure the second."""
    clock = ledger.clock
    clock.until(clock.now + int(warmup_s * SECOND))
    begin = {name: ledger.mark(name) for name in ledger.pools}
    clock.until(clock.now + int(window_s * SECOND))
    return Window(ledger, begin, {name: ledger.mark(name) for name in ledger.pools})
