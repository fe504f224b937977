"""``make prove-learning``: rows of the laboratory of learning, with real processes and the official SDK.

For each row a simulated upstream, ``paceline serve`` over its journal, and a fleet of processes that call with the
``anthropic`` SDK and our hook, at twice the limit. What is used and refused is counted at the upstream; when a limit
ruled, and after how many readings, is read from the journal of the server.

Exit status: 0 when every row reaches its bounds, 1 when one falls short or something failed.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec

from bench.demo.children import ChildFailed
from bench.learning_sdk.figures import fates, figures, refused_by
from bench.learning_sdk.report import Result, about, result, table, write
from bench.learning_sdk.rows import ROWS, Row
from bench.learning_sdk.run import Say, run
from tests.proofs.process import ServerDied

_RESULTS = "result.json"
FAILURES = (ChildFailed, ServerDied, aiohttp.ClientError, OSError, ValueError)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = _options(arguments)
    rows = [row for row in ROWS if not options.rows or any(row.name.startswith(name) for name in options.rows)]
    if not rows:
        print(f"error: no such row; there are: {' '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    began = time.monotonic()
    try:
        results = prove(rows, seed, options.output, _say, options.again)
    except KeyboardInterrupt:
        return 130
    _say(f"{time.monotonic() - began:.0f} s in all; {options.output / 'result.json'}")
    if len(results) < len(rows):
        return 1
    if options.write:
        # A row that was not asked for now stays as it was last run.
        kept = load(options.output)
        write(f"{table(ROWS, kept)}\n\n{about(kept)}")
    return 0 if all(each.reached for each in results) else 1


def prove(rows: Sequence[Row], seed: int, folder: Path, say: Say, again: int = 0) -> list[Result]:
    """Run rows one after the other, print the table, keep each result in ``result.json``, in the place of the row's
    earlier one. A row that could not be run is missing.

    One that is not valid is run ``again``, at most so often.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for number, row in enumerate(rows, 1):
        say(f"{number}/{len(rows)}  {row.case}: {row.warmup_s:.0f} s and {row.window_s:.0f} s")
        try:
            done = _valid(row, seed, folder / row.name, say, again)
        except FAILURES as error:
            print(f"error: {row.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        results.append(done)
        kept = [*(each for each in load(folder) if each.row != row.name), done]
        (folder / _RESULTS).write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n")
    say(f"\n{table(rows, results)}\n\n{about(results)}")
    return results


def load(folder: Path) -> list[Result]:
    """The results that are kept in a folder."""
    path = folder / _RESULTS
    return msgspec.json.decode(path.read_bytes(), type=list[Result]) if path.exists() else []


def _valid(row: Row, seed: int, folder: Path, say: Say, again: int) -> Result:
    done = _one(row, seed, folder, say)
    while not done.reached and done.starved and done.runs <= again:
        say(f"  not valid: a process had no core for {max(done.want.values()):.0%} of the window; again")
        runs = done.runs + 1
        done = _one(row, seed, folder, say)
        done.runs = runs
    return done


def _one(row: Row, seed: int, folder: Path, say: Say) -> Result:
    seen = asyncio.run(run(row, seed, folder, say))
    figures_of = figures(row, seen)
    done = result(
        row,
        seed,
        figures_of,
        refused_by=refused_by(seen),
        fates=fates(seen),
        busy_cores=list(seen.busy.cores),
        busy_processes=dict(seen.busy.processes),
        want=seen.want,
        failed=seen.failed,
    )
    say("  " + "  ".join(f"{name} {value:.4g}" for name, value in figures_of.items() if value))
    for wrong in done.failed:
        say(f"  {wrong}")
    return done


def _say(line: str) -> None:
    print(line, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning_sdk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME", help="only rows whose names begin so")
    parser.add_argument("--seed", type=int, default=None, help="a fresh one by default")
    parser.add_argument("--again", type=int, default=2, help="run a row that is not valid so often again (2)")
    parser.add_argument("--write", action="store_true", help="write all rows that are kept into docs/learning.md")
    parser.add_argument(
        "--output", type=Path, default=Path("build/learning-sdk"), help="folder of result.json, logs and journals"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
