"""One fleet in a closed loop, with the figures that a test wants of it."""

from __future__ import annotations

from dataclasses import dataclass

from bench.lab.clock import SECOND
from bench.lab.run import Run
from bench.lab.setting import Setting
from paceline.upstream.account import RAMP

__all__ = ["Figures", "Setting", "run"]


@dataclass(slots=True)
class Figures:
    """What came of it, by the upstream's own log; waits in seconds; by source. A call that still runs is not lost."""

    used: dict[str, float]
    accepted: int
    refused: int
    refused_by: dict[str, int]
    offered: dict[str, int]
    lost: dict[str, int]
    waits: dict[str, list[float]]

    @property
    def refused_per_1000(self) -> float:
        """Refusals for each thousand calls that were accepted."""
        return 1_000 * self.refused / max(1, self.accepted)

    def wait(self, source: str, part: float) -> float:
        """A quantile of the waits of one source."""
        return quantile(self.waits[source], part)


def quantile(values: list[float], part: float) -> float:
    """The value below which ``part`` of them lie; of nothing: 0."""
    found = sorted(values)
    return found[min(len(found) - 1, int(part * len(found)))] if found else 0.0


def figures_of(run: Run) -> Figures:
    """The figures of the window."""
    first, last = run.begin, run.end
    counts = [call for call in run.service.account.calls if first.logged < call.number <= last.logged]
    offered = [task for task in run.fleet.tasks if first.at <= task.begun < last.at]
    names = [source.name for source in run.setting.all_sources()]
    by: dict[str, int] = {}
    for call in counts:
        if call.status == "refused":
            by[call.dimension] = by.get(call.dimension, 0) + 1
    return Figures(
        {dimension: used_part(run, dimension) for dimension in run.used},
        sum(call.status == "accepted" for call in counts),
        sum(by.values()),
        by,
        {name: sum(task.source.name == name for task in offered) for name in names},
        {name: sum(task.source.name == name and task.fate not in ("ok", "") for task in offered) for name in names},
        {
            name: [task.waited / SECOND for task in offered if task.source.name == name and task.waited is not None]
            for name in names
        },
    )


def used_part(run: Run, dimension: str) -> float:
    """How much of a limit was used in the window, of what others left.

    If the input has a ramp, that is the limit. Output is produced long after its call was accepted: of it
    counts what was charged within the window.
    """
    used = run.used[RAMP if run.setting.ramp is not None and RAMP in run.used else dimension]
    if dimension != "output_tokens":
        return used.net
    left = used.budget - used.outside
    return used.drawn / left if left > 0 else 0.0


def run(setting: Setting) -> Figures:
    """Run one setting."""
    return figures_of(Run(setting).go())
