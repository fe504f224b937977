"""A simulated upstream, its noisy headers, and the interval that the engine infers from them.

The upstream counts requests and its own estimate of the input when a call arrives, corrects the input during the
call, and counts output as it is produced. Its headers are rounded, and reach the engine up to half a minute late and
out of order, while other calls are under way, settle, settle in part, or expire. What the level ought to be (the
upstream's own, less what the books carry for calls beyond what it has counted of them) must never be outside the
interval: neither when a reading comes, nor at any later instant at which it still stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from random import Random
from uuid import UUID

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Answer, Granted
from paceline.engine.bucket import Bucket, Constraint
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    Disposition,
    Observation,
    Operation,
    Outcome,
    Reading,
    Refusal,
    Release,
    Renew,
    Reserve,
)
from paceline.engine.reconcile import interval
from paceline.engine.state import State
from tests.engine import tally

pytestmark = pytest.mark.timeout(300 * tally.SCALE)

SECOND = 1_000_000
MINUTE = 60 * SECOND
START = 1_767_225_600 * SECOND
REQUESTS, INPUT, OUTPUT = Dimension.REQUESTS, Dimension.INPUT_TOKENS, Dimension.OUTPUT_TOKENS
DIMENSIONS = (REQUESTS, INPUT, OUTPUT)
ROUNDING = {REQUESTS: 0, INPUT: 1_000, OUTPUT: 1_000}
SLACK = 1_500
PROFILE = Profile(
    "simulated",
    (
        Rule(REQUESTS, hold_requests=1000, settle_requests=1000),
        Rule(INPUT, hold_input=1000, settle_input=1000),
        Rule(OUTPUT, hold_output=1000, settle_output=1000),
    ),
    estimate_slack=SLACK,
)


@dataclass
class UpstreamBucket:
    """The truth, in 60-millionths of a unit so that it is exact in whole numbers."""

    amount: int
    burst: int
    level: int
    at: int

    def advance(self, now: int) -> None:
        self.level = min(self.burst * MINUTE, self.level + self.amount * (now - self.at))
        self.at = now

    def count(self, now: int, amount: int) -> None:
        self.advance(now)
        self.level = min(self.burst * MINUTE, self.level - amount * MINUTE)


@dataclass
class Call:
    """One call, as the caller and the upstream know it."""

    key: str
    granted_at: int
    estimate: int
    upstream_estimate: int
    input: int
    cap: int
    output: int
    expected_output: int
    counted: dict[Dimension, list[tuple[int, int]]] = field(
        default_factory=lambda: {dimension: [] for dimension in DIMENSIONS}
    )

    def counted_by(self, dimension: Dimension, at: int) -> int:
        return sum(amount for when, amount in self.counted[dimension] if when <= at)


@dataclass(frozen=True)
class Headers:
    """What the upstream said, and when it read it."""

    at: int
    readings: tuple[Reading, ...]
    refusal: Refusal | None = None
    refused: Dimension | None = None
    retry_after_us: int | None = None


class History:
    """One random history; ``run`` checks the interval at every instant of it."""

    durations: tuple[int, ...] = (0, SECOND, 20 * SECOND, 60 * SECOND)

    def __init__(self, random: Random, calls: int, *, fill: int = 1000) -> None:
        self.random = random
        self.now = START
        self.events: list[tuple[int, int, Callable[[], None]]] = []
        self.serial = 0
        self.calls: dict[str, Call] = {}
        self.taken: dict[tuple[Dimension, int, int], int] = {}
        self.checks = 0
        self.engine = Engine("simulated", State("simulated"))
        amounts = {
            REQUESTS: random.choice([50, 300, 1_000]),
            INPUT: random.choice([10_000, 40_000, 100_000]),
            OUTPUT: random.choice([5_000, 16_000, 40_000]),
        }
        part = random.choice([1, 1, 2, 6])
        self.upstream = {
            d: UpstreamBucket(amount, amount // part, amount // part * random.choice([MINUTE, MINUTE, 0]), START)
            for d, amount in amounts.items()
        }
        limits = tuple(Limit(d, Window.MINUTE, amount, amount // part) for d, amount in amounts.items())
        self.step(DefinePool("p", PROFILE, limits))
        for _ in range(calls):
            self.at(random.randint(0, 6 * calls) * SECOND // 2 + random.randint(0, SECOND), self.start)
        for _ in range(calls):
            self.at(random.randint(0, 5 * calls * SECOND), self.step)

    # -- time -----------------------------------------------------------------------------------------------------

    def at(self, delay: int, what: Callable[[], object]) -> None:
        self.serial += 1
        heappush(self.events, (self.now + delay, self.serial, lambda: (what(), None)[1]))

    def run(self) -> None:
        while self.events:
            self.now, _, what = heappop(self.events)
            for bucket in self.upstream.values():
                bucket.advance(self.now)
            what()
            self.check()

    def step(self, *ops: Operation) -> list[Answer]:
        tally.step()
        step = self.engine.step(self.now, list(enumerate(ops)))
        return [answer for _, answer in step.answers]

    # -- one call -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        random = self.random
        truth = random.choice([3, 40, 700, 2_500])
        low, high = truth * 1000 // 1225 + 1, truth * 1225 // 1000
        figures = [random.randint(min(low, high), max(low, high)) for _ in range(3)]
        cap = random.choice([50, 600, 3_000])
        call = Call(
            f"sim/{UUID(int=len(self.calls) + 1)}",
            self.now,
            figures[0],
            figures[1],
            figures[2],
            cap=cap,
            output=random.randint(0, cap),
            expected_output=random.choice([1, cap // 3, cap]),
        )
        estimate = Estimate(input_tokens=call.estimate, output_tokens=call.expected_output, max_output_tokens=cap)
        hold = random.choice([15, 40, 120, 300]) * SECOND
        (answer,) = self.step(Reserve(call.key, (Candidate("p", estimate=estimate),), hold_us=hold))
        if not isinstance(answer, Granted):
            return
        self.calls[call.key] = call
        if random.random() < 0.05:
            self.at(random.randint(0, 5 * SECOND), lambda: self.step(Release(call.key)))
            return
        flight = random.choice([0, 50_000, SECOND, 8 * SECOND])
        self.at(random.randint(0, flight), lambda: self.arrive(call))

    def count(self, call: Call, dimension: Dimension, amount: int) -> None:
        call.counted[dimension].append((self.now, amount))
        self.upstream[dimension].count(self.now, amount)

    def arrive(self, call: Call) -> None:
        random = self.random
        needs = {REQUESTS: 1, INPUT: call.upstream_estimate}
        for dimension, need in needs.items():
            bucket = self.upstream[dimension]
            bucket.advance(self.now)
            missing = need * MINUTE - bucket.level
            if missing > 0:
                seconds = -(-missing // (bucket.amount * SECOND))
                self.refuse(call, dimension, seconds * SECOND if random.random() < 0.8 else None)
                return
        self.count(call, REQUESTS, 1)
        self.count(call, INPUT, call.upstream_estimate)
        duration = random.choice(self.durations)
        self.at(random.randint(0, duration), lambda: self.count(call, INPUT, call.input - call.upstream_estimate))
        chunks = random.randint(1, 5)
        shares = [call.output * (n + 1) // chunks - call.output * n // chunks for n in range(chunks)]
        for share in shares:
            self.at(random.randint(0, duration), partial(self.count, call, OUTPUT, share))
        self.at(random.randint(0, 50_000), lambda: self.respond(call, duration))

    def headers(self) -> Headers:
        readings = []
        for dimension in DIMENSIONS:
            bucket = self.upstream[dimension]
            bucket.advance(self.now)
            whole, rounding = bucket.level // MINUTE, ROUNDING[dimension]
            shown = whole if not rounding else (whole + rounding // 2) // rounding * rounding
            full = -(-(bucket.burst * MINUTE - bucket.level) // bucket.amount)
            said = -(-full // SECOND) * SECOND
            readings.append(
                Reading(
                    dimension,
                    limit=bucket.amount,
                    remaining=max(0, shown),
                    rounding=rounding,
                    reset_us=said if self.random.random() < 0.5 else None,
                    reset_error_us=SECOND,
                )
            )
        return Headers(self.now, tuple(r for r in readings if self.random.random() < 0.9))

    def observation(self, call: Call, headers: Headers, received: int) -> Observation:
        age = self.now - received
        for reading in (*headers.readings, *([] if headers.refused is None else [Reading(headers.refused)])):
            self.taken[reading.dimension, min(call.granted_at, self.now - age), self.now - age] = headers.at
        return Observation(
            headers.readings,
            age_us=age,
            refusal=headers.refusal,
            refused=headers.refused,
            retry_after_us=headers.retry_after_us,
        )

    def refuse(self, call: Call, dimension: Dimension, retry_after_us: int | None) -> None:
        """The call was not counted at all."""
        random = self.random
        seen = self.headers() if random.random() < 0.5 else Headers(self.now, ())
        headers = Headers(self.now, seen.readings, Refusal.BUDGET, dimension, retry_after_us)
        back = random.randint(0, 2 * SECOND)
        received = self.now + random.randint(0, back)

        def commit() -> None:
            observation = self.observation(call, headers, received)
            self.step(Commit(call.key, Outcome(Disposition.REJECTED, observation=observation)))
            self.check(clamped=True)

        self.at(back, commit)

    def respond(self, call: Call, duration: int) -> None:
        random = self.random
        headers = self.headers()
        received = self.now + random.randint(0, SECOND)
        report = received - self.now + random.choice([0, 0, SECOND, 30 * SECOND])
        early = random.random() < 0.6
        if early:
            self.at(
                report,
                lambda: self.step(
                    Renew(
                        call.key,
                        output_tokens=random.choice([None, call.counted_by(OUTPUT, self.now)]),
                        hold_us=random.choice([None, 60 * SECOND]),
                        observation=self.observation(call, headers, received),
                        usage=random.choice([None, Usage(input_tokens=call.input)]),
                    )
                ),
            )
        late = random.choice([0, 0, SECOND, 100 * SECOND, 400 * SECOND])
        end = duration + max(report, random.randint(0, 2 * SECOND)) + late
        if random.random() < 0.9:
            self.at(end, lambda: self.finish(call, None if early else headers, received))

    def finish(self, call: Call, headers: Headers | None, received: int) -> None:
        random = self.random
        observation = None
        if headers is not None and self.now - received < 60 * SECOND:
            observation = self.observation(call, headers, received)
        kind = random.choice([UsageKind.FINAL, UsageKind.FINAL, UsageKind.PARTIAL, UsageKind.MISSING])
        output = call.output if kind is UsageKind.FINAL else random.randint(0, call.output)
        usage = None if kind is UsageKind.MISSING else Usage(input_tokens=call.input, output_tokens=output)
        disposition = Disposition.SUCCEEDED if kind is UsageKind.FINAL else Disposition.ABORTED
        self.step(Commit(call.key, Outcome(disposition, usage, kind, observation)))
        self.check(clamped=True)

    # -- the property -----------------------------------------------------------------------------------------------

    def check(self, *, clamped: bool = False) -> None:
        """``clamped``: the level has just been brought into the interval."""
        self.engine.step(self.now, [])
        for bucket in self.engine.state.buckets:
            if bucket.dimension in DIMENSIONS:
                assert bucket.burst == self.upstream[bucket.dimension].burst, "unlearned what it knew"
                self.check_bucket(bucket, clamped)

    def check_bucket(self, bucket: Bucket, clamped: bool) -> None:
        constraint = bucket.constraint
        if constraint is None:
            return
        low, high = interval(bucket, constraint, self.now)
        least, most = self.truth(bucket, constraint)
        self.checks += 1
        name = f"{bucket.dimension.name} at {self.now - START}"
        assert low is None or low * MINUTE <= most, f"{name}: {most / MINUTE} below [{low}, {high}]"
        assert high is None or least < (high + 1) * MINUTE, f"{name}: {least / MINUTE} above [{low}, {high}]"
        level = bucket.level + bucket.refill(self.now)[0] + bucket.foreseen
        assert low is None or level >= low - 1, f"{name}: level {level} left [{low}, {high}]"
        assert high is None or not clamped or level <= high + 1, f"{name}: level {level} left [{low}, {high}]"

    def truth(self, bucket: Bucket, constraint: Constraint) -> tuple[int, int]:
        """What the level ought to be, in 60-millionths.

        Two figures, because what the upstream counts or gives back after the reading, of calls that were over for
        our books before it, is outside traffic. They differ only if there was any.
        """
        taken = self.taken[bucket.dimension, constraint.since, constraint.until]
        upstream = self.upstream[bucket.dimension]
        ahead = grown = back = 0
        for call in self.calls.values():
            booked = self.booked(call, bucket, constraint.since)
            counted = call.counted_by(bucket.dimension, self.now)
            if booked is None:
                since = counted - call.counted_by(bucket.dimension, taken)
                grown, back = grown + max(0, since), back + since
            else:
                ahead += booked - counted
        most = min(upstream.burst * MINUTE, upstream.level + (grown - ahead) * MINUTE)
        least = min(upstream.burst * MINUTE, upstream.level + (back - ahead) * MINUTE)
        return least, most

    def booked(self, call: Call, bucket: Bucket, since: int) -> int | None:
        """What the books carry for a call; ``None`` if it had ended before ``since``."""
        state = self.engine.state
        number = state.buckets.index(bucket)
        reservation = state.open.get(call.key)
        if reservation is not None:
            return reservation.holds[reservation.buckets.index(number)]
        ended = state.ended[call.key]
        return ended.charges[ended.buckets.index(number)] if ended.ended_at >= since else None


@pytest.mark.parametrize("part", range(2))
def test_the_truth_never_leaves_the_interval(part: int) -> None:
    @settings(max_examples=1_500 * tally.SCALE, phases=(Phase.generate, Phase.shrink))
    @given(seed=st.integers(0, 1 << 40), calls=st.integers(1, 14))
    def holds(seed: int, calls: int) -> None:
        tally.example("interval")
        History(Random(seed * 2 + part), calls).run()

    holds()


class SteadyHistory(History):
    """Short calls that keep coming, at half of the limit, with headers that are reported at once."""

    durations = (SECOND,)

    def __init__(self, *, fill: int, level: int) -> None:
        super().__init__(Random(7), 0, fill=fill)
        for bucket in self.upstream.values():
            bucket.amount = bucket.burst = 60_000
            bucket.level = bucket.burst * level * MINUTE // 1000
        limits = tuple(Limit(d, Window.MINUTE, 60_000) for d in DIMENSIONS)
        self.engine = Engine("simulated", State("simulated"))
        self.step(DefinePool("p", PROFILE, limits, fill=fill))
        for second in range(60):
            self.at(second * SECOND, self.start)

    def start(self) -> None:
        call = Call(
            f"sim/{UUID(int=len(self.calls) + 1)}", self.now, 500, 490, 510, cap=800, output=400, expected_output=400
        )
        estimate = Estimate(input_tokens=500, output_tokens=400, max_output_tokens=800)
        (answer,) = self.step(Reserve(call.key, (Candidate("p", estimate=estimate),)))
        if isinstance(answer, Granted):
            self.calls[call.key] = call
            self.at(50_000, lambda: self.arrive(call))

    def respond(self, call: Call, duration: int) -> None:
        headers, received = self.headers(), self.now + 50_000
        self.at(50_000, lambda: self.step(Renew(call.key, observation=self.observation(call, headers, received))))
        self.at(duration + 100_000, lambda: self.finish(call, None, received))


@pytest.mark.parametrize(("fill", "level"), [(1000, 0), (1000, 500), (0, 1000), (200, 800), (1000, 1000)])
def test_a_wrong_level_converges_to_the_truth(fill: int, level: int) -> None:
    """Closed loop: whatever the engine believed at first, the headers bring it to the truth, and it stays there."""
    tally.example("closed loop")
    history = SteadyHistory(fill=fill, level=level)
    history.run()
    calls = len(history.calls)
    history.now += 5 * SECOND
    history.step()
    history.start()
    for real in history.upstream.values():
        real.advance(history.now)
    assert calls > 30
    for bucket in history.engine.state.buckets:
        constraint = bucket.constraint
        if bucket.dimension not in DIMENSIONS or constraint is None:
            continue
        low, high = interval(bucket, constraint, history.now)
        least, most = history.truth(bucket, constraint)
        assert low is not None
        assert high is not None
        assert high - low < 9_000, "the headers of a quiet pool say more than that"
        assert least - (high - low) * MINUTE <= bucket.level * MINUTE <= most + (high - low) * MINUTE
