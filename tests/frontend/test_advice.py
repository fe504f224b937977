"""Advice: of an engine that has seen known calls, known figures."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from paceline.engine.accounting import Estimate, Usage, UsageKind
from paceline.engine.answers import Denied, Granted
from paceline.engine.dimensions import SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    DefineShare,
    Disposition,
    Observation,
    Operation,
    Outcome,
    Reading,
    Reserve,
    SetLimit,
    SetPaused,
)
from paceline.frontend.advice import LEAST_CALLS, Adviser
from paceline.providers import AccountSetup, Catalogue
from paceline.providers.tiers import Tiers
from paceline_client.stubs import v1 as pb

START = 1_790_000_040 * SECOND_US
"""The beginning of a minute."""
OPUS, HAIKU_3_5 = "anthropic/default/opus-5", "anthropic/default/haiku-3-5"


@dataclass
class Call:
    """What calls of one kind are expected to use, and what they do use; of the input, what is read from the cache."""

    input_tokens: int
    output_tokens: int
    read: int = 0
    share: str = ""


class Scene:
    """A ledger with the pools of a tier."""

    def __init__(self, tier: str = "start", *more: Operation) -> None:
        catalogue = Catalogue(accounts={"default": AccountSetup("anthropic", tier)})
        self.tiers = Tiers(catalogue.spec, catalogue.accounts)
        self.engine = Engine("default")
        self.now = START
        self.engine.step(self.now, list(enumerate([*catalogue.pools("default"), *more])))
        self.number = 0

    def step(self, *operations: Operation) -> list[object]:
        return [answer for _, answer in self.engine.step(self.now, list(enumerate(operations))).answers]

    def calls(self, pool: str, count: int, call: Call, *readings: Reading) -> tuple[int, int]:
        """So many calls at once, each tried once: how many were granted and denied. Those that were granted end."""
        shares = (call.share,) if call.share else ()
        keys = [f"me/{self.number + number}" for number in range(count)]
        self.number += count
        estimate = Estimate(1, call.input_tokens, 0, call.output_tokens, call.output_tokens)
        answers = self.step(*(Reserve(key, (Candidate(pool, shares, estimate),)) for key in keys))
        usage = Usage(
            input_tokens=call.input_tokens - call.read, cache_read_tokens=call.read, output_tokens=call.output_tokens
        )
        granted = [key for key, answer in zip(keys, answers, strict=True) if isinstance(answer, Granted)]
        assert sum(isinstance(answer, Denied) for answer in answers) == count - len(granted)
        outcome = Outcome(Disposition.SUCCEEDED, usage, UsageKind.FINAL, Observation(readings))
        self.step(*(Commit(key, outcome) for key in granted))
        return len(granted), count - len(granted)

    def advice(self, pool: str) -> pb.PoolAdvice:
        state = self.engine.state
        demand = self.engine.stats.hindsight.demand
        return Adviser("default", state, demand, self.tiers, self.now).advise(state.pools[pool])


def of_kind(found: pb.PoolAdvice, kind: pb.AdviceKind.ValueType) -> list[pb.Advice]:
    return [each for each in found.advice if each.kind == kind]


def kinds(found: pb.PoolAdvice) -> set[pb.AdviceKind.ValueType]:
    return {each.kind for each in found.advice}


def test_requests_bind_while_tokens_are_idle() -> None:
    scene = Scene()
    assert scene.calls(OPUS, 1_200, Call(100, 10)) == (1_000, 200)
    found = scene.advice(OPUS)
    assert (found.calls, found.nothing) == (1_200, "")
    (held,) = found.held_back
    assert (held.dimension, held.waited, held.denied, held.minutes) == (pb.DIMENSION_REQUESTS, 0, 200, 1)
    assert (found.usage.calls, found.usage.minutes, found.usage.input_tokens) == (1_000, 1, 100_000)

    (tier,) = of_kind(found, pb.ADVICE_KIND_TIER)
    assert (tier.name, tier.limit, tier.dimension) == ("build", 5_000, pb.DIMENSION_REQUESTS)
    # 1,000 requests; 2,000,000 / 100 input; 400,000 / 10 output: requests bind before and after.
    assert (tier.calls_per_minute, tier.calls_per_minute_then) == (1_000, 5_000)
    assert "requests 5,000 instead of 1,000 a minute (5.0 times)" in tier.message
    assert "requests held back 200 of 1,200 calls in 1 minute, 100 % of all that waited" in tier.message

    # With requests used up, input stands at 100,000 of 2,000,000 and output at 10,000 of 400,000: a twentieth at most.
    (merging,) = of_kind(found, pb.ADVICE_KIND_MERGING)
    assert merging.calls_to_merge == 20
    assert "input_tokens at 5 % and output_tokens at 2 %" in merging.message
    assert pb.ADVICE_KIND_CACHING not in kinds(found)


def test_a_higher_tier_moves_what_binds() -> None:
    scene = Scene()
    # Of 1,800 input tokens, 1,000 calls a minute would use 1,800,000 of 2,000,000.
    scene.calls(OPUS, 1_100, Call(1_800, 10))
    (tier,) = of_kind(scene.advice(OPUS), pb.ADVICE_KIND_TIER)
    assert (tier.calls_per_minute, tier.calls_per_minute_then) == (1_000, 5_000_000 // 1_800)
    assert pb.ADVICE_KIND_MERGING not in kinds(scene.advice(OPUS))


def test_caching_frees_what_reads_do_not_count() -> None:
    scene = Scene()
    granted, denied = scene.calls(OPUS, 120, Call(20_000, 10))
    assert (granted, denied) == (100, 20)
    scene = Scene()
    scene.calls(OPUS, 120, Call(20_000, 10, read=5_000))
    found = scene.advice(OPUS)
    (caching,) = of_kind(found, pb.ADVICE_KIND_CACHING)
    # Of 2,000,000 tokens of input, a quarter was read from the cache: 1,500,000 counted in the one minute.
    assert [(each.hit_permille, each.freed_per_minute) for each in caching.caching] == [
        (500, 500_000),
        (800, 1_100_000),
        (960, 1_420_000),
    ]
    assert "25 % of the input was read from the cache, and reads do not count" in caching.message
    assert "500,000 / 1,100,000 / 1,420,000 of 1,500,000 input_tokens a minute would be free" in caching.message

    scene = Scene()
    scene.calls(OPUS, 120, Call(20_000, 10, read=18_000))
    (caching,) = of_kind(scene.advice(OPUS), pb.ADVICE_KIND_CACHING)
    assert [each.hit_permille for each in caching.caching] == [960]


def test_where_reads_count_caching_is_not_advised() -> None:
    scene = Scene()
    scene.calls(HAIKU_3_5, 130, Call(1_000, 10))
    found = scene.advice(HAIKU_3_5)
    assert found.held_back[0].dimension == pb.DIMENSION_INPUT_TOKENS
    assert pb.ADVICE_KIND_TIER in kinds(found)
    assert pb.ADVICE_KIND_CACHING not in kinds(found)


def test_where_reads_count_in_part_caching_frees_the_rest() -> None:
    scene = Scene()
    pool = scene.engine.state.pools[OPUS]
    limits = tuple(
        Limit(bucket.dimension, bucket.window, bucket.amount)
        for bucket in map(scene.engine.state.buckets.__getitem__, pool.buckets)
    )
    rules = tuple(
        replace(rule, settle_cache_read=100) if rule.dimension is Dimension.INPUT_TOKENS else rule
        for rule in pool.profile.rules
    )
    scene.step(DefinePool(OPUS, replace(pool.profile, rules=rules), limits))
    scene.calls(OPUS, 120, Call(20_000, 10))
    (caching,) = of_kind(scene.advice(OPUS), pb.ADVICE_KIND_CACHING)
    # Of 2,000,000 a minute, half would count a tenth: 900,000 less.
    assert [each.freed_per_minute for each in caching.caching] == [900_000, 1_440_000, 1_728_000]
    assert "reads count 10 %" in caching.message


def test_output_that_binds_asks_neither_for_caching_nor_for_merging() -> None:
    scene = Scene()
    # Whatever is granted of the first ones: then nothing is left.
    scene.calls(OPUS, 120, Call(10, 4_000))
    assert scene.calls(OPUS, 50, Call(10, 4_000)) == (0, 50)
    found = scene.advice(OPUS)
    assert found.held_back[0].dimension == pb.DIMENSION_OUTPUT_TOKENS
    assert kinds(found) == {pb.ADVICE_KIND_TIER, pb.ADVICE_KIND_OTHER_POOL}


def test_idle_pools_that_cost_no_more_are_named_with_their_price() -> None:
    scene = Scene()
    scene.calls(OPUS, 1_200, Call(1_000, 100))
    found = of_kind(scene.advice(OPUS), pb.ADVICE_KIND_OTHER_POOL)
    names = [each.name.rpartition("/")[2] for each in found]
    # $5 and $25 per million tokens here and in opus-4; then the next lower prices.
    assert names == ["opus-4", "opus-5-5", "sonnet-4"]
    costs = [
        (each.cost.units + each.cost.nanos / 1e9, each.cost_then.units + each.cost_then.nanos / 1e9) for each in found
    ]
    # A million tokens of input and a hundred thousand of output.
    assert costs == [(7.5, 7.5), (7.5, 6.0), (7.5, 4.5)]
    assert "cost $4.50 there, 40 % less than here ($7.50)" in found[2].message
    assert "as much as here" in found[0].message

    # One that is paused, and one that has little left, are no way out.
    scene.step(SetPaused("anthropic/default/opus-4", True))
    scene.calls("anthropic/default/opus-5-5", 600, Call(10, 1))
    found = of_kind(scene.advice(OPUS), pb.ADVICE_KIND_OTHER_POOL)
    assert [each.name.rpartition("/")[2] for each in found] == ["sonnet-4", "sonnet-5", "sonnet-5-5"]


def test_of_models_of_one_pool_the_dearest_price_is_compared_with_the_cheapest_here() -> None:
    scene = Scene()
    fable, mythos = "anthropic/default/fable-5", "anthropic/default/mythos-5"
    profile = scene.engine.state.pools[fable].profile
    scene.step(DefinePool(mythos, profile, (Limit(Dimension.REQUESTS, Window.MINUTE, 1_000),)))
    # A million tokens of cache reads cost $0.25 with one model of each group, and $1 with the other.
    scene.calls(fable, 1_200, Call(1_000, 1, read=990))
    names = [each.name for each in of_kind(scene.advice(fable), pb.ADVICE_KIND_OTHER_POOL)]
    assert names
    assert mythos not in names


def test_a_limit_set_below_the_tier_is_said_to_be() -> None:
    scene = Scene()
    scene.step(SetLimit(OPUS, Dimension.REQUESTS, Limit(Dimension.REQUESTS, Window.MINUTE, 100)))
    scene.calls(OPUS, 150, Call(100, 10))
    (tier,) = of_kind(scene.advice(OPUS), pb.ADVICE_KIND_TIER)
    assert (tier.name, tier.limit) == ("start", 1_000)
    assert "once the lower limit set here is raised too" in tier.message

    scene = Scene()
    scene.calls(OPUS, 1, Call(100, 10), Reading(Dimension.REQUESTS, limit=100))
    scene.calls(OPUS, 150, Call(100, 10))
    (tier,) = of_kind(scene.advice(OPUS), pb.ADVICE_KIND_TIER)
    assert (tier.name, tier.limit) == ("start", 1_000)
    assert "which is configured, but the upstream gives less" in tier.message


def test_the_largest_tier_has_none_above() -> None:
    scene = Scene("scale")
    scene.calls(OPUS, 10_100, Call(1_000, 10))
    found = scene.advice(OPUS)
    assert pb.ADVICE_KIND_TIER not in kinds(found)
    assert pb.ADVICE_KIND_OTHER_POOL in kinds(found)


def test_denials_of_a_share_are_of_the_pool_but_waits_are_told_apart() -> None:
    scene = Scene("start", DefineShare("team", (Limit(Dimension.REQUESTS, Window.MINUTE, 60, 1),)))
    candidate = Candidate(OPUS, ("team",), Estimate(1, 10, 0, 10, 10))
    for number in range(LEAST_CALLS + 1):
        scene.step(Reserve(f"me/{number}", (candidate,), max_wait_us=600 * SECOND_US))
    for _ in range(LEAST_CALLS):
        scene.now += SECOND_US
        scene.step()
    found = scene.advice(OPUS)
    (held,) = found.held_back
    assert (held.dimension, held.share, held.waited) == (pb.DIMENSION_REQUESTS, True, LEAST_CALLS)
    assert held.wait.seconds == LEAST_CALLS * (LEAST_CALLS + 1) // 2
    assert kinds(found) == {pb.ADVICE_KIND_SHARE}
    assert "a cap of shares, not the pool: raise it" in found.advice[0].message


def test_nothing_is_advised_without_need_or_evidence() -> None:
    scene = Scene()
    assert scene.advice(OPUS).nothing == "no calls yet: advice needs 100"
    scene.calls(OPUS, 40, Call(100, 10))
    assert scene.advice(OPUS).nothing == "only 40 calls so far: advice needs 100"
    scene.calls(OPUS, 160, Call(100, 10))
    found = scene.advice(OPUS)
    assert found.nothing == (
        "nothing binds: limits held back 0 of 200 calls; the fullest, requests, was used to 20 % on average"
    )
    assert not found.advice
    # A few denials are chance.
    scene.calls(OPUS, 805, Call(100, 10))
    assert scene.advice(OPUS).nothing.startswith("nothing binds: limits held back 5 of 1,005 calls;")


def test_when_nothing_known_would_help_it_says_so() -> None:
    scene = Scene("scale")
    for pool in list(scene.engine.state.pools):
        if pool != OPUS:
            scene.step(SetPaused(pool, True))
    _, denied = scene.calls(OPUS, 150, Call(10, 40_000))
    assert scene.calls(OPUS, 50, Call(10, 40_000)) == (0, 50)
    found = scene.advice(OPUS)
    assert not found.advice
    assert found.nothing.startswith(
        f"output_tokens held back {denied + 50} of 200 calls, and nothing known here would help"
    )
