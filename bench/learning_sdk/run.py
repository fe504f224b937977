"""One row from start to end: upstream, server, fleet, what happens in mid-run, and what was seen of it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench.demo.books import Attempt, Mark, until
from bench.demo.children import Child, ChildFailed, child
from bench.demo.machine import Busy, Meter
from bench.demo.runner import Member
from bench.fleet.plan import Record, Start, Stop
from bench.learning_sdk.journal import Learned, learned
from bench.learning_sdk.rows import Event, Row
from bench.learning_sdk.truth import Part, Sample, Truth, truth
from bench.learning_sdk.want import Want
from tests.proofs.process import ServerProcess

SAMPLE_S = 0.5
READY_S = 90.0
"""For all processes of the fleet to load the SDK, on a machine that has other work."""
_LEAD_S = 1.0
"""From the order to start to the start."""
_GRACE_S = 15.0
_LINE_EVERY_S = 20.0
_FIRST, _LAST = "start", "end"

Say = Callable[[str], None]
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Happened:
    """An event, and the instants between which it was done: µs of the monotonic clock."""

    event: Event
    since: int
    until: int
    gone: int = 0
    """When a server that was ended was gone."""


@dataclass(slots=True)
class Seen:
    """All that is known of a run. Instants are µs of the monotonic clock, but for those of ``learned``."""

    begun: int
    """When the first calls were offered."""
    start: Sample
    end: Sample
    """Of the window."""
    used: dict[str, Part]
    attempts: list[Attempt]
    """That arrived in the window."""
    samples: list[Sample]
    happened: list[Happened]
    learned: Learned
    ledger_offset: int
    """The ledger's time less the monotonic one, µs."""
    records: list[Record]
    busy: Busy
    want: dict[str, float]
    """See :class:`bench.learning_sdk.want.Want`."""
    failed: list[str] = field(default_factory=list)


async def run(row: Row, seed: int, folder: Path, say: Say) -> Seen:
    """Run one row; its logs and the journal are left in ``folder``. Every process is gone at the end.

    Raises :class:`ChildFailed`, :class:`tests.proofs.process.ServerDied`, and errors of the upstream's side endpoints.
    """
    _empty(folder)
    async with contextlib.AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(child("upstream", "paceline", ["upstream", "--port", "0"], folder))
        url = (await simulator.line_with("http://")).split()[-1]
        books = await stack.enter_async_context(truth(url))
        server = await stack.enter_async_context(_server(folder, row.server_config()))
        members = []
        for plan in row.plans(seed, url, server.address):
            member = Member(plan)
            member.process = await stack.enter_async_context(child(plan.tenant, "bench.fleet", [], folder, member.hear))
            await member.process.tell(_encode(plan))
            members.append(member)
        for member in members:
            await _ready(member)
        return await _Measured(row, seed, books, server, members, simulator, say).run()


class _Measured:
    """The part of a run in which calls are made."""

    def __init__(
        self,
        row: Row,
        seed: int,
        books: Truth,
        server: ServerProcess,
        members: list[Member],
        simulator: Child,
        say: Say,
    ) -> None:
        self._row = row
        self._seed = seed
        self._books = books
        self._server = server
        self._members = members
        self._simulator = simulator
        self._say = say
        self._samples: list[Sample] = []
        self._line_at = 0.0

    async def run(self) -> Seen:
        row, books = self._row, self._books
        await books.reset(row.upstream_config(self._seed), row.scenario())
        offset = (time.time_ns() - time.monotonic_ns()) // 1_000
        at = time.monotonic() + _LEAD_S
        window = at + row.warmup_s
        end = window + row.window_s
        # Calls go on while the books are read.
        orders = Start(at=at, window_start=window, window_end=end, end=end + _GRACE_S)
        for member in self._members:
            await member.process.tell(_encode(orders))
        await self._watch(window, "warm-up")
        start = await books.mark(_FIRST)
        meter = Meter([self._simulator, *(member.process for member in self._members)])
        callers = {member.process.name: member.process.usage.pid for member in self._members}
        want = Want({"upstream": self._simulator.usage.pid, "server": self._server.pid, **callers})
        happened = []
        for event in row.events:
            await self._watch(window + event.at_s, "window")
            # The upstream is looked at meanwhile: a server takes a second or two to come back.
            async with asyncio.TaskGroup() as group:
                doing = group.create_task(self._do(event))
                while not doing.done():
                    await self._watch(time.monotonic() + SAMPLE_S, "window")
            happened.append(doing.result())
        await self._watch(end, "window")
        last = await books.mark(_LAST)
        used = await books.used(_FIRST, _LAST)
        busy, wanted = meter.read(), want.read()
        log = await books.attempts(Mark(start.now_us, start.calls, 0, 0, {}))
        failed = await self._stop()
        # Nothing more is to be written: a server that ends in order writes a snapshot in the place of its journal.
        await asyncio.to_thread(self._server.kill)
        return Seen(
            round(at * 1e6),
            start,
            last,
            used,
            [each for each in log if each.number <= last.calls],
            self._samples,
            happened,
            await learned(self._server.store, row.binding),
            offset,
            [record for member in self._members for record in member.records],
            busy,
            wanted,
            failed,
        )

    async def _watch(self, instant: float, phase: str) -> None:
        """Look at the upstream until then. Raises :class:`ChildFailed` when a process has ended."""
        while (now := time.monotonic()) < instant:
            sample = await self._books.look()
            self._samples.append(sample)
            for member in self._members:
                member.check()
            if not self._simulator.running:
                raise self._simulator.failed("ended early")
            if now >= self._line_at:
                self._line_at = now + _LINE_EVERY_S
                self._say(f"  {phase}: {sample.accepted:,} accepted, {sample.refused:,} refused so far")
            await until(min(instant, now + SAMPLE_S))

    async def _do(self, event: Event) -> Happened:
        since, gone = time.monotonic_ns() // 1_000, 0
        if event.kind == "limits":
            self._say(f"  the limits are {event.part:.0%} of the first ones")
            amounts = {name: round(event.part * amount) for name, amount in self._row.limits.items()}
            await self._books.limits(amounts)
        else:
            end = self._server.kill if event.kind == "kill" else self._server.stop
            await asyncio.to_thread(end)
            gone = time.monotonic_ns() // 1_000
            await asyncio.to_thread(self._server.start)
            back = (time.monotonic_ns() // 1_000 - gone) / 1e6
            self._say(f"  the server took {(gone - since) / 1e6:.1f} s to end, and serves again {back:.1f} s later")
        return Happened(event, since, time.monotonic_ns() // 1_000, gone)

    async def _stop(self) -> list[str]:
        """End the fleet. What its processes did wrong, in words."""
        wrong = []
        for member in self._members:
            with contextlib.suppress(ChildFailed):
                await member.process.tell(_encode(Stop()))
        for member in self._members:
            try:
                await member.process.ended(_GRACE_S)
                member.check()
            except ChildFailed as error:
                wrong.append(str(error))
        return wrong


async def _ready(member: Member) -> None:
    try:
        async with asyncio.timeout(READY_S):
            while not member.ready.is_set():
                member.check()
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise member.process.failed(f"is not ready after {READY_S:.0f} s") from None


def _empty(folder: Path) -> None:
    """Books of an earlier run would be taken up."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextlib.asynccontextmanager
async def _server(folder: Path, config: str) -> AsyncIterator[ServerProcess]:
    """A server over a journal in ``folder``, killed at the end."""
    process = ServerProcess(folder, config)
    try:
        await asyncio.to_thread(process.start)
        yield process
    finally:
        await asyncio.to_thread(process.close)
