"""Sentinel and Cluster: the store goes on with another primary, and says that it is another."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest

from paceline.ledger.commands import NodeInfo, Stamped
from paceline.ledger.journal import StoreError, StoreUnavailable
from paceline.ledger.lease import Head
from paceline.ledger.redis import RedisStore
from tests.ledger.test_redis_connect import LEAST_RIGHTS, append, everything, levels, opened, owned
from tests.replicas.redis_server import ClusterRedis, RedisServer, SentinelRedis, need_redis, until

pytestmark = [pytest.mark.redis, pytest.mark.xdist_group("redis-failover")]

NODE = NodeInfo("n1", "n1:7001", "0.1.0", 1, 5)
T = TypeVar("T")
G = TypeVar("G", SentinelRedis, ClusterRedis)


@contextlib.asynccontextmanager
async def running(group: G) -> AsyncIterator[G]:
    """The servers, started and ended beside the loop."""
    await asyncio.to_thread(group.__enter__)
    try:
        yield group
    finally:
        await asyncio.to_thread(group.__exit__, None, None, None)


async def sooner_or_later(attempt: Callable[[], Awaitable[T]], seconds: float = 12) -> T:
    """The first answer; until then only that the store is away, each time within the budget."""
    deadline = time.monotonic() + seconds
    while True:
        begun = time.monotonic()
        try:
            return await attempt()
        except StoreUnavailable:
            assert time.monotonic() - begun < 3
            assert time.monotonic() < deadline, f"not within {seconds} s"
            await asyncio.sleep(0.05)


async def goes_on(store: RedisStore, ledger: str, head: Head, lineage: str) -> None:
    """The owner's next record is accepted by another primary, which it knows to be another."""
    stamped: Stamped = await sooner_or_later(lambda: store.commands.head(ledger))
    assert stamped.head == head
    assert await sooner_or_later(store.commands.lineage) != lineage
    head = await sooner_or_later(lambda: append(store, ledger, head))
    head = await append(store, ledger, head)
    lineage = await store.commands.lineage()
    stamped = await store.commands.renew(ledger, head.epoch, head.nonce, head.seq, head.hash, lineage, 10_000_000)
    assert stamped.head is not None
    assert stamped.head.lineage == lineage
    assert [record.seq for record in await store.commands.read(ledger, 0, 9)] == list(range(1, head.seq + 1))


async def replicated(server: RedisServer) -> None:
    """Wait until the replicas have all that this primary has."""

    def done() -> bool:
        info = server.info("replication")
        offsets = [info[name]["offset"] for name in info if name.startswith("slave")]
        return bool(offsets) and all(offset >= info["master_repl_offset"] for offset in offsets)

    await asyncio.to_thread(until, done, "the replicas have caught up", 10)


async def test_sentinel(monkeypatch: pytest.MonkeyPatch) -> None:
    need_redis()
    async with running(SentinelRedis()) as group:
        async with opened(group.url + "?timeout_ms=1000") as store:
            assert levels(store.checks, "min-replicas-to-write 0") == ["warn"]
            await everything(store)
            head = await append(store, "ledger", await owned(store, "ledger"))
            lineage = await store.commands.lineage()
            await replicated(group.primary)

            old = group.primary
            old.kill()
            with pytest.raises(StoreUnavailable):
                await append(store, "ledger", head)
            await goes_on(store, "ledger", head, lineage)

            # A sentinel that is away is passed over, once the others know as much.
            await asyncio.to_thread(until, lambda: group.agreed() not in (None, old), "the sentinels agree")
            group.sentinels[0].pause()
            async with opened(group.url) as other:
                assert (await other.commands.head("ledger")).head is not None
                assert await other.commands.lineage() == await store.commands.lineage()
            group.sentinels[0].resume()

        # Users of their own, with the rights in docs/redis.md.
        monkeypatch.setenv("SENTINEL_PASSWORD", "secret")
        for sentinel in group.sentinels:
            sentinel.call(
                *("ACL", "SETUSER", "asker", "reset", "on", ">secret"),
                *("+sentinel|master", "+sentinel|get-master-addr-by-name"),
            )
        user = f"{group.url}?sentinel_user=asker&sentinel_password_env=SENTINEL_PASSWORD"
        async with opened(user) as store:
            assert (await store.commands.head("ledger")).head is not None
        monkeypatch.setenv("SENTINEL_PASSWORD", "hunter2")
        with pytest.raises(StoreError, match="refuses the user or password"):
            async with opened(user):
                pass

        wrong = group.url.replace("/paceline", "/elsewhere")
        with pytest.raises(StoreUnavailable, match="no sentinel names a primary for 'elsewhere'"):
            async with opened(wrong):
                pass


