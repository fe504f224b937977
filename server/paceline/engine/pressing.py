"""Refusals that are not about budget, turned into events: see :mod:`paceline.engine.pressure` for what they mean.

A pool without quota is closed, and tried again every ``QUOTA_PROBE_US`` by one call; what that finds goes on as after
an overload. Where nothing is in force an answer costs one look at its pool.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from msgspec.structs import replace

from paceline.engine import events as ev
from paceline.engine import pressure as pr
from paceline.engine import ramp as ramps
from paceline.engine.books import Books
from paceline.engine.definitions import Definitions
from paceline.engine.dimensions import MINUTE_US, SECOND_US, Dimension, Limit, Window
from paceline.engine.operations import Observation, Reading, Refusal
from paceline.engine.pressure import Pressure, Ramp
from paceline.engine.state import Pool

NOTHING = Pressure()
LOOK_BACK_US = 30 * SECOND_US
LOOK_BACK = 1_024
"""How far back, in time and in calls of the ledger, is looked for how often a pool was called."""
_KINDS = frozenset({Refusal.OVERLOAD, Refusal.CONCURRENCY, Refusal.RAMP, Refusal.NO_QUOTA})


class Pressing:
    """Keeps what is in force. Soft, besides the state: the names of the pools in which anything is."""

    def __init__(self, books: Books, definitions: Definitions) -> None:
        self._books = books
        self._definitions = definitions
        self._state = books.state
        self._pressed = {name for name, pool in books.state.pools.items() if pool.pressure is not None}

    # -- evidence -----------------------------------------------------------------------------------------------

    def refused(
        self, pool: Pool, observation: Observation, granted_at: int | None, held: Callable[[int], int], now: int
    ) -> bool:
        """A refusal, of a call granted at ``granted_at`` (``None``: without a grant). Whether it was of these kinds.

        ``held`` says what the call held in a bucket.
        """
        kind = observation.refusal
        if kind not in _KINDS:
            return False
        since = now if granted_at is None else granted_at
        if kind is Refusal.OVERLOAD:
            self._overloaded(pool, since, observation.retry_after_us, now)
        elif kind is Refusal.CONCURRENCY:
            self._crowded(pool, since, now)
        elif kind is Refusal.NO_QUOTA:
            self._without_quota(pool, now)
        else:
            return pool.learn and self._ramped(pool, observation, since, held, now)
        return True

    def accepted(self, pool: Pool, granted_at: int | None, now: int) -> None:
        """The upstream took a call of this pool on."""
        held = pool.pressure
        if held is None or granted_at is None:
            return
        overload, crowd = held.overload, held.crowd
        if overload is not None:
            overload = pr.accepted(overload, self._open(pool), granted_at, now)
        if crowd is not None:
            # The call itself may have ended with this answer.
            crowd = pr.uncrowded(crowd, self._open(pool) + 1, granted_at, now)
        if overload is not held.overload or crowd is not held.crowd:
            self._set(pool, Pressure(overload, crowd, held.ramps))

    def believable(self, pool: Pool, number: int, reading: Reading) -> Reading:
        """What of a reading still tells something: while a ramp is in force the full limit's figures raise nothing."""
        held = pool.pressure
        if held is None or all(ramp.bucket != number for ramp in held.ramps):
            return reading
        amount = self._state.buckets[number].amount
        limit = reading.limit if reading.limit is not None and reading.limit <= amount else None
        return replace(reading, limit=limit, reset_us=None)

    def dimension_of_ramp(self, pool: Pool, observation: Observation) -> Dimension | None:
        """Which limit a ramp is about: input, unless it says another."""
        number = self._number(pool, observation.refused)
        return None if number is None else self._state.buckets[number].dimension

    def climbs(self, pool: Pool, number: int) -> bool:
        """Whether a ramp is in force there."""
        return pool.pressure is not None and any(ramp.bucket == number for ramp in pool.pressure.ramps)

    # -- time ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let ramps climb, and forget what has lapsed."""
        for name in sorted(self._pressed) if self._pressed else ():
            pool = self._state.pools[name]
            held = pool.pressure
            if held is None:
                self._pressed.discard(name)
                continue
            now = self._books.now
            overload, crowd = held.overload, held.crowd
            if overload is not None and _lapsed(overload.refused_at, pr.OVERLOAD_LAPSE_US, now):
                overload = None
            if crowd is not None and _lapsed(crowd.refused_at, pr.CROWD_LAPSE_US, now):
                crowd = None
            kept = tuple([after for ramp in held.ramps if (after := self._climb(ramp, now)) is not None])
            if overload is not held.overload or crowd is not held.crowd or kept != held.ramps:
                self._set(pool, Pressure(overload, crowd, kept))

    def _climb(self, ramp: Ramp, now: int) -> Ramp | None:
        if now < ramp.next_at:
            return ramp
        bucket = self._books.advance(ramp.bucket)
        if bucket.learned_at is None:
            # Configuration or an operator has set another limit since.
            return None
        unused = bucket.level >= bucket.burst and now - ramp.refused_at >= ramps.TRUST_US
        after, amount = (ramp, ramp.full) if unused else ramps.climbed(ramp, bucket.amount, now)
        self._move(ramp, amount)
        return after if amount < ramp.full else None

    # -- kinds --------------------------------------------------------------------------------------------------

    def _overloaded(self, pool: Pool, granted_at: int, retry_after_us: int | None, now: int) -> None:
        held = pool.pressure or NOTHING
        overload, others = held.overload, self._open(pool)
        if overload is None or _lapsed(overload.refused_at, pr.OVERLOAD_LAPSE_US, now):
            found = pr.overloaded_first(others, self._between_calls(pool, now), now - granted_at, now)
        else:
            found = pr.overloaded_again(overload, others, granted_at, retry_after_us, now)
        self._set(pool, replace(held, overload=found))

    def _crowded(self, pool: Pool, granted_at: int, now: int) -> None:
        held = pool.pressure or NOTHING
        crowd = held.crowd
        if crowd is not None and _lapsed(crowd.refused_at, pr.CROWD_LAPSE_US, now):
            crowd = None
        self._set(pool, replace(held, crowd=pr.crowded(crowd, self._open(pool), granted_at, now)))

    def _without_quota(self, pool: Pool, now: int) -> None:
        until = now + pr.QUOTA_PROBE_US
        if pool.closed and pool.blocked_until > until - pr.LONGEST_GAP_US:
            return
        held = pool.pressure or NOTHING
        longest = pr.longest_gap(self._between_calls(pool, now))
        goal = max(1, self._open(pool))
        # One call will be let through then, and more only when it is accepted.
        found = pr.Overload(1, goal, longest, SECOND_US, until, until, until, failures=3, opens_at=until)
        self._books.emit(ev.PoolBlocked(pool.name, until, closed=True))
        self._set(pool, replace(held, overload=found))

    def _ramped(
        self, pool: Pool, observation: Observation, granted_at: int, held_in: Callable[[int], int], now: int
    ) -> bool:
        """False: no limit of the pool can climb."""
        number = self._number(pool, observation.refused)
        if number is None:
            return False
        bucket = self._books.advance(number)
        held = pool.pressure or NOTHING
        allowed = None if observation.allowed is None else max(1, observation.allowed)
        standing = next((ramp for ramp in held.ramps if ramp.bucket == number), None)
        if standing is None or bucket.learned_at is None:
            blind = allowed is None
            if allowed is None:
                ended = bucket.ended_since(now - MINUTE_US)
                used = bucket.held + (0 if ended is None else ended[0])
                allowed = max(1, min(bucket.amount, used) // 2)
            if allowed >= bucket.amount:
                return True
            ramp, amount = ramps.begun(number, bucket.amount, bucket.burst, allowed, now, blind=blind), allowed
            if bucket.constraint is not None:
                # What was left of the full limit says nothing of this one.
                self._books.emit(ev.ReadingKept(number, replace(bucket.constraint, low=None)))
        else:
            ramp, amount = ramps.told(standing, bucket.amount, allowed, granted_at, now)
        amount = min(amount, ramp.full)
        self._move(ramp, amount)
        others = tuple(one for one in held.ramps if one.bucket != number)
        self._set(pool, replace(held, ramps=(*others, ramp) if amount < ramp.full else others))
        retry_after_us = min(observation.retry_after_us or 0, MINUTE_US)
        most = held_in(number) - 1 - bucket.amount * retry_after_us // MINUTE_US
        if bucket.level > most:
            self._books.emit(ev.Corrected(number, most - bucket.level))
        return True

    def _number(self, pool: Pool, refused: Dimension | None) -> int | None:
        dimensions = (Dimension.INPUT_TOKENS, Dimension.TOKENS) if refused is None else (refused,)
        for dimension in dimensions:
            number = self._state.addresses.get((pool.name, "", dimension, Window.MINUTE))
            if number is not None:
                return number
        return None

    # -- helpers ------------------------------------------------------------------------------------------------

    def _open(self, pool: Pool) -> int:
        return len(self._state.open_in[pool.name])

    def _set(self, pool: Pool, pressure: Pressure) -> None:
        found = None if pressure == NOTHING else pressure
        if found is None:
            self._pressed.discard(pool.name)
        else:
            self._pressed.add(pool.name)
        if found != pool.pressure:
            self._books.emit(ev.Pressed(pool.name, None if found is None else found.copy()))

    def _move(self, ramp: Ramp, amount: int) -> None:
        """Bring the limit of a ramp to ``amount``, and its burst in proportion."""
        bucket = self._state.buckets[ramp.bucket]
        if amount == bucket.amount:
            return
        burst = max(1, ramp.full_burst * amount // max(1, ramp.full))
        restored = amount >= ramp.full
        ruling = (ramp.full, ramp.full_burst) == (bucket.ruling, bucket.ruling_burst)
        limit = Limit(bucket.dimension, bucket.window, amount, ramp.full_burst if restored else burst)
        self._definitions.move(ramp.bucket, limit, learned=not (restored and ruling), override=bucket.override)

    def _between_calls(self, pool: Pool, now: int) -> int:
        """How far apart calls of the pool ended lately, in µs."""
        oldest, count = now, 0
        for ended in islice(reversed(self._state.ended.values()), LOOK_BACK):
            if ended.ended_at < now - LOOK_BACK_US:
                break
            oldest = min(oldest, ended.ended_at)
            count += ended.pool == pool.name and ended.granted_at is not None
        return (now - oldest) // count if count else LOOK_BACK_US


def _lapsed(refused_at: int, lapse_us: int, now: int) -> bool:
    return now - refused_at >= lapse_us
