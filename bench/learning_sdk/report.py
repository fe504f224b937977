"""The table of the rows that were run, and its place in ``docs/learning.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from bench.lab.report import DOCUMENT
from bench.lab.rows import Bound
from bench.learning_sdk.rows import Row

BEGIN, END = "<!-- sdk table -->", "<!-- /sdk table -->"
MOST_WANT = 0.1
"""A run in which a process wanted a core for a larger part of the window, and falls short, says nothing of us."""

_NAMES = {
    "avoidable": "avoidable refusals",
    "readings_down": "readings until the lower limit rules",
    "readings_up": "readings until the higher one",
    "refused_learning": "refused per 1,000 while learning",
    "refused_after": "refusals until a minute after",
    "used_again_s": "seconds until 95 % are used",
    "limit_known_s": "seconds until the limit is known",
    "ending_s": "seconds that the server took to end",
    "away_s": "seconds without a server",
    "alone": "calls that nobody had granted",
    "used": "used",
    "refused": "refused",
}
_COLUMNS = ("used", "refused")


class Result(msgspec.Struct, kw_only=True):
    """One row that was run."""

    row: str
    case: str
    seed: int
    figures: dict[str, float | None]
    """``None``: it did not come to that."""
    missed: list[str]
    refused_by: dict[str, int]
    fates: dict[str, int]
    busy_cores: list[float]
    busy_processes: dict[str, float]
    want: dict[str, float]
    runs: int = 1
    """So many were needed: this is the last."""
    failed: list[str]
    """What processes did wrong, at the end of the run."""

    @property
    def reached(self) -> bool:
        """All bounds hold, and nothing failed."""
        return not self.missed and not self.failed

    @property
    def starved(self) -> bool:
        """The machine had too much other work for what was to be measured."""
        return max(self.want.values(), default=0.0) > MOST_WANT


def result(row: Row, seed: int, found: dict[str, float], **rest: object) -> Result:
    """With the bounds held against the figures."""
    missed = [bound.figure for bound in row.bounds if not bound.holds(found[bound.figure])]
    figures = {name: None if math.isnan(value) else value for name, value in found.items()}
    fields = {"row": row.name, "case": row.case, "seed": seed, "figures": figures, "missed": missed, **rest}
    return msgspec.convert(fields, Result)


def table(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Markdown: one line for each row that was run."""
    lines = [
        "| case | accepted calls | used | refused per 1,000 | further figures | refused before the window | "
        "busiest core; wanted one | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_name = {each.row: each for each in results}
    for row in rows:
        if row.name in by_name:
            lines.append(_line(row, by_name[row.name]))
    return "\n".join(lines)


def _line(row: Row, done: Result) -> str:
    figures, bounds = done.figures, {bound.figure: bound for bound in row.bounds}
    further = [f"{_NAMES[name]}: {_bounded(bound, figures)}" for name, bound in bounds.items() if name not in _COLUMNS]
    shown = (*row.shown, "alone") if figures.get("alone") else row.shown
    further += [f"{_NAMES[name]}: {_number(name, figures[name])}" for name in shown if name in figures]
    refused = f"{_bounded(bounds['refused'], figures)}" if "refused" in bounds else _number("", figures["refused"])
    cells = (
        row.case,
        f"{figures['accepted']:,.0f}",
        _bounded(bounds["used"], figures) if "used" in bounds else _number("used", figures["used"]),
        f"{refused} ({figures['refusals']:.0f})",
        "; ".join(further) or "–",
        f"{_number('', figures['refused_before'])} ({figures['refusals_before']:.0f})",
        f"{_number('used', figures['busiest_core'])}; {_number('used', figures['want'])}",
        _verdict(done),
    )
    return "| " + " | ".join(cells) + " |"


def _verdict(done: Result) -> str:
    if done.reached:
        return "reached"
    short = f"short of: {', '.join(_NAMES[name] for name in done.missed) or 'a process'}"
    return f"not valid; {short}" if done.starved else short


def _bounded(bound: Bound, figures: dict[str, float | None]) -> str:
    sign, value = ("≥", bound.least) if bound.least is not None else ("≤", bound.most)
    return f"{_number(bound.figure, figures[bound.figure])} {sign} {_number(bound.figure, value)}"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "never"
    if name == "used":
        return f"{100 * value:.1f} %".replace(".0 %", " %")
    return f"{value:.2f}".rstrip("0").rstrip(".")


def about(results: Sequence[Result]) -> str:
    """What the table is of: a sentence or two."""
    if not results:
        return "Nothing was run."
    short = [each for each in results if not each.reached]
    again = [each for each in results if each.runs > 1]
    words = [
        "In brackets: counts. The last column but one: how busy the busiest core was, whoever used it, and the part of "
        "the window in which a process of the run, the worst of them, wanted a core and had none. A row that falls "
        f"short with more than {MOST_WANT:.0%} of that is not valid, and is run again. {_seeds(results)}.",
        f"Short of a bound: {'; '.join(each.case for each in short)}." if short else "Every row reaches its bounds.",
    ]
    if again:
        words.append(f"Run again: {'; '.join(f'{each.case} ({each.runs - 1})' for each in again)}.")
    return " ".join(words)


def _seeds(results: Sequence[Result]) -> str:
    seeds = sorted({each.seed for each in results})
    return f"Seed {seeds[0]}" if len(seeds) == 1 else f"Rows run at different times, seeds {', '.join(map(str, seeds))}"


def write(text: str) -> None:
    """Put the table between its markers. Raises :class:`ValueError` if they are not in the document."""
    document = DOCUMENT.read_text()
    if BEGIN not in document or END not in document:
        raise ValueError(f"{DOCUMENT} has no {BEGIN}")
    before, rest = document.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
