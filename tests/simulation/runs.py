"""Runs of seeds, and what is kept of each."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from tests.simulation.world import World, say_nothing

COLLECT_EVERY = 20
AGAIN_EVERY = 40
"""One seed in so many is run twice, and must go the same way."""


@dataclass
class Outcome:
    """What one run did and found."""

    seed: int
    digest: str
    operations: int
    faults: int
    violations: list[str]
    coverage: Counter[tuple[str, str]] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


def run_one(seed: int) -> Outcome:
    """One run. What goes wrong in it is in ``violations``."""
    logging = structlog.get_config()
    say_nothing()
    try:
        world = World(seed)
        world.run()
    finally:
        structlog.configure(**logging)
    checks = world.checks
    counts = checks.counts
    counts["steps"] += checks.steps
    counts["records lost by the store"] += checks.lost_records
    return Outcome(
        seed, world.digest, world.fleet.operations, world.faults, checks.violations, world.coverage, checks.counts
    )


def run_many(seeds: Iterable[int]) -> list[Outcome]:
    """Several, with the collector in between and not within."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        found: list[Outcome] = []
        for place, seed in enumerate(seeds):
            if place % COLLECT_EVERY == 0:
                gc.collect()
            outcome = run_one(seed)
            if seed % AGAIN_EVERY == 0 and run_one(seed).digest != outcome.digest:
                outcome.violations.append("a second run of this seed went another way")
            found.append(outcome)
        gc.collect()
        return found
    finally:
        if enabled:
            gc.enable()
