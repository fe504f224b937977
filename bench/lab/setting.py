"""What a laboratory runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bench.workloads import CACHED, WORKLOADS, Modulated, Renewal, Workload
from paceline.engine.operations import Priority

REQUESTS, INPUT, OUTPUT = "requests", "input_tokens", "output_tokens"
LIMITS: Mapping[str, int] = {REQUESTS: 4_000, INPUT: 4_000_000, OUTPUT: 800_000}
"""Per minute: those of the model below in the tier below."""
KINDS = {**WORKLOADS, **CACHED}
MODEL, TIER = "claude-fable-5-1", "scale"


@dataclass(frozen=True, slots=True)
class Source:
    """Calls of one kind: from ``workers`` that always have one under way, or by ``arrivals``, whatever becomes of them.

    ``name`` is their tenant and their route.
    """

    name: str
    workload: str
    priority: Priority
    streamed: bool
    workers: int = 0
    arrivals: Modulated | Renewal | None = None
    max_tokens: int = 1_024
    deadline_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens ``at_s`` seconds after the window has begun.

    ===============  ==================================================================================
    ``limits``       the upstream's limits are ``part`` of the first ones
    ``outside``      others use ``part`` of each limit
    ``overload``     the upstream answers 529 for ``seconds``
    ``restart``      the coordinator is away for ``seconds`` and goes on with what its journal says
    ``silence``      nobody calls for ``seconds``
    ``plant``        the ledger is made to believe ``what``, which is wrong
    ===============  ==================================================================================
    """

    at_s: float
    kind: Literal["limits", "outside", "overload", "restart", "silence", "plant"]
    part: float = 1.0
    seconds: float = 0.0
    what: str = ""


@dataclass(frozen=True, slots=True)
class Ramp:
    """The upstream lets usage of the input grow by ``step`` tokens per minute each minute, from ``start``."""

    start: int
    step: int


@dataclass(frozen=True, slots=True)
class Setting:
    """Seconds, tokens, amounts per minute; parts of one."""

    seed: int
    sources: tuple[Source, ...] = ()
    """Empty: :func:`usual`."""
    limits: Mapping[str, int] = field(default_factory=lambda: dict(LIMITS))
    """The upstream's."""
    told: Mapping[str, int] | None = None
    """What the operator's file says of them; ``None``: the truth; empty: nothing."""
    binding: str = INPUT
    burst_seconds: float = 60.0
    initial: float = 0.2
    """How full the upstream's buckets are at first."""
    warmup_s: float = 8.0
    settled_calls: int = 0
    """The window begins when so many calls of each route are settled, if that is after the warm-up."""
    window_s: float = 60.0
    drain_s: float = 31.0
    """After the window: so long until every call that was begun in it has its fate."""
    first_byte_s: float = 0.4
    tokens_per_second: float = 80.0
    chunk_s: float = 0.25
    delay_s: tuple[float, float] = (0.002, 0.03)
    """Between the coordinator and a caller, and between a caller and the upstream: drawn anew each time."""
    estimates: Literal["given", "none", "cached"] = "given"
    """Of the input: all of it, whatever is cached; nothing; or the cached part apart."""
    our_error: tuple[float, float] = (0.9, 1.2)
    """The client's estimate ÷ the true input: between these, evenly."""
    our_factor: float = 1.0
    """And times that. If it is not 1, callers state the mean output of their route too, times that."""
    their_bias: float = 1.1
    """The upstream's estimate on arrival ÷ the true input."""
    their_spread: float = 0.1
    early_usage: bool = True
    """Streams tell their exact input with the first event."""
    hold_s: float = 120.0
    outside: float = 0.0
    """What others use of each limit from the beginning on."""
    headers: bool = True
    late_s: float = 0.0
    """Reports of headers reach the coordinator so much later, give or take a third: out of order."""
    ramp: Ramp | None = None
    events: tuple[Event, ...] = ()
    sample_s: float = 0.5

    def all_sources(self) -> tuple[Source, ...]:
        """The sources."""
        return self.sources or usual(self.limits)


def usual(limits: Mapping[str, int], load: float = 2.0, deadline_s: float = 30.0) -> tuple[Source, ...]:
    """Interactive calls in bursts, 40 % of the input in the mean, and batch workers for the rest of the load."""
    chat = limits[INPUT] / 60 / mean_size(KINDS["conversation"], INPUT)
    return (
        Source(
            "chat",
            "conversation",
            Priority.INTERACTIVE,
            True,
            arrivals=Modulated(0.20 * chat, 1.20 * chat, 12.0, 3.0),
            deadline_s=deadline_s,
        ),
        Source(
            "batch",
            "code",
            Priority.BATCH,
            False,
            workers=workers_for(load - 0.4, "code", INPUT, limits),
            deadline_s=deadline_s,
        ),
    )


def workers_for(
    load: float, workload: str, dimension: str, limits: Mapping[str, int], tokens_per_second: float = 80.0
) -> int:
    """Workers that together would use ``load`` times a limit if nobody held them up."""
    kind = KINDS[workload]
    calls = load * limits[dimension] / 60 / mean_size(kind, dimension)
    return math.ceil(calls * (0.5 + kind.output.mean / tokens_per_second))


def mean_size(workload: Workload, dimension: str) -> float:
    """What a call counts in the mean, where cache reads are free."""
    return {REQUESTS: 1.0, INPUT: workload.fresh.mean, OUTPUT: workload.output.mean}[dimension]


def window_for(accepted: int, sources: tuple[Source, ...], limits: Mapping[str, int], dimension: str) -> float:
    """Seconds in which so many calls are accepted, if 95 % of the limit is used; arrivals go first."""
    left, calls = 0.95 * limits[dimension] / 60, 0.0
    for source in sources:
        if source.arrivals is not None:
            calls += source.arrivals.mean_rate
            left -= source.arrivals.mean_rate * mean_size(KINDS[source.workload], dimension)
    workers = [source for source in sources if source.workers]
    each = sum(mean_size(KINDS[source.workload], dimension) for source in workers) / max(1, len(workers))
    if workers:
        calls += max(0.0, left) / each
    return accepted / calls
