"""What is merged, when, and whether merging helps: without threads, loops or a clock."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paceline_client import Limit
from paceline_client._gather import Bounds, Entry, Gather, Sense

BOUNDS = Bounds(max_items=3, max_tokens=100, max_delay=1.0, max_waiting=5)
MAX_WAIT = 4.0


def entry(number: int, tokens: int, now: float, gone: set[int] | None = None) -> Entry:
    left = set() if gone is None else gone
    return Entry(number, tokens, now, now + BOUNDS.max_delay + MAX_WAIT, None, lambda: number in left)


def numbers(entries: list[Entry]) -> list[Any]:
    return [each.item for each in entries]


def filled(*tokens: int) -> Gather:
    gather = Gather(BOUNDS)
    for number, each in enumerate(tokens):
        assert gather.add(entry(number, each, 0.0))
    return gather


def test_without_merging_they_go_one_by_one_at_once() -> None:
    gather = filled(1, 1)
    assert gather.due(merging=False, free=True) == 0.0
    assert numbers(gather.take(0.0, merging=False)) == [0]
    assert numbers(gather.take(0.0, merging=False)) == [1]
    assert gather.take(9.0, merging=False) == []
    assert gather.due(merging=False, free=True) is None


def test_a_call_is_due_when_the_delay_is_over_or_it_is_full() -> None:
    gather = filled(1, 1)
    assert gather.take(0.99, merging=True) == []
    assert gather.due(merging=True, free=True) == 1.0
    assert gather.due(merging=True, free=False) == 5.0
    assert numbers(gather.take(1.0, merging=True)) == [0, 1]
    assert numbers(filled(1, 1, 1, 1).take(0.0, merging=True)) == [0, 1, 2]
    assert numbers(filled(1, 1).take(0.0, merging=True, flush=True)) == [0, 1]


def test_tokens_bound_a_call_too() -> None:
    gather = filled(60, 30, 20, 500, 1)
    assert numbers(gather.take(0.0, merging=True)) == [0, 1]
    # The next is larger than a call may be. It goes alone, and in its turn.
    assert numbers(gather.take(0.0, merging=True)) == [2]
    assert numbers(gather.take(0.0, merging=True)) == [3]
    assert gather.take(0.0, merging=True) == []


def test_too_many_wait() -> None:
    gone: set[int] = set()
    gather = Gather(BOUNDS)
    assert all(gather.add(entry(number, 1, 0.0, gone)) for number in range(5))
    assert not gather.add(entry(5, 1, 0.0, gone))
    gone.add(2)
    assert gather.add(entry(6, 1, 0.0, gone))
    assert numbers(gather.take(9.0, merging=True)) == [0, 1, 3]


@pytest.mark.parametrize("name", ["max_items", "max_tokens", "max_delay", "max_waiting"])
def test_bounds_that_make_no_sense(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Bounds(**({"max_items": 1, "max_tokens": 1, "max_delay": 0.0, "max_waiting": 1} | {name: -1}))  # type: ignore[arg-type]


class Life(RuleBasedStateMachine):
    """Items come, are given up, and are taken, in any order, at any time and in either mode."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = Gather(BOUNDS)
        self.now = 0.0
        self.count = 0
        self.gone: set[int] = set()
        self.waiting: dict[int, float] = {}
        self.ends: Counter[int] = Counter()

    @rule(tokens=st.integers(0, 150))
    def add(self, tokens: int) -> None:
        taken = self.gather.add(entry(self.count, tokens, self.now, self.gone))
        assert taken == (len(self.waiting) < BOUNDS.max_waiting)
        if taken:
            self.waiting[self.count] = self.now
        self.count += 1

    @precondition(lambda self: self.waiting)
    @rule(chosen=st.integers(0))
    def give_up(self, chosen: int) -> None:
        number = list(self.waiting)[chosen % len(self.waiting)]
        self.gone.add(number)
        del self.waiting[number]
        self.ends[number] += 1

    @rule(merging=st.booleans(), flush=st.booleans())
    def take(self, merging: bool, flush: bool) -> None:
        while group := self.gather.take(self.now, merging=merging, flush=flush):
            assert len(group) <= (BOUNDS.max_items if merging else 1)
            assert len(group) == 1 or sum(each.tokens for each in group) <= BOUNDS.max_tokens
            assert numbers(group) == list(self.waiting)[: len(group)]
            for each in group:
                del self.waiting[each.item]
                self.ends[each.item] += 1
        # Nobody waits longer for others than was said.
        due = self.gather.due(merging=merging, free=True)
        assert due is None if merging is False or flush else due is None or due > self.now
        assert all(since + BOUNDS.max_delay > self.now for since in self.waiting.values())

    @rule(later=st.floats(0, 7))
    def pass_time(self, later: float) -> None:
        self.now += later

    @rule()
    def expire(self) -> None:
        for each in self.gather.expired(self.now):
            assert self.now >= each.ends
            del self.waiting[each.item]
            self.ends[each.item] += 1
        assert all(self.now < since + BOUNDS.max_delay + MAX_WAIT for since in self.waiting.values())

    @invariant()
    def each_leaves_once(self) -> None:
        assert all(count == 1 for count in self.ends.values())
        assert not self.waiting.keys() & self.ends.keys()

    def teardown(self) -> None:
        self.take(True, True)
        assert not self.waiting


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


# -- whether merging helps ----------------------------------------------------------------------------------------


def limit(dimension: str, level: int | None, burst: int | None = 100) -> Limit:
    return Limit("p", "", dimension, "minute", None, burst, level, 0)


def test_what_made_a_call_wait_decides() -> None:
    sense = Sense()
    for dimension, merges in [
        ("requests", True),
        ("", True),
        ("input_tokens", False),
        ("", False),
        ("concurrency", True),
        ("spend", False),
    ]:
        sense.bound(dimension)
        assert sense.merging is merges, dimension


def test_of_calls_that_did_not_wait_the_nearest_limit_decides() -> None:
    sense = Sense()
    for requests, tokens, merges in [
        (90, 90, False),
        (26, 90, False),
        (24, 20, False),
        (24, 90, True),
        (49, 90, True),
        (51, 90, False),
        (49, 90, False),
        (-3, 90, True),
        (10, 9, False),
    ]:
        sense.seen([limit("requests", requests), limit("output_tokens", tokens), limit("tokens", 100)])
        assert sense.merging is merges, (requests, tokens)
    sense.seen([limit("requests", None), limit("requests", 3, None), limit("spend", 0)])
    assert not sense.merging
