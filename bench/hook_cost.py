"""What the hook costs the application: CPU per call, and the time to the first event of a stream.

The Anthropic SDK without the hook and with it take turns, round by round, in one process on one core. The simulated
upstream, which answers at once, and the server, whose pool nobody can exhaust and whose journal is on, are processes of
their own on another core. CPU is that of the whole process, the client's threads and its last reports included. What
the hook holds a stream up by, besides the reservation, is the time to its first event less the reservation's own less
the bare SDK's::

    python -m bench.hook_cost [--rounds 8] [--calls 40] [--streams 5]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from anthropic import Anthropic, AsyncAnthropic

from bench.server_process import server
from paceline_client import AsyncClient, Client
from paceline_client._grant import Grant
from paceline_client.hooks.anthropic import PacelineMiddleware

REQUESTS, INPUT, OUTPUT = 100_000_000, 100_000_000_000, 100_000_000_000
CONFIG = f"""
accounts:
  default:
    provider: anthropic
    pools:
      sonnet-5:
        requests: {REQUESTS}
        input_tokens: {INPUT}
        output_tokens: {OUTPUT}
defaults: {{initial_fill: 1.0}}
"""
READY = "listening on "
SENTENCE = "How far is it from here to there, and how long would somebody take who walks? "
TOKENS_PER_SENTENCE = 22
"""By the simulator's count."""
SPEED = 2_000
"""Of a stream, in tokens a second: about two in each event."""


