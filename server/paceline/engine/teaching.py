"""What observations teach: limits, bursts and levels from headers and refusals.

The arithmetic is in :mod:`paceline.engine.reconcile`; here it is decided what follows. Nothing that makes the ledger
admit less outlives its evidence: a learned restriction lapses when no reading confirms it, a block has an end.
"""

from __future__ import annotations

from collections import defaultdict

from paceline.engine import events as ev
from paceline.engine import reconcile
from paceline.engine.accounting import WEIGHT_ONE
from paceline.engine.books import Books
from paceline.engine.bucket import Bucket
from paceline.engine.calendar import next_month
from paceline.engine.dating import Dating
from paceline.engine.definitions import Definitions
from paceline.engine.dimensions import GAUGES, MINUTE_US, SECOND_US, Dimension, Limit, Window
from paceline.engine.operations import Observation, Reading, Refusal
from paceline.engine.outside import HALVES_US, Sampler, decayed
from paceline.engine.pressing import Pressing
from paceline.engine.rim import Rim
from paceline.engine.state import Pool
from paceline.engine.stats import Stats
from paceline.engine.trail import Trail

LONGEST_BLOCK_US = 5 * MINUTE_US
SHORTEST_BLOCK_US = SECOND_US
LONGEST_WAIT_US = 10 * MINUTE_US
"""A refusal that names a dimension is believed to mean debt for so long at most: a shut pool brings no answers."""
OVERTAKEN_US = 100_000
"""A call that was granted so long before a block may have arrived after what the block is for."""
DOUBTED_US = 5 * SECOND_US
"""A block is tried so long after its reason was put in doubt."""
CLEAR_RESETS = 2
"""A time to a full bucket of so many times its error is taken for what it says; a shorter one for its bound."""
PLENTY = 8
"""One part in so many of a limit is enough to go on after a block."""
FLIGHT_US = MINUTE_US
"""How long a call without a grant may have been under way when its headers came."""
CONFIRM_US = 10 * SECOND_US
"""A learned limit is confirmed at most this often, so that readings of a steady limit need no event each."""


class Call:
    """The call that brought an observation: since when it was under way, and what our books carry for it."""

    __slots__ = ("amounts", "buckets", "granted_at")

    def __init__(self, granted_at: int | None, buckets: tuple[int, ...], amounts: tuple[int, ...]) -> None:
        self.granted_at = granted_at
        self.buckets = buckets
        self.amounts = amounts

    def amount(self, number: int) -> int:
        """What the books carry for this call in a bucket."""
        for place, touched in enumerate(self.buckets):
            if touched == number:
                return self.amounts[place]
        return 0


UNKNOWN_CALL = Call(None, (), ())


