"""What fleets ask for: sizes of calls and their arrivals, after published traces; pure and seeded.

Sizes are log-normal: as fitted to a trace, or, where it publishes only mean and median, the one that has both. Input
and output are drawn independently: in the traces they are almost uncorrelated. A fitted tail is longer than the
trace's own, so each size has a bound, and what lies above it is drawn again; the bounds are set so that the mean of the
inputs is within 10 % of the published one, that of the outputs within 20 %.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_MOST_DRAWS = 1_000
"""A bound so low that this many draws miss it is a mistake; then the bound itself is the size."""


class Size(NamedTuple):
    """Tokens of one call. ``cached`` is the part of ``input`` that the provider has in its prompt cache."""

    input: int
    cached: int
    output: int


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Token counts from 1 to ``most``: log-normal, drawn again outside of that."""

    mu: float
    sigma: float
    most: int

    def draw(self, chance: random.Random) -> int:
        """One size."""
        for _ in range(_MOST_DRAWS):
            size = round(chance.lognormvariate(self.mu, self.sigma))
            if 1 <= size <= self.most:
                return size
        return self.most

    @property
    def mean(self) -> float:
        """The mean of what is drawn, but for the rounding to whole tokens: that of the log-normal below ``most``."""
        edge = (math.log(self.most) - self.mu) / self.sigma
        return math.exp(self.mu + self.sigma**2 / 2) * _normal(edge - self.sigma) / _normal(edge)


def implied(median: float, mean: float, most: int) -> LogNormal:
    """The log-normal with this median and mean (before the bound), for traces that publish no fit."""
    return LogNormal(math.log(median), math.sqrt(2 * math.log(mean / median)), most)


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of calls. ``prefix`` is what comes on top of ``fresh`` input and is read from the prompt cache."""

    name: str
    fresh: LogNormal
    output: LogNormal
    prefix: LogNormal | None = None

    def sizes(self, chance: random.Random) -> Iterator[Size]:
        """Sizes of one call after the other, without end."""
        while True:
            cached = self.prefix.draw(chance) if self.prefix is not None else 0
            yield Size(self.fresh.draw(chance) + cached, cached, self.output.draw(chance))


CONVERSATION = Workload("conversation", LogNormal(6.63, 0.99, 8_192), LogNormal(5.02, 0.86, 1_000))
"""Azure 2023 conversation: input 1155 mean, output 211 mean."""

CODE = Workload("code", LogNormal(7.00, 1.36, 16_384), LogNormal(2.79, 0.85, 512))
"""Azure 2023 code completion: input 2048 mean, output 28 mean."""

LONG_CONVERSATION = Workload("long-conversation", LogNormal(8.74, 1.20, 150_000), LogNormal(math.log(350), 0.42, 2_000))
"""Mooncake conversation: input 12,035 mean; the spread of the output from its p90. Prefix hits are left out."""

MIXED = Workload("mixed", implied(654, 973, 32_000), implied(67, 160, 4_000))
"""ServeGen m-large, the calls of a whole service: input 973 mean, output 160 mean."""

REASONING = Workload("reasoning", implied(266, 1_596, 250_000), implied(807, 1_690, 32_000))
"""ServeGen DeepSeek-R1: output is what it costs, 1690 mean, 13,533 at p99."""

CODING_AGENT = Workload(
    "coding-agent", implied(857, 6_400, 900_000), implied(252, 523, 16_000), prefix=LogNormal(11.72, 0.60, 900_000)
)
"""TraceLab coding agents: 153.7k input in the mean, 95.8 % of it cached; the spread of the prefix is our assumption."""

CACHED_80 = Workload("cached-80", CONVERSATION.fresh, CONVERSATION.output, prefix=LogNormal(8.22, 0.60, 100_000))
"""Conversations behind a prompt that is four times as long and cached: 80 % of the input is read from the cache."""

CACHED_96 = Workload("cached-96", CONVERSATION.fresh, CONVERSATION.output, prefix=LogNormal(10.01, 0.60, 500_000))
"""The same with 96 %, as of coding agents."""

WORKLOADS = {each.name: each for each in (CONVERSATION, CODE, LONG_CONVERSATION, MIXED, REASONING, CODING_AGENT)}
"""Those after a trace."""
CACHED = {each.name: each for each in (CACHED_80, CACHED_96)}


class Span(NamedTuple):
    """A stretch of time, seconds from the start, with a constant rate of arrivals a second."""

    start: float
    end: float
    rate: float


@dataclass(frozen=True, slots=True)
class Modulated:
    """A Poisson process with two states: quiet, and bursts. Both rates in calls a second.

    States last ``least`` seconds and an exponential time on top, together ``*_mean`` in the mean and at most twice
    that: a memoryless burst has no bound, and one draw of a minute would make a run of a minute say nothing.
    """

    quiet_rate: float
    burst_rate: float
    quiet_mean: float
    burst_mean: float
    least: float = 1.0

    def spans(self, seconds: float, chance: random.Random) -> list[Span]:
        """The states from 0 to ``seconds``, beginning in the middle of a quiet one."""
        spans: list[Span] = []
        at, bursting = 0.0, False
        length = self._length(self.quiet_mean, chance) / 2
        while at < seconds:
            end = min(seconds, at + length)
            spans.append(Span(at, end, self.burst_rate if bursting else self.quiet_rate))
            at, bursting = end, not bursting
            length = self._length(self.burst_mean if bursting else self.quiet_mean, chance)
        return spans

    @property
    def mean_rate(self) -> float:
        """Calls a second over a long time, but for the cut of the longest states (which shortens both alike)."""
        whole = self.quiet_mean + self.burst_mean
        return (self.quiet_rate * self.quiet_mean + self.burst_rate * self.burst_mean) / whole

    def _length(self, mean: float, chance: random.Random) -> float:
        spread = max(mean - self.least, 1e-9)
        return min(2 * mean, self.least + chance.expovariate(1 / spread))


@dataclass(frozen=True, slots=True)
class Renewal:
    """Arrivals whose gaps are gamma-distributed with this coefficient of variation: far above 1 they come in clumps."""

    rate: float
    """Calls a second, exactly: the times are stretched so that as many come in the whole as should."""
    variation: float

    @property
    def mean_rate(self) -> float:
        return self.rate

    def times(self, seconds: float, chance: random.Random) -> list[float]:
        """Instants from 0 to ``seconds``, in order."""
        count = max(1, round(self.rate * seconds))
        shape = 1 / self.variation**2
        at, times = 0.0, []
        for _ in range(count):
            at += chance.gammavariate(shape, 1.0)
            times.append(at)
        stretch = seconds / max(at, 1e-12)
        return [min(time * stretch, seconds) for time in times]


def arrivals(spans: Sequence[Span], part: float, chance: random.Random) -> list[float]:
    """Instants of Poisson arrivals at ``part`` of the spans' rates, in order.

    Several callers over the same spans, each with its own ``chance``, are together one process at the full rate whose
    bursts coincide, as those of services behind one front page do.
    """
    times: list[float] = []
    for span in spans:
        rate = span.rate * part
        if rate <= 0:
            continue
        at = span.start + chance.expovariate(rate)
        while at < span.end:
            times.append(at)
            at += chance.expovariate(rate)
    return times


def seeded(*parts: object) -> random.Random:
    """A generator that depends on all of ``parts``, and on nothing else: the same in every process and version."""
    return random.Random("/".join(map(str, parts)))


def _normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
