"""Who is let in, what is charged, and what refusals and headers say."""

from __future__ import annotations

import random
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.upstream import Accepted, Account, Overloaded, Refused, Scenario, SettingsError, limit_used, mark
from paceline.upstream.bucket import GRAINS
from paceline.upstream.errors import anthropic_code, anthropic_error, anthropic_refusal
from paceline.upstream.headers import go_duration, limit_headers, retry_headers, rounded
from paceline.upstream.settings import config_of, scenario_of
from paceline.upstream.truth import page, report
from tests.upstream.conftest import call, config

SECOND = 1_000_000
GPT = "gpt-5"


def account(scenario: Scenario | None = None, seed: int = 1, **fields: Any) -> Account:
    return Account(0, config(**fields), random.Random(seed), scenario)


def level(found: Account, dimension: str, group: str = "claude") -> int:
    return found.groups[group].buckets[dimension].tokens


CALLS = st.lists(
    st.tuples(
        st.integers(0, 5 * SECOND),  # since the one before
        st.integers(1, 4_000),  # estimate
        st.integers(1, 4_000),  # truth
        st.integers(0, 3_000),  # output
        st.sampled_from(("finished", "gone", "error")),
    ),
    max_size=40,
)


@given(calls=CALLS, openai=st.booleans(), initial=st.floats(0, 1), burst=st.sampled_from((1.0, 10.0, 60.0)))
def test_admission_and_conservation(calls: list[Any], openai: bool, initial: float, burst: float) -> None:
    """A call is refused exactly if it does not fit; every charge and refill is in the sums; the truth adds up."""
    found = account(initial=initial, burst_seconds=burst)
    name = "gpt" if openai else "claude"
    group = found.groups[name]
    begin, now, output = mark(found, 0), 0, 0
    for gap, estimate, true, produced, how in calls:
        now += gap
        found.advance(now)
        needs = {"requests": 1, "tokens": estimate, "input_tokens": estimate, "output_tokens": 1}
        fits = all(bucket.level >= needs[name] * GRAINS for name, bucket in group.buckets.items())
        one = call(estimate, true, model=GPT if openai else "claude-opus-5")
        outcome = found.arrive(now, one)
        assert isinstance(outcome, Accepted) == fits
        if isinstance(outcome, Refused):
            bucket = group.buckets[outcome.dimension]
            assert outcome.retry_after == max(1, -(-outcome.wait_us // SECOND))
            assert bucket.level + outcome.wait_us * bucket.amount >= outcome.needed * GRAINS
            continue
        found.started(now, one)
        found.produced(now, one, produced)
        output += produced
        found.ended(now, one, how)
        for bucket in group.buckets.values():
            assert bucket.level == (
                bucket.start + bucket.refilled - bucket.charged - bucket.outside_taken + bucket.adjusted
            )
    used = limit_used(found, begin, mark(found, now))[name]
    for dimension, share in used.items():
        if dimension != "requests" or not openai:  # Refused calls cost a request too.
            assert share.accepted == share.drawn
    assert group.output == output


@given(
    fill=st.lists(st.integers(1, 3_000), min_size=1, max_size=30),
    estimate=st.integers(1, 10_000),
    produced=st.integers(0, 20_000),
    openai=st.booleans(),
)
def test_accepted_after_exactly_retry_after(fill: list[int], estimate: int, produced: int, openai: bool) -> None:
    found = account()
    model = GPT if openai else "claude-opus-5"
    for size in fill:
        one = call(size, model=model)
        if isinstance(found.arrive(0, one), Accepted):
            found.produced(0, one, produced)
            found.ended(0, one, "finished")
    outcome = found.arrive(0, call(estimate, model=model))
    if isinstance(outcome, Refused):
        assert outcome.retry_after is not None
        now = outcome.retry_after * SECOND
        assert isinstance(found.arrive(now, call(estimate, model=model)), Accepted)


def test_estimate_is_charged_then_corrected_at_the_first_byte() -> None:
    found = account()
    one = call(1_000, 1_300, cache_read=500, cache_write=200)
    found.arrive(0, one)
    assert level(found, "input_tokens") == 9_000
    found.started(0, one)
    # 1,300 + 200 written; what is read is free.
    assert level(found, "input_tokens") == 8_500


def test_correction_after_a_delay_comes_in_its_time() -> None:
    found = account(correct_after_ms=500, burst_seconds=60.0)
    one = call(6_000, 12_000)
    found.arrive(0, one)
    found.started(0, one)
    found.advance(499_999)
    assert level(found, "input_tokens") == 4_000 + 83
    # Looked at late, it was booked when it was due: a level in debt since then.
    found.advance(SECOND)
    assert level(found, "input_tokens") == 4_000 - 6_000 + 166


def test_correction_that_nobody_saw_is_refilled_since() -> None:
    found = account(correct_after_ms=500)
    found.arrive(0, call(100, 5_000))
    # 5,100 at half a second, and 4,917 since: booked only now, they would be missing.
    found.advance(30 * SECOND)
    assert level(found, "input_tokens") == 10_000


def test_used_in_a_window_leaves_out_what_was_before_and_after() -> None:
    found = account(initial=0.5)

    def spend(now: int, size: int) -> None:
        one = call(size)
        assert isinstance(found.arrive(now, one), Accepted)
        found.produced(now, one, 7)
        found.ended(now, one, "finished")

    spend(0, 600)
    begin = mark(found, 6 * SECOND)
    spend(6 * SECOND, 1_000)
    spend(9 * SECOND, 200)
    found.change(12 * SECOND, limits={"*": {"input_tokens": 20_000}})
    end = mark(found, 15 * SECOND)
    spend(15 * SECOND, 300)
    used = limit_used(found, begin, end)["claude"]
    # 5,000 - 600 + 1,000 at the start; then 6 s at the old rate and 3 s at the new one.
    assert (used["input_tokens"].accepted, used["input_tokens"].budget) == (1_200, 5_400 + 1_000 + 1_000)
    assert used["input_tokens"].part == 1_200 / 7_400
    assert (used["output_tokens"].accepted, used["requests"].accepted) == (14, 2)


def test_refund_of_an_estimate_never_overfills() -> None:
    found = account()
    one = call(5_000, 10)
    found.arrive(0, one)
    found.started(60 * SECOND, one)
    assert level(found, "input_tokens") == 10_000


def test_output_makes_debt_that_refuses() -> None:
    found = account()
    one = call()
    found.arrive(0, one)
    found.produced(0, one, 6_000)
    outcome = found.arrive(0, call())
    assert isinstance(outcome, Refused)
    assert (outcome.dimension, outcome.level, outcome.retry_after) == ("output_tokens", -1_000, 13)


def test_the_longest_wait_is_named() -> None:
    found = account(requests=1, coming=600, going=60)
    found.arrive(0, call(600))
    outcome = found.arrive(0, call(300))
    assert isinstance(outcome, Refused)
    assert (outcome.dimension, outcome.retry_after) == ("requests", 60)


def test_the_request_that_a_refusal_costs_is_not_what_it_names() -> None:
    # The last request is there, and the call a little short of tokens; another request would take half a minute.
    found = account(requests=2)
    found.arrive(0, call(5_000, model=GPT))
    outcome = found.arrive(0, call(5_100, model=GPT))
    assert isinstance(outcome, Refused)
    assert (outcome.dimension, outcome.level, outcome.wait_us, outcome.retry_after) == ("tokens", 5_000, 600_000, 1)
    assert level(found, "requests", "gpt") == 0
    after = found.arrive(0, call(100, model=GPT))
    assert isinstance(after, Refused)
    assert (after.dimension, after.level) == ("requests", 0)


@pytest.mark.parametrize(("how", "left"), [("openai", 2), ("none", 3), ("all", 2)])
def test_refused_calls_count_as_configured(how: str, left: int) -> None:
    found = account(requests=4, refused_requests_count=how)
    found.arrive(0, call(10_000, model=GPT))
    assert isinstance(found.arrive(0, call(10_000, model=GPT)), Refused)
    assert level(found, "requests", "gpt") == left
    found.arrive(0, call(10_000))
    found.arrive(0, call(10_000))
    assert level(found, "requests") == (2 if how == "all" else 3)


def test_cache_reads_that_count() -> None:
    fields = {"models": ["m"], "limits": {"requests": 10, "input_tokens": 1000, "output_tokens": 10}}
    settings = config_of({"groups": [{"name": "old", "cache_reads_count": True, **fields}]})
    found = Account(0, settings, random.Random(1))
    one = call(100, 100, model="m", cache_read=50, cache_write=7)
    found.arrive(0, one)
    found.started(0, one)
    assert level(found, "input_tokens", "old") == 1_000 - 157


def test_overload_is_an_episode_and_touches_no_bucket() -> None:
    found = account()
    found.change(0, overload_probability=0.5, overload_seconds=10)
    outcomes = [found.arrive(number, call()) for number in range(400)]
    lost = sum(isinstance(one, Overloaded) for one in outcomes)
    assert 120 < lost < 280
    found.advance(9 * SECOND)
    assert isinstance(found.arrive(10 * SECOND, call()), Accepted)
    group = found.groups["claude"]
    assert group.counts["overloaded"] == lost
    assert group.buckets["requests"].charged == (group.counts["accepted"]) * GRAINS


def test_forced_refusals_and_concurrency() -> None:
    found = account()
    found.change(0, refuse_next=2, refuse_dimension="input_tokens", refuse_retry_after=7)
    first, second = found.arrive(0, call()), found.arrive(0, call())
    assert isinstance(first, Refused)
    assert isinstance(second, Refused)
    assert (first.dimension, first.retry_after) == ("forced input_tokens", 7)
    assert isinstance(found.arrive(0, call()), Accepted)
    fields = {"models": ["m"], "limits": {"requests": 10, "input_tokens": 1000, "output_tokens": 10}}
    narrow = Account(0, config_of({"groups": [{"name": "g", "max_concurrent": 1, **fields}]}), random.Random(1))
    one = call(1, model="m")
    narrow.arrive(0, one)
    refused = narrow.arrive(0, call(1, model="m"))
    assert isinstance(refused, Refused)
    assert refused.dimension == "concurrency"
    narrow.ended(0, one, "finished")
    assert isinstance(narrow.arrive(0, call(1, model="m")), Accepted)


def test_outside_traffic_and_limits_change_at_run_time() -> None:
    found = account()
    begin = mark(found, 0)
    found.change(0, outside={"*": {"input_tokens": 4_000}, "claude": {"requests": 200}})
    for second in range(60):
        one = call(100)
        if isinstance(found.arrive(second * SECOND, one), Accepted):
            found.ended(second * SECOND, one, "finished")
    used = limit_used(found, begin, mark(found, 60 * SECOND))["claude"]
    assert used["input_tokens"].outside == 4_000
    assert used["input_tokens"].budget == 20_000
    assert used["input_tokens"].net == used["input_tokens"].accepted / 16_000
    # It wants twice what there is.
    assert 0 < used["requests"].outside <= 200
    found.change(60 * SECOND, outside={}, limits={"claude": {"requests": 6}})
    assert found.groups["claude"].buckets["requests"].amount == 6
    assert level(found, "requests") <= 6
    assert found.groups["gpt"].buckets["tokens"].outside == 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"overload_probability": 2}, "overload_probability"),
        ({"nonsense": 1}, "nonsense"),
        ({"first_byte_ms": "soon"}, "first_byte_ms"),
        ({"tokens_per_second": float("nan")}, "tokens_per_second"),
        ({"outside": {"nobody": {"requests": 1}}}, "outside.nobody"),
        ({"outside": {"gpt": {"input_tokens": 1}}}, "outside.gpt.input_tokens"),
        ({"limits": {"claude": {"requests": 0}}}, "limits"),
    ],
)
def test_bad_settings_name_the_field_and_change_nothing(fields: dict[str, Any], named: str) -> None:
    found = account()
    before = report(found, 0)
    with pytest.raises(SettingsError, match=named):
        found.apply(0, {"headers": False, **fields})
    assert report(found, 0) == before


