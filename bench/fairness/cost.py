"""The row of cost: the processor time of a decision, by how many wait."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence

from bench.fairness.judging import fit
from bench.fairness.ledger import POOL
from bench.fairness.setup import CLASSES, PoolLimits, Share, define_classes, define_pool, define_share
from bench.fairness.window import Figures
from bench.lab.clock import EPOCH, SECOND
from bench.workloads import seeded
from paceline.engine.accounting import Estimate, Usage, UsageKind
from paceline.engine.answers import Denied, Granted, Invalid
from paceline.engine.engine import Caps, Engine
from paceline.engine.operations import Candidate, Commit, Disposition, Operation, Outcome, Reserve
from paceline.engine.state import State

LIMITS = PoolLimits(6_000_000, 60_000_000)
SIZES = (500, 1_000, 2_000)
WAITERS = (10, 100, 1_000, 10_000, 100_000)
TENANTS, SHARES = 500, 20
DECISIONS, WARM = 3_000, 300
_AT_ONCE = 1_000
_MOST_CPU_S = 20.0
_DAY_US = 86_400 * SECOND


class Queue:
    """An engine in which always ``waiters`` Reserves wait."""

    def __init__(self, waiters: int, seed: int) -> None:
        self.waiters = waiters
        self.engine = Engine("cost", State("cost"), Caps(waiters=300_000, waiters_per_tenant=300_000))
        self._chance = seeded(seed, f"cost-{waiters}")
        self._number = self._ticket = self._waiting = 0
        self._granted: list[Granted] = []
        """Not settled yet."""
        self._now = EPOCH
        self._wake: int | None = None
        self.decided = 0
        self.cpu_ns = 0
        shares = [Share(f"share-{place}", 1 + place % 4) for place in range(SHARES)]
        self._step(
            [
                define_pool(POOL, LIMITS, 0),
                *define_classes(),
                *(define_share(share, LIMITS) for share in shares),
            ]
        )

    def fill(self) -> bool:
        """Let as many begin to wait as shall wait; false if that takes too long."""
        while self._waiting < self.waiters:
            self._take_in(min(_AT_ONCE, self.waiters - self._waiting))
            if self.cpu_ns > 6 * _MOST_CPU_S * 1e9:
                return False
        return True

    def decide(self, decisions: int) -> float:
        """Serve and take in until so many are decided; µs of processor time for each: Reserve, turn and Commit."""
        self.decided = self.cpu_ns = 0
        while self.decided < decisions and self.cpu_ns < _MOST_CPU_S * 1e9:
            self._now = max(self._now + 1, self._wake if self._wake is not None else self._now + 1_000)
            # What was granted is settled, and as many come as have gone.
            settled, self._granted = [_commit(one) for one in self._granted], []
            self._step(settled)
            self._take_in(self.waiters - self._waiting)
        return self.cpu_ns / 1_000 / max(1, self.decided)

    def _take_in(self, many: int) -> None:
        self._waiting += many
        self._step([self._reserve() for _ in range(many)])

    def _reserve(self) -> Reserve:
        number = self._number
        self._number += 1
        tenant = number % min(TENANTS, self.waiters)
        estimate = Estimate(1, self._chance.choice(SIZES), 0, 0, 0)
        candidate = Candidate(POOL, (f"share-{tenant % SHARES}",), estimate)
        priority = list(CLASSES)[tenant % len(CLASSES)]
        return Reserve(f"c-{number}", (candidate,), tenant=f"t-{tenant}", priority=priority, max_wait_us=_DAY_US)

    def _step(self, operations: Sequence[Operation]) -> None:
        tickets = []
        for operation in operations:
            self._ticket += 1
            tickets.append((self._ticket, operation))
        began = time.thread_time_ns()
        step = self.engine.step(self._now, tickets)
        self.cpu_ns += time.thread_time_ns() - began
        self._wake = step.wake_at
        granted = [answer for _, answer in step.answers if isinstance(answer, Granted)]
        if any(isinstance(answer, Denied | Invalid) for _, answer in step.answers):
            raise RuntimeError("a call was turned away: their number is not what is measured")
        self._granted += granted
        self._waiting -= len(granted)
        self.decided += len(granted)


def _commit(granted: Granted) -> Commit:
    tokens = granted.context.charges[-1][1]
    return Commit(granted.keys[0], Outcome(Disposition.SUCCEEDED, Usage(1, tokens), UsageKind.FINAL))


def cost(seed: int, part: float) -> Figures:
    """Microseconds of a decision with so many waiters, and how they grow.

    ``growth``: the cost with the most waiters ÷ that with the fewest ÷ the ratio of the logarithms of their numbers.
    ``exponent``: of the power of the number of waiters by which the cost grows from 1,000 on, when all tenants are
    there; a logarithm has about 0.1 there, a root 0.5.
    """
    found: dict[int, float] = {}
    for waiters in WAITERS:
        if waiters > 100_000 * part:
            continue
        found[waiters] = measured(waiters, seed, max(100, round(DECISIONS * part)))
    figures = {f"us_{waiters}": us for waiters, us in found.items()}
    least, most = min(found), max(found)
    growth = found[most] / found[least] / (math.log(most) / math.log(least))
    many = [(math.log(waiters), math.log(us)) for waiters, us in found.items() if waiters >= 1_000]
    known = len(many) > 1 and not any(math.isnan(us) for us in found.values())
    return {"growth": growth, "exponent": fit(many)[1] if known else math.nan, **figures}


def measured(waiters: int, seed: int, decisions: int) -> float:
    """The cost of one point; not a number if so many cannot even begin to wait within two minutes.

    The garbage collector is off: its cost is that of the process, not of a decision.
    """
    queue = Queue(waiters, seed)
    gc.collect()
    gc.disable()
    try:
        if not queue.fill():
            return math.nan
        queue.decide(min(WARM, decisions))
        return queue.decide(decisions)
    finally:
        gc.enable()
        del queue
        gc.collect()
