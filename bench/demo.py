"""``make demo``: eight services, one small quota.

A server with a pool of 300 requests and 300,000 input tokens a minute, and eight processes that all want more than
their part. Nobody meets a limit: whoever does not fit waits its turn. At the end the books are held against what the
limit allowed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bench.server_process import server
from paceline_client import Client, Denied

MODEL = "claude-sonnet-5"
REQUESTS, TOKENS = 300, 300_000
CONFIG = f"""
accounts:
  default:
    provider: anthropic
    pools:
      sonnet-5: {{requests: {REQUESTS}, input_tokens: {TOKENS}, output_tokens: {TOKENS}}}
defaults: {{initial_fill: 0.2}}
"""
SERVICES = ("chat", "search", "support", "drafts", "review", "tagging", "nightly", "reports")

Event = tuple[str, str, float, int]
"""(service, "granted" or "denied", seconds waited, input tokens)."""


def service(name: str, address: str, seconds: float, seed: int, events: Queue[Event]) -> None:
    """One service: calls one after the other, each within a deadline of 20 s."""
    chance = random.Random(seed)
    end = time.monotonic() + seconds
    with Client(address) as paceline:
        while time.monotonic() < end:
            tokens = min(8_000, int(chance.lognormvariate(6.6, 0.8)))
            left = max(0.1, end - time.monotonic())
            began = time.monotonic()
            try:
                with paceline.reserve(
                    model=MODEL, input_tokens=tokens, output_tokens=150, tenant=name, max_wait=min(20.0, left)
                ) as grant:
                    waited = time.monotonic() - began
                    time.sleep(chance.uniform(0.05, 0.3))  # the API call
                    grant.commit_usage(input_tokens=tokens, output_tokens=chance.randint(20, 280))
            except Denied as denied:
                events.put((name, "denied", time.monotonic() - began, 0))
                time.sleep(min(left, denied.retry_after or 1.0))
            else:
                events.put((name, "granted", waited, tokens))


class Tally:
    """What has happened so far."""

    def __init__(self) -> None:
        self.granted = dict.fromkeys(SERVICES, 0)
        self.denied = dict.fromkeys(SERVICES, 0)
        self.waited = dict.fromkeys(SERVICES, 0.0)
        self.tokens = dict.fromkeys(SERVICES, 0)

    def add(self, event: Event) -> None:
        name, what, waited, tokens = event
        if what == "granted":
            self.granted[name] += 1
            self.waited[name] += waited
            self.tokens[name] += tokens
        else:
            self.denied[name] += 1

    def table(self, elapsed: float) -> Table:
        allowed = int((0.2 + elapsed / 60) * REQUESTS)
        table = Table(title=f"{elapsed:4.0f} s: {sum(self.granted.values())} calls granted, {allowed} allowed so far")
        for column in ("service", "granted", "mean wait", "input tokens", "out of time"):
            table.add_column(column, justify="left" if column == "service" else "right")
        for name in SERVICES:
            calls = self.granted[name]
            table.add_row(
                name,
                str(calls),
                f"{self.waited[name] / calls:.2f} s" if calls else "",
                f"{self.tokens[name]:,}",
                str(self.denied[name]),
            )
        return table


def run(seconds: float) -> int:
    console = Console()
    console.print(f"A pool of {REQUESTS} requests and {TOKENS:,} input tokens a minute, a fifth full, and 8 services.")
    tally = Tally()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "demo.yaml"
        config.write_text(CONFIG)
        with server(f"embedded:{folder}/demo.db", config) as running:
            events: Queue[Event] = context.Queue()
            seed = random.SystemRandom().randrange(1 << 30)
            fleet = [
                context.Process(target=service, args=(name, running.address, seconds, seed + number, events))
                for number, name in enumerate(SERVICES)
            ]
            began = time.monotonic()
            for process in fleet:
                process.start()
            with Live(tally.table(0), console=console, refresh_per_second=4) as live:
                while any(process.is_alive() for process in fleet) or not events.empty():
                    while not events.empty():
                        tally.add(events.get())
                    live.update(tally.table(time.monotonic() - began))
                    time.sleep(0.1)
            elapsed = time.monotonic() - began
            for process in fleet:
                process.join()
    calls = sum(tally.granted.values())
    allowed = int((0.2 + elapsed / 60) * REQUESTS)
    console.print(
        f"{calls} calls granted of {allowed} that the limit allowed in {elapsed:.0f} s ({calls / allowed:.0%}); "
        f"seed {seed}."
    )
    return 0 if 0 < calls <= allowed and not any(process.exitcode for process in fleet) else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    sys.exit(run(parser.parse_args().seconds))


if __name__ == "__main__":
    main()
