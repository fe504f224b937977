"""The upstream's own books, read from its side endpoints: marks in time, and the log of every attempt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

_TIMEOUT_S = 20.0
_PAGE = 10_000


class Point(msgspec.Struct, frozen=True):
    """One bucket at one instant, in tokens (or requests), with the sum of its rate over time since it began."""

    level_exact: float
    offered: float


class _Group(msgspec.Struct, frozen=True):
    buckets: dict[str, Point]


class Mark(msgspec.Struct, frozen=True):
    """Everything at one instant: ``now_us`` of the upstream's clock, ``calls`` attempts in the log so far."""

    now_us: int
    calls: int
    accepted: int
    refused: int
    groups: dict[str, _Group]

    @property
    def buckets(self) -> dict[str, Point]:
        """Of the one group of models that there is."""
        (group,) = self.groups.values()
        return group.buckets


class Attempt(msgspec.Struct, frozen=True):
    """One attempt as the upstream saw it."""

    id: str
    number: int
    at: int
    tenant: str
    group: str
    status: str
    """``accepted``, ``refused``, ``overloaded``."""
    dimension: str
    """What a refused one was short of."""
    input: int
    cache_write: int
    produced: int

    def amounts(self) -> dict[str, float]:
        """What it counts in each dimension, if it was accepted."""
        return {
            "requests": 1.0,
            "input_tokens": float(self.input + self.cache_write),
            "output_tokens": float(self.produced),
        }


class _Page(msgspec.Struct):
    calls: list[Attempt]
    next: int
    logged: int
    forgotten: int


class Upstream:
    """Its side endpoints. Raises :class:`aiohttp.ClientError`; :class:`ValueError` on an answer without sense."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def reset(self, config: Mapping[str, Any], scenario: Mapping[str, Any]) -> None:
        """Start anew: fresh buckets, empty log."""
        await self._ask("POST", "/sim/reset", {"config": config, "scenario": scenario})

    async def now(self) -> Mark:
        """Sums and levels of this instant."""
        return msgspec.json.decode(await self._ask("GET", "/sim/truth"), type=Mark)

    async def attempts(self, start: Mark) -> list[Attempt]:
        """Every attempt since a mark, oldest first."""
        found: list[Attempt] = []
        since = start.calls
        while True:
            page = msgspec.json.decode(await self._ask("GET", f"/sim/calls?since={since}&limit={_PAGE}"), type=_Page)
            if page.forgotten:
                raise ValueError(f"the upstream has forgotten {page.forgotten} attempts")
            found += page.calls
            since = page.next
            if not page.calls or since >= page.logged:
                return found

    async def _ask(self, method: str, path: str, body: object = None) -> bytes:
        async with self._http.request(method, path, json=body) as response:
            content = await response.read()
            if response.status != 200:
                raise ValueError(f"{path} answered {response.status}: {content[:500].decode(errors='replace')}")
            return content


@asynccontextmanager
async def upstream(base_url: str) -> AsyncIterator[Upstream]:
    """The side endpoints at ``base_url``."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(base_url, timeout=timeout) as http:
        yield Upstream(http)


async def until(instant: float) -> None:
    """Wait for an instant of the machine's monotonic clock."""
    await asyncio.sleep(max(0.0, instant - time.monotonic()))
