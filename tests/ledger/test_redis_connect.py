"""Connecting to one real server: its settings, users, TLS, and what its refusals become."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.ledger.commands import NodeInfo
from paceline.ledger.journal import Record, StoreError, StoreFull, StoreUnavailable, StoreURLError, genesis
from paceline.ledger.lease import Claim, Head
from paceline.ledger.redis import Finding, RedisStore, checks
from paceline.ledger.redis.client import Primary
from paceline.ledger.store import open_store
from tests.ports import free_port, nobody
from tests.replicas.redis_server import RedisServer, ReplicatedRedis, need_redis, until

pytestmark = [pytest.mark.redis, pytest.mark.xdist_group("redis-connect")]

NODE = NodeInfo("n1", "n1:7001", "0.1.0", 1, 5)
LEAST_RIGHTS = (
    "~{paceline:* ~{paceline}:* +evalsha +eval +info +time +hmget +hget +hgetall +hset +hsetnx +hdel +hlen "
    "+xadd +xrange +xrevrange +xtrim +del +unlink +persist +expire +sadd +smembers +zadd +zrem +zrangebyscore"
)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    need_redis()
    with RedisServer(appendonly="yes") as server:
        yield server


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisStore]:
    store = open_store(url)
    assert isinstance(store, RedisStore)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def owned(store: RedisStore, ledger: str) -> Head:
    claim = Claim("n1", "", os.urandom(16), 10_000_000, await store.commands.lineage(), genesis(ledger), 1, 1)
    stamped = await store.commands.acquire(ledger, claim)
    assert stamped.head is not None
    return stamped.head


async def append(store: RedisStore, ledger: str, head: Head, payload: bytes = b"x") -> Head:
    record = Record.sealed(head.seq + 1, head.epoch, 1, 1, head.hash, payload)
    stamped = await store.commands.append(ledger, head.epoch, head.nonce, record, 10_000_000)
    assert stamped.head is not None
    return stamped.head


async def everything(store: RedisStore) -> None:
    """Every command, each of which succeeds."""
    commands = store.commands
    head = await owned(store, "all")
    head = await append(store, "all", head)
    await commands.renew("all", head.epoch, head.nonce, head.seq, head.hash, head.lineage, 10_000_000)
    for name in ("s1", "s2"):
        await commands.put_chunk("all", name, 0, b"part")
        stamped = await commands.keep_snapshot(
            "all", head.epoch, head.nonce, name, 1, 1, head.hash, bytes(32), 1, keep_after=1
        )
        assert stamped.head is not None
        head = stamped.head
    assert await commands.get_chunks("all", "s2", 0, 1) == [b"part"]
    assert await commands.read("all", 0, 1) == []
    await commands.keep_check("all", head.epoch, head.nonce, b"check")
    await commands.finalize("all", head.epoch, head.nonce, 1)
    record = Record.sealed(head.seq + 1, head.epoch, 1, 1, head.hash, b"")
    new = Head(**{name: getattr(head, name) for name in head.__struct_fields__} | {"seq": 2, "hash": record.hash})
    await commands.reassert("all", head, new, [record])
    await commands.put_chunk("all", "s3", 0, b"part")
    again = Head(**{name: getattr(new, name) for name in new.__struct_fields__} | {"snapshot": "s3"})
    await commands.reassert("all", new, again, [])
    await commands.release("all", head.epoch, head.nonce, 2, record.hash, "", 0)
    assert (await commands.head("all")).head is not None
    assert "n1" in (await commands.announce(NODE, 10_000_000)).nodes
    await commands.announce(NODE, 0)
    await commands.put_meta("key", b"value")
    assert await commands.get_meta("key") == b"value"
    assert "all" in await commands.ledgers()


def levels(findings: list[Finding], part: str) -> list[str]:
    return [finding.level for finding in findings if part in finding.text]


# --- settings -------------------------------------------------------------------------------------------------------


async def test_every_command_works_here(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await everything(store)
        assert store.name == f"redis 127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    ("settings", "level", "says"),
    [
        ({}, "note", "forgets about a second"),
        ({"appendfsync": "no"}, "warn", "about half a minute"),
        ({"appendonly": "no", "save": ""}, "warn", "empty books"),
        ({"appendonly": "no", "save": "60 1"}, "warn", "since|after the last dump"),
    ],
)
async def test_what_a_restart_forgets_is_said(
    server: RedisServer, settings: dict[str, str], level: str, says: str
) -> None:
    usual = {"appendonly": "yes", "appendfsync": "everysec", "save": ""}
    server.set(**(usual | settings))
    try:
        async with opened(server.url) as store:
            (finding,) = store.checks
    finally:
        server.set(**usual)
    assert finding.level == level
    assert any(part in finding.text for part in says.split("|"))


async def test_a_server_that_keeps_everything_has_nothing_to_say(server: RedisServer) -> None:
    server.set(appendfsync="always")
    try:
        async with opened(server.url) as store:
            assert store.checks == []
    finally:
        server.set(appendfsync="everysec")


async def test_a_server_that_evicts_is_refused(server: RedisServer) -> None:
    server.set(maxmemory_policy="allkeys-lru")
    try:
        with pytest.raises(StoreError, match=r"allkeys-lru.*set maxmemory-policy noeviction"):
            async with opened(server.url):
                pass
    finally:
        server.set(maxmemory_policy="noeviction")


async def test_settings_that_are_not_told_are_a_warning(server: RedisServer) -> None:
    server.call("ACL", "SETUSER", "blind", "on", ">p", "~*", "+@all", "-config")
    async with opened(f"redis://blind:p@127.0.0.1:{server.port}") as store:
        assert levels(store.checks, "CONFIG GET") == ["warn"]


@pytest.mark.parametrize(
    ("info", "level", "says"),
    [
        ({"redis_version": "6.0.16"}, "refuse", "is version 6.0.16"),
        ({"redis_version": "6.2.0"}, None, "version"),
        ({"redis_version": "10.0.0"}, None, "version"),
        ({"redis_version": ""}, "refuse", "is version unknown"),
        ({"role": "slave"}, "refuse", "is a replica"),
        ({"maxmemory_policy": ""}, "warn", "make sure that it is noeviction"),
    ],
)
def test_what_info_tells_is_judged(info: dict[str, Any], level: str | None, says: str) -> None:
    usual = {"redis_version": "7.0.15", "role": "master", "maxmemory_policy": "noeviction"}
    findings = checks._from_info(Primary("here", usual | info), "here")
    assert levels(findings, says) == ([level] if level else [])


async def test_replicas_that_nobody_waits_for_are_a_warning() -> None:
    need_redis()
    with ReplicatedRedis() as group:
        async with opened(group.url) as store:
            assert levels(store.checks, "min-replicas-to-write 0") == ["warn"]
        with pytest.raises(StoreError, match="is a replica"):
            async with opened(group.replicas[0].url):
                pass
        group.primary.set(min_replicas_to_write=1)
        until(lambda: group.primary.info("replication")["min_slaves_good_slaves"] == 1, "the replica counts")
        async with opened(group.url) as store:
            assert levels(store.checks, "min-replicas-to-write") == []
            head = await owned(store, "ledger")
            group.replicas[0].kill()
            until(lambda: group.primary.info("replication")["connected_slaves"] == 0, "the replica is missed")
            with pytest.raises(StoreFull, match="fewer replicas follow"):
                await append(store, "ledger", head)


# --- users ----------------------------------------------------------------------------------------------------------


async def test_a_user_with_the_least_rights(server: RedisServer) -> None:
    """As in docs/redis.md."""
    server.call("ACL", "SETUSER", "paceline", "reset", "on", ">secret", *LEAST_RIGHTS.split())
    for number in range(2):
        if number:
            server.call("SCRIPT", "FLUSH")
        async with opened(f"redis://paceline:secret@127.0.0.1:{server.port}") as store:
            server.call("DEL", "{paceline:all}:head")
            await everything(store)
    documented = Path(__file__).parents[2].joinpath("docs/redis.md").read_text()
    assert " ".join(LEAST_RIGHTS.split()) in " ".join(documented.replace("\\\n", " ").split())


@pytest.mark.parametrize("right", [right for right in LEAST_RIGHTS.split() if right != "+eval"])
async def test_no_right_is_needless(server: RedisServer, right: str) -> None:
    rights = [other for other in LEAST_RIGHTS.split() if other != right]
    server.call("ACL", "SETUSER", "lesser", "reset", "on", ">secret", *rights)
    server.call("DEL", "{paceline:all}:head")
    with pytest.raises(StoreError, match=r"does not let this user|failed to run"):
        async with opened(f"redis://lesser:secret@127.0.0.1:{server.port}") as store:
            # Not otherwise met: the log is ahead of the head.
            await everything(store)


async def test_wrong_passwords_are_not_shown(server: RedisServer, tmp_path: Path) -> None:
    server.call("ACL", "SETUSER", "guarded", "on", ">right", "~*", "+@all")
    with pytest.raises(StoreError, match="refuses the user or password") as caught:
        async with opened(f"redis://guarded:hunter2@127.0.0.1:{server.port}"):
            pass
    assert "hunter2" not in str(caught.value)
    file = tmp_path / "password"
    file.write_text("right\n")
    async with opened(f"redis://guarded@127.0.0.1:{server.port}?password_file={file}") as store:
        assert await store.ledgers() is not None


async def test_prefixes_and_databases_keep_fleets_apart(server: RedisServer) -> None:
    stores = ("", "/1", "?prefix=other", "/1?prefix=other")
    async with contextlib.AsyncExitStack() as stack:
        opens = [await stack.enter_async_context(opened(server.url + end)) for end in stores]
        for number, store in enumerate(opens):
            await store.put_meta("apart", bytes([number]))
        assert [await store.get_meta("apart") for store in opens] == [b"\0", b"\1", b"\2", b"\3"]


# --- TLS, sockets ---------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str, sign: str | None, subject: str = "") -> None:
    """A key and a certificate, by the authority ``sign``, or one itself."""
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}"]
    if sign:
        make += ["-CA", f"{sign}.pem", "-CAkey", f"{sign}.key", "-addext", f"subjectAltName={subject}"]
        make += ["-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(make, cwd=folder, check=True, capture_output=True, timeout=20)


async def test_tls(tmp_path: Path) -> None:
    need_redis()
    certificate(tmp_path, "ca", None)
    certificate(tmp_path, "server", "ca", "IP:127.0.0.1")
    certificate(tmp_path, "client", "ca", "DNS:client")
    certificate(tmp_path, "other", None)
    settings: dict[str, Any] = {
        "tls_cert_file": tmp_path / "server.pem",
        "tls_key_file": tmp_path / "server.key",
        "tls_ca_cert_file": tmp_path / "ca.pem",
        "tls_auth_clients": "yes",
    }
    port = free_port()
    with RedisServer(0, tls_port=port, **settings):
        both = f"cert={tmp_path}/client.pem&key={tmp_path}/client.key"
        async with opened(f"rediss://127.0.0.1:{port}?ca={tmp_path}/ca.pem&{both}") as store:
            await everything(store)
        for url, says in (
            (f"rediss://127.0.0.1:{port}?ca={tmp_path}/other.pem&{both}", "certificate is not trusted"),
            (f"rediss://127.0.0.1:{port}?{both}", "certificate is not trusted"),
            (f"rediss://localhost:{port}?ca={tmp_path}/ca.pem&{both}", "certificate is not trusted"),
            (f"rediss://127.0.0.1:{port}?ca={tmp_path}/none.pem&{both}", "cannot use the files for TLS"),
            (f"rediss://127.0.0.1:{port}?ca={tmp_path}/ca.key&{both}", "cannot use the files for TLS"),
            (f"rediss://127.0.0.1:{port}?ca={tmp_path}/ca.pem", "check the options cert and key|cannot be reached"),
            (f"redis://127.0.0.1:{port}", "cannot be reached"),
        ):
            with pytest.raises(StoreError, match=says):
                async with opened(url):
                    pass


async def test_a_unix_socket(tmp_path: Path) -> None:
    need_redis()
    with RedisServer(unixsocket=tmp_path / "s") as server:
        async with opened(f"unix://{tmp_path}/s?db=2") as store:
            await everything(store)
        assert server.info("keyspace").keys() == {"db2"}
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        async with opened(f"unix://{tmp_path}/s"):
            pass


# --- refusals and silence -------------------------------------------------------------------------------------------


async def test_out_of_memory_is_full_and_nothing_is_half_written(server: RedisServer) -> None:
    async with opened(server.url) as store:
        head = await append(store, "full", await owned(store, "full"))
        server.set(maxmemory="1mb")
        try:
            for attempt in (
                lambda: append(store, "full", head),
                lambda: store.commands.put_chunk("full", "s1", 0, b"part"),
                lambda: store.commands.announce(NODE, 10_000_000),
                lambda: owned(store, "another"),
            ):
                with pytest.raises(StoreFull, match="out of memory: raise maxmemory"):
                    await attempt()
            assert (await store.commands.head("full")).head == head
            assert len(await store.commands.read("full", 0, 9)) == 1
        finally:
            server.set(maxmemory="0")
        assert (await append(store, "full", head)).seq == 2


async def test_a_disk_that_cannot_be_written_is_full(tmp_path: Path) -> None:
    need_redis()
    with RedisServer(save="3600 1", stop_writes_on_bgsave_error="yes") as server:
        async with opened(server.url) as store:
            head = await owned(store, "ledger")
            # The dump goes to a name that is a folder.
            (server.folder / "dump.rdb").mkdir()
            server.call("BGSAVE")
            until(lambda: server.info("persistence")["rdb_last_bgsave_status"] == "err", "the dump fails", 10)
            with pytest.raises(StoreFull, match="cannot write to its disk"):
                await append(store, "ledger", head)


async def test_a_server_that_becomes_a_replica_is_read_only() -> None:
    need_redis()
    with RedisServer() as other, RedisServer() as server:
        async with opened(server.url) as store:
            head = await owned(store, "ledger")
            lineage = await store.commands.lineage()
            server.call("REPLICAOF", "127.0.0.1", other.port)
            with pytest.raises(StoreFull, match="read-only replica: name the primary"):
                await append(store, "ledger", head)
            server.call("REPLICAOF", "NO", "ONE")
            assert await store.commands.lineage() != lineage


async def test_a_server_that_is_stuck_does_not_hang_anybody(server: RedisServer) -> None:
    async with opened(server.url + "?timeout_ms=300") as store:
        head = await owned(store, "stuck")
        server.pause()
        try:
            begun = time.monotonic()
            # More than there are lanes: those that wait for one have the same budget.
            found = await asyncio.gather(
                *(store.commands.head("stuck") for _ in range(120)),
                append(store, "stuck", head),
                return_exceptions=True,
            )
            assert time.monotonic() - begun < 1.5
            assert all(isinstance(answer, StoreUnavailable) for answer in found)
            assert "within 0.3 s: it may have been carried out" in str(found[-1])
        finally:
            server.resume()
        # The answer that came too late belongs to nobody.
        assert (await store.commands.head("stuck")).head is not None
        # The append above was carried out later, or never: both are fine, and the same record is accepted.
        assert (await append(store, "stuck", head)).seq == 1


async def test_a_server_that_restarts_is_another_primary() -> None:
    need_redis()
    with RedisServer(appendonly="yes", appendfsync="always") as server:
        async with opened(server.url) as store:
            head = await append(store, "ledger", await owned(store, "ledger"))
            lineage = await store.commands.lineage()
            assert await store.commands.lineage() == lineage
            server.kill()
            with pytest.raises(StoreUnavailable, match="cannot be reached"):
                await store.commands.head("ledger")
            with pytest.raises(StoreUnavailable, match="cannot be reached"):
                await store.commands.lineage()
            server.start()
            assert await store.commands.lineage() != lineage
            assert (await store.commands.head("ledger")).head == head
            # An announcement finds it out as well, without an error before.
            lineage = await store.commands.lineage()
            server.kill()
            server.start()
            await asyncio.sleep(0.05)  # the end of the old connections is read meanwhile
            await store.commands.announce(NODE, 1_000_000)
            assert await store.commands.lineage() != lineage


async def test_nobody_there(server: RedisServer) -> None:
    with nobody() as one, nobody() as two:
        for url in (f"redis://{one}", f"redis+sentinel://{one},{two}/svc", f"redis+cluster://{one},{two}"):
            begun = time.monotonic()
            with pytest.raises(StoreUnavailable):
                async with opened(url):
                    pass
            assert time.monotonic() - begun < 2.5
    with pytest.raises(StoreError, match="cluster support disabled"):
        async with opened(f"redis+cluster://127.0.0.1:{server.port}"):
            pass
    with pytest.raises(StoreError, match="refuses the user or password"):
        async with opened(f"redis+cluster://nobody:hunter2@127.0.0.1:{server.port}"):
            pass
    with pytest.raises(StoreURLError):
        open_store("redis://")


async def test_a_store_opens_again_after_it_was_closed(server: RedisServer) -> None:
    store = open_store(server.url)
    assert isinstance(store, RedisStore)
    for _ in range(2):
        await store.open()
        assert await store.ledgers() is not None
        await store.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.ledgers()
