"""What settlements and readings teach, and that it never shuts what the upstream has open."""

from __future__ import annotations

import pytest

from paceline.engine import answers as an
from paceline.engine import operations as op
from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import MINUTE_US, SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.outlook import HORIZONS, Table, survival
from paceline.engine.outside import SAMPLES, Sampler, decayed
from paceline.engine.sizes import BINS, UNIT, Learned, Sample, bin_of, middle_of
from paceline.engine.state import State

PROFILE = Profile(
    "anthropic",
    (
        Rule(Dimension.REQUESTS, hold_requests=1000, settle_requests=1000),
        Rule(Dimension.INPUT_TOKENS, hold_input=1000, settle_input=1000, settle_cache_write=1000),
        Rule(Dimension.OUTPUT_TOKENS, hold_output=1000, settle_output=1000),
    ),
)
OUTPUT = 2
"""Number of the output's bucket."""


class Ledger:
    """An engine with one pool and a clock."""

    def __init__(self, output: int = 8_000, coming: int = 50_000, requests: int = 1_000) -> None:
        self.engine = Engine("l")
        self.now = 1_000_000 * SECOND_US
        self.ticket = 0
        limits = ((Dimension.REQUESTS, requests), (Dimension.INPUT_TOKENS, coming), (Dimension.OUTPUT_TOKENS, output))
        made = tuple(Limit(dimension, Window.MINUTE, amount) for dimension, amount in limits)
        self.do(op.DefinePool("p", PROFILE, made))

    @property
    def output(self) -> Bucket:
        return self.engine.state.buckets[OUTPUT]

    def do(self, operation: op.Operation) -> an.Answer | None:
        self.ticket += 1
        step = self.engine.step(self.now, [(self.ticket, operation)])
        return next((answer for ticket, answer in step.answers if ticket == self.ticket), None)

    def reserve(self, key: str, estimate: Estimate, tenant: str = "t", route: str = "r") -> an.Answer | None:
        return self.do(op.Reserve(key, (op.Candidate("p", (), estimate),), tenant, route, hold_us=600 * SECOND_US))

    def commit(self, key: str, usage: Usage, remaining: int | None = None, took_s: float = 5.0) -> None:
        self.now += int(took_s * SECOND_US)
        readings = () if remaining is None else (op.Reading(Dimension.OUTPUT_TOKENS, 8_000, remaining, 1_000),)
        observation = op.Observation(readings) if readings else None
        outcome = op.Outcome(op.Disposition.SUCCEEDED, usage, UsageKind.FINAL, observation)
        answer = self.do(op.Commit(key, outcome))
        assert isinstance(answer, an.Committed), answer

    def calls(self, number: int, estimate: Estimate, usage: Usage, *, tenant: str = "t", gap_s: float = 60.0) -> None:
        for place in range(number):
            key = f"{tenant}/{self.ticket}/{place}"
            assert isinstance(self.reserve(key, estimate, tenant), an.Granted)
            self.commit(key, usage)
            self.now += int(gap_s * SECOND_US)


def test_missing_estimates_are_filled_with_what_such_calls_were() -> None:
    ledger = Ledger()
    ledger.calls(25, Estimate(), Usage(input_tokens=300, output_tokens=40))
    ledger.reserve("next", Estimate())
    assert ledger.engine.state.open["next"].holds[1:3] == (300, 40)


def test_stated_estimates_are_scaled_by_their_own_tenants_errors_alone() -> None:
    ledger = Ledger()
    ledger.calls(25, Estimate(input_tokens=100, output_tokens=10), Usage(input_tokens=300, output_tokens=10))
    ledger.reserve("mine", Estimate(input_tokens=1_000, output_tokens=10))
    ledger.reserve("theirs", Estimate(input_tokens=1_000, output_tokens=10), tenant="other")
    state = ledger.engine.state
    assert state.open["mine"].holds[1] == 3_000
    assert state.open["theirs"].holds[1] == 1_000


def test_no_learned_size_makes_a_lone_call_impossible() -> None:
    ledger = Ledger(output=8_000)
    ledger.calls(30, Estimate(input_tokens=100), Usage(input_tokens=100, output_tokens=9_000), gap_s=600)
    assert isinstance(ledger.reserve("next", Estimate(input_tokens=100)), an.Granted)


def test_absurd_usage_leaves_the_books_readable() -> None:
    ledger = Ledger()
    for number in range(40):
        ledger.do(op.Reserve(f"{number}", (op.Candidate("p", (), Estimate()),), observed=True))
        ledger.commit(f"{number}", Usage(input_tokens=10**9, output_tokens=10**9))
    state = ledger.engine.state
    assert State.restore(list(state.dump())).digest() == state.digest()


def test_what_is_learned_comes_back_with_the_books() -> None:
    ledger = Ledger()
    ledger.calls(25, Estimate(), Usage(input_tokens=300, output_tokens=40))
    again = State.restore(list(ledger.engine.state.dump()))
    assert again.learned == ledger.engine.state.learned
    assert list(again.learned) == list(ledger.engine.state.learned)


