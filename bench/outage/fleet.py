"""One process of the fleet: the official SDK with the hook, and a note of when each call was decided without us."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Generator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any

import anthropic

from paceline_client import AsyncClient
from paceline_client._desk import Desk
from paceline_client._model import Priority
from paceline_client.hooks.anthropic import CallDenied, PacelineMiddleware

MODEL = "claude-sonnet-5"
CALL_TIMEOUT = 60.0
FLUSH = 20.0
TICK = 0.01
"""Unit of all three: seconds."""


@dataclass(frozen=True)
class Part:
    """What one process does."""

    name: str
    priority: Priority
    calls_per_second: float = 0.0
    """Calls that come by themselves, as users do; zero: none."""
    loops: int = 0
    """Loops that call one after the other, as jobs do."""
    max_wait: float = 20.0
    input_tokens: tuple[int, int] = (100, 400)
    seed: int = 0


@dataclass
class Report:
    """What a process says at its end. Times of the monotonic clock, which all processes of a machine share."""

    name: str
    alone: list[tuple[float, float]]
    """Calls that the policy decided: when they were asked for, and when they were known to be on their own."""
    lags: list[tuple[float, float]]
    """When the process was late by itself, and how much."""
    answered: int = 0
    denied: int = 0
    failed: dict[str, int] | None = None
    flushed: bool = False
    statistics: dict[str, Any] | None = None


def run(part: Part, upstream: str, address: str, stop: Event, reports: Queue[Report]) -> None:
    """Call until ``stop``, then report."""
    report = Report(part.name, [], [], failed={})
    _watch(report)
    asyncio.run(_run(part, upstream, address, stop, report))
    reports.put(report)


def _watch(report: Report) -> None:
    decide = Desk.without

    def without(self: Desk, plan: Any, submit: Any, started: float) -> Generator[float, None, Any]:
        report.alone.append((started, time.monotonic()))
        return (yield from decide(self, plan, submit, started))

    Desk.without = without  # type: ignore[method-assign]


async def _run(part: Part, upstream: str, address: str, stop: Event, report: Report) -> None:
    chance = random.Random(part.seed)
    async with AsyncClient(address) as paceline:
        hook = PacelineMiddleware(paceline, tenant=part.name, priority=part.priority, max_wait=part.max_wait)
        async with anthropic.AsyncAnthropic(
            base_url=upstream, api_key="none", middleware=[hook], timeout=CALL_TIMEOUT
        ) as client:
            lags = asyncio.create_task(_lags(report))
            tasks: set[asyncio.Task[None]] = set()
            for _ in range(part.loops):
                tasks.add(asyncio.create_task(_loop(part, client, chance, stop, report)))
            while not stop.is_set():
                if part.calls_per_second:
                    await asyncio.sleep(chance.expovariate(part.calls_per_second))
                    task = asyncio.create_task(_call(part, client, chance, report))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                else:
                    await asyncio.sleep(0.1)
            if tasks:
                await asyncio.wait(tasks, timeout=CALL_TIMEOUT)
            lags.cancel()
        report.flushed = await paceline.flush(FLUSH)
        report.statistics = dict(paceline.statistics())


async def _lags(report: Report) -> None:
    while True:
        due = time.monotonic() + TICK
        await asyncio.sleep(TICK)
        late = time.monotonic() - due
        if late > TICK:
            report.lags.append((due + late, late))


async def _loop(
    part: Part, client: anthropic.AsyncAnthropic, chance: random.Random, stop: Event, report: Report
) -> None:
    while not stop.is_set():
        await _call(part, client, chance, report)
        await asyncio.sleep(0)


async def _call(part: Part, client: anthropic.AsyncAnthropic, chance: random.Random, report: Report) -> None:
    text = "word " * chance.randint(*part.input_tokens)
    try:
        await client.messages.create(
            model=MODEL,
            max_tokens=200,
            messages=[{"role": "user", "content": text}],
            metadata={"user_id": f"paceline-sim:output={chance.randint(10, 60)}"},
        )
        report.answered += 1
    except CallDenied as denied:
        report.denied += 1
        if part.loops:
            await asyncio.sleep(min(5.0, denied.retry_after or 1.0))
    except anthropic.AnthropicError as error:
        assert report.failed is not None
        kind = type(error).__name__
        report.failed[kind] = report.failed.get(kind, 0) + 1
        await asyncio.sleep(0.1)
