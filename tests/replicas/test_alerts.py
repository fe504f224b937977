"""Two servers on one Redis: an alert is told once, by the owner of the ledger, and shown by both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import LEDGER, Caller, calling, running, until
from tests.frontend.receiver import Receiver
from tests.frontend.test_alerts import watched
from tests.frontend.test_spend import AMPLE, MILLION, spend
from tests.replicas.redis_server import RedisServer, need_redis

pytestmark = [pytest.mark.redis]


@pytest.fixture
def redis_url() -> Iterator[str]:
    need_redis()
    with RedisServer() as server:
        yield server.url


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


def settings(redis_url: str, node: str, receiver: Receiver) -> dict[str, Any]:
    return {
        "store": redis_url,
        "node": node,
        "accounts": {LEDGER: {"tier": "build", "monthly_spend_cap": 10, "pools": {"sonnet-4": AMPLE}}},
        "alerts": {"thresholds": [0.5, 0.8], "webhook": {"url": f"http://127.0.0.1:{receiver.port}/"}},
    }


def owner_of(servers: dict[str, Server]) -> str:
    """The name of the server that decides; empty: none does."""
    here = [name for name, server in servers.items() if not server.router.slots[LEDGER].is_remote]
    return here[0] if len(here) == 1 else ""


async def look(servers: dict[str, Server]) -> None:
    for server in servers.values():
        await server.alerts.look()


async def test_an_alert_is_told_once_in_a_fleet(redis_url: str, receiver: Receiver) -> None:
    async with AsyncExitStack() as stack:
        servers: dict[str, Server] = {}
        callers: dict[str, Caller] = {}
        for name in ("one", "two"):
            servers[name] = await stack.enter_async_context(running(settings(redis_url, name, receiver)))
            callers[name] = await stack.enter_async_context(calling(servers[name]))
        await until(lambda: all(len(server.membership.nodes()) == 2 for server in servers.values()), 20)
        await until(lambda: owner_of(servers), 20)
        first = owner_of(servers)
        other = "two" if first == "one" else "one"

        # Through the server that does not own the ledger.
        await spend(callers[other], pb.Usage(input_tokens=2 * MILLION))
        await look(servers)
        await until(lambda: receiver.got)
        for caller in callers.values():
            (event,) = await watched(caller, 1)
            assert (event.alert.ledger, event.alert.threshold_permille) == (LEDGER, 500)

        moved = await callers[first].admin.HandOverLedger(pb.HandOverLedgerRequest(ledger=LEDGER))
        assert moved.node == other
        await until(lambda: owner_of(servers) == other, 20)
        await look(servers)
        await spend(callers[first], pb.Usage(input_tokens=MILLION))
        await look(servers)
        await until(lambda: len(receiver.got) == 2)
        for caller in callers.values():
            events = await watched(caller, 2)
            assert {event.alert.threshold_permille for event in events if not event.removed} == {500, 800}
        await asyncio.sleep(1.2)  # each server looks by itself as well
    posted = [json.loads(got.body) for got in receiver.got]
    assert [(each["threshold"], each["server"]) for each in posted] == [(0.5, first), (0.8, other)]
