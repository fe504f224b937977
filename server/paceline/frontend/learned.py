"""What is known of limits and why, as AdminService shows it. Reads only, and only what is in memory."""

from __future__ import annotations

from collections.abc import Iterable

from paceline.engine.bucket import Bucket
from paceline.engine.demand import RECENT_US, Held, PoolDemand
from paceline.engine.dimensions import UNLIMITED, Dimension, Window
from paceline.engine.reconcile import READING_TTL_US, interval
from paceline.engine.state import Pool, State
from paceline.frontend.view import level
from paceline.providers.tiers import Tiers
from paceline_client.stubs import v1 as pb


def own_limits(state: State, pool: Pool) -> list[Bucket]:
    """A pool's own limits, without what only counts."""
    return [bucket for bucket in map(state.buckets.__getitem__, pool.buckets) if bucket.amount < UNLIMITED]


def in_force(buckets: Iterable[Bucket]) -> dict[tuple[Dimension, Window], int]:
    """The amounts of limits."""
    return {(bucket.dimension, bucket.window): bucket.amount for bucket in buckets}


def origin(message: pb.Limit, bucket: Bucket, tiers: Tiers) -> None:
    """Say more exactly where a limit that nobody has learned comes from."""
    if message.source != pb.LIMIT_SOURCE_TIER or bucket.share:
        return
    said = tiers.of(bucket.pool).get(tiers.configured(bucket.pool), {})
    if bucket.amount >= UNLIMITED:
        message.source = pb.LIMIT_SOURCE_UNSPECIFIED
    elif tiers.is_set(bucket.pool, bucket.dimension):
        message.source = pb.LIMIT_SOURCE_OVERRIDE
    elif said.get((bucket.dimension, bucket.window)) != bucket.amount:
        message.source = pb.LIMIT_SOURCE_DEFAULT


def pool_limits(
    state: State, pool: Pool, shown: pb.Pool, record: PoolDemand | None, tiers: Tiers | None, now: int
) -> pb.PoolLimits:
    """One pool. ``shown`` is the pool as it is shown everywhere."""
    message = pb.PoolLimits(pool=shown)
    for number in pool.buckets:
        message.details.append(_detail(state.buckets[number], now))
    limits = own_limits(state, pool)
    if limits:
        tightest = min(limits, key=lambda bucket: level(bucket, now) / bucket.burst if bucket.burst else -1.0)
        message.binding = pb.Dimension.ValueType(tightest.dimension)
    if tiers is not None:
        _compare(message, pool.name, limits, tiers)
    if record is not None:
        message.recent_span.FromMicroseconds(now % RECENT_US + RECENT_US)
        message.recently.extend(recently(record, now))
    return message


def held_back(record: PoolDemand) -> list[pb.HeldBack]:
    """What held calls back since the record began; the most first."""
    found = []
    for (dimension, share), held in _by_calls(record):
        message = pb.HeldBack(
            dimension=pb.Dimension.ValueType(dimension),
            share=share,
            waited=held.waited,
            denied=held.denied,
            minutes=held.minutes,
        )
        if held.wait_us:
            message.wait.FromMicroseconds(held.wait_us)
        found.append(message)
    return found


def recently(record: PoolDemand, now: int) -> list[pb.HeldBack]:
    """What held calls back lately; the most first."""
    found = []
    for (dimension, share), held in record.held.items():
        waited, denied = held.lately(now)
        if waited or denied:
            found.append(
                pb.HeldBack(dimension=pb.Dimension.ValueType(dimension), share=share, waited=waited, denied=denied)
            )
    return sorted(found, key=lambda each: (-each.waited - each.denied, each.dimension))


def _by_calls(record: PoolDemand) -> list[tuple[tuple[Dimension, bool], Held]]:
    return sorted(record.held.items(), key=lambda each: (-each[1].calls, each[0]))


def _detail(bucket: Bucket, now: int) -> pb.LimitDetail:
    message = pb.LimitDetail(over=bucket.over, at_risk=bucket.held + bucket.over)
    message.limit.pool, message.limit.share = bucket.pool, bucket.share
    message.limit.dimension = pb.Dimension.ValueType(bucket.dimension)
    message.limit.window = pb.Window.ValueType(bucket.window)
    if bucket.configured < UNLIMITED:
        message.configured_limit = bucket.configured
    if bucket.pending is not None:
        message.claimed_limit = bucket.pending
    restricts = bucket.amount < bucket.ruling or bucket.burst < bucket.ruling_burst
    if bucket.learned_at is not None and restricts:
        message.lapses_in.FromMicroseconds(max(0, bucket.learned_at + READING_TTL_US - now))
    constraint = bucket.constraint
    if constraint is not None and now - constraint.until <= READING_TTL_US:
        reading = message.reading
        reading.age.FromMicroseconds(max(0, now - constraint.until))
        reading.rounding = constraint.rounding
        lower, upper = interval(bucket, constraint, now)
        if lower is not None:
            reading.lower = lower
        if upper is not None:
            reading.upper = upper
    return message


def _compare(message: pb.PoolLimits, pool: str, limits: list[Bucket], tiers: Tiers) -> None:
    if not tiers.of(pool):
        return
    found = tiers.match(pool, in_force(limits))
    message.tier.SetInParent()
    message.tier.configured = tiers.configured(pool)
    message.tier.equal.extend(found.equal)
    message.tier.at_least, message.tier.at_most = found.at_least, found.at_most
