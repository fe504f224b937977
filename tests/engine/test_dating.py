"""Which instant of a call a reading is of shows in many of them; and what no reading shows yet is kept free."""

from __future__ import annotations

import pytest

from paceline.engine.bucket import Bucket, Constraint
from paceline.engine.dating import FEW, NEAR_US, Dating
from paceline.engine.dimensions import SECOND_US, Dimension, Window
from paceline.engine.trail import UNSEEN_US, Trail

_STEP_US = 50_000


def readings(dating: Dating, late: float, *, steady: bool = False) -> tuple[tuple[int, int, int], int, int]:
    """Calls of two seconds, while the level swings; each is read at this part of its time. The last one's result."""
    trail, levels, found = Trail(), {}, (0, 0, 0)
    since = until = 0
    last = (0, 0)
    for number in range(40 * (FEW + 4)):
        at = 1_000 * SECOND_US + number * _STEP_US
        levels[at] = 1_000 if steady else 1_000 + abs(number * 50 % 8_000 - 4_000)
        trail.note(at, levels[at])
        since, until = at - 2 * SECOND_US, at
        read = since + round(late * 2 * SECOND_US)
        if number >= 60 and number % 37 == 0:
            found = dating.narrowed(trail, levels[read] - 10, levels[read] + 10, since, until, 0)
            last = (since, until)
    return found, *last


def test_readings_of_the_end_are_dated_there() -> None:
    found, _, until = readings(Dating(), 1.0)
    assert found == (until - NEAR_US, until, NEAR_US)


def test_readings_of_the_start_are_dated_there() -> None:
    found, since, _ = readings(Dating(), 0.0)
    assert found == (since, since + NEAR_US, NEAR_US)


@pytest.mark.parametrize(("late", "steady"), [(0.5, False), (1.0, True)])
def test_what_does_not_tell_stays_open(late: float, steady: bool) -> None:
    found, since, until = readings(Dating(), late, steady=steady)
    assert found == (since, until, UNSEEN_US)


def bucket(after: int) -> Bucket:
    one = Bucket("p", "", Dimension.INPUT_TOKENS, Window.MINUTE, 600_000, 600_000, 0, held=100_000)
    one.constraint = Constraint(None, 1_000, 0, 0, 0, 0, 0, after)
    return one


def test_the_more_is_under_way_unseen_the_more_is_kept_free() -> None:
    few, many = bucket(0).margin(100, 50, 400), bucket(50_000).margin(100, 50, 400)
    assert few < many <= few + 600_000 // 8
    # What is settled is known: no more than what is held can be unseen.
    assert bucket(10**9).margin(100, 50, 400) == bucket(100_000).margin(100, 50, 400)
    # A pool whose calls are far from what is held needs more than one whose calls are near.
    assert bucket(50_000).margin(100, 50, 0) < bucket(50_000).margin(100, 50, 4_000)
