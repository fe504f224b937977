"""The books as AdminService shows them: state of the engine to messages. Reads only, and only what is in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from google.protobuf.timestamp_pb2 import Timestamp

from paceline.engine.accounting import Sizes
from paceline.engine.bucket import Bucket, EndKind
from paceline.engine.dimensions import UNLIMITED, Dimension, Limit, Window
from paceline.engine.operations import NO_PRICES, Mode, Priority
from paceline.engine.pressure import pressed
from paceline.engine.state import Ended, Pool, Reservation, Share, State
from paceline.engine.terms import Part
from paceline.engine.waiting import Pending
from paceline.frontend.errors import Problem, unavailable
from paceline.frontend.replies import CURRENCY, money
from paceline.frontend.routing import Slot
from paceline.ledger.options import Phase
from paceline_client.stubs import v1 as pb

MAX_SHOWN_TARGETS = 16

_PHASES = {
    Phase.STARTING: pb.LEDGER_STATE_LOADING,
    Phase.SERVING: pb.LEDGER_STATE_READY,
    Phase.REPLAYING: pb.LEDGER_STATE_READY,
    Phase.RECOVERING: pb.LEDGER_STATE_UNAVAILABLE,
    Phase.DRAINING: pb.LEDGER_STATE_UNAVAILABLE,
    Phase.STOPPED: pb.LEDGER_STATE_UNAVAILABLE,
    Phase.FAILED: pb.LEDGER_STATE_STOPPED,
    Phase.DEPOSED: pb.LEDGER_STATE_UNAVAILABLE,
}
_ENDS = {
    EndKind.SETTLED: pb.RESERVATION_STATE_SETTLED,
    EndKind.RELEASED: pb.RESERVATION_STATE_RELEASED,
    EndKind.EXPIRED: pb.RESERVATION_STATE_EXPIRED,
    EndKind.TOMBSTONE: pb.RESERVATION_STATE_TOMBSTONE,
    EndKind.TOGETHER: pb.RESERVATION_STATE_SETTLED,
}


def books(slot: Slot) -> State:
    """The books of a ledger that can decide. Raises :class:`Problem`."""
    state = slot.state
    if state is None or not slot.ready:
        raise away(slot)
    return state


def away(slot: Slot) -> Problem:
    """UNAVAILABLE for one ledger."""
    return unavailable(f"ledger {slot.account!r} cannot be read now: ask again")


def timestamp(at: int) -> Timestamp:
    """Ledger time."""
    found = Timestamp()
    found.FromMicroseconds(at)
    return found


def etag(*parts: object) -> str:
    """A version of what ``parts`` say."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def mode(state: State, pool: str, tenant: str) -> pb.Mode.ValueType:
    """The mode set for exactly this; unspecified if none is."""
    found = state.modes.get((pool, tenant))
    if found is None:
        return pb.MODE_UNSPECIFIED
    return pb.MODE_OBSERVE if found is Mode.OBSERVE else pb.MODE_ENFORCE


def modes(slot: Slot, state: State) -> Iterator[pb.ModeSetting]:
    """Every setting of a mode."""
    for pool, tenant in state.modes:
        yield pb.ModeSetting(ledger=slot.account, pool=pool, tenant=tenant, mode=mode(state, pool, tenant))


def ledger(slot: Slot, provider: str) -> pb.Ledger:
    """A ledger, whatever its state."""
    owner = slot.owner
    message = pb.Ledger(
        name=slot.account,
        provider=provider,
        account=slot.account,
        state=_PHASES[owner.phase] if slot.started or owner.failure else pb.LEDGER_STATE_LOADING,
        currency_code=CURRENCY,
        epoch=owner.epoch,
        sequence=owner.sequence,
        form=owner.form or 0,
    )
    if owner.failure is not None:
        message.state_reason = owner.failure.message
    elif message.state == pb.LEDGER_STATE_UNAVAILABLE:
        message.state_reason = owner.statistics.last_error
    engine = slot.engine
    if engine is not None:
        state = engine.state
        message.mode = mode(state, "", "") or pb.MODE_ENFORCE
        message.ledger_time.CopyFrom(timestamp(owner.now()))
        message.open_reservations = len(state.open)
        message.waiting_reservations = len(engine.waiters())
    return message


