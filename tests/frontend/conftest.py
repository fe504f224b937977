"""A plain server and a caller of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from paceline.frontend.server import Server
from tests.frontend.harness import Caller, calling, running


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    async with running() as found:
        yield found


@pytest_asyncio.fixture
async def caller(server: Server) -> AsyncIterator[Caller]:
    async with calling(server) as found:
        yield found
