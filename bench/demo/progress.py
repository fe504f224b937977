"""Live progress: a table that is drawn anew on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bench.demo.measures import percentile
from bench.demo.settings import MODE_NAMES, MODES
from bench.fleet.plan import Mode, Record

_LINE_EVERY_S = 10.0


@dataclass(slots=True)
class Status:
    """What is known of a mode so far."""

    phase: str = ""
    used: float | None = None
    accepted: int = 0
    refused: int = 0
    offered: int = 0
    lost: int = 0
    """Interactive calls, as ``offered``."""
    waits: list[float] = field(default_factory=list)
    """Seconds, of interactive calls that were answered."""

    def add(self, record: Record) -> None:
        """An interactive call whose fate is known."""
        self.offered += 1
        if not record.answered:
            self.lost += 1
        elif record.sent is not None:
            self.waits.append(record.sent - record.begun)

    def cells(self) -> tuple[str, ...]:
        """Figures, as text."""
        wait = percentile(self.waits, 0.99)
        return (
            "" if self.used is None else f"{self.used:.1%}",
            f"{self.accepted:,}" if self.accepted else "",
            f"{self.refused:,}" if self.accepted else "",
            f"{self.lost / self.offered:.1%}" if self.offered else "",
            "" if wait is None else f"{wait:.2f} s",
        )


_COLUMNS = ("limit used", "accepted", "refused (429)", "chat calls lost", "chat wait p99")


class Board:
    """All modes. The figures are of the measured window, while it runs; the result has the exact ones."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.status: dict[Mode, Status] = {mode: Status() for mode in MODES}
        self._live: Live | None = None
        self._line_at = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show it until the end of the block."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self._table(), console=self._console, refresh_per_second=4, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def phase(self, mode: Mode, phase: str) -> None:
        """What is going on now."""
        self.status[mode].phase = phase
        if self._live is None:
            self._console.print(f"{mode}: {phase}", highlight=False, soft_wrap=True)
        self.changed(mode)

    def changed(self, mode: Mode) -> None:
        """Draw it anew."""
        if self._live is not None:
            self._live.update(self._table())
            return
        now = time.monotonic()
        cells = self.status[mode].cells()
        if now >= self._line_at and any(cells):
            self._line_at = now + _LINE_EVERY_S
            told = ", ".join(f"{name} {cell}" for name, cell in zip(_COLUMNS, cells, strict=True) if cell)
            self._console.print(f"  {told}", highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title="the same fleet on the same limit")
        table.add_column("")
        for column in _COLUMNS:
            table.add_column(column, justify="right")
        table.add_column("", min_width=24)
        for mode, status in self.status.items():
            table.add_row(MODE_NAMES[mode], *status.cells(), status.phase)
        return table
