"""A simulated shared store: the pure rules of :mod:`paceline.ledger.lease` behind a network that loses and repeats.

A :class:`Primary` keeps what it did as a list of effects, so that a replica of any moment can be made from it: a
failover begins a new primary from the effects up to some instant, and what the old one did afterwards is lost. Both may
live for a while. What a primary has acknowledged is never forgotten here: the checks compare it with what survives.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from paceline.ledger import lease
from paceline.ledger.commands import NodeInfo, Nodes, Stamped
from paceline.ledger.journal import Record, StoreFull, StoreUnavailable
from paceline.ledger.lease import Claim, Head
from tests.simulation.clock import START_WALL
from tests.simulation.loop import Loop, Process
from tests.simulation.network import NOBODY, Network

BUDGET_US = 1_500_000
"""Within which every command ends."""

SPLIT_US = 6_000_000
"""For so long after a failover an owner's lease from before may last."""

RULES = SimpleNamespace(
    acquire=lease.acquire,
    append=lease.append,
    renew=lease.renew,
    release=lease.release,
    reassert=lease.reassert,
    keep_snapshot=lease.keep_snapshot,
    keep_check=lease.keep_check,
    finalize=lease.finalize,
)
"""What the store does; the broken variants replace one or the other."""


class Kept:
    """One ledger as a primary has it."""

    __slots__ = ("chunks", "first", "head", "records")

    def __init__(self) -> None:
        self.head: Head | None = None
        self.first = 1
        """Number of the first record."""
        self.records: list[Record] = []
        self.chunks: dict[str, dict[int, bytes]] = {}

    def after(self, seq: int, count: int) -> list[Record]:
        start = max(0, seq + 1 - self.first)
        return self.records[start : start + count]

    def check_whole(self, snapshot: str, chunks: int) -> None:
        """Of a snapshot that is to count, a failover may have lost parts. Raises :class:`StoreUnavailable`."""
        if len(self.chunks.get(snapshot, ())) != chunks:
            raise StoreUnavailable("parts of the snapshot are gone")


Effect = tuple[int, Callable[["Primary"], None]]


class Primary:
    """One server's life as the store's primary. ``offset`` is by how much its clock is off, µs."""

    def __init__(self, number: int, offset: int, effects: Sequence[Effect] = ()) -> None:
        self.lineage = f"primary-{number}"
        self.offset = offset
        self.effects: list[Effect] = []
        self.ledgers: dict[str, Kept] = {}
        self.meta: dict[str, bytes] = {}
        self.nodes: dict[str, tuple[NodeInfo, int]] = {}
        self.dead = False
        self.ended_at = 0
        """When it, having been superseded, stopped as well; 0: then and there."""
        self.superseded_at = 1 << 62
        """When another one became the primary."""
        self.refuses_writes = ""
        self.accepted: list[tuple[str, Record, int, bytes, int]] = []
        """Ledger, record, epoch, nonce and instant, in the order in which they were written in this life."""
        for at, effect in effects:
            self.effects.append((at, effect))
            effect(self)
        self.began_with: dict[str, Head | None] = {name: kept.head for name, kept in self.ledgers.items()}

    def kept(self, ledger: str) -> Kept:
        found = self.ledgers.get(ledger)
        if found is None:
            found = self.ledgers[ledger] = Kept()
        return found

    def head(self, ledger: str) -> Head | None:
        found = self.ledgers.get(ledger)
        return None if found is None else found.head


class Link:
    """One node's way to the store."""

    def __init__(self) -> None:
        self.primary: Primary | None = None
        """The one it is connected to; ``None``: it has to connect first."""
        self.lose_requests = 0.0
        self.lose_answers = 0.0
        self.repeats = 0.0
        """The part of requests that arrives twice, the second time late."""
        self.lates = 0.0
        """The part of requests that arrives seconds late, behind younger ones."""
        self.is_cut = False
        """Nothing arrives there."""
        self.is_deaf = False
        """Nothing comes back."""
        self.arrives_at = 0
        self.answers_at = 0


