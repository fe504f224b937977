"""One dimension of one pool or share: a token bucket in whole numbers.

The level is what is left net of open holds. It refills by ``amount`` per window up to ``burst``; what does not
divide evenly is carried, so many small steps of time refill exactly as much as one big one. It may go below zero:
debt is real upstream.

Two columns of sums prove it: ``level = refilled - charged + adjusted`` and
``granted = settled + released + expired + held`` (in held amounts), at every instant.

**A refund never credits the same seconds twice.** Had a refunded amount never been held, the bucket would have been
fuller all along, and would have stopped refilling at its burst earlier. So of a refund only ``burst - highest level
since the grant`` is credited; the rest is taken off ``refilled``. A credit rewrites that history, and raises the peaks
since its grant. While the level is so low that everything that may yet be refunded fits under the burst, no peak can
matter and none is kept: under load there are none.

**A call that is reported late costs what it would have cost in time.** What the bucket has lost since, at its rim or
while the ledger was away, makes up for it (:mod:`paceline.engine.losses`).
"""

from __future__ import annotations

from bisect import bisect_right
from enum import IntEnum
from math import isqrt

import msgspec

from paceline.engine.calendar import next_month
from paceline.engine.dimensions import UNLIMITED, WINDOW_US, Dimension, Window
from paceline.engine.losses import Losses
from paceline.engine.peaks import Peaks

END_SLOT_US = 250_000
"""Ends of calls are summed per slot of this length: 4 entries a second, whatever the load."""
MARGIN_US = 200_000
"""Of refill: calls overtake each other on their way, and some are under way when a reading is taken."""
MARGIN_PART = 4
"""An upstream's estimate of a call, or of many, is hardly ever larger than ours by more than one in so many."""
DEVIATIONS = 3
"""So many standard deviations of what is under way unseen are kept free: once in 700 times that is too little."""
UNSEEN_PART = 8
"""No more than one part in so many of the burst is kept free for that."""
ESTIMATED = frozenset({Dimension.INPUT_TOKENS, Dimension.TOKENS})
MAX_ENDS = 2_400
"""Ten minutes of slots."""


class EndKind(IntEnum):
    SETTLED = 1
    RELEASED = 2
    EXPIRED = 3
    TOMBSTONE = 4
    TOGETHER = 5
    """A bulk request: its reservations are in ``keys``."""


# Looked up once: an attribute of an enumeration costs as much as ten of these, on the path of every call.
_SETTLED, _EXPIRED, _MINUTE = EndKind.SETTLED, EndKind.EXPIRED, Window.MINUTE


class Constraint(msgspec.Struct, array_like=True, gc=False):
    """The newest reading of this dimension, standing until a newer one: see :mod:`paceline.engine.reconcile`.

    Upstream's level was in ``[low, high]`` (``None``: unbounded) at some instant in ``[since, until]``. ``ended`` sums
    the charges of calls that ended at or after ``since``, ``ended_over`` what upstream may have counted beyond them,
    ``after`` the charges of calls granted after ``until``. ``own`` is the least that upstream had counted of the call
    that brought the reading.
    """

    low: int | None
    high: int | None
    since: int
    until: int
    own: int
    ended: int
    ended_over: int
    after: int
    rounding: int = 0
    """To what the reading was rounded."""