def test_bad_configurations_name_the_field() -> None:
    limits = {"requests": 1, "tokens": 1}
    for fields, named in (
        ({"groups": [{"name": "a", "models": ["m"], "limits": limits}]}, r"groups\[0\]\.limits"),
        ({"groups": [{"name": "a", "models": ["m"], "limits": {"rq": 1}}]}, r"groups\[0\]\.limits"),
        ({"groups": [{"name": "a", "models": ["m"], "api": "openai", "limits": limits}] * 2}, r"groups\[1\]\.name"),
        ({"initial": 1.1}, "initial"),
        ({"seeds": 1}, "seeds"),
    ):
        with pytest.raises(SettingsError, match=named):
            config_of(fields)
    assert scenario_of({"headers": False}, Scenario(chunk_ms=7)) == Scenario(chunk_ms=7, headers=False)


EPOCH = 1_790_000_000 * SECOND


@given(charged=st.integers(1, 20_000), now=st.integers(0, 30 * SECOND), produced=st.integers(0, 9_000))
def test_headers_say_limit_rounded_rest_and_time_to_full(charged: int, now: int, produced: int) -> None:
    found = account()
    one = call(min(charged, 10_000))
    found.arrive(0, one)
    found.produced(0, one, produced)
    headers = limit_headers(found, found.groups["claude"], now, EPOCH)
    for kind in ("requests", "input-tokens", "output-tokens"):
        bucket = found.groups["claude"].buckets[kind.replace("-", "_")]
        assert headers[f"anthropic-ratelimit-{kind}-limit"] == str(bucket.amount)
        left = int(headers[f"anthropic-ratelimit-{kind}-remaining"])
        if kind == "requests":
            assert left == bucket.tokens
        else:
            assert left % 1_000 == 0
            assert abs(left - max(0, bucket.tokens)) <= 500
        full = datetime.fromisoformat(headers[f"anthropic-ratelimit-{kind}-reset"]).timestamp()
        assert 0 <= full * SECOND - (EPOCH + now + bucket.full_us()) < SECOND
    assert int(headers["anthropic-ratelimit-tokens-limit"]) == 15_000
    assert len(headers) == 12


