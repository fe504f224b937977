"""The memory of ended calls: an ordered map like ``dict``, of which no step costs more the more there is."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from paceline.engine import events as ev
from paceline.engine.endings import PAGE_ENTRIES, Endings
from paceline.engine.state import CHUNK_ENTRIES, State

FEW, MANY = 5_000, 80_000
"""Ended ids. What a step takes must not differ between the two."""


@pytest.mark.parametrize("seed", range(5))
def test_it_is_a_dictionary(seed: int) -> None:
    """Random changes, the same to both; views that were frozen before stay as they were."""
    draw = random.Random(seed)
    real: dict[str, int] = {}
    it: Endings[int] = Endings()
    frozen: list[tuple[list[tuple[str, int]], Iterator[tuple[str, int]]]] = []
    for number in range(12 * PAGE_ENTRIES):
        key = str(draw.randrange(6 * PAGE_ENTRIES))
        what = draw.random()
        if what < 0.7:
            real[key] = it[key] = number
        elif what < 0.8:
            assert it.pop(key, None) == real.pop(key, None)
        elif what < 0.9 and real:
            oldest = next(iter(real))
            assert next(iter(it)) == oldest
            del real[oldest], it[oldest]
        assert (it.get(key), key in it, len(it)) == (real.get(key), key in real, len(real))
        if number % 1_500 == 0:
            frozen.append((list(real.items()), it.frozen()))
    assert list(it.items()) == list(real.items())
    assert list(it.values()) == list(real.values())
    assert list(reversed(it.values())) == list(reversed(real.values()))
    for expected, found in frozen:
        assert list(found) == expected
    for key in list(real):
        del it[key]
    assert not it
    assert not list(it)
    with pytest.raises(KeyError):
        it["absent"]
    with pytest.raises(KeyError):
        del it["absent"]


def test_a_frozen_view_lets_go_of_what_it_has_passed() -> None:
    it: Endings[list[int]] = Endings()
    for number in range(3 * PAGE_ENTRIES):
        it[str(number)] = [number]
    view = it.frozen()
    for number in range(3 * PAGE_ENTRIES):
        del it[str(number)]
    first = next(view)
    assert first == ("0", [0])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(2 * PAGE_ENTRIES):
        next(view)
    assert tracemalloc.get_traced_memory()[0] - before < 10_000
    tracemalloc.stop()
    assert sum(1 for _ in view) == PAGE_ENTRIES - 1


def remembering(count: int) -> State:
    state = State("acme")
    for number in range(count):
        state.apply(ev.Tombstoned(f"{number:032x}"))
    return state


class Most:
    """The most bytes that a piece of work needed at once: whoever copies or rehashes a map needs them."""

    def __init__(self) -> None:
        self.bytes = 0

    def of(self, work: Callable[[], object]) -> None:
        """Do a piece."""
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        work()
        self.bytes = max(self.bytes, tracemalloc.get_traced_memory()[1] - before)


def pieces(count: int) -> int:
    """Dump a state with changes between all pieces, and let it forget and remember: what the largest piece needed."""
    state, most = remembering(count), Most()
    tracemalloc.start()
    try:
        dump, done = state.dump(), 0

        def piece() -> None:
            nonlocal done
            done += next(dump, None) is not None

        for number in range(count // CHUNK_ENTRIES + 1):
            most.of(piece)
            for each in range(20):
                most.of(lambda key=f"new {number} {each}": state.apply(ev.Tombstoned(key)))  # type: ignore[misc]
            most.of(lambda: state.apply(ev.Forgotten(20)))
        assert done == count // CHUNK_ENTRIES + 1
        assert next(dump, None) is None
    finally:
        tracemalloc.stop()
    return most.bytes


def test_no_piece_of_work_grows_with_what_is_remembered() -> None:
    few, many = pieces(FEW), pieces(MANY)
    # But for references to pages and the growing of a part of the index.
    assert many < 1.5 * few


def test_learning_of_ends_never_costs_more_at_once() -> None:
    """No rehashing of everything: the largest single piece, over all sizes up to the last."""
    state, most = State("acme"), Most()
    tracemalloc.start()
    try:
        for number in range(MANY):
            most.of(lambda key=f"{number:032x}": state.apply(ev.Tombstoned(key)))  # type: ignore[misc]
    finally:
        tracemalloc.stop()
    assert most.bytes < 128 * PAGE_ENTRIES


def test_a_dump_is_of_the_instant_when_it_began() -> None:
    state = remembering(FEW)
    expected = list(state.dump())
    dump = state.dump()
    found = [next(dump)]
    state.apply(ev.Forgotten(1_500))
    for number in range(FEW):
        state.apply(ev.Tombstoned(f"later {number}"))
        if number % 700 == 0:
            found += [chunk for chunk in [next(dump, None)] if chunk is not None]
    assert found + list(dump) == expected
    assert list(State.restore(expected).dump()) == expected
