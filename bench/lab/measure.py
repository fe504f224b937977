"""One cell of the table: a row with a seed, run and measured."""

from __future__ import annotations

import time
from statistics import pstdev

import msgspec

from bench.lab.closed_loop import figures_of, used_part
from bench.lab.rows import Bound, Row
from bench.lab.run import Run, Sample, steps
from bench.lab.special import before_window
from bench.workloads import Modulated

STEP_S = 5.0
"""Use of the limit is looked at over so long at a time."""
MOST_SWINGS = 1.0
"""A minute."""
STEADY = Bound("oscillates", most=0.0)
"""The bound of all rows."""


class Cell(msgspec.Struct, gc=False):
    """What came of one row with one seed. ``missed``: the figures whose bounds do not hold."""

    row: str
    seed: int
    figures: dict[str, float]
    refused_by: dict[str, int]
    missed: list[str]
    cpu_s: float
    samples: list[Sample] = []
    """With what a picture needs beside them: the length of the window, and when something happened in it, seconds."""
    window_s: float = 0.0
    events: list[float] = []


def cell(row: Row, accepted: int, seed: int, *, keep: bool = False) -> Cell:
    """Run a row; ``keep`` the samples for a picture."""
    begun = time.process_time()
    wanted = accepted if row.most_accepted is None else min(accepted, row.most_accepted)
    run = Run(row.build(wanted, seed)).go()
    found = figures_of(run)
    figures = {
        "used": used_part(run, run.setting.binding),
        "refused": found.refused_per_1000,
        "accepted": float(found.accepted),
        "lost": float(sum(found.lost.values())),
        **before_window(run),
        **steadiness(run),
        **row.extra(run),
    }
    missed = [bound.figure for bound in (*row.bounds, STEADY) if not bound.holds(figures[bound.figure])]
    cpu_s = time.process_time() - begun
    done = Cell(row.name, seed, figures, found.refused_by, missed, cpu_s)
    if keep:
        done.samples, done.window_s = run.samples, run.setting.window_s
        done.events = [at for one in run.setting.events for at in (one.at_s, one.at_s + one.seconds)]
    return done


def steadiness(run: Run) -> dict[str, float]:
    """Whether it runs steadily.

    ``swings`` counts how often the ledger's level swings across the truth (:meth:`Run.swings`), per minute. ``spread``
    is the standard deviation of the use of the limit over steps of 5 s, in the second half of the window, and
    ``growing`` that divided by the same of the first half. ``oscillates`` is 1 if there is more than one swing a
    minute, or, where nothing happens in mid-run and arrivals are not the cause, if the spread is above a tenth and
    grows by half.
    """
    setting, halves = run.setting, []
    for start in (0.0, setting.window_s / 2):
        pairs = steps(run.between(start, start + setting.window_s / 2), STEP_S)
        uses = [(b.charged - a.charged) / max(1, b.offered - a.offered) for a, b in pairs]
        halves.append(pstdev(uses) if len(uses) > 1 else 0.0)
    swings = run.swings(0.0, setting.window_s) * 60 / setting.window_s
    growing = halves[1] / halves[0] if halves[0] > 0 else 1.0
    steady = not setting.events and all(isinstance(one.arrivals, Modulated | None) for one in setting.all_sources())
    oscillates = swings > MOST_SWINGS or (steady and halves[1] > 0.1 and growing > 1.5)
    return {"swings": swings, "spread": halves[1], "growing": growing, "oscillates": float(oscillates)}
