"""What open calls will still produce, summed by rows that calls share, is what the plain sum over all of them gives."""

from __future__ import annotations

import random

import pytest

from bench.outlook_cost import NOW, plainly, reservation
from paceline.engine.dimensions import SECOND_US
from paceline.engine.outlook import HORIZONS, REFRESH_US, TABLE_US, Demand, Table
from paceline.engine.sizes import Sample, note
from paceline.engine.state import State


@pytest.mark.parametrize("seed", range(12))
def test_sums_are_those_of_the_plain_way(seed: int) -> None:
    chance = random.Random(seed)
    demand = Demand(State("l"))
    now = NOW
    for tenant in range(6):
        for _ in range(chance.choice([0, 30, 200])):
            output = max(1, min(4_096, int(chance.lognormvariate(5.5, 1.2))))
            took = 300 + int(output * chance.uniform(5, 20))
            note(demand.state.learned, ("p", f"{tenant}", "r"), Sample(100, 100, output, 0, took, 4_096))
    tables: dict[object, Table] = {}
    opened = []
    for _ in range(200):
        call = reservation(f"{chance.randrange(6)}", NOW - int(chance.expovariate(1 / 40) * SECOND_US))
        demand.opened(call, now)
        opened.append(call)
    # Tables are made anew by both with the first look.
    now += TABLE_US
    for _number in range(30):
        now += REFRESH_US
        for call in chance.sample(opened, 3):
            opened.remove(call)
            demand.ended(call, now)
        demand.refresh(now)
        plain = plainly(demand, now, tables)
        for place in range(len(HORIZONS)):
            assert demand._means[place] == pytest.approx(plain.means[place], rel=0.01, abs=0.01)
            assert demand._variances[place] == pytest.approx(plain.variances[place], rel=0.01, abs=1.0)
            assert demand._squares[place] == pytest.approx(plain.squares[place], rel=0.01, abs=0.01)
        assert demand._produced == pytest.approx(plain.produced, rel=0.01, abs=0.01)
        assert demand._pace == pytest.approx(plain.pace, rel=0.01, abs=0.01)
