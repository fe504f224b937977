"""The simulator as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
from collections.abc import Callable

from paceline.upstream.http.server import Upstream
from paceline.upstream.settings import Config, Scenario


def run(host: str, port: int, config: Config, scenario: Scenario, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; ``ready`` gets the address. Raises ``OSError`` if it cannot listen."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(host, port, config, scenario, ready))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


async def _serve(host: str, port: int, config: Config, scenario: Scenario, ready: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    async with Upstream.start(config, scenario, host=host, port=port) as upstream:
        # What was loaded stays: the collector need not look at it again.
        gc.freeze()
        ready(upstream.url)
        sys.stdout.flush()
        await stop.wait()