async def test_sentinel_primary_that_is_stuck() -> None:
    """Its connections stay open; what is written goes to the new primary all the same, and soon."""
    need_redis()
    async with running(SentinelRedis()) as group, opened(group.url + "?timeout_ms=500") as store:
        head = await append(store, "ledger", await owned(store, "ledger"))
        lineage = await store.commands.lineage()
        await replicated(group.primary)
        old = group.primary
        old.pause()
        new = await asyncio.to_thread(group.wait_for_failover, old)
        await goes_on(store, "ledger", head, lineage)
        assert new.call("EXISTS", "{paceline:ledger}:head")

        # It comes back, and takes itself for the primary until the sentinels demote it. Nothing goes there any more.
        old.resume()
        assert (await store.commands.head("ledger")).head is not None
        await store.put_meta("key", b"value")
        assert new.call("HGET", "{paceline}:meta", "key") == b"value"


async def test_sentinel_demotes_under_a_living_connection() -> None:
    """A write that a former primary refuses is sent to the new one, at once."""
    need_redis()
    async with running(SentinelRedis(down_after_ms=2_000)) as group, opened(group.url) as store:
        head = await append(store, "ledger", await owned(store, "ledger"))
        await replicated(group.primary)
        old = group.primary
        group.sentinels[0].call("SENTINEL", "FAILOVER", group.service)
        new = await asyncio.to_thread(group.wait_for_failover, old)
        # What the sentinels do a while later.
        old.call("REPLICAOF", "127.0.0.1", new.port)
        assert (await append(store, "ledger", head)).seq == 2
        assert new.call("HGET", "{paceline:ledger}:head", "seq") == b"2"


async def test_sentinel_has_another_primary_while_the_old_one_lives() -> None:
    """Connections to the old one work for seconds, and what they write would be lost: announcing finds it out."""
    need_redis()
    async with running(SentinelRedis(down_after_ms=2_000)) as group, opened(group.url) as store:
        head = await append(store, "ledger", await owned(store, "ledger"))
        lineage = await store.commands.lineage()
        await replicated(group.primary)
        old = group.primary
        group.sentinels[0].call("SENTINEL", "FAILOVER", group.service)
        new = await asyncio.to_thread(group.wait_for_failover, old)
        assert old.info("replication")["role"] == "master"
        for _ in range(5):  # a busy machine's sentinels may answer late
            await store.commands.announce(NODE, 1_000_000)
        assert await store.commands.lineage() != lineage
        assert (await append(store, "ledger", head)).seq == 2
        assert new.call("HGET", "{paceline:ledger}:head", "seq") == b"2"


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_cluster(how: str) -> None:
    need_redis()
    async with running(ClusterRedis(replicas=1)) as group:
        # One ledger on the node that dies, which alone has a replica; one elsewhere.
        names = [f"ledger-{number}" for number in range(50)]
        dying = next(name for name in names if group.owner(f"{{paceline:{name}}}:head") is group.nodes[0])
        living = next(name for name in names if group.owner(f"{{paceline:{name}}}:head") is group.nodes[1])
        async with opened(group.url + "?timeout_ms=1000") as store:
            assert len(levels(store.checks, "min-replicas-to-write 0")) == 3
            for node in group.nodes:
                rights = (*LEAST_RIGHTS.split(), "+cluster|slots", "+command", "+asking", "+config|get")
                node.call("ACL", "SETUSER", "paceline", "reset", "on", ">secret", *rights)
            async with opened(group.url.replace("://", "://paceline:secret@")) as other_store:
                await everything(other_store)
            head = await append(store, dying, await owned(store, dying))
            other = await append(store, living, await owned(store, living))
            assert store.commands._lineage == await store.commands.lineage()
            lineage = await store.commands.lineage()
            assert {dying, living} <= set(await store.ledgers())
            await replicated(group.nodes[0])

            getattr(group.nodes[0], how)()
            with pytest.raises(StoreUnavailable):
                await append(store, dying, head)
            await asyncio.to_thread(group.wait_for_failover, group.nodes[0], f"{{paceline:{dying}}}:head")
            await goes_on(store, dying, head, lineage)
            other = await sooner_or_later(lambda: append(store, living, other))
            assert other.seq == 2
            assert (await sooner_or_later(lambda: owned(store, "new"))).epoch == 1