def test_spelling_absence_and_the_tighter_kind() -> None:
    found = account(Scenario(spelling="older"), tokens_header="tightest")
    one = call()
    found.arrive(0, one)
    found.produced(0, one, 2_600)
    headers = limit_headers(found, found.groups["claude"], 0, EPOCH)
    assert headers["x-ratelimit-remaining-tokens"] == headers["x-ratelimit-remaining-output-tokens"] == "2000"
    assert headers["x-ratelimit-limit-requests"] == "100"
    assert len(headers) == 12
    found.change(0, headers=False)
    assert limit_headers(found, found.groups["claude"], 0, EPOCH) == {}


def test_rounding_goes_to_the_nearest() -> None:
    assert [rounded(tokens, 1_000) for tokens in (0, 499, 500, 1_499, 1_500)] == [0, 0, 1_000, 1_000, 2_000]


def test_openai_headers_and_durations() -> None:
    found = account(coming=60_000)
    found.arrive(0, call(21_037, model=GPT))
    headers = limit_headers(found, found.groups["gpt"], 0, EPOCH)
    assert headers["x-ratelimit-remaining-tokens"] == "38963"
    assert headers["x-ratelimit-reset-tokens"] == "21.037s"
    assert headers["x-ratelimit-reset-requests"] == "600ms"
    refused = found.arrive(0, call(38_973, model=GPT))
    assert isinstance(refused, Refused)
    assert retry_headers(refused, "openai") == {"retry-after": "1", "retry-after-ms": "10"}
    times = (0, 17_000, SECOND, 360 * SECOND, 86_400_000, 3_661 * SECOND, 999_001)
    assert [go_duration(us) for us in times] == ["0s", "17ms", "1s", "6m0s", "1m26.4s", "1h1m1s", "1s"]


