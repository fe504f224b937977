"""What callers of the Python client see: rows of docs/failures.md."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from paceline_client import AsyncClient
from tests.proofs.answers import INPUT, REQUESTS
from tests.proofs.recount import Stored
from tests.replicas.checks import count, read_log, to
from tests.replicas.fleet import LEDGER, MODEL, Fleet, pool_config
from tests.replicas.redis_server import RedisServer, need_redis

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.xdist_group("replicas"),
    pytest.mark.timeout(120),
]

CALLS_PER_SECOND = 40
SECONDS = 7.0
TOKENS = 100
LIMITS = {"requests": 60_000, "input_tokens": 6_000_000, "output_tokens": 6_000_000}


async def test_owner_killed_under_the_python_client(tmp_path: Path) -> None:
    """Nobody waits for longer than the client's budget: calls meanwhile go by the share, and are booked afterwards."""
    need_redis()
    with RedisServer() as store, Fleet(tmp_path, 3, pool_config(LIMITS), store.url) as fleet:
        owner = await asyncio.to_thread(fleet.wait_owner)
        survivors = [server for server in fleet.servers if server is not owner]
        waits: list[float] = []
        alone = 0
        async with AsyncClient(survivors[0].address) as one, AsyncClient(survivors[1].address) as other:

            async def call(client: AsyncClient) -> None:
                nonlocal alone
                began = time.monotonic()
                async with client.reserve(model=MODEL, input_tokens=TOKENS, output_tokens=10, max_wait=5) as grant:
                    waits.append(time.monotonic() - began)
                    alone += grant.local
                    await asyncio.sleep(0.02)
                    grant.commit_usage(input_tokens=TOKENS, output_tokens=10)

            async with asyncio.TaskGroup() as group:
                start = time.monotonic()
                killed = False
                for number in range(int(CALLS_PER_SECOND * SECONDS)):
                    await asyncio.sleep(max(0.0, start + number / CALLS_PER_SECOND - time.monotonic()))
                    group.create_task(call((one, other)[number % 2]))
                    if not killed and time.monotonic() > start + 2:
                        killed = True
                        owner.kill()
            assert await one.flush(20)
            assert await other.flush(20)
        calls = int(CALLS_PER_SECOND * SECONDS)
        client = to(store)()
        recount = count(Stored(LEDGER, read_log(client), None, 0))
        client.close()
        assert not fleet.faults()
    assert not recount.faults
    charged = {bucket.dimension: bucket.charged for bucket in recount.buckets if bucket.pool}
    assert charged[REQUESTS] == calls
    assert charged[INPUT] == calls * TOKENS
    assert max(waits) < 3.5
    print(f"{alone} of {calls} decided by the share; the longest wait {max(waits):.2f} s")
