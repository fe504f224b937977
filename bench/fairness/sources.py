"""Who calls: tenants whose calls come by themselves, and tenants that always have some waiting."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from bench.fairness.ledger import POOL, Call, Ledger
from bench.lab.clock import SECOND
from paceline.engine.operations import Priority

Size = Callable[[random.Random], int]
"""Tokens of the next call."""


def between(least: int, most: int) -> Size:
    """Log-uniform: as many from 1,000 to 2,000 as from 2,000 to 4,000."""
    low, high = math.log(least), math.log(most)
    return lambda chance: round(math.exp(chance.uniform(low, high)))


def mean_between(least: int, most: int) -> float:
    """The mean of :func:`between`."""
    return (most - least) / math.log(most / least)


def always(tokens: int) -> Size:
    """All of one size."""
    return lambda chance: tokens


@dataclass(frozen=True, slots=True)
class Kind:
    """What all calls of a source have in common."""

    tenant: str
    size: Size
    priority: Priority = Priority.STANDARD
    shares: tuple[str, ...] = ()
    pools: tuple[str, ...] = (POOL,)
    max_wait_s: float = 60.0
    took_s: tuple[float, float] = (0.5, 4.0)
    count: int = 1
    """Calls in bulk."""

    def call(self, number: int, chance: random.Random, done: Callable[[Call], None] = lambda call: None) -> Call:
        """The next one."""
        return Call(
            f"{self.tenant}-{number}" if self.count == 1 else f"{self.tenant}/{UUID(int=number)}",
            self.tenant,
            self.size(chance),
            self.priority,
            self.shares,
            self.pools,
            int(self.max_wait_s * SECOND),
            int(chance.uniform(*self.took_s) * SECOND),
            self.count,
            done=done,
        )


@dataclass(slots=True)
class Stream:
    """Calls that come by themselves, as a Poisson process of ``rate`` a second; one that is denied is lost.

    What comes does not depend on what the ledger answers. ``change`` may make a call another one.
    """

    ledger: Ledger
    kind: Kind
    rate: float
    chance: random.Random
    change: Callable[[Call, random.Random], None] = lambda call, chance: None
    factor: Callable[[float], float] = lambda seconds: 1.0
    """Of the rate, at most 1, by the time."""
    _number: int = 0

    def start(self) -> None:
        """Begin now."""
        self.ledger.clock.after(self.chance.expovariate(self.rate), self._next)

    def _next(self) -> None:
        clock = self.ledger.clock
        clock.after(self.chance.expovariate(self.rate), self._next)
        self._number += 1
        call = self.kind.call(self._number, self.chance)
        self.change(call, self.chance)
        if self.chance.random() < self.factor(clock.seconds):
            self.ledger.offer(call)


@dataclass(slots=True)
class Backlog:
    """Always has ``depth`` calls waiting: the next is offered when one was let go, after a pause of ``pause_s``."""

    ledger: Ledger
    kind: Kind
    depth: int
    chance: random.Random
    pause_s: tuple[float, float] = (0.0, 0.0)
    active: bool = False
    _number: int = 0
    _waiting: dict[str, Call] = field(default_factory=dict)

    def start(self) -> None:
        """Begin now, with all at once."""
        self.active = True
        for _ in range(self.depth):
            self._offer()

    def stop(self) -> None:
        """Withdraw those that wait, and offer no more."""
        self.active = False
        for call in list(self._waiting.values()):
            self.ledger.withdraw(call)

    def _offer(self) -> None:
        if not self.active or len(self._waiting) >= self.depth:
            return
        self._number += 1
        call = self.kind.call(self._number, self.chance, self._done)
        self._waiting[call.key] = call
        self.ledger.offer(call)

    def _done(self, call: Call) -> None:
        self._waiting.pop(call.key, None)
        if self.active:
            # Who is turned away comes back later.
            pause = self.chance.uniform(*self.pause_s) if call.denied_at is None else 1.0
            self.ledger.clock.after(pause, self._offer)
