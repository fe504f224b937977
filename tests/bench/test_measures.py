"""The definitions of the measures, as properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.demo.measures import (
    dominant_share,
    endless,
    fair_shares,
    fairness,
    first_attempt,
    jain,
    least_served,
    lost,
    percentile,
    refused_per_1000,
    used,
    waits,
)
from bench.fleet.plan import Record

CAPACITY = {"requests": 100.0, "input_tokens": 50_000.0, "output_tokens": 8_000.0}
AMOUNTS = st.fixed_dictionaries({name: st.floats(0.01, 2 * size) for name, size in CAPACITY.items()})
DEMANDS = st.dictionaries(st.sampled_from("abcdef"), AMOUNTS, min_size=1)
WEIGHTS = st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 2.0, 5.0]) for name in "abcdef"})


def record(fate: str = "answered", begun: float = 0.0, sent: float | None = 0.1, attempts: int = 1) -> Record:
    return Record(
        call="c",
        tenant="t",
        begun=begun,
        sent=sent,
        ended=9.0,
        attempts=attempts,
        fate=fate,
        input_tokens=1,
        output_tokens=1,
    )


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.001, 1))
def test_a_percentile_is_a_value_and_covers_its_part(values: list[float], part: float) -> None:
    found = percentile(values, part)
    assert found in values
    assert sum(value <= found for value in values) >= part * len(values) - 1e-6
    assert sum(value < found for value in values) < part * len(values) + 1e-6


def test_percentiles_known_by_heart() -> None:
    assert percentile([], 0.5) is None
    assert [percentile(range(1, 101), part) for part in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]


@given(DEMANDS, WEIGHTS)
def test_fair_shares_fill_the_capacity_and_no_more(
    demands: dict[str, dict[str, float]], weights: dict[str, float]
) -> None:
    fair = fair_shares(demands, CAPACITY, weights)
    taken = dict.fromkeys(CAPACITY, 0.0)
    for tenant, demand in demands.items():
        served = fair[tenant] / dominant_share(demand, CAPACITY)
        assert served <= 1 + 1e-6
        for each, amount in demand.items():
            taken[each] += served * amount
    assert all(taken[each] <= CAPACITY[each] * (1 + 1e-6) for each in CAPACITY)
    unmet = [each for each in fair if fair[each] < dominant_share(demands[each], CAPACITY) * (1 - 1e-6)]
    # Who gets less than it wants is stopped by a full dimension, and nobody has more for its weight.
    if unmet:
        assert any(taken[each] >= CAPACITY[each] * (1 - 1e-6) for each in CAPACITY)
        for poor in unmet:
            assert all(fair[poor] / weights[poor] >= fair[rich] / weights[rich] * (1 - 1e-6) for rich in fair)


def test_the_fleet_of_the_demonstration() -> None:
    """Four that want a tenth each, and two that always have work: these have three tenths each."""
    chats = {f"chat-{n}": {"input_tokens": 5_000.0, "output_tokens": 100.0} for n in range(4)}
    sample = {"input_tokens": 2_000.0, "output_tokens": 25.0}
    demands = chats | {f"batch-{n}": endless(sample, CAPACITY) for n in range(2)}
    fair = fair_shares(demands, CAPACITY)
    assert [round(fair[name], 6) for name in demands] == [0.1] * 4 + [0.3] * 2
    served = {"batch-0": {"input_tokens": 20_000.0}, "batch-1": {"input_tokens": 10_000.0}}
    assert fairness(served, demands, CAPACITY) == pytest.approx(0.9)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_jain_is_between_one_nth_and_one(values: list[float]) -> None:
    found = jain(values)
    assert found is not None
    assert 1 / len(values) - 1e-9 <= found <= 1 + 1e-9


def test_jain_known_by_heart() -> None:
    assert (jain([]), jain([3.0, 3.0]), jain([1.0, 0.0])) == (None, 1.0, 0.5)


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0, 1), st.floats(0.01, 1)), min_size=1))
def test_the_least_served_is_a_tenant_and_none_has_less(tenants: dict[str, tuple[float, float]]) -> None:
    served = {name: part for name, (part, _) in tenants.items()}
    fair = {name: share for name, (_, share) in tenants.items()}
    found = least_served(served, fair)
    assert found is not None
    tenant, ratio = found
    assert ratio == served[tenant] / fair[tenant]
    assert all(served[name] >= ratio * fair[name] * (1 - 1e-9) for name in tenants)


def test_the_least_served_among_those_that_are_entitled() -> None:
    assert least_served({}, {}) is None
    assert least_served({"a": 1.0}, {"a": 0.0}) is None
    # Who was not served at all is not left out.
    assert least_served({"a": 0.3}, {"a": 0.3, "b": 0.1, "c": 0.0}) == ("b", 0.0)


def test_the_limit_used_is_that_of_the_binding_dimension() -> None:
    accepted = {"requests": 30.0, "input_tokens": 99.0}
    rate = {"requests": 1.0, "input_tokens": 1.0}
    level = {"requests": 30.0, "input_tokens": -10.0}
    binding, part = used(accepted, level, rate, 100.0)
    assert binding == "input_tokens"
    assert part == pytest.approx(1.1)


def test_shares_of_the_calls_offered() -> None:
    records = [record(), record(attempts=2), record("deadline"), record("RateLimitError", attempts=3, sent=2.0)]
    assert (lost(records), first_attempt(records)) == (0.5, 0.25)
    assert (lost([]), first_attempt([])) == (0.0, 0.0)
    assert (refused_per_1000(5, 2_500), refused_per_1000(1, 0)) == (2.0, None)


def test_waits_are_those_of_answered_calls_without_the_sdks_own_time() -> None:
    records = [record(begun=1.0, sent=1.5), record("deadline", begun=1.0, sent=9.0), record(begun=1.0, sent=1.05)]
    p50, p99 = waits(records, own_s=0.1)
    assert p50 == 0.0
    assert p99 is not None
    assert math.isclose(p99, 0.4)
