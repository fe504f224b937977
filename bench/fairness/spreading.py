"""The row of candidates: two models in one ledger, of which the first cannot do it alone."""

from __future__ import annotations

from bench.fairness.ledger import Ledger
from bench.fairness.setup import PoolLimits
from bench.fairness.sources import Kind, Stream, always
from bench.fairness.window import Figures, measure
from bench.lab.clock import Clock
from bench.workloads import seeded

POOLS = {"first": PoolLimits(4_000, 1_000_000), "second": PoolLimits(4_000, 2_000_000)}
_TOKENS = 2_000
"""All of one size: so that whenever one fits, all do, and the oracle's idle time is any wait beside a room."""


def candidates(seed: int, part: float) -> Figures:
    """Calls that take either model come at 1.4 times the limit of both; some take only the one, or only the other."""
    ledger = Ledger(Clock(), POOLS)
    rate = sum(limits.rate(1) for limits in POOLS.values()) / _TOKENS
    asks = (
        ("either-1", ("first", "second"), 0.6),
        ("either-2", ("first", "second"), 0.6),
        ("first", ("first",), 0.1),
        ("second", ("second",), 0.1),
    )
    for tenant, pools, part_of in asks:
        kind = Kind(tenant, always(_TOKENS), pools=pools, max_wait_s=30.0)
        Stream(ledger, kind, rate * part_of, seeded(seed, tenant)).start()
    window = measure(ledger, 60.0 * part, 300.0 * part)
    return window.conserved()
