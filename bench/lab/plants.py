"""Wrong restrictions, put into the books as if they had been learned."""

from __future__ import annotations

import msgspec

from bench.lab.clock import SECOND
from bench.lab.coordinator import Coordinator
from bench.lab.setting import Setting
from paceline.engine import events as ev
from paceline.engine.pressure import Crowd, Pressure, overloaded_first

PLANTS = ("limit", "burst", "level", "outside", "block", "concurrency", "overload")
"""A tenth of the limit; a twentieth of the burst; two bursts of debt; others that use 90 % of the limit; a pool that is
blocked for five minutes; one call in flight, by a refusal for concurrency; the same by an overload."""
BLOCK_US = 300 * SECOND


def plant(what: str, coordinator: Coordinator, setting: Setting, now: int) -> None:
    """Put it into the books now."""
    state, number = coordinator.state, coordinator.number(setting.binding)
    bucket = state.buckets[number]
    refilled, carry = bucket.refill(now)
    state.apply(ev.Clocked(max(now, state.at)))
    state.apply(ev.Advanced(number, refilled, carry, bucket.lost(now, refilled)))
    if what in ("limit", "burst"):
        amount = bucket.amount // 10 if what == "limit" else bucket.amount
        burst = bucket.burst // (10 if what == "limit" else 20)
        shift = min(0, burst - bucket.level)
        state.apply(
            ev.LimitMoved(
                number, amount, burst, shift, True, bucket.configured, bucket.configured_burst, bucket.override
            )
        )
    elif what == "level":
        state.apply(ev.Corrected(number, -2 * bucket.burst))
    elif what == "outside":
        state.apply(ev.OutsideLearned(number, bucket.amount * 9 // 10))
    elif what == "block":
        state.apply(ev.PoolBlocked(coordinator.resolved.pool, now + BLOCK_US, False))
    elif what == "concurrency":
        _press(coordinator, Pressure(crowd=Crowd(1, 1, 3 * SECOND, 3 * SECOND, now, now)))
    else:
        flying = len(state.open_in[coordinator.resolved.pool])
        overload = overloaded_first(flying, SECOND // 10, SECOND // 10, now)
        _press(coordinator, Pressure(overload=msgspec.structs.replace(overload, limit=1, cut_at=now)))


def _press(coordinator: Coordinator, pressure: Pressure) -> None:
    coordinator.state.apply(ev.Pressed(coordinator.resolved.pool, pressure))
