"""The rows of fair sharing: equal tenants, few large calls beside many small ones, weights, and a tenant on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bench.fairness.judging import fair_shares, jain
from bench.fairness.ledger import POOL, Call, Ledger
from bench.fairness.oracle import worst
from bench.fairness.setup import PoolLimits, Share
from bench.fairness.sources import Backlog, Kind, Stream, always, between, mean_between
from bench.fairness.window import By, Figures, Window, by_tenant, measure
from bench.lab.clock import Clock
from bench.workloads import seeded
from paceline.engine.operations import Priority

LIMITS = PoolLimits(4_000, 4_000_000)
WARMUP_S, WINDOW_S = 60.0, 300.0
_SIZES = (1_000, 10_000)


def demands(seed: int, part: float) -> Figures:
    """Eight equal tenants that ask for 1:2:4:…:128, four times the limit together."""
    ledger = Ledger(Clock(), {POOL: LIMITS})
    unit = 4.0 * LIMITS.rate(1) / 255 / mean_between(*_SIZES)
    for power in range(8):
        kind = Kind(f"t{2**power}", between(*_SIZES))
        Stream(ledger, kind, unit * 2**power, seeded(seed, kind.tenant)).start()
    return fairness(measure(ledger, WARMUP_S * part, WINDOW_S * part))


def dominant(seed: int, part: float) -> Figures:
    """100 calls a second of 100 tokens beside one call a second of 100,000: one is bound by requests, one by tokens."""
    ledger = Ledger(Clock(), {POOL: LIMITS})
    for tenant, rate, tokens in (("many", 100.0, 100), ("large", 1.0, 100_000)):
        Stream(ledger, Kind(tenant, always(tokens)), rate, seeded(seed, tenant)).start()
    window = measure(ledger, WARMUP_S * part, WINDOW_S * part)
    shares = {tenant: max(parts) for tenant, parts in window.service().items()}
    fair = fairness(window)
    return {
        "apart": 1.0 - min(shares.values()) / max(shares.values()) if len(shares) == 2 else 1.0,
        "below": fair["below"],
        **window.conserved(),
    }


def weights(seed: int, part: float) -> Figures:
    """Three shares of weight 1, 2 and 4 with two tenants each; all ask for more than their part."""
    told = {"one": 1, "two": 2, "four": 4}
    ledger = Ledger(Clock(), {POOL: LIMITS}, [Share(name, weight) for name, weight in told.items()])
    rate = LIMITS.rate(1) / mean_between(*_SIZES)
    # Who has the least weight asks for the most.
    for name, asks in (("one", 1.5), ("two", 1.0), ("four", 1.0)):
        for place in (1, 2):
            kind = Kind(f"{name}-{place}", between(*_SIZES), shares=(name,))
            Stream(ledger, kind, rate * asks / 2, seeded(seed, kind.tenant)).start()
    return by_weights(measure(ledger, WARMUP_S * part, WINDOW_S * part), told)


def by_weights(window: Window, told: Mapping[str, int]) -> Figures:
    """How far the service of shares is off their weights, the worst of them; two tenants ``SHARE-1`` and ``SHARE-2`` of
    one share from each other; the oracle."""
    service = {name: max(parts) for name, parts in window.service(_by_share).items()}
    # The share of weight 1, were it exact; without any service nothing is.
    one = sum(service.values()) / sum(told.values()) or math.nan
    off = max(abs(service.get(name, 0.0) / (weight * one) - 1) for name, weight in told.items())
    each = window.service()
    pairs = [[max(each.get(f"{name}-{place}", (0.0,))) for place in (1, 2)] for name in told]
    return {
        "off": off,
        "within": max(1.0 - min(pair) / max(pair) if max(pair) else 0.0 for pair in pairs),
        **window.conserved(),
    }


def _by_share(call: Call) -> str:
    return call.shares[0]


def lone(seed: int, part: float) -> Figures:
    """One tenant, beside shares and guarantees that nobody uses; the worst of the three classes."""
    found: list[Figures] = []
    for priority in Priority:
        shares = [Share("mine", 1), Share("theirs", 4, 0.4)]
        ledger = Ledger(Clock(), {POOL: LIMITS}, shares)
        kind = Kind("lone", between(*_SIZES), priority, ("mine",), max_wait_s=3_600.0)
        Backlog(ledger, kind, 20, seeded(seed, kind.tenant)).start()
        found.append(measure(ledger, 10.0, 120.0 * part).conserved())
    return worst(found)


def fairness(window: Window, by: By = by_tenant) -> Figures:
    """Jain's index over those that asked for more than their share; how far anybody is below theirs; the oracle."""
    asked, service = window.demand(by), window.service(by)
    fair = fair_shares(asked, {}, (1.0, 1.0))
    got = {name: max(service.get(name, (0.0,))) / share for name, share in fair.items() if share}
    over = [got[name] for name, share in fair.items() if name in got and max(asked[name]) > share * 1.000_001]
    return {"jain": jain(over), "below": 1.0 - min(got.values()), **window.conserved()}
