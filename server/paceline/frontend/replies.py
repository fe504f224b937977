"""From the engine's answers to encoded messages.

What the answers of a batch share, above all the state of the limits they touched, is encoded once and joined to each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.engine.answers import (
    Committed,
    Denied,
    DimensionState,
    Granted,
    Reason,
    Released,
    Renewed,
    Touched,
    Would,
)
from paceline.engine.dimensions import UNLIMITED, Dimension, Window
from paceline.engine.operations import Context
from paceline.frontend import wire
from paceline.frontend.context import Signer
from paceline.frontend.errors import refused
from paceline.frontend.limits import MAX_CACHED_DURATIONS, MAX_CACHED_SETTLEMENTS
from paceline.frontend.places import Destination
from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import money_pb2

NANO = 1_000_000_000
CURRENCY = "USD"
_KEPT_TOUCHED = 64

# Keys of fields: message, field, wire type 2 unless it says number.
_GRANT = wire.key(1, 2)
_CONTEXT = wire.key(6, 2)
_CHILD = 8
_MAX_OUTPUT = wire.key(3, 0)
_EXPIRES_IN = 4
_WAITED = 5
_NO_WAIT = wire.duration(_WAITED, 0)
_INDEX = 1
_BINDING = 3
_DIMENSIONS = 4
_HELD = wire.key(5, 0)
_CHARGED = wire.key(6, 0)
_COST = 2
_CURRENCY = wire.text(1, CURRENCY)
_SETTLEMENT = wire.key(1, 2)

REASONS = {
    Reason.LIMIT: pb.DENIAL_REASON_LIMIT,
    Reason.TIMEOUT: pb.DENIAL_REASON_TIMEOUT,
    Reason.QUEUE_FULL: pb.DENIAL_REASON_QUEUE_FULL,
    Reason.TOO_LARGE: pb.DENIAL_REASON_TOO_LARGE,
    Reason.POOL_CLOSED: pb.DENIAL_REASON_POOL_CLOSED,
    Reason.POOL_PAUSED: pb.DENIAL_REASON_POOL_PAUSED,
    Reason.SPEND_CAP: pb.DENIAL_REASON_SPEND_CAP,
    Reason.RELEASED: pb.DENIAL_REASON_RELEASED,
    Reason.BLOCKED: pb.DENIAL_REASON_BLOCKED,
}
_WORDS = {
    Reason.LIMIT: "{limit} is used up, and the wait would be longer than max_wait",
    Reason.TIMEOUT: "its turn did not come in time; {limit} is used up",
    Reason.QUEUE_FULL: "too many calls wait already",
    Reason.TOO_LARGE: "the call is larger than {limit} can ever hold: make it smaller",
    Reason.POOL_CLOSED: "the upstream grants nothing here now",
    Reason.POOL_PAUSED: "an operator paused the pool",
    Reason.SPEND_CAP: "the spend cap is reached",
    Reason.RELEASED: "the reservation was released before: use a new id",
    Reason.BLOCKED: "the upstream asked to be left alone for a while",
}
_NAMES = {
    Dimension.REQUESTS: "the limit of requests",
    Dimension.INPUT_TOKENS: "the limit of input tokens",
    Dimension.OUTPUT_TOKENS: "the limit of output tokens",
    Dimension.TOKENS: "the limit of tokens",
    Dimension.CONCURRENCY: "the limit of calls in progress",
    Dimension.QUEUED_REQUESTS: "the limit of queued requests",
    Dimension.SPEND: "the spend cap",
}


class _Shared:
    """One ``Touched``, encoded. It is kept with its encoding, so that its identity stays its own."""

    __slots__ = ("binding", "dimensions", "touched")

    def __init__(self, touched: Touched) -> None:
        self.touched = touched
        self.dimensions = b"".join(
            wire.block(_DIMENSIONS, dimension_state(state).SerializeToString()) for state in touched.dimensions
        )
        self.binding = binding_of(touched, touched.binding)


class Replies:
    """Encodes for one server. ``layout_of`` knows a pool's limits in the order of its charges."""

    def __init__(self, signer: Signer, layout_of: Callable[[str, str], list[tuple[Dimension, Window]]]) -> None:
        self._seal = signer.seal
        self._layout_of = layout_of
        self._shared: dict[int, _Shared] = {}
        self._expiries: dict[int, bytes] = {}
        self._waits: dict[int, bytes] = {0: _NO_WAIT}
        self._layouts: dict[tuple[str, str], list[tuple[Dimension, bytes]]] = {}
        """What comes before the amounts of a Settlement, by ledger and pool."""

    # -- reserve ------------------------------------------------------------------------------------------------

    def granted(self, answer: Granted, choices: Sequence[tuple[int, Destination]], prefix: int) -> bytes:
        """A ReserveResponse. ``prefix`` is the length of the identity before each key.

        Raises :class:`~paceline.frontend.errors.Problem` if the grant is that of an earlier call to somewhere else.
        """
        place = answer.candidate_index
        context = answer.context
        pool = context.pool
        if place >= len(choices) or choices[place][1].pool != pool:
            place = _place_of(pool, choices)
        index, destination = choices[place]
        sealed = self._seal(context)
        expires_us = answer.expires_in_us
        expiry = self._expiries.get(expires_us)
        if expiry is None:
            expiry = _remember(self._expiries, expires_us, wire.duration(_EXPIRES_IN, expires_us))
        waited = self._waits.get(answer.waited_us)
        if waited is None:
            waited = _remember(self._waits, answer.waited_us, wire.duration(_WAITED, answer.waited_us))
        varint = wire.varint
        grant = b"".join(
            (
                wire.number(_INDEX, index) if index else b"",
                destination.grant_target,
                b"" if answer.max_output_tokens is None else _MAX_OUTPUT + varint(answer.max_output_tokens),
                expiry,
                waited,
                _CONTEXT,
                varint(len(sealed)),
                sealed,
                destination.grant_pool,
            )
        )
        if context.count > 1:
            grant += b"".join(wire.text(_CHILD, key[prefix:]) for key in answer.keys)
        shared = self._encoded(answer.touched)
        if answer.waited_us:
            return b"".join((_GRANT, varint(len(grant)), grant, shared.binding, shared.dimensions))
        if answer.would is not None:
            observed = _observed(answer.would, answer.touched)
            return b"".join((_GRANT, varint(len(grant)), grant, shared.dimensions, observed))
        return b"".join((_GRANT, varint(len(grant)), grant, shared.dimensions))

    def denied(self, answer: Denied) -> bytes:
        """A ReserveResponse."""
        denial = pb.Denial(reason=REASONS[answer.reason], pool=answer.pool)
        denial.message = denial_words(answer.reason, answer.binding)
        if answer.retry_after_us is not None:
            denial.retry_after.FromMicroseconds(answer.retry_after_us)
        response = pb.ReserveResponse(denial=denial).SerializeToString()
        shared = self._encoded(answer.touched)
        return b"".join((response, binding_of(answer.touched, answer.binding), shared.dimensions))

    def _encoded(self, touched: Touched) -> _Shared:
        found = self._shared.get(id(touched))
        if found is None:
            if len(self._shared) >= _KEPT_TOUCHED:
                self._shared.clear()
            found = self._shared[id(touched)] = _Shared(touched)
        return found

    # -- the others -------------------------------------------------------------------------------------------------

    def committed(self, answer: Committed, ledger: str, pool: str, context: Context | None, priced: bool) -> bytes:
        """A CommitResponse, or an ObserveResponse, which begins with the same fields."""
        layout = self._layouts.get((ledger, pool))
        if layout is None:
            layout = self._layout(ledger, pool)
        parts = []
        held = () if context is None else context.charges
        for place, (dimension, charge) in enumerate(answer.charges):
            if place < len(layout) and layout[place][0] is dimension:
                settlement = layout[place][1]
            else:
                settlement = _settlement(pool, dimension, None)
                self._layouts.pop((ledger, pool), None)
            if place < len(held) and held[place][0] is dimension and held[place][1]:
                settlement += _HELD + wire.varint(held[place][1])
            if charge:
                settlement += _CHARGED + wire.varint(charge)
            parts.append(_SETTLEMENT + wire.varint(len(settlement)) + settlement)
        if priced and not answer.stale:
            parts.append(_cost(answer.cost))
        if answer.duplicate:
            parts.append(b"\x18\x01")
        if answer.late:
            parts.append(b"\x20\x01")
        if answer.stale:
            parts.append(b"\x28\x01")
        return b"".join(parts)

    def _layout(self, ledger: str, pool: str) -> list[tuple[Dimension, bytes]]:
        if len(self._layouts) >= MAX_CACHED_SETTLEMENTS:
            self._layouts.clear()
        layout = [
            (dimension, _settlement(pool, dimension, window)) for dimension, window in self._layout_of(ledger, pool)
        ]
        if layout:
            self._layouts[ledger, pool] = layout
        return layout

    @staticmethod
    def released(answer: Released) -> bytes:
        """A ReleaseResponse."""
        return pb.ReleaseResponse(
            released=answer.released,
            duplicate=answer.duplicate,
            tombstone=answer.tombstone,
            late=answer.late,
            stale=answer.stale,
        ).SerializeToString()

    @staticmethod
    def renewed(answer: Renewed) -> bytes:
        """A RenewResponse."""
        response = pb.RenewResponse(ended=answer.ended, late=answer.late, stale=answer.stale)
        if answer.expires_in_us:
            response.expires_in.FromMicroseconds(answer.expires_in_us)
        return response.SerializeToString()


