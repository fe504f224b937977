"""The laboratory's rows of nested shares and of calls in bulk can fail, and their books are the engine's."""

from __future__ import annotations

import pytest

from bench.fairness import nesting
from bench.fairness.ledger import POOL, Ledger
from bench.fairness.setup import DIMENSIONS, PoolLimits, Share
from bench.fairness.sources import Backlog, Kind, between
from bench.lab.clock import EPOCH, SECOND, Clock
from bench.workloads import seeded
from paceline.engine.dimensions import Window

LIMITS = PoolLimits(600, 60_000)


def test_a_cap_that_does_not_hold_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nesting, "_CASES", nesting._CASES[2:])
    monkeypatch.setattr(nesting, "_SHARES", (Share("team", 2), Share("team/one"), Share("other", 1)))
    found = nesting.nested(5, 0.1)
    assert found["over"] > 0.5
    assert found["off"] > 0.3


def test_the_levels_of_the_oracle_are_those_of_the_engine_with_calls_in_bulk() -> None:
    ledger = Ledger(Clock(), {POOL: LIMITS}, fill=500)
    for tenant, count in (("one", 1), ("many", 10)):
        Backlog(ledger, Kind(tenant, between(100, 2_000), count=count), 3, seeded(5, tenant)).start()
    ledger.clock.until(EPOCH + 90 * SECOND)
    levels, state = ledger.mark().levels, ledger.engine.state
    for place, dimension in enumerate(DIMENSIONS):
        bucket = state.buckets[state.addresses[POOL, "", dimension, Window.MINUTE]]
        assert bucket.level + bucket.refill(ledger.clock.now)[0] == pytest.approx(levels[place], abs=1.0)
    assert {len(call.keys) for call in ledger.calls if call.granted_at is not None} == {1, 10}
    assert not [key for key in state.open if state.open[key].granted_at < ledger.clock.now - 5 * SECOND]
