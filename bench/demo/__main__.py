"""``python -m bench.demo``: the same fleet on the same limit, in three modes.

Chat services that together want less than half of the limit, with bursts above it, and batch jobs on the same key that
always have work; all with the official ``anthropic`` SDK and one deadline per call. A chat call that is lost is gone; a
batch worker counts it as lost, and offers the same item again until it is answered. First alone with the SDK's retries
as shipped, then retrying until the deadline, then through Paceline. What was accepted and refused is counted at the
simulated upstream, waits and losses at the callers.

The modes run once each, one after the other with the same seed, on one machine: they do not alternate, because real
SDKs sleep in real seconds. Run it again for another seed.

Exit status: 0 when all modes ran, 1 when something failed; a run on a machine that was too busy is reported as not
valid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path

import aiohttp
from rich.console import Console

from bench.demo.children import ChildFailed
from bench.demo.figures import Figures
from bench.demo.picture import picture
from bench.demo.progress import Board
from bench.demo.report import Results, document, table
from bench.demo.runner import run_mode
from bench.demo.settings import MODES, Settings
from bench.fleet.plan import Mode

_SHORTEST_S = 2.0
_LONGEST_S = 600.0


async def run(settings: Settings, folder: Path, board: Board) -> Results:
    """All modes, one after the other. Raises :class:`ChildFailed` and errors of the upstream's side endpoints."""
    results: dict[Mode, Figures] = {}
    for mode in MODES:
        results[mode] = await run_mode(settings, mode, folder, board)
    return results


def demonstrate(settings: Settings, folder: Path, drawing: Path | None, console: Console) -> int:
    """Run it, print it, write it down. Returns the exit status; a failed process is a line on standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    board = Board(console)
    try:
        with board.shown():
            results = asyncio.run(run(settings, folder / "logs", board))
    except (ChildFailed, aiohttp.ClientError, OSError, ValueError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    found = document(settings, results)
    (folder / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    drawn = picture(settings, results)
    for path in (folder / "result.svg", drawing):
        if path is not None:
            path.write_text(drawn, encoding="utf-8")
    console.print(table(settings, results))
    for reason in found["invalid_because"]:
        console.print(f"not valid: {reason}", highlight=False, soft_wrap=True)
    console.print(f"{folder / 'result.json'}, {folder / 'result.svg'}", highlight=False, soft_wrap=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    given = _arguments(arguments)
    settings = Settings(
        seed=random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed,
        window_s=given.seconds,
        # A short run is a look at the machinery; its times shrink together.
        warmup_s=min(8.0, given.seconds),
        deadline_s=min(30.0, 2 * given.seconds),
    )
    return demonstrate(settings, given.output, given.picture, Console())


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=_seconds, default=56.0, help="the window that is measured, in each mode")
    parser.add_argument("--seed", type=int, default=None, help="a fresh one by default")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder of result.json, result.svg, logs"
    )
    parser.add_argument("--picture", type=Path, default=None, help="write the picture there, too")
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    value = float(text)
    if not _SHORTEST_S <= value <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"{text} is not between {_SHORTEST_S:.0f} and {_LONGEST_S:.0f} seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
