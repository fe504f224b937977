"""The catalogue: which pool a target comes to, how it counts, what it costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.accounting import Estimate, Profile, Sizes, Usage
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.operations import NO_PRICES
from paceline.engine.recipe import Recipe
from paceline.providers import AccountSetup, Catalogue, PoolSetup, Resolved, Target, Unknown
from paceline.providers.catalogue import packaged, problems
from paceline.providers.headers import FAMILIES
from paceline.providers.patterns import Patterns, bare_model


def resolved(catalogue: Catalogue | None = None, **fields: str) -> Resolved:
    return (catalogue or Catalogue()).resolve(Target(**fields))


def amounts(found: Resolved) -> dict[str, int]:
    return {limit.dimension.name.lower(): limit.amount for limit in found.definition.limits}


def charges(profile: Profile, estimate: Estimate, usage: Usage) -> dict[str, tuple[int, int]]:
    """What each dimension holds and what it settles at."""
    sizes = profile.fill(estimate)
    held = {rule.dimension: rule.hold(sizes) for rule in profile.rules}
    return {
        rule.dimension.name.lower(): (held[rule.dimension], rule.settle(usage, held[rule.dimension]))
        for rule in profile.rules
    }


def test_the_packaged_data_is_sound() -> None:
    assert list(problems(packaged(), packaged())) == []
    assert packaged().cautious_limits is not None
    assert {provider.header_family for provider in packaged().providers.values()} <= set(FAMILIES)


@pytest.mark.parametrize(
    ("model", "pool"),
    [
        ("claude-sonnet-5", "sonnet-5"),
        ("claude-sonnet-5-5", "sonnet-5-5"),
        ("Claude-Sonnet-5", "sonnet-5"),
        ("claude-sonnet-5-20260801", "sonnet-5"),
        ("claude-sonnet-4-5-20250929", "sonnet-4"),
        ("claude-sonnet-4-6", "sonnet-4"),
        ("claude-opus-4-5", "opus-4"),
        ("claude-opus-4-8-latest", "opus-4"),
        ("claude-opus-4-5[1m]", "opus-4"),
        ("us.anthropic.claude-opus-4-5-20251101-v1:0", "opus-4"),
        ("anthropic.claude-opus-5", "opus-5"),
        ("anthropic/claude-opus-5-5", "opus-5-5"),
        ("claude-opus-5@20260724", "opus-5"),
        ("claude-fable-5", "fable-5"),
        ("claude-fable-5-1", "fable-5"),
        ("claude-mythos-5-1", "mythos-5"),
        ("claude-haiku-4-5", "haiku-4-5"),
        ("claude-haiku-5-5", "haiku-5-5"),
        ("claude-3-5-haiku-20241022", "haiku-3-5"),
        ("claude-3-haiku@20240307", "haiku-3"),
    ],
)
def test_models_of_a_group_share_a_pool(model: str, pool: str) -> None:
    found = resolved(model=model)
    assert found.pool == f"anthropic/default/{pool}"
    assert not found.unknown
    assert found.header_family == "anthropic"


def test_a_new_model_never_falls_into_an_older_ones_group() -> None:
    for model in ("claude-sonnet-5-6", "claude-sonnet-50", "claude-opus-4-9", "claude-haiku-5"):
        assert resolved(model=model).unknown


@pytest.mark.parametrize(
    ("tier", "model", "limits", "cap"),
    [
        ("classic-1", "claude-sonnet-5", (50, 20_000, 8_000), 100),
        ("classic-4", "claude-haiku-4-5", (4_000, 400_000, 80_000), 5_000),
        ("2026-04-1", "claude-opus-4-5", (50, 30_000, 8_000), None),
        ("2026-04-1", "claude-haiku-4-5", (50, 50_000, 10_000), None),
        ("2026-04-3", "claude-haiku-4-5", (2_000, 1_000_000, 200_000), None),
        ("start", "claude-opus-5-5", (1_000, 2_000_000, 400_000), 500),
        ("start", "claude-haiku-3-5", (1_000, 100_000, 20_000), 500),
        ("build", "claude-fable-5-1", (2_000, 1_500_000, 300_000), 1_000),
        ("scale", "claude-sonnet-4-6", (10_000, 10_000_000, 2_000_000), 200_000),
        ("evaluation", "claude-sonnet-5", (50, 30_000, 8_000), None),
    ],
)
def test_tiers(tier: str, model: str, limits: tuple[int, int, int], cap: int | None) -> None:
    catalogue = Catalogue(accounts={"default": AccountSetup("anthropic", tier)})
    found = resolved(catalogue, model=model)
    assert amounts(found) == dict(zip(("requests", "input_tokens", "output_tokens"), limits, strict=True))
    assert catalogue.spend_cap("default") == (None if cap is None else cap * 1_000_000_000)


def test_batches_and_token_counting_have_pools_of_their_own() -> None:
    catalogue = Catalogue(accounts={"default": AccountSetup("anthropic", "build")})
    batches = resolved(catalogue, endpoint="/v1/messages/batches", model="claude-opus-5")
    assert batches.pool == "anthropic/default/batches"
    assert amounts(batches) == {"requests": 2_000, "queued_requests": 300_000}
    assert batches.definition.limits[1].window is Window.NONE
    assert (batches.prices.input_tokens, batches.prices.output_tokens) == (2_500_000_000, 12_500_000_000)
    counting = resolved(catalogue, endpoint="count_tokens", model="claude-opus-5")
    assert counting.pool == "anthropic/default/count-tokens"
    assert amounts(counting) == {"requests": 4_000}
    assert counting.priced
    assert counting.prices == NO_PRICES
    assert resolved(catalogue, endpoint="/v1/messages", model="claude-opus-5").pool == "anthropic/default/opus-5"
    assert resolved(catalogue, endpoint="v9/other", model="claude-opus-5").pool == "anthropic/default/opus-5"


USAGE = Usage(input_tokens=100, cache_read_tokens=1_000, cache_write_tokens=10, output_tokens=50)
ESTIMATE = Estimate(input_tokens=200, cached_input_tokens=900, output_tokens=60, max_output_tokens=500)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            Target(model="claude-opus-5"),
            {"requests": (1, 1), "input_tokens": (200, 110), "output_tokens": (60, 50)},
        ),
        (
            Target(model="claude-haiku-3-5"),
            {"requests": (1, 1), "input_tokens": (1_100, 1_110), "output_tokens": (60, 50)},
        ),
        (Target(provider="openai", model="gpt-5"), {"requests": (1, 1), "tokens": (1_100, 1_100)}),
        (
            Target(provider="bedrock-runtime", model="us.anthropic.claude-opus-4-5-20251101-v1:0"),
            {"tokens": (700, 360)},
        ),
        (
            Target(provider="bedrock-runtime", model="meta.llama4"),
            {"tokens": (700, 160)},
        ),
        (
            Target(provider="bedrock-runtime", model="us.anthropic.claude-3-5-sonnet-20241022-v2:0"),
            {"tokens": (700, 160)},
        ),
        (
            Target(provider="bedrock-runtime", model="anthropic.claude-3-7-sonnet-20250219-v1:0"),
            {"tokens": (700, 360)},
        ),
        (Target(provider="azure-openai", model="chat"), {"requests": (1, 1), "tokens": (1_600, 1_600)}),
        (Target(provider="gemini", model="g"), {"requests": (1, 1), "input_tokens": (1_100, 1_110)}),
        (
            Target(provider="vertex", model="claude-opus-5@20260724"),
            {"requests": (1, 1), "input_tokens": (200, 110), "output_tokens": (60, 50)},
        ),
        (Target(provider="bedrock-mantle", model="m"), {"input_tokens": (700, 110), "output_tokens": (60, 50)}),
        (
            Target(provider="nobody", model="m"),
            {"requests": (1, 1), "input_tokens": (1_100, 1_110), "output_tokens": (60, 50)},
        ),
        (Target(endpoint="count_tokens"), {"requests": (1, 1)}),
    ],
)
def test_profiles_charge_as_the_providers_do(target: Target, expected: dict[str, tuple[int, int]]) -> None:
    assert charges(Catalogue().resolve(target).definition.profile, ESTIMATE, USAGE) == expected


SIZES = st.builds(Sizes, *[st.integers(0, 10**9)] * 5)


@given(st.sampled_from(sorted(packaged().profiles)), SIZES)
def test_a_recipe_holds_what_the_rules_of_its_profile_say(name: str, sizes: Sizes) -> None:
    profile = packaged().profiles[name].profile(name)
    buckets = [Bucket("p", "", rule.dimension, Window.MINUTE, 1_000, 1_000, 0) for rule in profile.rules]
    buckets.append(Bucket("", "", Dimension.SPEND, Window.MONTH, 0, 0, 0))
    recipe = Recipe(profile, tuple(range(len(buckets))), buckets)
    assert recipe.holds(sizes, NO_PRICES)[:-1] == tuple(rule.hold(sizes) for rule in profile.rules)


@pytest.mark.parametrize(("input_tokens", "most", "held"), [(100, 500, 500), (900, 500, 900), (0, 0, 0)])
def test_openai_charges_the_larger_of_cap_and_estimate(input_tokens: int, most: int, held: int) -> None:
    profile = resolved(provider="openai", model="gpt-5").definition.profile
    estimate = Estimate(input_tokens=input_tokens, output_tokens=0, max_output_tokens=most)
    assert charges(profile, estimate, Usage(output_tokens=most))["tokens"] == (held, held)


def test_a_batch_is_one_request_that_queues_many() -> None:
    profile = resolved(endpoint="batches").definition.profile
    found = charges(profile, Estimate(requests=1_000), Usage(requests=1_000))
    assert found == {"requests": (1, 1), "queued_requests": (1_000, 0)}


def test_prices_go_by_model_not_by_group() -> None:
    million = Usage(1, 1_000_000, 1_000_000, 1_000_000, 1_000_000)
    assert resolved(model="claude-fable-5").prices.cost(million) == 73_500_000_000
    assert resolved(model="claude-fable-5-1").prices.cost(million) == 72_750_000_000
    assert resolved(model="claude-sonnet-4-5-20250929").prices.cost(million) == 22_050_000_000
    assert resolved(model="claude-3-haiku").prices.cost(Usage(output_tokens=1)) == 1_250


def test_what_has_no_price_says_so() -> None:
    assert resolved(model="claude-opus-5").priced
    for target in (
        Target(model="claude-new"),
        Target(provider="openai", model="gpt-5"),
        Target(model="claude-opus-5", service_tier="fast"),
    ):
        found = Catalogue().resolve(target)
        assert (found.priced, found.prices) == (False, NO_PRICES)


def test_a_service_tier_with_its_own_quota() -> None:
    catalogue = Catalogue(accounts={"default": AccountSetup("anthropic", "start")})
    fast = resolved(catalogue, model="claude-opus-5", service_tier="fast")
    assert fast.pool == "anthropic/default/opus-5;service_tier=fast"
    assert fast.header_family == "anthropic-fast"
    assert amounts(fast)["input_tokens"] == 30_000  # the tier's limits are not those of fast mode
    priority = resolved(catalogue, model="claude-opus-5", service_tier="priority")
    assert priority.pool == "anthropic/default/opus-5;service_tier=priority"
    assert priority.header_family == "anthropic-priority"
    for name in ("standard_only", "auto"):
        assert resolved(catalogue, model="claude-opus-5", service_tier=name).header_family == "anthropic"
    standard = resolved(catalogue, model="claude-opus-5", service_tier="standard_only")
    assert standard.pool == "anthropic/default/opus-5"


def test_an_override_of_a_pool_is_not_one_of_its_service_tiers() -> None:
    five = PoolSetup({Dimension.REQUESTS: (Limit(Dimension.REQUESTS, Window.MINUTE, 5),)})
    catalogue = Catalogue(accounts={"default": AccountSetup("anthropic", pools={"opus-5": five})})
    assert amounts(resolved(catalogue, model="claude-opus-5"))["requests"] == 5
    assert amounts(resolved(catalogue, model="claude-opus-5", service_tier="fast"))["requests"] == 50


def test_regions_are_separate_only_where_the_provider_says_so() -> None:
    assert resolved(model="claude-opus-5", region="eu").pool == "anthropic/default/opus-5"
    found = resolved(provider="vertex", region="us-east5", model="claude-opus-5@20260724")
    assert found.pool == "vertex/default/claude-opus-5;region=us-east5"


def test_which_account_a_target_means() -> None:
    catalogue = Catalogue(
        accounts={"main": AccountSetup("anthropic"), "a": AccountSetup("openai"), "b": AccountSetup("openai")}
    )
    assert resolved(catalogue, model="claude-opus-5").account == "main"  # the only one of its provider
    assert resolved(catalogue, provider="openai", model="gpt-5").account == "default"
    found = resolved(catalogue, account="a", model="gpt-5")
    assert (found.account, found.provider, found.known_account) == ("a", "openai", True)
    assert not resolved(catalogue, account="elsewhere", model="claude-opus-5").known_account
    assert catalogue.account_of(Target(provider="Anthropic")) == "main"


def test_an_account_of_another_provider_lends_no_limits() -> None:
    catalogue = Catalogue(accounts={"main": AccountSetup("anthropic", "start")})
    found = resolved(catalogue, provider="vertex", account="main", model="claude-opus-5")
    assert amounts(found)["requests"] == 50


def test_an_unknown_model_is_reported_once_and_gets_cautious_limits() -> None:
    heard: list[Unknown] = []
    catalogue = Catalogue(on_unknown=heard.append, cache_size=1)
    for _ in range(3):
        for model in ("claude-new", "claude-newer"):
            found = resolved(catalogue, model=model)
            assert found.unknown
            assert amounts(found) == {"requests": 50, "input_tokens": 30_000, "output_tokens": 8_000}
    assert [unknown.pool for unknown in heard] == ["anthropic/default/claude-new", "anthropic/default/claude-newer"]
    assert not catalogue.knows(Target(model="claude-new"))
    assert catalogue.knows(Target(model="claude-opus-5"))


def test_too_many_unknown_models_share_a_pool() -> None:
    heard: list[Unknown] = []
    catalogue = Catalogue(max_open_pools=3, on_unknown=heard.append, cache_size=2)
    pools = [resolved(catalogue, model=f"m{number}").pool for number in range(6)]
    assert pools == [f"anthropic/default/m{number}" for number in range(3)] + ["anthropic/default/other"] * 3
    assert resolved(catalogue, model="m1").pool == "anthropic/default/m1"  # once it has one, it keeps it
    assert resolved(catalogue, provider="new", model="m").pool == "unknown/default/other"
    assert resolved(catalogue, provider="openai", model="gpt").pool == "openai/default/other"
    assert resolved(catalogue, account="second", model="m4").pool == "anthropic/second/m4"
    assert [unknown.model for unknown in heard] == ["m0", "m1", "m2", "", "m4"]  # "too many" is said once
    assert resolved(catalogue, model="claude-opus-5").pool == "anthropic/default/opus-5"


def test_a_configured_model_needs_no_free_place() -> None:
    setup = AccountSetup(
        "openai", pools={"gpt-5": PoolSetup({Dimension.TOKENS: (Limit(Dimension.TOKENS, Window.MINUTE, 9),)})}
    )
    catalogue = Catalogue(accounts={"o": setup}, max_open_pools=0)
    assert amounts(resolved(catalogue, account="o", model="gpt-5-2026-01-01"))["tokens"] == 9
    assert resolved(catalogue, account="o", model="gpt-6").pool == "openai/o/other"


def test_a_model_cannot_take_the_name_of_another_pool() -> None:
    for model in ("sonnet-5", "other", "batches", "count-tokens"):
        assert resolved(model=model).pool == f"anthropic/default/model:{model}"
    assert resolved(account="a/b", model="x").pool == "anthropic/a%2Fb/x"
    assert resolved(account="a", model="b/x").pool == "anthropic/a/b%2Fx"
    assert resolved(model="x;region=eu").pool == "anthropic/default/x%3Bregion%3Deu"


def test_a_hit_is_answered_from_the_cache() -> None:
    catalogue = Catalogue()
    target = Target(model="claude-opus-5")
    assert catalogue.resolve(target) is catalogue.resolve(Target("", "", "", "", "", "", "claude-opus-5"))


TEXT = st.text(max_size=12) | st.text(max_size=128)
NAMES = st.sampled_from(["", "anthropic", "openai", "vertex", "new", "main", "batches", "fast", "claude-opus-5", "w"])


@given(st.lists(st.builds(Target, *[NAMES | TEXT for _ in Target._fields]), min_size=1, max_size=8))
def test_any_target_resolves_and_always_to_the_same(targets: list[Target]) -> None:
    setup = AccountSetup("anthropic", "start")
    catalogue = Catalogue(accounts={"main": setup}, max_open_pools=2, cache_size=1)
    first = [catalogue.resolve(target) for target in targets]
    again = [catalogue.resolve(target) for target in targets]
    assert first == again
    for found in first:
        assert found.definition.pool == found.pool
        assert found.pool.isascii()
        assert found.pool.isprintable()
        assert found.pool.count("/") == 2
        assert found.definition.limits
        counted = {rule.dimension for rule in found.definition.profile.rules}
        assert {limit.dimension for limit in found.definition.limits} <= counted


@given(st.text(max_size=40))
def test_bare_names_stay_bare_and_are_never_empty(name: str) -> None:
    bare = bare_model(name, None)
    assert bare_model(bare, None) == bare
    assert bool(bare) == bool(name.strip())


def test_the_most_exact_pattern_wins() -> None:
    patterns = Patterns([("*", 1), ("a*", 2), ("a*z", 3), ("abc", 4), ("*z*", 5), ("a*", 6)])
    found = {name: patterns.match(name) for name in ("q", "ab", "a1z", "abc", "1z1")}
    assert found == {"q": 1, "ab": 6, "a1z": 3, "abc": 4, "1z1": 5}
    assert Patterns[int]([("a", 1)]).match("b") is None
