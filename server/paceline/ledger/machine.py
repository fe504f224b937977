"""What an owner runs: the engine and its state, seen from outside, so that tests can script another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from paceline.engine import events as ev
from paceline.engine.absence import Absence
from paceline.engine.answers import Answer
from paceline.engine.engine import Caps, Engine
from paceline.engine.events import Event
from paceline.engine.operations import Operation
from paceline.engine.state import FORMAT, OLDEST_FORMAT, State


class Books(Protocol):
    """The fold of events."""

    def apply(self, event: Any, /) -> None:
        """Fold one event; raises if it does not fit."""
        ...

    def dump(self, form: int = ..., /) -> Iterator[bytes]:
        """The state in chunks, each about a millisecond's work, as it is when the first is taken.

        ``form``: the version to write it in; the newest if left out.
        """
        ...


class Decision(Protocol):
    """What one step decided: see :class:`paceline.engine.engine.Step`."""

    @property
    def at(self) -> int: ...
    @property
    def answers(self) -> list[tuple[int, Answer]]: ...
    @property
    def events(self) -> list[Any]: ...
    @property
    def wake_at(self) -> int | None: ...


class Decider(Protocol):
    """Decides batches, and has folded what it decided into its books when it returns."""

    form: int
    """The version in force, which may be raised between steps."""

    def step(self, now: int, operations: Sequence[tuple[int, Operation]], /) -> Decision: ...


class Machine(Protocol):
    """Makes books and deciders, and knows the journal's form of events."""

    @property
    def form(self) -> int:
        """The newest version of events and dumps that it reads and writes. Dumps of two versions cannot be compared."""
        ...

    @property
    def forms(self) -> tuple[int, int]:
        """The oldest version that it reads, and the newest."""
        ...

    def form_of(self, chunk: bytes, /) -> int:
        """The version of a dump, by its first chunk; raises if that cannot be."""
        ...

    def empty(self, ledger: str) -> Books: ...
    def restore(self, ledger: str, chunks: Iterable[bytes]) -> Books:
        """Books from what :meth:`Books.dump` gave; raises if that cannot be."""
        ...

    def decider(self, ledger: str, books: Any, absence: Absence | None = None, form: int | None = None) -> Decider:
        """A decider over books of this machine, with nobody waiting.

        ``absence`` is what is known of the time since the newest event; ``None``: nothing is. ``form`` is the version
        in force (``None``: the newest): no event is made that the version of that form could not read.
        """
        ...

    def encode(self, events: Sequence[Any], /) -> bytes: ...
    def decode(self, data: bytes, /) -> Sequence[Any]: ...


class EngineMachine:
    """The real engine. ``unseen_us``: for how long callers may go on by themselves when nobody decides."""

    def __init__(self, caps: Caps | None = None, unseen_us: int = 0) -> None:
        self._caps = Caps() if caps is None else caps
        self._unknown = Absence(most_us=unseen_us)
        """What is known of an absence of which nothing is told."""

    @property
    def form(self) -> int:
        return FORMAT

    @property
    def forms(self) -> tuple[int, int]:
        return OLDEST_FORMAT, FORMAT

    def form_of(self, chunk: bytes, /) -> int:
        return State.format_of(chunk)

    def empty(self, ledger: str) -> State:
        return State(ledger)

    def restore(self, ledger: str, chunks: Iterable[bytes]) -> State:
        state = State.restore(chunks)
        if state.ledger != ledger:
            raise ValueError("the snapshot is of another ledger")
        return state

    def decider(self, ledger: str, books: State, absence: Absence | None = None, form: int | None = None) -> Engine:
        known = self._unknown if absence is None else absence
        return Engine(ledger, books, self._caps, known, self.form if form is None else form)

    def encode(self, events: Sequence[Event], /) -> bytes:
        return ev.encode(events)

    def decode(self, data: bytes, /) -> Sequence[Event]:
        return ev.decode(data)
