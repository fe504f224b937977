"""What is shown of limits: where they come from, what readings say, what binds."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.engine.accounting import Estimate, Usage, UsageKind
from paceline.engine.dimensions import SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    Disposition,
    Observation,
    Operation,
    Outcome,
    Reading,
    Reserve,
    SetLimit,
)
from paceline.engine.reconcile import READING_TTL_US
from paceline.frontend.learned import in_force, origin, own_limits, pool_limits
from paceline.frontend.view import limit as shown_limit
from paceline.providers import AccountSetup, Catalogue, PoolSetup, Target
from paceline.providers.tiers import Tiers
from paceline_client.stubs import v1 as pb

START = 1_790_000_040 * SECOND_US
POOL = "anthropic/default/sonnet-5"
REQUESTS, INPUT, OUTPUT = Dimension.REQUESTS, Dimension.INPUT_TOKENS, Dimension.OUTPUT_TOKENS


class Scene:
    """A ledger with one pool, as the configuration of an account defines it."""

    def __init__(self, tier: str = "start", **setup: Any) -> None:
        catalogue = Catalogue(accounts={"default": AccountSetup("anthropic", tier, **setup)})
        self.tiers = Tiers(catalogue.spec, catalogue.accounts)
        self.engine = Engine("default")
        self.now = START
        definition = catalogue.resolve(Target(model="claude-sonnet-5")).definition
        assert isinstance(definition, DefinePool)
        self.step(definition)

    def step(self, *operations: Operation) -> None:
        self.engine.step(self.now, list(enumerate(operations)))

    def reserve(self, number: int, input_tokens: int = 1_000, output_tokens: int = 100, cap: int = 100) -> None:
        estimate = Estimate(1, input_tokens, 0, output_tokens, cap)
        self.step(Reserve(f"me/{number}", (Candidate(POOL, (), estimate),)))

    def commit(self, number: int, *readings: Reading, age_us: int = 0, **usage: int) -> None:
        observation = Observation(readings, age_us)
        outcome = Outcome(Disposition.SUCCEEDED, Usage(**usage), UsageKind.FINAL, observation)
        self.step(Commit(f"me/{number}", outcome))

    def shown(self) -> pb.PoolLimits:
        state = self.engine.state
        pool = state.pools[POOL]
        message = pb.Pool(name=POOL)
        for number in pool.buckets:
            entry = shown_limit(state.buckets[number], self.now)
            origin(entry, state.buckets[number], self.tiers)
            message.limits.append(entry)
        record = self.engine.stats.hindsight.demand.pools.get(POOL)
        return pool_limits(state, pool, message, record, self.tiers, self.now)

    def limit(self, dimension: Dimension) -> tuple[pb.Limit, pb.LimitDetail]:
        found = self.shown()
        places = [place for place, each in enumerate(found.pool.limits) if each.state.dimension == int(dimension)]
        (place,) = places
        assert found.details[place].limit.dimension == int(dimension)
        return found.pool.limits[place], found.details[place]


def sources(scene: Scene) -> list[str]:
    return [pb.LimitSource.Name(each.source).removeprefix("LIMIT_SOURCE_") for each in scene.shown().pool.limits]


def test_where_a_limit_comes_from() -> None:
    assert sources(Scene()) == ["TIER", "TIER", "TIER"]
    assert sources(Scene("")) == ["DEFAULT", "DEFAULT", "DEFAULT"]
    own = PoolSetup({INPUT: (Limit(INPUT, Window.MINUTE, 5_000),)})
    scene = Scene(pools={"sonnet-5": own})
    assert sources(scene) == ["TIER", "OVERRIDE", "TIER"]
    assert not scene.limit(INPUT)[0].HasField("override_limit")
    scene.step(SetLimit(POOL, OUTPUT, Limit(OUTPUT, Window.MINUTE, 7_000)))
    assert sources(scene) == ["TIER", "OVERRIDE", "OVERRIDE"]
    assert scene.limit(OUTPUT)[0].override_limit == 7_000
    scene.reserve(0)
    scene.commit(0, Reading(REQUESTS, limit=500), input_tokens=1_000, output_tokens=100)
    assert sources(scene) == ["UPSTREAM", "OVERRIDE", "OVERRIDE"]


def test_a_learned_restriction_says_when_it_lapses_and_a_raise_what_it_waits_for() -> None:
    scene = Scene()
    scene.reserve(0)
    scene.commit(0, Reading(REQUESTS, limit=500), Reading(INPUT, limit=3_000_000), input_tokens=1_000)
    scene.now += 60 * SECOND_US
    limit, detail = scene.limit(REQUESTS)
    assert (limit.state.limit, detail.configured_limit) == (500, 1_000)
    assert detail.lapses_in.ToMicroseconds() == READING_TTL_US - 60 * SECOND_US
    assert not detail.HasField("claimed_limit")
    limit, detail = scene.limit(INPUT)
    assert (limit.state.limit, detail.claimed_limit) == (2_000_000, 3_000_000)
    assert not detail.HasField("lapses_in")


def test_the_standing_reading_and_what_it_corrected() -> None:
    scene = Scene()
    scene.reserve(0, output_tokens=100)
    scene.reserve(1, output_tokens=100)
    scene.now += SECOND_US
    # The upstream has 300 requests less than the books: a gap of 300, and one call is still on its way.
    scene.commit(0, Reading(REQUESTS, limit=1_000, remaining=699), input_tokens=1_000, output_tokens=100)
    limit, detail = scene.limit(REQUESTS)
    assert limit.adjusted < -250
    assert detail.reading.HasField("age")
    assert detail.reading.age.ToMicroseconds() == 0
    assert detail.reading.rounding == 0
    assert detail.reading.lower <= limit.state.level <= detail.reading.upper
    assert detail.reading.upper <= 699 + 17
    assert limit.HasField("outside_per_minute")
    scene.now += 5 * SECOND_US
    assert scene.limit(REQUESTS)[1].reading.age.seconds == 5
    assert not scene.limit(OUTPUT)[1].HasField("reading")
    scene.now += READING_TTL_US
    assert not scene.limit(REQUESTS)[1].HasField("reading")


def test_outside_traffic_is_what_the_books_say() -> None:
    scene = Scene()
    assert not scene.limit(REQUESTS)[0].HasField("outside_per_minute")
    state = scene.engine.state
    state.buckets[state.addresses[POOL, "", REQUESTS, Window.MINUTE]].outside = 123
    assert scene.limit(REQUESTS)[0].outside_per_minute == 123


def test_what_is_at_risk_is_what_is_held_and_what_may_come_on_top() -> None:
    scene = Scene()
    scene.reserve(0, input_tokens=1_000, output_tokens=100, cap=8_000)
    limit, detail = scene.limit(OUTPUT)
    assert (limit.state.held, detail.over) == (100, 7_900)
    assert detail.at_risk == 8_000
    scene.commit(0, input_tokens=1_000, output_tokens=50)
    limit, detail = scene.limit(OUTPUT)
    assert (limit.state.held, detail.over, detail.at_risk) == (0, 0, 0)


def test_what_binds_and_what_held_calls_back() -> None:
    scene = Scene()
    scene.reserve(0, input_tokens=1_500_000)
    found = scene.shown()
    assert found.binding == pb.DIMENSION_INPUT_TOKENS
    assert not found.recently
    scene.reserve(1, input_tokens=1_500_000)
    # One that turns out much larger than expected leaves a debt.
    scene.reserve(2, input_tokens=10, output_tokens=100_000, cap=100_000)
    scene.commit(2, input_tokens=10, output_tokens=500_000)
    scene.reserve(3, input_tokens=10)
    scene.reserve(4, input_tokens=10)
    found = scene.shown()
    assert found.binding == pb.DIMENSION_OUTPUT_TOKENS
    assert [(each.dimension, each.waited, each.denied) for each in found.recently] == [
        (pb.DIMENSION_OUTPUT_TOKENS, 0, 2),
        (pb.DIMENSION_INPUT_TOKENS, 0, 1),
    ]
    assert 300 <= found.recent_span.seconds < 600


@pytest.mark.parametrize(
    ("learned", "equal", "between"),
    [
        (None, ["start"], ("", "")),
        (((REQUESTS, 5_000), (INPUT, 5_000_000), (OUTPUT, 1_000_000)), ["build"], ("", "")),
        (((INPUT, 3_000_000),), [], ("start", "build")),
        (((REQUESTS, 500),), [], ("", "start")),
    ],
)
def test_which_tier_matches(
    learned: tuple[tuple[Dimension, int], ...] | None, equal: list[str], between: tuple[str, str]
) -> None:
    scene = Scene()
    for number in range(2 if learned else 0):
        scene.reserve(number)
        scene.commit(number, *(Reading(dimension, limit=amount) for dimension, amount in learned or ()))
    found = scene.shown().tier
    assert found.configured == "start"
    assert list(found.equal) == equal
    assert (found.at_least, found.at_most) == between


def test_what_only_counts_is_no_limit() -> None:
    scene = Scene()
    state = scene.engine.state
    assert len(own_limits(state, state.pools[POOL])) == 3
    scene.step(DefinePool(POOL, state.pools[POOL].profile, (Limit(REQUESTS, Window.MINUTE, 5),)))
    assert in_force(own_limits(state, state.pools[POOL])) == {(REQUESTS, Window.MINUTE): 5}
    assert [each.source for each in scene.shown().pool.limits][1:] == [pb.LIMIT_SOURCE_UNSPECIFIED] * 2
