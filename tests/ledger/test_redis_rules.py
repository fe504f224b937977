"""The scripts against the rules, on a real server: random commands, the same answers, the same refusals."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest

from paceline.ledger.commands import NodeInfo
from paceline.ledger.journal import Record, StoreCorrupt, StoreUnavailable, genesis
from paceline.ledger.lease import Claim, Fenced, Head, Held, TooNew
from paceline.ledger.redis import RedisCommands, RedisStore
from paceline.ledger.store import open_store
from tests.ledger.redis_model import Model
from tests.replicas.redis_server import RedisServer, need_redis

pytestmark = [pytest.mark.redis, pytest.mark.xdist_group("redis-rules")]

LEDGER = "org/é {x}:*"
KEY = "{paceline:org%2F%C3%A9%20%7Bx%7D%3A%2A}"
REFUSED = (Held, TooNew, Fenced, StoreUnavailable)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    need_redis()
    with RedisServer() as server:
        yield server


@pytest.fixture
async def commands(server: RedisServer) -> AsyncIterator[RedisCommands]:
    server.call("FLUSHALL")
    store = open_store(server.url)
    assert isinstance(store, RedisStore)
    await store.open()
    yield store.commands
    await store.close()


def claim_by(node: str, lineage: str, nonce: bytes | None = None, **changes: Any) -> Claim:
    claim = Claim(node, f"{node}:7001", nonce or os.urandom(16), 10_000_000, lineage, genesis(LEDGER), 1, 1)
    return msgspec.structs.replace(claim, **changes)


def following(head: Head, chance: random.Random, payload: bytes = b"") -> Record:
    return Record.sealed(
        head.seq + 1, head.epoch, head.at + chance.randrange(9), chance.randrange(1 << 50), head.hash, payload
    )


class Walk:
    """Random commands, many of which the rules allow."""

    NODES = ("n1", "n2", "n3")
    LINEAGES = ("first", "second")
    SNAPSHOTS = ("s1", "s2", "s3")

    def __init__(self, commands: RedisCommands, server: RedisServer, seed: int) -> None:
        self.commands, self.server = commands, server
        self.chance = random.Random(seed)
        self.model = Model()
        self.nonces = [bytes(self.chance.randrange(256) for _ in range(16)) for _ in range(3)]
        self.last: Record | None = None
        self.seen: Counter[str] = Counter()

    async def run(self, steps: int) -> None:
        kinds: list[Callable[[], Any]] = [
            self.acquire, self.append, self.append, self.append, self.append, self.renew, self.release, self.reassert,
            self.put_chunk, self.put_chunk, self.keep_snapshot, self.keep_snapshot, self.keep_check, self.finalize,
        ]  # fmt: skip
        for _ in range(steps):
            if self.chance.random() < 0.1:
                self.server.call("SCRIPT", "FLUSH")
            await self.chance.choice(kinds)()
            await self.compare()

    async def both(self, name: str, *args: Any) -> None:
        """One command on both sides; the model's time is the store's."""
        model, commands = self.model, self.commands
        begun = (await commands.head(LEDGER)).now
        theirs: Any
        try:
            theirs = await getattr(commands, name)(LEDGER, *args)
        except REFUSED as error:
            theirs = error
        ended = (await commands.head(LEDGER)).now
        model.now = begun
        if isinstance(theirs, Held):
            assert model.it.head is not None
            lag = args[0].lag_us if model.it.head.lineage != args[0].lineage else 0
            model.now = model.it.head.until + lag - theirs.left_us
        elif name != "put_chunk" and not isinstance(theirs, Exception):
            model.now = theirs.now
        assert begun <= model.now <= ended
        ours: Any
        try:
            ours = getattr(model, name)(*args)
        except REFUSED as error:
            ours = error
        if isinstance(ours, Exception):
            self.seen[f"{name} {type(ours).__name__}"] += 1
            assert type(theirs) is type(ours), f"{name}{args}: {theirs!r}, not {ours!r}"
            assert getattr(theirs, "head", None) == getattr(ours, "head", None)
            assert getattr(theirs, "left_us", None) == getattr(ours, "left_us", None)
        else:
            self.seen[f"{name} ok"] += 1
            assert theirs == ours, f"{name}{args}"

    async def compare(self) -> None:
        stamped = await self.commands.head(LEDGER)
        assert stamped.head == self.model.it.head
        after, count, most = self.chance.randrange(20), self.chance.randrange(40), self.chance.randrange(2_000)
        assert await self.commands.read(LEDGER, after, count, most) == (
            self.model.read(after, count, most) if most else []
        )
        assert await self.commands.read(LEDGER, 0, 10_000) == self.model.it.log
        for name in self.SNAPSHOTS:
            assert await self.commands.get_chunks(LEDGER, name, 0, 4) == self.model.get_chunks(name, 0, 4)

    def owner(self) -> tuple[int, bytes]:
        """The owner's epoch and nonce, or almost."""
        head = self.model.it.head
        if head is None or self.chance.random() < 0.1:
            return self.chance.randrange(4), self.chance.choice(self.nonces)
        if self.chance.random() < 0.1:
            return head.epoch + self.chance.choice((-1, 1)), head.nonce
        return head.epoch, head.nonce

    def end(self) -> tuple[int, bytes]:
        """The journal's end, or almost."""
        head = self.model.it.head
        if head is None or self.chance.random() < 0.1:
            return self.chance.randrange(4), bytes(32)
        if self.chance.random() < 0.1:
            return self.chance.choice(((head.seq + 1, head.hash), (head.seq, bytes(32))))
        return head.seq, head.hash

    def lease(self) -> int:
        return self.chance.choice((0, 1, 300, 10_000_000))

    async def acquire(self) -> None:
        head = self.model.it.head
        node = self.chance.choice(self.NODES)
        claim = claim_by(
            node,
            self.chance.choice(self.LINEAGES),
            self.chance.choice(self.nonces) + bytes([self.chance.randrange(3)]),
            lease_us=self.lease(),
            form=self.chance.choice((1, 2, 3)),
            first_form=self.chance.choice((1, 2)),
            depose=head.epoch if head and self.chance.random() < 0.4 else self.chance.randrange(3),
            lag_us=self.chance.choice((0, 500, 5_000_000)),
        )
        # The claimant's view of the primary is tested elsewhere; here any two will do.
        self.commands._lineage = claim.lineage
        await self.both("acquire", claim)

    async def append(self) -> None:
        epoch, nonce = self.owner()
        head = self.model.it.head
        if self.last is not None and self.chance.random() < 0.15:
            record = self.last
        elif head is None:
            record = Record.sealed(1, 1, 0, 0, genesis(LEDGER), b"")
        else:
            record = following(head, self.chance, bytes(self.chance.randrange(256) for _ in range(40)))
            if self.chance.random() < 0.1:
                record = Record.sealed(record.seq + self.chance.choice((-1, 1)), 1, 1, 1, head.hash, b"")
            elif self.chance.random() < 0.1:
                record = Record.sealed(record.seq, 1, 1, 1, bytes(32), b"")
        await self.both("append", epoch, nonce, record, self.lease())
        self.last = record

    async def renew(self) -> None:
        await self.both("renew", *self.owner(), *self.end(), self.chance.choice(self.LINEAGES), self.lease())

    async def release(self) -> None:
        successor = self.chance.choice(("", *self.NODES))
        await self.both("release", *self.owner(), *self.end(), successor, self.chance.choice((0, 300, 5_000_000)))

    async def reassert(self) -> None:
        head = self.model.it.head
        expected = head
        if expected is not None and self.chance.random() < 0.2:
            expected = msgspec.structs.replace(expected, nonce=self.chance.choice(self.nonces))
        elif expected is not None and self.chance.random() < 0.1:
            expected = msgspec.structs.replace(expected, seq=expected.seq + 1)
        elif expected is not None and self.chance.random() < 0.1:
            expected = msgspec.structs.replace(expected, hash=bytes(32))
        elif self.chance.random() < 0.1:
            expected = None
        new = expected or Head(
            1, self.nonces[0], "n1", "n1:7001", 0, genesis(LEDGER), 0, 0, 5, 5_005, 0, genesis(LEDGER), "first", 1
        )
        snapshot = self.chance.choice((new.snapshot, new.snapshot, "", *self.SNAPSHOTS))
        new = msgspec.structs.replace(
            new, snapshot=snapshot, snapshot_chunks=len(self.model.it.chunks.get(snapshot, ())) or 1, check=b"\0mark"
        )
        records = []
        for _ in range(self.chance.randrange(4)):
            record = following(new, self.chance, b"again")
            records.append(record)
            new = msgspec.structs.replace(new, seq=record.seq, hash=record.hash, at=record.at)
        await self.both("reassert", expected, new, records)

    async def put_chunk(self) -> None:
        chunk = bytes(self.chance.randrange(256) for _ in range(20))
        await self.both("put_chunk", self.chance.choice(self.SNAPSHOTS), self.chance.randrange(3), chunk)

    async def keep_snapshot(self) -> None:
        head = self.model.it.head
        name = self.chance.choice(self.SNAPSHOTS)
        chunks = len(self.model.it.chunks.get(name, ()))
        if self.chance.random() < 0.2:
            chunks += 1
        low, high = (head.snapshot_seq, head.seq) if head else (0, 0)
        seq = max(0, self.chance.randint(low, max(low, high)) + self.chance.choice((0, 0, 0, 1, -1)))
        keep_after = self.chance.randint(0, seq)
        digest = bytes(self.chance.randrange(256) for _ in range(32))
        await self.both("keep_snapshot", *self.owner(), name, seq, seq + 5, digest, digest, chunks, keep_after)

    async def keep_check(self) -> None:
        await self.both("keep_check", *self.owner(), bytes(self.chance.randrange(256) for _ in range(90)))

    async def finalize(self) -> None:
        await self.both("finalize", *self.owner(), self.chance.randrange(1, 4))


