"""What two processes of one fleet say to each other over a wire: frames in MessagePack.

A stream serves one ledger. The front end says :class:`Hello`; the other side answers :class:`Welcome`, :class:`Away`
or :class:`NotOwner`. Operations and answers are the engine's own structs, in batches. What a later version adds to a
struct is left out by an earlier one, so that two neighbouring versions understand each other.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from paceline.engine.answers import Answer, Denied, Granted, Touched
from paceline.engine.operations import Operation
from paceline.ledger.errors import (
    LedgerBusy,
    LedgerDraining,
    LedgerError,
    LedgerFault,
    LedgerStopped,
    LedgerUnavailable,
)

VERSION = 1
"""The newest version of the protocol that is spoken here; a stream uses the older one of its two ends'."""
OLDEST = 1


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """The first frame, and again after :class:`Away`: who asks, for which ledger."""

    version: int
    ledger: str
    node: str
    epoch: int
    """The highest epoch that it has heard of: an owner of a lower one is none."""
    patience_us: int = 0
    """For how long the answer may be held back by a process that is about to become the owner."""


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Operations are taken. ``now`` is ledger time in µs; ``credits``: how many may be sent without a word on them."""

    version: int
    epoch: int
    node: str
    credits: int
    now: int


class NotOwner(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """The ledger is not here; who owns it, as far as is known here. Nothing that was sent is decided any more."""

    epoch: int
    node: str
    address: str


class Away(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """The ledger is here and cannot decide now: say hello again after ``retry_after_us``."""

    retry_after_us: int


class Operations(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """Operations by number, in the order in which they are to be decided."""

    items: list[tuple[int, Operation]]


class Answers(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """Answers by number, each with the place of its ``touched`` in the list (-1: none), and ledger time in µs."""

    items: list[tuple[int, int, Answer]]
    touched: list[Touched]
    now: int


class Failure(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A :class:`~paceline.ledger.errors.LedgerError`."""

    number: int
    kind: int
    message: str
    retry_after_us: int


class Failures(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """Operations without an answer, and why."""

    items: list[Failure]


class Queued(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False):
    """The engine has taken these Reserves, and they wait for their turn."""

    numbers: list[int]


class Drain(msgspec.Struct, frozen=True, array_like=True, tag=9, gc=False):
    """The owner lets go of the ledger: go to its successor (empty: not known), which may not own it yet."""

    node: str
    address: str


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=10, gc=False):
    """A question to the owner's process, answered at once and in order with the operations."""

    number: int
    name: str
    body: bytes


class Told(msgspec.Struct, frozen=True, array_like=True, tag=11, gc=False):
    """Its answer; ``None``: there is none, or no such question."""

    number: int
    body: bytes | None


Frame = Hello | Welcome | NotOwner | Away | Operations | Answers | Failures | Queued | Drain | Ask | Told

encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Frame).decode


class FrameError(Exception):
    """Not a frame of a version that this one understands."""


def decode(data: bytes) -> Frame:
    """A frame. Raises :class:`FrameError`."""
    try:
        frame: Frame = _decode(data)
    except msgspec.MsgspecError as error:
        raise FrameError(f"not a frame of this version: {error}") from None
    return frame


_KINDS: tuple[type[LedgerError], ...] = (
    LedgerUnavailable,
    LedgerBusy,
    LedgerDraining,
    LedgerFault,
    LedgerStopped,
)
_NUMBER_OF = {kind: number for number, kind in enumerate(_KINDS)}


def failure(number: int, error: LedgerError) -> Failure:
    """An error, to be sent."""
    return Failure(number, _NUMBER_OF.get(type(error), 0), error.message, error.retry_after_us)


def error_of(item: Failure) -> LedgerError:
    """An error, as it was sent. A kind of a later version is :class:`~paceline.ledger.errors.LedgerUnavailable`."""
    kind = _KINDS[item.kind] if 0 <= item.kind < len(_KINDS) else LedgerUnavailable
    return kind(item.message, item.retry_after_us)


_NOTHING = Touched()
_set = msgspec.structs.force_setattr


def answers(found: Iterable[tuple[int, Answer]], now: int) -> bytes:
    """Encode answers. What several of them share is sent once."""
    items: list[tuple[int, int, Answer]] = []
    touched: list[Touched] = []
    places: dict[int, int] = {}
    for number, answer in found:
        if type(answer) is Granted:
            place = places.get(id(answer.touched))
            if place is None:
                place = places[id(answer.touched)] = len(touched)
                touched.append(answer.touched)
            answer = Granted(
                answer.keys,
                answer.candidate_index,
                answer.expires_in_us,
                answer.waited_us,
                answer.max_output_tokens,
                answer.context,
                _NOTHING,
                answer.would,
            )
        elif type(answer) is Denied:
            place = places.get(id(answer.touched))
            if place is None:
                place = places[id(answer.touched)] = len(touched)
                touched.append(answer.touched)
            answer = Denied(answer.reason, answer.pool, answer.binding, answer.retry_after_us, _NOTHING)
        else:
            place = -1
        items.append((number, place, answer))
    return encode(Answers(items, touched, now))


def whole(frame: Answers) -> Iterable[tuple[int, Answer]]:
    """The answers of a frame as they were before :func:`answers`. Raises :class:`FrameError`."""
    touched = frame.touched
    for number, place, answer in frame.items:
        if place >= 0 and isinstance(answer, Granted | Denied):
            if place >= len(touched):
                raise FrameError("an answer refers to what was not sent")
            # Decoded a moment ago, and nobody else has it.
            _set(answer, "touched", touched[place])
        yield number, answer
