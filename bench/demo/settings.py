"""What the demonstration runs: the limit, the fleet, the times. The same in every mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from bench.fleet.plan import Mode, Plan
from bench.workloads import WORKLOADS, Modulated, Span, seeded

_DRAWS = 20

MODES: tuple[Mode, ...] = get_args(Mode)
MODE_NAMES: Mapping[Mode, str] = {
    "alone": "alone",
    "alone_patient": "alone, patient",
    "paceline": "Paceline",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a result depends on, but for the machine. Seconds, tokens, amounts per minute."""

    seed: int
    window_s: float = 56.0
    warmup_s: float = 8.0
    deadline_s: float = 30.0
    """From the application's call to the complete answer, for every call in every mode."""

    model: str = "claude-fable-5-1"
    tier: str = "scale"
    limits: Mapping[str, int] = field(
        default_factory=lambda: {"requests": 8_000, "input_tokens": 4_000_000, "output_tokens": 800_000}
    )
    """What the upstream enforces: those of the published tier, but for twice its requests. Many small calls would make
    the tier's requests bind as soon as its input tokens do, and two binding dimensions are hard to read in a table."""
    initial: float = 0.2
    """How full the upstream's buckets are at the start."""
    first_byte_s: float = 0.4
    tokens_per_second: float = 80.0
    chunk_s: float = 0.25
    estimate_spread: float = 0.1
    """What the upstream assumes of a call's input on arrival is off by up to this part, differently for each call. The
    prompts are one kind of prose, whose tokens follow from its length almost to the percent: without a spread, what is
    charged on arrival would be one constant times the truth, which suits whoever learns that constant."""

    chats: int = 4
    chat_workload: str = "conversation"
    quiet_demand: float = 0.22
    burst_demand: float = 1.10
    """Parts of the limit that all chat services together want, in the two states."""
    quiet_mean_s: float = 10.0
    burst_mean_s: float = 2.5

    jobs: int = 2
    job_workload: str = "code"
    workers: int = 80
    """Of each batch job. Each has a call under way, but for a pause of up to half a second after a lost one."""

    most_busy: float = 0.85
    """A run with a core above this says nothing about waiting."""

    @property
    def total_s(self) -> float:
        """The longest that calls are offered: until the last one of the window has met its deadline."""
        return self.warmup_s + self.window_s + self.deadline_s + 1.0

    @property
    def traffic(self) -> Modulated:
        """The arrivals of all chat services together."""
        calls = self.limits["input_tokens"] / 60 / WORKLOADS[self.chat_workload].fresh.mean
        return Modulated(self.quiet_demand * calls, self.burst_demand * calls, self.quiet_mean_s, self.burst_mean_s)

    def spans(self) -> list[Span]:
        """Quiet times and bursts, which all chat services have together.

        Of several draws the one that wants nearest to the mean in the window: a minute holds four bursts or so, and
        their lengths alone would let the demand of a run be anything from a quarter to more than half of the limit.
        """
        draws = [self.traffic.spans(self.total_s, seeded(self.seed, "spans", number)) for number in range(_DRAWS)]
        return min(draws, key=lambda spans: abs(self._rate_in_window(spans) - self.traffic.mean_rate))

    def _rate_in_window(self, spans: Sequence[Span]) -> float:
        start, end = self.warmup_s, self.warmup_s + self.window_s
        return sum(max(0.0, min(each.end, end) - max(each.start, start)) * each.rate for each in spans) / self.window_s

    def plans(self, mode: Mode, upstream: str, coordinator: str | None) -> list[Plan]:
        """The fleet: one plan for each process."""

        def plan(tenant: str, **rest: object) -> Plan:
            return Plan(
                tenant=tenant,
                mode=mode,
                upstream=upstream,
                coordinator=coordinator,
                model=self.model,
                seed=self.seed,
                deadline_s=self.deadline_s,
                **rest,  # type: ignore[arg-type]
            )

        spans = self.spans()
        chats = [
            plan(
                f"chat-{number}",
                priority="interactive",
                workload=self.chat_workload,
                stream=True,
                spans=spans,
                part=1 / self.chats,
            )
            for number in range(1, self.chats + 1)
        ]
        jobs = [
            plan(
                f"batch-{number}",
                priority="batch",
                workload=self.job_workload,
                stream=False,
                workers=self.workers,
            )
            for number in range(1, self.jobs + 1)
        ]
        return chats + jobs

    def server_config(self) -> str:
        """What the operator of the Paceline server writes: the account's tier, as the provider calls it.

        It says nothing of the fleet, of how full the buckets are, or of the requests that this account may make above
        its tier: that is learned from response headers.
        """
        return f"accounts:\n  default:\n    provider: anthropic\n    tier: {self.tier}\n"

    def upstream_config(self, initial: float) -> dict[str, Any]:
        """The simulated upstream, with buckets that start ``initial`` full."""
        group = {"name": "models", "models": ["claude-*"], "limits": dict(self.limits)}
        return {
            "groups": [group],
            "initial": initial,
            "estimate_spread": self.estimate_spread,
            "seed": self.seed,
        }

    def scenario(self) -> dict[str, Any]:
        """How fast it answers."""
        return {
            "first_byte_ms": round(self.first_byte_s * 1_000),
            "tokens_per_second": self.tokens_per_second,
            "chunk_ms": round(self.chunk_s * 1_000),
        }

    @property
    def interactive(self) -> frozenset[str]:
        """The tenants with priority."""
        return frozenset(f"chat-{number}" for number in range(1, self.chats + 1))