def pool(slot: Slot, state: State, found: Pool, targets: Iterable[pb.Target], reason: str) -> pb.Pool:
    """A pool with its limits and its queue."""
    now = slot.owner.now()
    message = pb.Pool(name=found.name, ledger=slot.account, targets=targets, mode=mode(state, found.name, ""))
    message.state = pb.POOL_STATE_OPEN
    if found.paused:
        message.state, message.state_reason = pb.POOL_STATE_PAUSED, reason or "paused by an operator"
    elif found.blocked_until > now:
        message.opens_in.FromMicroseconds(found.blocked_until - now)
        if found.closed:
            message.state, message.state_reason = (
                pb.POOL_STATE_CLOSED,
                "the upstream's spend cap is reached, or it has no quota",
            )
        else:
            message.state, message.state_reason = pb.POOL_STATE_BLOCKED, "the upstream asked to back off"
    elif found.pressure is not None and (reason := pressed(found.pressure, now)):
        message.state_reason = reason
    for number in found.buckets:
        message.limits.append(limit(state.buckets[number], now))
    engine = slot.engine
    for priority, queued in () if engine is None else engine.waiters().queue(found.name).items():
        queue = message.queues.add(priority=_priority(priority), waiting=queued.count)
        queue.oldest_wait.FromMicroseconds(max(0, now - queued.since))
    message.etag = pool_etag(state, found)
    return message


def pool_etag(state: State, found: Pool) -> str:
    """Of a pool's settings."""
    return etag(found.name, found.paused, found.blocked_until, state.modes.get((found.name, "")))


def level(bucket: Bucket, now: int) -> int:
    """What is left of a limit now."""
    return bucket.level + bucket.refill(now)[0] if bucket.at < now else bucket.level


def dimension_state(bucket: Bucket, now: int) -> pb.DimensionState:
    """One limit's state. What is not limited has no amounts."""
    message = pb.DimensionState(
        pool=bucket.pool,
        share=bucket.share,
        dimension=_dimension(bucket.dimension),
        window=_window(bucket.window),
        held=bucket.held,
    )
    if bucket.amount < UNLIMITED:
        message.limit, message.burst, message.level = bucket.amount, bucket.burst, level(bucket, now)
    return message


def limit(bucket: Bucket, now: int) -> pb.Limit:
    """One limit and where it comes from."""
    message = pb.Limit(state=dimension_state(bucket, now), adjusted=bucket.adjusted, etag=limit_etag(bucket))
    if bucket.is_read and (bucket.outside or bucket.constraint is not None):
        message.outside_per_minute = bucket.outside
    if bucket.override:
        message.source = pb.LIMIT_SOURCE_OVERRIDE
        message.override_limit, message.override_burst = bucket.amount, bucket.burst
    elif bucket.learned_at is not None:
        message.source = pb.LIMIT_SOURCE_UPSTREAM
        message.upstream_limit = bucket.amount
        message.upstream_age.FromMicroseconds(max(0, now - bucket.learned_at))
    else:
        message.source = pb.LIMIT_SOURCE_TIER
    return message


def limit_etag(bucket: Bucket) -> str:
    """Of a limit's settings."""
    return etag(bucket.pool, bucket.share, bucket.dimension, bucket.override, bucket.amount, bucket.burst)


def share(slot: Slot, state: State, found: Share, pool_name: str) -> pb.Share:
    """A share. With ``pool_name`` only its limits there."""
    message = pb.Share(
        ledger=slot.account,
        pool=pool_name,
        name=found.name,
        parent=found.name.rpartition("/")[0],
        weight=found.weight,
        caps=_amounts(found.caps, found.cap_parts),
        guarantees=_amounts(found.guarantees, found.guarantee_parts),
        etag=share_etag(found),
    )
    now = slot.owner.now()
    for bucket in state.buckets:
        if bucket.share == found.name and (not pool_name or bucket.pool in ("", pool_name)):
            message.dimensions.append(dimension_state(bucket, now))
    return message


def share_etag(found: Share) -> str:
    """Of a share's settings."""
    return etag(found.name, found.terms)


