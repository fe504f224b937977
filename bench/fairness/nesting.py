"""The rows of shares within shares, and of calls in bulk."""

from __future__ import annotations

from bench.fairness.ledger import POOL, Call, Ledger
from bench.fairness.oracle import worst
from bench.fairness.setup import PoolLimits, Share
from bench.fairness.sources import Backlog, Kind, between
from bench.fairness.window import Figures, Window, measure
from bench.lab.clock import SECOND, Clock
from bench.workloads import seeded

LIMITS = PoolLimits(4_000, 4_000_000)
CAP = 0.4
WARMUP_S, WINDOW_S = 60.0, 300.0
_SIZES = (1_000, 10_000)

# By its weight the team would get two thirds.
_SHARES = (
    Share("team", 2, cap=CAP),
    Share("team/one", 1),
    Share("team/three", 3),
    Share("team/three/x", 1),
    Share("team/three/y", 2),
    Share("other", 1),
)
_CASES: tuple[dict[str, float], ...] = (
    {"team/one": CAP / 4, "team/three/x": CAP / 4, "team/three/y": CAP / 2, "other": 1 - CAP},
    # What one leaves goes to its sister, then to the sister of its parent; never to others.
    {"team/one": CAP / 4, "team/three/x": CAP * 3 / 4, "other": 1 - CAP},
    {"team/one": CAP, "other": 1 - CAP},
)
"""Who always asks for more than there is, and what each should get."""


def nested(seed: int, part: float) -> Figures:
    """A team with a cap, two apps in it with weights 1 and 3, two users in the larger one with 1 and 2; another team.

    All ask for more; then without one user; then without the larger app. ``off``: the worst of all against what the
    weights and the cap say. ``over``: the team against its cap; a call that began before the window and a piece that is
    saved up for one let it be above by two calls, 20,000 tokens of 8,000,000.
    """
    found: list[Figures] = []
    off = over = 0.0
    for place, fair in enumerate(_CASES):
        ledger = Ledger(Clock(), {POOL: LIMITS}, _SHARES)
        for path in fair:
            names = path.split("/")
            shares = tuple("/".join(names[: depth + 1]) for depth in range(len(names)))
            kind = Kind(path, between(*_SIZES), shares=shares, max_wait_s=7_200.0)
            Backlog(ledger, kind, 20, seeded(seed, f"{place}-{path}")).start()
        window = measure(ledger, 2 * WARMUP_S, WINDOW_S * part)
        service = {path: max(parts) for path, parts in window.service().items()}
        off = max(off, *(abs(service.get(path, 0.0) / its - 1) for path, its in fair.items()))
        team = sum(its for path, its in service.items() if path.startswith("team"))
        over = max(over, team / CAP - 1)
        found.append(window.conserved())
    return {"off": off, "over": over, **worst(found)}


_BULK = {"ones": (1, 40), "twenties": (20, 4), "hundreds": (100, 1)}
"""Calls in one Reserve, and how many Reserves wait always."""


def bulk(seed: int, part: float) -> Figures:
    """Three equal tenants: one calls one by one, one asks for 20 calls at a time, one for 100, a tenth of the bucket.

    ``off``: against a third each. ``claim``: as for single large calls, of those who ask for a hundred.
    """
    ledger = Ledger(Clock(), {POOL: LIMITS})
    for tenant, (count, depth) in _BULK.items():
        kind = Kind(tenant, between(*_SIZES), max_wait_s=7_200.0, count=count)
        Backlog(ledger, kind, depth, seeded(seed, tenant)).start()
    window = measure(ledger, WARMUP_S * part, 4 * WINDOW_S * part)
    service = {tenant: max(parts) for tenant, parts in window.service().items()}
    total = sum(service.values())
    granted = window.granted()
    return {
        "together": sum(len(set(call.keys)) == call.count for call in granted) / max(1, len(granted)),
        "off": max(abs(service.get(tenant, 0.0) * len(_BULK) / total - 1) for tenant in _BULK),
        "claim": _longest([call for call in ledger.calls if call.tenant == "hundreds"], window),
        "served": float(sum(call.tenant == "hundreds" for call in granted)),
        **window.conserved(),
    }


def _longest(calls: list[Call], window: Window) -> float:
    """The longest wait, in parts of the time that the call takes at a third of the limit."""
    longest = 0.0
    for call in calls:
        waited = call.waited_us if call.waited_us is not None else window.until - call.offered_at
        entitled_us = max(need / LIMITS.rate(place) for place, need in enumerate(call.needs)) * len(_BULK) * SECOND
        longest = max(longest, waited / entitled_us)
    return longest
