"""The client against the real server."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline_client import AsyncClient, Client, Denied
from tests.client.fake import until
from tests.ports import free_port

pytestmark = pytest.mark.process

MODEL = "claude-sonnet-5"


class Server:
    """`paceline serve` in a process of its own."""

    def __init__(self, store: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.store = store
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "paceline", "serve", "--listen", self.address, "--store", self.store]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._listens, 30)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(20)

    def _listens(self) -> bool:
        host, port = self.address.split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(f"embedded:{tmp_path / 'books.db'}")
    yield found
    found.stop(signal.SIGKILL)


def test_a_call_is_booked(server: Server) -> None:
    with Client(server.address, budget=10) as client:
        with client.reserve(model=MODEL, input_tokens=100, max_output_tokens=64, tenant="chat", max_wait=10) as grant:
            assert not grant.local
            grant.report({"anthropic-ratelimit-requests-limit": "50"})
            grant.commit({"usage": {"input_tokens": 3, "output_tokens": 4}})
        assert client.flush(10)
        until(lambda: grant.settlement is not None)
        assert grant.settlement is not None
        assert grant.settlement.charged["input_tokens"] == 3
        with client.reserve_many(3, model=MODEL, input_tokens=10, output_tokens=10) as grants:
            for each in grants:
                each.commit_usage(input_tokens=10, output_tokens=10)
                break
        assert client.flush(10)
        assert client.statistics()["refused_reports"] == 0


async def test_a_full_pool_makes_wait_or_denies(server: Server) -> None:
    async with AsyncClient(server.address, budget=10) as client:
        grants = []
        with pytest.raises(Denied) as caught:  # noqa: PT012
            for _ in range(1_000):
                grants.append(await client.acquire(model=MODEL, input_tokens=1, output_tokens=1))
        assert caught.value.reason == "limit"
        assert caught.value.retry_after is not None
        waiting = [
            asyncio.create_task(client.acquire(model=MODEL, input_tokens=1, output_tokens=1, max_wait=60))
            for _ in range(5)
        ]
        await asyncio.sleep(0.3)
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        for grant in grants:
            grant.release()
        grants = await asyncio.wait_for(asyncio.gather(*waiting[1:]), 10)
        assert all(not grant.local for grant in grants)
        for grant in grants:
            grant.commit_usage(input_tokens=1, output_tokens=1)
        assert await client.flush(10)
        assert client.statistics()["refused_reports"] == 0


def test_a_server_that_is_killed_loses_no_report(server: Server) -> None:
    with Client(server.address, budget=0.25) as client:
        grant = client.acquire(model=MODEL, input_tokens=10, output_tokens=10, max_wait=10)
        assert not grant.local
        server.stop(signal.SIGKILL)
        before = time.monotonic()
        alone = client.acquire(model=MODEL, input_tokens=10, output_tokens=10, max_wait=10)
        assert alone.local
        assert time.monotonic() - before < 1
        grant.commit_usage(input_tokens=7, output_tokens=7)
        alone.commit_usage(input_tokens=7, output_tokens=7)
        server.start()
        assert client.flush(20)
        until(lambda: grant.settlement is not None)
        assert grant.settlement is not None
        assert grant.settlement.charged["input_tokens"] == 7
        assert not grant.settlement.stale
        assert not client.acquire(model=MODEL, input_tokens=10, output_tokens=10, max_wait=10).local


def test_a_planned_stop_ends_in_order(server: Server) -> None:
    with Client(server.address, budget=0.25) as client:
        grant = client.acquire(model=MODEL, input_tokens=10, output_tokens=10, max_wait=10)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.statistics()["drains"] == 1)
        # The call goes on for a while; its commit still reaches the server that granted it, which then ends.
        time.sleep(1.5)
        assert server.process.poll() is None
        grant.commit_usage(input_tokens=7, output_tokens=7)
        assert client.flush(5)
        until(lambda: grant.settlement is not None)
        server.process.wait(10)
        server.start()
        until(lambda: bool(client.statistics()["connected"]), 20)
        client.acquire(model=MODEL, input_tokens=10, output_tokens=10, max_wait=10).release()
        assert client.flush(5)
        assert client.statistics()["drains"] == 1
