"""The rows that run with real processes: the limits, who calls, and the bounds.

As in the laboratory, with smaller calls (17 to 34 a second are granted, so that a minute has many) and buckets of 10 s
of refill. They are full at the start, and empty before the window begins, for more is asked for than there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.fairness.real.replay import Replayed
from bench.fairness.rows import CONSERVED, WASTE
from bench.fairness.setup import PoolLimits
from bench.fairness.sharing import by_weights, fairness
from bench.fairness.sources import Kind, always, between, mean_between
from bench.fairness.urgency import flood
from bench.fairness.window import Figures
from bench.lab.rows import Bound
from paceline.engine.operations import Priority

TOOK_S = (0.2, 1.5)
"""From a grant to its Commit."""
FIRST, SECOND = "sonnet-5", "haiku-4-5"
"""Pools; ``claude-`` before them makes the model."""
_BURST_S = 10
_ONE = {FIRST: PoolLimits(4_000, 4_000_000, _BURST_S)}
_TWO = {FIRST: PoolLimits(4_000, 1_000_000, _BURST_S), SECOND: PoolLimits(4_000, 2_000_000, _BURST_S)}
_RATE = _ONE[FIRST].rate(1)
_SIZES = (500, 5_000)
_TALK = (200, 4_000)
_JOBS = (2_000, 10_000)
_EACH = 2_000
"""Tokens where all calls have one size: whenever one fits, all do."""
_WEIGHTS = {"one": 1, "two": 2, "four": 4}
LATE_MS = 250.0
"""The most that a call may wait beside a room: the network, the journal and the scheduler of a busy machine."""


@dataclass(frozen=True, slots=True)
class Source:
    """Who calls: a stream of ``rate`` calls a second of all client processes together; or, if that is zero, a backlog
    of ``depth`` calls that always wait, together."""

    kind: Kind
    rate: float = 0.0
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; ``shown`` are figures without a bound, ``shares`` weights by name.

    A tenant's name begins with that of its share. ``granted``, ``faults`` and ``want`` are figures of every row:
    calls, what went wrong, and for what part of the window a process had no core
    (:class:`~bench.learning_sdk.want.Want`).
    """

    name: str
    case: str
    pools: Mapping[str, PoolLimits]
    sources: tuple[Source, ...]
    judge: Callable[[Replayed], Figures]
    bounds: tuple[Bound, ...]
    shown: tuple[str, ...] = ("granted", "want")
    shares: Mapping[str, int] = field(default_factory=dict)
    warmup_s: float = 30.0
    window_s: float = 60.0


def _kind(
    tenant: str,
    sizes: tuple[int, int],
    priority: Priority = Priority.STANDARD,
    shares: tuple[str, ...] = (),
    pools: tuple[str, ...] = (FIRST,),
    max_wait_s: float = 60.0,
) -> Kind:
    size = always(sizes[0]) if sizes[0] == sizes[1] else between(*sizes)
    return Kind(tenant, size, priority, shares, pools, max_wait_s, TOOK_S)


def _demands() -> tuple[Source, ...]:
    unit = 4.0 * _RATE / 255 / mean_between(*_SIZES)
    return tuple(Source(_kind(f"t{2**power}", _SIZES), unit * 2**power) for power in range(8))


def _weights() -> tuple[Source, ...]:
    rate = _RATE / mean_between(*_SIZES)
    return tuple(
        Source(_kind(f"{name}-{place}", _SIZES, shares=(name,)), rate * asks / 2)
        for name, asks in (("one", 1.5), ("two", 1.0), ("four", 1.0))
        for place in (1, 2)
    )


def _flooded() -> tuple[Source, ...]:
    rate = 0.3 / 3 * _RATE / mean_between(*_TALK)
    half = _ONE[FIRST].bursts[1] // 2
    return (
        *(Source(_kind(f"talk-{place}", _TALK, Priority.INTERACTIVE), rate) for place in range(3)),
        Source(_kind("halves", (half, half), Priority.BATCH, max_wait_s=600.0), depth=3),
        Source(_kind("jobs", _JOBS, Priority.BATCH, max_wait_s=600.0), depth=21),
    )


def _candidates() -> tuple[Source, ...]:
    rate = sum(limits.rate(1) for limits in _TWO.values()) / _EACH
    asks = (("either-1", (FIRST, SECOND), 0.6), ("either-2", (FIRST, SECOND), 0.6),
            ("first", (FIRST,), 0.1), ("second", (SECOND,), 0.1))  # fmt: skip
    return tuple(
        Source(_kind(tenant, (_EACH, _EACH), pools=pools, max_wait_s=30.0), rate * part) for tenant, pools, part in asks
    )


def _all(*bounds: Bound) -> tuple[Bound, ...]:
    return (*bounds, Bound("faults", most=0))


def _late(run: Replayed) -> Figures:
    return {**run.late(), **run.window.conserved()}


ROWS: tuple[Row, ...] = (
    Row("demands", "8 equal tenants, demands 1:2:4:…:128, overload", _ONE, _demands(),
        lambda run: fairness(run.window), _all(Bound("jain", least=0.98), Bound("below", most=0.03), *CONSERVED)),
    Row("weights", "weights 1:2:4", _ONE, _weights(), lambda run: by_weights(run.window, _WEIGHTS),
        _all(Bound("off", most=0.03), *CONSERVED), ("within", "granted", "want"), _WEIGHTS),
    Row("batch", "batch floods, interactive at 30 % of the limit", _ONE, _flooded(),
        lambda run: flood(run.window, _JOBS[1]),
        _all(Bound("wait_p99_ms", most=250), Bound("minimum", least=1.0), *CONSERVED)),
    Row("candidates", "first model exhausted, two candidates", _TWO, _candidates(), _late,
        _all(Bound("used", least=0.97), Bound("late_max_ms", most=LATE_MS), *WASTE),
        ("late_p99_ms", "granted", "want")),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
