"""A server's life: health, reflection, drain, restart, and every way in which it cannot start."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from paceline.frontend.fallback import blind_us
from paceline.frontend.limits import FALLBACK_EXPIRY_US, FALLBACK_GRACE_US
from paceline.frontend.server import Server, StartError, run
from paceline.ledger.journal import StoreUnavailable
from paceline.ledger.memory import MemoryStore
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import Caller, Talk, calling, commit, config, reserve, running, state_of, succeeded, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(caller: Caller, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(caller.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def test_health(caller: Caller) -> None:
    for service in ("", "paceline.v1.CoordinatorService", "store", "config", "draining"):
        assert await health(caller, service) == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(caller, "nonsense")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection(caller: Caller) -> None:
    channel: Any = caller.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {"paceline.v1.CoordinatorService", "paceline.v1.AdminService", "grpc.health.v1.Health"} <= names
    call.cancel()


async def test_a_message_that_is_too_large(caller: Caller) -> None:
    request = reserve(route="x" * 2_000_000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.reserve(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_drain() -> None:
    async with running() as server, calling(server) as caller:
        talk = Talk(caller)
        await talk.hello()
        request = reserve(input_tokens=50_000)
        grant = (await talk.one(reserve=request)).reserve.grant
        (waits,) = await talk.send(pb.RequestItem(reserve=reserve(input_tokens=30_000, wait=60)))
        await until(lambda: sum(server.router.slots["default"].engine.waiting().values()) == 1)  # type: ignore[union-attr]
        stopping = asyncio.create_task(server.stop(3))
        await talk.drain()
        assert await health(caller) == NOT_SERVING
        assert await health(caller, "store") == SERVING
        assert await health(caller, "draining") == NOT_SERVING
        denied = await talk.one(reserve=reserve())
        assert denied.reserve.denial.reason == pb.DENIAL_REASON_DRAINING
        assert (await caller.reserve()).denial.reason == pb.DENIAL_REASON_DRAINING
        settled = await talk.one(commit=commit(request, grant.context, succeeded(50_000)))
        assert settled.commit.settlements
        # What still waits in the end is told so.
        assert (await talk.answer(waits)).reserve.denial.reason == pb.DENIAL_REASON_DRAINING
        await stopping


async def test_no_new_sessions_while_draining() -> None:
    async with running() as server, calling(server) as caller:
        talk = Talk(caller)
        await talk.hello()
        await talk.one(reserve=reserve())
        stopping = asyncio.create_task(server.stop(1))
        await talk.drain()
        late = Talk(caller)
        with pytest.raises((EOFError, grpc.aio.AioRpcError, AssertionError)):
            await late.hello()
        assert await late.call.code() is grpc.StatusCode.UNAVAILABLE
        await stopping


async def test_a_drain_waits_a_moment_for_somebody_to_come() -> None:
    async with running() as server, calling(server) as caller:
        request = reserve()
        grant = (await caller.reserve(request)).grant
        stopping = asyncio.create_task(server.stop(10))
        await asyncio.sleep(0.4)
        assert not (await caller.coordinator.Commit(commit(request, grant.context))).late
        async with asyncio.timeout(1):
            await stopping


async def test_drain_ends_early() -> None:
    async with running() as server, calling(server) as caller:
        await caller.reserve()
        started = time.monotonic()
        await server.stop(30)
        assert time.monotonic() - started < 2


async def test_the_store_goes_and_comes_back() -> None:
    store = MemoryStore()
    async with running(store=store) as server, calling(server) as caller:
        request = reserve()
        granted = await caller.reserve(request)
        journal: Any = store.journal("default")
        append, load = journal.append, journal.load

        async def away(*_: Any) -> None:
            raise StoreUnavailable("the disk is gone")

        journal.append = journal.load = away
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.reserve()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.reserve()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await health(caller) == NOT_SERVING
        assert await health(caller, "store") == NOT_SERVING
        (ledger,) = (await caller.admin.ListLedgers(pb.ListLedgersRequest())).ledgers
        assert ledger.state == pb.LEDGER_STATE_UNAVAILABLE
        journal.append, journal.load = append, load
        await until(lambda: server.router.slots["default"].ready, 10)
        # Definitions are sent again, and the grant is still on the books.
        assert (await caller.reserve(model="brand-new")).HasField("grant")
        settled = await caller.coordinator.Commit(commit(request, granted.grant.context))
        assert not settled.late
        assert await health(caller) == SERVING


async def test_a_restart_keeps_the_books(tmp_path: Path) -> None:
    fields = {"store": f"embedded:{tmp_path}/paceline.db"}
    request = reserve()
    async with running(fields) as server, calling(server) as caller:
        granted = await caller.reserve(request)
    async with running(fields) as server, calling(server) as caller:
        assert len(state_of(server).open) == 1
        settled = await caller.coordinator.Commit(commit(request, granted.grant.context))
        assert not settled.late
        assert {each.charged for each in settled.settlements if each.pool} == {1, 90, 80}


async def test_a_restart_hands_out_no_share_while_those_of_before_may_live(tmp_path: Path) -> None:
    fields = {"store": f"embedded:{tmp_path}/paceline.db"}
    async with running(fields) as server, calling(server) as caller:
        assert (await caller.reserve()).fallback_shares
    async with running(fields) as server, calling(server) as caller:
        assert not (await caller.reserve()).fallback_shares
        owner = server.router.slots["default"].owner
        assert owner.inherited_at is not None
        later = owner.now() + FALLBACK_EXPIRY_US + FALLBACK_GRACE_US
        server.fallback.begin("default", owner.epoch + 1, blind_us(owner.inherited_at, later, 0))
        # Another client: this one is not to ask again for a second.
        talk = Talk(caller)
        await talk.hello(instance_id="another")
        await talk.one(reserve=reserve())
        assert talk.shares


# -- starting ---------------------------------------------------------------------------------------------------


async def refusal(**fields: Any) -> str:
    server = Server(config(**fields), environ={})
    with pytest.raises(StartError) as caught:
        await server.start()
    message = str(caught.value)
    assert "\n" not in message
    return message


async def test_the_port_is_taken(server: Server) -> None:
    assert server.address in await refusal(listen=server.address)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert str(port) in await refusal(listen=f"127.0.0.1:{port}")


async def test_the_address_is_no_address() -> None:
    assert "listen" in await refusal(listen="no.such.host.invalid:7420")


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "paceline.sock"
    leftover = socket.socket(socket.AF_UNIX)
    leftover.bind(str(path))
    leftover.close()
    async with running({"listen": f"unix:{path}"}) as server, calling(server) as caller:
        assert (await caller.reserve()).HasField("grant")
        assert str(path) in await refusal(listen=f"unix:{path}")


async def test_the_store_is_locked(tmp_path: Path) -> None:
    fields = {"store": f"embedded:{tmp_path}/paceline.db"}
    async with running(fields):
        assert "paceline.db" in await refusal(**fields)


async def test_the_store_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "paceline.db"
    path.write_bytes(os.urandom(8_192))
    assert "paceline.db" in await refusal(store=f"embedded:{path}")


async def test_the_store_cannot_be_made(tmp_path: Path) -> None:
    assert "paceline.db" in await refusal(store=f"embedded:{tmp_path}/no/such/folder/paceline.db")


def test_run_says_why_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert run(config(listen=f"127.0.0.1:{other.getsockname()[1]}")) == 2
    told = capfd.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("error: cannot listen on")


PROGRAM = """
import sys
from paceline.config import load_config
from paceline.frontend.server import run
sys.exit(run(load_config(None)))
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    environ = os.environ | {
        "PACELINE_LISTEN": "127.0.0.1:0",
        "PACELINE_STORE": f"embedded:{tmp_path}/paceline.db",
        "PACELINE_METRICS_LISTEN": "off",
    }
    found = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield found
    finally:
        found.kill()
        found.communicate()


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process(process: subprocess.Popen[str], number: signal.Signals) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    address = line.split()[-1]
    with grpc.insecure_channel(address) as channel:
        stub: pb.CoordinatorServiceStub = pb.CoordinatorServiceStub(channel)
        request = reserve()
        granted = stub.Reserve(request, timeout=20)
        assert granted.HasField("grant")
        process.send_signal(number)
    assert process.wait(10) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
