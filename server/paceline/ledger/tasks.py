"""Ending what runs beside a ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


async def halt(tasks: Iterable[asyncio.Task[None] | None]) -> None:
    """Cancel what is there and still runs, and wait until it has ended."""
    running = [task for task in tasks if task is not None and not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
