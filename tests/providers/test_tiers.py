"""How limits in force compare with the usage tiers of the catalogue."""

from __future__ import annotations

import pytest

from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.providers import AccountSetup, Catalogue, PoolSetup, Target, WorkspaceSetup
from paceline.providers.catalogue import packaged
from paceline.providers.tiers import Match, Tiers, family_of, place_of

POOL = "anthropic/default/sonnet-4"
REQUESTS, INPUT, OUTPUT = Dimension.REQUESTS, Dimension.INPUT_TOKENS, Dimension.OUTPUT_TOKENS
MINUTE = Window.MINUTE


def tiers(tier: str = "", **setup: object) -> Tiers:
    return Tiers(packaged(), {"default": AccountSetup("anthropic", tier, **setup)})  # type: ignore[arg-type]


def amounts(requests: int, input_tokens: int, output_tokens: int) -> dict[tuple[Dimension, Window], int]:
    return {(REQUESTS, MINUTE): requests, (INPUT, MINUTE): input_tokens, (OUTPUT, MINUTE): output_tokens}


@pytest.mark.parametrize(
    ("configured", "actual", "expected"),
    [
        ("", (5_000, 5_000_000, 1_000_000), Match(("build",))),
        ("start", (5_000, 5_000_000, 1_000_000), Match(("build",))),
        ("start", (1_000, 3_000_000, 400_000), Match((), "start", "build")),
        ("", (1_500, 3_000_000, 600_000), Match((), "start", "build")),
        ("", (500, 100, 100), Match((), "", "start")),
        ("", (20_000, 20_000_000, 4_000_000), Match((), "scale", "")),
        ("", (500, 20_000_000, 4_000_000), Match()),
        ("classic-2", (300, 100_000, 17_000), Match((), "classic-2", "classic-3")),
        ("", (4_000, 400_000, 80_000), Match(("classic-4",))),
    ],
)
def test_match(configured: str, actual: tuple[int, int, int], expected: Match) -> None:
    assert tiers(configured).match(POOL, amounts(*actual)) == expected


def test_a_pool_without_limits_or_tiers_matches_nothing() -> None:
    assert tiers().match(POOL, {}) == Match()
    assert tiers().match("openai/default/gpt-5", amounts(1, 1, 1)) == Match()
    assert tiers().of("nobody/default/x") == {}
    assert tiers().of(POOL + ";service_tier=fast") == {}


def test_every_tier_says_of_a_pool_what_the_catalogue_defines_for_it() -> None:
    for name in packaged().providers["anthropic"].tiers:
        catalogue = Catalogue(accounts={"default": AccountSetup("anthropic", name)})
        for model in ("claude-sonnet-5", "claude-fable-5", "claude-haiku-3-5", "claude-opus-4-5"):
            found = catalogue.resolve(Target(model=model))
            if not found.definition.guessed:
                stated = {(limit.dimension, limit.window): limit.amount for limit in found.definition.limits}
                assert tiers().of(found.pool)[name] == stated
            else:
                assert name not in tiers().of(found.pool)
    assert tiers().of("anthropic/default/batches")["build"] == {
        (REQUESTS, MINUTE): 2_000,
        (Dimension.QUEUED_REQUESTS, Window.NONE): 300_000,
    }


@pytest.mark.parametrize(
    ("configured", "actual", "dimension", "expected"),
    [
        ("start", (1_000, 2_000_000, 400_000), REQUESTS, "build"),
        ("build", (5_000, 5_000_000, 1_000_000), INPUT, "scale"),
        ("build", (5_000, 5_000_000, 1_500_000), OUTPUT, "scale"),
        ("scale", (10_000, 10_000_000, 2_000_000), INPUT, None),
        ("classic-1", (50, 20_000, 8_000), OUTPUT, "classic-2"),
        ("classic-4", (4_000, 400_000, 80_000), OUTPUT, None),
        # A tier that raises what binds but lowers another limit is none.
        ("start", (1_000, 20_000_000, 400_000), REQUESTS, None),
    ],
)
def test_the_next_tier_lowers_nothing(
    configured: str, actual: tuple[int, int, int], dimension: Dimension, expected: str | None
) -> None:
    found = tiers(configured).next_above(POOL, amounts(*actual), (dimension, MINUTE))
    assert (None if found is None else found[0]) == expected


def test_names_of_pools_are_taken_apart() -> None:
    catalogue = Catalogue()
    found = catalogue.resolve(Target("bedrock-runtime", "a/b", "us-east-1", model="us.anthropic.claude-opus-5-v1:0"))
    place = place_of(found.pool)
    assert (place.provider, place.account) == ("bedrock-runtime", "a/b")
    assert not place.apart
    assert place_of("anthropic/default/opus-5;service_tier=fast").apart
    assert (family_of("classic-1"), family_of("2026-04-3"), family_of("build")) == ("classic", "2026-04", "")


def test_what_the_configuration_sets_is_told_from_its_tier() -> None:
    five = PoolSetup({REQUESTS: (Limit(REQUESTS, MINUTE, 5),)})
    found = tiers("build", pools={"sonnet-4": five}, workspaces={"w": WorkspaceSetup({INPUT: ()}, {"opus-4": five})})
    assert found.is_set(POOL, REQUESTS)
    assert not found.is_set(POOL, INPUT)
    assert not found.is_set("anthropic/default/opus-4", REQUESTS)
    assert found.is_set("anthropic/default/opus-4@w", REQUESTS)
    assert found.is_set("anthropic/default/opus-4@w", INPUT)
    assert not found.is_set("anthropic/other/sonnet-4", REQUESTS)
    assert (found.configured(POOL), found.configured("anthropic/other/sonnet-4")) == ("build", "")


def test_prices_of_a_pool_are_those_of_its_models() -> None:
    found = tiers()
    (sonnet,) = found.prices(POOL)
    assert (sonnet.input_tokens, sonnet.output_tokens) == (3_000_000_000, 15_000_000_000)
    assert len(found.prices("anthropic/default/fable-5")) == 2
    assert found.prices("anthropic/default/claude-nobody-knows") == ()
    assert found.prices("openai/default/gpt-5") == ()
    assert found.prices("anthropic/default/opus-5;service_tier=fast") == ()
