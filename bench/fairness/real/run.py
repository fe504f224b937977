"""One run: a Redis, three servers, a client process on each of them; and what they saw."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.fairness.real.caller import Log, now
from bench.fairness.real.replay import Replayed, Seen, replay
from bench.fairness.real.rows import Row
from bench.fairness.setup import CLASSES
from bench.learning_sdk.want import Want
from tests.proofs.process import ROOT
from tests.replicas.fleet import LEDGER, Fleet
from tests.replicas.redis_server import RedisServer

SERVERS = 3
CONNECT_SECONDS = 5.0
"""For the clients to start, before the first call."""
END_SECONDS = 30.0
TOLD_SECONDS = 10.0
"""Between two lines of progress."""
_NO_LIMIT = 1_000_000_000_000

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ran:
    """A run. ``want``: see :class:`bench.learning_sdk.want.Want`, in the window."""

    replayed: Replayed
    faults: list[str]
    want: dict[str, float]


def config(row: Row) -> str:
    """Of the servers: the limits of the row by hand, full at the start, and its shares."""
    pools = {
        name: {
            "requests": {"amount": limits.amounts[0], "burst": limits.bursts[0]},
            "input_tokens": {"amount": limits.amounts[1], "burst": limits.bursts[1]},
            "output_tokens": _NO_LIMIT,
            "learn": False,
        }
        for name, limits in row.pools.items()
    }
    shares = {name: {"weight": weight, "tenants": [f"{name}-*"]} for name, weight in row.shares.items()}
    classes = {
        priority.name.lower(): {"weight": weight, "minimum": minimum / 1_000}
        for priority, (weight, minimum) in CLASSES.items()
    }
    account = {"provider": "anthropic", "monthly_spend_cap": "unlimited", "pools": pools}
    # What is JSON is YAML.
    return "\n".join(
        f"{name}: {json.dumps(value)}"
        for name, value in {
            "log_level": "info",
            "accounts": {LEDGER: account},
            "defaults": {"initial_fill": 1.0},
            "priorities": classes,
            "shares": shares,
        }.items()
    )


def run(row: Row, seed: int, part: float, say: Say) -> Ran:
    """Run a row, for ``part`` of its usual time. Raises ``AssertionError`` and
    :class:`~tests.proofs.process.ServerDied` if a process cannot start or ends by itself."""
    warmup_us, window_us = (round(seconds * part * 1e6) for seconds in (row.warmup_s, row.window_s))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with RedisServer() as store, Fleet(folder, SERVERS, config(row), store.url, module="") as fleet:
            start = now() + round(CONNECT_SECONDS * 1e6)
            begin, end = start + warmup_us, start + warmup_us + window_us
            with _Clients(folder, fleet.addresses, row.name, seed, start, end) as clients:
                processes = {server.name: server.pid for server in fleet.servers} | clients.pids | {"redis": store.pid}
                clients.wait_until(begin, (start, end), say)
                want = Want(processes)
                clients.wait_until(end, (start, end), say)
                wanted = want.read()
                logs = clients.logs()
            faults = [fault for log in logs for fault in log.faults] + fleet.faults()
            faults += [f"{server.name} has ended" for server in fleet.servers if not server.running]
    calls: list[Seen] = [seen for log in logs for seen in log.calls]
    if not any(seen.granted_at for seen in calls):
        faults.append("no call was granted")
    return Ran(replay(calls, row.pools, start, begin, end), faults, wanted)


class _Clients:
    """The client processes of a run. A context manager that leaves none behind."""

    def __init__(self, folder: Path, addresses: Sequence[str], row: str, seed: int, begin: int, end: int) -> None:
        self._paths = [folder / f"caller-{place}" for place in range(len(addresses))]
        self._counts: list[Counter[str]] = [Counter() for _ in addresses]
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []
        self._told = time.monotonic()
        for place, address in enumerate(addresses):
            command = [sys.executable, "-m", "bench.fairness.real.caller", "--address", address, "--row", row]
            command += ["--seed", str(seed), "--place", str(place), "--of", str(len(addresses))]
            command += ["--begin", str(begin), "--end", str(end), "--log", str(self._paths[place])]
            self._processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
            self._threads.append(threading.Thread(target=self._listen, args=(place,), daemon=True))
            self._threads[-1].start()

    def __enter__(self) -> _Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for process, thread in zip(self._processes, self._threads, strict=True):
            thread.join(5)
            if process.stdout is not None:
                process.stdout.close()

    @property
    def pids(self) -> dict[str, int]:
        """By name."""
        return {f"client {place}": process.pid for place, process in enumerate(self._processes)}

    def wait_until(self, instant: int, span: tuple[int, int], say: Say) -> None:
        """Tell how far the run is meanwhile. Raises ``AssertionError`` if a client ends before its time."""
        while (left := instant - now()) > 0:
            time.sleep(min(left / 1e6, 0.5))
            ended = [process.poll() for process in self._processes if process.poll() is not None]
            assert not ended or now() >= span[1], f"a client ended with code {ended}"
            if time.monotonic() >= self._told + TOLD_SECONDS:
                self._told = time.monotonic()
                all_of = sum(self._counts, Counter[str]())
                waiting = all_of["offered"] - all_of["granted"] - all_of["denied"]
                say(
                    f"  {max(0, now() - span[0]) / 1e6:.0f} of {(span[1] - span[0]) / 1e6:.0f} s: "
                    f"{all_of['granted']:,} granted, {all_of['denied']:,} denied, {waiting:,} waiting"
                )

    def logs(self) -> list[Log]:
        """What they saw, once they have ended."""
        codes = [process.wait(END_SECONDS) for process in self._processes]
        assert not any(codes), f"clients ended with codes {codes}"
        return [msgspec.msgpack.decode(path.read_bytes(), type=Log) for path in self._paths]

    def _listen(self, place: int) -> None:
        stdout = self._processes[place].stdout
        assert stdout is not None
        for line in stdout:
            self._counts[place] = Counter(json.loads(line))
