"""One organisation of an upstream: who is let in, what each call is charged and when.

Pure: every method takes ``now``, integer microseconds of any clock that does not run backwards, and randomness comes in
with the constructor. A laboratory drives it like this::

    outcome = account.arrive(now, call)          # Accepted, Refused or Overloaded
    account.started(later, call)                 # first byte: the estimate gives way to the true input
    account.produced(later, call, tokens)        # as often as output appears; may make debt
    account.ended(later, call, "finished")       # or "gone", "error", "dropped"

Anthropic: a call needs one request, its input *estimate* must fit the level, and the level of the output must not be
below one. The estimate is charged, and corrected to the true count soon afterwards. Output is charged as it is
produced; ``max_tokens`` plays no part. While a ramp is in force, the estimate must fit that one's level, too.

OpenAI: the larger of ``max_tokens`` and an estimate from the characters is charged to one bucket on arrival, and stays;
a refused call still costs a request (if there is one).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from paceline.upstream.bucket import Bucket
from paceline.upstream.settings import (
    DIMENSIONS,
    Config,
    Dimension,
    Group,
    Ramp,
    Scenario,
    SettingsError,
    check,
    scenario_of,
)
from paceline.upstream.tokens import Chance, bent

MILLISECOND = 1_000
SECOND = 1_000_000
MINUTE = 60 * SECOND
RAMP = "ramp"
"""The dimension of a refusal for usage that grew too fast."""

Status = Literal["", "accepted", "refused", "overloaded"]
End = Literal["", "finished", "gone", "error", "dropped"]
"""How an accepted call ended: all was sent; the client went; an error event; the connection was cut. Empty: it runs."""


class Call(msgspec.Struct, kw_only=True, gc=False):
    """One attempt: what the caller sent, and what became of it. It is also the call's entry in the log."""

    id: str
    model: str
    estimate: int
    """Tokens assumed on arrival: of the input; with OpenAI what is charged."""
    input: int
    """True input that is neither read from nor written to the cache."""
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    """Tokens that the answer will have, at most ``max_tokens``."""
    max_tokens: int | None = None
    tenant: str = ""
    stream: bool = False

    number: int = 0
    """Position in the log, from 1."""
    group: str = ""
    at: int = 0
    """Arrival, µs of the account's clock."""
    status: Status = ""
    dimension: str = ""
    """What a refused call was short of (``ramp``, ``concurrency``, or a bucket); ``forced`` stands before it if a
    scenario said so."""
    retry_after: int | None = None
    """Seconds."""
    produced: int = 0
    """Output until now."""
    first_at: int | None = None
    ended_at: int | None = None
    ended: End = ""

    def counted_input(self, cache_reads_count: bool) -> int:
        """Tokens of input that count towards the limit."""
        return self.input + self.cache_write + (self.cache_read if cache_reads_count else 0)


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """The call is let in. What the scenario has in store for it, as numbers of tokens after which it happens."""

    error_after: int | None = None
    drop_after: int | None = None


class Refused(msgspec.Struct, frozen=True, gc=False):
    """429: which bucket is short (the one with the longest wait), and by how much."""

    dimension: str
    needed: int
    level: int
    limit: int
    wait_us: int
    retry_after: int | None
    """Whole seconds, at least 1; none if the refusal names no time."""


class Overloaded(msgspec.Struct, frozen=True, gc=False):
    """529: no bucket was looked at."""


Outcome = Accepted | Refused | Overloaded


