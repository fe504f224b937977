"""Whether a call fits: holds against levels, and of output that is still to come, over horizons."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from paceline.engine.answers import Reason
from paceline.engine.books import Books
from paceline.engine.bucket import ESTIMATED, Bucket
from paceline.engine.dimensions import WINDOW_US, Dimension, Window
from paceline.engine.operations import Priority
from paceline.engine.queue import Option
from paceline.engine.sizes import spread_of


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


def fits(books: Books, option: Option) -> bool:
    """Whether every hold of one call is covered by its level. Changes nothing.

    A dimension that the call does not use cannot refuse it, whatever its debt.
    """
    buckets, demands = books.state.buckets, books.outlook.demands
    for number, hold in zip(option.buckets, option.holds, strict=True):
        if not hold:
            continue
        bucket = buckets[number]
        need = need_of(books, bucket, option, hold, 1)
        easy = number not in demands and bucket.level - kept(books, number, option, need) >= need
        if not easy and missing(books, number, option, hold, 1) > 0:
            return False
    return True


def need_of(books: Books, bucket: Bucket, option: Option, hold: int, count: int) -> int:
    """The level at which ``count`` calls that hold ``hold`` each may pass: :meth:`Bucket.need`."""
    return bucket.need(hold, count, option.margin, _spread(books, bucket, option))


def _spread(books: Books, bucket: Bucket, option: Option) -> int:
    if bucket.constraint is None or bucket.dimension not in ESTIMATED:
        return 0
    return spread_of(books.state.learned, option.pool)


def missing(books: Books, number: int, option: Option, hold: int, count: int) -> int:
    """What ``count`` calls that hold ``hold`` each are short of in a bucket; not above zero: they fit."""
    bucket = books.state.buckets[number]
    level = bucket.level + bucket.refill(books.now)[0]
    need = need_of(books, bucket, option, hold, count)
    return need - _usable(books, number, option, level, need, hold, count) + kept(books, number, option, need)


def kept(books: Books, number: int, option: Option, need: int) -> int:
    """What is set aside in a bucket for others; nothing that would make a lone call impossible which needs ``need``."""
    claims, urgent = books.claims, books.urgent
    found = claims.others(number, option) if claims else 0
    if urgent and number in urgent and option.priority is not Priority.INTERACTIVE and not option.entitled:
        found += max(0, min(urgent[number].kept(books.now), books.state.buckets[number].burst - need))
    return found


def _usable(books: Books, number: int, option: Option, level: int, need: int, hold: int, count: int) -> int:
    """What these calls may use of a bucket whose level, net of all holds, is ``level``, if they need ``need``."""
    most = option.sizes.max_output_tokens
    bucket = books.state.buckets[number]
    return books.outlook.level(number, bucket, level, need, option.kind, most, hold, count, books.now)


def room(books: Books, option: Option, most: int) -> int:
    """How many such calls fit, ``most`` at most."""
    for number, hold in zip(option.buckets, option.holds, strict=True):
        if not hold or not most:
            continue
        bucket = books.state.buckets[number]
        if books.outlook.watches(number, bucket) or books.claims or number in books.urgent:
            # Of what is charged as it is produced more may fit than is left net of all holds. What is left to others
            # depends on what is asked for.
            least, beyond = 0, most + 1
            while beyond - least > 1:
                middle = (least + beyond) // 2
                if missing(books, number, option, hold, middle) <= 0:
                    least = middle
                else:
                    beyond = middle
            most = least
            continue
        level = bucket.level + bucket.refill(books.now)[0]
        margin = bucket.margin(hold, option.margin, _spread(books, bucket, option))
        free = level if level >= bucket.burst else level - margin
        count = max(0, free) // hold or int(level >= need_of(books, bucket, option, hold, 1))
        most = min(most, count)
    return most


def is_too_large(books: Books, number: int, need: int) -> bool:
    """Whether a bucket will never have ``need``. What is charged as it is produced need not be there at once."""
    bucket = books.state.buckets[number]
    return not bucket.burst or (need > bucket.burst and not books.outlook.watches(number, bucket))


def judge(books: Books, number: int, option: Option, hold: int, count: int, ahead: int, sure: int = 0) -> Verdict:
    """The verdict of one bucket on ``count`` calls that hold ``hold`` each, with ``ahead`` wanted by those before, of
    which ``sure`` is certain."""
    bucket, now = books.state.buckets[number], books.now
    dimension = bucket.dimension
    if not hold:
        return NOW
    need = need_of(books, bucket, option, hold, count)
    if is_too_large(books, number, need):
        # A month's budget that is too small will be larger for nobody this month; a zero limit is a closed pool.
        reason = Reason.SPEND_CAP if dimension is Dimension.SPEND else Reason.TOO_LARGE
        return Verdict(None, 0, Reason.POOL_CLOSED if not bucket.burst else reason, dimension, final=True)
    refilled, carry = bucket.refill(now)
    level = bucket.level + refilled
    left = _usable(books, number, option, level, need + ahead, hold, count) - ahead - need
    if left >= 0:
        return NOW
    # What open calls hold may come back: of money, of gauges, and of output, which is held as estimated. Requests and
    # input are charged as they are held, near enough.
    wait = bucket.wait_us(left, carry, now)
    hope = wait if sure >= ahead else bucket.wait_us(min(0, left + ahead - sure), carry, now)
    if bucket.window in (Window.NONE, Window.MONTH) or dimension is Dimension.OUTPUT_TOKENS:
        # Of what is not by time, those before may give back as well what they are about to take.
        optimistic = level - need + bucket.held - (sure if bucket.window in WINDOW_US else 0)
        hope = bucket.wait_us(optimistic, carry, now) if optimistic < 0 else 0
    if bucket.window is Window.MONTH and need + ahead > bucket.burst - bucket.held:
        # Open calls are taken along into the next month: what they hold is missing there until they end.
        wait = None
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
