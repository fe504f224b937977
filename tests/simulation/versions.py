"""The version of the journal after this one, as a later build would have it: one more kind of event, one more field.

It reads both, and writes what is new only once an upgrade was finalized. :class:`ThisMachine` is the real one. Both
look at every step of their engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from paceline.engine import events as ev
from paceline.engine.engine import Engine, Step
from paceline.engine.operations import Operation
from paceline.engine.state import FORMAT, OLDEST_FORMAT, Head, State
from paceline.ledger.machine import EngineMachine

NEXT = FORMAT + 1

Watch = Callable[[Engine, Sequence[tuple[int, Operation]], Step], None]


class Marked(msgspec.Struct, frozen=True, array_like=True, tag="next", gc=False):
    """What this version does not know: counts the batches of the next one."""

    by: int


class NextHead(Head, array_like=True):
    marks: int = 0


_decode_head = msgspec.msgpack.Decoder(NextHead).decode
_encode = msgspec.msgpack.Encoder().encode
_decode_events = msgspec.msgpack.Decoder(list[ev.Event | Marked]).decode


class NextState(State):
    """The fold of events, of the next version."""

    def __init__(self, ledger: str) -> None:
        super().__init__(ledger)
        self.marks = 0
        self._fold[Marked] = self._marked

    def _marked(self, event: Marked) -> None:
        self.marks += event.by

    def dump(self, form: int = NEXT) -> Iterator[bytes]:
        chunks = super().dump(FORMAT)
        first = next(chunks)
        if form == NEXT:
            head = _decode_head(first)
            head.format, head.marks = NEXT, self.marks
            first = _encode(head)
        yield first
        yield from chunks

    @classmethod
    def restore(cls, chunks: Iterable[bytes]) -> NextState:
        source = iter(chunks)
        head = _decode_head(next(source))
        marks = head.marks if head.format == NEXT else 0
        head.format, head.marks = min(head.format, FORMAT), 0
        state = super().restore(_again(_encode(head), source))
        assert isinstance(state, NextState)
        state.marks = marks
        return state


def _again(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


class WatchedEngine(Engine):
    """The real engine, looked at after every step."""

    watch: Watch
    stood: tuple[int, ...] | None = None
    """The levels before the first step of an engine that takes over."""

    def step(self, now: int, operations: Sequence[tuple[int, Operation]]) -> Step:
        self.stood = None if self._absence is None else tuple(bucket.level for bucket in self.state.buckets)
        step = super().step(now, operations)
        self.watch(self, operations, step)
        return step


class NextEngine(WatchedEngine):
    """Decides as the real one, and marks its batches once it may."""

    def step(self, now: int, operations: Sequence[tuple[int, Operation]]) -> Step:
        step = super().step(now, operations)
        if self.form >= NEXT and step.events:
            event: Any = Marked(1)
            self.state.apply(event)
            step.events.append(event)
        return step


class ThisMachine(EngineMachine):
    """The real one. ``watch`` of ``None``: nobody looks."""

    engine: type[WatchedEngine] = WatchedEngine

    def __init__(self, watch: Watch | None = None) -> None:
        super().__init__()
        self._watch = watch

    def decider(self, *args: Any, **kwargs: Any) -> Engine:
        engine = super().decider(*args, **kwargs)
        if self._watch is not None:
            engine.__class__ = self.engine
            assert isinstance(engine, WatchedEngine)
            engine.watch = self._watch
        return engine


class NextMachine(ThisMachine):
    """That of the next version."""

    engine = NextEngine

    @property
    def form(self) -> int:
        return NEXT

    @property
    def forms(self) -> tuple[int, int]:
        return OLDEST_FORMAT, NEXT

    def form_of(self, chunk: bytes, /) -> int:
        return _decode_head(chunk).format

    def empty(self, ledger: str) -> State:
        return NextState(ledger)

    def restore(self, ledger: str, chunks: Iterable[bytes]) -> State:
        state = NextState.restore(chunks)
        if state.ledger != ledger:
            raise ValueError("the snapshot is of another ledger")
        return state

    def decode(self, data: bytes, /) -> Sequence[Any]:
        return _decode_events(data)
