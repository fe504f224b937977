"""What happened to a ledger. Events carry results (amounts, instants), so that folding them decides nothing.

A batch of events is journalled as one record. New kinds go to the end of :data:`Event`; a kind's fields are only ever
added at its end, with a default, so that a version reads what the one before wrote.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from paceline.engine.accounting import Prices, Profile, Sizes
from paceline.engine.bucket import Constraint
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.operations import Class, Mode, Priority
from paceline.engine.pressure import Pressure
from paceline.engine.terms import Part, Terms


class Clocked(msgspec.Struct, frozen=True, array_like=True, tag="at", gc=False):
    """The events that follow happened at ``at``."""

    at: int


class Advanced(msgspec.Struct, frozen=True, array_like=True, tag="adv", gc=False):
    """A bucket came to the present."""

    bucket: int
    refilled: int
    carry: int
    lost: int = 0
    """Refill that found no place."""


class PoolDefined(msgspec.Struct, frozen=True, array_like=True, tag="pool", gc=False):
    pool: str
    profile: Profile
    learn: bool


class BucketAdded(msgspec.Struct, frozen=True, array_like=True, tag="bkt", gc=False):
    """A bucket got the next number, holding ``level`` at first. An empty ``pool`` holds over all pools."""

    pool: str
    share: str
    dimension: Dimension
    window: Window
    amount: int
    burst: int
    level: int
    override: bool
    guessed: bool


class ShareDefined(msgspec.Struct, frozen=True, array_like=True, tag="share", gc=False):
    share: str
    caps: tuple[Limit, ...]
    weight: int = 1
    guarantees: tuple[Limit, ...] = ()
    cap_parts: tuple[Part, ...] = ()
    guarantee_parts: tuple[Part, ...] = ()
    override: bool = False
    configured: Terms | None = None


class ClassesDefined(msgspec.Struct, frozen=True, array_like=True, tag="class", gc=False):
    """What each priority gets; those that are left out have their defaults."""

    classes: tuple[Class, ...]


class LimitMoved(msgspec.Struct, frozen=True, array_like=True, tag="lim", gc=False):
    """A limit changed; ``adjusted`` moved the level with it.

    ``learned`` says that a reading did it now (else configuration or an operator, whose figures are then
    ``configured`` and ``configured_burst``).
    """

    bucket: int
    amount: int
    burst: int
    adjusted: int
    learned: bool
    configured: int
    configured_burst: int
    override: bool


class LimitClaimed(msgspec.Struct, frozen=True, array_like=True, tag="claim", gc=False):
    """A reading claimed a higher limit (``None``: no longer); the next one may confirm it."""

    bucket: int
    amount: int | None


class Granted(msgspec.Struct, frozen=True, array_like=True, tag="grant", gc=False):
    """A reservation was opened. ``holds`` and ``overs`` go with ``buckets``."""

    key: str
    pool: str
    shares: tuple[str, ...]
    tenant: str
    route: str
    priority: Priority
    buckets: tuple[int, ...]
    holds: tuple[int, ...]
    overs: tuple[int, ...]
    sizes: Sizes
    prices: Prices
    index: int
    expires_at: int
    max_output_tokens: int | None = None
    """The cap that the caller asked for."""
    asked_input: int = 0
    asked_output: int = 0
    """The caller's own estimates, in tokens. Zero: there was none."""


class GrantedTogether(msgspec.Struct, frozen=True, array_like=True, tag="bulk", gc=False):
    """The reservations of ``keys``, just granted, answer the bulk request ``key``."""

    key: str
    keys: tuple[str, ...]


class Renewed(msgspec.Struct, frozen=True, array_like=True, tag="renew", gc=False):
    """A call goes on; what it holds grew with its output, or became what its input is now known to be."""

    key: str
    expires_at: int
    output_tokens: int | None
    holds: tuple[int, ...]
    overs: tuple[int, ...]
    sizes: Sizes | None = None
    """What the call is known to be, if that has changed."""
    forfeits: tuple[int, ...] = ()
    """What of each shrunk hold was not credited; empty: none has shrunk."""


class Settled(msgspec.Struct, frozen=True, array_like=True, tag="settle", gc=False):
    """An open reservation ended with ``charges``; of what it gave back, ``forfeits`` were not credited."""

    key: str
    charges: tuple[int, ...]
    forfeits: tuple[int, ...]
    overs: tuple[int, ...]
    cost: int
    input_tokens: int | None = None
    output_tokens: int | None = None
    """The uncached input and the output that the response has stated; ``None``: not the whole of it."""


class Released(msgspec.Struct, frozen=True, array_like=True, tag="rel", gc=False):
    key: str
    forfeits: tuple[int, ...]


