"""The simulation itself: it repeats, it finds nothing wrong, and it would find it.

The long run is ``make simulate``; here are as many fresh seeds as fit into ten seconds.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.simulation.broken import VARIANTS, Variant, catch
from tests.simulation.loop import Loop, Process, Spinning
from tests.simulation.runs import run_many, run_one

ROOT = Path(__file__).parents[2]
FRESH_SECONDS = 12.0
SEED = 12
MORE = 60


def test_nothing_is_wrong_in_fresh_seeds() -> None:
    base = int(os.environ.get("PACELINE_SIMULATION_SEED", secrets.randbelow(10**9)))
    end = time.monotonic() + FRESH_SECONDS
    seed = base
    while seed == base or time.monotonic() < end:
        outcome = run_many([seed])[0]
        assert not outcome.violations, f"repeat: python -m tests.simulation --seed {seed}\n" + "\n".join(
            outcome.violations
        )
        assert outcome.operations >= 500
        assert outcome.faults >= 5
        seed += 1
    print(f"{seed - base} seeds from {base}")


def test_a_seed_repeats() -> None:
    assert run_one(SEED).digest == run_one(SEED).digest
    assert run_one(SEED).digest != run_one(SEED + 1).digest


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_a_seed_repeats_in_another_process(hash_seed: str) -> None:
    code = f"from tests.simulation.runs import run_one; print(run_one({SEED}).digest)"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=50, check=True
    )
    assert found.stdout.strip() == run_one(SEED).digest


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_broken_variant_is_caught(variant: Variant) -> None:
    # A change of the product gives every seed another course: then some more are tried.
    assert catch(variant, (*variant.seeds, *range(1, MORE))), "a fault that the checks do not see"


def test_a_stopped_process_gets_no_turn() -> None:
    loop = Loop()
    heard: list[tuple[str, int]] = []
    process = Process("node")

    def tick(name: str) -> None:
        heard.append((name, loop.now))

    for at in (10, 20, 30):
        loop.at(at, tick, f"mine at {at}", context=process.context)
    loop.at(15, lambda: loop.stop_process(process))
    loop.at(40, lambda: loop.resume_process(process))
    loop.advance(100)
    assert heard == [("mine at 10", 10), ("mine at 20", 40), ("mine at 30", 40)]
    loop.at(110, tick, "never", context=process.context)
    loop.kill_process(process)
    loop.advance(200)
    assert len(heard) == 3


def test_time_that_stands_still_is_found() -> None:
    loop = Loop()

    def again() -> None:
        loop.call_soon(again)

    loop.call_soon(again)
    with pytest.raises(Spinning):
        loop.advance(10)
