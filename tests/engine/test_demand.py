"""The record of what calls used and of what held them back: of known calls, known figures."""

from __future__ import annotations

from paceline.engine import demand
from paceline.engine.accounting import WEIGHT_ONE, Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Denied, Granted
from paceline.engine.demand import RECENT_US, Demand
from paceline.engine.dimensions import MINUTE_US, SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Engine, Step
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    DefineShare,
    Disposition,
    Mode,
    Operation,
    Outcome,
    Reserve,
    SetMode,
)

START = 1_790_000_040 * SECOND_US
REQUESTS, INPUT, OUTPUT = Dimension.REQUESTS, Dimension.INPUT_TOKENS, Dimension.OUTPUT_TOKENS
PROFILE = Profile(
    "test",
    (
        Rule(REQUESTS, hold_requests=WEIGHT_ONE, settle_requests=WEIGHT_ONE),
        Rule(INPUT, hold_input=WEIGHT_ONE, settle_input=WEIGHT_ONE),
    ),
)


def limit(dimension: Dimension, amount: int, burst: int | None = None) -> Limit:
    return Limit(dimension, Window.MINUTE, amount, burst)


def subject(*limits: Limit, caps: tuple[Limit, ...] = (), mode: Mode = Mode.ENFORCE) -> Engine:
    engine = Engine("main")
    definitions: list[Operation] = [
        DefinePool("p", PROFILE, limits, learn=False),
        DefineShare("team", caps),
        SetMode(mode),
    ]
    engine.step(START, list(enumerate(definitions)))
    return engine


def reserve(number: int, tokens: int = 1, wait: int = 0, *, share: bool = False) -> Reserve:
    candidate = Candidate("p", ("team",) if share else (), Estimate(input_tokens=tokens))
    return Reserve(f"me/{number}", (candidate,), max_wait_us=wait * SECOND_US)


def commit(number: int, **usage: int) -> Commit:
    return Commit(f"me/{number}", Outcome(Disposition.SUCCEEDED, Usage(**usage), UsageKind.FINAL))


def run(engine: Engine, now: int, *operations: Operation) -> Step:
    """Decide, and let time pass until nobody waits."""
    step = engine.step(now, list(enumerate(operations)))
    while engine.waiting():
        assert step.wake_at is not None
        step = engine.step(step.wake_at, [])
    return step


def record(engine: Engine) -> demand.PoolDemand:
    return engine.stats.hindsight.demand.pools["p"]


def held(engine: Engine) -> dict[tuple[Dimension, bool], tuple[int, int, int]]:
    return {key: (each.waited, each.denied, each.wait_us) for key, each in record(engine).held.items()}


def test_a_wait_counts_for_the_limit_that_was_short() -> None:
    engine = subject(limit(REQUESTS, 60, 1), limit(INPUT, 60_000))
    run(engine, START, *(reserve(number, 10, 30) for number in range(3)))
    # One at once, the others a second and two seconds later.
    assert held(engine) == {(REQUESTS, False): (2, 0, 3 * SECOND_US)}
    assert record(engine).decided == 3

    engine = subject(limit(REQUESTS, 600), limit(INPUT, 60, 10))
    run(engine, START, reserve(0, 10, 30), reserve(1, 5, 30))
    assert held(engine) == {(INPUT, False): (1, 0, 5 * SECOND_US)}


def test_a_wait_for_the_cap_of_a_share_is_told_apart() -> None:
    engine = subject(limit(REQUESTS, 600), limit(INPUT, 60_000), caps=(limit(REQUESTS, 60, 1),))
    run(engine, START, *(reserve(number, 1, 30, share=True) for number in range(2)))
    assert held(engine) == {(REQUESTS, True): (1, 0, SECOND_US)}


def test_denials_count_for_the_limit_that_they_name() -> None:
    engine = subject(limit(REQUESTS, 2), limit(INPUT, 60_000))
    step = run(engine, START, *(reserve(number) for number in range(5)))
    assert [type(answer) for _, answer in step.answers] == [Granted, Granted, Denied, Denied, Denied]
    assert held(engine) == {(REQUESTS, False): (0, 3, 0)}
    assert record(engine).decided == 5


def test_observed_calls_count_as_they_would_have_been_decided() -> None:
    engine = subject(limit(REQUESTS, 60, 1), limit(INPUT, 60_000), mode=Mode.OBSERVE)
    run(engine, START, reserve(0), reserve(1), reserve(2, 1, 30))
    assert held(engine) == {(REQUESTS, False): (1, 1, SECOND_US)}


def test_usage_is_summed_and_minutes_are_counted_once() -> None:
    engine = subject(limit(REQUESTS, 600), limit(INPUT, 60_000))
    run(engine, START, *(reserve(number, 100) for number in range(4)))
    used = {"input_tokens": 50, "cache_read_tokens": 30, "cache_write_tokens": 20, "output_tokens": 7}
    run(engine, START, commit(0, **used), commit(1, **used))
    run(engine, START + MINUTE_US, commit(2, **used))
    run(engine, START + MINUTE_US, Commit("me/3", Outcome(Disposition.REJECTED)))
    found = record(engine)
    assert (found.used, found.minutes) == (3, 2)
    assert (found.input_tokens, found.cache_read_tokens, found.cache_write_tokens) == (150, 90, 60)
    assert found.output_tokens == 21
    # What was charged of calls that used something; the one that was refused is not among them.
    assert found.charged == {REQUESTS: (3, 3), INPUT: (150, 3)}


def test_caps_of_shares_are_not_among_the_charges_of_the_pool() -> None:
    engine = subject(limit(REQUESTS, 600), limit(INPUT, 60_000), caps=(limit(INPUT, 6_000),))
    run(engine, START, reserve(0, 100, share=True))
    run(engine, START, commit(0, input_tokens=50))
    assert record(engine).charged == {REQUESTS: (1, 1), INPUT: (50, 1)}


def test_lately_forgets() -> None:
    engine = subject(limit(REQUESTS, 1), limit(INPUT, 60_000))
    begin = START - START % RECENT_US + RECENT_US
    run(engine, begin, reserve(0), reserve(1), reserve(2))
    found = record(engine).held[REQUESTS, False]
    assert found.lately(begin + RECENT_US - 1) == (0, 2)
    assert found.lately(begin + 2 * RECENT_US - 1) == (0, 2)
    assert found.lately(begin + 2 * RECENT_US) == (0, 0)
    assert (found.calls, found.minutes) == (2, 1)


def test_no_more_pools_than_the_cap_have_records() -> None:
    subject_ = Demand()
    for number in range(demand.MAX_POOLS + 5):
        subject_.denied(f"p{number}", REQUESTS)
    assert len(subject_.pools) == demand.MAX_POOLS