class Bucket(msgspec.Struct, array_like=True):
    """State of one dimension. Amounts in the dimension's unit, times in µs of ledger time."""

    pool: str
    share: str
    dimension: Dimension
    window: Window
    amount: int
    burst: int
    at: int
    level: int = 0
    carry: int = 0
    held: int = 0
    refilled: int = 0
    charged: int = 0
    adjusted: int = 0
    granted: int = 0
    settled: int = 0
    released: int = 0
    expired: int = 0
    turns_at: int = 0
    """Start of the next month, for monthly windows."""
    turned_at: int = 0
    """Start of this month."""
    refundable: int = 0
    """Charges of expired holds that a late Commit may yet give back; ``held`` comes on top."""
    peaks: Peaks = msgspec.field(default_factory=Peaks)
    over: int = 0
    """What upstream may count of the open calls beyond their holds."""
    ends: list[tuple[int, int, int]] = msgspec.field(default_factory=list)
    """(last end in slot, cumulative charge, cumulative over) of ended calls, inclusive."""
    constraint: Constraint | None = None
    guessed: bool = False
    """Nobody has said or confirmed this limit: it must not make a lone call impossible."""
    configured: int = 0
    """The amount that configuration gives; a learned one replaces it in ``amount``."""
    configured_burst: int = 0
    ruling: int = 0
    """The amount that was last said, by configuration or by an operator: what a learned restriction lapses to."""
    ruling_burst: int = 0
    override: bool = False
    """The operator fixed this limit: readings may lower it, never raise it."""
    pending: int | None = None
    """A higher limit that one reading has claimed."""
    learned_at: int | None = None
    """When a reading last confirmed a learned limit."""
    losses: Losses = msgspec.field(default_factory=Losses)
    """Refill that did not count."""
    foreseen: int = 0
    """What its open calls seem to have produced beyond what they hold: taken off the level, as an adjustment."""
    outside: int = 0
    """What others seem to use of it, per minute: less than the amount."""
    outside_at: int = 0
    """When that was last confirmed."""
    pending_at: int = 0
    """When the limit that is pending was claimed."""

    @property
    def is_read(self) -> bool:
        """Whether readings speak of it."""
        return self.window is _MINUTE and not self.share

    # -- time ---------------------------------------------------------------------------------------------------

    def refill(self, now: int) -> tuple[int, int]:
        """What refills until ``now``, and the carry after it. Changes nothing."""
        window = WINDOW_US.get(self.window)
        if window is None:
            if self.window is Window.MONTH and now >= self.turns_at:
                return max(0, self.burst - self.held - self.level), 0
            return 0, 0
        room = self.burst - self.level
        if room <= 0:
            return 0, 0
        refilled, carry = divmod(self.carry + (self.amount - self.outside) * (now - self.at), window)
        return (refilled, carry) if refilled < room else (room, 0)

    def lost(self, now: int, refilled: int) -> int:
        """What of the refill until ``now`` finds no place, given that ``refilled`` does."""
        window = WINDOW_US.get(self.window)
        if window is None or self.level + refilled < self.burst or self.amount >= UNLIMITED:
            return 0
        return (self.carry + (self.amount - self.outside) * (now - self.at)) // window - refilled

    def advance(self, now: int, refilled: int, carry: int, lost: int = 0) -> None:
        """Move to ``now``, by the results of :meth:`refill` and :meth:`lost`."""
        if lost:
            # At its rim a bucket loses as fast as it refills: so long ago it became full.
            full = min(now - self.at, lost * WINDOW_US[self.window] // (self.amount - self.outside))
            self.losses.add(now - full, now, lost)
        self.at = now
        self.level += refilled
        self.refilled += refilled
        self.carry = carry
        if self.window is Window.MONTH and now >= self.turns_at:
            # Every open hold is left out of the new month's budget, so each may come back in full.
            self.peaks.clear()
            self.turned_at, self.turns_at = self.turns_at, next_month(now)

    def wait_us(self, level: int, carry: int, now: int) -> int | None:
        """Time from ``now`` until a ``level`` below zero, with ``carry``, has refilled to zero; ``None``: never."""
        window = WINDOW_US.get(self.window)
        if window is None:
            if self.window is not Window.MONTH:
                return None
            # A turn that is past has given what it gives, booked or not.
            return (self.turns_at if self.turns_at > now else next_month(now)) - now
        rate = self.amount - self.outside
        if rate <= 0:
            return None
        return -((level * window + carry) // rate)

    def need(self, hold: int, count: int = 1, surprise: int = 0, spread: int = 0) -> int:
        """The level at which ``count`` calls that hold ``hold`` each may pass together.

        A guessed burst may be far below the real one; a lone call above it passes when the bucket is full, into debt,
        so that its answer can teach. A margin never makes a call impossible.
        """
        together = hold * count
        if together >= self.burst:
            return self.burst if self.guessed and count == 1 else together
        return min(together + self.margin(hold, surprise, spread), self.burst)

    def margin(self, hold: int, surprise: int = 0, spread: int = 0) -> int:
        """What must be left beside ``hold``: the upstream lets a call in by an estimate of its own, and has let in
        others that no reading shows yet.

        ``surprise`` is what the call itself may turn out to be larger by; ``spread`` what the calls of the pool do, as
        a variance for each token that they hold (:mod:`paceline.engine.sizes`). Those granted since the newest reading
        err by themselves, and all together by what estimates differ; independent errors add up as their squares do.

        Only under a reading: without one, more would be pretended to be known of the level than is. It delays a call by
        moments, once; it takes nothing from the budget.
        """
        constraint = self.constraint
        if constraint is None or self.dimension not in ESTIMATED:
            return 0
        seen = min(self.amount * MARGIN_US // WINDOW_US.get(self.window, MARGIN_US), self.burst // 16)
        unseen = max(0, min(constraint.after, self.held))
        own = max(hold // MARGIN_PART, surprise)
        others = DEVIATIONS * DEVIATIONS * spread * (unseen + seen) + (unseen // MARGIN_PART) ** 2
        beside = isqrt(own * own + min(others, (self.burst // UNSEEN_PART) ** 2))
        return (constraint.rounding + 1) // 2 + beside + seen

    # -- amounts ------------------------------------------------------------------------------------------------

    def open(self, ordinal: int, at: int, hold: int, over: int) -> None:
        """A reservation, the ``ordinal``-th, holds ``hold``; upstream may count ``over`` beyond it."""
        level, held = self.level, self.held
        if self.burst - level <= held + self.refundable:
            self._remember(ordinal)
        self.level = level - hold
        self.charged += hold
        self.held = held + hold
        self.granted += hold
        if over:
            self.over += over
        constraint = self.constraint
        if constraint is not None and at > constraint.until:
            constraint.after += hold

    def grow(self, ordinal: int, granted_at: int, more: int, over: int) -> None:
        """An open hold grew by ``more`` (≥ 0), and what upstream may count beyond it by ``over``."""
        self.over += over
        if not more:
            return
        # Peaks that could not matter before now may; assume the worst of them.
        self.peaks.push(ordinal, self.burst - self.held - self.refundable)
        self.lower(ordinal, more)
        self.charged += more
        self.held += more
        self.granted += more
        if self.constraint is not None and granted_at > self.constraint.until:
            self.constraint.after += more

    def shrink(self, since: int, newest: int, granted_at: int, old: int, new: int, over: int, forfeit: int) -> None:
        """An open hold, the ``since``-th, turned out to be ``new`` instead of ``old``, which is more."""
        self.over += over
        self.held -= old - new
        self.granted -= old - new
        self.recharge(since, newest, old, new, forfeit)
        if self.constraint is not None and granted_at > self.constraint.until:
            self.constraint.after -= old - new

    def close(
        self,
        kind: EndKind,
        at: int,
        granted_at: int,
        since: int,
        newest: int,
        hold: int,
        over: int,
        charge: int,
        forfeit: int,
        over_now: int,
    ) -> None:
        """The hold of a reservation, the ``since``-th, ended at ``at`` with ``charge``."""
        self.held -= hold
        if over:
            self.over -= over
        if kind is _SETTLED:
            self.settled += hold
        elif kind is _EXPIRED:
            self.expired += hold
            self.refundable += charge
        else:
            self.released += hold
        if charge != hold:
            self.recharge(since, newest, hold, charge, forfeit)
        if self.window is _MINUTE and not self.share:
            self.note_end(at, granted_at, hold, charge, over_now)

    def recharge(self, since: int, newest: int, old: int, new: int, forfeit: int) -> None:
        """Put the charge ``new`` in the place of ``old``, of a hold granted at ordinal ``since``."""
        self.charged += new - old
        if new > old:
            self.lower(newest + 1, new - old)
        elif new < old:
            self.refilled -= forfeit
            amount = old - new - forfeit
            if amount or self.level >= self.burst:
                self.refund(since, amount)

    def withhold(self, since: int, until: int, refilled: int, carry: int, lost: int) -> None:
        """Refill to ``since``, then move to ``until`` without: nobody saw what was used meanwhile."""
        self.level += refilled
        self.refilled += refilled
        self.carry = carry
        self.losses.add(since, until, lost)
        self.at = until

    def book(self, newest: int, charge: int, absorbed: int, made_at: int) -> None:
        """A call that held nothing was charged; losses after ``made_at`` make up for ``absorbed`` of it."""
        self.lower(newest + 1, charge - absorbed)
        if absorbed:
            self.refilled += absorbed
            self.losses.take(made_at, absorbed)
        self.charged += charge
        self.granted += charge
        self.settled += charge

    def lower(self, ordinal: int, amount: int) -> None:
        """Take ``amount`` (≥ 0) off the level, remembering how high it stood before ``ordinal``."""
        if self.burst - self.level <= self.held + self.refundable:
            self._remember(ordinal)
        self.level -= amount

    def adjust(self, newest: int, amount: int) -> None:
        """Move the level by what is known otherwise; nothing was granted after ordinal ``newest``."""
        self.adjusted += amount
        if amount < 0:
            self.lower(newest + 1, -amount)
        else:
            self.level += amount
            if self.level >= self.burst:
                self.carry = 0

    @property
    def corrected(self) -> int:
        """What readings have corrected, in all."""
        return self.adjusted + self.foreseen

    def credit(self, since: int, amount: int) -> int:
        """How much of a refund of ``amount``, for a hold granted at ordinal ``since``, may raise the level."""
        # The carry of today need not be counted: a credit that fills the bucket takes it away.
        top = self.level
        if self.peaks.levels:
            peak = self.peaks.since(since)
            if peak is not None and peak > top:
                top = peak
        return max(0, min(amount, self.burst - top))

    def refund(self, since: int, amount: int) -> None:
        """Raise the level by a credit, as if ``amount`` had not been held since ordinal ``since``."""
        self.level += amount
        if self.level >= self.burst:
            self.carry = 0
        if amount and self.peaks.levels:
            self.peaks.raise_since(since, amount)

    def move_burst(self, burst: int) -> None:
        """Change the burst, keeping for every open hold the headroom that it has seen."""
        moved = burst - self.burst
        if moved:
            self.peaks.lift += moved
            self.burst = burst

    def _remember(self, ordinal: int) -> None:
        """Before a lowering: keep the level as a peak (with a carry: the next whole unit), if it can ever matter."""
        top = self.level + (self.carry > 0)
        if self.burst - top < self.held + self.refundable:
            self.peaks.push(ordinal, top)

    # -- ends of calls, for readings -----------------------------------------------------------------------------

    def note_end(self, at: int, granted_at: int, held: int, charge: int, over: int) -> None:
        """Remember that a call ended at ``at`` with ``charge``, ``over`` less than upstream may have counted."""
        ends = self.ends
        if ends:
            last, total, total_over = ends[-1]
            if at < last:
                # One that is reported late: those noted since come on top.
                self.amend_end(at, granted_at, charge, over)
                return
            total += charge
            total_over += over
            if last // END_SLOT_US == at // END_SLOT_US:
                ends[-1] = (at, total, total_over)
            else:
                ends.append((at, total, total_over))
                if len(ends) > MAX_ENDS:
                    del ends[: MAX_ENDS // 10]
        else:
            ends.append((at, charge, over))
        constraint = self.constraint
        if constraint is not None:
            if at >= constraint.since:
                constraint.ended += charge
                constraint.ended_over += over
            if granted_at > constraint.until:
                constraint.after += charge - held

    def amend_end(self, ended_at: int, granted_at: int, charge: int, over: int) -> None:
        """A call that ended at ``ended_at`` turned out to have cost ``charge`` more (or less) than noted."""
        for place in range(bisect_right(self.ends, ended_at - 1, key=_first), len(self.ends)):
            last, total, total_over = self.ends[place]
            self.ends[place] = (last, total + charge, total_over + over)
        constraint = self.constraint
        if constraint is not None:
            if granted_at > constraint.until:
                constraint.after += charge
            if ended_at >= constraint.since:
                constraint.ended += charge
                constraint.ended_over += over

    def ended_since(self, at: int) -> tuple[int, int] | None:
        """Sum of charges and of over of calls ended at ``at`` or later; ``None`` if that is forgotten.

        Whole slots are counted, so the sums may include calls that ended up to one slot earlier.
        """
        ends = self.ends
        if not ends:
            return 0, 0
        first = bisect_right(ends, at - 1, key=_first)
        if first == 0:
            # The very first slot still stands if nothing was ever cut off.
            return (ends[-1][1], ends[-1][2]) if len(ends) < MAX_ENDS * 9 // 10 else None
        return ends[-1][1] - ends[first - 1][1], ends[-1][2] - ends[first - 1][2]


def _first(entry: tuple[int, ...]) -> int:
    return entry[0]
