"""The upstream's own books, read while it runs, and what happens to its limits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from bench.demo.books import Upstream

_TIMEOUT_S = 20.0


class Level(msgspec.Struct, frozen=True, gc=False):
    """One bucket: tokens (or requests) at one instant, and sums since the upstream was reset."""

    level_exact: float
    offered: float
    charged: float
    limit: int


class _Group(msgspec.Struct, frozen=True, gc=False):
    buckets: dict[str, Level]


class Sample(msgspec.Struct, frozen=True, gc=False):
    """Everything at one instant of the monotonic clock, which all processes of a machine share, in µs."""

    now_us: int
    calls: int
    """Attempts in the log so far."""
    accepted: int
    refused: int
    groups: dict[str, _Group]

    def level(self, dimension: str) -> Level:
        """One bucket of the one group that there is."""
        (group,) = self.groups.values()
        return group.buckets[dimension]


class Part(msgspec.Struct, frozen=True):
    """How much of one limit was used between two marks: see :class:`paceline.upstream.truth.Used`."""

    accepted: float
    budget: float
    outside: float
    drawn: float


class Truth(Upstream):
    """Its side endpoints. Raises :class:`aiohttp.ClientError`; :class:`ValueError` on an answer without sense."""

    async def look(self) -> Sample:
        """Sums and levels of this instant."""
        return msgspec.json.decode(await self._ask("GET", "/sim/truth"), type=Sample)

    async def mark(self, name: str) -> Sample:
        """Remember this instant under a name."""
        return msgspec.json.decode(await self._ask("POST", "/sim/mark", {"name": name}), type=Sample)

    async def limits(self, amounts: Mapping[str, int]) -> None:
        """New limits, at once."""
        await self._ask("POST", "/sim/scenario", {"limits": {"*": dict(amounts)}})

    async def used(self, start: str, end: str) -> dict[str, Part]:
        """By dimension, between two marks."""
        answer = await self._ask("GET", f"/sim/used?from={start}&to={end}")
        (found,) = msgspec.json.decode(answer, type=dict[str, dict[str, Part]]).values()
        return found


@asynccontextmanager
async def truth(base_url: str) -> AsyncIterator[Truth]:
    """The side endpoints at ``base_url``."""
    timeout: Any = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(base_url, timeout=timeout) as http:
        yield Truth(http)
