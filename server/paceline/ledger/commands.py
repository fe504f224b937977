"""What a shared store is asked, one round trip each. The rules are those of :mod:`paceline.ledger.lease`.

Every command raises :class:`~paceline.ledger.journal.StoreError`: :class:`~paceline.ledger.journal.StoreUnavailable` if
it is not known whether it was carried out, :class:`~paceline.ledger.journal.StoreFull` if the store refused to write;
and those that the rules refuse raise their exceptions of :mod:`paceline.ledger.lease`. Every one ends within the
store's time budget. Commands may arrive twice, late, or after their caller has given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from paceline.ledger.journal import Record
from paceline.ledger.lease import Claim, Head


class Stamped(msgspec.Struct, frozen=True, gc=False):
    """A head with the store's time (µs) when it was read or written; and ``before``, the head that it replaced."""

    head: Head | None
    now: int
    before: Head | None = None


class NodeInfo(msgspec.Struct, frozen=True, gc=False):
    """A server process as it announces itself."""

    node: str
    address: str
    """Where its peers reach it."""
    version: str
    form: int
    """The newest form of journals that it reads and writes."""
    started_at: int
    """Wall clock, µs."""
    ready: bool = True
    """It may be given ledgers: it serves and does not drain."""
    ledgers: int = 0
    """How many it owns."""
    warm: tuple[str, ...] = ()
    """Ledgers of others that it follows closely, and could own at once."""


class Nodes(msgspec.Struct, frozen=True, gc=False):
    """The living processes, by name, and the store's time in µs."""

    nodes: dict[str, NodeInfo]
    now: int
    ledgers: tuple[str, ...] = ()
    """All ledgers that the store holds, sorted."""


class Commands(Protocol):
    """A shared store's commands. Ledgers are named; nothing here is kept in the process."""

    async def lineage(self) -> str:
        """What tells this primary from the one before or after it. Known without a round trip while connected."""
        ...

    async def head(self, ledger: str) -> Stamped:
        """The head, and the store's time. Never refused."""
        ...

    async def acquire(self, ledger: str, claim: Claim) -> Stamped:
        """:func:`paceline.ledger.lease.acquire`; ``before`` is the head before. Also lists the ledger's name."""
        ...

    async def append(self, ledger: str, epoch: int, nonce: bytes, record: Record, lease_us: int) -> Stamped:
        """:func:`paceline.ledger.lease.append`, with the record itself."""
        ...

    async def renew(
        self, ledger: str, epoch: int, nonce: bytes, seq: int, hash: bytes, lineage: str, lease_us: int
    ) -> Stamped:
        """:func:`paceline.ledger.lease.renew`."""
        ...

    async def release(
        self, ledger: str, epoch: int, nonce: bytes, seq: int, hash: bytes, successor: str, grace_us: int
    ) -> Stamped:
        """:func:`paceline.ledger.lease.release`."""
        ...

    async def reassert(self, ledger: str, expected: Head | None, new: Head, records: Sequence[Record]) -> Stamped:
        """:func:`paceline.ledger.lease.reassert`: ``records`` go behind ``expected``'s, whatever lies there is dropped.

        With ``expected`` of ``None``, or a new snapshot in ``new``, the log becomes exactly ``records``.
        """
        ...

    async def read(self, ledger: str, after: int, count: int, most_bytes: int = 4_194_304) -> list[Record]:
        """At most ``count`` records behind number ``after``, oldest first, unverified but for their own hashes.

        Raises :class:`~paceline.ledger.journal.StoreCorrupt` for a record whose hash is not that of its content.
        """
        ...

    async def put_chunk(self, ledger: str, snapshot: str, index: int, chunk: bytes) -> None:
        """Store a part of a snapshot that does not count yet; it goes by itself within an hour if it never does."""
        ...

    async def get_chunks(self, ledger: str, snapshot: str, start: int, count: int) -> list[bytes]:
        """Parts of a snapshot, in order. Fewer than asked for: it is gone."""
        ...

    async def keep_snapshot(
        self,
        ledger: str,
        epoch: int,
        nonce: bytes,
        name: str,
        seq: int,
        at: int,
        hash: bytes,
        digest: bytes,
        chunks: int,
        keep_after: int,
    ) -> Stamped:
        """:func:`paceline.ledger.lease.keep_snapshot`; then drops the snapshot before and the records up to
        ``keep_after``, which is at most ``seq``."""
        ...

    async def keep_check(self, ledger: str, epoch: int, nonce: bytes, check: bytes) -> Stamped:
        """:func:`paceline.ledger.lease.keep_check`."""
        ...

    async def finalize(self, ledger: str, epoch: int, nonce: bytes, form: int) -> Stamped:
        """:func:`paceline.ledger.lease.finalize`."""
        ...

    async def announce(self, node: NodeInfo, ttl_us: int) -> Nodes:
        """Keep this process on the list for ``ttl_us`` (0: take it off), and say who else lives."""
        ...

    async def ledgers(self) -> list[str]:
        """The names of all ledgers, sorted."""
        ...

    async def get_meta(self, key: str) -> bytes | None:
        """A small value for the whole store."""
        ...

    async def put_meta(self, key: str, value: bytes) -> bytes:
        """Keep a small value unless there is one; the one that counts."""
        ...