def test_log_is_bounded_and_says_what_is_gone() -> None:
    found = account(requests=1_000, log_calls=10)
    begin = mark(found, 0)
    for number in range(25):
        found.arrive(number, call(1))
    part = page(found, 3, 4)
    assert [one.number for one in part["calls"]] == [16, 17, 18, 19]
    assert (part["next"], part["forgotten"], part["logged"]) == (19, 12, 25)
    assert page(found, 25, 4)["calls"] == []
    assert page(found, 99, 4)["next"] == 25
    with pytest.raises(LookupError, match="16"):
        limit_used(found, begin, mark(found, 30))
    assert report(found, 30)["accepted"] == 25


def test_models_find_their_group() -> None:
    limits = {"requests": 1, "input_tokens": 1, "output_tokens": 1}
    groups = [
        {"name": name, "models": models, "limits": limits}
        for name, models in (("all", ["claude-*"]), ("opus", ["claude-opus-*"]), ("one", ["claude-opus-5"]))
    ]
    found = Account(0, config_of({"groups": groups}), random.Random(1))
    names = [found.group_of(model) for model in ("claude-haiku", "claude-opus-4", "claude-opus-5", "gpt-5")]
    assert [name and name.config.name for name in names] == ["all", "opus", "one", None]


def test_the_same_seed_gives_the_same() -> None:
    def run(seed: int) -> list[str]:
        found = account(Scenario(overload_probability=0.3), seed, estimate_spread=0.2)
        return [f"{type(found.arrive(step, one)).__name__} {one.estimate}" for step in range(50) for one in [call(900)]]

    assert run(3) == run(3) != run(4)


