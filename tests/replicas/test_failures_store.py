"""Redis is slow, away, empty, full, read-only or cut off, under load: rows of docs/failures.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.replicas.checks import percentile, quiet_median, to
from tests.replicas.redis_server import RedisServer, need_redis
from tests.replicas.scene import Scene, scene
from tests.replicas.toxiproxy import Direction, Proxy, Toxiproxy, toxiproxy

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.xdist_group("replicas-store"),
    pytest.mark.timeout(400),
]

AWAY_SECONDS = 5.0
"""So long do calls wait for a ledger that is away before they are told so: the default of ``away``."""
BACK_SECONDS = 12.0
"""Until calls are answered again after the store's return, beside other tests."""
NOISE_SECONDS = 2.0


@pytest.fixture(scope="module")
def faults() -> Iterator[Toxiproxy]:
    need_redis()
    with toxiproxy() as process:
        yield process


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    need_redis()
    with RedisServer(appendonly="yes", appendfsync="always") as server:
        yield server


def proxies(faults: Toxiproxy, server: RedisServer, name: str, count: int = 3) -> list[Proxy]:
    """One for each server of a fleet."""
    return [faults.proxy(f"{name}-{number}", f"127.0.0.1:{server.port}") for number in range(count)]


def through(proxies: list[Proxy]) -> list[str]:
    return [f"redis://{proxy.address}" for proxy in proxies]


def told_in_time(on: Scene, since: int) -> None:
    """Callers are told within ``away`` that nobody decides, instead of waiting for ever."""
    before = on.away()
    on.wait(lambda: on.away() > before, "callers are told that the ledger is away", AWAY_SECONDS + NOISE_SECONDS + 3)
    assert time.monotonic_ns() // 1_000 - since < (AWAY_SECONDS + NOISE_SECONDS + 3) * 1e6


def test_slow(tmp_path: Path, redis_server: RedisServer, faults: Toxiproxy) -> None:
    between = proxies(faults, redis_server, "slow")
    with scene(tmp_path, through(between), to(redis_server)) as on:
        epoch = on.fleet.epoch()
        slow = on.deed()
        for proxy in between:
            proxy.slow(200)
        on.flowing(200)
        for proxy in between:
            proxy.heal()
        healed = on.deed()
        on.flowing(60)
        assert on.fleet.epoch() == epoch, "a slow store is no reason to change the owner"
        judgement = on.finish()
    assert not judgement.faults
    waits = [each.answered - each.asked for each in judgement.entries if slow + 300_000 < each.asked < healed - 500_000]
    assert 200_000 <= percentile(waits, 50) < 700_000
    assert quiet_median(judgement.entries, on.deeds, margin=3_000_000) < 200_000


@pytest.mark.parametrize("direction", ["upstream", "downstream"])
def test_owner_cut_off_one_way(
    tmp_path: Path, redis_server: RedisServer, faults: Toxiproxy, direction: Direction
) -> None:
    between = proxies(faults, redis_server, direction)
    with scene(tmp_path, through(between), to(redis_server), patience=1.0) as on:
        owner = on.fleet.wait_owner()
        on.deed()
        between[owner.number].cut(direction)
        on.wait(lambda: on.fleet.owner() not in (owner, None), "somebody else takes over")
        on.flowing(60)
        print(f"cut {direction}: another owner, and 60 pairs, after {(on.deed() - on.deeds[0]) / 1e6:.1f} s")
        between[owner.number].heal()
        on.flowing(60)
        on.wait(owner.healthy, "it serves again")
        judgement = on.finish()
    assert not judgement.faults
    assert len(judgement.recount.epochs) >= 2


def gone(on: Scene, go: Callable[[], object], back: Callable[[], object], seconds: float) -> None:
    """The store goes for so long."""
    away = on.deed()
    go()
    told_in_time(on, away)
    told = (on.deed() - away) / 1e6
    time.sleep(max(0.0, seconds - (on.deed() - away) / 1e6))
    back()
    on.deed()
    took = on.flowing(60, BACK_SECONDS + NOISE_SECONDS)
    print(f"told to come again after {told:.1f} s; 60 pairs {took:.1f} s after the return")


def test_gone_for_20_seconds(tmp_path: Path, redis_server: RedisServer) -> None:
    with scene(tmp_path, redis_server.url, to(redis_server), deadline=40.0, patience=60.0) as on:
        gone(on, redis_server.kill, redis_server.start, 20)
        judgement = on.finish()
    assert not judgement.faults


def test_black_hole(tmp_path: Path, redis_server: RedisServer, faults: Toxiproxy) -> None:
    between = proxies(faults, redis_server, "hole")

    def go() -> None:
        for proxy in between:
            proxy.black_hole()

    def back() -> None:
        for proxy in between:
            proxy.heal()

    with scene(tmp_path, through(between), to(redis_server), deadline=40.0, patience=60.0) as on:
        gone(on, go, back, 8)
        judgement = on.finish()
    assert not judgement.faults


def test_restarted_empty(tmp_path: Path) -> None:
    need_redis()
    with (
        RedisServer() as server,
        scene(tmp_path, server.url, to(server), deadline=30.0, patience=60.0) as on,
    ):
        on.deed()
        server.kill()
        server.start()
        took = on.flowing(60, BACK_SECONDS + NOISE_SECONDS)
        print(f"60 pairs {took:.1f} s after the return")
        entries = on.stop_and_read()
        # The journal begins with a snapshot of the owner's books, which knew everything that was acknowledged.
        assert not on.ask_again(entries)
        assert not on.fleet.faults()
        assert not [entry for entry in entries if entry.kind == "failed"]


def test_restarted_empty_and_its_owner_dead(tmp_path: Path) -> None:
    """The store and the owner are lost together: the heir has what it has followed. The fleet goes on."""
    need_redis()
    with (
        RedisServer() as server,
        scene(tmp_path, server.url, to(server), deadline=30.0, patience=60.0) as on,
    ):
        owner = on.fleet.wait_owner()
        on.deed()
        owner.kill()
        server.kill()
        server.start()
        took = on.flowing(60, BACK_SECONDS + NOISE_SECONDS)
        print(f"60 pairs {took:.1f} s after the return")
        entries = on.stop_and_read()
        assert not on.fleet.faults()
        assert not [entry for entry in entries if entry.kind == "failed"]


def full(server: RedisServer) -> None:
    server.set(maxmemory="1mb")


def read_only(server: RedisServer) -> None:
    server.set(min_replicas_to_write=1)


def replica(server: RedisServer) -> None:
    server.set(min_replicas_to_write=0)
    server.call("REPLICAOF", "127.0.0.1", 1)


def writable(server: RedisServer) -> None:
    server.set(maxmemory=0)
    server.set(min_replicas_to_write=0)
    server.call("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("spoil", [full, read_only, replica], ids=["out of memory", "too few replicas", "read-only"])
def test_not_writable(tmp_path: Path, redis_server: RedisServer, spoil: Callable[[RedisServer], None]) -> None:
    with scene(tmp_path, redis_server.url, to(redis_server), deadline=40.0, patience=60.0) as on:
        gone(on, lambda: spoil(redis_server), lambda: writable(redis_server), 7)
        judgement = on.finish()
    assert not judgement.faults
