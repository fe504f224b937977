"""One run: a simulated upstream, a server or several, a fleet; who decides is killed, and comes back over the same
journal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.outage.books import charged
from bench.outage.fleet import Part, Report, run
from tests.proofs.process import ServerProcess

LIMITS = {"requests": 2_000, "input_tokens": 240_000, "output_tokens": 120_000}
BURST_SECONDS = 15
INITIAL = 0.2
BOUNDS = {name: {"amount": amount, "burst": amount * BURST_SECONDS // 60} for name, amount in LIMITS.items()}
RETURN_SECONDS = 10.0
END_SECONDS = 90.0
AT_DEATH = 2.0
"""Calls that were asked for by then met the death. Unit: seconds."""

CONFIG = f"""
accounts:
  default:
    provider: anthropic
    pools:
      sonnet-5: {json.dumps(BOUNDS)}
defaults: {{initial_fill: {INITIAL}}}
"""

FLEET = (
    *(Part(f"chat-{number}", "interactive", calls_per_second=1.6, max_wait=15.0, seed=number) for number in range(4)),
    *(Part(f"batch-{number}", "batch", loops=16, max_wait=40.0, seed=10 + number) for number in range(2)),
)
"""Chat wants about 40 % of the limit, the jobs all that they can get."""


@dataclass
class Phase:
    """One part of the run, by the upstream's own account."""

    name: str
    seconds: float
    used: float
    """Of the tightest limit."""
    accepted: int
    refused: int

    @property
    def per_thousand(self) -> float:
        return 1_000 * self.refused / max(1, self.accepted)


@dataclass
class Result:
    """What was measured."""

    phases: list[Phase]
    returned: Phase
    """The first seconds after the return."""
    held_up: float
    """The longest that a call was held up at the death, before it was known that nobody decides. Unit: seconds."""
    lag: float
    """The longest that a process of the fleet was itself late at that moment, for want of a core. Unit: seconds."""
    alone: int
    """Calls that were decided without a coordinator."""
    truth: dict[str, int]
    books: dict[str, int]
    left_open: int
    reports: list[Report] = field(default_factory=list)

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


class Upstream:
    """``paceline upstream`` in a process of its own."""

    def __init__(self, folder: Path, burst_seconds: float = BURST_SECONDS) -> None:
        settings = {
            "config": {
                "groups": [{"name": "claude", "models": ["claude-*"], "limits": LIMITS}],
                "burst_seconds": burst_seconds,
                "initial": INITIAL,
            },
            "scenario": {"first_byte_ms": 100, "tokens_per_second": 400},
        }
        path = folder / "upstream.json"
        path.write_text(json.dumps(settings))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paceline", "upstream", "--port", "0", "--config", str(path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if "listening on" not in line:
            raise RuntimeError(f"the simulator did not start: {line}")
        self.url = line.split()[-1]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def mark(self, name: str) -> tuple[str, float, dict[str, Any]]:
        """Remember this instant; its name, time and totals."""
        body = json.dumps({"name": name}).encode()
        request = urllib.request.Request(
            self.url + "/sim/mark", data=body, headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10):
            return name, time.monotonic(), self.get("/sim/truth")

    def phase(self, name: str, start: tuple[str, float, Any], end: tuple[str, float, Any]) -> Phase:
        """What happened between two marks."""
        used = self.get(f"/sim/used?from={start[0]}&to={end[0]}")
        parts = [each["part"] for each in used["claude"].values()]
        return Phase(
            name,
            end[1] - start[1],
            max(parts),
            end[2]["accepted"] - start[2]["accepted"],
            end[2]["refused"] - start[2]["refused"],
        )

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Site(Protocol):
    """Who decides: a server, or several with all that they need."""

    @property
    def addresses(self) -> Sequence[str]:
        """Where callers connect."""
        ...

    def start(self) -> None:
        """Returns when it serves."""
        ...

    def kill(self) -> None:
        """All of it, at once."""
        ...

    def finish(self) -> tuple[dict[str, int], int]:
        """Stop it. What all calls were charged, by dimension, and how many are open still."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class OneServer:
    """A server over a file. ``module`` is run in the place of ``paceline``."""

    def __init__(self, folder: Path, module: str = "") -> None:
        self._server = ServerProcess(folder, CONFIG, module=module)
        self.addresses = [self._server.address]
        self.start = self._server.start
        self.kill = self._server.kill
        self.close = self._server.close

    def finish(self) -> tuple[dict[str, int], int]:
        self._server.stop()
        return asyncio.run(charged(self._server.store, "default"))


@contextlib.contextmanager
def world(folder: Path, make: Callable[[Path], Site]) -> Iterator[tuple[Upstream, Site]]:
    """A simulator and who decides, both running."""
    upstream = Upstream(folder)
    try:
        site = make(folder)
        try:
            site.start()
            yield upstream, site
        finally:
            site.close()
    finally:
        upstream.close()


def measure(
    healthy: float,
    outage: float,
    after: float,
    *,
    fleet: Sequence[Part] = FLEET,
    site: Callable[[Path], Site] = OneServer,
    say: Callable[[str], None] = print,
) -> Result:
    """Run it. Times in seconds."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with world(folder, site) as (upstream, server):
            stop, queue = context.Event(), context.Queue()
            processes = [
                context.Process(
                    target=run, args=(part, upstream.url, server.addresses[number % len(server.addresses)], stop, queue)
                )
                for number, part in enumerate(fleet)
            ]
            try:
                for process in processes:
                    process.start()
                _until_busy(upstream)
                say(f"healthy for {healthy:.0f} s")
                marks = [upstream.mark("healthy")]
                time.sleep(healthy)
                marks.append(upstream.mark("death"))
                died = time.monotonic()
                server.kill()
                say(f"nobody decides; outage for {outage:.0f} s")
                time.sleep(max(0.0, died + outage - time.monotonic()))
                server.start()
                back = upstream.mark("back")
                marks.append(back)
                say(f"it is back, after {back[1] - died:.1f} s; {after:.0f} s to go")
                time.sleep(min(after, RETURN_SECONDS))
                soon = upstream.mark("soon")
                time.sleep(max(0.0, after - RETURN_SECONDS))
                marks.append(upstream.mark("end"))
                stop.set()
                reports = [queue.get(timeout=END_SECONDS) for _ in processes]
            finally:
                stop.set()
                _end(processes)
            truth = upstream.get("/sim/truth")["groups"]["claude"]
            books, left_open = server.finish()
            names = ("healthy", "outage", "after")
            phases = [
                upstream.phase(each, start, end) for each, start, end in zip(names, marks, marks[1:], strict=False)
            ]
            alone = [entry for report in reports for entry in report.alone]
            return Result(
                phases,
                upstream.phase("return", back, soon),
                max((decided - max(asked, died) for asked, decided in alone if asked < died + AT_DEATH), default=0.0),
                max((lag for report in reports for at, lag in report.lags if died < at < died + AT_DEATH), default=0.0),
                len(alone),
                {
                    "requests": truth["accepted"],
                    "input_tokens": truth["input_tokens"] + truth["cache_write_tokens"],
                    "output_tokens": truth["output_tokens"],
                },
                books,
                left_open,
                reports,
            )


def _until_busy(upstream: Upstream) -> None:
    """Every process has loaded the SDK: calls come, and the opening burst is spent."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        if upstream.get("/sim/truth")["accepted"] >= 40:
            return
        time.sleep(0.2)
    raise RuntimeError("the fleet does not call")


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.terminate()
            process.join(5)