async def test_cluster_that_moves_slots() -> None:
    """A slot that goes to another node: the command follows it, and the claim names the node that it reaches."""
    need_redis()
    async with running(ClusterRedis(2, 0)) as group:
        key = "{paceline:ledger}:head"
        async with opened(group.url) as store:
            head = await append(store, "ledger", await owned(store, "ledger"))
            slot = int(group.nodes[0].call("CLUSTER", "KEYSLOT", key))
            old = group.owner(key)
            (new,) = (node for node in group.nodes if node is not old)
            ids = {node: node.call("CLUSTER", "MYID").decode() for node in group.nodes}
            new.call("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[old])
            old.call("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[new])
            keys = old.call("CLUSTER", "GETKEYSINSLOT", slot, 100)
            old.call("MIGRATE", "127.0.0.1", new.port, "", 0, 2_000, "KEYS", *keys)
            for node in (new, old):
                node.call("CLUSTER", "SETSLOT", slot, "NODE", ids[new])
            head = await append(store, "ledger", head)
            assert new.call("HGET", key, "seq") == b"2"
            assert (await store.commands.head("ledger")).head == head


async def test_cluster_without_one_of_its_nodes() -> None:
    """Its ledgers are away, for good; those of the other nodes are not."""
    need_redis()
    async with running(ClusterRedis(3, 0, cluster_require_full_coverage="no")) as group:
        names = [f"ledger-{number}" for number in range(50)]
        # The node of the store-wide keys stays.
        shared = group.owner("{paceline}:nodes")
        living, dying = (
            next(name for name in names if (group.owner(f"{{paceline:{name}}}:head") is shared) == same)
            for same in (True, False)
        )
        async with opened(group.url + "?timeout_ms=1000") as store:
            head = await append(store, living, await owned(store, living))
            gone = await append(store, dying, await owned(store, dying))
            group.owner(f"{{paceline:{dying}}}:head").kill()
            with pytest.raises(StoreUnavailable):
                await append(store, dying, gone)
            head = await sooner_or_later(lambda: append(store, living, head))
            nodes = await sooner_or_later(lambda: store.commands.announce(NODE, 10_000_000))
            assert set(nodes.nodes) == {"n1"}
            assert (await sooner_or_later(lambda: owned_anew(store, living, head))).epoch == head.epoch + 1
            with pytest.raises(StoreUnavailable):
                await append(store, dying, gone)


async def owned_anew(store: RedisStore, ledger: str, head: Head) -> Head:
    await store.commands.release(ledger, head.epoch, head.nonce, head.seq, head.hash, "", 0)
    return await owned(store, ledger)