SEEN: Counter[str] = Counter()


@pytest.mark.xdist_group("walks")
@pytest.mark.parametrize("seed", range(24))
async def test_the_scripts_keep_the_rules(commands: RedisCommands, server: RedisServer, seed: int) -> None:
    walk = Walk(commands, server, seed)
    await walk.run(60)
    SEEN.update(walk.seen)


@pytest.mark.xdist_group("walks")
def test_the_walks_came_everywhere() -> None:
    if not SEEN:
        pytest.skip("the walks were not run")
    wanted = {f"{name} ok" for name in ("acquire", "append", "renew", "release", "reassert", "put_chunk")}
    wanted |= {f"{name} ok" for name in ("keep_snapshot", "keep_check", "finalize")}
    wanted |= {f"{name} Fenced" for name in ("append", "renew", "release", "reassert", "keep_snapshot", "keep_check")}
    wanted |= {"acquire Held", "acquire TooNew", "finalize Fenced"}
    wanted |= {"keep_snapshot StoreUnavailable", "reassert StoreUnavailable"}
    assert wanted <= SEEN.keys()


# --- single rules ---------------------------------------------------------------------------------------------------


async def owner(commands: RedisCommands) -> Head:
    """A fresh owner's head."""
    stamped = await commands.acquire(LEDGER, claim_by("n1", await commands.lineage()))
    assert stamped.head is not None
    return stamped.head


