"""From configuration to operations, ladders and paths of shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from paceline.config import Config, ConfigError, Shares, catalogue, definitions, expand_ladder, load_config
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.operations import (
    Class,
    DefineClasses,
    DefineModes,
    DefinePool,
    DefineShare,
    DefineSpend,
    Mode,
    Operation,
    Priority,
)
from paceline.engine.terms import Part
from paceline.providers import Target

ROOT = Path(__file__).resolve().parents[2]


def config_of(text: str, folder: Path) -> Config:
    path = folder / "c.yaml"
    path.write_text(text, "utf-8")
    return load_config(path, {})


def defined(text: str, folder: Path, account: str = "main") -> list[Operation]:
    config = config_of(text, folder)
    return definitions(config, catalogue(config), account)


def minute(dimension: Dimension, amount: int, burst: int | None = None) -> Limit:
    return Limit(dimension, Window.MINUTE, amount, burst)


def test_an_account_that_is_not_configured_has_shares_and_modes_only(tmp_path: Path) -> None:
    assert defined("", tmp_path) == [DefineSpend(None), DefineClasses(()), DefineModes(())]


def test_pools_take_overrides_over_the_tier_dimension_by_dimension(tmp_path: Path) -> None:
    text = """
accounts:
  main:
    tier: classic-1
    pools:
      sonnet-5: {requests: 7, learn: false}
      opus-5: {output_tokens: {amount: 10, burst: 5}, concurrency: 3}
"""
    pools = {each.pool: each for each in defined(text, tmp_path) if isinstance(each, DefinePool)}
    sonnet, opus = pools["anthropic/main/sonnet-5"], pools["anthropic/main/opus-5"]
    assert sonnet.limits == (
        minute(Dimension.REQUESTS, 7),
        minute(Dimension.INPUT_TOKENS, 20_000),
        minute(Dimension.OUTPUT_TOKENS, 8_000),
    )
    assert not sonnet.learn
    assert opus.learn
    assert opus.limits[2:] == (
        minute(Dimension.OUTPUT_TOKENS, 10, 5),
        Limit(Dimension.CONCURRENCY, Window.NONE, 3),
    )
    assert opus.profile.rules[-1].dimension is Dimension.CONCURRENCY
    assert len(pools) == len(catalogue(Config()).spec.providers["anthropic"].groups)  # the tier speaks of every group


def test_a_configured_pool_is_defined_as_a_call_would_define_it(tmp_path: Path) -> None:
    config = load_config(ROOT / "docs" / "config.example.yaml", {})
    known = catalogue(config)
    targets = {
        "anthropic/main/sonnet-5": Target(account="main", model="claude-sonnet-5"),
        "anthropic/main/opus-5-5;service_tier=fast": Target(model="claude-opus-5-5", service_tier="fast"),
        "anthropic/main/sonnet-5@wrkspc_chat": Target(model="claude-sonnet-5", upstream_workspace="wrkspc_chat"),
        "anthropic/main/batches": Target(endpoint="batches"),
        "azure-openai/azure/chat-prod;region=westeurope": Target(
            account="azure", region="westeurope", model="chat-prod"
        ),
    }
    pools = {pool.pool: pool for account in config.accounts for pool in known.pools(account)}
    for name, target in targets.items():
        resolved = known.resolve(target)
        assert resolved.pool == name
        assert resolved.definition == pools[name]


def test_a_workspace_counts_cache_reads_where_its_limit_does(tmp_path: Path) -> None:
    text = """
accounts:
  main:
    tier: start
    upstream_workspaces:
      w: {limits: {input_tokens: 5}, cache_reads_count: true}
"""
    known = catalogue(config_of(text, tmp_path))
    inside = known.resolve(Target(model="claude-opus-5", upstream_workspace="w"))
    outside = known.resolve(Target(model="claude-opus-5", upstream_workspace="other"))
    assert (inside.pool, outside.pool) == ("anthropic/main/opus-5@w", "anthropic/main/opus-5")
    assert [limit.amount for limit in inside.definition.limits] == [1_000, 5, 400_000]
    assert inside.definition.profile.rules[1].settle_cache_read == 1_000
    assert outside.definition.profile.rules[1].settle_cache_read == 0


@pytest.mark.parametrize(
    ("account", "cap"),
    [
        ("{tier: start}", 500),
        ("{tier: start, monthly_spend_cap: 12.5}", 12.5),
        ("{tier: start, monthly_spend_cap: unlimited}", None),
        ("{}", None),
    ],
)
def test_spend_caps(account: str, cap: float | None, tmp_path: Path) -> None:
    operations = defined(f"accounts: {{main: {account}}}\n", tmp_path)
    assert operations[0] == DefineSpend(None if cap is None else round(cap * 1_000_000_000))


def test_shares_and_modes(tmp_path: Path) -> None:
    text = """
