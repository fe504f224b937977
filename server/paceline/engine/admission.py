"""Whether a call fits. The seam of the admission rule: today plain holds against today's levels."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from paceline.engine.answers import Reason
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import Dimension, Window


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """When a call would fit.

    ``wait_us`` is the time until it does if nothing is given back (zero: now; ``None``: no time can be said), and
    ``hope_us`` the least that it can take, should all open calls give back what they may. ``reason`` is what to
    answer when it cannot wait; ``final`` says that waiting cannot help.
    """

    wait_us: int | None
    hope_us: int
    reason: Reason
    binding: Dimension | None
    final: bool = False

    @property
    def severity(self) -> tuple[bool, int, float]:
        """Orders verdicts: a final one binds before all, then the longest wait."""
        return self.final, self.hope_us, float("inf") if self.wait_us is None else self.wait_us


NOW = Verdict(0, 0, Reason.LIMIT, None)


def fits(buckets: Sequence[Bucket], numbers: tuple[int, ...], holds: tuple[int, ...], now: int) -> bool:
    """Whether every hold is covered by its level at ``now``. Changes nothing.

    A dimension that the call does not use cannot refuse it, whatever its debt.
    """
    for number, hold in zip(numbers, holds, strict=True):
        bucket = buckets[number]
        need = bucket.need(hold) if hold else bucket.level
        if bucket.level < need and (bucket.at >= now or bucket.level + bucket.refill(now)[0] < need):
            return False
    return True


def room(buckets: Sequence[Bucket], numbers: tuple[int, ...], holds: tuple[int, ...], now: int) -> int | None:
    """How many such calls fit at ``now``; ``None``: any number."""
    most: int | None = None
    for number, hold in zip(numbers, holds, strict=True):
        if hold:
            bucket = buckets[number]
            level = bucket.level + bucket.refill(now)[0]
            free = level if level >= bucket.burst else level - bucket.margin(hold)
            count = max(0, free) // hold or int(level >= bucket.need(hold))
            most = count if most is None else min(most, count)
    return most


def judge(bucket: Bucket, hold: int, count: int, ahead: int, now: int) -> Verdict:
    """The verdict of one bucket on ``count`` calls that hold ``hold`` each, with ``ahead`` wanted by those before."""
    dimension = bucket.dimension
    if not hold:
        return NOW
    need = bucket.need(hold, count)
    if need > bucket.burst or not bucket.burst:
        # A month's budget that is too small will be larger for nobody this month; a zero limit is a closed pool.
        reason = Reason.SPEND_CAP if dimension is Dimension.SPEND else Reason.TOO_LARGE
        return Verdict(None, 0, Reason.POOL_CLOSED if not bucket.burst else reason, dimension, final=True)
    refilled, carry = bucket.refill(now)
    missing = bucket.level + refilled - ahead - need
    if missing >= 0:
        return NOW
    # What open calls hold may come back: of money, of gauges, and of output, which is held as estimated. Requests and
    # input are charged as they are held, near enough.
    wait = bucket.wait_us(missing, carry, now)
    hope = wait
    if bucket.window in (Window.NONE, Window.MONTH) or dimension is Dimension.OUTPUT_TOKENS:
        optimistic = missing + bucket.held + ahead
        hope = bucket.wait_us(optimistic, carry, now) if optimistic < 0 else 0
    reason = Reason.SPEND_CAP if dimension is Dimension.SPEND else Reason.LIMIT
    if hope is None:
        # Even if everything came back it would not fit.
        return Verdict(None, 0, reason, dimension, final=True)
    return Verdict(wait, hope, reason, dimension)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict that binds: a final one, else the one with the longest hope. It waits as long as the longest wait."""
    binding = max(verdicts, key=lambda verdict: verdict.severity, default=NOW)
    waits = [verdict.wait_us for verdict in verdicts]
    known = [wait for wait in waits if wait is not None]
    wait = max(known, default=0) if len(known) == len(waits) else None
    return binding if wait == binding.wait_us else msgspec.structs.replace(binding, wait_us=wait)