async def add(commands: RedisCommands, head: Head, payload: bytes = b"x") -> tuple[Head, Record]:
    record = following(head, random.Random(1), payload)
    stamped = await commands.append(LEDGER, head.epoch, head.nonce, record, 10_000_000)
    assert stamped.head is not None
    return stamped.head, record


def test_scripts_and_head_have_the_same_fields(server: RedisServer) -> None:
    from paceline.ledger.redis import scripts

    text = scripts.HEAD.text.decode().split("local FIELDS = {")[1].split("}")[0]
    assert tuple(text.replace("'", "").replace(",", " ").split()) == Head.__struct_fields__


async def test_every_byte_survives(commands: RedisCommands, server: RedisServer) -> None:
    every = bytes(range(256)) * 3
    head = await owner(commands)
    head, record = await add(commands, head, every)
    assert await commands.read(LEDGER, 0, 5) == [record]
    await commands.put_chunk(LEDGER, "s\r\n{}", 0, every)
    await commands.keep_snapshot(
        LEDGER, head.epoch, head.nonce, "s\r\n{}", 1, 1, every[:32], every[32:64], 1, keep_after=0
    )
    stamped = await commands.keep_check(LEDGER, head.epoch, head.nonce, every)
    assert stamped.head is not None
    assert (stamped.head.check, stamped.head.snapshot_hash, stamped.head.snapshot) == (every, every[:32], "s\r\n{}")
    assert await commands.get_chunks(LEDGER, "s\r\n{}", 0, 2) == [every]
    assert await commands.put_meta("k", every) == every
    assert await commands.get_meta("k") == every
    assert all(key.startswith((KEY.encode(), b"{paceline}:")) for key in server.call("KEYS", "*"))


