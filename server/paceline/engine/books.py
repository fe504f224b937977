"""The books at one instant: the state, and the only way to change it.

Everything that decides works through this: it reads the state, and :meth:`Books.emit` folds an event into it and
keeps the event for the journal.
"""

from __future__ import annotations

import msgspec

from paceline.engine import answers as an
from paceline.engine import events as ev
from paceline.engine import operations as op
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import UNLIMITED, Dimension, Limit, Window
from paceline.engine.outlook import Outlook
from paceline.engine.queue import Claims
from paceline.engine.recipe import Recipe
from paceline.engine.state import Share, State
from paceline.engine.terms import Part
from paceline.engine.trail import Trail
from paceline.engine.urgent import Urgent

MAX_PLANS = 16_384
FORESEEN_PART = 256
"""What is foreseen is noted in steps of such a part of the burst."""
FULL = 1_000
"""A full bucket, in thousandths."""


class Caps(msgspec.Struct, frozen=True):
    """What one ledger keeps at most."""

    ended: int = 250_000
    """Ended reservations remembered; about 400 bytes each."""
    memory_us: int = 3_600_000_000
    """How long they are remembered."""
    waiters: int = 20_000
    """Waiting Reserves."""
    waiters_per_tenant: int = 10_000
    open: int = 200_000
    """Open reservations; about 700 bytes each."""
    pools: int = 1_024
    shares: int = 4_096
    buckets: int = 32_768
    """Limits: of pools, and of shares in each pool that they have called."""
    modes: int = 8_192
    """Modes set for pools and tenants."""
    tickets_per_waiter: int = 16
    """Repeats of one waiting Reserve that are answered."""


