"""A scripted engine and a scripted journal, to put an owner into every situation there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from paceline.engine.absence import Absence
from paceline.engine.answers import Answer, Invalid
from paceline.engine.operations import Operation, Release
from paceline.ledger.errors import LedgerError
from paceline.ledger.journal import Loaded, Mark, Record, StoreUnavailable
from paceline.ledger.memory import MemoryJournal
from paceline.ledger.owner import Owner


class Books:
    """Folds keys into a list."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def apply(self, event: Any) -> None:
        if event == "unfoldable":
            raise KeyError(event)
        self.keys.append(event)

    def dump(self, form: int = 7) -> Iterator[bytes]:
        if form != 7:
            raise ValueError("not a form that is written")
        keys = list(self.keys)
        yield b"head"
        for start in range(0, len(keys), 100):
            yield "\n".join(keys[start : start + 100]).encode()


class Step(msgspec.Struct):
    at: int
    answers: list[tuple[int, Answer]]
    events: list[str]
    wake_at: int | None


class Decider:
    """What an operation does stands in its key:

    ``read...`` changes nothing; ``boom...`` fails half-way; ``wait...`` is answered after a second;
    ``twice...`` fails the first time only; ``unencodable...`` makes an event that cannot be written;
    everything else is one event. The answer's ``message`` is the number of events that it rests on.
    """

    def __init__(self, machine: Machine, books: Books) -> None:
        self.machine = machine
        self.books = books
        self.form = machine.form
        self.waiting: list[tuple[int, int]] = []

    def step(self, now: int, operations: Sequence[tuple[int, Operation]]) -> Step:
        self.machine.steps.append((now, [key_of(operation) for _, operation in operations]))
        if self.machine.fails_idle and not operations:
            self.machine.fails_idle -= 1
            raise RuntimeError("by itself")
        step = Step(now, [], [], None)
        for ticket, operation in operations:
            key = key_of(operation)
            if key.startswith("boom") or (key.startswith("twice") and key not in self.machine.seen):
                self.machine.seen.add(key)
                self.books.keys.append("half of " + key)
                raise KeyError(f"secret of {key}")
            if key.startswith("wait"):
                self.waiting.append((now + 1_000_000, ticket))
                continue
            if not key.startswith("read"):
                event: Any = object() if key.startswith("unencodable") else key
                self.books.keys.append(key)
                step.events.append(event)
            step.answers.append((ticket, Invalid(key, str(len(self.books.keys)))))
        for due, ticket in list(self.waiting):
            if due <= now:
                self.waiting.remove((due, ticket))
                self.books.keys.append(f"waited {ticket}")
                step.events.append(f"waited {ticket}")
                step.answers.append((ticket, Invalid("waited", str(len(self.books.keys)))))
        step.wake_at = min((due for due, _ in self.waiting), default=None)
        return step


class Machine:
    """Of :class:`Decider`."""

    form = 7
    forms = (7, 7)

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[str]]] = []
        self.seen: set[str] = set()
        self.fails_idle = 0
        self.encode: Callable[[Sequence[Any]], bytes] = msgspec.msgpack.Encoder().encode
        self.decode: Callable[[bytes], list[Any]] = msgspec.msgpack.Decoder(list[Any]).decode

    def form_of(self, chunk: bytes, /) -> int:
        return self.form

    def empty(self, ledger: str) -> Books:
        return Books()

    def restore(self, ledger: str, chunks: Iterable[bytes]) -> Books:
        books = Books()
        head, *keys = chunks
        assert head == b"head"
        books.keys = [key for chunk in keys for key in chunk.decode().split("\n")]
        return books

    def decider(self, ledger: str, books: Any, absence: Absence | None = None, form: int | None = None) -> Decider:
        return Decider(self, books)


class ScriptedJournal(MemoryJournal):
    """A journal whose appends wait while ``gate`` is closed, and fail as told."""

    def __init__(self) -> None:
        super().__init__("a")
        self.gate = asyncio.Event()
        self.gate.set()
        self.acknowledged = 0
        """Events of records that were acknowledged, or found by loading."""
        self._trimmed = 0
        self.appending: list[int] = []
        """Sequence numbers of all appends, as they begin."""
        self.lose: list[bool] = []
        """For each append to come that fails: whether it is written all the same."""
        self.away = 0
        """So many loads fail."""
        self.loads = 0
        self.snapshots = 0
        self.checks: list[Mark] = []

    async def load(self) -> Loaded:
        self.loads += 1
        if self.away:
            self.away -= 1
            raise StoreUnavailable("the store is away")
        loaded = await super().load()
        self._count()
        return loaded

    async def append(self, record: Record) -> None:
        self.appending.append(record.seq)
        await self.gate.wait()
        if self.lose:
            if self.lose.pop(0):
                await super().append(record)
            raise StoreUnavailable("lost the connection")
        await super().append(record)
        self._count()

    def _count(self) -> None:
        """What is journalled and known to be."""
        self.acknowledged = self._trimmed + sum(map(events_of, self._records))

    async def write_snapshot(self, mark: Mark, chunks: AsyncIterable[bytes]) -> None:
        self.snapshots += 1
        await super().write_snapshot(mark, chunks)
        self._trimmed = self.acknowledged - sum(map(events_of, self._records))

    async def write_check(self, mark: Mark) -> None:
        self.checks.append(mark)
        await super().write_check(mark)

    def keys(self) -> list[str]:
        """Everything journalled after the snapshot."""
        return [
            key
            for record in self._records
            for payload in msgspec.msgpack.decode(record.payload)
            for key in msgspec.msgpack.decode(payload)
        ]


def key_of(operation: Operation) -> str:
    assert isinstance(operation, Release)
    return operation.key


def keys_of(owner: Owner) -> list[str]:
    """The books of an owner of this machine."""
    engine = owner.engine
    assert isinstance(engine, Decider)
    return engine.books.keys


def events_of(record: Record) -> int:
    return sum(len(msgspec.msgpack.decode(payload)) for payload in msgspec.msgpack.decode(record.payload))


class Caller:
    """Collects replies, and what had been acknowledged when each came."""

    def __init__(self, journal: ScriptedJournal) -> None:
        self.journal = journal
        self.got: list[tuple[str, Answer | LedgerError]] = []
        self.early: list[str] = []
        """Answers that left before what they rest on was acknowledged."""

    def reply(self, key: str) -> Callable[[Answer | LedgerError], None]:
        def take(result: Answer | LedgerError) -> None:
            assert all(key != other for other, _ in self.got), f"{key} was answered twice"
            self.got.append((key, result))
            if isinstance(result, Invalid) and int(result.message) > self.journal.acknowledged:
                self.early.append(key)

        return take

    def kinds(self) -> dict[str, str]:
        """By key, the kind of what came."""
        return {key: type(result).__name__ for key, result in self.got}


async def settle(turns: int = 60) -> None:
    """Let the loop do what it can."""
    for _ in range(turns):
        await asyncio.sleep(0)
