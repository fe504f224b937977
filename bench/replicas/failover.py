"""``make prove-failover``: the owner is killed 20 times, and told to stop, at half of the load that the fleet can take.

The most that the fleet does is measured first, in the same run. Then calls come at half of that rate, as a Poisson
process, whatever becomes of those before. A call was **touched** by a change of owner if it was open at any instant of
the gap in the answers that the change made; its **added wait** is its own wait less the median wait of quiet times. The
percentile is taken over all touched calls of all changes of one kind.

No call may fail (each has ten seconds and is sent again by its caller when its own front end dies), none may be granted
twice, and no acknowledged settlement may be missing from the journal, which is recounted from its first record on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from bench.replicas.site import Site, end, most, parser, say, site
from tests.replicas.checks import Interruption, Judgement, conserved, interruptions, judge, percentile, quiet_median
from tests.replicas.fleet import Clients, Server
from tests.replicas.scene import now

MIX = "varied=85,doubled=5,released=5,renewed=5"
KILL_P99 = 2.5
HAND_OVER_P99 = 0.2
"""Bounds of the added wait. Unit: seconds."""
STARTED = "a server started again"
"""No change of owner, and without a bound: how much a start takes of the processor is the machine's affair."""
SETTLE_SECONDS = 3.0
MOST_SETTLE_SECONDS = 20.0
"""Between a server's return and the next deed."""
CALM_SAMPLES = 10
"""So many tenths of a second in a row without a backlog."""


