"""The journal: what a ledger's owner asks of a store, and what every store has in common.

A journal is a chain of :class:`Record`. Each is written by one owner's **epoch**, follows the one before by
sequence number and by hash, and is written whole or not at all. :class:`Chain` is that rule without any I/O:
the adapters put every append through it, and a store that several servers share applies the same rule in its
own place.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Protocol

import msgspec

FORMAT = 1
"""Version of the stored form of records and snapshots. A store of a newer version is refused, never guessed
at."""

HASH_BYTES = 32
_HEADER = struct.Struct(">QQQQ32s")
_PREFIX_BYTES = HASH_BYTES + _HEADER.size


class StoreError(Exception):
    """A store did not do what was asked. The message is one line: what happened, to what, and what to do."""


class StoreURLError(StoreError):
    """The store's URL is wrong."""


class StoreLocked(StoreError):
    """Another server has the store open."""


class StoreCorrupt(StoreError):
    """What is stored is damaged, or is not ours. Nothing was changed."""


class StoreVersion(StoreError):
    """A newer version wrote the store."""


class StoreFull(StoreError):
    """There is no room to write, or writing is not allowed. Reading works."""


class StoreUnavailable(StoreError):
    """The store does not answer, or its answer is not known."""


class StoreFenced(StoreError):
    """The journal has gone on without this owner, which must forget what it holds and load again."""


RETRYABLE = (StoreLocked, StoreFull, StoreUnavailable, StoreFenced)
"""Errors that may pass without anybody repairing what is stored."""


def genesis(ledger: str) -> bytes:
    """The hash before a ledger's first record, so that no record fits into another ledger's chain."""
    return hashlib.sha256(b"paceline ledger\0" + ledger.encode()).digest()


class Record(msgspec.Struct, frozen=True, gc=False):
    """One batch of events as journalled.

    ``at`` is ledger time and ``wall`` the store's or the machine's time, both in µs. ``payload`` is opaque
    here.
    ``hash`` is SHA-256 over everything else, ``previous`` that of the record before.
    """

    seq: int
    epoch: int
    at: int
    wall: int
    previous: bytes
    payload: bytes
    hash: bytes

    @classmethod
    def sealed(cls, seq: int, epoch: int, at: int, wall: int, previous: bytes, payload: bytes) -> Record:
        """A record with its hash."""
        return cls(seq, epoch, at, wall, previous, payload, _hash(seq, epoch, at, wall, previous, payload))

    def pack(self) -> bytes:
        """The stored form: hash, header, payload."""
        return b"".join(
            (
                self.hash,
                _HEADER.pack(self.seq, self.epoch, self.at, self.wall, self.previous),
                self.payload,
            )
        )

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """The inverse of :meth:`pack`. Raises ``ValueError`` if the hash is not that of the content."""
        if len(data) < _PREFIX_BYTES:
            raise ValueError("the record is cut short")
        seq, epoch, at, wall, previous = _HEADER.unpack_from(data, HASH_BYTES)
        record = cls(seq, epoch, at, wall, previous, data[_PREFIX_BYTES:], data[:HASH_BYTES])
        if hashlib.sha256(memoryview(data)[HASH_BYTES:]).digest() != record.hash:
            raise ValueError("the record's hash does not match its content")
        return record


def _hash(seq: int, epoch: int, at: int, wall: int, previous: bytes, payload: bytes) -> bytes:
    digest = hashlib.sha256(_HEADER.pack(seq, epoch, at, wall, previous))
    digest.update(payload)
    return digest.digest()


class Mark(msgspec.Struct, frozen=True, gc=False):
    """What the books were at a record: ``hash`` is the record's, ``digest`` the SHA-256 over the dumped
    state.

    A snapshot has one, and now and then one is written alone, for replay to be checked against; its last bytes tell the
    form of the dump.
    """

    seq: int
    at: int
    hash: bytes
    digest: bytes


class Beginning(msgspec.Struct, frozen=True):
    """What the owner of a shared journal finds when it begins. Ledger times in µs."""

    now: int
    """The ledger time of the acquisition: the last journalled time plus the store's time since."""
    seen_until: int | None
    """Until then the owner before was alive; ``None``: there was none."""
    is_new_primary: bool
    """The store's primary is not the one that the owner before wrote to: it may lack that owner's last records."""
    took_over: bool = False
    """The owner before had not let go."""


