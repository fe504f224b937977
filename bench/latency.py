"""Added latency of Reserve and Commit through the Python client, in a pool at 20 % load.

Calls arrive at a steady rate that is a fifth of the pool's limit; nothing else is in the way, so whatever a caller
waits is what Paceline costs. Timed are: entering the block (Reserve, answered after its journal append), leaving it
after ``grant.commit(...)`` (which hands the Commit over), and the two together. Server and callers are separate
processes, the journal is on::

    python -m bench.latency [--seconds 20] [--rate 50]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from bench.server_process import server
from paceline_client import AsyncClient, Client

CONFIG = """
accounts:
  default:
    provider: anthropic
    pools:
      sonnet-5:
        requests: {requests}
        input_tokens: {input_tokens}
        output_tokens: {output_tokens}
defaults: {{initial_fill: 1.0}}
"""
INPUT, OUTPUT = 1_000, 200


class Times:
    """Seconds that callers saw."""

    def __init__(self) -> None:
        self.reserve: list[float] = []
        self.commit: list[float] = []

    def line(self, name: str) -> str:
        both = [one + other for one, other in zip(self.reserve, self.commit, strict=True)]
        return (
            f"{name:>6}: {len(both):,} calls; Reserve + Commit p50 {_ms(both, 50):.2f} ms, p99 {_ms(both, 99):.2f} ms "
            f"(Reserve p50 {_ms(self.reserve, 50):.2f}, p99 {_ms(self.reserve, 99):.2f}; "
            f"Commit p50 {_ms(self.commit, 50):.3f}, p99 {_ms(self.commit, 99):.3f})"
        )


def _ms(seconds: list[float], percentile: int) -> float:
    return statistics.quantiles(seconds, n=100)[percentile - 1] * 1e3


def sync_calls(address: str, seconds: float, rate: float) -> Times:
    """Callers in threads of one process, sharing one client."""
    times, lock = Times(), threading.Lock()
    with Client(address) as paceline, ThreadPoolExecutor(16) as pool:

        def call() -> None:
            began = time.perf_counter()
            with paceline.reserve(model="claude-sonnet-5", input_tokens=INPUT, output_tokens=OUTPUT) as grant:
                granted = time.perf_counter()
                time.sleep(0.05)
                called = time.perf_counter()
                grant.commit_usage(input_tokens=INPUT, output_tokens=OUTPUT)
            ended = time.perf_counter()
            with lock:
                times.reserve.append(granted - began)
                times.commit.append(ended - called)

        start = time.monotonic()
        futures = []
        for number in range(int(seconds * rate)):
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            futures.append(pool.submit(call))
        for future in futures:
            future.result()
    return times


async def async_calls(address: str, seconds: float, rate: float) -> Times:
    """Callers as tasks of one loop."""
    times = Times()
    async with AsyncClient(address) as paceline, asyncio.TaskGroup() as group:

        async def call() -> None:
            began = time.perf_counter()
            async with paceline.reserve(model="claude-sonnet-5", input_tokens=INPUT, output_tokens=OUTPUT) as grant:
                granted = time.perf_counter()
                await asyncio.sleep(0.05)
                called = time.perf_counter()
                grant.commit_usage(input_tokens=INPUT, output_tokens=OUTPUT)
            times.reserve.append(granted - began)
            times.commit.append(time.perf_counter() - called)

        start = time.monotonic()
        for number in range(int(seconds * rate)):
            await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
            group.create_task(call())
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=50.0, help="calls a second; the pool's limit is five times that")
    arguments = parser.parse_args()
    limit = int(arguments.rate * 5 * 60)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "bench.yaml"
        config.write_text(CONFIG.format(requests=limit, input_tokens=limit * INPUT, output_tokens=limit * OUTPUT))
        with server(f"embedded:{folder}/bench.db", config) as running:
            psutil.cpu_percent(percpu=True)
            print(sync_calls(running.address, arguments.seconds, arguments.rate).line("sync"), flush=True)
            print(asyncio.run(async_calls(running.address, arguments.seconds, arguments.rate)).line("async"))
            busy = psutil.cpu_percent(percpu=True)
    print(
        f"cores busy: {', '.join(f'{core:.0f} %' for core in busy)}"
        + (" (invalid: above 85 %)" if max(busy) > 85 else "")
    )


if __name__ == "__main__":
    main()
