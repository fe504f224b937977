"""Counts what the properties did, so that a run says how much it has proved."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

SCALE = int(os.environ.get("PACELINE_TEST_SCALE", "1"))
"""How many times more examples than usual: for a long run, now and then."""
COUNTS: Counter[str] = Counter()
PROPERTIES: set[str] = set()


def example(name: str) -> None:
    """One more example of the property ``name``."""
    PROPERTIES.add(name)
    COUNTS["examples"] += 1


def step(count: int = 1) -> None:
    COUNTS["steps"] += count


def pytest_sessionfinish(session: Any) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tally"] = (sorted(PROPERTIES), dict(COUNTS))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    properties, counts = getattr(node, "workeroutput", {}).get("tally", ((), {}))
    PROPERTIES.update(properties)
    COUNTS.update(counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    mutants = {name for name in PROPERTIES if name.startswith("mutant: ")}
    properties = PROPERTIES - mutants
    if PROPERTIES:
        terminalreporter.write_line(
            f"properties: {len(properties)}, mutants: {len(mutants)}, "
            f"examples: {COUNTS['examples']:,}, steps: {COUNTS['steps']:,}"
        )