class ModelGroup:
    """Models that share buckets."""

    def __init__(self, now: int, group: Group, config: Config) -> None:
        self.config = group
        self.api = group.api
        self.burst_seconds = group.burst_seconds or config.burst_seconds
        self.buckets: dict[str, Bucket] = {}
        for dimension in DIMENSIONS[group.api]:
            amount = group.limits[dimension]
            burst = self.burst_of(amount)
            self.buckets[dimension] = Bucket.of(now, amount, burst, int(burst * config.initial))
        self.ramp: Bucket | None = None
        """What usage of the input may be while it grows."""
        self.ramp_step = 0
        self._ramp_next = 0
        self.in_flight = 0
        self.counts = {"accepted": 0, "refused": 0, "overloaded": 0}
        self.refused_by: dict[str, int] = {}
        self.ends = {"finished": 0, "gone": 0, "error": 0, "dropped": 0}
        self.input = self.cache_read = self.cache_write = self.output = 0
        """Sums over accepted calls; output as it is produced."""

    def burst_of(self, amount: int) -> int:
        """The burst of a limit, at least 1."""
        return max(1, int(amount * self.burst_seconds / 60))

    @property
    def all_buckets(self) -> dict[str, Bucket]:
        """Those of the dimensions, and that of the ramp if there is one."""
        return self.buckets if self.ramp is None else {**self.buckets, RAMP: self.ramp}

    def begin_ramp(self, now: int, ramp: Ramp | None) -> None:
        """Let usage of the input grow from now on; ``None``: at once. The ramp's bucket starts empty."""
        self.ramp = None
        if ramp is not None:
            self.ramp = Bucket.of(now, ramp.start, self.burst_of(ramp.start), 0)
            self.ramp_step, self._ramp_next = ramp.step, (now // MINUTE + 1) * MINUTE

    def advance(self, now: int) -> None:
        """Bring the buckets to ``now``, and the ramp by a step at each minute boundary on the way."""
        for bucket in self.buckets.values():
            bucket.advance(now)
        while self.ramp is not None and self._ramp_next <= now:
            amount = self.ramp.amount + self.ramp_step
            self.ramp.change(self._ramp_next, amount, self.burst_of(amount))
            self._ramp_next += MINUTE
            if amount >= self.buckets["input_tokens"].amount:
                self.ramp = None
        if self.ramp is not None:
            self.ramp.advance(now)

    def charge_input(self, tokens: int) -> None:
        """Charge what counts as input, also to the ramp."""
        self.buckets["input_tokens"].charge(tokens)
        if self.ramp is not None:
            self.ramp.charge(tokens)


class Account:
    """All groups of one organisation, the scenario, and the log."""

    def __init__(self, now: int, config: Config, chance: Chance, scenario: Scenario | None = None) -> None:
        check(config)
        self.config = config
        self.chance = chance
        self.scenario = Scenario()
        self.began = self.now = now
        self.groups = {group.name: ModelGroup(now, group, config) for group in config.groups}
        self.calls: deque[Call] = deque(maxlen=config.log_calls)
        """The newest calls, oldest first; refused ones too."""
        self.logged = 0
        self._overload_until: int | None = None
        self._by_model: dict[str, ModelGroup | None] = {}
        self._corrections: list[tuple[int, int, Call]] = []
        if scenario is not None:
            self.change(now, **{name: getattr(scenario, name) for name in scenario.__struct_fields__})

    def group_of(self, model: str) -> ModelGroup | None:
        """The group that serves a model: an exact name first, then the longest pattern."""
        if model in self._by_model:
            return self._by_model[model]
        best, found = -1, None
        for group in self.groups.values():
            for pattern in group.config.models:
                exact = pattern == model
                if not exact and not (pattern.endswith("*") and model.startswith(pattern[:-1])):
                    continue
                rank = 1_000 if exact else len(pattern)
                if rank > best:
                    best, found = rank, group
        # Names come from callers.
        if len(self._by_model) < 1_000:
            self._by_model[model] = found
        return found

    def change(self, now: int, **fields: Any) -> None:
        """Change the scenario. Raises :class:`SettingsError`, and then nothing has changed."""
        self.apply(now, fields)

    def apply(self, now: int, fields: Mapping[str, Any]) -> None:
        """The same, with the fields as a mapping."""
        scenario = scenario_of(fields, self.scenario)
        for name in ("outside", "limits"):
            if name in fields:
                self._check_targets(name, getattr(scenario, name))
        if "ramps" in fields:
            self._check_targets("ramps", {name: {"input_tokens": 0} for name in scenario.ramps})
        self.advance(now)
        self.scenario = scenario
        if "overload_seconds" in fields or "overload_probability" in fields:
            seconds = scenario.overload_seconds
            self._overload_until = None if seconds is None else self.now + round(seconds * SECOND)
        if "outside" in fields:
            for group in self.groups.values():
                rates = {**scenario.outside.get("*", {}), **scenario.outside.get(group.config.name, {})}
                for dimension, bucket in group.buckets.items():
                    bucket.outside = rates.get(dimension, 0)  # type: ignore[call-overload]
        if "limits" in fields:
            for group in self.groups.values():
                amounts = {**scenario.limits.get("*", {}), **scenario.limits.get(group.config.name, {})}
                for dimension, amount in amounts.items():
                    if dimension in group.buckets:
                        group.buckets[dimension].change(self.now, amount, group.burst_of(amount))
        if "ramps" in fields:
            for group in self.groups.values():
                if group.api == "anthropic":
                    group.begin_ramp(self.now, scenario.ramps.get(group.config.name) or scenario.ramps.get("*"))

    def _check_targets(self, field: str, given: Mapping[str, Mapping[Dimension, int]]) -> None:
        for name, amounts in given.items():
            if name == "*":
                continue
            group = self.groups.get(name)
            if group is None:
                raise SettingsError(f"{field}.{name}: there is no such group")
            for dimension in amounts:
                if dimension not in group.buckets:
                    raise SettingsError(f"{field}.{name}.{dimension}: {group.api} has no such limit")

    def advance(self, now: int, only: ModelGroup | None = None) -> None:
        """Bring everything (or ``only`` one group) to ``now``: corrections that were due, refill, outside traffic."""
        self.now = now = max(now, self.now)
        while self._corrections and self._corrections[0][0] <= now:
            due, _, call = heapq.heappop(self._corrections)
            self._correct(due, call)
        for group in self.groups.values() if only is None else (only,):
            group.advance(now)

    def arrive(self, now: int, call: Call) -> Outcome:
        """A call arrives. Its group must exist (:meth:`group_of`). It is in the log from here on."""
        group = self.group_of(call.model)
        if group is None:
            raise SettingsError(f"model: {call.model!r} is not served")
        self.advance(now, group)
        self.logged += 1
        call.number = self.logged
        call.group = group.config.name
        call.at = self.now
        self.calls.append(call)
        outcome = self._admit(group, call)
        if isinstance(outcome, Accepted):
            call.status = "accepted"
            group.in_flight += 1
            group.input += call.input
            group.cache_read += call.cache_read
            group.cache_write += call.cache_write
        elif isinstance(outcome, Refused):
            call.status = "refused"
            call.dimension = outcome.dimension
            call.retry_after = outcome.retry_after
            group.refused_by[call.dimension] = group.refused_by.get(call.dimension, 0) + 1
        else:
            call.status = "overloaded"
        group.counts[call.status] += 1
        return outcome

    def _admit(self, group: ModelGroup, call: Call) -> Outcome:
        scenario = self.scenario
        if (
            scenario.overload_probability
            and (self._overload_until is None or self.now < self._overload_until)
            and self.chance.random() < scenario.overload_probability
        ):
            return Overloaded()
        if scenario.refuse_next:
            scenario.refuse_next -= 1
            return self._forced(group)
        if group.config.max_concurrent is not None and group.in_flight >= group.config.max_concurrent:
            return Refused("concurrency", 1, 0, group.config.max_concurrent, SECOND, 1)

        buckets = group.all_buckets
        call.estimate = bent(call.estimate, self.config.estimate_spread, self.chance)
        needs = {"requests": 1}
        if group.api == "anthropic":
            needs["input_tokens"] = call.estimate
            needs["output_tokens"] = 1
            if RAMP in buckets:
                needs[RAMP] = call.estimate
        else:
            needs["tokens"] = call.estimate
        if any(buckets[dimension].wait_us(need) for dimension, need in needs.items()):
            return self._refuse(group, needs)

        buckets["requests"].charge(1)
        if group.api == "openai":
            buckets["tokens"].charge(call.estimate)
        else:
            group.charge_input(call.estimate)
            if self.config.correct_after_ms is not None:
                due = self.now + self.config.correct_after_ms * MILLISECOND
                heapq.heappush(self._corrections, (due, call.number, call))
        return self._fate(call)

    def _refuse(self, group: ModelGroup, needs: Mapping[str, int]) -> Refused:
        buckets = group.all_buckets
        short = max(needs, key=lambda dimension: buckets[dimension].wait_us(needs[dimension]))
        bucket = buckets[short]
        wait = bucket.wait_us(needs[short])
        refused = Refused(short, needs[short], bucket.tokens, bucket.amount, wait, max(1, -(-wait // SECOND)))
        # Only now: the request that the refusal itself costs is not what the call was short of. (Where requests are few
        # a minute, who comes back when told may be short of that one.)
        counts = self.config.refused_requests_count
        if (counts == "all" or counts == group.api) and not buckets["requests"].wait_us(1):
            buckets["requests"].charge(1)
        return refused

    def _forced(self, group: ModelGroup) -> Refused:
        dimension, seconds = self.scenario.refuse_dimension, self.scenario.refuse_retry_after
        bucket = group.buckets.get(dimension) or group.buckets["requests"]
        wait = (seconds or 0) * SECOND
        return Refused(f"forced {dimension}", 1, bucket.tokens, bucket.amount, wait, seconds)

    def _fate(self, call: Call) -> Accepted:
        scenario = self.scenario
        error_after = drop_after = None
        if call.stream:
            if scenario.stream_error_next:
                scenario.stream_error_next -= 1
                error_after = scenario.stream_error_after
            elif scenario.stream_error_probability and self.chance.random() < scenario.stream_error_probability:
                error_after = scenario.stream_error_after
        if scenario.drop_next:
            scenario.drop_next -= 1
            drop_after = scenario.drop_after
        elif scenario.drop_probability and self.chance.random() < scenario.drop_probability:
            drop_after = scenario.drop_after
        return Accepted(error_after, drop_after)

    def _correct(self, now: int, call: Call) -> None:
        group = self.groups[call.group]
        if group.api == "anthropic":
            group.advance(now)
            group.charge_input(call.counted_input(group.config.cache_reads_count) - call.estimate)

    def started(self, now: int, call: Call) -> None:
        """The first byte of the response."""
        if call.first_at is None and call.status == "accepted":
            self.advance(now, self.groups[call.group])
            call.first_at = self.now
            if self.config.correct_after_ms is None:
                self._correct(self.now, call)

    def produced(self, now: int, call: Call, tokens: int) -> None:
        """``tokens`` more of output."""
        if tokens <= 0 or call.ended or call.status != "accepted":
            return
        self.now = now = max(now, self.now)
        group = self.groups[call.group]
        call.produced += tokens
        group.output += tokens
        bucket = group.buckets.get("output_tokens")
        if bucket is not None:
            bucket.advance(now)
            bucket.charge(tokens)

    def ended(self, now: int, call: Call, how: End) -> None:
        """The call is over. A call that never started is corrected all the same: its input was read."""
        if call.ended or not how or call.status != "accepted":
            return
        self.started(now, call)
        self.now = max(now, self.now)
        group = self.groups[call.group]
        group.in_flight -= 1
        group.ends[how] += 1
        call.ended_at = self.now
        call.ended = how
