"""Wires and calls between processes over gRPC, and who may use them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from paceline.engine.answers import Granted
from paceline.frontend.errors import Code, Problem, invalid
from paceline.frontend.peers.rpc import Passes, PeerService, PeerTransport, new_key
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable, Wire, WireClosed
from tests.cli.conftest import free_address
from tests.frontend.fleet_harness import Call, Network, Node, reserve, until

KEY = new_key()
NOW = 1_750_000_000_000_000


async def echo(wire: Wire) -> None:
    """Says everything back; ``bye`` ends it."""
    try:
        while True:
            frame = await wire.receive()
            if frame == b"bye":
                return
            wire.send(frame)
    except WireClosed:
        pass


@asynccontextmanager
async def service(
    accept: Callable[[Wire], Awaitable[None]] = echo, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[PeerService, str]]:
    found = PeerService(Passes(KEY, "there", lambda: NOW), accept)
    address = await found.start(listen)
    try:
        yield found, address
    finally:
        await found.stop()


@asynccontextmanager
async def transport(key: bytes = KEY, wall: int = NOW) -> AsyncIterator[PeerTransport]:
    found = PeerTransport(Passes(key, "here", lambda: wall))
    try:
        yield found
    finally:
        await found.close()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_frames_come_in_order_and_the_end_is_clean(kind: str, tmp_path: Path) -> None:
    listen = "127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path / 'peer.sock'}"
    async with service(listen=listen) as (_, address), transport() as here:
        wire = await here.connect(address, 2)
        for number in range(100):
            wire.send(b"%d" % number)
        assert [await wire.receive() for _ in range(100)] == [b"%d" % number for number in range(100)]
        assert wire.unsent == 0
        wire.send(b"bye")
        with pytest.raises(WireClosed) as closed:
            await wire.receive()
        assert closed.value.clean


async def test_closing_ends_both_sides() -> None:
    ended = asyncio.Event()

    async def accept(wire: Wire) -> None:
        try:
            await echo(wire)
        finally:
            ended.set()

    async with service(accept) as (_, address), transport() as here:
        wire = await here.connect(address, 2)
        waiting = asyncio.create_task(wire.receive())
        await asyncio.sleep(0.05)
        wire.close()
        with pytest.raises(WireClosed):
            await waiting
        async with asyncio.timeout(2):
            await ended.wait()


async def test_a_process_that_is_gone_is_told_from_one_that_is_silent() -> None:
    async with transport() as here:
        with pytest.raises(PeerRefused):
            await here.connect(free_address(), 2)
        with pytest.raises(PeerRefused):
            await here.connect("unix:/nowhere/at/all.sock", 2)
        with pytest.raises(PeerRefused):
            await here.call(free_address(), "m", b"", 2)
        with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(PeerUnreachable):
            await here.connect(f"127.0.0.1:{silent.getsockname()[1]}", 0.3)


async def test_a_stream_that_breaks_is_not_clean() -> None:
    found = PeerService(Passes(KEY, "there", lambda: NOW), echo)
    address = await found.start("127.0.0.1:0")
    async with transport() as here:
        wire = await here.connect(address, 2)
        wire.send(b"x")
        assert await wire.receive() == b"x"
        await found.stop()
        with pytest.raises(WireClosed) as closed:
            await wire.receive()
        assert not closed.value.clean


@pytest.mark.parametrize(
    ("key", "wall"),
    [(new_key(), NOW), (KEY, NOW + 300_000_000), (KEY, NOW - 300_000_000)],
    ids=["another key", "too early", "too late"],
)
async def test_strangers_are_not_served(key: bytes, wall: int) -> None:
    served = []

    async def accept(wire: Wire) -> None:
        served.append(wire)

    async with service(accept) as (there, address), transport(key, wall) as here:
        there.methods["m"] = echo  # type: ignore[assignment]
        wire = await here.connect(address, 2)
        with pytest.raises(WireClosed):
            await wire.receive()
        with pytest.raises(PeerUnreachable, match="UNAUTHENTICATED"):
            await here.call(address, "m", b"", 2)
    assert served == []


async def test_calls_and_what_they_raise() -> None:
    async def good(body: bytes) -> bytes:
        return body.upper()

    async def bad(_: bytes) -> bytes:
        raise invalid("pool", "is not known")

    async def defect(_: bytes) -> bytes:
        raise KeyError("secret")

    async def slow(_: bytes) -> bytes:
        await asyncio.sleep(5)
        return b""

    async with service() as (there, address), transport() as here:
        there.methods |= {"good": good, "bad": bad, "defect": defect, "slow": slow}
        assert await here.call(address, "good", b"abc", 2) == b"ABC"
        with pytest.raises(Problem) as found:
            await here.call(address, "bad", b"", 2)
        assert (found.value.code, found.value.violations) == (Code.INVALID_ARGUMENT, (("pool", "is not known"),))
        with pytest.raises(Problem, match="reference") as found:
            await here.call(address, "defect", b"", 2)
        assert "secret" not in found.value.message
        with pytest.raises(Problem, match="version"):
            await here.call(address, "unknown", b"", 2)
        with pytest.raises(PeerUnreachable):
            await here.call(address, "slow", b"", 0.2)


async def test_operations_over_real_wires() -> None:
    network = Network()
    owning = Node(network, "owning")
    async with service(owning.serving.accept) as (_, address), transport() as here:
        front = Node(here, "front")  # type: ignore[arg-type]
        owner = owning.own(1)
        front.keeper.tell(1, address)
        calls = [Call(front.slot, reserve(f"r{number}")) for number in range(300)]
        waits = Call(front.slot, reserve("wait", 60_000_000))
        await until(lambda: all(call.answer for call in calls))
        assert all(isinstance(call.answer, Granted) for call in calls)
        await until(lambda: owner.held)
        owner.answer_all()
        await until(lambda: waits.answer)
        await front.router.stop(0)
    await owning.router.stop(0)
