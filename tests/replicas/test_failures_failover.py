"""The store itself fails over, under load, and loses its last writes: rows of docs/failures.md."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.proofs.recount import Recount
from tests.replicas.checks import judge, read_log, to
from tests.replicas.redis_server import ClusterRedis, RedisServer, SentinelRedis, need_redis
from tests.replicas.scene import scene

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.xdist_group("replicas"),
    pytest.mark.timeout(150),
]

LOST_SECONDS = 0.8
"""Of writes, that the replica never sees: less than the ``replication_lag`` of the servers' configuration."""
REPLICATION: dict[str, Any] = {
    "user": "follower on >follower +psync +replconf +ping",
    "masteruser": "follower",
    "masterauth": "follower",
}
"""Replicas log in as a user of their own, who can be shut out."""


_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def stop_replication(primary: RedisServer) -> None:
    """Replicas see nothing from now on, and cannot come back."""
    primary.call("ACL", "SETUSER", "follower", "off")
    primary.call("CLIENT", "KILL", "TYPE", "replica")


def lost_with(primary: RedisServer, replica: RedisServer) -> list[tuple[int, bytes]]:
    """Kill the primary. The records that its replica never saw."""
    with primary.client() as one, replica.client(single_connection_client=True) as other:
        with contextlib.suppress(redis.ResponseError):
            other.execute_command("READONLY")  # type: ignore[no-untyped-call]  # of a cluster's replica
        seen = read_log(other)
        lost = read_log(one, after=seen[-1][0] if seen else 0)
    primary.kill()
    assert len(lost) > 5, "nothing is lost: nothing is proved"
    return lost


def follows(node: RedisServer, primary: RedisServer) -> bool:
    return int(node.info("replication").get("master_port", 0)) == primary.port


def debits(recount: Recount) -> int:
    """Corrections downwards, of all limits."""
    return -sum(min(0, bucket.adjusted) for bucket in recount.buckets)


def test_sentinel_fails_over_and_loses_writes_while_the_owner_lives(tmp_path: Path) -> None:
    need_redis()
    with (
        SentinelRedis(**REPLICATION) as store,
        scene(tmp_path, store.url, to(store.primary), deadline=30.0, patience=60.0) as on,
    ):
        owner = on.fleet.wait_owner()
        stop_replication(store.primary)
        time.sleep(LOST_SECONDS)
        on.deed()
        lost = lost_with(store.primary, store.replicas[0])
        primary = store.wait_for_failover(store.primary)
        on.flowing(60)
        assert on.fleet.owner() is owner
        on.connect = to(primary)
        records = dict(on.stored().records)
        assert all(records.get(number) == record for number, record in lost), "put back as they were"
        judgement = on.finish()
    assert not judgement.faults


@pytest.mark.parametrize("dead", ["owner", "all servers"])
def test_sentinel_fails_over_and_servers_die_with_the_primary(tmp_path: Path, dead: str) -> None:
    """The double fault: of what was acknowledged since the replica's last write that is lost which nobody alive knows.

    The heir of a dead owner has followed the journal, and puts back what it has read; with all servers dead everything
    is lost that was not replicated, and no more than that.
    """
    need_redis()
    with (
        SentinelRedis(**REPLICATION) as store,
        scene(tmp_path, store.url, to(store.primary), deadline=30.0, patience=60.0) as on,
    ):
        victims = [on.fleet.wait_owner()] if dead == "owner" else on.fleet.servers
        since = on.deed()
        stop_replication(store.primary)
        time.sleep(LOST_SECONDS)
        store.primary.kill()
        for server in victims:
            server.kill()
        died = on.deed()
        primary = store.wait_for_failover(store.primary)
        if dead != "owner":
            for server in victims:
                server.spawn()
        took = on.flowing(60, 30)
        on.connect = to(primary)
        logs = on.clients.stop()
        judgement = judge(logs, on.stored())
        assert not on.fleet.faults()
    # What is lost was acknowledged while nothing was replicated; besides that nothing is wrong.
    recent = {entry.id for entry in judgement.entries if since - 200_000 < entry.answered <= died + 100_000}
    assert not [fault for fault in judgement.faults if not recent & set(_ID.findall(fault))]
    known = {key.partition("/")[2] for key in judgement.recount.calls}
    missing = {entry.id for entry in judgement.entries if entry.kind == "grant" and entry.id not in known}
    assert missing <= recent
    assert len(missing) < len(recent) / 4 if dead == "owner" else missing
    # As much is debited as refills in that time; whoever was granted more than that was granted it out of the burst.
    assert debits(judgement.recount) > 0
    print(
        f"{dead} dead: lost {len(missing)} of {len(recent)} calls of {(died - since) / 1e6:.1f} s; debited "
        f"{debits(judgement.recount):,} tokens; 60 pairs {took:.1f} s after the failover"
    )


def test_a_cluster_node_dies_while_the_owner_lives(tmp_path: Path) -> None:
    need_redis()
    with ClusterRedis(**REPLICATION) as store:

        def connect() -> redis.RedisCluster:
            port = next(node.port for node in store.nodes if node.running)
            return redis.RedisCluster("127.0.0.1", port, socket_timeout=5)

        with scene(tmp_path, store.url, connect, deadline=30.0, patience=60.0) as on:
            old = next(node for node in store.nodes[:3] if list(node.client().__enter__().scan_iter(_type="STREAM")))
            stop_replication(old)
            time.sleep(LOST_SECONDS)
            on.deed()
            lost = lost_with(old, next(node for node in store.nodes if follows(node, old)))
            on.flowing(60, 30)
            records = dict(on.stored().records)
            assert all(records.get(number) == record for number, record in lost), "put back as they were"
            judgement = on.finish()
    assert not judgement.faults
