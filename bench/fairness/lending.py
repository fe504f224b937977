"""The row of guarantees: lent while their owner is away, and how fast they come back."""

from __future__ import annotations

from collections.abc import Sequence

from bench.fairness.ledger import POOL, Call, Ledger
from bench.fairness.oracle import conserved
from bench.fairness.setup import PoolLimits, Share
from bench.fairness.sources import Backlog, Kind, between
from bench.fairness.window import Figures
from bench.lab.clock import SECOND, Clock
from bench.workloads import seeded

LIMITS = PoolLimits(4_000, 4_000_000)
GUARANTEE = 0.4
_PHASE_S = 60.0
_CYCLES = 4


def lending(seed: int, part: float) -> Figures:
    """The owner is away for a minute and back for a minute, four times; others always ask for all that there is.

    By its weight the owner would get a fifth; its guarantee is two fifths.
    """
    chance = seeded(seed, "phases")
    ledger = Ledger(Clock(), {POOL: LIMITS}, [Share("owner", 1, GUARANTEE), Share("others", 4)])
    clock = ledger.clock
    others = Kind("others", between(1_000, 100_000), shares=("others",), max_wait_s=7_200.0)
    Backlog(ledger, others, 20, seeded(seed, others.tenant)).start()
    mine = Kind("owner", between(1_000, 10_000), shares=("owner",), max_wait_s=7_200.0)
    owner = Backlog(ledger, mine, 20, seeded(seed, mine.tenant))
    clock.until(clock.now + 20 * SECOND)
    begin = ledger.mark()
    lent, lag = 1.0, 0.0
    for _ in range(max(1, round(_CYCLES * part))):
        left = ledger.mark()
        clock.until(clock.now + int(chance.uniform(0.8, 1.2) * _PHASE_S * SECOND))
        lent = min(lent, conserved(LIMITS, left, ledger.mark())["used"])
        back = clock.now
        owner.start()
        clock.until(back + int(_PHASE_S * SECOND))
        lag = max(lag, lag_s(ledger.calls, back, clock.now))
        owner.stop()
    return {"lent": lent, "lag_s": lag, **conserved(LIMITS, begin, ledger.mark())}


def lag_s(calls: Sequence[Call], back: int, until: int) -> float:
    """By how many seconds the owner's service is behind its guarantee, at worst, since it came ``back``.

    At each instant: the time since, less the time that its service so far takes at the guaranteed rate, in the
    dimension in which it is larger. The call that is next may be under way: it counts as served.
    """
    rates = [GUARANTEE * LIMITS.rate(place) for place in range(2)]
    served = sorted(
        (call for call in calls if call.tenant == "owner" and call.granted_at is not None and call.granted_at >= back),
        key=lambda call: call.granted_at or 0,
    )
    sums, worst = [0.0, 0.0], 0.0
    for call in served:
        sums = [total + need for total, need in zip(sums, call.needs, strict=True)]
        due = max(total / rate for total, rate in zip(sums, rates, strict=True))
        worst = max(worst, ((call.granted_at or 0) - back) / SECOND - due)
    due = max(total / rate for total, rate in zip(sums, rates, strict=True))
    return max(worst, (until - back) / SECOND - due - 10_000 / rates[1])
