"""As an operator would: three servers over Redis are upgraded one by one under load, taken back, upgraded again, and
the upgrade is finalized. No call fails, and nothing that was told is lost."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from paceline.engine.state import FORMAT
from paceline_client.stubs import v1 as pb
from tests.replicas.checks import count, to
from tests.replicas.fleet import LEDGER, Server
from tests.replicas.redis_server import RedisServer, need_redis
from tests.replicas.scene import Scene, scene
from tests.upgrade.next_version import NEXT

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.xdist_group("replicas"),
    pytest.mark.timeout(300),
]

THIS_MODULE, NEXT_MODULE = "paceline", "tests.upgrade.next_version"


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    need_redis()
    with RedisServer() as server:
        yield server


def begin_as(server: Server, module: str) -> None:
    server._command = [sys.executable, "-m", module]
    server.spawn()
    server.wait_healthy()


def replace(on: Scene, server: Server, module: str) -> None:
    """Stop a server in order, and begin the other version in its place."""
    on.deed()
    server.terminate()
    assert server.wait_end(20) == 0
    on.flowing(30)
    begin_as(server, module)
    on.flowing(30)


def finalize(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        request = pb.FinalizeUpgradeRequest(ledger=LEDGER)
        pb.AdminServiceStub(channel).FinalizeUpgrade(request, timeout=10)


def test_upgraded_taken_back_and_upgraded_for_good(tmp_path: Path, redis_server: RedisServer) -> None:
    with scene(tmp_path, redis_server.url, to(redis_server)) as on:
        servers = on.fleet.servers
        first = on.fleet.epoch()
        for server in servers[:2]:
            replace(on, server, NEXT_MODULE)
        with pytest.raises(grpc.RpcError) as refused:
            # One of the version before could not take over any more.
            finalize(on.fleet.wait_owner())
        assert servers[2].name in str(refused.value.details())
        replace(on, servers[2], NEXT_MODULE)
        for server in servers:
            replace(on, server, THIS_MODULE)
        for server in servers:
            replace(on, server, NEXT_MODULE)
        assert on.fleet.epoch() >= first + 3
        assert "note" not in kinds(on), "the version before could not have read it"

        on.deed()
        finalize(servers[0])
        on.flowing(100)
        found = kinds(on)
        assert found["note"] > 0
        # Back to the next owner of the next version; and one of the version before owns nothing any more.
        owner = on.fleet.wait_owner()
        old = on.others(owner)[0]
        old.terminate()
        assert old.wait_end(20) == 0
        begin_as(old, THIS_MODULE)
        on.deed()
        owner.terminate()
        assert owner.wait_end(20) == 0
        heir = on.fleet.wait_owner(but=owner)
        assert heir is not old, on.fleet.tails()
        on.flowing(60)
        judgement = on.finish()
    assert not judgement.faults
    assert judgement.recount.kinds["note"] > 0


def kinds(on: Scene) -> Counter[str]:
    """The events in the journal, by kind."""
    return count(on.stored()).kinds


def test_the_version_before_says_what_to_do(tmp_path: Path, redis_server: RedisServer) -> None:
    with scene(tmp_path, redis_server.url, to(redis_server), servers=1, module=NEXT_MODULE) as on:
        [server] = on.fleet.servers
        judgement = on.finish()
        assert not judgement.faults
        server.terminate()
        assert server.wait_end(20) == 0
        server._command = [sys.executable, "-m", THIS_MODULE]
        server.spawn()
        message = f"of form {NEXT}, and this version reads up to {FORMAT}: run a newer version"
        on.wait(lambda: message in server.log.read_text(errors="replace"), "it says so", 20)
        assert not server.healthy()