def _place_of(pool: str, choices: Sequence[tuple[int, Destination]]) -> int:
    """The candidate of an id that was sent again with other candidates."""
    for place, (_, destination) in enumerate(choices):
        if destination.pool == pool:
            return place
    raise refused("reservation_id", "was used for a call to another target: use a new id")


def _settlement(pool: str, dimension: Dimension, window: Window | None) -> bytes:
    scope = "" if dimension is Dimension.SPEND else pool
    message = pb.Settlement(pool=scope, dimension=pb.Dimension.ValueType(dimension))
    if window is not None:
        message.window = pb.Window.ValueType(window)
    return message.SerializeToString()


def denial_words(reason: Reason, binding: Dimension | None) -> str:
    """Why a call was denied, for people."""
    return _WORDS[reason].format(limit="a limit" if binding is None else _NAMES[binding])


def draining() -> bytes:
    """A ReserveResponse: this server goes."""
    denial = pb.Denial(reason=pb.DENIAL_REASON_DRAINING, message="the server is going away: ask again")
    denial.retry_after.SetInParent()
    return pb.ReserveResponse(denial=denial).SerializeToString()


def dimension_state(state: DimensionState) -> pb.DimensionState:
    """One limit. What is not limited has no amounts."""
    message = pb.DimensionState(
        pool=state.pool,
        share=state.share,
        dimension=pb.Dimension.ValueType(state.dimension),
        window=pb.Window.ValueType(state.window),
        held=state.held,
    )
    if state.limit < UNLIMITED:
        message.limit, message.burst, message.level = state.limit, state.burst, state.level
    return message


