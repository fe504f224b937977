"""The table of ``docs/learning.md``, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.lab.measure import STEADY, Cell
from bench.lab.picture import picture
from bench.lab.rows import Bound, Row

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "learning.md"
BEGIN, END = "<!-- table -->", "<!-- /table -->"

_PERCENT = {"used", "attempts", "outside_error", "budget_gap"}
_COLUMNS = ("used", "refused")
_NAMES = {
    "used": "used",
    "refused": "refused",
    "avoidable": "avoidable refusals",
    "readings_down": "readings until the lower limit rules",
    "readings_up": "readings until the higher one",
    "outside_error": "its rate is off by",
    "refused_learning": "refused while learning",
    "attempts": "attempts in the episode",
    "back_s": "seconds until 90 % are back",
    "budget_gap": "level off by",
    "budget_learned": "limits moved",
    "refused_after": "refusals in the minute after",
    "used_again_s": "seconds until 95 % are used",
    "wait_ratio": "added wait p99 ÷ an ideal bucket's",
    "open_s": "seconds until open",
    "shut_s": "counted from the beginning",
    "wait_p99": "added wait p99, s",
    "ideal_p99": "an ideal bucket's, s",
    "limit_known_s": "seconds until the limit is known",
    "outside_known_s": "seconds until its rate is known",
    "oscillates": "oscillates",
}


def write(rows: Sequence[Row], cells: Sequence[Cell]) -> str:
    """Write the table between the markers of the document, and the pictures beside it. Returns the table."""
    body = table(rows, cells)
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{after}")
    folder = DOCUMENT.parent / "learning"
    folder.mkdir(exist_ok=True)
    for row in rows:
        drawn = next((each for each in cells if each.row == row.name and each.samples), None)
        if drawn is not None:
            (folder / f"{row.name}.svg").write_text(
                picture(f"{row.case.replace('`', '')}: seed {drawn.seed}", drawn.samples, drawn.window_s, drawn.events)
            )
    return body


def table(rows: Sequence[Row], cells: Sequence[Cell]) -> str:
    """Markdown: one line for each row, the median of its seeds and the worst."""
    lines = [
        "| case | used | refused per 1,000 | further figures | refused before the window | swings a minute | |",
        "|---|---|---|---|---|---|---|",
    ]
    short = []
    for row in rows:
        mine = [each for each in cells if each.row == row.name]
        if not mine:
            continue
        missed = sorted({figure for each in mine for figure in each.missed})
        if missed:
            short.append((row, mine, missed))
        bounds = {bound.figure: bound for bound in row.bounds}
        further = [f"{_NAMES[name]}: {_figure(bound, mine)}" for name, bound in bounds.items() if name not in _COLUMNS]
        further += [f"{_NAMES[name]}: {_pair([each.figures[name] for each in mine], max, name)}" for name in row.shown]
        cells_of_row = [
            f"[{row.case}](learning/{row.name}.svg)",
            *(_figure(bounds[name], mine) if name in bounds else "–" for name in _COLUMNS),
            "; ".join(further) or "–",
            *(_pair([each.figures[name] for each in mine], max, name) for name in ("refused_before", "swings")),
            f"short of: {', '.join(_NAMES[name] for name in missed)}" if missed else "reached",
        ]
        lines.append("| " + " | ".join(cells_of_row) + " |")
    seeds = sorted({each.seed for each in cells})
    about = (
        f"Each figure is the median of the seeds, and in brackets the worst; its bound follows. {len(cells)} cells, "
        f"seeds {seeds[0]} to {seeds[-1]}, {min(_accepted(cells)):,.0f} to {max(_accepted(cells)):,.0f} accepted calls "
        f"in each, {sum(each.cpu_s for each in cells) / 60:.0f} minutes of processor time."
    )
    return "\n".join([*lines, "", about, "", _fell_short(short)]) + "\n"


def _accepted(cells: Sequence[Cell]) -> list[float]:
    return [each.figures["accepted"] for each in cells]


def _fell_short(short: Sequence[tuple[Row, Sequence[Cell], Sequence[str]]]) -> str:
    if not short:
        return "Every row reaches its bounds with every seed."
    lines = ["Fell short:", ""]
    for row, mine, missed in short:
        bounds = {bound.figure: bound for bound in (*row.bounds, STEADY)}
        parts = [
            f"{_NAMES[name]} {_figure(bounds[name], mine)}, with {sum(name in each.missed for each in mine)} of "
            f"{len(mine)} seeds"
            for name in missed
        ]
        lines.append(f"- {row.case}: {'; '.join(parts)}.")
    return "\n".join(lines)


def _figure(bound: Bound, cells: Sequence[Cell]) -> str:
    values = [each.figures[bound.figure] for each in cells]
    text = _pair(values, min if bound.least is not None else max, bound.figure)
    sign, value = ("≥", bound.least) if bound.least is not None else ("≤", bound.most)
    assert value is not None
    return f"{text} {sign} {_number(bound.figure, value)}"


def _pair(values: Sequence[float], worst: object, name: str) -> str:
    if any(math.isnan(value) for value in values):
        known = [value for value in values if not math.isnan(value)]
        middle = _number(name, median(known)) if len(known) > len(values) / 2 else "never"
        return f"{middle} (never)"
    extreme = min(values) if worst is min else max(values)
    return f"{_number(name, median(values))} ({_number(name, extreme)})"


def _number(name: str, value: float) -> str:
    if name in _PERCENT:
        return f"{100 * value:.1f} %".replace(".0 %", " %")
    return f"{value:.2f}".rstrip("0").rstrip(".")