def tight() -> Ledger:
    """A ledger of which the upstream says that little output is left, and whose calls are known."""
    ledger = Ledger(coming=1_000_000)
    for number in range(30):
        ledger.reserve(f"{number}", Estimate(input_tokens=10))
        ledger.commit(f"{number}", Usage(input_tokens=10, output_tokens=500), remaining=7_000)
        ledger.now += 10 * SECOND_US
    ledger.reserve("x", Estimate(input_tokens=10))
    ledger.commit("x", Usage(input_tokens=10, output_tokens=500), remaining=2_000)
    ledger.now += MINUTE_US
    return ledger


def test_a_lone_call_that_may_say_more_than_the_burst_waits_until_that_is_full() -> None:
    ledger = tight()
    ledger.reserve("before", Estimate(input_tokens=10))
    ledger.commit("before", Usage(input_tokens=10, output_tokens=500), remaining=6_000, took_s=1.0)
    # A new tenant: what it states is not scaled.
    large = op.Candidate("p", (), Estimate(input_tokens=10, output_tokens=12_000))
    asked = ledger.now
    assert ledger.do(op.Reserve("large", (large,), "new", "r", max_wait_us=5 * MINUTE_US)) is None
    while "large" not in ledger.engine.state.open:
        ledger.now += SECOND_US
        assert ledger.now < asked + MINUTE_US
        ledger.engine.step(ledger.now, [])
    assert ledger.engine.state.open["large"].holds[OUTPUT] == 12_000
    # About 2,000 of 8,000 a minute were missing, by a rounded reading.
    assert 9 * SECOND_US <= ledger.now - asked <= 17 * SECOND_US


def test_a_hung_call_shuts_nobody_out() -> None:
    ledger = tight()
    ledger.reserve("hung", Estimate(input_tokens=10, max_output_tokens=500))
    ledger.now += 5 * MINUTE_US
    assert isinstance(ledger.reserve("next", Estimate(input_tokens=10, max_output_tokens=500)), an.Granted)


def test_what_was_foreseen_and_never_came_is_no_second_burst() -> None:
    ledger = tight()
    ledger.reserve("long", Estimate(input_tokens=10, output_tokens=100))
    for number in range(70):
        ledger.now += 2 * SECOND_US
        ledger.reserve(f"t{number}", Estimate(input_tokens=10, output_tokens=1, max_output_tokens=1))
        ledger.commit(f"t{number}", Usage(input_tokens=10, output_tokens=1), took_s=0)
    assert ledger.output.foreseen > 0
    ledger.do(op.Release("long"))
    ledger.now += 5 * MINUTE_US
    spent = 0
    for number in range(400):
        small = Estimate(input_tokens=1, output_tokens=100, max_output_tokens=100)
        if not isinstance(ledger.reserve(f"s{number}", small, tenant="z", route="z"), an.Granted):
            break
        ledger.commit(f"s{number}", Usage(input_tokens=1, output_tokens=100), took_s=0)
        spent += 100
    assert 0 < spent <= ledger.output.burst


def test_open_calls_count_among_the_sizes() -> None:
    short, none = [0] * BINS, [0] * BINS
    short[bin_of(100)] = 10 * UNIT
    assert survival(short, none) == ([middle_of(bin_of(100))], [1.0])
    long = none.copy()
    long[bin_of(5_000)] = 10 * UNIT
    sizes, weights = survival(short, long)
    assert sizes[-1] > 5_000
    assert weights == pytest.approx([0.5, 0.5])


def test_the_rest_of_a_call_never_exceeds_its_cap() -> None:
    learned = Learned()
    for _ in range(50):
        learned.note(Sample(10, 0, 10_000, 0, 100_000))
    table = Table(learned, 10, 600, 0)
    assert table.row(0.0)[len(HORIZONS) - 1] <= 600
    assert table.produced(3_600.0) == 600
    assert table.row(3_600.0)[len(HORIZONS) - 1] == 0


def test_rare_sizes_fade() -> None:
    learned = Learned()
    for _ in range(30):
        learned.note(Sample(100_000, 10, 1, 0, 1_000))
    for _ in range(50_000):
        learned.note(Sample(10, 10, 1, 0, 1_000))
    assert learned.surprise < 1_000


def bucket() -> Bucket:
    return Bucket("p", "", Dimension.INPUT_TOKENS, Window.MINUTE, 60_000, 60_000, 0)


def test_what_goes_on_is_a_rate_and_what_happens_once_is_not() -> None:
    steady, once = Sampler(), Sampler()
    found: int | None = None
    for second in range(0, 2 * SAMPLES + 4, 2):
        steady.correct(-1_000)
        rate = steady.read(bucket(), second * SECOND_US)
        found = rate if rate is not None else found
        if second == 4:
            once.correct(-30_000)
        assert once.read(bucket(), second * SECOND_US) is None
    assert found is not None
    assert found == pytest.approx(30_000, rel=0.02)


def test_an_estimate_of_others_decays_by_itself() -> None:
    assert decayed(1_000, 29 * SECOND_US) == 1_000
    assert decayed(1_000, 30 * SECOND_US) == 500
    assert decayed(1_000, 3_600 * SECOND_US) == 0
