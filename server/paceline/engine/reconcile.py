"""From what one response said of a limit to where the level can be.

Our level ``N`` is net of holds; upstream's level is not, and a reading of it is rounded, old, and blind to calls that
were granted but had not arrived. Let upstream's level have been in ``[low, high]`` at some instant in
``[since, until]``. Then, with ``b`` what our books carry for a call now and ``c`` what upstream had counted of it::

    P_max = Σ (b - min c)   over the calls not ended before ``since``
    P_min = Σ b  over the calls granted after ``until``  +  Σ min(0, b - max c)  over the others of P_max
    N ≥ min(C, low  + r·(t - until)) - P_max
    N ≤ min(C, high + r·(t - since) - P_min)

(design of the service, "Learning the limits from headers"). The sums are kept incrementally in the bucket and its
standing :class:`~paceline.engine.bucket.Constraint`, so that a reading costs a binary search and a settlement a few
additions, whatever the number of calls in flight. Sums that are costly to have exactly are bounded on the safe side:
the interval gets wider, never wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from paceline.engine.accounting import WEIGHT_ONE
from paceline.engine.bucket import Bucket, Constraint
from paceline.engine.dimensions import MINUTE_US, SECOND_US, WINDOW_US, Dimension
from paceline.engine.operations import Reading
from paceline.engine.state import Reservation

MAX_NEWER = 1_024
"""Calls granted after a reading that are summed exactly; the rest count as zero, which widens the interval."""
READING_TTL_US = 10 * MINUTE_US
"""A standing reading, and a learned restriction, lapse when nothing confirmed them for this long."""


def interval(bucket: Bucket, constraint: Constraint, now: int) -> tuple[int | None, int | None]:
    """Bounds of the level by a reading; the bucket is at ``now``. ``None``: unbounded on that side."""
    window = WINDOW_US.get(bucket.window)
    if window is None:
        return None, None
    low: int | None = None
    high: int | None = None
    if constraint.low is not None:
        pending = bucket.held + constraint.ended - constraint.own
        # What others use has not grown there. The upper bound must hold also if that is an error.
        grown = constraint.low + (bucket.amount - bucket.outside) * max(0, now - constraint.until) // window
        low = min(bucket.burst, grown) - pending
    if constraint.high is not None:
        beyond = bucket.over + constraint.ended_over
        grown = constraint.high - (-bucket.amount * max(0, now - constraint.since) // window)
        # What is foreseen is beyond the holds: a level net of holds alone may be so much above the burst.
        high = min(bucket.burst + bucket.foreseen, grown - constraint.after + beyond)
    return low, high


def correction(bucket: Bucket, constraint: Constraint, now: int) -> int:
    """What brings the level into the interval: zero inside it."""
    low, high = interval(bucket, constraint, now)
    # What is foreseen is no hold, and upstream has counted it.
    level = bucket.level + bucket.foreseen
    if high is not None and level > high:
        return high - level
    if low is not None and level < low and not bucket.override:
        return low - level
    return 0


def constrain(
    bucket: Bucket,
    low: int | None,
    high: int | None,
    since: int,
    until: int,
    own: int,
    newest_first: Iterable[Reservation],
    number: int,
    rounding: int = 0,
) -> Constraint | None:
    """Make the standing form of a reading. ``None``: it is too old for what is remembered of ended calls.

    ``newest_first`` are the pool's open reservations, newest grant first; ``number`` is the bucket's.
    """
    ended = bucket.ended_since(since)
    if ended is None:
        return None
    after = 0
    for reservation in islice(newest_first, MAX_NEWER):
        if reservation.granted_at <= until:
            break
        after += hold_of(reservation, number)
    return Constraint(low, high, since, until, own, ended[0], ended[1], after, rounding)


def hold_of(reservation: Reservation, number: int) -> int:
    """What a reservation holds in the bucket ``number``; zero if it does not touch it."""
    for place, touched in enumerate(reservation.buckets):
        if touched == number:
            return reservation.holds[place]
    return 0


def bounds_of_remaining(bucket: Bucket, reading: Reading) -> tuple[int | None, int | None]:
    """Where upstream's level was, given the rounded ``remaining``. Zero may hide debt, which the reset tells of.

    The time to a full bucket is longer than that of an empty one by what the debt takes; that presumes the burst, so it
    counts only once a reading has told it.
    """
    remaining, window = reading.remaining, WINDOW_US.get(bucket.window)
    if remaining is None:
        return None, None
    half = (reading.rounding + 1) // 2
    if remaining:
        return remaining - half, remaining + half
    if reading.reset_us is None or bucket.constraint is None or window is None:
        return None, half
    low = bucket.burst - -(-bucket.amount * (reading.reset_us + reading.reset_error_us) // window)
    high = bucket.burst - bucket.amount * max(0, reading.reset_us - reading.reset_error_us) // window
    # Where the burst is not what was believed, an empty bucket stays an empty bucket.
    return min(low, 0), min(half, max(high, low))


def bounds_of_refusal(
    bucket: Bucket, estimate: int, slack: int, retry_after_us: int | None
) -> tuple[int | None, int | None]:
    """Where upstream's level was when it refused a call that we estimated at ``estimate``, debt included.

    The wait that it names is the time until the call would have fitted, rounded up to a second.
    """
    low_estimate, high_estimate = estimate_bounds(bucket.dimension, estimate, slack)
    window = WINDOW_US.get(bucket.window)
    if retry_after_us is None or window is None:
        return None, high_estimate
    low = low_estimate - -(-bucket.amount * retry_after_us // window)
    high = high_estimate - bucket.amount * max(0, retry_after_us - SECOND_US) // window
    return low, high


def estimate_bounds(dimension: Dimension, estimate: int, slack: int) -> tuple[int, int]:
    """Between what upstream's own estimate of a call must be, given ours; ``slack`` in thousandths."""
    if dimension is Dimension.REQUESTS:
        return estimate, estimate
    return estimate * WEIGHT_ONE // slack, -(-estimate * slack // WEIGHT_ONE)


def burst_bounds(bucket: Bucket, reading: Reading) -> tuple[int, int] | None:
    """Where the real burst is, from the time to a full bucket; ``None``: the reading does not tell."""
    window = WINDOW_US.get(bucket.window)
    if window is None or not reading.remaining or reading.reset_us is None:
        return None
    half = (reading.rounding + 1) // 2
    least = reading.remaining - half + bucket.amount * max(0, reading.reset_us - reading.reset_error_us) // window
    most = reading.remaining + half - -bucket.amount * (reading.reset_us + reading.reset_error_us) // window
    return max(1, least), max(1, most)