class Store:
    """All servers of the store, and every node's way there."""

    def __init__(self, loop: Loop, network: Network, rng: random.Random) -> None:
        self.loop = loop
        self.network = network
        self.rng = rng
        self.slow_us = 0
        """Up to so much more for each command."""
        self.is_down = False
        """Nobody listens."""
        self.hangs = False
        """It takes requests and answers nothing."""
        self.primaries: list[Primary] = []
        self.primary = self._begin(())
        self.links: dict[str, Link] = {}
        self.old: dict[str, Primary] = {}
        """Nodes that still reach another primary than the present one."""
        self.sealed: dict[bytes, Record] = {}
        """All records that any owner ever sealed, by hash."""
        self.was_emptied = False
        self.splits: list[tuple[int, int]] = []
        """From when to when a primary that is none any more may have answered."""
        self.commands = 0
        self.kinds: dict[str, int] = {}
        self.on_write: Callable[[Primary, str, Head | None, Head, Record | None], None] | None = None
        """Hears of each new head: primary, ledger, before, after, and the record that was appended."""

    def _begin(self, effects: Sequence[Effect], offset: int = 0) -> Primary:
        primary = Primary(len(self.primaries) + 1, offset, effects)
        if self.primaries:
            self.primary.superseded_at = self.loop.now
        self.primaries.append(primary)
        return primary

    # -- faults ----------------------------------------------------------------------------------------------------

    def fail_over(self, lost_us: int, offset: int = 0, old_for: Sequence[str] = ()) -> int:
        """Another server becomes the primary, without what the old one did in its last ``lost_us``.

        The nodes of ``old_for`` go on with the old one. Returns how many writes are lost.
        """
        before = self.primary
        horizon = self.loop.now - lost_us
        kept = [effect for effect in before.effects if effect[0] <= horizon]
        after = self._begin(kept, offset)
        lost = len(before.effects) - len(kept)
        self.primary = after
        for name in old_for:
            self.old[name] = before
        if not old_for:
            before.dead = True
        self.splits.append((self.loop.now - lost_us, self.loop.now + SPLIT_US))
        return lost

    def was_split(self, at: int) -> bool:
        """Whether two owners may have believed in themselves: at two primaries, or beside an emptied one."""
        return any(since <= at <= until for since, until in self.splits)

    def end_old(self) -> None:
        """The old primary learns that it is none."""
        for primary in self.old.values():
            primary.dead = True
            primary.ended_at = self.loop.now
        self.old.clear()

    def restart(self, *, empty: bool) -> None:
        """The server is started again, with what it had or with nothing. Another life, so another lineage."""
        before = self.primary
        before.dead = True
        self.end_old()
        self.splits.append((self.loop.now, self.loop.now + SPLIT_US))
        self.was_emptied = self.was_emptied or empty
        self.primary = self._begin(() if empty else before.effects, before.offset)

    # -- commands --------------------------------------------------------------------------------------------------

    def link(self, node: str) -> Link:
        return self.links.setdefault(node, Link())

    def reaches(self, node: str) -> Primary:
        """The primary that a node would be connected to now."""
        old = self.old.get(node)
        return self.primary if old is None or old.dead else old

    def stamp(self, primary: Primary) -> int:
        return START_WALL + self.loop.now + primary.offset

    def connected(self, node: str) -> Primary:
        """The connection's primary. Raises :class:`StoreUnavailable` if there is none."""
        link = self.link(node)
        if link.primary is None or link.primary.dead or link.primary is not self.reaches(node):
            if self.is_down or link.is_cut or link.is_deaf or self.hangs:
                raise StoreUnavailable("the store cannot be reached")
            link.primary = self.reaches(node)
            link.arrives_at = link.answers_at = 0
        return link.primary

    def ask(self, node: str, process: Process, kind: str, run: Callable[[Primary], Any]) -> asyncio.Future[Any]:
        """Send a command. The answer comes to the process's own turn."""
        loop, link, rng = self.loop, self.link(node), self.rng
        answer: asyncio.Future[Any] = loop.create_future()
        sent = loop.now
        self.commands += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if self.is_down:
            at = sent + self.network.delay(node, "store")
            loop.at(at, _fail, answer, "the store refuses connections", context=process.context)
            return answer
        try:
            primary = self.connected(node)
        except StoreUnavailable:
            loop.at(sent + BUDGET_US, _fail, answer, "the store does not answer", context=process.context)
            return answer
        chance = rng.random()
        lost = link.is_cut or self.hangs or chance < link.lose_requests
        took = self.network.delay(node, "store")
        if self.slow_us:
            took += int(self.slow_us * rng.random())
        repeated = link.repeats > 0 and rng.random() < link.repeats
        if link.lates > 0 and rng.random() < link.lates:
            arrives = sent + took + int(rng.random() * 4_000_000)
        else:
            arrives = link.arrives_at = max(sent + took, link.arrives_at)
        if lost:
            loop.at(sent + BUDGET_US, _fail, answer, "no answer in time", context=process.context)
            return answer
        loop.at(arrives, self._arrive, node, process, primary, run, answer, sent, context=NOBODY)
        if repeated:
            late = arrives + 1_000 + int(rng.random() * 4_000_000)
            loop.at(late, self._arrive, node, process, primary, run, None, sent, context=NOBODY)
        return answer

    def _arrive(
        self,
        node: str,
        process: Process,
        primary: Primary,
        run: Callable[[Primary], Any],
        answer: asyncio.Future[Any] | None,
        sent: int,
    ) -> None:
        loop, link = self.loop, self.link(node)
        result: Any = None
        error: Exception | None = None
        if primary.dead or self.is_down:
            error = StoreUnavailable("the connection was reset")
            if link.primary is primary:
                link.primary = None
        else:
            try:
                result = run(primary)
            except (lease.Held, lease.TooNew, lease.Fenced, StoreFull, StoreUnavailable) as refused:
                error = refused
        if answer is None:
            return
        at = loop.now + self.network.delay("store", node)
        if link.is_deaf or self.hangs or self.rng.random() < link.lose_answers or at > sent + BUDGET_US:
            at = max(sent + BUDGET_US, loop.now)
            loop.at(at, _fail, answer, "no answer in time", context=process.context)
            return
        at = link.answers_at = max(at, link.answers_at)
        loop.at(at, self._answer, answer, result, error, sent, context=process.context)

    def _answer(self, answer: asyncio.Future[Any], result: Any, error: Exception | None, sent: int) -> None:
        if answer.done():
            return
        if self.loop.now > sent + BUDGET_US and self.rng.random() < 0.5:
            # The process was held up: its timer was due as well.
            error = StoreUnavailable("no answer in time")
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    def write(
        self, primary: Primary, ledger: str, head: Head, record: Record | None, effect: Callable[[Primary], None] | None
    ) -> Stamped:
        """Carry a write out, and note it for the replicas."""
        before = primary.head(ledger)

        def change(target: Primary) -> None:
            kept = target.kept(ledger)
            if effect is not None:
                effect(target)
            if record is not None:
                if not kept.records:
                    kept.first = record.seq
                kept.records.append(record)
            kept.head = head

        change(primary)
        primary.effects.append((self.loop.now, change))
        if record is not None:
            primary.accepted.append((ledger, record, head.epoch, head.nonce, self.loop.now))
        if self.on_write is not None:
            self.on_write(primary, ledger, before, head, record)
        return Stamped(head, self.stamp(primary), before)

    def plain(self, primary: Primary, effect: Callable[[Primary], None]) -> None:
        """A write beside the heads."""
        effect(primary)
        primary.effects.append((self.loop.now, effect))


