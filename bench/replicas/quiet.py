"""``make prove-quiet``: for a long time at half of the most that the fleet does, without trouble: the owner stays.

Counted is every change of owner that the journal's head or any server shows, and every call that was not answered.
"""

from __future__ import annotations

import time
from collections import Counter

import psutil

from bench.replicas.site import end, most, parser, say, site
from tests.replicas.checks import percentile
from tests.replicas.fleet import Clients
from tests.replicas.logbook import read


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--minutes", type=float, default=30.0)
    asked.add_argument("--callers", type=int, default=256, help="who measure the most that the fleet does")
    asked.add_argument("--seconds", type=float, default=6.0, help="of that measurement")
    options = asked.parse_args()
    say(f"seed {options.seed}, 3 servers, one Redis, {options.minutes:g} minutes")
    faults: list[str] = []
    with (
        site(module="") as on,
        Clients(on.folder, on.fleet.addresses, seed=options.seed, max_wait=5, deadline=10) as clients,
    ):
        rate = most(clients, options.callers, options.seconds)
        say(f"the most: {rate:,.0f} pairs/s with {options.callers} callers; load from now on: {rate / 2:,.0f} calls/s")
        time.sleep(1.0)
        clients.rate(rate / 2)
        clients.flowing(100)
        first = on.fleet.epoch()
        memory = [psutil.Process(server.pid).memory_info().rss for server in on.fleet.servers]
        began, pairs = time.monotonic(), clients.pairs
        changes, told = 0, time.monotonic()
        known = first
        while time.monotonic() < began + options.minutes * 60:
            time.sleep(1.0)
            found = max([known, *on.recorder.seen])
            changes += found != known
            known = found
            if time.monotonic() > told + 60:
                told = time.monotonic()
                say(f"  {(told - began) / 60:.0f} min, {clients.pairs - pairs:,} pairs, {changes} changes of owner")
        changes = max(changes, on.fleet.epoch() - first)
        grown = [
            psutil.Process(server.pid).memory_info().rss - before
            for server, before in zip(on.fleet.servers, memory, strict=True)
        ]
        took, done = time.monotonic() - began, clients.pairs - pairs
        logs = clients.stop()
        counts: Counter[str] = Counter()
        waits: list[int] = []
        minutes: dict[int, list[int]] = {}
        start = time.monotonic_ns() // 1_000 - int(took * 1e6)
        away = 0
        for entry in read(logs):
            counts[entry.kind] += 1
            away += entry.away
            if entry.kind in ("grant", "commit"):
                waits.append(entry.answered - entry.asked)
                minutes.setdefault((entry.asked - start) // 60_000_000, []).append(waits[-1])
        worst = sorted((percentile(each, 99) / 1e3, minute) for minute, each in minutes.items() if minute >= 0)
        faults += on.fleet.faults()
        if changes:
            faults.append(f"{changes} changes of owner")
        if counts["failed"]:
            faults.append(f"{counts['failed']} calls failed")
        say(
            f"{done:,} pairs in {took / 60:.1f} min ({done / took:,.0f}/s); {changes} changes of owner; wait p50 "
            f"{percentile(waits, 50) / 1e3:.1f} ms, p99 {percentile(waits, 99) / 1e3:.1f} ms, longest "
            f"{max(waits) / 1e3:.0f} ms (by minutes: p99 {worst[0][0]:.0f} to {worst[-1][0]:.0f} ms, worst in "
            f"minute {worst[-1][1]}); told to come again {away}; resident memory of the servers grew by "
            + ", ".join(f"{each / 2**20:.0f} MiB" for each in grown)
        )
    end(faults, f"{options.minutes:g} minutes, no change of owner, nobody failed")


if __name__ == "__main__":
    main()
