"""Output that is still to come: admission over horizons, for limits that are charged as output is produced.

A call of which all expected output is held against today's level keeps out others whose output comes much later, when
refill has made place for it. Therefore a call may pass if for every horizon ``h``

    gross + r·h - Σ E[min(v·h, rest_i)] - z·σ(h) ≥ margin        σ²(h) = Σ var_i + Σ_kinds (τ·Σ mean)²

(design of the service, "Learning the sizes"). ``gross`` is what the upstream has left: our level with every hold given
back, less what the open calls have produced by now at their pace. The rest of a call is that of the sizes learned for
its kind which are larger than what it has produced already, so a call that is open for long is expected to be long.
Sizes within a kind err together, hence the second term of the variance.

The sums over open calls are kept for a few horizons and by the second of the grant: a grant or an end changes them by
one row of its kind's table, and time by summing the rows anew a few times a second, whatever the number of calls. All
of this is soft state, made from the books when a level net of all holds first falls short, or when the upstream says
that little is left, and dropped when neither has happened for long.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from paceline.engine.dimensions import MINUTE_US, SECOND_US, Dimension
from paceline.engine.sizes import BINS, UNIT, Kind, Learned, bin_of, finest, middle_of

if TYPE_CHECKING:
    from paceline.engine.bucket import Bucket
    from paceline.engine.state import Reservation, State

HORIZONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Seconds. What comes later than the last of them is for later decisions."""
AGES = (0.0, *(0.5 * 2.0 ** (step / 2) for step in range(22)))
"""Seconds since the grant for which rows are laid out: to twelve minutes."""
Z = 1.0
"""So many standard deviations of what is to come are kept free."""
TAU = 0.1
"""Part by which all sizes of a kind may be off together."""
REFRESH_US = 250_000
LOOK_US = 50_000
TABLE_US = 5 * SECOND_US
"""A kind's table follows what is learned this often."""
TIGHT = 2
"""Below one part in so many of the burst, what is left is little."""
MAX_ASKED = 256
"""Kinds of which no call is open whose tables are kept."""
IDLE_US = 10 * 60 * SECOND_US
"""A limit that was not short for so long is no longer looked at."""
MARGIN_US = 200_000
"""Of refill: calls are under way when a reading is taken."""
MARGIN_PART = 16
"""At most this part of the burst."""
_RARE = 1e-6
_PACE = 60.0
_FIRST = 1.0
"""Tokens a second, and seconds until the first, of a kind of which nothing is known."""
_Key = tuple[Kind, int]
"""A kind, and the bin of the cap that its calls have."""
_Row = tuple[float, ...]
"""Means of the output within each horizon, then its variances."""
_MEANS = len(HORIZONS)


class Table:
    """The rest of a call of one kind, by its age."""

    __slots__ = ("_rows", "_sizes", "_sums", "_weights", "expected", "first", "made_at", "most", "pace")

    def __init__(
        self, learned: Learned | None, expected: int, most: int, now: int, ages: Iterable[tuple[float, int]] = ()
    ) -> None:
        """``expected`` is the output, in tokens, of an unknown kind, ``most`` the cap of its calls. ``ages``, with
        numbers, are those of open ones."""
        self.expected, self.most = expected, most
        self.made_at = now
        self.pace, self.first = (_PACE, _FIRST) if learned is None or not learned.timed else learned.pace
        self._sizes: list[float] = []
        self._weights: list[float] = []
        if learned is not None:
            open_at = learned.cut.copy()
            for age, number in ages:
                done = int(self.produced(age))
                if done:
                    open_at[bin_of(done)] += number * UNIT
            self._sizes, self._weights = survival(learned.histogram, open_at)
        if not self._sizes:
            self._sizes, self._weights = [float(max(1, expected))], [1.0]
        self._sizes = [min(size, float(most)) for size in self._sizes]
        self._sums = [(0.0, 0.0, 0.0)]
        """Of the sizes before each, in their order: weights, and weights times sizes, and times their squares."""
        for size, weight in zip(self._sizes, self._weights, strict=True):
            total, mean, square = self._sums[-1]
            self._sums.append((total + weight, mean + weight * size, square + weight * size * size))
        self._rows: dict[int, _Row] = {}

    def produced(self, age: float) -> float:
        """What an open call of this age has produced."""
        return min(float(self.most), self.pace * (age - self.first)) if age > self.first else 0.0

    @property
    def full_at(self) -> float:
        """The age at which a call has produced all that it may."""
        return self.first + self.most / self.pace

    def is_producing(self, age: float) -> bool:
        """Whether a call of this age still may."""
        return age > self.first and self.pace * (age - self.first) < self.most

    def row(self, age: float) -> _Row:
        """What is to come of an open call of this age, in seconds."""
        return self.row_of(bisect_right(AGES, age) - 1)

    def row_of(self, number: int) -> _Row:
        """What is to come of a call of the age of this number in :data:`AGES`."""
        row = self._rows.get(number)
        if row is None:
            row = self._rows[number] = self._make(AGES[number])
        return row

    def _make(self, age: float) -> _Row:
        done, lead = self.produced(age), max(0.0, self.first - age)
        sizes, sums = self._sizes, self._sums
        start = bisect_right(sizes, done)
        if start == len(sizes):
            # Longer than all before it: the more it has said, the more may come.
            rest = max(0.0, min(done / 2, self.most - done))
            sizes, sums, start = [done + rest], [(0.0, 0.0, 0.0), (1.0, done + rest, (done + rest) ** 2)], 0
        weight_before, mean_before, square_before = sums[start]
        total = sums[-1][0] - weight_before
        means, variances = [], []
        for horizon in HORIZONS:
            most = self.pace * max(0.0, horizon - lead)
            weight, mean, square = sums[bisect_left(sizes, done + most, start)]
            # Those whose rest is below ``most``, and the others, of which that much comes.
            others = sums[-1][0] - weight
            weight, mean, square = weight - weight_before, mean - mean_before, square - square_before
            mean, square = mean - done * weight, square - 2 * done * mean + done * done * weight
            mean, square = (mean + most * others) / total, (square + most * most * others) / total
            means.append(max(0.0, mean))
            variances.append(max(0.0, square - mean * mean))
        return (*means, *variances)