def _fail(answer: asyncio.Future[Any], why: str) -> None:
    if not answer.done():
        answer.set_exception(StoreUnavailable(why))


class SimCommands:
    """One process's :class:`~paceline.ledger.commands.Commands`."""

    def __init__(self, store: Store, node: str, process: Process) -> None:
        self._store = store
        self._node = node
        self._process = process
        self._last = ""

    async def _do(self, kind: str, run: Callable[[Primary], Any]) -> Any:
        return await self._store.ask(self._node, self._process, kind, run)

    def _may_write(self, primary: Primary) -> None:
        if primary.refuses_writes:
            raise StoreFull(primary.refuses_writes)

    async def lineage(self) -> str:
        try:
            self._last = self._store.connected(self._node).lineage
        except StoreUnavailable:
            if not self._last:
                raise
        return self._last

    async def head(self, ledger: str) -> Stamped:
        store = self._store

        def run(primary: Primary) -> Stamped:
            return Stamped(primary.head(ledger), store.stamp(primary))

        return await self._do("head", run)  # type: ignore[no-any-return]

    def _change(
        self,
        kind: str,
        ledger: str,
        rule: Callable[[Primary, int], Head],
        effect: Callable[[Primary], None] | None = None,
    ) -> Any:
        store = self._store

        def run(primary: Primary) -> Stamped:
            self._may_write(primary)
            before = primary.head(ledger)
            head = rule(primary, store.stamp(primary))
            if head is before:
                return Stamped(head, store.stamp(primary), before)
            return store.write(primary, ledger, head, None, effect)

        return self._do(kind, run)

    async def acquire(self, ledger: str, claim: Claim) -> Stamped:
        found = await self._change("acquire", ledger, lambda p, now: RULES.acquire(p.head(ledger), claim, now))
        return found  # type: ignore[no-any-return]

    async def append(self, ledger: str, epoch: int, nonce: bytes, record: Record, lease_us: int) -> Stamped:
        store = self._store

        def run(primary: Primary) -> Stamped:
            self._may_write(primary)
            now = store.stamp(primary)
            head, is_new = RULES.append(
                primary.head(ledger), epoch, nonce, record.seq, record.previous, record.hash, record.at, lease_us, now
            )
            return store.write(primary, ledger, head, record if is_new else None, None)

        return await self._do("append", run)  # type: ignore[no-any-return]

    async def renew(
        self, ledger: str, epoch: int, nonce: bytes, seq: int, hash: bytes, lineage: str, lease_us: int
    ) -> Stamped:
        return await self._change(  # type: ignore[no-any-return]
            "renew",
            ledger,
            lambda p, now: RULES.renew(p.head(ledger), epoch, nonce, seq, hash, lineage, lease_us, now),
        )

    async def release(
        self, ledger: str, epoch: int, nonce: bytes, seq: int, hash: bytes, successor: str, grace_us: int
    ) -> Stamped:
        return await self._change(  # type: ignore[no-any-return]
            "release",
            ledger,
            lambda p, now: RULES.release(p.head(ledger), epoch, nonce, seq, hash, successor, grace_us, now),
        )

    async def reassert(self, ledger: str, expected: Head | None, new: Head, records: Sequence[Record]) -> Stamped:
        whole = expected is None or new.snapshot != expected.snapshot
        back = tuple(records)

        def put(primary: Primary) -> None:
            kept = primary.kept(ledger)
            if whole or expected is None:
                kept.records = list(back)
            else:
                kept.records = kept.after(kept.first - 1, max(0, expected.seq + 1 - kept.first)) + list(back)
            kept.first = kept.records[0].seq if kept.records else new.seq + 1

        def rule(primary: Primary, now: int) -> Head:
            before = primary.head(ledger)
            head: Head = RULES.reassert(before, expected, new, now)
            if new.snapshot and (before is None or before.snapshot != new.snapshot):
                primary.kept(ledger).check_whole(new.snapshot, new.snapshot_chunks)
            return head

        return await self._change("reassert", ledger, rule, put)  # type: ignore[no-any-return]

    async def read(self, ledger: str, after: int, count: int, most_bytes: int = 4_194_304) -> list[Record]:
        def run(primary: Primary) -> list[Record]:
            found = primary.ledgers.get(ledger)
            return [] if found is None else found.after(after, count)

        return await self._do("read", run)  # type: ignore[no-any-return]

    async def put_chunk(self, ledger: str, snapshot: str, index: int, chunk: bytes) -> None:
        def put(primary: Primary) -> None:
            primary.kept(ledger).chunks.setdefault(snapshot, {})[index] = chunk

        def run(primary: Primary) -> None:
            self._may_write(primary)
            self._store.plain(primary, put)

        await self._do("put_chunk", run)

    async def get_chunks(self, ledger: str, snapshot: str, start: int, count: int) -> list[bytes]:
        def run(primary: Primary) -> list[bytes]:
            kept = primary.ledgers.get(ledger)
            chunks = {} if kept is None else kept.chunks.get(snapshot, {})
            found: list[bytes] = []
            for index in range(start, start + count):
                if index not in chunks:
                    break
                found.append(chunks[index])
            return found

        return await self._do("get_chunks", run)  # type: ignore[no-any-return]

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
        def trim(primary: Primary) -> None:
            kept = primary.kept(ledger)
            head = kept.head
            if head is not None and head.snapshot != name:
                kept.chunks.pop(head.snapshot, None)
            last = kept.first + len(kept.records) - 1
            kept.records = kept.after(keep_after, len(kept.records))
            kept.first = kept.records[0].seq if kept.records else last + 1

        def rule(primary: Primary, now: int) -> Head:
            head: Head = RULES.keep_snapshot(primary.head(ledger), epoch, nonce, name, seq, at, hash, digest, chunks)
            primary.kept(ledger).check_whole(name, chunks)
            return head

        return await self._change("keep_snapshot", ledger, rule, trim)  # type: ignore[no-any-return]

    async def keep_check(self, ledger: str, epoch: int, nonce: bytes, check: bytes) -> Stamped:
        return await self._change(  # type: ignore[no-any-return]
            "keep_check", ledger, lambda p, now: RULES.keep_check(p.head(ledger), epoch, nonce, check)
        )

    async def finalize(self, ledger: str, epoch: int, nonce: bytes, form: int) -> Stamped:
        return await self._change(  # type: ignore[no-any-return]
            "finalize", ledger, lambda p, now: RULES.finalize(p.head(ledger), epoch, nonce, form)
        )

    async def announce(self, node: NodeInfo, ttl_us: int) -> Nodes:
        store = self._store

        def run(primary: Primary) -> Nodes:
            now = store.loop.now
            if ttl_us and not primary.refuses_writes:
                # Not noted for replicas: every process announces itself again soon.
                primary.nodes[node.node] = node, now + ttl_us
            else:
                primary.nodes.pop(node.node, None)
            living = {name: info for name, (info, until) in sorted(primary.nodes.items()) if until > now}
            return Nodes(living, store.stamp(primary), tuple(sorted(primary.ledgers)))

        return await self._do("announce", run)  # type: ignore[no-any-return]

    async def ledgers(self) -> list[str]:
        return await self._do("ledgers", lambda primary: sorted(primary.ledgers))  # type: ignore[no-any-return]

    async def get_meta(self, key: str) -> bytes | None:
        return await self._do("get_meta", lambda primary: primary.meta.get(key))  # type: ignore[no-any-return]

    async def put_meta(self, key: str, value: bytes) -> bytes:
        def put(primary: Primary) -> None:
            primary.meta.setdefault(key, value)

        def run(primary: Primary) -> bytes:
            self._may_write(primary)
            if key not in primary.meta:
                self._store.plain(primary, put)
            return primary.meta[key]

        return await self._do("put_meta", run)  # type: ignore[no-any-return]

    async def close(self) -> None:
        """Nothing to let go of."""
