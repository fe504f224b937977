"""The row of priority classes: a flood of batch calls below interactive ones, and a flood of interactive ones above."""

from __future__ import annotations

from bench.fairness.judging import least_in_any_window, quantile
from bench.fairness.ledger import POOL, Call, Ledger
from bench.fairness.oracle import worst
from bench.fairness.setup import CLASSES, PoolLimits
from bench.fairness.sources import Backlog, Kind, Stream, always, between, mean_between
from bench.fairness.window import Figures, Window, measure
from bench.lab.clock import SECOND, Clock
from bench.workloads import seeded
from paceline.engine.operations import Priority

LIMITS = PoolLimits(4_000, 4_000_000)
WINDOW_S, PRESSED_S = 600.0, 180.0
_MINUTE = 60 * SECOND
_TALK = (200, 4_000)
_JOBS = (2_000, 10_000)


def flooded(seed: int, part: float) -> Figures:
    """Batch always has calls of half a bucket and small ones waiting; interactive ones are 30 % of the limit."""
    ledger = Ledger(Clock(), {POOL: LIMITS})
    for place in range(3):
        _interactive(ledger, f"talk-{place}", 0.3 / 3, seed)
    half = Kind("halves", always(LIMITS.bursts[1] // 2), Priority.BATCH, max_wait_s=7_200.0)
    Backlog(ledger, half, 3, seeded(seed, half.tenant)).start()
    _jobs(ledger, seed)
    return flood(measure(ledger, 60.0 * part, WINDOW_S * part), _JOBS[1])


def flood(window: Window, largest: int) -> Figures:
    """What interactive calls waited, and what batch was granted, whose small calls have at most ``largest`` tokens."""
    waits = [
        (one.waited_us if one.waited_us is not None else window.until - one.offered_at) / 1_000
        for one in window.offered()
        if one.priority is Priority.INTERACTIVE
    ]
    return {"wait_p99_ms": quantile(waits, 0.99), **_minimum(window, largest), **window.conserved()}


def pressed(seed: int, part: float) -> Figures:
    """Batch has small calls waiting; interactive calls alone ask for more than the limit, or standard ones as well."""
    found = []
    for beside in (False, True):
        ledger = Ledger(Clock(), {POOL: LIMITS})
        _interactive(ledger, "talk", 1.5, seed)
        if beside:
            work = Kind("work", between(*_JOBS), Priority.STANDARD)
            Stream(ledger, work, 1.5 * LIMITS.rate(1) / mean_between(*_JOBS), seeded(seed, work.tenant)).start()
        _jobs(ledger, seed)
        window = measure(ledger, 60.0 * part, PRESSED_S * part)
        found.append({**_minimum(window, _JOBS[1]), **window.conserved()})
    return worst(found)


def _interactive(ledger: Ledger, tenant: str, part: float, seed: int) -> None:
    kind = Kind(tenant, between(*_TALK), Priority.INTERACTIVE)
    Stream(ledger, kind, part * LIMITS.rate(1) / mean_between(*_TALK), seeded(seed, tenant)).start()


def _jobs(ledger: Ledger, seed: int) -> None:
    kind = Kind("jobs", between(*_JOBS), Priority.BATCH, max_wait_s=7_200.0)
    Backlog(ledger, kind, 20, seeded(seed, kind.tenant)).start()


def _minimum(window: Window, largest: int) -> Figures:
    """What batch got in any 60 s, as a part of its minimum: one call of the small ones may just not have come."""
    served = [(call.granted_at or 0, float(call.tokens)) for call in window.granted() if _is_batch(call)]
    least = least_in_any_window(served, window.since, window.until, min(_MINUTE, window.until - window.since))
    tokens = next(iter(window.ledger.pools.values())).tokens
    entitled = tokens * CLASSES[Priority.BATCH][1] / 1_000 * min(1.0, window.seconds / 60)
    return {"minimum": (least + largest) / entitled}


def _is_batch(call: Call) -> bool:
    return call.priority is Priority.BATCH
