"""One mode from start to end: upstream, coordinator, fleet, and what they say."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import TypeVar

import msgspec

from bench.demo.books import Upstream, until, upstream
from bench.demo.children import START_S, Child, ChildFailed, child
from bench.demo.figures import Figures, figures
from bench.demo.machine import Meter
from bench.demo.progress import Board
from bench.demo.settings import Settings
from bench.fleet.plan import Done, Measure, Measured, Mode, Plan, Ready, Record, Report, Settled, Start, Stop

OWN_CALLS = 40
_LEAD_S = 0.5
"""From the order to start to the start."""
_LOOK_S = 0.5
_GRACE_S = 15.0
"""For processes to report what was cut and to exit."""
_MOST_RECORDS = 1_000_000

_T = TypeVar("_T")
_encode = msgspec.json.encode
_report = msgspec.json.Decoder(Report)


class Member:
    """A caller process and what it has told."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ready = asyncio.Event()
        self.settled = asyncio.Event()
        self.measured: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self.records: list[Record] = []
        self.fresh: list[Record] = []
        """Those that the board has not seen."""
        self.done: Done | None = None
        self.nonsense = ""
        self.process: Child

    def hear(self, line: bytes) -> None:
        """One line of the process. Never raises: what makes no sense is kept for :meth:`check`."""
        try:
            report: Report = _report.decode(line)
        except msgspec.DecodeError as error:
            self.nonsense = self.nonsense or f"{error}: {line[:200]!r}"
            return
        match report:
            case Record():
                if len(self.records) < _MOST_RECORDS:
                    self.records.append(report)
                    self.fresh.append(report)
            case Ready():
                self.ready.set()
            case Settled():
                self.settled.set()
            case Measured(seconds=seconds):
                if not self.measured.done():
                    self.measured.set_result(seconds)
            case Done():
                self.done = report

    def check(self) -> None:
        """Whether it does its part. Raises :class:`ChildFailed`."""
        if self.nonsense:
            raise self.process.failed(f"told nonsense: {self.nonsense}")
        if not self.process.running and self.done is None:
            raise self.process.failed("ended early")


async def run_mode(settings: Settings, mode: Mode, folder: Path, board: Board) -> Figures:
    """Run one mode; its logs go to ``folder``. Raises :class:`ChildFailed`; every process is gone at the end."""
    logs = folder / mode
    # Books of an earlier run would be taken up.
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    board.phase(mode, "starting")
    async with contextlib.AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(child("upstream", "paceline", ["upstream", "--port", "0"], logs))
        url = (await simulator.line_with("http://")).split()[-1]
        books = await stack.enter_async_context(upstream(url))
        others = [simulator]
        coordinator = None
        if mode == "paceline":
            server, coordinator = await stack.enter_async_context(_server(settings, logs))
            others.append(server)
        members = [Member(plan) for plan in settings.plans(mode, url, coordinator)]
        for member in members:
            member.process = await stack.enter_async_context(
                child(member.plan.tenant, "bench.fleet", [], logs, member.hear)
            )
            await member.process.tell(_encode(member.plan))
        for member in members:
            await _within(START_S, member.ready.wait(), member, "is not ready")
        # Unloaded: one call at a time, from one process, on a limit that it cannot reach.
        await books.reset(settings.upstream_config(initial=1.0), {"first_byte_ms": 0, "tokens_per_second": 0})
        first = members[0]
        await first.process.tell(_encode(Measure(OWN_CALLS)))
        own = statistics.median(await _within(START_S, first.measured, first, "measures nothing"))
        return await _measure(settings, mode, board, books, members, others, own)


async def _measure(
    settings: Settings,
    mode: Mode,
    board: Board,
    books: Upstream,
    members: list[Member],
    others: list[Child],
    own: float,
) -> Figures:
    status = board.status[mode]
    await books.reset(settings.upstream_config(settings.initial), settings.scenario())
    at = time.monotonic() + _LEAD_S
    window = (at + settings.warmup_s, at + settings.warmup_s + settings.window_s)
    start = Start(at=at, window_start=window[0], window_end=window[1], end=at + settings.total_s)
    for member in members:
        await member.process.tell(_encode(start))
    board.phase(mode, f"warming up for {settings.warmup_s:.0f} s")
    await until(window[0])
    before = await books.now()
    meter = Meter([*others, *(member.process for member in members)])
    board.phase(mode, f"measuring for {settings.window_s:.0f} s")
    while (now := time.monotonic()) < window[1]:
        await until(min(window[1], now + _LOOK_S))
        _check(members, others)
        seen = await books.now()
        status.accepted, status.refused = seen.accepted - before.accepted, seen.refused - before.refused
        _look(settings, board, mode, members)
    after = await books.now()
    busy = meter.read()
    board.phase(mode, "waiting for the last calls of the window")
    while not all(member.settled.is_set() for member in members) and time.monotonic() < start.end + _LOOK_S:
        await asyncio.sleep(0.1)
        _check(members, others)
        _look(settings, board, mode, members)
    for member in members:
        with contextlib.suppress(ChildFailed):
            await member.process.tell(_encode(Stop()))
    for member in members:
        await member.process.ended(_GRACE_S)
        member.check()
        if member.done is None or member.done.offered != len(member.records):
            told = len(member.records)
            raise member.process.failed(f"offered {member.done and member.done.offered} calls and told of {told}")
    _look(settings, board, mode, members)
    records = [record for member in members for record in member.records]
    attempts = await books.attempts(before)
    found = figures(records, attempts, before, after, settings.interactive, own)
    status.used = found.limit_used
    board.phase(mode, "done")
    return msgspec.structs.replace(
        found, busiest_core=busy.busiest, busy_cores=list(busy.cores), busy_processes=dict(busy.processes)
    )


def _check(members: list[Member], others: list[Child]) -> None:
    for member in members:
        member.check()
    for each in others:
        if not each.running:
            raise each.failed("ended early")


def _look(settings: Settings, board: Board, mode: Mode, members: list[Member]) -> None:
    for member in members:
        if member.plan.tenant in settings.interactive:
            for record in member.fresh:
                board.status[mode].add(record)
        member.fresh.clear()
    board.changed(mode)


async def _within(seconds: float, what: Awaitable[_T], member: Member, complaint: str) -> _T:
    async def ends() -> None:
        while True:
            await asyncio.sleep(0.1)
            member.check()

    watching = asyncio.create_task(ends())
    waiting = asyncio.ensure_future(what)
    try:
        await asyncio.wait({watching, waiting}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if watching.done():
            watching.result()
        raise member.process.failed(f"{complaint} after {seconds:.0f} s")
    finally:
        watching.cancel()
        waiting.cancel()


@contextlib.asynccontextmanager
async def _server(settings: Settings, logs: Path) -> AsyncIterator[tuple[Child, str]]:
    """A Paceline server with its books in a file, and its address."""
    config = logs / "paceline.yaml"
    config.write_text(settings.server_config())
    database = logs / "paceline.db"
    arguments = ["serve", "--listen", "127.0.0.1:0", "--store", f"embedded:{database}", "--config", str(config)]
    async with child("paceline", "paceline", arguments, logs) as server:
        yield server, (await server.line_with("listens on")).split()[-1]