class Workload(NamedTuple):
    """One kind of call. Sizes in tokens."""

    name: str
    input: int
    output: int
    stream: bool = False

    @property
    def ask(self) -> dict[str, Any]:
        return {
            "model": "claude-sonnet-5",
            "max_tokens": 1_024,
            "messages": [{"role": "user", "content": SENTENCE * max(1, self.input // TOKENS_PER_SENTENCE)}],
            "metadata": {"user_id": f"paceline-sim:output={self.output}"},
        }


WORKLOADS = (
    Workload("JSON, small", 22, 20),
    Workload("JSON, 8k prompt", 8_000, 20),
    Workload("stream of 200", 22, 200, stream=True),
)


class TimedClient(Client):
    """Notes how long each reservation took, in seconds."""

    reserved: list[float]

    def acquire(self, **ask: Any) -> Grant:
        began = time.perf_counter()
        try:
            return super().acquire(**ask)
        finally:
            self.reserved.append(time.perf_counter() - began)


class TimedAsyncClient(AsyncClient):
    """The same for asyncio."""

    reserved: list[float]

    async def acquire(self, **ask: Any) -> Grant:
        began = time.perf_counter()
        try:
            return await super().acquire(**ask)
        finally:
            self.reserved.append(time.perf_counter() - began)


@dataclass
class Times:
    """Of the calls of one kind, in seconds."""

    cpu: list[float] = field(default_factory=list)
    """Per call; one for each round."""
    wall: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """To the first event."""
    events: int = 0
    """Of the last stream."""


class Round(NamedTuple):
    """Where the calls of one round go to, and how many there are."""

    workload: Workload
    calls: int
    times: Times

    def called(self, began: float, first: float, events: int) -> None:
        self.times.wall.append(time.perf_counter() - began)
        if events:
            self.times.first.append(first - began)
            self.times.events = events


def calls(client: Anthropic, paceline: Client | None, this: Round) -> None:
    """One round in this thread."""
    ask = this.workload.ask
    gc.collect()
    used = time.process_time()
    for _ in range(this.calls):
        began, first, events = time.perf_counter(), 0.0, 0
        if this.workload.stream:
            with client.messages.create(**ask, stream=True) as stream:
                for _event in stream:
                    first = first or time.perf_counter()
                    events += 1
        else:
            client.messages.create(**ask)
        this.called(began, first, events)
    if paceline is not None:
        paceline.flush()
    this.times.cpu.append((time.process_time() - used) / this.calls)


async def calls_async(client: AsyncAnthropic, paceline: AsyncClient | None, this: Round) -> None:
    """One round in asyncio."""
    ask = this.workload.ask
    gc.collect()
    used = time.process_time()
    for _ in range(this.calls):
        began, first, events = time.perf_counter(), 0.0, 0
        if this.workload.stream:
            async with await client.messages.create(**ask, stream=True) as stream:
                async for _event in stream:
                    first = first or time.perf_counter()
                    events += 1
        else:
            await client.messages.create(**ask)
        this.called(began, first, events)
    if paceline is not None:
        await paceline.flush()
    this.times.cpu.append((time.process_time() - used) / this.calls)


@dataclass
class Comparison:
    """One workload without and with the hook."""

    workload: Workload
    bare: Times = field(default_factory=Times)
    hook: Times = field(default_factory=Times)
    reserved: list[float] = field(default_factory=list)

    def cost(self, mode: str) -> str:
        """A line of the table of CPU."""
        pairs = list(zip(self.bare.cpu, self.hook.cpu, strict=True))
        bare, hook = statistics.median(self.bare.cpu), statistics.median(self.hook.cpu)
        more = sorted(with_it - without for without, with_it in pairs)
        return (
            f"{mode:<6}{self.workload.name:<17}{bare * 1e6:>8,.0f}{hook * 1e6:>8,.0f}"
            f"{statistics.median(more) * 1e6:>8,.0f}  ({more[0] * 1e6:,.0f} to {more[-1] * 1e6:,.0f})".ljust(65)
            + f"{hook / bare:>6.2f}{_p50(self.bare.wall):>10.2f}{_p50(self.hook.wall):>8.2f}"
            f"{_p50(self.reserved):>12.2f}"
        )

    def delay(self, mode: str) -> str:
        """A line of the table of first events."""
        own = [first - reserved for first, reserved in zip(self.hook.first, self.reserved, strict=True)]
        return (
            f"{mode:<6}{_p50(self.bare.first):>10.2f}{_p50(self.hook.first):>12.2f}{_p50(self.reserved):>14.2f}"
            f"{_p50(own):>16.2f}{_p50(own) - _p50(self.bare.first):>+12.2f}{self.hook.events:>10}"
        )


def compare(url: str, address: str, rounds: int, count: int, streams: int) -> list[Comparison]:
    """Blocking callers."""
    found = [Comparison(workload) for workload in WORKLOADS]
    with TimedClient(address) as paceline:
        hook = PacelineMiddleware(paceline, tenant="bench", route="bench")
        options: dict[str, Any] = {"api_key": "any", "base_url": url, "max_retries": 0}
        with Anthropic(**options) as bare, Anthropic(**options, middleware=[hook]) as hooked:
            for number in range(rounds + 1):
                for each in found:
                    # The first round only warms up.
                    into = each if number else Comparison(each.workload)
                    paceline.reserved = into.reserved
                    amount = streams if each.workload.stream else count
                    pace(url, each.workload)
                    calls(bare, None, Round(each.workload, amount, into.bare))
                    calls(hooked, paceline, Round(each.workload, amount, into.hook))
    return found


async def compare_async(url: str, address: str, rounds: int, count: int, streams: int) -> list[Comparison]:
    """Callers in asyncio."""
    found = [Comparison(workload) for workload in WORKLOADS]
    async with TimedAsyncClient(address) as paceline:
        hook = PacelineMiddleware(paceline, tenant="bench", route="bench")
        options: dict[str, Any] = {"api_key": "any", "base_url": url, "max_retries": 0}
        async with AsyncAnthropic(**options) as bare, AsyncAnthropic(**options, middleware=[hook]) as hooked:
            for number in range(rounds + 1):
                for each in found:
                    into = each if number else Comparison(each.workload)
                    paceline.reserved = into.reserved
                    amount = streams if each.workload.stream else count
                    await asyncio.to_thread(pace, url, each.workload)
                    await calls_async(bare, None, Round(each.workload, amount, into.bare))
                    await calls_async(hooked, paceline, Round(each.workload, amount, into.hook))
    return found


@contextlib.contextmanager
def upstream(core: int) -> Iterator[str]:
    """A simulated upstream in a process of its own; its address."""
    command = [sys.executable, "-m", "paceline", "upstream", "--port", "0", "--scenario", "first_byte_ms=0"]
    command += ["--scenario", "tokens_per_second=0", "--scenario", "chunk_ms=1"]
    command += ["--limit", f"requests={REQUESTS}", "--limit", f"input_tokens={INPUT}"]
    command += ["--limit", f"output_tokens={OUTPUT}"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if READY not in line:
            raise RuntimeError("the simulated upstream did not start")
        os.sched_setaffinity(child.pid, {core})
        yield line.split()[-1]
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def pace(url: str, workload: Workload) -> None:
    """Streams come in many events, other answers at once."""
    speed = SPEED if workload.stream else 0
    request = urllib.request.Request(
        f"{url}/sim/scenario", json.dumps({"tokens_per_second": speed}).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=10):
        pass


def _p50(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calls", type=int, default=40, help="JSON calls in a round")
    parser.add_argument("--streams", type=int, default=5, help="streams in a round")
    arguments = parser.parse_args()
    for name in ("ADDRESS", "TOKEN", "DISABLED", "MODE", "POLICY"):
        os.environ.pop(f"PACELINE_{name}", None)
    cores = sorted(os.sched_getaffinity(0))
    sizes = (arguments.rounds, arguments.calls, arguments.streams)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "bench.yaml"
        config.write_text(CONFIG)
        with server(f"embedded:{folder}/bench.db", config, cores[0]) as running, upstream(cores[0]) as url:
            os.sched_setaffinity(0, {cores[-1]})
            psutil.cpu_percent(percpu=True)
            found = {
                "sync": compare(url, running.address, *sizes),
                "async": asyncio.run(compare_async(url, running.address, *sizes)),
            }
            busy = psutil.cpu_percent(percpu=True)
    print(f"{'':23}{'CPU of the client, µs a call':^42}{'':6}{'wall, p50, ms':^18}{'reservation,':>12}")
    print(f"{'':23}{'bare':>8}{'hook':>8}{'more':>8}{'':18}{'ratio':>6}{'bare':>10}{'hook':>8}{'p50, ms':>12}")
    for mode, comparisons in found.items():
        for each in comparisons:
            print(each.cost(mode))
    print("\nFirst event of a stream, p50, ms")
    print(f"{'':6}{'bare':>10}{'hook':>12}{'reservation':>14}{'hook without it':>16}{'more':>12}{'events':>10}")
    for mode, comparisons in found.items():
        for each in comparisons:
            if each.workload.stream:
                print(each.delay(mode))
    print(
        f"\ncores busy: {', '.join(f'{core:.0f} %' for core in busy)}"
        + (" (invalid for waiting: above 85 %)" if max(busy) > 85 else "")
    )


if __name__ == "__main__":
    main()
