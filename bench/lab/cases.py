"""What is run in each row of the table: the usual fleet on the usual limits, and what differs from that.

Each function makes, or is, a builder: from the accepted calls that are wanted, and the seed, to the setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from bench.lab.clock import SECOND
from bench.lab.plants import BLOCK_US
from bench.lab.setting import (
    INPUT,
    KINDS,
    LIMITS,
    OUTPUT,
    REQUESTS,
    Event,
    Ramp,
    Setting,
    Source,
    mean_size,
    usual,
    window_for,
    workers_for,
)
from bench.workloads import Renewal
from paceline.engine.operations import Priority


def _setting(accepted: int, seed: int, **changed: object) -> Setting:
    """The usual fleet on the usual limits, and what is changed of that; a window long enough for so many calls."""
    setting = replace(Setting(seed, warmup_s=30.0), **changed)  # type: ignore[arg-type]
    if "window_s" not in changed:
        wanted = 1.1 * accepted / (1 - setting.outside)
        window = window_for(wanted, setting.all_sources(), setting.limits, setting.binding)  # type: ignore[arg-type]
        setting = replace(setting, window_s=window)
    return setting


def unknown(accepted: int, seed: int) -> Setting:
    return _setting(accepted, seed, told={}, warmup_s=60.0)


def changing(accepted: int, seed: int) -> Setting:
    # Half of the time at half of the limits: so much longer.
    window = _setting(round(accepted * 4 / 3), seed).window_s
    events = (Event(window / 4, "limits", 0.5), Event(window * 3 / 4, "limits", 1.0))
    return _setting(accepted, seed, window_s=window, events=events)


def outside(part: float) -> Callable[[int, int], Setting]:
    return lambda accepted, seed: _setting(accepted, seed, outside=part, warmup_s=60.0)


def estimates(factor: float | None) -> Callable[[int, int], Setting]:
    if factor is None:
        return lambda accepted, seed: _setting(accepted, seed, estimates="none", warmup_s=5.0, settled_calls=200)
    return lambda accepted, seed: _setting(accepted, seed, our_factor=factor, warmup_s=5.0, settled_calls=200)


REASONING = {REQUESTS: 10_000, INPUT: 10_000_000, OUTPUT: 2_000_000}


def reasoning(burst_seconds: float) -> Callable[[int, int], Setting]:
    source = Source(
        "reasoning",
        "reasoning",
        Priority.STANDARD,
        True,
        workers=workers_for(2.0, "reasoning", OUTPUT, REASONING),
        max_tokens=32_000,
        deadline_s=900.0,
    )
    return lambda accepted, seed: _setting(
        accepted,
        seed,
        sources=(source,),
        limits=REASONING,
        binding=OUTPUT,
        burst_seconds=burst_seconds,
        warmup_s=90.0,
        chunk_s=1.0,
        hold_s=300.0,
        drain_s=1.0,
    )


def cached(workload: str, estimates: str = "given") -> Callable[[int, int], Setting]:
    def build(accepted: int, seed: int) -> Setting:
        sources = tuple(replace(source, workload=workload) for source in usual(LIMITS))
        batch = replace(sources[1], workers=workers_for(1.6, workload, INPUT, LIMITS))
        return _setting(accepted, seed, sources=(sources[0], batch), estimates=estimates, warmup_s=60.0)

    return build


def short_burst(accepted: int, seed: int) -> Setting:
    return _setting(accepted, seed, burst_seconds=1.0, initial=1.0, warmup_s=60.0)


def plain(**changed: object) -> Callable[[int, int], Setting]:
    return lambda accepted, seed: _setting(accepted, seed, **changed)


def overload(accepted: int, seed: int) -> Setting:
    window = _setting(accepted, seed).window_s
    return _setting(accepted, seed, window_s=window + 60.0, events=(Event(window / 2, "overload", seconds=60.0),))


RAMP = Ramp(200_000, 10_000)


def ramp(accepted: int, seed: int) -> Setting:
    # Until the ramp has offered what so many calls use.
    half = RAMP.step / 2
    wanted = accepted * _usual_call() / 0.95
    minutes = (math.sqrt(RAMP.start**2 + 4 * half * wanted) - RAMP.start) / (2 * half)
    mean = {**LIMITS, INPUT: round(RAMP.start + half * minutes)}
    return _setting(
        accepted, seed, sources=usual(mean, deadline_s=60.0), ramp=RAMP, window_s=60 * minutes, sample_s=1.0
    )


def _usual_call() -> float:
    """Tokens of input in the mean of the usual fleet's calls."""
    window = window_for(1_000, usual(LIMITS), LIMITS, INPUT)
    return 0.95 * LIMITS[INPUT] / 60 * window / 1_000


def restart(accepted: int, seed: int) -> Setting:
    window = _setting(accepted, seed).window_s
    return _setting(accepted, seed, events=(Event(window / 2, "restart", seconds=2.0),))


def bursty(burst_seconds: float) -> Callable[[int, int], Setting]:
    """Code completion alone, in clumps, at 0.8 times the input limit."""
    rate = 0.8 * LIMITS[INPUT] / 60 / mean_size(KINDS["code"], INPUT)
    source = Source("code", "code", Priority.STANDARD, False, arrivals=Renewal(rate, 13.0), deadline_s=600.0)
    return lambda accepted, seed: _setting(
        accepted, seed, sources=(source,), burst_seconds=burst_seconds, initial=1.0, drain_s=300.0
    )


SILENCE_S = 600.0
AFTER_S = 90.0
"""What follows from a silence or a wrong belief is looked at for so long, at least."""


def silence(*more: Event, outside: float = 0.0) -> Callable[[int, int], Setting]:
    def build(accepted: int, seed: int) -> Setting:
        # What was saved up in the silence is used before anything else shows.
        window = max(2 * AFTER_S, _setting(accepted, seed, outside=outside).window_s)
        events = (Event(window / 2, "silence", seconds=SILENCE_S),)
        inside = tuple(replace(event, at_s=window / 2 + event.at_s) for event in more)
        return _setting(
            accepted, seed, outside=outside, window_s=window + SILENCE_S, events=(*inside, *events), warmup_s=60.0
        )

    return build


def plant(what: str) -> Callable[[int, int], Setting]:
    def build(accepted: int, seed: int) -> Setting:
        window = _setting(accepted, seed).window_s + AFTER_S + (BLOCK_US / SECOND if what == "block" else 0.0)
        return _setting(accepted, seed, window_s=window, events=(Event(20.0, "plant", what=what),))

    return build
