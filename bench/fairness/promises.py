"""The row of promises: are places served by the time that was promised, and were denials right?

A denial is judged by running the same history once more, from its start, with the denied call let wait as long as it
takes: it was right if the call would not have been granted by its own deadline. What comes does not depend on what is
answered, so the histories differ in nothing but what that one call brings about.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from bench.fairness.ledger import POOL, Call, Ledger
from bench.fairness.setup import PoolLimits, Share
from bench.fairness.sources import Kind, Stream, between, mean_between
from bench.fairness.window import Figures, measure
from bench.lab.clock import SECOND, Clock
from bench.workloads import seeded
from paceline.engine.answers import Reason
from paceline.engine.operations import Priority

LIMITS = PoolLimits(1_500, 1_200_000)
WINDOW_S = 300.0
JUDGED = 40
"""Denials looked at in each run."""
_SIZES = (500, 20_000)
_FOREVER_US = 7_200 * SECOND
_WITHDRAWN, _UNSENT = 0.03, 0.05
_FORECASTS = {Reason.LIMIT, Reason.TIMEOUT}
_ASKS = (
    ("talk-1", Priority.INTERACTIVE, ("alpha",), 0.15),
    ("talk-2", Priority.INTERACTIVE, ("beta",), 0.15),
    ("work-1", Priority.STANDARD, ("alpha",), 0.5),
    ("work-2", Priority.STANDARD, ("beta",), 0.25),
    ("work-3", Priority.STANDARD, ("beta",), 0.25),
    ("jobs", Priority.BATCH, ("beta",), 0.5),
)
"""Tenant, class, share, and its part of the limit in the mean."""


def promises(seed: int, part: float) -> Figures:
    """Load of 1.8 times the limit in the mean that comes and goes in waves; patience of 2 to 120 s."""
    ledger = history(seed, {}, promises=True)
    window = measure(ledger, 30.0 * part, WINDOW_S * part)
    # Until all that were offered have their answer.
    clock = ledger.clock
    began, ended = window.since, window.until
    clock.until(ended + 125 * SECOND)
    mine = [call for call in ledger.calls if began <= call.offered_at < ended]
    denied = [call for call in mine if _is_forecast(call)]
    chance = seeded(seed, "judged")
    judged = chance.sample(denied, min(len(denied), max(1, round(JUDGED * part))))
    right = sum(was_right(seed, call) for call in judged)
    return {
        **kept(mine),
        "right": right / len(judged) if judged else math.nan,
        "denials": float(len(denied)),
        "judged": float(len(judged)),
        **window.conserved(),
    }


def history(seed: int, patience: Mapping[str, int], *, promises: bool = False) -> Ledger:
    """A ledger, and all that come to it: always the same ones for a seed, at the same instants."""
    shares = [Share("alpha", 1), Share("beta", 2)]
    ledger = Ledger(Clock(), {POOL: LIMITS}, shares, patience=patience, promises=promises)
    peak = 2.0
    for tenant, priority, path, part in _ASKS:
        kind = Kind(tenant, between(*_SIZES), priority, path)
        rate = part * LIMITS.rate(1) / mean_between(*_SIZES)
        phase, period = seeded(seed, f"wave-{tenant}").random(), seeded(seed, f"period-{tenant}").uniform(40.0, 90.0)

        def wave(seconds: float, phase: float = phase, period: float = period) -> float:
            return 0.5 + 0.5 * math.sin(2 * math.pi * (seconds / period + phase))

        chance = seeded(seed, tenant)
        stream = Stream(ledger, kind, rate * peak, chance, change=_changed(ledger), factor=wave)
        stream.start()
    return ledger


def _changed(ledger: Ledger) -> Callable[[Call, random.Random], None]:
    """Gives each call its own patience; some are never sent upstream, and some callers give up early."""

    def change(call: Call, chance: random.Random) -> None:
        patience = math.exp(chance.uniform(math.log(2.0), math.log(120.0)))
        gives_up = chance.random() < _WITHDRAWN
        call.max_wait_us = int(patience * SECOND)
        call.unsent = chance.random() < _UNSENT
        after = chance.uniform(0.0, patience)
        if gives_up:
            ledger.clock.after(after, lambda: ledger.withdraw(call) if call.offered_at else None)

    return change


def kept(calls: Sequence[Call]) -> Figures:
    """Of the places granted: the part served by the promised time; not a number while the engine promises nothing.

    A place that its caller took back, or whose own deadline came before the promised time, is not judged: ``early`` is
    the part of the latter. One without a promise is not kept.
    """
    placed = [call for call in calls if call.placed and not _was_withdrawn(call)]
    if not any(call.promised_by is not None for call in placed):
        return {"kept": math.nan, "early": math.nan, "ahead": math.nan, "places": float(len(placed))}
    early = [
        call
        for call in placed
        if call.granted_at is None and call.promised_by is not None and call.promised_by > call.deadline
    ]
    judged = len(placed) - len(early)
    good = [call for call in placed if call.granted_at is not None and call.granted_at <= (call.promised_by or 0)]
    ahead = [(call.promised_by or 0) - call.offered_at for call in good]
    waited = [call.waited_us or 0 for call in good]
    return {
        "kept": len(good) / judged if judged else math.nan,
        "early": len(early) / len(placed),
        "ahead": sum(ahead) / max(1, sum(waited)),
        "places": float(len(placed)),
    }


def _was_withdrawn(call: Call) -> bool:
    return call.denial is not None and call.denial.reason is Reason.RELEASED


def _is_forecast(call: Call) -> bool:
    """Denied as soon as it came, by a forecast."""
    return call.denied_at == call.offered_at and call.denial is not None and call.denial.reason in _FORECASTS


def was_right(seed: int, call: Call) -> bool:
    """Whether a denied call would indeed not have been served by its deadline."""
    ledger = history(seed, {call.key: _FOREVER_US})
    ledger.clock.until(call.deadline)
    again = next(one for one in ledger.calls if one.key == call.key)
    return again.granted_at is None
