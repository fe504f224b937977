"""One bucket: exact refill, outside traffic, sums, waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.upstream.bucket import GRAINS, Bucket

AMOUNTS = st.integers(1, 5_000_000)
STEPS = st.integers(0, 400)


def fresh(amount: int, burst: int, level_grains: int, outside: int = 0) -> Bucket:
    bucket = Bucket.of(0, amount, burst, 0)
    bucket.level = bucket.start = min(level_grains, burst * GRAINS)
    bucket.outside = outside
    return bucket


def balance(bucket: Bucket) -> int:
    return bucket.start + bucket.refilled - bucket.charged - bucket.outside_taken + bucket.adjusted


@given(
    amount=st.integers(1, 50),
    outside=st.integers(0, 80),
    burst=st.integers(1, 3),
    level=st.integers(-2_000, 2_000),
    near_full=st.booleans(),
    steps=STEPS,
)
def test_closed_form_is_the_loop(
    amount: int, outside: int, burst: int, level: int, near_full: bool, steps: int
) -> None:
    """The definition in the module's docstring, microsecond by microsecond."""
    start = burst * GRAINS - abs(level) if near_full else level
    bucket = fresh(amount, burst, start, outside)
    expected, taken = bucket.level, 0
    for _ in range(steps):
        expected += amount
        took = min(outside, max(0, expected))
        taken += took
        expected = min(burst * GRAINS, expected - took)
    bucket.advance(steps)
    assert (bucket.level, bucket.outside_taken) == (expected, taken)
    assert balance(bucket) == bucket.level


@given(
    amount=AMOUNTS,
    outside=st.integers(0, 5_000_000),
    burst=st.integers(1, 5_000_000),
    level=st.integers(-(10**13), 10**14),
    cuts=st.lists(st.integers(0, 200_000_000), max_size=8),
    charges=st.lists(st.integers(-3_000, 3_000), max_size=8),
)
def test_looking_changes_nothing_and_sums_hold(
    amount: int, outside: int, burst: int, level: int, cuts: list[int], charges: list[int]
) -> None:
    once, often = (fresh(amount, burst, level, outside) for _ in range(2))
    now = 0
    for cut, charge in zip(sorted(cuts), charges, strict=False):
        for instant in (now + (cut - now) // 3, now + (cut - now) // 2, cut - 1, cut):
            often.advance(instant)
        once.advance(cut)
        now = max(now, cut)
        assert once == often
        once.charge(charge)
        often.charge(charge)
        assert balance(once) == once.level <= burst * GRAINS


@given(amount=AMOUNTS, burst=st.integers(1, 10**6), level=st.integers(-(10**13), 10**13), need=st.integers(1, 10**6))
def test_wait_is_exact(amount: int, burst: int, level: int, need: int) -> None:
    """At the instant that it names the amount is there; a microsecond earlier it is not."""
    need = min(need, burst)
    bucket = fresh(amount, burst, level)
    wait = bucket.wait_us(need)
    if wait:
        bucket.advance(wait - 1)
        assert bucket.level < need * GRAINS
    bucket.advance(wait)
    assert bucket.level >= need * GRAINS
    bucket.advance(wait + bucket.full_us())
    assert bucket.level == burst * GRAINS


def test_outside_takes_all_and_makes_no_debt() -> None:
    bucket = Bucket.of(0, 60, 100, 100)
    bucket.outside = 120
    bucket.advance(100_000_000)
    assert bucket.tokens == 0
    bucket.advance(200_000_000)
    assert (bucket.level, bucket.outside_taken) == (0, 300 * GRAINS)


def test_new_limit_forfeits_what_is_above_and_grants_nothing() -> None:
    bucket = Bucket.of(0, 600, 600, 500)
    bucket.change(0, 6_000, 6_000)
    assert bucket.tokens == 500
    bucket.change(1_000_000, 60, 60)
    assert bucket.tokens == 60
    assert balance(bucket) == bucket.level
