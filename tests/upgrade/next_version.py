"""The version after this one, as far as the journal is concerned: one more kind of event, one more field of the books.

``python -m tests.upgrade.next_version serve ...`` is ``paceline serve ...`` of that version. It reads what this version
writes, and writes what this version does not read only once an operator has finalized the upgrade.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any
from unittest.mock import patch

import msgspec

from paceline.cli import main
from paceline.engine import events as ev
from paceline.engine.absence import Absence
from paceline.engine.books import Caps
from paceline.engine.engine import Engine, Step
from paceline.engine.operations import Operation
from paceline.engine.state import FORMAT, OLDEST_FORMAT, Chunk, FoldError, Head, State
from paceline.ledger.machine import EngineMachine

NEXT = FORMAT + 1


class Noted(msgspec.Struct, frozen=True, array_like=True, tag="note", gc=False):
    """The kind of event that is new: a reservation was granted."""

    key: str


class NextHead(Head, array_like=True):
    """A snapshot's first chunk, with the field that is new."""

    noted: int = 0


_decode_events = msgspec.msgpack.Decoder(list[ev.Event | Noted]).decode
_decode_head = msgspec.msgpack.Decoder(NextHead).decode
_encode = msgspec.msgpack.Encoder().encode


class NextState(State):
    """``noted`` counts events of the new kind; a snapshot of the form before leaves it out."""

    def __init__(self, ledger: str) -> None:
        super().__init__(ledger)
        self.noted = 0
        folds: dict[type[Any], Callable[[Any], None]] = self._fold
        folds[Noted] = self._note

    def _note(self, event: Noted) -> None:
        self.noted += 1

    def dump(self, form: int = NEXT) -> Iterator[Chunk]:
        chunks = super().dump(min(form, FORMAT))
        first = next(chunks)
        if form == NEXT:
            head = _decode_head(first)
            head.format, head.noted = NEXT, self.noted
            first = _encode(head)
        elif form > NEXT:
            raise ValueError(f"this version writes snapshots up to format {NEXT}, not {form}")
        yield first
        yield from chunks

    @staticmethod
    def format_of(first: Chunk) -> int:
        return _decode_head(first).format

    @classmethod
    def restore(cls, chunks: Iterable[Chunk]) -> NextState:
        source = iter(chunks)
        head = _decode_head(next(source))
        if head.format > NEXT:
            raise FoldError(f"snapshot has format {head.format}, this version reads up to {NEXT}")
        noted, head.format = head.noted, min(head.format, FORMAT)
        state = super().restore(chain([_encode(head)], source))
        assert isinstance(state, NextState)
        state.noted = noted
        return state


class NextEngine(Engine):
    """Notes each grant, once it may."""

    def step(self, now: int, operations: Sequence[tuple[int, Operation]]) -> Step:
        step = super().step(now, operations)
        if self.form >= NEXT:
            events: list[Any] = step.events
            for key in [event.key for event in events if isinstance(event, ev.Granted)]:
                noted: Any = Noted(key)
                self.state.apply(noted)
                events.append(noted)
        return step


class NextMachine(EngineMachine):
    """What the next version's owners run."""

    def __init__(self, caps: Caps | None = None, unseen_us: int = 0) -> None:
        super().__init__(caps, unseen_us)
        self._next_caps = Caps() if caps is None else caps
        self._next_unseen_us = unseen_us

    @property
    def form(self) -> int:
        return NEXT

    @property
    def forms(self) -> tuple[int, int]:
        return OLDEST_FORMAT, NEXT

    def form_of(self, chunk: bytes, /) -> int:
        return NextState.format_of(chunk)

    def empty(self, ledger: str) -> State:
        return NextState(ledger)

    def restore(self, ledger: str, chunks: Iterable[bytes]) -> State:
        state = NextState.restore(chunks)
        if state.ledger != ledger:
            raise ValueError("the snapshot is of another ledger")
        return state

    def decider(self, ledger: str, books: State, absence: Absence | None = None, form: int | None = None) -> Engine:
        known = Absence(most_us=self._next_unseen_us) if absence is None else absence
        return NextEngine(ledger, books, self._next_caps, known, NEXT if form is None else form)

    def decode(self, data: bytes, /) -> Sequence[Any]:
        return _decode_events(data)


if __name__ == "__main__":
    with patch("paceline.frontend.server.EngineMachine", NextMachine):
        main()