class Books:
    """State, time and the events of the step at hand."""

    def __init__(self, state: State, caps: Caps) -> None:
        self.state = state
        self.caps = caps
        self.now = state.at
        self.events: list[ev.Event] = []
        self.generation = 0
        """Counts changes of definitions."""
        self._plans: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = {}
        self._recipes: dict[tuple[str, tuple[int, ...]], Recipe] = {}
        self._touched: dict[tuple[int, ...], an.Touched] = {}
        self._trails: dict[int, Trail | None] = {}
        self.outlook = Outlook(state)
        self.claims = Claims()
        """What is set aside for large calls that wait."""
        self.urgent: dict[int, Urgent] = {}
        """What urgent calls take of the limits that others wait for, by bucket."""

    def begin(self, now: int) -> None:
        """Start a step at ``now``; time never goes back."""
        self.now = max(now, self.now)
        self.events = []
        self._touched = {}

    def emit(self, event: ev.Event) -> None:
        """Fold an event into the state and keep it for the journal."""
        if not self.events:
            clocked = ev.Clocked(self.now)
            self.state.apply(clocked)
            self.events.append(clocked)
        if self.outlook.demands:
            self._apply_watched(event)
        else:
            self.state.apply(event)
        self.events.append(event)

    def _apply_watched(self, event: ev.Event) -> None:
        if isinstance(event, ev.Settled | ev.Released | ev.Expired):
            self.outlook.ends(event.key, self.now)
        self.state.apply(event)
        if isinstance(event, ev.Granted):
            self.outlook.opened(event.key, self.now)

    def advance(self, number: int) -> Bucket:
        """Bring a bucket to the present before it changes."""
        bucket = self.state.buckets[number]
        if bucket.at < self.now:
            if number in self.outlook.demands or bucket.foreseen:
                self._foresee(number, bucket)
            refilled, carry = bucket.refill(self.now)
            trail = self.trail(number)
            if trail is not None:
                shift = self.unproduced(number, bucket) - bucket.corrected
                trail.note(bucket.at, bucket.level + shift)
                trail.note(self.now, bucket.level + refilled + shift)
            self.emit(ev.Advanced(number, refilled, carry, bucket.lost(self.now, refilled)))
        return bucket

    def _foresee(self, number: int, bucket: Bucket) -> None:
        """Take what open calls have produced beyond their holds off the level, so that it refills like upstream's."""
        ahead = max(0, self.outlook.demand(number, self.now).produced(self.now) - bucket.held)
        ahead = min(ahead, max(0, bucket.foreseen + bucket.level) + bucket.burst)
        if abs(ahead - bucket.foreseen) * FORESEEN_PART > bucket.burst or (bucket.foreseen and not ahead):
            self.emit(ev.Foreseen(number, ahead))

    def unproduced(self, number: int, bucket: Bucket) -> int:
        """What our level is below the upstream's, because that counts output as it is produced; zero for others."""
        demand = self.outlook.demands.get(number)
        return 0 if demand is None else bucket.held + bucket.foreseen - demand.produced(self.now)

    def trail(self, number: int) -> Trail | None:
        """Where the level of a bucket was; ``None`` for those of which no reading can be compared with it.

        Of output it is kept as long as what is still to come is looked at: else nothing says what the upstream has
        counted of it.

        Soft: it begins anew with every process, and from the first call, since readings are of calls that began before.
        """
        bucket = self.state.buckets[number]
        if bucket.dimension is Dimension.OUTPUT_TOKENS and number not in self.outlook.demands:
            self._trails.pop(number, None)
            return None
        try:
            return self._trails[number]
        except KeyError:
            learns = bucket.is_read and self.state.pools[bucket.pool].learn
            trail = self._trails[number] = Trail() if learns else None
            return trail

    def advance_all(self, numbers: tuple[int, ...]) -> None:
        """Bring these buckets to the present."""
        buckets, now = self.state.buckets, self.now
        for number in numbers:
            if buckets[number].at < now:
                self.advance(number)

    # -- what a call touches -------------------------------------------------------------------------------------

    def defined(self) -> None:
        """Pools or shares have changed: forget what was derived from them."""
        self.generation += 1
        self._trails = {number: trail for number, trail in self._trails.items() if trail is not None}
        self._plans.clear()
        self._recipes.clear()

    def recipe(self, pool: str, numbers: tuple[int, ...]) -> Recipe:
        """How calls to a pool are charged in these buckets."""
        recipe = self._recipes.get((pool, numbers))
        if recipe is None:
            if len(self._recipes) >= MAX_PLANS:
                self._recipes.clear()
            recipe = Recipe(self.state.pools[pool].profile, numbers, self.state.buckets)
            self._recipes[pool, numbers] = recipe
        return recipe

    def plan(self, pool: str, shares: tuple[str, ...]) -> tuple[int, ...] | None:
        """The buckets that a call touches: the pool's, those of its shares' caps, the account's spend; money last.

        Makes those of caps when they are first touched. ``None``: the ledger has no place for them.
        """
        plan = self._plans.get((pool, shares))
        if plan is None:
            plan = self._make_plan(pool, shares)
            if plan is not None:
                if len(self._plans) >= MAX_PLANS:
                    self._plans.clear()
                self._plans[pool, shares] = plan
        return plan

    def planned(self, pool: str, shares: tuple[str, ...]) -> tuple[int, ...] | None:
        """:meth:`plan` without those of caps that nothing has touched yet: they are full. Changes nothing."""
        plan = self._plans.get((pool, shares))
        return self._make_plan(pool, shares, make=False) if plan is None else plan

    def _make_plan(self, pool: str, shares: tuple[str, ...], *, make: bool = True) -> tuple[int, ...] | None:
        state = self.state
        counted = {rule.dimension for rule in state.pools[pool].profile.rules}
        numbers = [number for number in state.pools[pool].buckets if state.buckets[number].dimension in counted]
        wanted: list[tuple[str, str, Limit]] = []
        money: list[tuple[str, str, Limit]] = []
        for name in shares:
            share = state.shares.get(name)
            for cap in self._caps_of(pool, share) if share is not None else ():
                if cap.dimension is Dimension.SPEND:
                    money.append(("", name, cap))
                elif cap.dimension in counted:
                    wanted.append((pool, name, cap))
        money.append(("", "", Limit(Dimension.SPEND, Window.MONTH, UNLIMITED)))
        for scope, name, limit in wanted + money:
            number = state.addresses.get((scope, name, limit.dimension, limit.window))
            if number is None:
                if not make:
                    continue
                if len(state.buckets) >= self.caps.buckets:
                    return None
                number = self.add_bucket(scope, name, limit, FULL, guessed=self._is_guessed(pool, name, limit))
            numbers.append(number)
        return tuple(numbers)

    def _caps_of(self, pool: str, share: Share) -> tuple[Limit, ...]:
        if not share.cap_parts:
            return share.caps
        return share.caps + tuple(limit for part in share.cap_parts if (limit := self.part(pool, part)) is not None)

    def _is_guessed(self, pool: str, name: str, limit: Limit) -> bool:
        """Whether a cap is a part of a limit that nobody has said."""
        share, key = self.state.shares.get(name), (limit.dimension, limit.window)
        if share is None or all((part.dimension, part.window) != key for part in share.cap_parts):
            return False
        own = self.state.addresses.get((pool, "", *key))
        return own is not None and self.state.buckets[own].guessed

    def part(self, pool: str, part: Part) -> Limit | None:
        """A part of a pool's own limit as it is now; ``None``: the pool has none of this dimension and window."""
        number = self.state.addresses.get((pool, "", part.dimension, part.window))
        if number is None:
            return None
        bucket = self.state.buckets[number]
        return part.of(Limit(bucket.dimension, bucket.window, bucket.amount, bucket.burst))

    def add_bucket(self, scope: str, share: str, limit: Limit, fill: int, *, guessed: bool = False) -> int:
        """Make a bucket, ``fill`` thousandths full; its number."""
        level = limit.capacity * fill // FULL
        self.emit(
            ev.BucketAdded(
                scope,
                share,
                limit.dimension,
                limit.window,
                limit.amount,
                limit.capacity,
                level,
                override=False,
                guessed=guessed,
            )
        )
        self.defined()
        return len(self.state.buckets) - 1

    # -- what answers say ----------------------------------------------------------------------------------------

    def context(self, key: str, first: str, count: int) -> op.Context:
        """The context of the grant of ``key``, whose first (or only) reservation is ``first``."""
        state = self.state
        reservation = state.open.get(first)
        if reservation is not None:
            return op.Context(
                state.ledger,
                key,
                reservation.pool,
                reservation.shares,
                reservation.tenant,
                reservation.route,
                reservation.granted_at,
                self.recipe(reservation.pool, reservation.buckets).by_dimension(reservation.holds),
                reservation.prices,
                count,
            )
        ended = state.ended.get(first)
        if ended is None or ended.granted_at is None:
            # Forgotten: a Commit under this context will be stale, as it must.
            return op.Context(state.ledger, key, "", (), "", "", state.horizon, (), op.NO_PRICES, count)
        charges = self.recipe(ended.pool, ended.buckets).by_dimension(ended.holds or ended.charges)
        return op.Context(
            state.ledger, key, ended.pool, ended.shares, "", "", ended.granted_at, charges, ended.prices, count
        )

    def touched(self, numbers: tuple[int, ...]) -> an.Touched:
        """The state of these buckets at the end of the step."""
        touched = self._touched.get(numbers)
        if touched is None:
            touched = self._touched[numbers] = an.Touched()
        return touched

    def finish(self) -> None:
        """End a step: fill in what the answers say of the buckets."""
        for numbers, touched in self._touched.items():
            self._fill(touched, numbers)

    def _fill(self, touched: an.Touched, numbers: tuple[int, ...]) -> None:
        binding: Dimension | None = None
        least = 0.0
        states = []
        for number in numbers:
            bucket = self.state.buckets[number]
            level = bucket.level + bucket.refill(self.now)[0] if bucket.at < self.now else bucket.level
            states.append(
                an.DimensionState(
                    bucket.pool,
                    bucket.share,
                    bucket.dimension,
                    bucket.window,
                    bucket.amount,
                    bucket.burst,
                    level,
                    bucket.held,
                )
            )
            left = level / bucket.burst if bucket.burst else 0.0
            if binding is None or left < least:
                binding, least = bucket.dimension, left
        touched.binding, touched.dimensions = binding, tuple(states)
