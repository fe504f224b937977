"""A decision in words: a line of the audit, and what Explain says of it.

Names, amounts and times only: no prompts, no credentials, no headers are there to be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from paceline.engine.answers import Reason
from paceline.engine.audit import Kind, Record
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import Dimension, Window
from paceline.engine.operations import Priority
from paceline.frontend.replies import denial_words
from paceline.frontend.view import timestamp
from paceline_client.stubs import v1 as pb

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TURNED_DOWN = (Kind.DENIED, Kind.WAITING)


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """One limit that a decision was about. Amounts in the limit's unit; of money in nano-dollars."""

    dimension: str
    window: str
    pool: str = ""
    share: str = ""
    amount: int = 0
    """What each call holds, or would hold; of an end, what was charged."""
    available: int | None = None
    """What was left, when it was denied or began to wait; only of the dimension that bound."""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision: one line of JSON in the files of the audit. See :class:`~paceline.engine.audit.Record`."""

    time: str
    """Ledger time, as RFC 3339 has it."""
    event: str
    """``granted``, ``denied``, ``waiting``, ``settled``, ``released`` or ``expired``."""
    ledger: str
    reservation_id: str
    identity: str = ""
    pool: str = ""
    tenant: str = ""
    workspace: str = ""
    route: str = ""
    priority: str = ""
    candidate_index: int | None = None
    count: int = 1
    reason: str = ""
    binding: str = ""
    """The dimension that bound."""
    limits: tuple[Part, ...] = ()
    ahead: int = 0
    wait_us: int | None = None
    observed: bool = False
    children: tuple[str, ...] = ()
    """Ids of the calls of a bulk grant."""
    cost_nanos: int = 0
    """Nano-dollars."""


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Entry).decode


def entry_of(ledger: str, buckets: Sequence[Bucket], record: Record) -> Entry:
    """A record of a ledger whose limits are ``buckets``. May be called in any thread."""
    identity, _, number = record.key.rpartition("/")
    levels: Sequence[int | None] = record.levels or (None,) * len(record.buckets)
    parts = []
    for place, amount, level in zip(record.buckets, record.amounts, levels, strict=True):
        bucket = buckets[place]
        if amount:
            dimension, window = bucket.dimension.name.lower(), bucket.window.name.lower()
            parts.append(Part(dimension, window, bucket.pool, bucket.share, amount, level))
    return Entry(
        (_EPOCH + timedelta(microseconds=record.at)).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        record.kind.name.lower(),
        ledger,
        number,
        identity,
        record.pool,
        record.tenant,
        record.shares[-1] if record.shares else "",
        record.route,
        "" if record.priority is None else record.priority.name.lower(),
        record.index,
        record.count,
        "" if record.reason is None else record.reason.name.lower(),
        "" if record.binding is None else record.binding.name.lower(),
        tuple(parts),
        record.ahead,
        record.wait_us,
        record.observed,
        tuple(key.rpartition("/")[2] for key in record.keys),
        record.cost,
    )


# -- in words ----------------------------------------------------------------------------------------------------------


def seconds(us: int) -> str:
    """A duration in words."""
    return f"{us / 1e6:,.3f} s" if us < 10_000_000 else f"{us / 1e6:,.1f} s"


def quantity(dimension: str, value: int | None) -> str:
    """An amount in words."""
    if value is None:
        return "an unknown amount"
    if dimension == "spend":
        return f"${value / 1e9:,.4f}"
    name = dimension.replace("_", " ")
    return f"{value:,} {name.removesuffix('s') if value == 1 else name}"


def calls(count: int) -> str:
    """So many calls."""
    return "1 call" if count == 1 else f"{count:,} calls"


def bound(entry: Entry) -> Part | None:
    """The limit that bound: of several in the dimension, the one with the least left beside what was asked for."""
    found = [part for part in entry.limits if part.dimension == entry.binding]
    return min(found, key=lambda part: (part.available or 0) - part.amount * entry.count, default=None)


def message(entry: Entry) -> str:
    """One decision, for people."""
    kind = entry.event
    if kind == "granted":
        return _granted(entry)
    if kind == "denied":
        reason = Reason[entry.reason.upper()]
        text = f"denied: {denial_words(reason, _dimension(entry.binding))}{_short(entry)}"
        if entry.wait_us is not None and reason is not Reason.POOL_PAUSED:
            text += f"; its turn would have come in {seconds(entry.wait_us)}"
        return text
    if kind == "waiting":
        text = f"began to wait{_short(entry)}"
        return text if entry.wait_us is None else f"{text}; its turn was expected in {seconds(entry.wait_us)}"
    if kind == "settled":
        spent = ", ".join(quantity(part.dimension, part.amount) for part in entry.limits if not part.share)
        return f"settled; charged: {spent or 'nothing'}"
    if kind == "expired":
        spent = ", ".join(quantity(part.dimension, part.amount) for part in entry.limits if not part.share)
        return f"its hold ended without an outcome; charged until one comes: {spent or 'nothing'}"
    return "given back: the call was not made"


def _granted(entry: Entry) -> str:
    what = "granted" if entry.count == 1 and not entry.children else f"{calls(entry.count)} granted"
    waited = seconds(entry.wait_us or 0)
    if entry.observed:
        if entry.reason:
            words = denial_words(Reason[entry.reason.upper()], _dimension(entry.binding))
            return f"{what}, since it is only observed; it would have been denied: {words}"
        return f"{what}, since it is only observed" + (f"; it would have waited {waited}" if entry.wait_us else "")
    return what + (f" after {waited}" if entry.wait_us else " at once")


def _short(entry: Entry) -> str:
    part = bound(entry)
    if part is None:
        return f"; {calls(entry.ahead)} came first" if entry.ahead else ""
    needed = quantity(part.dimension, part.amount * entry.count)
    whose = f" of share {part.share}" if part.share else ""
    left = "nothing" if not part.available else f"${part.available / 1e9:,.4f}" if part.dimension == "spend" else ""
    left = left or f"{part.available:,}"
    first = f", and {calls(entry.ahead)} came first" if entry.ahead else ""
    return f"; it needs {needed}{whose}, of which {left} was left{first}"


def _dimension(name: str) -> Dimension | None:
    return Dimension[name.upper()] if name else None


# -- as Explain has it -------------------------------------------------------------------------------------------------


def step(entry: Entry) -> pb.ExplainStep:
    """One decision as a step."""
    found = pb.ExplainStep(message=message(entry))
    found.time.CopyFrom(timestamp(_us(entry)))
    if entry.candidate_index is not None:
        found.candidate_index = entry.candidate_index
    if entry.wait_us is not None:
        found.wait.FromMicroseconds(entry.wait_us)
    if entry.event in ("denied", "waiting"):
        found.position = entry.ahead
        part = bound(entry)
        if part is not None:
            found.limit.CopyFrom(reference(part))
            found.needed = part.amount * entry.count
            if part.available is not None:
                found.available = part.available
    return found


def reference(part: Part) -> pb.DimensionRef:
    """The limit of a part."""
    return pb.DimensionRef(
        pool=part.pool,
        share=part.share,
        dimension=pb.Dimension.ValueType(Dimension[part.dimension.upper()]),
        window=pb.Window.ValueType(Window[part.window.upper()]),
    )


def _us(entry: Entry) -> int:
    return (datetime.fromisoformat(entry.time) - _EPOCH) // timedelta(microseconds=1)


def history(entries: Iterable[Entry]) -> pb.ExplainResponse:
    """What decisions say of one reservation, oldest first: the reservation as far as they know it, and the decision."""
    response = pb.ExplainResponse()
    for entry in entries:
        _tell(response.reservation, entry)
        response.steps.append(step(entry))
        if entry.event in ("granted", "denied"):
            response.decision.CopyFrom(_decision(entry))
    return response


_STATES = {
    "granted": pb.RESERVATION_STATE_OPEN,
    "denied": pb.RESERVATION_STATE_UNSPECIFIED,
    "waiting": pb.RESERVATION_STATE_WAITING,
    "settled": pb.RESERVATION_STATE_SETTLED,
    "released": pb.RESERVATION_STATE_RELEASED,
    "expired": pb.RESERVATION_STATE_EXPIRED,
}


def _tell(found: pb.Reservation, entry: Entry) -> None:
    found.reservation_id, found.identity, found.ledger = entry.reservation_id, entry.identity, entry.ledger
    found.state = _STATES[entry.event]
    found.pool = entry.pool or found.pool
    found.tenant = entry.tenant or found.tenant
    found.workspace = entry.workspace or found.workspace
    found.route = entry.route or found.route
    if entry.priority:
        found.priority = pb.Priority.ValueType(Priority[entry.priority.upper()])
    at = timestamp(_us(entry))
    if not found.HasField("create_time"):
        found.create_time.CopyFrom(at)
    if entry.event == "granted":
        found.grant_time.CopyFrom(at)
    elif entry.event != "waiting":
        found.end_time.CopyFrom(at)


def _decision(entry: Entry) -> pb.ReserveResponse:
    response = pb.ReserveResponse()
    part = bound(entry)
    limit = None if part is None else reference(part)
    reason = pb.DenialReason.Value(f"DENIAL_REASON_{entry.reason.upper()}") if entry.reason else None
    if entry.event == "denied" and reason is not None:
        response.denial.reason, response.denial.pool = reason, entry.pool
        response.denial.message = denial_words(Reason[entry.reason.upper()], _dimension(entry.binding))
        if entry.wait_us is not None:
            response.denial.retry_after.FromMicroseconds(entry.wait_us)
    else:
        response.grant.pool, response.grant.candidate_index = entry.pool, entry.candidate_index or 0
        response.grant.child_reservation_ids.extend(entry.children)
        if entry.observed:
            response.observed_decision.SetInParent()
            if reason is not None:
                response.observed_decision.reason = reason
            else:
                response.observed_decision.wait.FromMicroseconds(entry.wait_us or 0)
            if limit is not None and (reason is not None or entry.wait_us):
                response.observed_decision.binding_dimension.CopyFrom(limit)
            return response
        response.grant.waited.FromMicroseconds(entry.wait_us or 0)
    if limit is not None:
        response.binding_dimension.CopyFrom(limit)
    return response


def names(entry: Entry, number: str, identity: str = "") -> bool:
    """Whether a decision is about a reservation of this id: its own, or that of its bulk request."""
    return (entry.reservation_id == number or number in entry.children) and identity in ("", entry.identity)


def read(lines: Iterable[bytes]) -> Iterator[Entry]:
    """The decisions in some lines. Raises :class:`msgspec.DecodeError` if one is none."""
    return (decode(line) for line in lines if line.strip())