class Teacher:
    """Turns observations into events."""

    def __init__(self, books: Books, definitions: Definitions, stats: Stats) -> None:
        self._books = books
        self._state = books.state
        self._emit = books.emit
        self._advance = books.advance
        self._trail = books.trail
        self._definitions = definitions
        self._stats = stats
        self._samplers: defaultdict[int, Sampler] = defaultdict(Sampler)
        """By bucket."""
        self._rims: defaultdict[int, Rim] = defaultdict(Rim)
        self._dates: defaultdict[int, Dating] = defaultdict(Dating)
        self._at_rim: set[int] = set()
        """Buckets of which the newest reading was about the most that is ever read."""
        self._least_burst: dict[int, int] = {}
        """What the newest reading of each bucket proves of its burst."""
        self.pressing = Pressing(books, definitions)

    def observe(self, name: str, observation: Observation | None, now: int, call: Call, estimates: Call) -> None:
        """Learn from one response of pool ``name``. ``estimates`` carries what the call held when it was sent."""
        pool = self._state.pools.get(name)
        if observation is None or pool is None:
            return
        if observation.refusal is not None:
            self._refused(pool, observation, now, estimates)
        elif pool.pressure is not None:
            self.pressing.accepted(pool, call.granted_at, now)
        until = now - observation.age_us
        readings = observation.readings
        if observation.refusal is None and pool.blocked_until > now and not pool.closed and until > pool.blocked_at:
            self._unblock(pool, readings, call.granted_at, now)
        if not pool.learn:
            return
        refused = observation.refused if observation.refusal is Refusal.BUDGET else None
        if observation.refusal is Refusal.RAMP:
            refused = self.pressing.dimension_of_ramp(pool, observation)
        if refused is not None and all(reading.dimension is not refused for reading in readings):
            readings = (*readings, Reading(refused))
        for reading in readings:
            number = self._state.addresses.get((name, "", reading.dimension, Window.MINUTE))
            if number is None or reading.dimension in GAUGES or reading.dimension is Dimension.SPEND:
                continue
            bucket = self._advance(number)
            if reading.dimension is Dimension.OUTPUT_TOKENS and reading.remaining is not None:
                self._books.outlook.read(number, bucket, reading.remaining, now)
            reading = self.pressing.believable(pool, number, reading)
            self._learn_limit(number, bucket, reading, now, call.granted_at)
            if not self.pressing.climbs(pool, number):
                self._learn_burst(number, bucket, reading)
            low, high = reconcile.bounds_of_remaining(bucket, reading)
            if reading.dimension is refused:
                low, high = _narrower(
                    (low, high),
                    reconcile.bounds_of_refusal(
                        bucket,
                        estimates.amount(number),
                        pool.profile.estimate_slack,
                        _at_most(observation.retry_after_us, LONGEST_WAIT_US),
                    ),
                )
            if self.pressing.climbs(pool, number):
                # A floor grows with a rate that has not been the same all the time.
                low = None
            if low is not None or high is not None:
                self._learn_level(number, bucket, low, high, until, call, pool, now, reading.rounding)

    def hold_to_readings(self, numbers: tuple[int, ...], now: int) -> None:
        """Clamp again after a settlement, so that a reading and a late usage do not count twice."""
        for number in numbers:
            bucket = self._state.buckets[number]
            constraint = bucket.constraint
            if constraint is None:
                continue
            if now - constraint.until > reconcile.READING_TTL_US:
                self._emit(ev.ReadingKept(number, None))
            else:
                self._correct(number, self._advance(number), now)

    def lapse(self, number: int, now: int) -> None:
        """Let go of a learned restriction that nothing has confirmed for long."""
        bucket = self._state.buckets[number]
        if bucket.outside and now - bucket.outside_at >= HALVES_US:
            self._advance(number)
            self._emit(ev.OutsideLearned(number, decayed(bucket.outside, now - bucket.outside_at)))
        restricts = bucket.amount < bucket.ruling or bucket.burst < bucket.ruling_burst
        if bucket.learned_at is None or not restricts or now - bucket.learned_at <= reconcile.READING_TTL_US:
            return
        self._advance(number)
        limit = Limit(
            bucket.dimension,
            bucket.window,
            max(bucket.amount, bucket.ruling),
            max(bucket.burst, bucket.ruling_burst),
        )
        self._definitions.move(number, limit, learned=False, override=bucket.override)

    # -- one reading --------------------------------------------------------------------------------------------

    def _learn_limit(self, number: int, bucket: Bucket, reading: Reading, now: int, granted_at: int | None) -> None:
        """A lower limit rules at once, a higher one when a second reading says the same.

        Answers overtake each other: only one of a call that was granted after the claim denies it, or what it became.
        """
        limit = reading.limit
        if limit is None:
            return
        overtaken = granted_at is not None and granted_at < bucket.pending_at
        if limit == bucket.amount:
            if bucket.pending is not None and not overtaken:
                self._emit(ev.LimitClaimed(number, None))
            if bucket.learned_at is not None and now - bucket.learned_at > CONFIRM_US:
                self._emit(ev.LimitConfirmed(number))
            return
        if limit > bucket.amount:
            if bucket.override:
                return
            if bucket.pending != limit:
                self._emit(ev.LimitClaimed(number, limit))
                return
        elif overtaken:
            return
        burst = limit if bucket.burst == bucket.amount else bucket.burst * limit // max(1, bucket.amount)
        self._move(number, bucket, limit, burst)
        self._samplers[number].forget()

    def _learn_burst(self, number: int, bucket: Bucket, reading: Reading) -> None:
        known = (reading.remaining or 0) - (reading.rounding + 1) // 2
        if known > bucket.burst and not bucket.override:
            # More is there than was believed possible.
            raised = min(known, max(bucket.amount, bucket.configured_burst))
            if raised > bucket.burst:
                self._move(number, bucket, bucket.amount, raised)
        bounds = reconcile.burst_bounds(bucket, reading)
        if bounds is None:
            return
        least, most = bounds
        self._least_burst[number] = least
        burst = bucket.burst
        if reading.reset_us is not None and reading.reset_us >= CLEAR_RESETS * reading.reset_error_us:
            # Resets are rounded up, and answers come late: the error is never all on the other side.
            most -= bucket.amount * reading.reset_error_us // MINUTE_US
        if most < burst:
            burst = max(least, most)
        elif least > burst and not bucket.override:
            burst = min(least, max(bucket.amount, bucket.configured_burst))
        if burst != bucket.burst:
            self._move(number, bucket, bucket.amount, burst)

    def _move(self, number: int, bucket: Bucket, amount: int, burst: int) -> None:
        """Learn a limit, or where its burst is."""
        moved = Limit(bucket.dimension, bucket.window, amount, burst)
        self._definitions.move(number, moved, learned=True, override=bucket.override)

    def _learn_level(
        self,
        number: int,
        bucket: Bucket,
        low: int | None,
        high: int | None,
        until: int,
        call: Call,
        pool: Pool,
        now: int,
        rounding: int,
    ) -> None:
        since = until - FLIGHT_US if call.granted_at is None else min(call.granted_at, until)
        own = call.amount(number)
        if bucket.dimension is Dimension.OUTPUT_TOKENS:
            own = 0
        elif bucket.dimension is not Dimension.REQUESTS:
            own = own * WEIGHT_ONE // pool.profile.estimate_slack
        standing = bucket.constraint
        trail = self._trail(number)
        if trail is not None:
            # What an older reading has seen free, others may have taken since.
            newest = standing is None or until >= standing.until
            if newest and high is not None:
                self._look_for_rim(number, bucket, trail, high, since, until)
            self._follow(number, bucket, trail, low if newest else None, high, since, until)
        newest_first = reversed(self._state.open_in[pool.name].values())
        constraint = reconcile.constrain(bucket, low, high, since, until, own, newest_first, number, rounding)
        if constraint is None:
            pass
        elif standing is None or until >= standing.until:
            self._emit(ev.ReadingKept(number, constraint))
        else:
            # Older than what stands: it may still narrow the level once, but does not replace the newer one.
            self._adjust(number, reconcile.correction(bucket, constraint, now))
        self._correct(number, bucket, now)
        rate = self._samplers[number].read(bucket, now)
        if rate is not None:
            self._emit(ev.OutsideLearned(number, rate))

    def _follow(
        self, number: int, bucket: Bucket, trail: Trail, low: int | None, high: int | None, since: int, until: int
    ) -> None:
        """Correct the level by what none of our levels between ``since`` and ``until`` explains."""
        trail.note(bucket.at, bucket.level - bucket.corrected + self._books.unproduced(number, bucket))
        first, last, unseen = self._dates[number].narrowed(trail, low, high, since, until, bucket.corrected)
        if high is not None:
            span = trail.between(first, last)
            if span is not None and high < span.least + bucket.corrected:
                self._adjust(number, high - span.least - bucket.corrected)
                return
        if low is not None and not bucket.override:
            span = trail.between(first - unseen, last)
            if span is not None and low > span.most + bucket.corrected:
                raised = min(bucket.burst, bucket.level + low - span.most - bucket.corrected)
                self._adjust(number, max(0, raised - bucket.level))

    def _look_for_rim(self, number: int, bucket: Bucket, trail: Trail, high: int, since: int, until: int) -> None:
        """Lower a burst that our books reach and the upstream does not."""
        rim = self._rims[number]
        span = trail.between(since, until)
        if span is not None:
            burst = rim.read(high, self._least_burst.get(number, 0), span.least + bucket.corrected)
            if burst is not None and 0 < burst < bucket.burst:
                self._move(number, bucket, bucket.amount, burst)
        if rim.near(high):
            self._at_rim.add(number)
        else:
            self._at_rim.discard(number)

    def _correct(self, number: int, bucket: Bucket, now: int) -> None:
        if bucket.constraint is not None:
            self._adjust(number, reconcile.correction(bucket, bucket.constraint, now))

    def _adjust(self, number: int, amount: int) -> None:
        if amount:
            self._emit(ev.Corrected(number, amount))
            if amount > 0 or number not in self._at_rim:
                self._samplers[number].correct(amount)
            bucket = self._state.buckets[number]
            self._stats.corrections[bucket.pool, bucket.dimension] += abs(amount)

    # -- refusals -----------------------------------------------------------------------------------------------

    def accepted(self, name: str, granted_at: int | None, now: int) -> None:
        """A call of pool ``name`` has succeeded, and brought no headers."""
        pool = self._state.pools.get(name)
        if pool is not None and pool.pressure is not None:
            self.pressing.accepted(pool, granted_at, now)

    def _refused(self, pool: Pool, observation: Observation, now: int, call: Call) -> None:
        if observation.refusal is Refusal.SPEND:
            self._block(pool, next_month(now), closed=True)
        elif self.pressing.refused(pool, observation, call.granted_at, call.amount, now):
            pass
        elif observation.refusal in (Refusal.BUDGET, Refusal.RAMP):
            refused = observation.refused
            known = refused is not None and (pool.name, "", refused, Window.MINUTE) in self._state.addresses
            if known and pool.learn:
                return
            wanted = SHORTEST_BLOCK_US if observation.retry_after_us is None else observation.retry_after_us
            self._block(pool, now + min(LONGEST_BLOCK_US, wanted) - observation.age_us, closed=False)

    def _unblock(self, pool: Pool, readings: tuple[Reading, ...], granted_at: int | None, now: int) -> None:
        """A call was accepted since the block began. With plenty left of everything the block has no reason any more.

        A call that arrived after it, or nearly so, says less: calls that need less may still fit. Soon it is tried.
        """
        known = [reading for reading in readings if reading.limit and reading.remaining is not None]
        if known and all((reading.remaining or 0) * PLENTY >= (reading.limit or 0) for reading in known):
            self._emit(ev.PoolBlocked(pool.name, now, closed=False))
        elif granted_at is not None and granted_at >= pool.blocked_at - OVERTAKEN_US:
            soon = max(pool.blocked_at, now) + DOUBTED_US
            if soon < pool.blocked_until:
                self._emit(ev.PoolBlocked(pool.name, soon, closed=False))

    def _block(self, pool: Pool, until: int, *, closed: bool) -> None:
        if until > pool.blocked_until:
            self._emit(ev.PoolBlocked(pool.name, until, closed))


def _narrower(
    one: tuple[int | None, int | None], other: tuple[int | None, int | None]
) -> tuple[int | None, int | None]:
    """Both are true, so the narrower bounds are; should they contradict each other, the refusal's stand."""
    lows = [low for low in (one[0], other[0]) if low is not None]
    highs = [high for high in (one[1], other[1]) if high is not None]
    low, high = max(lows, default=None), min(highs, default=None)
    if low is not None and high is not None and low > high:
        return other
    return low, high


def _at_most(wait_us: int | None, most: int) -> int | None:
    return None if wait_us is None else min(wait_us, most)