def money(nanos: int) -> money_pb2.Money:
    """Nano-dollars as Money."""
    return money_pb2.Money(currency_code=CURRENCY, units=nanos // NANO, nanos=nanos % NANO)


def _cost(nanos: int) -> bytes:
    units, rest = divmod(nanos, NANO)
    return wire.block(_COST, _CURRENCY + wire.number(2, units) + wire.number(3, rest))


def reference(touched: Touched, binding: Dimension | None) -> pb.DimensionRef | None:
    """The limit that binds: of several in the dimension, the one with the least left."""
    found: DimensionState | None = None
    for state in touched.dimensions:
        if state.dimension is binding and (
            found is None or state.level * max(1, found.burst) < found.level * max(1, state.burst)
        ):
            found = state
    if found is None:
        return None
    return pb.DimensionRef(
        pool=found.pool,
        share=found.share,
        dimension=pb.Dimension.ValueType(found.dimension),
        window=pb.Window.ValueType(found.window),
    )


def binding_of(touched: Touched, binding: Dimension | None) -> bytes:
    """Field ``binding_dimension``; nothing if none binds."""
    limit = reference(touched, binding)
    return b"" if limit is None else wire.block(_BINDING, limit.SerializeToString())


def _observed(would: Would, touched: Touched) -> bytes:
    message = pb.ObservedDecision()
    if would.reason is not None:
        message.reason = REASONS[would.reason]
    else:
        message.wait.FromMicroseconds(would.wait_us)
    if would.reason is not None or would.wait_us:
        limit = reference(touched, would.binding)
        if limit is not None:
            message.binding_dimension.CopyFrom(limit)
    return wire.block(6, message.SerializeToString())


def _remember(cache: dict[int, bytes], us: int, encoded: bytes) -> bytes:
    if len(cache) >= MAX_CACHED_DURATIONS:
        cache.clear()
    cache[us] = encoded
    return encoded