async def test_numbers_are_exact(commands: RedisCommands) -> None:
    most = (1 << 53) - 1
    head = await owner(commands)
    record = Record.sealed(1, 1, most, most, head.hash, b"")
    stamped = await commands.append(LEDGER, 1, head.nonce, record, 1)
    assert stamped.head is not None
    assert stamped.head.at == most
    assert stamped.head.until == stamped.now + 1
    with pytest.raises(ValueError, match="2\\^53"):
        await commands.append(LEDGER, 1, head.nonce, msgspec.structs.replace(record, at=most + 1), 1)


async def test_an_append_is_one_round_trip(commands: RedisCommands, server: RedisServer) -> None:
    head = await owner(commands)
    head, _ = await add(commands, head)
    server.call("CONFIG", "RESETSTAT")
    for _ in range(5):
        head, _ = await add(commands, head)
    stats = server.info("commandstats")
    scripts_own = {"cmdstat_time", "cmdstat_hmget", "cmdstat_xadd", "cmdstat_hset"}
    assert {name for name in stats if name not in scripts_own} == {"cmdstat_evalsha", "cmdstat_config|resetstat"}
    assert stats["cmdstat_evalsha"]["calls"] == 5


async def test_a_part_that_comes_late_does_not_let_a_snapshot_expire(
    commands: RedisCommands, server: RedisServer
) -> None:
    head = await owner(commands)
    await commands.put_chunk(LEDGER, "s1", 0, b"part")
    assert 0 < server.call("TTL", f"{KEY}:snapshot:s1") <= 3_600
    await commands.keep_snapshot(LEDGER, head.epoch, head.nonce, "s1", 0, 0, bytes(32), bytes(32), 1, 0)
    assert server.call("TTL", f"{KEY}:snapshot:s1") == -1
    await commands.put_chunk(LEDGER, "s1", 0, b"late")
    assert server.call("TTL", f"{KEY}:snapshot:s1") == -1
    assert await commands.get_chunks(LEDGER, "s1", 0, 9) == [b"part"]


async def test_a_snapshot_whose_parts_are_lost_does_not_count(commands: RedisCommands, server: RedisServer) -> None:
    head = await owner(commands)
    head, record = await add(commands, head)
    await commands.put_chunk(LEDGER, "s1", 0, b"part")
    server.call("DEL", f"{KEY}:snapshot:s1")
    with pytest.raises(StoreUnavailable, match="write it again"):
        await commands.keep_snapshot(LEDGER, head.epoch, head.nonce, "s1", 1, 1, head.hash, bytes(32), 1, 1)
    assert await commands.read(LEDGER, 0, 9) == [record]


