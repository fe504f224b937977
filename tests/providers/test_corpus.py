"""The corpus: one file for each response, real ones as published and broken ones, with what is to be read from it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from paceline.engine.dimensions import Dimension
from paceline.engine.operations import Observation, Reading, Refusal
from paceline.providers.headers import FAMILIES, parse

CORPUS = Path(__file__).parent / "corpus"
CASES = {path.relative_to(CORPUS).with_suffix("").as_posix(): path for path in sorted(CORPUS.rglob("*.json"))}


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def details_of(error: dict[str, Any]) -> bytes:
    """Text stands for itself, anything else for its JSON."""
    details = error.get("details", "")
    return details.encode() if isinstance(details, str) else json.dumps(details).encode()


def read(case: dict[str, Any], ignored: Counter[str]) -> Observation | None:
    response = case["response"]
    error = response.get("error", {})
    return parse(
        case["family"],
        [(name, value.encode()) for name, value in response.get("headers", {}).items()],
        response["status"],
        error.get("type", ""),
        error.get("message", ""),
        error.get("retry_after_us"),
        error_code=error.get("code", ""),
        error_details=details_of(error),
        ignored=ignored,
    )


def expected(case: dict[str, Any]) -> Observation | None:
    told = case["read"]
    if told is None:
        return None
    return Observation(
        readings=tuple(
            Reading(**{**reading, "dimension": Dimension[reading["dimension"]]}) for reading in told.get("readings", ())
        ),
        refusal=Refusal[told["refusal"]] if "refusal" in told else None,
        refused=Dimension[told["refused"]] if "refused" in told else None,
        retry_after_us=told.get("retry_after_us"),
        allowed=told.get("allowed"),
    )


@pytest.mark.parametrize("name", CASES)
def test_what_is_read(name: str) -> None:
    case, ignored = load(CASES[name]), Counter[str]()
    assert read(case, ignored) == expected(case)
    assert ignored == Counter(case.get("ignored", {}))


@pytest.mark.parametrize("name", CASES)
def test_no_family_breaks_on_what_is_anothers(name: str) -> None:
    case = load(CASES[name])
    wanted = expected(case)
    for family in FAMILIES:
        found = read({**case, "family": family}, Counter())
        # Figures are a family's own, and with them whether a limit is zero; why a call was refused is not.
        if wanted is not None and wanted.refusal not in (None, Refusal.NO_QUOTA) and "x-amzn" not in str(case).lower():
            assert found is not None
            assert found.refusal in (wanted.refusal, Refusal.NO_QUOTA)


def test_every_family_has_real_and_broken_responses() -> None:
    cases = [load(path) for path in CASES.values()]
    assert {case["family"] for case in cases} == set(FAMILIES)
    for case in cases:
        assert set(case) <= {"source", "family", "response", "read", "ignored"}
        assert case["source"]
    seen = {case["read"]["refusal"] for case in cases if case["read"] and "refusal" in case["read"]}
    assert seen == {refusal.name for refusal in Refusal} - {"OTHER"}
