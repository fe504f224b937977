"""Runs seeds, fresh ones unless told otherwise, and says what they met.

python -m tests.simulation --seeds 200 [--base N] [--processes 2]
python -m tests.simulation --seed 7 [--trace]
python -m tests.simulation --broken [--name NAME] [--seeds 40]
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.broken import VARIANTS, catch
from tests.simulation.runs import Outcome, run_many, run_one
from tests.simulation.world import World

CHUNK = 25
REPORT_SECONDS = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, help="repeat this one")
    parser.add_argument("--seeds", type=int, default=200, help="how many fresh ones")
    parser.add_argument("--base", type=int, help="the first of them; by chance if left out")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="print what happened, with --seed")
    parser.add_argument("--broken", action="store_true", help="show that broken variants are caught")
    parser.add_argument("--name", help="only this broken variant")
    options = parser.parse_args()
    if options.broken:
        return broken(options.name, options.seeds if options.base is not None else 60, options.base)
    if options.seed is not None:
        return repeat(options.seed, options.trace)
    base = secrets.randbelow(10**9) if options.base is None else options.base
    return fresh(base, options.seeds, options.processes)


def repeat(seed: int, trace: bool) -> int:
    world = World(seed)
    world.run()
    if trace:
        for at, *what in world.trace:
            print(f"{at / 1e6:10.4f}", *what)
    outcome = run_one(seed)
    print(f"seed {seed}: {outcome.operations} operations, {outcome.faults} faults, digest {outcome.digest}")
    print("   ", ", ".join(f"{name}: {count}" for name, count in sorted(outcome.counts.items())))
    for violation in outcome.violations:
        print("   ", violation)
    if world.digest != outcome.digest:
        print("    two runs of this seed differ")
        return 1
    return 1 if outcome.violations else 0


def fresh(base: int, count: int, processes: int) -> int:
    """Run seeds ``base`` to ``base + count - 1``."""
    print(f"seeds {base} to {base + count - 1}", flush=True)
    began, told = time.monotonic(), time.monotonic()
    done = operations = faults = 0
    least = (10**9, 10**9)
    coverage: Counter[tuple[str, str]] = Counter()
    counts: Counter[str] = Counter()
    failed: list[int] = []
    for outcome in outcomes(base, count, processes):
        done += 1
        operations += outcome.operations
        faults += outcome.faults
        least = min(least[0], outcome.operations), min(least[1], outcome.faults)
        coverage.update(outcome.coverage)
        counts.update(outcome.counts)
        if outcome.violations:
            failed.append(outcome.seed)
            print(f"seed {outcome.seed} (repeat: python -m tests.simulation --seed {outcome.seed}):")
            for violation in outcome.violations[:3]:
                print("   ", violation)
            sys.stdout.flush()
        if time.monotonic() - told > REPORT_SECONDS:
            told = time.monotonic()
            print(f"{done} seeds, {60 * done / (told - began):.0f} a minute, {len(failed)} failed", flush=True)
    took = time.monotonic() - began
    print_coverage(coverage)
    print("counted:", ", ".join(f"{name}: {number:,}" for name, number in sorted(counts.items())))
    print(
        f"{done:,} seeds in {took:.0f} s ({60 * done / took:.0f} a minute), {operations:,} operations (at least "
        f"{least[0]} each), {faults:,} faults (at least {least[1]} each), {len(failed)} with violations"
    )
    return 1 if failed else 0


def outcomes(base: int, count: int, processes: int) -> Iterator[Outcome]:
    chunks = [range(first, min(first + CHUNK, base + count)) for first in range(base, base + count, CHUNK)]
    if processes <= 1:
        for chunk in chunks:
            yield from run_many(chunk)
        return
    with ProcessPoolExecutor(processes) as pool:
        found: Iterable[list[Outcome]] = pool.map(run_many, chunks)
        for chunk_found in found:
            yield from chunk_found


def print_coverage(coverage: Counter[tuple[str, str]]) -> None:
    """Faults by the state that they met."""
    states = sorted({state for _, state in coverage})
    kinds = sorted({kind for kind, _ in coverage})
    wide = max((len(kind) for kind in kinds), default=0)
    print(f"{'fault':<{wide}}  " + "  ".join(states))
    for kind in kinds:
        cells = (f"{coverage[kind, state] or '.':>{len(state)}}" for state in states)
        print(f"{kind:<{wide}}  " + "  ".join(cells))


def broken(name: str | None, most: int, base: int | None) -> int:
    """Show for each broken variant the seed that finds it."""
    missed = 0
    for variant in VARIANTS:
        if name is not None and variant.name != name:
            continue
        seeds = range(base, base + most) if base is not None else (*variant.seeds, *range(1, most + 1))
        began = time.monotonic()
        found = catch(variant, seeds)
        took = time.monotonic() - began
        if found is None:
            missed += 1
            print(f"{variant.name}: NOT caught in {len(seeds)} seeds ({took:.0f} s)", flush=True)
        else:
            print(f"{variant.name}: seed {found.seed}, {took:.1f} s: {found.violations[0]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