async def test_a_damaged_record_is_found(commands: RedisCommands, server: RedisServer) -> None:
    _, record = await add(commands, await owner(commands))
    server.call("DEL", f"{KEY}:log")
    server.call("XADD", f"{KEY}:log", "1-0", "r", record.pack()[:-1] + b"y")
    with pytest.raises(StoreCorrupt, match="hash"):
        await commands.read(LEDGER, 0, 9)


async def test_a_log_that_is_ahead_is_not_written_over(commands: RedisCommands, server: RedisServer) -> None:
    """By somebody's hand: nothing of these scripts does that. Nothing is written at all."""
    head = await owner(commands)
    server.call("XADD", f"{KEY}:log", "7-0", "r", "foreign")
    with pytest.raises(Exception, match="XADD"):
        await add(commands, head)
    assert (await commands.head(LEDGER)).head == head


async def test_a_foreign_head_is_not_guessed_at(commands: RedisCommands, server: RedisServer) -> None:
    server.call("HSET", f"{KEY}:head", "epoch", "1", "nonce", "x")
    with pytest.raises(StoreCorrupt, match="not a head"):
        await commands.head(LEDGER)


async def test_a_claim_names_the_primary_that_it_reaches(commands: RedisCommands) -> None:
    with pytest.raises(StoreUnavailable, match="claim again"):
        await commands.acquire(LEDGER, claim_by("n1", "another"))
    # Believed by the process as well, but not by the store.
    lineage = await commands.lineage()
    commands._primaries[0].info["run_id"] = "0" * 40
    with pytest.raises(StoreUnavailable, match="claim again"):
        await commands.acquire(LEDGER, claim_by("n1", lineage))
    assert (await commands.head(LEDGER)).head is None
    assert (await commands.acquire(LEDGER, claim_by("n1", await commands.lineage()))).head is not None


async def test_processes_come_and_go(commands: RedisCommands) -> None:
    one = NodeInfo("n1", "n1:7001", "0.1.0", 1, 5, ledgers=2)
    two = NodeInfo("n\0é", "", "0.1.0", 1, 6, ready=False)
    await owner(commands)
    assert (await commands.announce(one, 10_000_000)).nodes == {"n1": one}
    nodes = await commands.announce(two, 30_000)
    assert nodes.nodes == {"n1": one, two.node: two}
    assert nodes.ledgers == (LEDGER,)
    assert nodes.now > 1_600_000_000_000_000
    await asyncio.sleep(0.04)
    assert (await commands.announce(one, 10_000_000)).nodes == {"n1": one}
    assert (await commands.announce(one, 0)).nodes == {}
    assert await commands.ledgers() == [LEDGER]


async def test_the_first_value_counts(commands: RedisCommands) -> None:
    kept = await asyncio.gather(*(commands.put_meta("key", bytes([number])) for number in range(20)))
    assert len(set(kept)) == 1
    assert await commands.get_meta("key") == kept[0]
    assert await commands.get_meta("other") is None


async def test_records_of_a_reassertion_must_fit(commands: RedisCommands) -> None:
    head = await owner(commands)
    record = following(head, random.Random(1))
    for new, records in (
        (head, [record]),
        (msgspec.structs.replace(head, seq=1), []),
        (msgspec.structs.replace(head, seq=2), [record, record]),
    ):
        with pytest.raises(ValueError, match="records"):
            await commands.reassert(LEDGER, head, new, records)


async def test_appends_do_not_queue_behind_snapshots(commands: RedisCommands, server: RedisServer) -> None:
    head = await owner(commands)
    parts = [asyncio.create_task(commands.put_chunk(LEDGER, "big", index, bytes(400_000))) for index in range(60)]
    await asyncio.sleep(0)
    for _ in range(5):
        head, _ = await add(commands, head)
    waiting = sum(not part.done() for part in parts)
    await asyncio.gather(*parts)
    assert waiting > 20
