"""``make prove-fairness``: rows of the laboratory of fairness, with three servers over one Redis.

A client process on each server; every tenant calls on all of them. Each row runs for a minute and a half. Ends with 1
if a bound is missed.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.fairness.__main__ import line
from bench.fairness.real.rows import ROWS, Row
from bench.fairness.real.run import Ran, Say, run
from bench.fairness.report import DOCUMENT, Cell, lines, put
from bench.fairness.window import Figures
from bench.learning_sdk.report import MOST_WANT
from tests.proofs.process import ServerDied

MARKERS = "<!-- real table -->", "<!-- /real table -->"
_STORES = ("redis-server", "valkey-server")
_RESULTS = "result.msgpack"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = _options(arguments)
    rows = [row for row in ROWS if not options.rows or any(row.name.startswith(name) for name in options.rows)]
    wrong = ""
    if not rows:
        wrong = f"no such row; there are: {' '.join(row.name for row in ROWS)}"
    elif options.write and options.part != 1.0:
        wrong = "only whole runs are written: leave out --write, or --part"
    elif not any(map(shutil.which, _STORES)):
        wrong = "needs redis-server (or valkey-server) on the path"
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    first = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    cells: list[Kept] = []
    for seed in range(first, first + options.seeds):
        for row in rows:
            _say(f"{row.case}, seed {seed}")
            done = valid(row, seed, options.part, options.again)
            cells.append(done)
            if options.part == 1.0:
                keep(done, options.output)
            _say(f"{len(cells)}/{len(rows) * options.seeds}  {line(done.cell)}")
    _say(f"\n{table(rows, cells)}")
    if options.write:
        # A row that was not asked for now stays as it was last run.
        write(table(ROWS, load(options.output)))
    return 1 if any(each.cell.missed for each in cells) else 0


class Kept(msgspec.Struct):
    """A run that is kept. ``runs``: so many were needed, of which this is the last."""

    cell: Cell
    runs: int = 1


def load(folder: Path) -> list[Kept]:
    """Those that a folder keeps: of each row and seed the last run."""
    path = folder / _RESULTS
    return msgspec.msgpack.decode(path.read_bytes(), type=list[Kept]) if path.exists() else []


def keep(done: Kept, folder: Path) -> None:
    """In the place of an earlier run of the row with the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    others = [each for each in load(folder) if (each.cell.row, each.cell.seed) != (done.cell.row, done.cell.seed)]
    (folder / _RESULTS).write_bytes(msgspec.msgpack.encode([*others, done]))


def valid(row: Row, seed: int, part: float, again: int) -> Kept:
    """Run a row; one that is not valid is run ``again``, at most so often."""
    done = Kept(cell(row, seed, part, _say))
    while starved(done.cell) and done.runs <= again:
        want = done.cell.figures["want"]
        _say(f"{line(done.cell)}  not valid: a process had no core for {want:.0%} of it; again")
        done = Kept(cell(row, seed, part, _say), done.runs + 1)
    return done


def cell(row: Row, seed: int, part: float, say: Say) -> Cell:
    """Run one row with one seed. A run that fails has a fault, and no other figures."""
    began = time.monotonic()
    try:
        figures = figures_of(row, run(row, seed, part, say))
    except (AssertionError, ServerDied, subprocess.SubprocessError, OSError, ValueError) as error:
        say(f"  failed: {type(error).__name__}: {error}")
        figures = dict.fromkeys([*(bound.figure for bound in row.bounds), *row.shown], float("nan"))
        figures["faults"] = 1.0
    missed = tuple(bound.figure for bound in row.bounds if not bound.holds(figures[bound.figure]))
    return Cell(row.name, seed, figures, missed, time.monotonic() - began)


def figures_of(row: Row, ran: Ran, say: Say | None = None) -> Figures:
    """All figures of a row."""
    for fault in ran.faults:
        (say or _say)(f"  FAULT: {fault}")
    more = {
        "granted": float(len(ran.replayed.window.granted())),
        "faults": float(len(ran.faults)),
        "want": max(ran.want.values(), default=0.0),
    }
    return {**row.judge(ran.replayed), **more}


def starved(done: Cell) -> bool:
    """It falls short, and the machine had too much other work for what was to be measured."""
    return bool(done.missed) and done.figures["want"] > MOST_WANT


def table(rows: Sequence[Row], kept: Sequence[Kept]) -> str:
    """Markdown."""
    cells = [each.cell for each in kept]
    seeds = sorted({each.seed for each in cells})
    short = sum(bool(each.missed) for each in cells)
    words = [
        f"Each figure is the median of the seeds, and in brackets the worst; its bound follows. {len(cells)} runs, "
        f"{short} of them short of a bound, {sum(map(starved, cells))} of these not valid; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}; two cores, shared with other work."
    ]
    again = [each for each in kept if each.runs > 1]
    if again:
        cases = {row.name: row.case for row in rows}
        words.append(f"Run again: {'; '.join(f'{cases[each.cell.row]} ({each.runs - 1})' for each in again)}.")
    return "\n".join([*lines(rows, cells), "", " ".join(words)]) + "\n"


def write(body: str, document: Path = DOCUMENT) -> None:
    """Into the document."""
    put(document, MARKERS, body)


def _say(text: str) -> None:
    print(text, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fairness.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="rows whose names begin so (all)")
    parser.add_argument("--seeds", type=int, default=1, help="fresh seeds of each row (1)")
    parser.add_argument("--seed", type=int, help="the first seed (drawn)")
    parser.add_argument("--part", type=float, default=1.0, help="of the usual length of each run (1); to try out only")
    parser.add_argument("--again", type=int, default=1, help="run a row that is not valid so often again (1)")
    parser.add_argument("--write", action="store_true", help="write the rows that are kept into docs/fairness.md")
    parser.add_argument("--output", type=Path, default=Path("build/fairness"), help="folder of result.msgpack")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
