"""The table of ``docs/fairness.md``, and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

from bench.fairness.cost import WAITERS
from bench.fairness.picture import picture
from bench.fairness.window import Figures
from bench.lab.rows import Bound

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "fairness.md"
BEGIN, END = "<!-- table -->", "<!-- /table -->"

_PERCENT = {
    "used", "lost", "idle", "below", "apart", "off", "within", "lent", "minimum", "kept", "right", "early",
    "over", "together", "want",
}  # fmt: skip
_PLACES = {"jain": 4, "exponent": 3}
_ORACLE = ("used", "lost", "idle", "parked_s")
_NAMES = {
    "used": "used",
    "lost": "lost",
    "idle": "idle",
    "parked_s": "parked, s",
    "jain": "Jain",
    "below": "most below the fair share",
    "apart": "dominant shares apart by",
    "off": "off the weights by",
    "within": "tenants of one share apart by",
    "wait_p99_ms": "interactive wait p99, ms",
    "minimum": "batch in its worst minute, of its minimum",
    "over": "above the cap by",
    "together": "granted whole",
    "lent": "lent",
    "lag_s": "behind the guarantee at most, s",
    "claim": "longest wait ÷ (size ÷ entitled rate)",
    "served": "large calls served",
    "growth": "growth ÷ that of the logarithm",
    "exponent": "exponent from 1,000 on",
    "kept": "served by the promised time",
    "right": "denials that were right",
    "early": "gave up before the promised time",
    "ahead": "promised wait ÷ wait",
    "places": "places",
    "denials": "denials",
    "judged": "judged",
    "late_max_ms": "longest wait beside a room, ms",
    "late_p99_ms": "p99 of such waits, ms",
    "granted": "calls granted",
    "faults": "errors",
    "want": "a process wanted a core",
    **{f"us_{waiters}": f"µs with {waiters:,}" for waiters in WAITERS},
}


class Row(Protocol):
    """One line of a table; see :class:`bench.fairness.rows.Row`."""

    @property
    def name(self) -> str: ...
    @property
    def case(self) -> str: ...
    @property
    def bounds(self) -> tuple[Bound, ...]: ...
    @property
    def shown(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Cell:
    """One row with one seed."""

    row: str
    seed: int
    figures: Figures
    missed: tuple[str, ...]
    cpu_s: float


def write(rows: Sequence[Row], cells: Sequence[Cell], document: Path = DOCUMENT) -> str:
    """Write the table between the markers of the document, and the picture beside it. Returns the table."""
    body = table(rows, cells)
    put(document, (BEGIN, END), body)
    costs = [cell.figures for cell in cells if cell.row == "cost"]
    if costs:
        folder = document.parent / "fairness"
        folder.mkdir(exist_ok=True)
        measured = {waiters: [each[f"us_{waiters}"] for each in costs] for waiters in WAITERS}
        (folder / "cost.svg").write_text(picture("Processor time of one decision, 500 tenants", measured))
    return body


def put(document: Path, markers: tuple[str, str], body: str) -> None:
    """Between two markers of a document. Raises ``ValueError`` if they are not in it."""
    begin, end = markers
    before, rest = document.read_text().split(begin, 1)
    _, after = rest.split(end, 1)
    document.write_text(f"{before}{begin}\n\n{body}\n{end}{after}")


def table(rows: Sequence[Row], cells: Sequence[Cell]) -> str:
    """Markdown: :func:`lines`, and what they are of."""
    seeds = sorted({cell.seed for cell in cells})
    short = sum(bool(cell.missed) for cell in cells)
    about = (
        f"Each figure is the median of the seeds, and in brackets the worst; its bound follows. {len(cells)} cells, "
        f"{short} of them short of a bound; seeds {seeds[0]} to {seeds[-1]}; "
        f"{sum(cell.cpu_s for cell in cells) / 60:.0f} minutes of processor time."
    )
    return "\n".join([*lines(rows, cells), "", about]) + "\n"


def lines(rows: Sequence[Row], cells: Sequence[Cell]) -> list[str]:
    """A head, and one line for each row: the median of its seeds and the worst."""
    found = ["| case | figures | used | lost | idle | parked, s | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        mine = [cell for cell in cells if cell.row == row.name]
        if not mine:
            continue
        bounds = {bound.figure: bound for bound in row.bounds}
        own = [f"{_NAMES[name]}: {_bounded(bound, mine)}" for name, bound in bounds.items() if name not in _ORACLE]
        own += [f"{_NAMES[name]}: {_median(name, mine)}" for name in row.shown if name in mine[0].figures]
        oracle = [
            _bounded(bounds[name], mine) if name in bounds else _median(name, mine)
            if name in mine[0].figures else "–"
            for name in _ORACLE
        ]  # fmt: skip
        found.append("| " + " | ".join([row.case, "; ".join(own) or "–", *oracle, _verdict(row, mine)]) + " |")
    return found


def _verdict(row: Row, cells: Sequence[Cell]) -> str:
    missed = [bound.figure for bound in row.bounds if any(bound.figure in cell.missed for cell in cells)]
    unknown = {name for name in missed if all(math.isnan(cell.figures[name]) for cell in cells)}
    parts = []
    short = [name for name in missed if name not in unknown]
    if short:
        parts.append(f"short of: {', '.join(_NAMES[name] for name in short)}")
    if unknown:
        parts.append(f"not measured: {', '.join(_NAMES[name] for name in missed if name in unknown)}")
    return "; ".join(parts) or "reached"


def _bounded(bound: Bound, cells: Sequence[Cell]) -> str:
    values = [cell.figures[bound.figure] for cell in cells]
    sign, value = ("≥", bound.least) if bound.least is not None else ("≤", bound.most)
    assert value is not None
    limit = number(bound.figure, value)
    if any(math.isnan(each) for each in values):
        return f"not measured {sign} {limit}"
    worst = min(values) if bound.least is not None else max(values)
    return f"{number(bound.figure, median(values))} ({number(bound.figure, worst)}) {sign} {limit}"


def _median(name: str, cells: Sequence[Cell]) -> str:
    values = [cell.figures[name] for cell in cells if not math.isnan(cell.figures[name])]
    return number(name, median(values)) if values else "not measured"


def number(name: str, value: float) -> str:
    """As the table shows it."""
    if math.isnan(value):
        return "not measured"
    if name in _PERCENT:
        text = f"{100 * value:.2f}".rstrip("0").rstrip(".")
        return f"{text} %"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{_PLACES.get(name, 2)}f}".rstrip("0").rstrip(".")
