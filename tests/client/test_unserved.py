"""A server that is there, and cannot decide: what it keeps its ledger in is away."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from paceline_client import AsyncClient, Client, Grant
from paceline_client._core import Kind, Operation
from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import status_pb2
from tests.client.fake import Answer, Fake, granted, share

CALLS = 8
BURST = 4
"""What this process may do at once."""
WAIT = 4.5
"""Longer than one turn of this process takes, which is 3.75 s; shorter than two."""


class Away:
    """Answers Reserves with an error, while it is set."""

    def __init__(self, server: Fake, code: int) -> None:
        self.code: int | None = None
        self.asked = 0
        server.welcome.fallback_shares.append(share("pool/m", {pb.DIMENSION_REQUESTS: 20}, model="m"))
        server.on_reserve = self._answer
        self._then = code

    def begin(self) -> None:
        self.code = self._then
        self.asked = 0

    def _answer(self, request: pb.ReserveRequest) -> Answer:
        self.asked += 1
        return granted(request) if self.code is None else status_pb2.Status(code=self.code, message="the store is away")

    def bounded(self) -> bool:
        # Each asks once, with few repetitions; after that, one in a second finds out, and repeats as few times.
        return self.asked <= 5 * (BURST + CALLS + WAIT + 1)


@pytest.mark.parametrize("code", [14, 10])
def test_threads_wait_for_their_turn_without_asking_all_the_time(
    server: Fake, connect: Callable[..., Client], code: int
) -> None:
    away = Away(server, code)
    client = connect(budget=0.25)
    client.acquire(model="m").release()
    away.begin()
    while client.acquire(model="m", raise_on_denial=False):
        pass

    def one() -> Grant:
        return client.acquire(model="m", max_wait=WAIT, raise_on_denial=False)

    began = time.monotonic()
    with ThreadPoolExecutor(CALLS) as pool:
        grants = [each.result() for each in [pool.submit(one) for _ in range(CALLS)]]
    assert time.monotonic() - began < WAIT + 1
    assert sum(map(bool, grants)) <= 2
    assert all(grant.local if grant.denial is None else grant.denial.local for grant in grants)
    assert away.bounded(), away.asked
    # Who waits finds out when it is over.
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.acquire, model="m", max_wait=60)
        time.sleep(0.3)
        away.code = None
        assert not waiting.result(4).local
    assert not client.acquire(model="m").local


@pytest.mark.parametrize("code", [14, 10])
async def test_tasks_wait_for_their_turn_without_asking_all_the_time(
    server: Fake, connect_async: Callable[..., AsyncClient], code: int
) -> None:
    away = Away(server, code)
    client = connect_async(budget=0.25)
    (await client.acquire(model="m")).release()
    away.begin()
    while await client.acquire(model="m", raise_on_denial=False):
        pass
    async with asyncio.timeout(WAIT + 1):
        asks = (client.acquire(model="m", max_wait=WAIT, raise_on_denial=False) for _ in range(CALLS))
        grants = await asyncio.gather(*asks)
    assert sum(map(bool, grants)) <= 2
    assert all(grant.local if grant.denial is None else grant.denial.local for grant in grants)
    assert away.bounded(), away.asked
    waiting = [asyncio.create_task(client.acquire(model="m", max_wait=60)) for _ in range(3)]
    await asyncio.sleep(0.3)
    away.code = None
    async with asyncio.timeout(4):
        later: list[Grant] = await asyncio.gather(*waiting)
    assert not any(grant.local for grant in later)


async def test_a_submission_that_fails_does_not_stop_the_next(
    server: Fake, connect_async: Callable[..., AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect_async()
    (await client.acquire(model="m")).release()
    loop = asyncio.get_running_loop()

    def fails(*_: Any, **__: Any) -> asyncio.Handle:
        raise RecursionError

    assert client._desk is not None
    port = client._desk.hub.port()
    port.flush()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon", fails)
        with pytest.raises(RecursionError):
            port.submit(Operation(Kind.RELEASE, pb.ReleaseRequest(reservation_id="r"), 0.0))
    async with asyncio.timeout(5):
        assert await client.acquire(model="m")


def test_a_waiter_that_fails_holds_up_nobody(server: Fake, connect: Callable[..., Client]) -> None:
    class Fails:
        def deliver(self, operation: Operation) -> None:
            raise KeyError("of the waiter")

    client = connect()
    client.acquire(model="m").release()
    assert client._desk is not None
    hub = client._desk.hub
    hub.submit(Operation(Kind.RELEASE, pb.ReleaseRequest(reservation_id="r"), hub.clock(), Fails()))
    assert client.flush()
    client.acquire(model="m").release()
    assert client.statistics()["breaks"] == 0


def test_clients_made_before_a_fork_are_told_apart(server: Fake) -> None:
    client = Client(server.address)
    assert client._desk is not None
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, client._desk.hub.instance.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100).decode() != client._desk.hub.instance
    os.close(read)
    os.close(write)
    client.close()


def test_what_a_client_remembers_can_be_changed_after_a_fork(server: Fake) -> None:
    from paceline_client import _desk

    client = Client(server.address)
    assert client._desk is not None
    plan = client._plan({"model": "m"})
    desk = client._desk
    with _desk._remembering:
        child = os.fork()
        if not child:
            thread = threading.Thread(target=lambda: desk._remember(plan, hurry=True), daemon=True)
            thread.start()
            thread.join(2)
            os._exit(int(thread.is_alive()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    client.close()