def waiting(slot: Slot, found: Pending) -> pb.Reservation:
    """A reservation that waits."""
    identity, _, number = found.key.rpartition("/")
    return pb.Reservation(
        reservation_id=number,
        identity=identity,
        ledger=slot.account,
        pool=found.pools[0],
        state=pb.RESERVATION_STATE_WAITING,
        tenant=found.tenant,
        workspace=found.shares[-1] if found.shares else "",
        priority=_priority(found.priority),
        route=found.route,
        estimate=_estimate(found.sizes),
        create_time=timestamp(found.since),
        etag=reservation_etag(found),
    )


def withdrawn(slot: Slot, found: Pending, end: Ended) -> pb.Reservation:
    """A reservation that waited until just now. The books keep no more of it than that its id is dead."""
    message = waiting(slot, found)
    message.state = pb.RESERVATION_STATE_RELEASED
    message.end_time.CopyFrom(timestamp(end.ended_at))
    message.etag = reservation_etag(end)
    return message


def opened(slot: Slot, state: State, found: Reservation) -> pb.Reservation:
    """A reservation that holds."""
    identity, _, number = found.key.rpartition("/")
    message = pb.Reservation(
        reservation_id=number,
        identity=identity,
        ledger=slot.account,
        pool=found.pool,
        state=pb.RESERVATION_STATE_OPEN,
        tenant=found.tenant,
        workspace=found.shares[-1] if found.shares else "",
        priority=_priority(found.priority),
        route=found.route,
        estimate=_estimate(found.sizes),
        create_time=timestamp(found.granted_at),
        grant_time=timestamp(found.granted_at),
        expire_time=timestamp(found.expires_at),
        etag=reservation_etag(found),
    )
    for place, amount in zip(found.buckets, found.holds, strict=True):
        message.settlements.append(_settlement(state.buckets[place], amount, amount))
    return message


def ended(slot: Slot, state: State, key: str, found: Ended) -> pb.Reservation:
    """A reservation that is over and still remembered."""
    identity, _, number = key.rpartition("/")
    message = pb.Reservation(
        reservation_id=number,
        identity=identity,
        ledger=slot.account,
        pool=found.pool,
        state=_ENDS[found.kind],
        workspace=found.shares[-1] if found.shares else "",
        end_time=timestamp(found.ended_at),
        etag=reservation_etag(found),
    )
    if found.granted_at is not None:
        message.create_time.CopyFrom(timestamp(found.granted_at))
        message.grant_time.CopyFrom(timestamp(found.granted_at))
        if found.kind is EndKind.SETTLED and (found.prices != NO_PRICES or found.cost):
            message.cost.CopyFrom(money(found.cost))
    for place, amount in zip(found.buckets, found.charges, strict=True):
        message.settlements.append(_settlement(state.buckets[place], 0, amount))
    return message


def reservation_etag(found: Pending | Reservation | Ended) -> str:
    """Of a reservation's state."""
    if isinstance(found, Pending):
        return etag("waiting", found.ordinal, found.pools)
    if isinstance(found, Reservation):
        return etag("open", found.expires_at, found.output_tokens)
    return etag(int(found.kind), found.ended_at, found.cost)


def _settlement(bucket: Bucket, held: int, charged: int) -> pb.Settlement:
    return pb.Settlement(
        pool=bucket.pool,
        share=bucket.share,
        dimension=_dimension(bucket.dimension),
        window=_window(bucket.window),
        held=held,
        charged=charged,
    )


def _estimate(sizes: Sizes) -> pb.Estimate:
    return pb.Estimate(
        requests=sizes.requests,
        input_tokens=sizes.input_tokens,
        cached_input_tokens=sizes.cached_input_tokens,
        output_tokens=sizes.output_tokens,
        max_output_tokens=sizes.max_output_tokens,
    )


def _amounts(limits: Iterable[Limit], parts: Iterable[Part]) -> Iterator[pb.ShareAmount]:
    """Caps or guarantees."""
    for limit in limits:
        yield pb.ShareAmount(dimension=_dimension(limit.dimension), window=_window(limit.window), units=limit.amount)
    for part in parts:
        yield pb.ShareAmount(dimension=_dimension(part.dimension), window=_window(part.window), permille=part.permille)


def _priority(value: Priority) -> pb.Priority.ValueType:
    return pb.Priority.ValueType(value)


def _dimension(value: Dimension) -> pb.Dimension.ValueType:
    return pb.Dimension.ValueType(value)


def _window(value: Window) -> pb.Window.ValueType:
    return pb.Window.ValueType(value)
