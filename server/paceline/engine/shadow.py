"""The levels that buckets would have, had enforcing decided, while some calls are only observed.

Observing grants what enforcing would not, so the books go into a debt that enforcing would never have: judged against
them, every call after the first excess would be denied for ever. So beside a bucket's level stands how much more, or
less, it would be:

- A call that would have been denied took nothing: what it took in the books, hold and then charge, is added.
- A call that would have waited takes what it needs at once, as one that has its turn does: those after it are judged to
  stand behind it, first come, first served.
- One of the last two kinds that the upstream refused is refunded in the books. Enforcing would have made it later, or
  would have kept others from taking what it needed: so it keeps its place, and what it would have taken is subtracted.

The sum never exceeds the burst. A bucket that is full in the books may not be so here: then what it cannot take of its
refill is added, until both are. What readings correct in the books is corrected here, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import WINDOW_US


class _Entry:
    __slots__ = ("amount", "at", "refilled")

    def __init__(self, at: int, refilled: int) -> None:
        self.amount = 0
        self.at = at
        """When the bucket had ``refilled`` in all."""
        self.refilled = refilled


class Shadow:
    """What to add to the levels of one ledger. No more entries than there are buckets."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._buckets: Sequence[Bucket] = ()
        self._now = 0

    def begin(self, buckets: Sequence[Bucket], now: int) -> None:
        """Start a step."""
        self._buckets, self._now = buckets, now

    def more(self, number: int) -> int:
        """How much more than its level a bucket would have; less, below zero."""
        entry = self._entries.get(number)
        if entry is None:
            return 0
        bucket = self._buckets[number]
        self._refill(entry, bucket)
        entry.amount = min(entry.amount, bucket.burst - bucket.level - bucket.refill(self._now)[0])
        if not entry.amount:
            del self._entries[number]
            return 0
        return entry.amount

    def _refill(self, entry: _Entry, bucket: Bucket) -> None:
        refilled = bucket.refilled + bucket.refill(self._now)[0]
        window = WINDOW_US.get(bucket.window)
        if entry.amount < 0 and window is not None:
            lost = bucket.amount * (self._now - entry.at) // window - refilled + entry.refilled
            if lost > 0:
                entry.amount = min(0, entry.amount + lost)
                entry.at, entry.refilled = self._now, refilled

    def allows(self, numbers: tuple[int, ...], holds: tuple[int, ...]) -> bool:
        """Whether a call that fits by the books would have fitted."""
        if self._entries:
            for number, hold in zip(numbers, holds, strict=True):
                bucket = self._buckets[number]
                if hold and bucket.level + bucket.refill(self._now)[0] + self.more(number) < bucket.need(hold):
                    return False
        return True

    def look(self, numbers: tuple[int, ...]) -> None:
        """These buckets are about to be taken from: what is full now was so before."""
        if self._entries:
            for number in numbers:
                self.more(number)

    def denied(self, numbers: tuple[int, ...], holds: tuple[int, ...]) -> None:
        """A call that took these holds would have been denied."""
        for number, hold in zip(numbers, holds, strict=True):
            self._add(number, hold)

    def unchanged(
        self, numbers: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...], forfeits: tuple[int, ...]
    ) -> None:
        """The books gave back ``before - after``, less ``forfeits``, for a call whose end changes nothing here."""
        for number, had, has, forfeit in zip(numbers, before, after, forfeits, strict=True):
            entry = self._entries.get(number)
            # Where there is less here, the forfeit counts as a refill that the bucket could not take.
            credited = had - has - (0 if entry is not None and entry.amount < 0 else forfeit)
            if credited > 0 and self._buckets[number].window not in WINDOW_US and (entry is None or entry.amount <= 0):
                # Nothing would ever make a gauge or a month's budget whole again.
                continue
            self._add(number, -credited)

    def _add(self, number: int, amount: int) -> None:
        if not amount:
            return
        bucket, entry = self._buckets[number], self._entries.get(number)
        if entry is None or (entry.amount >= 0 and amount < 0):
            refilled = bucket.refilled + bucket.refill(self._now)[0]
            amount += 0 if entry is None else entry.amount
            self._entries[number] = entry = _Entry(self._now, refilled)
        else:
            self._refill(entry, bucket)
        # What exceeds the burst goes at the next look: the books may be ahead of this by a moment.
        entry.amount += amount