class Deeds:
    """Changes of owner, by kind."""

    def __init__(self, on: Site, clients: Clients) -> None:
        self.times: dict[str, list[int]] = {}
        self._on = on
        self._clients = clients
        self._overloaded = 0
        samples = []
        for _ in range(30):
            time.sleep(0.1)
            samples.append(clients.open)
        self._usual = max(20, 2 * sorted(samples)[len(samples) // 2])
        """Calls that are open at once in quiet times, at most."""

    def do(self, kind: str, deed: Callable[[Server], object], *, restart: bool = True) -> None:
        """One change, and back to three servers."""
        owner = self._on.owner()
        self.times.setdefault(kind, []).append(now())
        deed(owner)
        self._on.fleet.wait_owner(but=owner, seconds=15)
        self._clients.flowing(50)
        if restart:
            if owner.running:
                owner.wait_end(20)
            self.settle()
            self.times.setdefault(STARTED, []).append(now())
            owner.spawn()
            owner.wait_healthy()
        self.settle()

    def settle(self) -> None:
        """Until no more calls are open than in quiet times: the start of a process takes a core from all others."""
        time.sleep(SETTLE_SECONDS)
        until, calm = time.monotonic() + MOST_SETTLE_SECONDS, 0
        while calm < CALM_SAMPLES and time.monotonic() < until:
            time.sleep(0.1)
            calm = calm + 1 if self._clients.open <= self._usual else 0
        self._overloaded += calm < CALM_SAMPLES

    @property
    def overloaded(self) -> int:
        """How often the fleet had not caught up before the next deed."""
        return self._overloaded


def figures(
    kind: str, seen: Sequence[Interruption], median: float, bound: float, judgement: Judgement
) -> tuple[list[str], str]:
    """What is wrong, and a line."""
    touched = [wait - median for each in seen for wait in each.touched]
    p99 = percentile(touched, 99) / 1e6
    failed = judgement.counts["failed"]
    gaps = [each.gap / 1e6 for each in seen]
    line = (
        f"{kind}, {len(seen)} times: {len(touched):,} calls touched; added wait p50 "
        f"{percentile(touched, 50) / 1e6:.3f} s, p99 {p99:.3f} s, longest {max(touched, default=0.0) / 1e6:.3f} s; "
        f"answers stopped for {percentile(gaps, 50):.3f} s in the median, at most {max(gaps):.3f} s; {failed} failed"
    )
    return ([] if p99 <= bound else [f"{kind}: added wait p99 {p99:.3f} s, more than {bound} s"]), line


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--kills", type=int, default=20)
    asked.add_argument("--stops", type=int, default=10, help="of the owner, by SIGTERM")
    asked.add_argument("--moves", type=int, default=10, help="of the ledger, by an administrator")
    asked.add_argument(
        "--rate", type=float, default=0.0, help="calls a second; 0: half of the most that the fleet does"
    )
    asked.add_argument("--callers", type=int, default=256, help="who measure the most that the fleet does")
    asked.add_argument("--seconds", type=float, default=6.0, help="of that measurement")
    asked.add_argument("--before", type=float, default=0.0, help="seconds of load before the first change")
    options = asked.parse_args()
    say(f"seed {options.seed}, 3 servers, one Redis")
    faults: list[str] = []
    with (
        site() as on,
        Clients(on.folder, on.fleet.addresses, seed=options.seed, mix=MIX, max_wait=5, deadline=10) as clients,
    ):
        rate = options.rate
        if not rate:
            highest = most(clients, options.callers, options.seconds)
            say(f"the most: {highest:,.0f} pairs/s with {options.callers} callers")
            rate = highest / 2
        say(f"load: {rate:,.0f} calls/s")
        time.sleep(1.0)
        clients.rate(rate)
        clients.flowing(100)
        time.sleep(SETTLE_SECONDS)
        deeds = Deeds(on, clients)
        began = now()
        time.sleep(options.before)
        for number in range(options.kills):
            deeds.do("owner killed", lambda owner: owner.kill())
            if number % 5 == 4:
                say(f"  {number + 1} kills, {clients.pairs:,} pairs")
        for _ in range(options.stops):
            deeds.do("owner told to stop", lambda owner: owner.terminate())
        for _ in range(options.moves):
            deeds.do("handed over by an administrator", lambda owner: owner.hand_over(), restart=False)
        logs = clients.stop()
        on.recorder.stop()
        judgement = judge(logs, on.recorder.stored())
        faults += judgement.faults + conserved(judgement) + on.fleet.faults()
        every = [at for times in deeds.times.values() for at in times]
        median = quiet_median(judgement.entries, every)
        quiet: list[int] = []
        minutes: dict[int, list[int]] = {}
        for entry in judgement.entries:
            if entry.kind in ("grant", "commit") and all(not -500_000 < entry.asked - at < 4_000_000 for at in every):
                quiet.append(entry.answered - entry.asked)
                minutes.setdefault((entry.asked - began) // 60_000_000, []).append(quiet[-1])
        say(
            f"{judgement.counts['grant']:,} grants, {judgement.counts['commit']:,} settlements acknowledged; in quiet "
            f"times p50 {median / 1e3:.1f} ms, p99 {percentile(quiet, 99) / 1e3:.1f} ms "
            "(by minutes "
            + ", ".join(f"{percentile(each, 99) / 1e3:.0f}" for minute, each in sorted(minutes.items()) if minute >= 0)
            + ")"
        )
        for kind, times in deeds.times.items():
            seen = interruptions(judgement.entries, times)
            bound = {"owner killed": KILL_P99, STARTED: math.inf}.get(kind, HAND_OVER_P99)
            wrong, line = figures(kind, seen, median, bound, judgement)
            say(line)
            say("  " + "; ".join(f"{each.gap / 1e6:.3f} s until {each.restored / 1e6:.3f} s after it" for each in seen))
            faults += wrong
        away = sum(entry.away for entry in judgement.entries)
        say(
            f"looked up in the journal ({judgement.recount.seq:,} records, {len(judgement.recount.epochs)} epochs): "
            f"{judgement.told.counts['granted calls looked up']:,} grants, "
            f"{judgement.told.counts['settlements looked up']:,} settlements; calls sent again because their front end "
            f"died: {sum(entry.broken > 0 for entry in judgement.entries):,}; told to come again: {away:,}"
        )
        if deeds.overloaded:
            say(f"{deeds.overloaded} times there was a backlog still before the next deed: other work on this machine?")
        for what, count in sorted(clients.notes.items()):
            say(f"  clients noted {count} x {what}")
    end(
        faults,
        f"{options.kills} kills, {options.stops} stops, {options.moves} hand-overs: nothing lost, nothing twice, "
        "nobody failed",
    )


if __name__ == "__main__":
    main()
