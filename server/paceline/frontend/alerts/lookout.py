"""What happens to the limits of one ledger, found by looking at its books about once a second.

**What counts as used.** Of a month: what is spent, without open holds, as GetSpend shows it. Of a day, which refills
all the time: what its bucket lacks, without open holds, against the largest level. Of a minute: what was charged in
the last 60 seconds (open holds included, less what came back), against the limit; a saved burst can make that more than
all of it. Of a gauge: what is held now.

**When it is told.** A threshold, when the used part reaches it; again only after it was :data:`HYSTERESIS` below, or in
a new month. A cap, when a call is denied for want of what is left of a day or month; again after it was 5 points below
all of it and nobody was denied for a minute, or in a new month. A limit, when readings have moved it; at most once a
minute.

**What it costs.** A limit at which nothing was charged since the last look, and of which nothing stands, costs one
comparison. The others keep their charges of the last looks (about 600 bytes each, for as long as they are in use), and
cost some microseconds a look. Looks are made in slices, so that the event loop turns between them.

Everything is soft. A process that takes a ledger over begins with what it finds: budgets that are above a threshold
already are noted, not told; of minutes it knows nothing yet.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import islice

from paceline.engine.bucket import Bucket
from paceline.engine.calendar import next_month
from paceline.engine.dimensions import BUDGETS, MINUTE_US, UNLIMITED, Dimension, Window
from paceline.engine.state import State
from paceline.engine.stats import Stats
from paceline.frontend.alerts.alert import Alert, Kind

HYSTERESIS = 50
"""Thousandths."""
SLICE = 512
"""Limits looked at between two turns of the event loop: about a tenth of a millisecond, if nothing happens."""
MAX_TOLD = 256
"""Alerts of one look. Further ones come with the next."""
MAX_STANDING = 32_768
"""Alerts of one ledger that stand. Further ones are not told before some of them have ended."""
MOVED_STANDS_US = 10 * MINUTE_US

_RING = 64
"""Looks that are remembered: a minute and a little."""
_CAP, _MOVED = -1, -2
"""Where the marks of other kinds than thresholds are kept."""
_CAP_AGAIN = 950
_RETOLD_US = MINUTE_US

Address = tuple[str, str, Dimension, Window]


class _Entry:
    """One limit that is in use, or of which something stands."""

    __slots__ = ("changed", "marks", "ring", "short_at", "told")

    def __init__(self, ring: array[int] | None, changed: int) -> None:
        self.ring = ring
        """Sums of charges at the last looks; ``None``: its window is no minute."""
        self.changed = changed
        """The look that last found another sum of charges."""
        self.marks: dict[int, tuple[Alert, int]] = {}
        """What stands, by threshold, with the end of its month."""
        self.short_at = 0
        """When a call was last denied for it."""
        self.told: int | None = None
        """The amount that is known to operators, while readings move it."""


class Lookout:
    """Looks at one ledger. ``thresholds`` in thousandths, rising."""

    def __init__(self, ledger: str, thresholds: tuple[int, ...], state: State, stats: Stats, now: int) -> None:
        self.ledger = ledger
        self.state = state
        self.standing = 0
        """Alerts that stand."""
        self._thresholds = thresholds
        self._entries: dict[int, _Entry] = {}
        self._looks = 0
        self._times = array("q", [now]) * _RING
        self._base = 0
        """The newest look that is a minute old; at first the beginning."""
        self._stats = stats
        self._seen: list[int] = []
        self._amounts: list[int] = []
        self._short: dict[int, int] = {}
        self._fresh = True
        self._left = 0
        self.follow(state, stats)

    def follow(self, state: State, stats: Stats) -> None:
        """Go on with other books of the same ledger: they were read again from the journal."""
        entries: dict[int, _Entry] = {}
        for number, entry in self._entries.items():
            bucket = self.state.buckets[number]
            now_at = state.addresses.get((bucket.pool, bucket.share, bucket.dimension, bucket.window))
            if now_at is None:
                self.standing -= len(entry.marks)
            else:
                entries[now_at] = entry
        self.state, self._stats, self._entries = state, stats, entries
        self._seen = [bucket.charged for bucket in state.buckets]
        self._amounts = [bucket.amount for bucket in state.buckets]
        self._short = dict(stats.short)

    def alerts(self, most: int) -> Iterator[Alert]:
        """What stands now, at most so many."""
        found = (mark for entry in self._entries.values() for mark, _ in entry.marks.values())
        return islice(found, most)

    def look(self, now: Callable[[], int]) -> Iterator[list[Alert]]:
        """Look once at every limit; after each slice: what has happened there. ``now`` is ledger time in µs.

        What is left of a look whose books have been replaced meanwhile must not be made.
        """
        self._looks = look = self._looks + 1
        begun = now()
        times = self._times
        times[look % _RING] = begun
        while self._base < look and times[(self._base + 1) % _RING] <= begun - MINUTE_US:
            self._base += 1
        self._base = max(self._base, look - _RING + 1)
        self._left = MAX_TOLD
        short = self._denied()
        buckets, seen, amounts, entries = self.state.buckets, self._seen, self._amounts, self._entries
        fresh, start = self._fresh, 0
        while start < len(buckets):
            stop = min(start + SLICE, len(buckets))
            for bucket in buckets[len(seen) : stop]:
                seen.append(0)
                amounts.append(bucket.amount)
            at = now()
            found: list[Alert] = []
            for number in range(start, stop):
                bucket = buckets[number]
                if (
                    fresh
                    or bucket.charged != seen[number]
                    or bucket.amount != amounts[number]
                    or number in entries
                    or number in short
                ):
                    self._examine(number, bucket, max(at, bucket.at), number in short, found)
            yield found
            start = stop
        self._fresh = False

    def _denied(self) -> set[int]:
        """Limits for which calls were denied since the last look."""
        counts = dict(self._stats.short)
        before, self._short = self._short, counts
        return {number for number, count in counts.items() if count != before.get(number, 0)}

    def _examine(self, number: int, bucket: Bucket, now: int, short: bool, found: list[Alert]) -> None:
        look, entry = self._looks, self._entries.get(number)
        before, self._seen[number] = self._seen[number], bucket.charged
        if entry is None:
            if bucket.amount >= UNLIMITED:
                self._amounts[number] = bucket.amount
                return
            ring = array("q", [before]) * _RING if bucket.window is Window.MINUTE else None
            entry = _Entry(ring, look if bucket.charged != before else 0)
        elif bucket.charged != before:
            entry.changed = look
        if entry.ring is not None:
            entry.ring[look % _RING] = bucket.charged
        used, amount = self._used(bucket, entry, now), _whole(bucket)
        if bucket.amount != self._amounts[number]:
            if bucket.learned_at is not None and entry.told is None and not bucket.share:
                entry.told = self._amounts[number]
            self._amounts[number] = bucket.amount
        period = _period(bucket, now)
        # A call that was denied in the month before says nothing of this one.
        short = short and (not period or next_month(self._times[(look - 1) % _RING]) == period)
        if short:
            entry.short_at = now
        standing = len(entry.marks)
        waits = False
        if 0 < amount < UNLIMITED:
            inherited = used - max(0, bucket.charged - before) if self._fresh and bucket.window in BUDGETS else -1
            waits = self._thresholds_of(entry, bucket, used, amount, period, inherited, now, found)
            waits |= self._cap_of(entry, bucket, used, amount, period, short, now, found)
        else:
            for place in [place for place in entry.marks if place != _MOVED]:
                del entry.marks[place]
        if entry.told is not None:
            waits |= self._move_of(entry, bucket, used, now, found)
        self.standing += len(entry.marks) - standing
        if (
            waits
            or entry.marks
            or entry.told is not None
            or (amount < UNLIMITED and entry.ring is not None and entry.changed > self._base)
        ):
            self._entries[number] = entry
        else:
            self._entries.pop(number, None)

    def _used(self, bucket: Bucket, entry: _Entry, now: int) -> int:
        if entry.ring is not None:
            return max(0, bucket.charged - entry.ring[self._base % _RING])
        if bucket.window is Window.NONE:
            return bucket.held
        if bucket.window is Window.MONTH and now >= bucket.turns_at:
            return 0
        return max(0, bucket.burst - bucket.level - bucket.refill(now)[0] - bucket.held)

    def _thresholds_of(
        self,
        entry: _Entry,
        bucket: Bucket,
        used: int,
        amount: int,
        period: int,
        inherited: int,
        now: int,
        found: list[Alert],
    ) -> bool:
        """Begin and end what stands; whether something has to wait for the next look."""
        marks = entry.marks
        for permille in self._thresholds:
            mark = marks.get(permille)
            if mark is not None and (mark[1] != period or used * 1_000 <= (permille - HYSTERESIS) * amount):
                del marks[permille]
                mark = None
            if mark is not None or used * 1_000 < permille * amount:
                continue
            old = inherited * 1_000 >= permille * amount
            alert = self._alert(Kind.THRESHOLD, bucket, permille, used, amount, None, now, old)
            if not self._tell(alert, found):
                return True
            marks[permille] = (alert, period)
        return False

    def _cap_of(
        self,
        entry: _Entry,
        bucket: Bucket,
        used: int,
        amount: int,
        period: int,
        short: bool,
        now: int,
        found: list[Alert],
    ) -> bool:
        mark = entry.marks.get(_CAP)
        if mark is not None:
            quiet = now - entry.short_at > _RETOLD_US and used * 1_000 < _CAP_AGAIN * amount
            if quiet or mark[1] != period:
                del entry.marks[_CAP]
                mark = None
        if mark is None and short:
            alert = self._alert(Kind.CAP_REACHED, bucket, 0, used, amount, None, now)
            if not self._tell(alert, found):
                # The next denial will be told.
                return False
            entry.marks[_CAP] = (alert, period)
        return False

    def _move_of(self, entry: _Entry, bucket: Bucket, used: int, now: int, found: list[Alert]) -> bool:
        mark = entry.marks.get(_MOVED)
        age = None if mark is None else now - mark[0].at
        moved = bucket.learned_at is not None and bucket.amount != entry.told and bucket.amount < UNLIMITED
        if moved and (age is None or age >= _RETOLD_US):
            alert = self._alert(Kind.LIMIT_MOVED, bucket, 0, used, bucket.amount, entry.told, now)
            if not self._tell(alert, found):
                return True
            entry.marks[_MOVED], entry.told = (alert, 0), bucket.amount
        elif not moved and age is None:
            entry.told = None
        elif age is not None and age >= MOVED_STANDS_US:
            del entry.marks[_MOVED]
            entry.told = None
        return False

    def _tell(self, alert: Alert, found: list[Alert]) -> bool:
        """Whether there is a place for it."""
        if self.standing >= MAX_STANDING or (self._left == 0 and not alert.inherited):
            return False
        self._left -= not alert.inherited
        found.append(alert)
        return True

    def _alert(
        self,
        kind: Kind,
        bucket: Bucket,
        permille: int,
        used: int,
        amount: int,
        previous: int | None,
        now: int,
        inherited: bool = False,
    ) -> Alert:
        return Alert(
            kind,
            self.ledger,
            bucket.pool,
            bucket.share,
            bucket.dimension,
            bucket.window,
            permille,
            used,
            amount,
            previous,
            now,
            inherited,
        )


def _whole(bucket: Bucket) -> int:
    """What all of a limit is."""
    return bucket.burst if bucket.window is Window.DAY and bucket.amount < UNLIMITED else bucket.amount


def _period(bucket: Bucket, now: int) -> int:
    """The end of the month that it counts in; zero: of none."""
    if bucket.window is not Window.MONTH:
        return 0
    return bucket.turns_at if now < bucket.turns_at else next_month(now)
