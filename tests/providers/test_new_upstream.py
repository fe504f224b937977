"""An upstream that nobody has heard of, added in the configuration: the file of ``docs/catalogue.md``, without code."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from paceline.config import check, load_config
from paceline.config.translate import catalogue
from paceline.engine.accounting import Estimate, Usage
from paceline.engine.dimensions import SECOND_US, Dimension
from paceline.engine.operations import Reading, Refusal
from paceline.providers import Resolved, Target
from paceline.providers.headers import FAMILIES, parse

DOCUMENT = Path(__file__).parents[2] / "docs" / "catalogue.md"
TEXT = DOCUMENT.read_text("utf-8")


def example() -> str:
    """The YAML under "A new provider"."""
    return TEXT.partition("## A new provider")[2].partition("```yaml\n")[2].partition("```")[0]


@pytest.fixture
def found(tmp_path: Path) -> Resolved:
    file = tmp_path / "paceline.yaml"
    file.write_text(example(), "utf-8")
    assert check(str(file), {}) == ((), ())
    return catalogue(load_config(str(file), {})).resolve(Target(provider="inhouse", model="llama-4"))


def test_it_counts_as_its_profile_says(found: Resolved) -> None:
    assert (found.pool, found.unknown) == ("inhouse/lab/llama-4", False)
    profile = found.definition.profile
    sizes = profile.fill(Estimate(input_tokens=100, max_output_tokens=1_000))
    holds = {rule.dimension: rule.hold(sizes) for rule in profile.rules}
    assert holds == {Dimension.REQUESTS: 1, Dimension.TOKENS: 1_100}
    settled = {rule.dimension: rule.settle(Usage(1, 90, 0, 10, 50), 0) for rule in profile.rules}
    assert settled == {Dimension.REQUESTS: 1, Dimension.TOKENS: 200}
    assert {limit.dimension: limit.amount for limit in found.definition.limits} == {
        Dimension.REQUESTS: 100,
        Dimension.TOKENS: 500_000,
    }


def test_its_headers_are_read(found: Resolved) -> None:
    headers = [("RateLimit-Policy", b'"burst";q=100;w=60'), ("RateLimit", b'"burst";r=0;t=3')]
    seen = parse(found.header_family, headers, 429, ignored=Counter())
    assert seen is not None
    assert seen.readings == (Reading(Dimension.REQUESTS, 100, 0, 0, 60 * SECOND_US, 1),)
    assert (seen.refusal, seen.retry_after_us) == (Refusal.BUDGET, 3 * SECOND_US)


def test_a_family_that_does_not_exist_is_told_with_those_that_do(tmp_path: Path) -> None:
    file = tmp_path / "paceline.yaml"
    file.write_text(example().replace("header_family: ietf", "header_family: itef"), "utf-8")
    (line,), _ = check(str(file), {})
    assert "no header family is called 'itef'" in line
    assert all(family in line for family in FAMILIES)


def test_every_family_stands_in_the_document() -> None:
    rows = TEXT.partition("## Header families")[2]
    assert {row.split("`")[1] for row in rows.splitlines() if row.startswith("| `")} == set(FAMILIES)
