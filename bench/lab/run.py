"""One run: a fleet, the real engine and the simulated upstream in a closed loop on a virtual clock.

What flows is what flows in production: a Reserve, the call with its delays, the response's headers through the real
parser as an early Renew, the Commit; and after a refusal the SDK's back-off and a new Reserve. Only the wire is left
out; its delays are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import msgspec

from bench.lab import plants
from bench.lab.clock import EPOCH, SECOND, Clock
from bench.lab.coordinator import Coordinator
from bench.lab.fleet import Fleet
from bench.lab.service import GROUP, Service
from bench.lab.setting import Event, Setting
from bench.workloads import seeded
from paceline.upstream import mark
from paceline.upstream.bucket import GRAINS
from paceline.upstream.truth import Mark, Used, limit_used

_LONGEST_WARMUP = 10
"""The window begins after so many warm-ups, whatever is not settled by then."""
SWING, SWING_S, SWING_HELD = 0.05, 0.5, 0.2


class Sample(msgspec.Struct, frozen=True, gc=False):
    """The binding dimension at one instant: what the ledger believes and what is true; and sums since the beginning.

    The truth of a ramp, while there is one, is that of the ramp.

    ``at`` in seconds from the start of the window; amounts in the dimension's unit, rates per minute. ``level`` is net
    of what is held; ``outstanding`` is what is held.
    """

    at: float
    level: int
    true_level: int
    outstanding: int
    limit: int
    true_limit: int
    burst: int
    true_burst: int
    outside: int
    true_outside: int
    blocked: bool
    waiting: int
    charged: int
    offered: int
    outside_taken: int
    attempts: int
    accepted: int
    refused: int


class Run:
    """One run. After :meth:`go` everything that happened can be looked at; ``begin`` and ``end`` mark the window."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clock = Clock()
        self.service = Service(self.clock, setting)
        self.coordinator = Coordinator(self.clock, setting, seeded(setting.seed, "net"))
        self.fleet = Fleet(self.clock, setting, self.coordinator, self.service)
        self.samples: list[Sample] = []
        self.started = 0
        """Start of the window, µs."""
        self.planted_at: float | None = None
        """Seconds from the start of the window."""
        self.begin: Mark
        self.end: Mark
        self.used: dict[str, Used]

    def go(self) -> Run:
        """Run to the end of the window, and on until the calls begun in it have their fate."""
        setting, clock = self.setting, self.clock
        longest = setting.warmup_s * (_LONGEST_WARMUP if setting.settled_calls else 1)
        self.fleet.start(longest + setting.window_s)
        self._sample()
        clock.until(EPOCH + int(setting.warmup_s * SECOND))
        while clock.seconds < longest and not self._settled():
            clock.until(clock.now + SECOND // 10)
        self.started = clock.now
        self.samples = [msgspec.structs.replace(one, at=one.at - clock.seconds) for one in self.samples]
        for event in setting.events:
            clock.after(event.at_s, lambda event=event: self._happen(event))  # type: ignore[misc]
        self.begin = mark(self.service.account, clock.now)
        clock.until(self.started + int(setting.window_s * SECOND))
        self.end = mark(self.service.account, clock.now)
        # Now: the output of calls that still run counts as far as it is produced.
        self.used = limit_used(self.service.account, self.begin, self.end)[GROUP]
        self.fleet.ends = clock.now
        clock.until(clock.now + int(setting.drain_s * SECOND))
        return self

    @property
    def now(self) -> float:
        """Seconds since the window began (before: since the beginning)."""
        return (self.clock.now - (self.started or EPOCH)) / SECOND

    def _settled(self) -> bool:
        wanted = self.setting.settled_calls
        return all(self.coordinator.settled.get(one.name, 0) >= wanted for one in self.setting.all_sources())

    # -- what happens -------------------------------------------------------------------------------------------------

    def _happen(self, event: Event) -> None:
        if event.kind == "limits":
            self.service.limits(event.part)
        elif event.kind == "outside":
            self.service.outside(event.part)
        elif event.kind == "overload":
            self.service.overload(event.seconds)
        elif event.kind == "restart":
            self.coordinator.restart(event.seconds)
        elif event.kind == "silence":
            self.fleet.silent_until = self.clock.now + int(event.seconds * SECOND)
        else:
            plants.plant(event.what, self.coordinator, self.setting, self.clock.now)
            self.planted_at = self.now

    # -- what is seen -------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        binding, account, coordinator = self.setting.binding, self.service.account, self.coordinator
        account.advance(self.clock.now)
        group = account.groups[GROUP]
        truth = group.ramp if group.ramp is not None else group.buckets[binding]
        ours, pool = coordinator.bucket(binding), coordinator.pool()
        self.samples.append(
            Sample(
                self.now,
                coordinator.level(binding),
                truth.tokens,
                ours.held,
                ours.amount,
                truth.amount,
                ours.burst,
                truth.burst_tokens,
                getattr(ours, "outside", 0),
                truth.outside,
                pool.blocked_until > self.clock.now,
                sum(coordinator.engine.waiting().values()),
                truth.charged // GRAINS,
                truth.offered // GRAINS,
                truth.outside_taken // GRAINS,
                account.logged,
                group.counts["accepted"],
                group.counts["refused"],
            )
        )
        self.clock.after(self.setting.sample_s, self._sample)

    def between(self, start: float, end: float) -> list[Sample]:
        """The samples of a part of the window, by seconds."""
        return [one for one in self.samples if start <= one.at < end]

    def share(self, start: float, end: float) -> float:
        """Part of the binding limit that was charged between two instants, of what was there, less what others took."""
        part = self.between(start, end)
        if len(part) < 2:
            return 0.0
        first, last = part[0], part[-1]
        there = first.true_level + last.offered - first.offered - (last.outside_taken - first.outside_taken)
        return (last.charged - first.charged) / there if there > 0 else 0.0

    def rate(self, figure: str, start: float, end: float) -> float:
        """By how much a sum grew a second."""
        part = self.between(start, end)
        if len(part) < 2:
            return 0.0
        grown: float = getattr(part[-1], figure) - getattr(part[0], figure)
        return grown / (part[-1].at - part[0].at)

    def first(self, holds: Callable[[float], bool], start: float, end: float) -> float:
        """Seconds from ``start`` until ``holds`` is true of an instant, by half seconds; NaN: not before ``end``."""
        at = start
        while at < end:
            if holds(at):
                return at - start
            at += 0.5
        return math.nan

    def swings(self, start: float, end: float) -> int:
        """How often the ledger's level went from far above the truth to far below it, or back.

        Far is :data:`SWING` of the burst, at least what refills in :data:`SWING_S`, and :data:`SWING_HELD` of what is
        held: by so much estimates of what is under way are off, on either side.
        """
        side, found = 0, 0
        for one in self.between(start, end):
            wrong = one.level - one.true_level
            far = max(SWING * one.true_burst, SWING_S * one.true_limit / 60) + SWING_HELD * one.outstanding
            now = (wrong > far) - (wrong < -far)
            if now and now != side:
                found += side != 0
                side = now
        return found


def steps(samples: list[Sample], every: float) -> list[tuple[Sample, Sample]]:
    """Pairs of samples about ``every`` seconds apart, one after the other."""
    chosen: list[Sample] = []
    for one in samples:
        if not chosen or one.at - chosen[-1].at >= every - 1e-6:
            chosen.append(one)
    return list(pairwise(chosen))
