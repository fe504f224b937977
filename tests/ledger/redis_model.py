"""What the store's scripts must do, in plain Python: the rules of ``lease.py`` over a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.ledger import lease
from paceline.ledger.commands import Stamped
from paceline.ledger.journal import Record, StoreUnavailable
from paceline.ledger.lease import Claim, Head


@dataclass
class Ledger:
    head: Head | None = None
    log: list[Record] = field(default_factory=list)
    chunks: dict[str, dict[int, bytes]] = field(default_factory=dict)


class Model:
    """A store of one ledger. ``now`` is its time, set from outside."""

    def __init__(self) -> None:
        self.it = Ledger()
        self.now = 0

    def _keep(self, head: Head, before: Head | None = None) -> Stamped:
        self.it.head = head
        return Stamped(head, self.now, before)

    def acquire(self, claim: Claim) -> Stamped:
        before = self.it.head
        return self._keep(lease.acquire(before, claim, self.now), before)

    def append(self, epoch: int, nonce: bytes, record: Record, lease_us: int) -> Stamped:
        head, new = lease.append(
            self.it.head, epoch, nonce, record.seq, record.previous, record.hash, record.at, lease_us, self.now
        )
        if new:
            self.it.log.append(record)
        return self._keep(head)

    def renew(self, epoch: int, nonce: bytes, seq: int, hash: bytes, lineage: str, lease_us: int) -> Stamped:
        return self._keep(lease.renew(self.it.head, epoch, nonce, seq, hash, lineage, lease_us, self.now))

    def release(self, epoch: int, nonce: bytes, seq: int, hash: bytes, successor: str, grace_us: int) -> Stamped:
        return self._keep(lease.release(self.it.head, epoch, nonce, seq, hash, successor, grace_us, self.now))

    def reassert(self, expected: Head | None, new: Head, records: Sequence[Record]) -> Stamped:
        before = self.it.head
        head = lease.reassert(before, expected, new, self.now)
        fresh = before is None or before.snapshot != new.snapshot
        if fresh and new.snapshot and len(self.it.chunks.get(new.snapshot, ())) != new.snapshot_chunks:
            raise StoreUnavailable("parts of the snapshot are gone")
        if fresh:
            self.it.log = list(records)
            if before is not None:
                self.it.chunks.pop(before.snapshot, None)
        else:
            assert before is not None
            self.it.log = [record for record in self.it.log if record.seq <= before.seq] + list(records)
        return self._keep(head)

    def read(self, after: int, count: int, most_bytes: int) -> list[Record]:
        found: list[Record] = []
        for record in self.it.log:
            if record.seq > after and len(found) < count:
                if found and sum(len(one.pack()) for one in [*found, record]) > most_bytes:
                    break
                found.append(record)
        return found

    def put_chunk(self, snapshot: str, index: int, chunk: bytes) -> None:
        if self.it.head is None or self.it.head.snapshot != snapshot:
            self.it.chunks.setdefault(snapshot, {})[index] = chunk

    def get_chunks(self, snapshot: str, start: int, count: int) -> list[bytes]:
        found: list[bytes] = []
        for index in range(start, start + count):
            if index not in self.it.chunks.get(snapshot, {}):
                break
            found.append(self.it.chunks[snapshot][index])
        return found

    def keep_snapshot(
        self,
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
        before = self.it.head
        head = lease.keep_snapshot(before, epoch, nonce, name, seq, at, hash, digest, chunks)
        if len(self.it.chunks.get(name, ())) != chunks:
            raise StoreUnavailable("parts of the snapshot are gone")
        assert before is not None
        if before.snapshot != name:
            self.it.chunks.pop(before.snapshot, None)
        self.it.log = [record for record in self.it.log if record.seq > keep_after]
        return self._keep(head)

    def keep_check(self, epoch: int, nonce: bytes, check: bytes) -> Stamped:
        return self._keep(lease.keep_check(self.it.head, epoch, nonce, check))

    def finalize(self, epoch: int, nonce: bytes, form: int) -> Stamped:
        return self._keep(lease.finalize(self.it.head, epoch, nonce, form))
