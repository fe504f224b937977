"""``python -m bench.lab.learning``: the laboratory of learning. Runs rows of its table and prints each cell."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from bench.lab.measure import Cell, cell
from bench.lab.report import write
from bench.lab.rows import ROWS, Row
from bench.lab.run import Sample

_PLACES = {"accepted": 0, "lost": 0, "avoidable": 0, "used": 4, "outside_error": 3, "outside_mean": 3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if a bound is missed (and nothing is written)."""
    options = _options(arguments)
    rows = [row for row in ROWS if not options.rows or any(row.name.startswith(name) for name in options.rows)]
    if not rows:
        print(f"no such row; there are: {' '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    if options.trace:
        return _trace(rows[0], options.accepted, options.seed or 1)
    first = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    began = time.monotonic()
    cells: list[Cell] = []
    seeds = range(first, first + options.seeds)
    for done in run_all(rows, options.accepted, seeds, options.processes, keep=options.write):
        cells.append(done)
        print(f"{len(cells)}/{len(rows) * len(seeds)}  {line(done)}", flush=True)
    if options.write:
        print(write(rows, cells))
    missed = sum(bool(each.missed) for each in cells)
    cpu = sum(each.cpu_s for each in cells)
    print(f"{len(cells)} cells, {missed} short of a bound; {time.monotonic() - began:.0f} s, {cpu:.0f} s of processor")
    return 1 if missed and not options.write else 0


def run_all(
    rows: Sequence[Row], accepted: int, seeds: Sequence[int], processes: int, *, keep: bool = False
) -> Iterator[Cell]:
    """All rows with all seeds, in any order; ``keep`` the samples of the first seed."""
    if processes <= 1:
        for seed in seeds:
            for row in rows:
                yield cell(row, accepted, seed, keep=keep and seed == seeds[0])
        return
    with ProcessPoolExecutor(processes) as pool:
        waiting = [
            pool.submit(_cell_of, row.name, accepted, seed, keep and seed == seeds[0]) for seed in seeds for row in rows
        ]
        for future in as_completed(waiting):
            yield future.result()


def _cell_of(name: str, accepted: int, seed: int, keep: bool) -> Cell:
    return cell(next(row for row in ROWS if row.name == name), accepted, seed, keep=keep)


def line(done: Cell) -> str:
    """One cell in one line."""
    figures = "  ".join(f"{name} {_number(name, value)}" for name, value in done.figures.items())
    by = f"  by {done.refused_by}" if done.refused_by else ""
    verdict = f"SHORT OF {', '.join(done.missed)}" if done.missed else "ok"
    return f"{done.row:15s} seed {done.seed}  {figures}{by}  {done.cpu_s:.1f}s  {verdict}"


def _number(name: str, value: float) -> str:
    return f"{value:.{_PLACES.get(name, 2)}f}"


def _trace(row: Row, accepted: int, seed: int) -> int:
    """The samples of one cell as a table, one a second."""
    done = cell(row, accepted, seed, keep=True)
    print(line(done))
    print("\t".join(Sample.__struct_fields__))
    for one in done.samples[::2]:
        print("\t".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in _values(one)))
    return 0


def _values(one: Sample) -> list[object]:
    return [getattr(one, name) for name in Sample.__struct_fields__]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.lab.learning", description=__doc__)
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="rows whose names begin so (all)")
    parser.add_argument("--seeds", type=int, default=5, help="fresh seeds of each row (5)")
    parser.add_argument("--seed", type=int, help="the first seed (drawn)")
    parser.add_argument("--accepted", type=int, default=10_000, help="accepted calls of each cell, about (10000)")
    parser.add_argument("--processes", type=int, default=2, help="processes (2)")
    parser.add_argument("--write", action="store_true", help="write docs/learning.md and its pictures")
    parser.add_argument("--trace", action="store_true", help="print the samples of the first row instead")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
