"""The row of large calls: half a bucket at once, against streams of small ones."""

from __future__ import annotations

from dataclasses import dataclass

from bench.fairness.ledger import POOL, Ledger
from bench.fairness.oracle import worst
from bench.fairness.setup import PoolLimits
from bench.fairness.sources import Backlog, Kind, always, between
from bench.fairness.window import Figures, measure
from bench.lab.clock import SECOND, Clock
from bench.workloads import seeded
from paceline.engine.operations import Priority

LIMITS = PoolLimits(4_000, 1_200_000)
WINDOW_S = 1_200.0


@dataclass(frozen=True, slots=True)
class Against:
    """Whom the large calls are up against, and what part of the limit is theirs by right."""

    tenants: int
    priority: Priority
    mine: Priority
    entitled: float


CASES = (
    Against(1, Priority.STANDARD, Priority.STANDARD, 1 / 2),
    Against(3, Priority.STANDARD, Priority.STANDARD, 1 / 4),
    Against(3, Priority.BATCH, Priority.BATCH, 1 / 4),
    # By the weights of their classes.
    Against(2, Priority.INTERACTIVE, Priority.STANDARD, 8 / 72),
)


def halves(seed: int, part: float) -> Figures:
    """One large call after the other, with pauses of up to 20 s; the worst of all in all cases.

    One that still waits when the run ends counts with its wait so far.
    """
    longest, served = 0.0, 0
    conserved: list[Figures] = []
    for place, case in enumerate(CASES):
        ledger = Ledger(Clock(), {POOL: LIMITS})
        for number in range(case.tenants):
            small = Kind(f"small-{number}", between(500, 2_000), case.priority, max_wait_s=7_200.0)
            Backlog(ledger, small, 20, seeded(seed, f"{place}-{small.tenant}")).start()
        size = LIMITS.bursts[1] // 2
        large = Kind("large", always(size), case.mine, max_wait_s=7_200.0)
        Backlog(ledger, large, 1, seeded(seed, f"{place}-large"), pause_s=(0.0, 20.0)).start()
        window = measure(ledger, 0.0, WINDOW_S * part)
        entitled_us = size / (case.entitled * LIMITS.rate(1)) * SECOND
        for call in ledger.calls:
            if call.tenant == "large":
                waited = call.waited_us if call.waited_us is not None else window.until - call.offered_at
                longest = max(longest, waited / entitled_us)
                served += call.granted_at is not None
        conserved.append(window.conserved())
    return {"claim": longest, "served": float(served), **worst(conserved)}