class Expired(msgspec.Struct, frozen=True, array_like=True, tag="exp", gc=False):
    """An open reservation ran out; ``charges`` stay."""

    key: str
    charges: tuple[int, ...]
    forfeits: tuple[int, ...]
    overs: tuple[int, ...]
    cost: int


class Replaced(msgspec.Struct, frozen=True, array_like=True, tag="late", gc=False):
    """A late usage took the place of what an ended reservation was charged; ``released``: that it was never made."""

    key: str
    charges: tuple[int, ...]
    forfeits: tuple[int, ...]
    overs: tuple[int, ...]
    cost: int
    released: bool = False


class Booked(msgspec.Struct, frozen=True, array_like=True, tag="book", gc=False):
    """A call was booked that had no open reservation here. An empty ``key`` is not remembered.

    It was made at ``made_at`` (``None``: just now); ``absorbed`` (empty: nothing) of its charges took the place of
    refill that was lost since.
    """

    key: str
    pool: str
    shares: tuple[str, ...]
    buckets: tuple[int, ...]
    charges: tuple[int, ...]
    overs: tuple[int, ...]
    granted_at: int
    cost: int
    made_at: int | None = None
    absorbed: tuple[int, ...] = ()


class Tombstoned(msgspec.Struct, frozen=True, array_like=True, tag="tomb", gc=False):
    key: str


class Forgotten(msgspec.Struct, frozen=True, array_like=True, tag="forget", gc=False):
    """The oldest ``count`` ended reservations left the memory, but for bulk requests of which calls are still open."""

    count: int


class Corrected(msgspec.Struct, frozen=True, array_like=True, tag="fix", gc=False):
    """A reading moved a level."""

    bucket: int
    adjusted: int


class ReadingKept(msgspec.Struct, frozen=True, array_like=True, tag="read", gc=False):
    """A reading stands for a bucket from now on (``None``: none does)."""

    bucket: int
    constraint: Constraint | None


class Withheld(msgspec.Struct, frozen=True, array_like=True, tag="held", gc=False):
    """A bucket refilled until ``since``; the refill from then to ``until`` was withheld."""

    bucket: int
    since: int
    until: int
    refilled: int
    carry: int
    lost: int


class LimitConfirmed(msgspec.Struct, frozen=True, array_like=True, tag="conf", gc=False):
    """A reading confirmed what was learned of a limit."""

    bucket: int


class OutsideLearned(msgspec.Struct, frozen=True, array_like=True, tag="out", gc=False):
    """Others seem to use so much of a limit, per minute."""

    bucket: int
    rate: int


class Foreseen(msgspec.Struct, frozen=True, array_like=True, tag="ahead", gc=False):
    """The open calls of a bucket have produced so much more than they hold, by their pace."""

    bucket: int
    amount: int


class PoolBlocked(msgspec.Struct, frozen=True, array_like=True, tag="block", gc=False):
    """The upstream wants no call to the pool until ``until``; ``closed`` if for its spend cap."""

    pool: str
    until: int
    closed: bool


class Pressed(msgspec.Struct, frozen=True, array_like=True, tag="press", gc=False):
    """What is in force in a pool since a refusal that was not about budget (``None``: nothing any more)."""

    pool: str
    pressure: Pressure | None


class PoolPaused(msgspec.Struct, frozen=True, array_like=True, tag="pause", gc=False):
    pool: str
    paused: bool


class ModeSet(msgspec.Struct, frozen=True, array_like=True, tag="mode", gc=False):
    """A mode came into force (``None``: what is less specific rules again); ``configured``: the file says so."""

    pool: str
    tenant: str
    mode: Mode | None
    configured: bool = False


Event = (
    Clocked
    | Advanced
    | PoolDefined
    | BucketAdded
    | ShareDefined
    | ClassesDefined
    | LimitMoved
    | LimitClaimed
    | Granted
    | GrantedTogether
    | Renewed
    | Settled
    | Released
    | Expired
    | Replaced
    | Booked
    | Tombstoned
    | Forgotten
    | Corrected
    | ReadingKept
    | LimitConfirmed
    | OutsideLearned
    | Foreseen
    | PoolBlocked
    | PoolPaused
    | ModeSet
    | Withheld
    | Pressed
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Event])


def encode(events: Sequence[Event]) -> bytes:
    """The journal's form of a batch of events (MessagePack)."""
    return _encoder.encode(events)


def decode(data: bytes) -> list[Event]:
    """The inverse of :func:`encode`. Raises :class:`msgspec.ValidationError` on an unknown kind or shape."""
    return _decoder.decode(data)
