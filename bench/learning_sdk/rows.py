"""What is run in each row, and the bounds of its figures.

The fleet and the shape of the limits are those of the laboratory's row of the same name, at a smaller scale: two cores
carry the upstream, the server and the callers without being busy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.fleet.plan import Plan, Priority
from bench.lab.rows import Bound, usual_bounds
from bench.lab.setting import INPUT, MODEL, OUTPUT, REQUESTS, TIER, Source, usual, workers_for
from bench.workloads import seeded
from paceline.engine.operations import Priority as EnginePriority

LIMITS: Mapping[str, int] = {REQUESTS: 1_400, INPUT: 1_400_000, OUTPUT: 280_000}
"""Per minute. About 900 calls of the usual fleet."""
REASONING: Mapping[str, int] = {REQUESTS: 5_000, INPUT: 5_000_000, OUTPUT: 1_000_000}
"""Per minute. About 600 calls of a reasoning model."""
REASONING_SPEED = 200.0
"""Tokens a second of each answer: more than the laboratory's 80, so that fewer streams are open at one time."""
POOL = "fable-5"

_PRIORITIES: Mapping[EnginePriority, Priority] = {
    EnginePriority.INTERACTIVE: "interactive",
    EnginePriority.STANDARD: "standard",
    EnginePriority.BATCH: "batch",
}
_PROCESSES = 2
"""Of each source."""


@dataclass(frozen=True, slots=True)
class Event:
    """What happens ``at_s`` seconds after the window has begun: the limits become ``part`` of the first ones, or the
    server is ended by a signal and started again."""

    at_s: float
    kind: Literal["limits", "kill", "terminate"]
    part: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Seconds, tokens, amounts per minute."""

    name: str
    case: str
    bounds: tuple[Bound, ...]
    limits: Mapping[str, int] = field(default_factory=lambda: dict(LIMITS))
    told: bool = True
    """The operator's file says the limits; else it says nothing of them."""
    sources: tuple[Source, ...] = ()
    """Empty: the laboratory's usual fleet, at twice the limit."""
    binding: str = INPUT
    burst_seconds: float = 60.0
    initial: float = 0.2
    """How full the upstream's buckets are at first."""
    tokens_per_second: float = 80.0
    chunk_s: float = 0.25
    warmup_s: float = 30.0
    window_s: float = 90.0
    events: tuple[Event, ...] = ()
    shown: tuple[str, ...] = ()
    """Figures without a bound that belong beside the others."""

    @property
    def total_s(self) -> float:
        """From the first call to the end of the window."""
        return self.warmup_s + self.window_s

    def server_config(self) -> str:
        """What the operator of the Paceline server has written."""
        account: dict[str, Any] = {"provider": "anthropic"}
        if self.told:
            account |= {"tier": TIER, "pools": {POOL: dict(self.limits)}}
        return json.dumps({"accounts": {"default": account}})

    def upstream_config(self, seed: int) -> dict[str, Any]:
        """The simulated upstream."""
        return {
            "groups": [{"name": "models", "models": ["claude-*"], "limits": dict(self.limits)}],
            "burst_seconds": self.burst_seconds,
            "initial": self.initial,
            "estimate_spread": 0.1,
            "seed": seed,
        }

    def scenario(self) -> dict[str, Any]:
        """How fast it answers."""
        return {
            "first_byte_ms": 400,
            "tokens_per_second": self.tokens_per_second,
            "chunk_ms": round(self.chunk_s * 1_000),
        }

    def plans(self, seed: int, upstream: str, coordinator: str) -> list[Plan]:
        """The fleet: one plan for each process."""
        return [
            _plan(source, number, seed, upstream, coordinator, self.total_s)
            for source in self.sources or usual(self.limits)
            for number in range(_PROCESSES)
        ]


def _plan(source: Source, number: int, seed: int, upstream: str, coordinator: str, seconds: float) -> Plan:
    spans = source.arrivals.spans(seconds, seeded(seed, "spans", source.name)) if source.arrivals else []  # type: ignore[union-attr]
    return Plan(
        tenant=f"{source.name}-{number}",
        priority=_PRIORITIES[source.priority],
        mode="paceline",
        upstream=upstream,
        coordinator=coordinator,
        model=MODEL,
        workload=source.workload,
        seed=seed,
        deadline_s=source.deadline_s,
        stream=source.streamed,
        max_tokens=source.max_tokens,
        spans=spans,
        part=1 / _PROCESSES,
        # As many as there are, shared as evenly as they can be.
        workers=(source.workers + number) // _PROCESSES,
    )


def _reasoning(burst: int) -> Row:
    workers = workers_for(2.0, "reasoning", OUTPUT, REASONING, REASONING_SPEED)
    source = Source(
        "reasoning", "reasoning", EnginePriority.STANDARD, True, workers, max_tokens=32_000, deadline_s=900.0
    )
    return Row(
        f"reasoning-{burst}",
        f"output-bound, reasoning sizes, `max_tokens` 32,000, burst {burst} s",
        usual_bounds(0.96, 1),
        REASONING,
        sources=(source,),
        binding=OUTPUT,
        burst_seconds=burst,
        tokens_per_second=REASONING_SPEED,
        chunk_s=1.0,
        warmup_s=75.0,
        window_s=110.0,
    )


def _restart(kind: Literal["kill", "terminate"], signal: str) -> Row:
    return Row(
        f"restart-{kind}",
        f"coordinator restarted in mid-run, by {signal}",
        (Bound("refused_after", most=2), Bound("used_again_s", most=10.0)),
        warmup_s=20.0,
        # In order it ends when those who wait have their answers.
        window_s=85.0 if kind == "kill" else 105.0,
        events=(Event(15.0, kind),),
        shown=("ending_s", "away_s"),
    )


ROWS: tuple[Row, ...] = (
    Row(
        "unknown",
        "limits unknown at start",
        usual_bounds(0.97, 1),
        told=False,
        warmup_s=60.0,
        shown=("limit_known_s",),
    ),
    Row(
        "changed",
        "limit halved, then doubled, in mid-run",
        (
            Bound("used", least=0.96),
            Bound("avoidable", most=3),
            Bound("readings_down", most=1),
            Bound("readings_up", most=2),
        ),
        window_s=140.0,
        events=(Event(35.0, "limits", 0.5), Event(105.0, "limits", 1.0)),
    ),
    _reasoning(60),
    _reasoning(10),
    Row(
        "burst-1",
        "burst of 1 s instead of 60 s",
        (*usual_bounds(0.95, 1), Bound("refused_learning", most=5)),
        burst_seconds=1.0,
        initial=1.0,
        warmup_s=60.0,
    ),
    _restart("kill", "SIGKILL"),
    _restart("terminate", "SIGTERM"),
)
