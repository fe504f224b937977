"""A store that keeps nothing past the process: for trying out, and for tests.

While the process lives it is a journal like any other, so that a ledger can be loaded again after a fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable, AsyncIterator

from paceline.ledger.journal import Chain, Loaded, Mark, Record, StoreFenced, StoreUnavailable, genesis

PAGE_RECORDS = 256


class MemoryJournal:
    """A :class:`~paceline.ledger.journal.Journal` in plain lists."""

    def __init__(self, ledger: str) -> None:
        self._name = f"ledger {ledger!r} in memory"
        self._chain = Chain(self._name, 0, 0, genesis(ledger))
        self._records: list[Record] = []
        self._snapshot: Mark | None = None
        self._chunks: list[bytes] = []
        self._check: Mark | None = None
        self._loaded = False

    async def load(self) -> Loaded:
        self._chain.epoch += 1
        self._loaded = False
        check = self._check
        if check is not None and self._snapshot is not None and check.seq <= self._snapshot.seq:
            check = None
        return Loaded(self._chain.epoch, self._snapshot, list(self._chunks), check, self._pages(self._chain.epoch))

    async def _pages(self, epoch: int) -> AsyncIterator[list[Record]]:
        for start in range(0, len(self._records), PAGE_RECORDS):
            yield self._records[start : start + PAGE_RECORDS]
        if epoch == self._chain.epoch:
            self._loaded = True

    async def append(self, record: Record) -> None:
        if not self._loaded:
            raise StoreUnavailable(f"{self._name} is not loaded: load it before appending")
        if self._chain.admit(record):
            self._records.append(record)
            self._chain.follow(record)

    async def write_snapshot(self, mark: Mark, chunks: AsyncIterable[bytes]) -> None:
        kept: list[bytes] = []
        digest = hashlib.sha256()
        async for chunk in chunks:
            kept.append(chunk)
            digest.update(chunk)
        self._expect(mark)
        self._snapshot = Mark(mark.seq, mark.at, mark.hash, digest.digest())
        self._chunks = kept
        self._records = [record for record in self._records if record.seq > mark.seq]

    async def write_check(self, mark: Mark) -> None:
        self._expect(mark)
        self._check = mark

    def _expect(self, mark: Mark) -> None:
        hashes = {record.seq: record.hash for record in self._records}
        if self._snapshot is not None:
            hashes[self._snapshot.seq] = self._snapshot.hash
        if not self._loaded or hashes.get(mark.seq) != mark.hash:
            raise StoreFenced(f"{self._name}: record {mark.seq} is not the one that was marked")

    async def close(self) -> None:
        self._loaded = False


class MemoryStore:
    """A :class:`~paceline.ledger.journal.Store` that forgets everything when it is dropped."""

    name = "memory"

    def __init__(self) -> None:
        self._journals: dict[str, MemoryJournal] = {}
        self._meta: dict[str, bytes] = {}

    async def open(self) -> None:
        pass

    def journal(self, ledger: str) -> MemoryJournal:
        return self._journals.setdefault(ledger, MemoryJournal(ledger))

    async def ledgers(self) -> list[str]:
        return sorted(self._journals)

    async def get_meta(self, key: str) -> bytes | None:
        return self._meta.get(key)

    async def put_meta(self, key: str, value: bytes) -> None:
        self._meta[key] = value

    async def close(self) -> None:
        pass
