"""Fallback shares never add up to more than the limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.answers import DimensionState, Touched
from paceline.engine.dimensions import UNLIMITED, Dimension, Window
from paceline.frontend.fallback import Amounts, Fallback, per_minute

EXPIRY = 60_000_000


def taken(fallback: Fallback, instance: str, pool: str, limits: Amounts) -> Amounts | None:
    share = fallback.take(instance, pool, limits)
    return None if share is None else share.amounts


def arrived(fallback: Fallback, instance: str, pool: str) -> None:
    """The newest share of an instance is in its hands."""
    given = fallback._pools[pool].given.get(instance)
    if given is not None and given.shares:
        fallback.arrived(instance, pool, given.shares[-1].serial)


DIMENSIONS = (Dimension.REQUESTS, Dimension.INPUT_TOKENS)

steps = st.lists(
    st.tuples(
        st.integers(0, 40_000_000),  # time that passes
        st.integers(0, 12),  # who asks
        st.sampled_from(["one", "two"]),  # for which pool
        st.integers(0, 2_000),  # the limit at that moment
        st.integers(0, 300),  # what it was granted
        st.booleans(),  # whether it shows that it has the share
    ),
    max_size=60,
)


@given(steps)
def test_what_is_out_never_exceeds_the_limit(plan: list[tuple[int, int, str, int, int, bool]]) -> None:
    now = 0
    fallback = Fallback(lambda: now, expiry_us=EXPIRY, most=10)
    out: list[tuple[int, str, str, dict[Dimension, int], int]] = []
    for passed, who, pool, limit, granted, shown in plan:
        now += passed
        fallback.note(f"i{who}", pool, ((Dimension.REQUESTS, granted), (Dimension.INPUT_TOKENS, granted)))
        limits = {Dimension.REQUESTS: limit, Dimension.INPUT_TOKENS: 3 * limit}
        amounts = taken(fallback, f"i{who}", pool, limits)
        if amounts is None:
            continue
        assert set(amounts) == set(limits)
        if shown:
            # It uses the newest from now on; the others it had are void.
            arrived(fallback, f"i{who}", pool)
            out = [entry for entry in out if entry[1:3] != (f"i{who}", pool)]
        out.append((now + EXPIRY, f"i{who}", pool, amounts, limit))
        standing = [entry for entry in out if entry[0] > now and entry[2] == pool]
        for dimension in DIMENSIONS:
            # Any unexpired share of an instance may be the one that it uses: the largest counts.
            worst: dict[str, int] = {}
            for _, name, _, given_out, _ in standing:
                worst[name] = max(worst.get(name, 0), given_out[dimension])
            # The limit may have come down since a share was given; until it expires, the older limit bounds it.
            highest = max(entry[4] for entry in standing) * (3 if dimension is Dimension.INPUT_TOKENS else 1)
            assert sum(worst.values()) <= highest
            assert fallback.outstanding(pool).get(dimension, 0) == sum(worst.values())
            assert min(worst.values()) >= 0


@given(st.integers(1, 40), st.integers(100, 10_000))
def test_everybody_gets_a_fair_part_in_the_end(instances: int, limit: int) -> None:
    now = 0
    fallback = Fallback(lambda: now, expiry_us=EXPIRY)
    amounts = {}
    for _ in range(6):
        for instance in range(instances):
            now += EXPIRY // (2 * instances)
            amounts[instance] = taken(fallback, str(instance), "pool", {Dimension.REQUESTS: limit})
            arrived(fallback, str(instance), "pool")
    shares = [entry[Dimension.REQUESTS] for entry in amounts.values() if entry is not None]
    assert len(shares) == instances
    assert sum(shares) <= limit
    assert min(shares) >= limit // (instances + max(1, instances // 8)) - 1


def test_shares_follow_demand() -> None:
    now = 0
    fallback = Fallback(lambda: now, expiry_us=EXPIRY)
    shares: dict[str, int] = {}
    # Two that are busy, one of them twice as much, and eight that call now and then.
    wants = {"busy": 60, "half": 30, **{f"idle-{number}": 1 for number in range(8)}}
    for _ in range(60):
        now += 1_000_000
        for name, calls in wants.items():
            fallback.note(name, "pool", ((Dimension.REQUESTS, 1),), calls)
            amounts = taken(fallback, name, "pool", {Dimension.REQUESTS: 10_000})
            arrived(fallback, name, "pool")
            assert amounts is not None
            shares[name] = amounts[Dimension.REQUESTS]
    assert 0.9 * 10_000 <= sum(shares.values()) <= 10_000
    part = {name: 0.95 * (0.1 / 10 + 0.9 * calls / sum(wants.values())) for name, calls in wants.items()}
    assert {name: share / 10_000 for name, share in shares.items()} == pytest.approx(part, abs=0.02)
    # Demand is forgotten; the floor stays.
    for _ in range(40):
        now += 6_000_000
        fallback.note("half", "pool", ((Dimension.REQUESTS, 1),), 30)
        for name in wants:
            amounts = taken(fallback, name, "pool", {Dimension.REQUESTS: 10_000})
            arrived(fallback, name, "pool")
            assert amounts is not None
            shares[name] = amounts[Dimension.REQUESTS]
    assert shares["half"] > 7_000
    assert shares["busy"] >= 10_000 * 0.95 * 0.1 / 10 - 1


def test_an_older_share_counts_until_the_newer_one_has_arrived() -> None:
    now = 0
    fallback = Fallback(lambda: now, expiry_us=EXPIRY)
    limits = {Dimension.REQUESTS: 100}
    taken(fallback, "one", "pool", limits)
    arrived(fallback, "one", "pool")
    now = 1
    assert taken(fallback, "one", "pool", limits) == {Dimension.REQUESTS: 95}
    arrived(fallback, "one", "pool")
    now = 2
    # The other one gets what was kept back, and room is made once the first knows of its smaller share.
    assert taken(fallback, "two", "pool", limits) == {Dimension.REQUESTS: 5}
    now = 3
    taken(fallback, "one", "pool", limits)
    assert fallback.outstanding("pool") == {Dimension.REQUESTS: 100}
    # Nothing shows that it came: there is no other one for now.
    assert taken(fallback, "one", "pool", limits) is None
    arrived(fallback, "one", "pool")
    assert fallback.outstanding("pool") == {Dimension.REQUESTS: 47 + 5}


def test_instances_are_bounded_and_make_room_when_they_expire() -> None:
    now = 0
    fallback = Fallback(lambda: now, expiry_us=EXPIRY, most=3)
    limits = {Dimension.REQUESTS: 100}
    assert [taken(fallback, name, "pool", limits) is not None for name in "abcd"] == [True, True, True, False]
    now = EXPIRY + 1
    assert taken(fallback, "d", "pool", limits) == {Dimension.REQUESTS: 50}
    assert fallback.outstanding("pool") == {Dimension.REQUESTS: 50}


def test_amounts_are_per_minute() -> None:
    states = (
        DimensionState("p", "", Dimension.REQUESTS, Window.MINUTE, 60, 60, 1, 0),
        DimensionState("p", "", Dimension.TOKENS, Window.DAY, 1_440_000, 1, 1, 0),
        DimensionState("p", "", Dimension.CONCURRENCY, Window.NONE, 8, 8, 1, 0),
        DimensionState("p", "", Dimension.INPUT_TOKENS, Window.MINUTE, UNLIMITED, 1, 1, 0),
        DimensionState("p", "team", Dimension.REQUESTS, Window.MINUTE, 7, 7, 1, 0),
        DimensionState("", "", Dimension.SPEND, Window.MONTH, 7, 7, 1, 0),
    )
    assert per_minute("p", Touched(None, states)) == {
        Dimension.REQUESTS: 60,
        Dimension.TOKENS: 1_000,
        Dimension.CONCURRENCY: 8,
    }
