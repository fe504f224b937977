"""What a client does with those who wait, when the coordinator falls silent and when it is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from paceline_client import AsyncClient
from paceline_client.stubs import v1 as pb
from tests.client.fake import Fake, share

MODEL = "m"


@pytest.fixture
def server() -> Iterator[Fake]:
    fake = Fake()
    fake.welcome.fallback_shares.append(share("pool/m", {pb.DIMENSION_REQUESTS: 8}, model=MODEL))
    fake.start()
    yield fake
    fake.stop()


@pytest.mark.timeout(40)
async def test_who_waits_for_a_turn_of_its_own_asks_when_somebody_is_back(server: Fake) -> None:
    async with AsyncClient(server.address, local_scale=1.0) as client:
        (await client.acquire(model=MODEL)).release()
        assert await client.flush(5)
        server.stop()
        began = time.monotonic()
        # The burst is gone: a turn comes every 7.5 s.
        waiting = [asyncio.create_task(client.acquire(model=MODEL, max_wait=60)) for _ in range(4)]
        await asyncio.sleep(0.7)
        assert not any(task.done() for task in waiting)
        server.start()
        grants = await asyncio.gather(*waiting)
        assert time.monotonic() - began < 6
        assert not any(grant.local for grant in grants)
        for grant in grants:
            grant.release()


@pytest.mark.timeout(20)
async def test_a_silent_server_holds_nobody_until_the_end_of_the_wait(server: Fake) -> None:
    async with AsyncClient(server.address, local_scale=1.0, policy="open") as client:
        held = await client.acquire(model=MODEL)
        server.mute = True
        began = time.monotonic()
        held.commit_usage(input_tokens=1, output_tokens=1)
        # The connection stands, and nothing comes: the receipt that is owed shows it.
        grant = await client.acquire(model=MODEL, max_wait=60)
        assert grant.local
        assert time.monotonic() - began < 5
        server.mute = False