# -- ramps -------------------------------------------------------------------------------------------------------------

MINUTE = 60 * SECOND


def ramped(start: int = 60_000, step: int = 6_000) -> Account:
    found = account(initial=1.0, coming=200_000)
    found.change(0, ramps={"claude": {"start": start, "step": step}})
    return found


def test_a_ramp_lets_pass_what_it_has_and_says_what_it_allows() -> None:
    found = ramped()
    refused = found.arrive(0, call(2_000))
    assert isinstance(refused, Refused)
    assert (refused.dimension, refused.limit, refused.needed, refused.level) == ("ramp", 60_000, 2_000, 0)
    assert (refused.wait_us, refused.retry_after) == (2 * SECOND, 2)
    assert isinstance(found.arrive(2 * SECOND, call(2_000)), Accepted)
    assert isinstance(found.arrive(2 * SECOND, call(1)), Refused)
    assert found.groups["claude"].refused_by == {"ramp": 2}


def test_a_ramp_rises_at_each_minute_boundary_until_it_is_the_limit() -> None:
    found = ramped()
    group = found.groups["claude"]
    limit = group.buckets["input_tokens"].amount
    assert group.ramp is not None
    found.advance(MINUTE - 1)
    assert group.ramp.amount == 60_000
    found.advance(MINUTE)
    assert group.ramp.amount == 66_000
    # The first minute at one rate, the second at the next.
    found.advance(2 * MINUTE - 1)
    assert group.ramp.offered // GRAINS == 60_000 + 66_000 - 1
    found.advance(2 * MINUTE + (limit - 72_000) // 6_000 * MINUTE + MINUTE)
    assert group.ramp is None


def test_a_ramp_rises_at_the_minutes_of_the_clock_whenever_it_began() -> None:
    found = account(initial=1.0, coming=200_000)
    found.change(50 * SECOND, ramps={"*": {"start": 60_000, "step": 6_000}})
    found.advance(MINUTE)
    ramp = found.groups["claude"].ramp
    assert ramp is not None
    assert (ramp.amount, ramp.tokens) == (66_000, 10_000)


def test_a_ramp_is_charged_what_the_input_is_charged() -> None:
    found = ramped()
    group = found.groups["claude"]
    one = call(3_000, 1_000)
    assert isinstance(found.arrive(10 * SECOND, one), Accepted)
    assert group.ramp is not None
    assert group.ramp.tokens == 10_000 - 3_000
    found.started(10 * SECOND, one)
    assert group.ramp.tokens == 10_000 - 1_000


def test_how_much_of_a_ramp_was_used_is_told() -> None:
    found = ramped()
    first = mark(found, 0)
    found.arrive(30 * SECOND, call(15_000, 15_000))
    found.ended(31 * SECOND, found.calls[0], "finished")
    used = limit_used(found, first, mark(found, MINUTE))["claude"]["ramp"]
    assert (used.accepted, used.budget) == (15_000, 60_000)
    assert report(found, MINUTE)["groups"]["claude"]["buckets"]["ramp"]["limit"] == 66_000


def test_a_ramp_ends_when_it_is_lifted_and_names_a_known_group() -> None:
    found = ramped()
    found.change(0, ramps={})
    assert isinstance(found.arrive(0, call(2_000)), Accepted)
    with pytest.raises(SettingsError, match=r"ramps\.nobody"):
        found.change(0, ramps={"nobody": {"start": 1, "step": 1}})
    with pytest.raises(SettingsError, match=r"ramps\.gpt"):
        found.change(0, ramps={"gpt": {"start": 1, "step": 1}})


def test_the_error_of_a_ramp_has_its_code() -> None:
    refused = ramped().arrive(0, call(2_000))
    assert isinstance(refused, Refused)
    message = anthropic_refusal(refused, "org", "claude-opus-5")
    body = anthropic_error(429, message, "req", anthropic_code(refused))
    assert body["error"]["details"] == {"error_code": "ramp_limit_exceeded"}
    assert body["error"]["type"] == "rate_limit_error"
    assert "allowed 60,000 input tokens per minute" in body["error"]["message"]
