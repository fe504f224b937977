"""``make prove-outage``: the coordinator is killed under a saturating fleet, and comes back.

Everything is counted at the upstream. While nobody decides, the fleet must stay within the limit and go on using most
of it; the death itself must hold nobody up for longer than the budget; the return must bring no burst; and in the end
the books must have every call of the upstream, once.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from bench.outage import LIFE_SECONDS
from bench.outage.run import OneServer, Result, measure
from paceline_client._config import DEFAULT_BUDGET

LEAST_USED, MOST_USED = 0.6, 1.0
MOST_REFUSED = 5.0
"""For each thousand that were accepted."""
SLACK = 0.05
"""Of the budget, beside what the processes were late by themselves. Unit: seconds."""


def verdict(result: Result, least_used: float = LEAST_USED, most_used: float = MOST_USED) -> list[str]:
    """What does not hold."""
    wrong = []
    outage = result.phase("outage")
    if not least_used <= outage.used <= most_used:
        wrong.append(f"the outage used {outage.used:.0%} of the limit, not {least_used:.0%} to {most_used:.0%}")
    for phase in (*result.phases, result.returned):
        if phase.refused > max(1, phase.accepted * MOST_REFUSED / 1_000):
            wrong.append(f"{phase.name}: {phase.refused} refused beside {phase.accepted} accepted")
    if result.held_up > DEFAULT_BUDGET + SLACK + result.lag:
        wrong.append(f"a call was held up for {result.held_up * 1e3:.0f} ms")
    for dimension, amount in result.truth.items():
        booked = result.books.get(dimension, 0)
        if booked != amount:
            wrong.append(f"{dimension}: {booked:,} booked, {amount:,} used upstream")
    if result.left_open:
        wrong.append(f"{result.left_open} reservations are still open")
    if not result.alone:
        wrong.append("no call was decided without the coordinator: nothing was proved")
    for report in result.reports:
        if not report.flushed or report.failed:
            wrong.append(f"{report.name}: flushed {report.flushed}, failures {report.failed}")
    return wrong


def lines(result: Result) -> list[str]:
    """The numbers."""
    found = [
        f"{phase.name:8} {phase.seconds:5.1f} s  used {phase.used:6.1%}  accepted {phase.accepted:5}  "
        f"refused {phase.refused} ({phase.per_thousand:.1f} per 1,000)"
        for phase in (*result.phases, result.returned)
    ]
    found.append(
        f"held up at the death: at most {result.held_up * 1e3:.0f} ms (the processes were late by up to "
        f"{result.lag * 1e3:.0f} ms); {result.alone} calls decided alone"
    )
    for dimension, amount in result.truth.items():
        found.append(f"{dimension}: {amount:,} at the upstream, {result.books.get(dimension, 0):,} in the books")
    for report in result.reports:
        found.append(f"{report.name}: {report.answered} answered, {report.denied} denied, {report.failed}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=float, default=20.0, help="seconds before the death (20)")
    parser.add_argument("--outage", type=float, default=45.0, help="seconds without a server (45)")
    parser.add_argument("--after", type=float, default=30.0, help="seconds after the return (30)")
    parser.add_argument(
        "--expired", action="store_true", help=f"shares live {LIFE_SECONDS} s, so that the outage outlives them"
    )
    asked = parser.parse_args()
    module = "bench.outage.short_lived" if asked.expired else ""
    result = measure(asked.healthy, asked.outage, asked.after, site=partial(OneServer, module=module))
    # Once the shares have expired, there is little to use.
    conclude(result, least_used=0.6 * LIFE_SECONDS / asked.outage if asked.expired else LEAST_USED)


def conclude(result: Result, least_used: float = LEAST_USED) -> None:
    """Print it all, and leave with the verdict."""
    for line in lines(result):
        print(line)
    wrong = verdict(result, least_used)
    for line in wrong:
        print(f"wrong: {line}")
    print("FAILED" if wrong else "PASSED")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
