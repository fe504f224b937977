"""The checkers find what they are there for."""

from __future__ import annotations

import msgspec

from tests.replicas.checks import interruptions, over_granted, percentile, quiet_median, ran_ahead
from tests.replicas.logbook import Answered


def test_a_grant_too_many_is_found_and_an_exact_fit_is_not() -> None:
    # A burst of 2 and one more each second.
    fits = [(0, 1), (0, 1), (1_000_000, 1), (2_000_000, 1)]
    assert not over_granted(fits, amount=60, burst=2)
    assert over_granted([*fits, (2_999_999, 1)], amount=60, burst=2)
    assert not over_granted([*fits, (3_000_000, 1)], amount=60, burst=2)
    # Nothing is saved up beyond the burst.
    assert over_granted([(0, 2), (60_000_000, 3)], amount=60, burst=2)


def entry(asked: int, answered: int, at: int = 0, kind: str = "commit") -> Answered:
    context = b"\x01" + msgspec.msgpack.encode(["", "", "", "", "", "", at, []]) + bytes(16)
    return Answered(kind, f"{asked}", asked, answered, 1, 0, context=context)


def test_time_that_ran_ahead_is_found() -> None:
    steady = [entry(n * 1_000, n * 1_000 + 500, 70_000 + n * 1_000 + 200, "grant") for n in range(10)]
    assert ran_ahead(steady) == 0
    jumped = [entry(n * 1_000, n * 1_000 + 500, 95_000 + n * 1_000, "grant") for n in range(10, 20)]
    assert 24_000 <= ran_ahead(steady + jumped) <= 25_000


def test_an_interruption_is_the_gap_and_those_who_were_in_it() -> None:
    quiet = [entry(n * 1_000, n * 1_000 + 400) for n in range(1_000)]
    held_up = [entry(1_000_000 + n * 1_000, 2_000_000 + n * 10) for n in range(1_000)]
    after = [entry(2_100_000 + n * 1_000, 2_100_400 + n * 1_000) for n in range(1_000)]
    found = interruptions([*quiet, *held_up, *after], [1_000_200], within=2_000_000)
    assert len(found) == 1
    assert 999_000 <= found[0].gap <= 1_001_000
    assert found[0].restored == 999_800
    assert len(found[0].touched) == 1_000
    assert max(found[0].touched) == 1_000_000
    assert quiet_median([*quiet, *held_up, *after], [1_000_200], margin=1_000_000) == 400


def test_percentiles() -> None:
    assert percentile([], 99) == 0
    assert percentile(list(range(1, 101)), 99) == 99
    assert percentile([5], 99) == 5
