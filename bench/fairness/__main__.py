"""``python -m bench.fairness``: the laboratory of fairness. Runs rows of its table and prints each cell.

Ends with 1 if a bound is missed, or was not measured.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from bench.fairness.report import Cell, number, write
from bench.fairness.rows import ROWS, Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for."""
    options = _options(arguments)
    rows = [row for row in ROWS if not options.rows or any(row.name.startswith(name) for name in options.rows)]
    if not rows:
        print(f"no such row; there are: {' '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    if options.write and (len(rows) < len(ROWS) or options.part != 1.0):
        print("only the whole table is written: leave out --write, or --rows and --part", file=sys.stderr)
        return 2
    first = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    began = time.monotonic()
    cells: list[Cell] = []
    seeds = range(first, first + options.seeds)
    for done in run_all(rows, seeds, options.part, options.processes):
        cells.append(done)
        print(f"{len(cells)}/{len(rows) * len(seeds)}  {line(done)}", flush=True)
    if options.write:
        print(write(rows, cells))
    missed = sum(bool(each.missed) for each in cells)
    print(f"{len(cells)} cells, {missed} short of a bound; {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


def run_all(rows: Sequence[Row], seeds: Sequence[int], part: float, processes: int) -> Iterator[Cell]:
    """All rows with all seeds, in any order."""
    if processes <= 1:
        yield from (cell(row, seed, part) for seed in seeds for row in rows)
        return
    with ProcessPoolExecutor(processes) as pool:
        waiting = [pool.submit(_cell_of, row.name, seed, part) for seed in seeds for row in rows]
        for future in as_completed(waiting):
            yield future.result()


def _cell_of(name: str, seed: int, part: float) -> Cell:
    return cell(next(row for row in ROWS if row.name == name), seed, part)


def cell(row: Row, seed: int, part: float = 1.0) -> Cell:
    """Run one row with one seed."""
    began = time.process_time()
    figures = row.run(seed, part)
    missed = tuple(bound.figure for bound in row.bounds if not bound.holds(figures[bound.figure]))
    return Cell(row.name, seed, figures, missed, time.process_time() - began)


def line(done: Cell) -> str:
    """One cell in one line."""
    figures = "  ".join(f"{name} {number(name, value)}" for name, value in done.figures.items())
    verdict = f"SHORT OF {', '.join(done.missed)}" if done.missed else "ok"
    return f"{done.row:14s} seed {done.seed}  {figures}  {done.cpu_s:.1f}s  {verdict}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.fairness", description=__doc__)
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="rows whose names begin so (all)")
    parser.add_argument("--seeds", type=int, default=3, help="fresh seeds of each row (3)")
    parser.add_argument("--seed", type=int, help="the first seed (drawn)")
    parser.add_argument("--part", type=float, default=1.0, help="of the usual length of each run (1); to try out only")
    parser.add_argument("--processes", type=int, default=2, help="processes (2)")
    parser.add_argument("--write", action="store_true", help="write docs/fairness.md and its picture")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