def survival(counts: Sequence[int], open_at: Sequence[int]) -> tuple[list[float], list[float]]:
    """Sizes and their probabilities, from how many calls ended in each bin and how many are open in it.

    Open calls are as large as they are by now, at least: without them the sizes would be those of the short calls as
    long as the long ones have not ended. (Kaplan and Meier, J. Am. Stat. Assoc. 53, 1958, in bins.)
    """
    at_risk = sum(counts) + sum(open_at)
    alive, sizes, weights = 1.0, [], []
    for number, count in enumerate(counts):
        if count and at_risk:
            ended = alive * count / at_risk
            sizes.append(middle_of(number))
            weights.append(ended)
            alive -= ended
        at_risk -= count + open_at[number]
    if alive > _RARE and sizes:
        # The largest are open: they will be larger still.
        top = max(number for number in range(BINS) if counts[number] or open_at[number])
        sizes.append(2 * middle_of(top))
        weights.append(alive)
    return sizes, weights


def age_of(slot: int, now: int) -> float:
    """The age, in seconds, of calls that were granted in the ``slot``-th second."""
    return max(0.0, now / SECOND_US - slot - 0.5)


class _Places(dict[int, tuple[float, int]]):
    """Of each second of a grant: the age of its calls now, and the number of that in :data:`AGES`."""

    def __init__(self, now: int) -> None:
        self._now = now

    def __missing__(self, slot: int) -> tuple[float, int]:
        age = age_of(slot, self._now)
        self[slot] = place = age, bisect_right(AGES, age) - 1
        return place


class _Open:
    """The open calls of one kind: how many, by the second of their grant."""

    __slots__ = ("_counts", "_own", "_summed", "means", "slots", "table")

    def __init__(self, table: Table) -> None:
        self.table = table
        self.slots: dict[int, int] = {}
        self.means = [0.0] * len(HORIZONS)
        self._summed: Table | None = None
        """The table whose rows were last summed, by these counts, to this."""
        self._counts: list[int] = []
        self._own: list[float] = []

    def summed(self, table: Table, counts: list[int]) -> list[float]:
        """The sum of the table's rows, each as often as its number in ``counts`` says. What has not changed since the
        last time is not summed again; a new table sets that right which rounding adds up to."""
        if table is not self._summed:
            self._summed, self._counts, self._own = table, [0] * len(AGES), [0.0] * (2 * _MEANS)
        own = self._own
        if counts != self._counts:
            for number, (count, before) in enumerate(zip(counts, self._counts, strict=True)):
                if count != before:
                    more = count - before
                    own = [total + more * each for total, each in zip(own, table.row_of(number))]  # noqa: B905
            self._counts, self._own = counts, own
        return own

    def ages(self, now: int) -> Iterator[tuple[float, int]]:
        """Ages in seconds, with how many calls have them."""
        for slot, count in self.slots.items():
            yield age_of(slot, now), count


