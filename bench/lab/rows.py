"""The rows of the table: what is run, what is measured beyond the two figures that all rows have, and the bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.lab import cases, special
from bench.lab.plants import PLANTS
from bench.lab.run import Run
from bench.lab.setting import Event, Setting

Extra = Callable[[Run], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure must reach: at least, or at most."""

    figure: str
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether it does. What is not a number never does."""
        if math.isnan(value):
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``build`` makes the setting from the accepted calls wanted and the seed."""

    name: str
    case: str
    build: Callable[[int, int], Setting]
    bounds: tuple[Bound, ...]
    extra: Extra = lambda run: {}
    most_accepted: int | None = None
    """A row that is about seconds, not about many calls: no more calls than these are wanted."""
    shown: tuple[str, ...] = ()
    """Figures without a bound that belong beside the others."""


def usual_bounds(used: float, refused: float) -> tuple[Bound, ...]:
    """The two that stand together."""
    return Bound("used", least=used), Bound("refused", most=refused)


_PLANTED = {
    "limit": "a tenth of the limit",
    "burst": "a twentieth of the burst",
    "level": "a level two bursts below zero",
    "outside": "others that use 90 %",
    "block": "a block of 5 minutes",
    "concurrency": "no more than one call in flight",
    "overload": "an overload that leaves one call in flight",
}
_OPEN = (Bound("open_s", most=10.0),)
_FEW = 2_500
_SHUT = ("shut_s",)


# -- the table --------------------------------------------------------------------------------------------------------

ROWS: tuple[Row, ...] = (
    Row("unknown", "limits unknown at start", cases.unknown, usual_bounds(0.97, 1), special.first_minute,
        shown=("limit_known_s",)),
    Row(
        "changed",
        "limit halved, then doubled, in mid-run",
        cases.changing,
        (
            Bound("used", least=0.96),
            Bound("avoidable", most=3),
            Bound("readings_down", most=1),
            Bound("readings_up", most=2),
        ),
        special.limit_changes,
    ),
    *(
        Row(
            f"outside-{round(part * 100)}",
            f"{100 * part:.0f} % outside traffic",
            cases.outside(part),
            (*usual_bounds(0.95, 3), Bound("outside_error", most=0.10)),
            special.outside_rate,
            shown=("outside_known_s",),
        )
        for part in (0.2, 0.5)
    ),
    Row("estimates-none", "estimates missing", cases.estimates(None), usual_bounds(0.97, 1)),
    Row("estimates-x3", "estimates three times too high", cases.estimates(3.0), usual_bounds(0.97, 1)),
    Row("estimates-d3", "estimates a third of the truth", cases.estimates(1 / 3), usual_bounds(0.97, 1)),
    *(
        Row(
            f"reasoning-{burst}",
            f"output-bound, reasoning sizes, `max_tokens` 32,000, burst {burst} s",
            cases.reasoning(burst),
            usual_bounds(0.96, 1),
        )
        for burst in (60, 10)
    ),
    Row("cached-0", "0 % cache reads", cases.plain(warmup_s=60.0), usual_bounds(0.97, 1)),
    Row("cached-80", "80 % cache reads", cases.cached("cached-80"), usual_bounds(0.97, 1)),
    Row("cached-96", "96 % cache reads", cases.cached("cached-96"), usual_bounds(0.97, 1)),
    Row("cached-96-told", "96 % cache reads, stated by the caller", cases.cached("cached-96", "cached"),
        usual_bounds(0.97, 1)),
    Row("burst-1", "burst of 1 s instead of 60 s", cases.short_burst, (*usual_bounds(0.95, 1),
        Bound("refused_learning", most=5)), special.short_burst),
    Row("headers-absent", "headers absent", cases.plain(headers=False), usual_bounds(0.90, 5)),
    Row("headers-late", "headers late by 30 s, reordered, rounded", cases.plain(late_s=30.0, warmup_s=60.0),
        usual_bounds(0.95, 1)),
    Row("overload", "529 episode of 60 s", cases.overload, (Bound("attempts", most=0.10), Bound("back_s", most=15.0),
        Bound("budget_gap", most=0.05), Bound("budget_learned", most=0)), special.overload),
    Row("ramp", "ramp limit (+10k input tokens a minute)", cases.ramp, usual_bounds(0.95, 1)),
    Row("restart", "coordinator restarted in mid-run", cases.restart, (Bound("refused_after", most=2),
        Bound("used_again_s", most=10.0)), special.restart),
    *(
        Row(
            f"bursty-{burst}",
            f"bursty arrivals (CV 13) at 0.8 × the limit, burst {burst} s",
            cases.bursty(burst),
            (Bound("refused", most=1), Bound("wait_ratio", most=1.10)),
            special.waiting,
            shown=("wait_p99", "ideal_p99"),
        )
        for burst in (60, 10)
    ),
    Row("silence", "after 10 minutes of silence", cases.silence(), _OPEN, special.opened, _FEW, _SHUT),
    Row("silence-limit", "after 10 minutes of silence, in which a halved limit was restored",
        cases.silence(Event(-30.0, "limits", 0.5), Event(300.0, "limits", 1.0)), _OPEN, special.opened, _FEW, _SHUT),
    Row("silence-outside", "after 10 minutes of silence, in which others who used 50 % went away",
        cases.silence(Event(300.0, "outside", 0.0), outside=0.5), _OPEN, special.opened, _FEW, _SHUT),
    *(
        Row(f"wrong-{what}", f"wrongly believed: {_PLANTED[what]}", cases.plant(what), _OPEN, special.opened, _FEW,
            _SHUT)
        for what in PLANTS
    ),
)  # fmt: skip
