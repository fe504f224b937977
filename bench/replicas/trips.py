"""``make bench-replicas``: what the shared journal costs: round trips, throughput, waits.

Callers in one process call again as soon as they are answered, over Sessions with all servers. A round trip is one
script or command that Redis was sent by any of the servers, those that keep the leases and follow the journal
included; commands within scripts are not counted. The table has the same load on one process with SQLite.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis

from bench.replicas.site import end, parser, say, site
from tests.replicas.checks import percentile
from tests.replicas.fleet import AMPLE, Clients, Fleet, pool_config
from tests.replicas.logbook import read

MOST_TRIPS = {64: 200.0, 1_024: 40.0}
"""By callers: round trips for 1,000 pairs."""
_SENT = ("evalsha", "eval", "fcall", "evalsha_ro", "eval_ro", "script|load", "multi", "exec")
"""What a client sends. Other commands are scripts' own, or rare."""


@dataclass
class Measured:
    """One load on one fleet."""

    pairs: float
    """A second."""
    waits: list[int]
    """Of Reserves and Commits, µs."""
    trips: float
    """For 1,000 pairs."""
    appends: float
    """Of them those that write a record."""
    idle: float
    """A second, of an idle fleet."""
    cpu: float
    """Of the busiest core."""

    def line(self, name: str) -> str:
        p50, p99 = (percentile(self.waits, percent) / 1e3 for percent in (50, 99))
        return (
            f"{name:<28}{self.pairs:>9,.0f}{p50:>10.1f}{p99:>10.1f}"
            f"{self.trips:>14.1f}{self.appends:>10.1f}{self.idle:>10.0f}{self.cpu:>8.0f} %"
        )


HEADER = (
    f"{'':<28}{'pairs/s':>9}{'p50, ms':>10}{'p99, ms':>10}{'trips/1,000':>14}{'appends':>10}{'idle/s':>10}{'core':>9}"
)


def sent(client: redis.Redis | None, *names: str) -> int:
    """Round trips so far; or how often these commands ran."""
    if client is None:
        return 0
    stats = client.info("commandstats")
    return sum(int(stats[f"cmdstat_{name}"]["calls"]) for name in names or _SENT if f"cmdstat_{name}" in stats)


@contextlib.contextmanager
def fleet(servers: int) -> Iterator[tuple[Path, Fleet, redis.Redis | None]]:
    """``0`` servers: one, over SQLite."""
    if servers:
        with site(servers=servers, module="") as on, on.client() as client:
            on.recorder.stop()
            yield on.folder, on.fleet, client
    else:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with Fleet(folder, 1, pool_config(AMPLE), f"embedded:{folder}/ledgers.db", module="") as found:
                yield folder, found, None


def measure(servers: int, callers: int, seconds: float, seed: int) -> Measured:
    """One line of the table."""
    with fleet(servers) as (folder, found, client):
        with Clients(folder, found.addresses, seed=seed, deadline=30) as warm:
            warm.callers(64)
            warm.flowing(500)
            warm.stop()
        time.sleep(1.0)
        before, began = sent(client), time.monotonic()
        time.sleep(2.0)
        idle = (sent(client) - before) / (time.monotonic() - began)
        with Clients(folder, found.addresses, seed=seed + 1, deadline=30) as clients:
            clients.callers(callers)
            clients.flowing(callers)
            time.sleep(1.0)
            psutil.cpu_percent(percpu=True)
            before, pairs, began = sent(client), clients.pairs, time.monotonic()
            records = sent(client, "xadd")
            start = time.monotonic_ns() // 1_000
            time.sleep(seconds)
            trips, done, took = sent(client) - before, clients.pairs - pairs, time.monotonic() - began
            records = sent(client, "xadd") - records
            stop = time.monotonic_ns() // 1_000
            cores = psutil.cpu_percent(percpu=True)
            logs = clients.stop()
        waits = [
            entry.answered - entry.asked
            for entry in read(logs)
            if entry.kind in ("grant", "commit") and start <= entry.answered <= stop
        ]
        assert not found.faults(), found.faults()
    return Measured(done / took, waits, 1_000 * trips / done, 1_000 * records / done, idle, max(cores))


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--seconds", type=float, default=5.0)
    asked.add_argument("--callers", type=int, nargs="+", default=[64, 1_024])
    options = asked.parse_args()
    faults: list[str] = []
    for callers in options.callers:
        say(f"{callers:,} calls in flight")
        say(HEADER)
        for servers in (0, 1, 2, 3):
            name = "embedded" if not servers else f"Redis, {servers} process{'es' * (servers > 1)}"
            measured = measure(servers, callers, options.seconds, options.seed)
            say(measured.line(name))
            bound = MOST_TRIPS.get(callers)
            if servers and bound is not None and measured.trips > bound:
                faults.append(f"{name}, {callers} in flight: {measured.trips:.0f} round trips, more than {bound:.0f}")
    end(faults, "round trips for 1,000 pairs are within their bounds")


if __name__ == "__main__":
    main()
