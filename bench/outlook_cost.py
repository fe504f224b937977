"""``python -m bench.outlook_cost``: what it costs to sum anew what the open calls of many tenants will still produce.

Both ways are timed in one run: the engine's, and the plain one, which lays out every row from every size and sums one
row for each kind of call and second of grant. They are of equal results (``tests/engine/test_outlook.py``).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.engine.accounting import Prices, Sizes
from paceline.engine.dimensions import SECOND_US
from paceline.engine.operations import Priority
from paceline.engine.outlook import HORIZONS, REFRESH_US, TABLE_US, Demand, Table, age_of, cap_of
from paceline.engine.sizes import Sample, finest, note
from paceline.engine.state import Reservation, State

NOW = 1_000_000 * SECOND_US


def open_calls(tenants: int, seconds: int, seed: int = 1) -> Demand:
    """The demand of ``tenants`` kinds that differ, each with one or two calls granted in each of so many seconds."""
    chance, state = random.Random(seed), State("bench")
    for tenant in range(tenants):
        middle = chance.uniform(4.0, 7.0)
        for _ in range(60):
            output = max(1, min(4_000, int(chance.lognormvariate(middle, 1.0))))
            note(state.learned, ("p", f"{tenant}", "r"), Sample(100, 100, output, 0, 400 + output * 12, 4_096))
    demand = Demand(state)
    for tenant in range(tenants):
        for second in range(seconds):
            for _ in range(1 + chance.randrange(2)):
                demand.opened(reservation(f"{tenant}", NOW - second * SECOND_US), NOW)
    return demand


def reservation(tenant: str, granted_at: int) -> Reservation:
    sizes = Sizes(1, 100, 0, 200, 4_096)
    return Reservation(
        f"{tenant}/{granted_at}", "p", (), tenant, "r", Priority.STANDARD, (0,), (200,), (0,), sizes, Prices(), 0,
        granted_at, granted_at + 600 * SECOND_US, 1,
    )  # fmt: skip


class PlainTable(Table):
    """Rows by their definition: every size with its weight, for every horizon."""

    __slots__ = ()

    def _make(self, age: float) -> tuple[float, ...]:
        done, lead = self.produced(age), max(0.0, self.first - age)
        rests = [(size - done, weight) for size, weight in zip(self._sizes, self._weights, strict=True) if size > done]
        if not rests:
            rests = [(max(0.0, min(done / 2, self.most - done)), 1.0)]
        total = sum(weight for _, weight in rests)
        means, variances = [], []
        for horizon in HORIZONS:
            most = self.pace * max(0.0, horizon - lead)
            mean = sum(weight * min(most, rest) for rest, weight in rests) / total
            square = sum(weight * min(most, rest) ** 2 for rest, weight in rests) / total
            means.append(mean)
            variances.append(max(0.0, square - mean * mean))
        return (*means, *variances)


@dataclass(slots=True)
class Sums:
    """Means, variances and squared means of kinds by horizon; tokens produced, and how many more each second."""

    means: list[float]
    variances: list[float]
    squares: list[float]
    produced: float = 0.0
    pace: float = 0.0


def plainly(demand: Demand, now: int, tables: dict[object, Table]) -> Sums:
    """What :meth:`Demand.refresh` sums, call by call. ``tables`` are kept from one time to the next."""
    places = range(len(HORIZONS))
    sums = Sums([0.0 for _ in places], [0.0 for _ in places], [0.0 for _ in places])
    for key, found in demand.kinds.items():
        table = tables.get(key)
        if table is None or now - table.made_at > TABLE_US:
            known = finest(demand.state.learned, key[0])
            table = tables[key] = PlainTable(known, found.table.expected, cap_of(key[1]), now, found.ages(now))
        own = [0.0 for _ in places]
        for slot, count in found.slots.items():
            age = age_of(slot, now)
            row = table.row(age)
            for place in places:
                change, before = count * row[place], own[place]
                own[place] = before + change
                sums.squares[place] += change * (2 * before + change)
                sums.means[place] += change
                sums.variances[place] += count * row[place + len(HORIZONS)]
            sums.produced += count * table.produced(age)
            sums.pace += count * table.pace if table.is_producing(age) else 0.0
    return sums


def main(arguments: Sequence[str] | None = None) -> int:
    """Print processor time of a refresh both ways, over the life of the tables, and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench.outlook_cost", description=__doc__)
    parser.add_argument("--tenants", type=int, default=500)
    parser.add_argument("--seconds", type=int, default=30, help="calls are open for so long (30)")
    options = parser.parse_args(arguments)
    demand = open_calls(options.tenants, options.seconds)
    tables: dict[object, Table] = {}
    rounds = TABLE_US // REFRESH_US + 1
    plain = ours = 0.0
    for number in range(1, rounds + 1):
        now = NOW + TABLE_US + number * REFRESH_US
        begun = time.process_time()
        plainly(demand, now, tables)
        between = time.process_time()
        demand.refresh(now)
        plain, ours = plain + between - begun, ours + time.process_time() - between
    each = 1_000 / rounds
    print(f"{options.tenants} tenants, {options.seconds} s of open calls; a refresh in {REFRESH_US // 1_000} ms")
    print(f"plain {plain * each:.2f} ms, now {ours * each:.2f} ms: {plain / ours:.1f} times cheaper")
    return 0


if __name__ == "__main__":
    sys.exit(main())