accounts: {main: {}, batch: {}}
shares:
  a:
    cap: {requests: 5}
    monthly_spend_cap: 1
    shares: {b: {weight: 3, guarantee: {requests: 2}}}
priorities: {batch: {weight: 2}}
modes:
  default: observe
  rules:
    - {tenant: t, mode: enforce}
    - {pool: main/opus-5, mode: enforce}
    - {pool: batch/opus-5, tenant: t, mode: enforce}
"""
    assert defined(text, tmp_path) == [
        DefineSpend(None),
        DefineShare("a", (minute(Dimension.REQUESTS, 5), Limit(Dimension.SPEND, Window.MONTH, 1_000_000_000))),
        DefineShare("a/b", (), 3, (minute(Dimension.REQUESTS, 2),)),
        DefineClasses((Class(Priority.BATCH, 2, 50),)),
        DefineModes(
            (
                ("", "", Mode.OBSERVE),
                ("", "t", Mode.ENFORCE),
                ("anthropic/main/opus-5", "", Mode.ENFORCE),
            )
        ),
    ]


def test_parts_of_limits(tmp_path: Path) -> None:
    text = """
accounts: {main: {}}
shares: {a: {cap_part: {concurrency: 0.5, tokens: 0.25}, guarantee_part: {requests: 0.1}}}
"""
    caps = Part(Dimension.TOKENS, Window.MINUTE, 250), Part(Dimension.CONCURRENCY, Window.NONE, 500)
    guarantees = (Part(Dimension.REQUESTS, Window.MINUTE, 100),)
    assert DefineShare("a", cap_parts=caps, guarantee_parts=guarantees) in defined(text, tmp_path)


def test_paths_of_shares(tmp_path: Path) -> None:
    text = """
shares:
  a:
    tenants: [x, "chat-*"]
    shares:
      b: {tenants: [y, "chat-eu-*"]}
  c: {}
"""
    shares_of = Shares(config_of(text, tmp_path)).shares_of
    assert shares_of("x", "") == ("a",)
    assert shares_of("y", "c") == ("a", "a/b")  # the share that lists the tenant decides
    assert shares_of("chat-us", "") == ("a",)
    assert shares_of("chat-eu-1", "") == ("a", "a/b")
    assert shares_of("z", "a/b") == ("a", "a/b")
    assert shares_of("", "c") == ("c",)
    assert shares_of("z", "nowhere") == ()
    assert shares_of("", "") == ()


def test_ladders_include_ladders() -> None:
    config = load_config(ROOT / "docs" / "config.example.yaml", {})
    targets = [candidate.target.model for candidate in expand_ladder(config, "chat")]
    assert targets == [
        "claude-sonnet-5-5",
        "claude-sonnet-5",
        "claude-haiku-5-5",
        "anthropic.claude-haiku-4-5-20251001-v1:0",
    ]
    with pytest.raises(KeyError):
        expand_ladder(config, "nothing")


def fenced(document: Path) -> list[str]:
    return [part.split("```", 1)[0] for part in document.read_text("utf-8").split("```yaml\n")[1:]]


@pytest.mark.parametrize("number", range(len(fenced(ROOT / "docs" / "catalogue.md"))))
def test_the_examples_of_the_catalogues_page_work(number: int, tmp_path: Path) -> None:
    config_of(fenced(ROOT / "docs" / "catalogue.md")[number], tmp_path)


def test_a_model_a_tier_and_a_provider_without_code(tmp_path: Path) -> None:
    merged: dict[str, dict[str, object]] = {"catalogue": {}, "accounts": {}}
    model, tier, provider = (yaml.safe_load(text) for text in fenced(ROOT / "docs" / "catalogue.md"))
    known = catalogue(config_of(yaml.safe_dump(model), tmp_path))
    found = known.resolve(Target(model="claude-sonnet-6-20270115"))
    assert (found.pool, found.unknown, found.prices.output_tokens) == (
        "anthropic/default/sonnet-6",
        False,
        10_000_000_000,
    )
    merged |= tier
    known = catalogue(config_of(yaml.safe_dump(merged), tmp_path))
    assert known.resolve(Target(model="claude-opus-5")).definition.limits[0].amount == 8_000
    known = catalogue(config_of(yaml.safe_dump(provider), tmp_path))
    found = known.resolve(Target(account="lab", model="llama-4"))
    assert found.pool == "inhouse/lab/llama-4"
    assert [limit.amount for limit in found.definition.limits] == [100, 500_000]
    assert found.definition.profile.default_output_tokens == 500


def test_a_bad_configuration_defines_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        config_of("accounts: {main: {tier: none}}", tmp_path)
