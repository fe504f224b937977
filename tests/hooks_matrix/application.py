"""Makes one call as an application does, with the hook or without, in threads or in asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from paceline_client import AsyncClient, Client
from tests.hooks_matrix.seen import Seen, interrupted_when
from tests.hooks_matrix.situations import Form, Situation
from tests.hooks_matrix.world import WAIT, World, until
from tests.ports import nobody

BUDGET = 5.0
"""A busy machine is not an unreachable coordinator."""
_BUDGETS = {"open": 0.1, "closed": 0.1, "stops": 1.0}
"""Where nobody is there to be reached, that is waited for in vain; where somebody is at first, he must be reached."""
FLUSH = 2.0
CLOSE = 0.1
"""How long reports are waited for, in seconds. Where nobody is left to take them that is spent in vain."""
Mode = Literal["sync", "async"]
MODES: tuple[Mode, ...] = ("sync", "async")


@dataclass
class Settings:
    """What a client of an SDK is made with."""

    url: str
    retries: int
    timeout: float
    paceline: Client | AsyncClient | None
    max_wait: float = 10.0


class Sdk(Protocol):
    """One SDK."""

    api: str
    model: str
    refusal: type[Exception]
    """Its error for a 429."""

    def client(self, settings: Settings) -> Any: ...
    def async_client(self, settings: Settings) -> Any: ...
    def ask(self, output: int) -> dict[str, Any]: ...
    def use(self, client: Any, form: Form, ask: Mapping[str, Any], seen: Seen, pieces: int) -> None: ...
    async def use_async(self, client: Any, form: Form, ask: Mapping[str, Any], seen: Seen, pieces: int) -> None: ...


Use = Callable[[Any, Seen], None]
AsyncUse = Callable[[Any, Seen], Awaitable[None]]
Statistics = Mapping[str, int | float | bool | None]


def make(
    sdk: Sdk, mode: Mode, form: Form, situation: Situation, world: World, *, hooked: bool
) -> tuple[Seen, Statistics]:
    """One call in one situation: what the application saw, and what the hook's client counted."""
    seen = Seen()
    ask = sdk.ask(situation.output)

    def ready() -> bool:
        """The moment to interrupt."""
        if form == "stream":
            return len(seen.text) >= 3
        return any(call.produced > 20 for call in world.calls)

    def use(client: Any, seen: Seen) -> None:
        with interrupted_when(ready) if situation.interrupted else nullcontext():
            sdk.use(client, form, ask, seen, situation.pieces)

    async def use_async(client: Any, seen: Seen) -> None:
        task = asyncio.ensure_future(sdk.use_async(client, form, ask, seen, situation.pieces))
        if situation.interrupted:
            async with asyncio.timeout(10):
                while not ready():  # noqa: ASYNC110 -- nobody announces it
                    await asyncio.sleep(0.005)
            task.cancel()
        await task

    policy = {"stops": "local", "goes": "local", "open": "open", "closed": "closed"}.get(situation.coordinator)
    options: dict[str, Any] = {"budget": _BUDGETS.get(situation.coordinator, BUDGET)}
    if policy is not None:
        options["policy"] = policy
    prelude = world.stop_server if hooked and situation.coordinator == "stops" else None
    with (
        nobody() as elsewhere,
        leaving(world) if hooked and situation.coordinator == "goes" else nullcontext(),
    ):
        address = "" if not hooked else elsewhere if situation.coordinator in ("open", "closed") else world.address
        url = world.upstream.url if situation.upstream_is_there else f"http://{elsewhere}"
        settings = Settings(url, situation.retries, situation.timeout, None)
        if mode == "sync":
            return run(sdk, settings, use, seen, address, options, prelude)
        return asyncio.run(run_async(sdk, settings, use_async, seen, address, options, prelude))


@contextmanager
def leaving(world: World) -> Iterator[None]:
    """The coordinator goes as soon as a call has reached the upstream."""

    def leave() -> None:
        until(lambda: world.calls, "a call")
        world.stop_server()

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    yield
    thread.join(WAIT)


def run(
    sdk: Sdk,
    settings: Settings,
    use: Use,
    seen: Seen,
    address: str = "",
    options: Mapping[str, Any] | None = None,
    prelude: Callable[[], None] | None = None,
) -> tuple[Seen, Statistics]:
    """In this thread. With an ``address`` the hook is used. ``prelude`` comes after a first, successful call."""
    paceline = Client(address, **(options or {})) if address else None
    settings.paceline = paceline
    try:
        with sdk.client(settings) as client:
            if prelude is not None:
                sdk.use(client, "json", sdk.ask(1), Seen(), 0)
                prelude()
            try:
                use(client, seen)
            except BaseException as error:
                seen.error = error
        if paceline is None:
            return seen, {}
        paceline.flush(CLOSE if "policy" in (options or {}) else FLUSH)
        return seen, paceline.statistics()
    finally:
        if paceline is not None:
            paceline.close(CLOSE)


async def run_async(
    sdk: Sdk,
    settings: Settings,
    use: AsyncUse,
    seen: Seen,
    address: str = "",
    options: Mapping[str, Any] | None = None,
    prelude: Callable[[], None] | None = None,
) -> tuple[Seen, Statistics]:
    """The same in asyncio."""
    paceline = AsyncClient(address, **(options or {})) if address else None
    settings.paceline = paceline
    try:
        async with sdk.async_client(settings) as client:
            if prelude is not None:
                await sdk.use_async(client, "json", sdk.ask(1), Seen(), 0)
                await asyncio.to_thread(prelude)
            try:
                await use(client, seen)
            except BaseException as error:
                seen.error = error
        if paceline is None:
            return seen, {}
        await paceline.flush(CLOSE if "policy" in (options or {}) else FLUSH)
        return seen, paceline.statistics()
    finally:
        if paceline is not None:
            await paceline.aclose(CLOSE)
