"""A shared store in plain Python: the rules of :mod:`paceline.ledger.lease`, without a network. One :class:`ModelStore`
serves many processes; ``fault`` is asked before and after each command, and may raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.ledger import lease
from paceline.ledger.commands import NodeInfo, Nodes, Stamped
from paceline.ledger.journal import Record
from paceline.ledger.lease import Claim, Head

Fault = Callable[[str, bool], None]
"""Name of the command, and whether it was carried out."""


class ModelStore:
    """What the store holds. ``now`` is its clock in µs."""

    def __init__(self, now: Callable[[], int]) -> None:
        self.now = now
        self.primary = "first"
        self.heads: dict[str, Head] = {}
        self.records: dict[str, list[Record]] = {}
        self.chunks: dict[tuple[str, str], dict[int, bytes]] = {}
        self.meta: dict[str, bytes] = {}
        self.live: dict[str, tuple[NodeInfo, int]] = {}
        self.fault: Fault = lambda _name, _done: None
        self.calls: list[str] = []

    def lose(self, ledger: str, count: int) -> None:
        """A failover: the last records, and what the head said of them, are gone."""
        self.primary += "'"
        kept = self.records[ledger]
        del kept[len(kept) - count :]
        head = self.heads[ledger]
        last = kept[-1] if kept else None
        self.heads[ledger] = Head(
            **{
                **{name: getattr(head, name) for name in Head.__struct_fields__},
                "seq": head.snapshot_seq if last is None else last.seq,
                "hash": (head.snapshot_hash or head.base_hash) if last is None else last.hash,
                "at": head.snapshot_at if last is None else last.at,
            }
        )

    def wipe(self) -> None:
        """Restarted empty."""
        self.primary += "'"
        for kept in (self.heads, self.records, self.chunks, self.meta, self.live):
            kept.clear()


class ModelCommands:
    """One process's way to it."""

    def __init__(self, store: ModelStore, fault: Fault | None = None) -> None:
        self._store = store
        self._fault = fault

    def _asked(self, name: str, done: bool) -> None:
        if not done:
            self._store.calls.append(name)
        (self._fault or self._store.fault)(name, done)

    def _keep(self, name: str, ledger: str, head: Head, before: Head | None = None) -> Stamped:
        self._store.heads[ledger] = head
        self._asked(name, True)
        return Stamped(head, self._store.now(), before)

    async def lineage(self) -> str:
        return self._store.primary

    async def head(self, ledger: str) -> Stamped:
        self._asked("head", False)
        return Stamped(self._store.heads.get(ledger), self._store.now())

    async def acquire(self, ledger: str, claim: Claim) -> Stamped:
        self._asked("acquire", False)
        before = self._store.heads.get(ledger)
        return self._keep("acquire", ledger, lease.acquire(before, claim, self._store.now()), before)

    async def append(self, ledger: str, epoch: int, nonce: bytes, record: Record, lease_us: int) -> Stamped:
        self._asked("append", False)
        head, new = lease.append(
            self._store.heads.get(ledger),
            epoch,
            nonce,
            record.seq,
            record.previous,
            record.hash,
            record.at,
            lease_us,
            self._store.now(),
        )
        if new:
            self._store.records.setdefault(ledger, []).append(record)
        return self._keep("append", ledger, head)

    async def renew(
        self, ledger: str, epoch: int, nonce: bytes, seq: int, hash: bytes, lineage: str, lease_us: int
    ) -> Stamped:
        self._asked("renew", False)
        head = self._store.heads.get(ledger)
        return self._keep(
            "renew", ledger, lease.renew(head, epoch, nonce, seq, hash, lineage, lease_us, self._store.now())
        )

    async def release(
        self, ledger: str, epoch: int, nonce: bytes, seq: int, hash: bytes, successor: str, grace_us: int
    ) -> Stamped:
        self._asked("release", False)
        head = self._store.heads.get(ledger)
        return self._keep(
            "release", ledger, lease.release(head, epoch, nonce, seq, hash, successor, grace_us, self._store.now())
        )

    async def reassert(self, ledger: str, expected: Head | None, new: Head, records: Sequence[Record]) -> Stamped:
        self._asked("reassert", False)
        head = self._store.heads.get(ledger)
        after = lease.reassert(head, expected, new, self._store.now())
        anew = expected is None or new.snapshot != expected.snapshot
        kept = (
            []
            if anew or expected is None
            else [record for record in self._store.records.get(ledger, []) if record.seq <= expected.seq]
        )
        self._store.records[ledger] = [*kept, *records]
        return self._keep("reassert", ledger, after)

    async def read(self, ledger: str, after: int, count: int, most_bytes: int = 4_194_304) -> list[Record]:
        self._asked("read", False)
        return [record for record in self._store.records.get(ledger, []) if record.seq > after][:count]

    async def put_chunk(self, ledger: str, snapshot: str, index: int, chunk: bytes) -> None:
        self._asked("put_chunk", False)
        self._store.chunks.setdefault((ledger, snapshot), {})[index] = chunk

    async def get_chunks(self, ledger: str, snapshot: str, start: int, count: int) -> list[bytes]:
        self._asked("get_chunks", False)
        found = self._store.chunks.get((ledger, snapshot), {})
        return [found[place] for place in range(start, min(len(found), start + count))]

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
        self._asked("keep_snapshot", False)
        before = self._store.heads.get(ledger)
        head = lease.keep_snapshot(before, epoch, nonce, name, seq, at, hash, digest, chunks)
        if before is not None:
            self._store.chunks.pop((ledger, before.snapshot), None)
        kept = self._store.records.get(ledger, [])
        self._store.records[ledger] = [record for record in kept if record.seq > keep_after]
        return self._keep("keep_snapshot", ledger, head)

    async def keep_check(self, ledger: str, epoch: int, nonce: bytes, check: bytes) -> Stamped:
        self._asked("keep_check", False)
        return self._keep("keep_check", ledger, lease.keep_check(self._store.heads.get(ledger), epoch, nonce, check))

    async def finalize(self, ledger: str, epoch: int, nonce: bytes, form: int) -> Stamped:
        self._asked("finalize", False)
        return self._keep("finalize", ledger, lease.finalize(self._store.heads.get(ledger), epoch, nonce, form))

    async def announce(self, node: NodeInfo, ttl_us: int) -> Nodes:
        self._asked("announce", False)
        now, live = self._store.now(), self._store.live
        live[node.node] = (node, now + ttl_us)
        for name in [name for name, (_, until) in live.items() if until <= now]:
            del live[name]
        return Nodes({name: info for name, (info, _) in live.items()}, now, tuple(sorted(self._store.heads)))

    async def ledgers(self) -> list[str]:
        return sorted(self._store.heads)

    async def get_meta(self, key: str) -> bytes | None:
        return self._store.meta.get(key)

    async def put_meta(self, key: str, value: bytes) -> bytes:
        return self._store.meta.setdefault(key, value)
