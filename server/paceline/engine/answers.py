"""What a ledger answers: the outputs of :meth:`paceline.engine.engine.Engine.step`. Durations in microseconds."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from paceline.engine.dimensions import Dimension, Window
from paceline.engine.operations import Context


class Reason(IntEnum):
    """Why a Reserve was denied."""

    LIMIT = 1
    """It does not fit now, and its turn would come later than the caller will wait."""
    TIMEOUT = 2
    """It waited its turn, which did not come in time."""
    QUEUE_FULL = 3
    TOO_LARGE = 4
    """It can never fit: larger than the burst."""
    POOL_CLOSED = 5
    """The upstream grants nothing: zero quota, or its spend cap."""
    POOL_PAUSED = 6
    SPEND_CAP = 7
    RELEASED = 8
    """Its id was released before."""
    BLOCKED = 9
    """The upstream asked to be left alone for a while."""


class DimensionState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One dimension at the end of the batch. ``share`` is empty for the pool's own limit."""

    pool: str
    share: str
    dimension: Dimension
    window: Window
    limit: int
    burst: int
    level: int
    held: int


class Touched(msgspec.Struct, array_like=True, gc=False):
    """The dimensions that a decision touched, and the one that binds (least left, relative to its limit).

    One object serves all answers of a step that touched the same; it is filled when the step ends.
    """

    binding: Dimension | None = None
    dimensions: tuple[DimensionState, ...] = ()


class Would(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """In observe mode: what ``enforce`` would have done. No reason and no wait: granted at once."""

    reason: Reason | None = None
    wait_us: int = 0
    binding: Dimension | None = None
    """What would have bound."""


class Granted(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A grant. ``keys`` are the reservations: the key asked for, or those of the calls of a bulk grant."""

    keys: tuple[str, ...]
    candidate_index: int
    expires_in_us: int
    waited_us: int
    max_output_tokens: int | None
    context: Context
    touched: Touched
    would: Would | None = None


class Denied(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A denial. ``retry_after_us`` of ``None``: coming back will not help."""

    reason: Reason
    pool: str
    binding: Dimension | None
    retry_after_us: int | None
    touched: Touched


class Committed(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A settlement: final charges per dimension of the pool, and the cost in nano-dollars.

    ``duplicate``: this is the first Commit's answer again. ``late``: booked from the context, or in place of an
    expired hold. ``stale``: too old to book; it only taught.
    """

    charges: tuple[tuple[Dimension, int], ...] = ()
    cost: int = 0
    duplicate: bool = False
    late: bool = False
    stale: bool = False


class Released(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A release. ``released``: a hold went back or a waiter was withdrawn. ``tombstone``: the id was not known, and
    can now never be granted. ``late``: the charge of an expiry went back. ``stale``: too old to book.
    """

    released: bool = False
    duplicate: bool = False
    tombstone: bool = False
    late: bool = False
    stale: bool = False


class Renewed(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A renewal. ``ended``: it had been committed or released; ``late``: it had expired, and its charge stands until
    the Commit; ``stale``: too old to say. In all three nothing is extended, and ``expires_in_us`` is zero.
    """

    expires_in_us: int = 0
    ended: bool = False
    late: bool = False
    stale: bool = False


class Done(msgspec.Struct, frozen=True, tag=True, gc=False):
    """An administrative change was made."""


class Invalid(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The operation makes no sense in this state; the books are as before. ``field`` names the culprit.

    ``full``: it would, but the ledger has no place for more.
    """

    field: str
    message: str
    full: bool = False


Answer = Granted | Denied | Committed | Released | Renewed | Done | Invalid
