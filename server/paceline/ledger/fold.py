"""Books from a journal: a snapshot and the records behind it, folded with every check that there is."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

import msgspec

from paceline.engine.state import State
from paceline.ledger.clock import Clock
from paceline.ledger.journal import Mark, Record, genesis
from paceline.ledger.machine import Books, Machine
from paceline.ledger.tail import Tail

PAUSE_US = 2_000
"""How long folding and dumping may keep the event loop at a time."""

Share = Callable[[], float | None]
"""The part of a core, or of the event loop's time, that work may take just now; ``None``: all of it."""

decode_payload = msgspec.msgpack.Decoder(list[bytes]).decode
encode_payload = msgspec.msgpack.Encoder().encode


_FORM = b"form"


def full() -> None:
    """The share of work that somebody waits for."""


class Unfoldable(Exception):
    """What is journalled does not give books. ``what`` names the place, ``__cause__`` says why."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Fold:
    """The books of one ledger up to one record."""

    def __init__(self, ledger: str, machine: Machine, clock: Clock) -> None:
        self.ledger = ledger
        self.books: Books = machine.empty(ledger)
        self.seq = 0
        self.hash = genesis(ledger)
        self.at = 0
        """Ledger time of the last record."""
        self.events = 0
        """Folded behind the snapshot."""
        self.size = 0
        """Bytes of their payloads."""
        self.snapshot_seq = 0
        self.snapshot_size = 0
        self.tail = Tail()
        self.check: Mark | None = None
        """A lone mark that lies ahead."""
        self.share: Share = full
        """For reading and checking a snapshot."""
        self._machine = machine
        self._clock = clock

    async def restore(self, mark: Mark, chunks: Sequence[bytes]) -> None:
        """Begin with a snapshot. Raises :class:`Unfoldable`."""
        try:
            eased = _eased(chunks, self._clock, lambda: self.share())
            self.books = await asyncio.to_thread(self._machine.restore, self.ledger, eased)
            found = await self._digest(self._machine.form_of(chunks[0]))
            # A dump in a form that this version only reads: that it is undamaged, the journal has checked.
            if found is not None and found != mark.digest:
                raise ValueError("it does not give the books that were dumped")
        except Exception as error:
            raise Unfoldable(f"the snapshot at record {mark.seq}") from error
        self.seq, self.hash, self.at = mark.seq, mark.hash, mark.at
        self.events = self.size = 0
        self.tail.clear()
        self.snapshot_seq, self.snapshot_size = mark.seq, sum(map(len, chunks))

    async def follow(self, records: Iterable[Record]) -> None:
        """Fold records that follow. Raises :class:`Unfoldable`; the books are then not to be used."""
        pause_at = self._clock.monotonic() + PAUSE_US
        for record in records:
            try:
                await self._one(record)
            except Exception as error:
                raise Unfoldable(f"record {record.seq}") from error
            if self._clock.monotonic() > pause_at:
                await asyncio.sleep(0)
                pause_at = self._clock.monotonic() + PAUSE_US

    async def dissolve(self) -> None:
        """Let go of the books, which nobody else has. All at once it would hold up the loop, and not even be soon: they
        refer to themselves, so that only the collector of cycles finds them."""
        if isinstance(self.books, State):
            for _ in self.books.ended.dissolve():
                await asyncio.sleep(0)

    async def _one(self, record: Record) -> None:
        if record.seq != self.seq + 1 or record.previous != self.hash:
            raise ValueError("the record does not follow from the one before")
        apply, decode = self.books.apply, self._machine.decode
        for payload in decode_payload(record.payload):
            for event in decode(payload):
                apply(event)
                self.events += 1
        self.seq, self.hash, self.at = record.seq, record.hash, max(self.at, record.at)
        self.size += len(record.payload)
        self.tail.add(record)
        check = self.check
        if check is not None and check.seq <= record.seq:
            self.check = None
            if check.seq == record.seq and (check.hash != record.hash or not await self._agrees(check.digest)):
                raise ValueError("the books are not what they were when it was written")

    async def _agrees(self, found: bytes) -> bool:
        """Whether a digest is that of these books. One in a form that this version does not write proves nothing."""
        if found[-len(_FORM) - 2 : -2] != _FORM:
            return True
        form = int.from_bytes(found[-2:], "big")
        own = await self._digest(form)
        return own is None or formed(form, own) == found

    async def _digest(self, form: int) -> bytes | None:
        """SHA-256 over a dump in a form; ``None`` if this version does not write it."""
        try:
            chunks = begun(self.books.dump(form))
        except ValueError:
            return None
        hashed = hashlib.sha256()
        async for chunk in paced(chunks, self._clock, lambda: self.share()):
            hashed.update(chunk)
        return hashed.digest()


def formed(form: int, digest: bytes) -> bytes:
    """A digest that tells at its end of which form of dump it is."""
    end = _FORM + form.to_bytes(2, "big")
    return digest[: -len(end)] + end


def begun(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """``chunks`` with the first taken already, which fixes the state that is dumped."""
    first = next(chunks, None)

    def rest() -> Iterator[bytes]:
        if first is not None:
            yield first
            yield from chunks

    return rest()


async def paced(chunks: Iterator[bytes], clock: Clock, share: Share) -> AsyncIterator[bytes]:
    """``chunks``, between turns of the loop, within ``share`` of its time."""
    owed = 0.0
    while True:
        started = clock.monotonic()
        chunk = next(chunks, None)
        if chunk is None:
            return
        owed += (clock.monotonic() - started) * _rest(share)
        yield chunk
        if owed > PAUSE_US:
            await clock.sleep_until(clock.monotonic() + int(owed))
            owed = 0.0
        else:
            await asyncio.sleep(0)


def _eased(chunks: Iterable[bytes], clock: Clock, share: Share) -> Iterator[bytes]:
    """``chunks`` for a thread that reads them, which leaves the interpreter to the event loop in between."""
    for chunk in chunks:
        started = clock.monotonic()
        yield chunk
        owed = (clock.monotonic() - started) * _rest(share)
        if owed > 0:
            time.sleep(owed / 1e6)


def _rest(share: Share) -> float:
    """How long to rest for each second of work."""
    part = share()
    return 0.0 if part is None else 1 / part - 1