class Demand:
    """What the open calls of one limit will still produce."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.kinds: dict[_Key, _Open] = {}
        self._asked: dict[_Key, Table] = {}
        """Tables of kinds of which no call is open."""
        self._clear(state.at)
        self.asked_at = state.at
        self.calls = 0

    def _clear(self, now: int) -> None:
        self.at = now
        self._means = [0.0] * len(HORIZONS)
        self._variances = [0.0] * len(HORIZONS)
        self._squares = [0.0] * len(HORIZONS)
        self._produced = self._pace = 0.0

    # -- what comes and goes --------------------------------------------------------------------------------------

    def opened(self, reservation: Reservation, now: int) -> None:
        """A call was granted."""
        key, slot = _key_of(reservation), reservation.granted_at // SECOND_US
        found = self.kinds.get(key)
        if found is None:
            found = self.kinds[key] = _Open(self._table(key, reservation.sizes.output_tokens, now))
        found.slots[slot] = found.slots.get(slot, 0) + 1
        self.calls += 1
        self._sum(found, (now - reservation.granted_at) / SECOND_US, 1, now)

    def ended(self, reservation: Reservation, now: int) -> None:
        """A call was settled, released, or ran out."""
        key, slot = _key_of(reservation), reservation.granted_at // SECOND_US
        found = self.kinds.get(key)
        if found is None or slot not in found.slots:
            return
        if found.slots[slot] == 1:
            del found.slots[slot]
        else:
            found.slots[slot] -= 1
        self.calls -= 1
        self._sum(found, (now - reservation.granted_at) / SECOND_US, -1, now)
        if not found.slots:
            del self.kinds[key]

    def _table(self, key: _Key, expected: int, now: int) -> Table:
        found = self.kinds.get(key)
        table = self._asked.get(key) if found is None else found.table
        if table is None or now - table.made_at > TABLE_US:
            ages = () if found is None else found.ages(now)
            table = Table(finest(self.state.learned, key[0]), expected, cap_of(key[1]), now, ages)
            if found is not None:
                found.table = table
            else:
                if len(self._asked) >= MAX_ASKED:
                    self._asked.clear()
                self._asked[key] = table
        return table

    def _sum(self, found: _Open, age: float, count: int, now: int) -> None:
        row = found.table.row(age)
        own, squares = found.means, self._squares
        for place in range(_MEANS):
            change, before = count * row[place], own[place]
            own[place] = before + change
            squares[place] += change * (2 * before + change)
            self._means[place] += change
            self._variances[place] += count * row[place + _MEANS]
        elapsed = (now - self.at) / SECOND_US
        done, pace = found.table.produced(age), found.table.pace if found.table.is_producing(age) else 0.0
        self._pace += count * pace
        self._produced += count * (done - pace * elapsed)

    def refresh(self, now: int) -> None:
        """Sum anew. Calls of a kind whose ages have the same row are counted, and only changed counts are summed."""
        self._clear(now)
        places = _Places(now)
        totals, squares = [0.0] * (2 * _MEANS), self._squares
        for key, found in self.kinds.items():
            table = found.table
            if now - table.made_at > TABLE_US:
                table = self._table(key, table.expected, now)
            first, full = table.first, table.full_at
            counts = [0] * len(AGES)
            producing, complete, ages = 0, 0, 0.0
            for slot, count in found.slots.items():
                age, number = places[slot]
                counts[number] += count
                if first < age < full:
                    producing += count
                    ages += count * age
                elif age >= full:
                    complete += count
            own = found.summed(table, counts)
            totals = [total + each for total, each in zip(totals, own)]  # noqa: B905
            found.means = means = own[:_MEANS]
            squares = [square + mean * mean for square, mean in zip(squares, means)]  # noqa: B905
            self._pace += producing * table.pace
            self._produced += complete * table.most + table.pace * (ages - producing * first)
        self._squares = squares
        self._means, self._variances = totals[:_MEANS], totals[_MEANS:]

    # -- what is asked ------------------------------------------------------------------------------------------------

    def produced(self, now: int) -> int:
        """What the open calls have produced by ``now``."""
        if now - self.at > REFRESH_US:
            self.refresh(now)
        return int(self._produced + self._pace * (now - self.at) / SECOND_US)

    def gross(self, bucket: Bucket, now: int) -> int:
        """What the upstream has left. It refills while output is produced, so it stays full if that is slower."""
        elapsed = max(0, now - bucket.at)
        made = int(self._pace * elapsed / SECOND_US)
        before = min(bucket.burst, bucket.level + bucket.held + bucket.foreseen - self.produced(now) + made)
        return min(bucket.burst, before + (bucket.amount - bucket.outside) * elapsed // MINUTE_US - made)

    def free(self, bucket: Bucket, kind: Kind, most: int, hold: int, count: int, now: int) -> int:
        """``count`` calls that hold ``hold`` each, of at most ``most`` tokens of output, may pass if this is not below
        what they hold together."""
        self.asked_at = now
        gross = self.gross(bucket, now)
        rounding = 0 if bucket.constraint is None else bucket.constraint.rounding
        margin = (rounding + 1) // 2 + min(bucket.amount * MARGIN_US // MINUTE_US, bucket.burst // MARGIN_PART)
        if not self.calls:
            # A lone call is not to be made impossible: it passes when the upstream has all of its burst left.
            beyond = max(0, bucket.need(hold) - bucket.burst) if count == 1 else 0
            return beyond + (gross - margin if gross < bucket.burst else gross)
        rate = (bucket.amount - bucket.outside) / 60
        row = self._table((kind, bin_of(most)), hold, now).row(0.0)
        least = gross - margin
        for place, horizon in enumerate(HORIZONS):
            spread = self._variances[place] + count * row[place + _MEANS] + TAU * TAU * self._squares[place]
            coming = self._means[place] + count * row[place] + Z * max(0.0, spread) ** 0.5
            least = min(least, gross - margin + int(rate * horizon - coming))
        return hold * count + least


def _key_of(reservation: Reservation) -> _Key:
    kind = (reservation.pool, reservation.tenant, reservation.route)
    return kind, bin_of(max(1, reservation.sizes.max_output_tokens))


def cap_of(number: int) -> int:
    """The most that a call may produce whose cap is in this bin."""
    octave = 1 << (number >> 1)
    return 2 * octave if number & 1 else max(1, 3 * octave // 2)


class Outlook:
    """The demands of one ledger's limits."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.demands: dict[int, Demand] = {}
        """By number of bucket: of those only that were short."""

    def watches(self, number: int, bucket: Bucket) -> bool:
        """Whether a limit is one that is charged as output is produced.

        Only readings tell how much the upstream has counted: without one, all that may come is held.
        """
        read = bucket.dimension is Dimension.OUTPUT_TOKENS and bucket.is_read and bucket.constraint is not None
        return read or number in self.demands

    def level(
        self,
        number: int,
        bucket: Bucket,
        level: int,
        need: int,
        kind: Kind,
        most: int,
        hold: int,
        count: int,
        now: int,
    ) -> int:
        """What ``count`` calls may use: ``level``, which is net of all holds, unless output is looked at over time.

        It begins to be when the level is less than ``need``.
        """
        demand = self.demands.get(number)
        if demand is None:
            if level >= need or not self.watches(number, bucket):
                return level
            demand = self.demand(number, now)
        return demand.free(bucket, kind, most, hold, count, now)

    def demand(self, number: int, now: int) -> Demand:
        """That of one limit; it is made from the books if need be."""
        demand = self.demands.get(number)
        if demand is None:
            demand = self.demands[number] = Demand(self._state)
            for reservation in self._state.open_in[self._state.buckets[number].pool].values():
                if number in reservation.buckets:
                    demand.opened(reservation, now)
        return demand

    def read(self, number: int, bucket: Bucket, remaining: int, now: int) -> None:
        """The upstream says what is left: if that is little, what is still to come is looked at from now on."""
        if remaining * TIGHT < bucket.burst:
            self.demand(number, now).asked_at = now

    def least_wait_us(self, number: int) -> int:
        """What is to come changes with every piece of output: to look again sooner is of no use."""
        return LOOK_US if number in self.demands else 0

    def opened(self, key: str, now: int) -> None:
        """A reservation was opened."""
        reservation = self._state.open[key]
        for number in reservation.buckets:
            demand = self.demands.get(number)
            if demand is not None:
                demand.opened(reservation, now)

    def ends(self, key: str, now: int) -> None:
        """A reservation is about to end."""
        reservation = self._state.open.get(key)
        for number in () if reservation is None else reservation.buckets:
            demand = self.demands.get(number)
            if demand is not None and reservation is not None:
                demand.ended(reservation, now)
                if now - demand.asked_at > IDLE_US:
                    del self.demands[number]