class Loaded(msgspec.Struct):
    """What a ledger's journal holds: the snapshot (``None``: there is none) and the records after it.

    ``pages`` must be read to its end before the first append; each page is a list of verified records, oldest
    first, and reading on may raise :class:`StoreError`. ``check`` is the newest lone :class:`Mark`, if later
    than the snapshot. The rest is of shared journals.
    """

    epoch: int
    snapshot: Mark | None
    chunks: Sequence[bytes]
    check: Mark | None
    pages: AsyncIterator[list[Record]]
    form: int | None = None
    """The form that owners may write."""
    resumed: bool = False
    """``pages`` go on behind the record that the reader already has; there is no snapshot to read."""
    is_empty: bool = False
    """The store has nothing, and needs the reader's books."""
    beginning: Beginning | None = None


class Chain:
    """Where a journal ends, and what may follow. No I/O.

    ``epoch`` is the owner's that may append; a record of any other is fenced off.
    """

    __slots__ = ("epoch", "hash", "name", "seq")

    def __init__(self, name: str, epoch: int, seq: int, hash: bytes) -> None:
        self.name = name
        self.epoch = epoch
        self.seq = seq
        self.hash = hash

    def follow(self, record: Record) -> None:
        """Go on to the next stored record. Raises ``ValueError`` if it does not follow."""
        if record.seq != self.seq + 1:
            raise ValueError(f"record {self.seq + 1} is missing")
        if record.previous != self.hash:
            raise ValueError("the record does not follow from the one before")
        self.seq, self.hash = record.seq, record.hash

    def admit(self, record: Record) -> bool:
        """Whether to write ``record``. ``False``: it is there already, this was an identical resend.

        Raises :class:`StoreFenced`. The caller calls :meth:`follow` once it is written.
        """
        if record.seq == self.seq and record.hash == self.hash:
            return False
        if record.epoch != self.epoch or record.seq != self.seq + 1 or record.previous != self.hash:
            raise StoreFenced(
                f"{self.name}: record {record.seq} of epoch {record.epoch} does not follow record {self.seq} "
                f"of epoch {self.epoch}: another owner has gone on; load the ledger again"
            )
        return True


class Journal(Protocol):
    """One ledger's journal. All methods raise :class:`StoreError` and may be cancelled; a cancelled or failed
    append may have been written all the same, which the next :meth:`load` finds out."""

    async def load(self) -> Loaded:
        """Take the ledger over under the next epoch, and read it. Appends of earlier epochs are refused from
        now on.

        It writes, so that a store that cannot be written is found out here.
        """
        ...

    async def append(self, record: Record) -> None:
        """Write one record; when this returns it is as durable as the store was asked to be."""
        ...

    async def write_snapshot(self, mark: Mark, chunks: AsyncIterable[bytes]) -> None:
        """Keep the state as it was at ``mark.seq``, then drop the records up to there and the snapshot
        before.

        ``mark.digest`` is not looked at: it is computed from the chunks as they come. Appends go on
        meanwhile. A snapshot not written to its end leaves no trace.
        """
        ...

    async def write_check(self, mark: Mark) -> None:
        """Keep a lone mark in the place of the one before."""
        ...

    async def close(self) -> None:
        """Let the ledger go. The store stays open."""
        ...


class Store(Protocol):
    """Where journals are. Open once per process; the ledgers in it share its lock and its worker."""

    name: str
    """What to call it in messages."""

    async def open(self) -> None:
        """Lock the store for this process. Raises :class:`StoreError`, at once if another server has it."""
        ...

    def journal(self, ledger: str) -> Journal:
        """The journal of a ledger, which need not exist yet. One per ledger at a time."""
        ...

    async def ledgers(self) -> list[str]:
        """The names of the ledgers that the store holds, sorted."""
        ...

    async def get_meta(self, key: str) -> bytes | None:
        """A small value kept for the whole store, such as a signing key."""
        ...

    async def put_meta(self, key: str, value: bytes) -> None:
        """Keep a small value, durably."""
        ...

    async def close(self) -> None:
        """Write out what is pending and unlock. Never raises; bounded to a few seconds."""
        ...
