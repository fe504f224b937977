"""The ends of reservations: Commit, Release, expiry; and what comes in between, Renew.

Every reservation ends once. What comes later either is the same answer again, or replaces what an expiry had assumed;
it never adds a second charge.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import islice

import msgspec

from paceline.engine import answers as an
from paceline.engine import events as ev
from paceline.engine import operations as op
from paceline.engine.accounting import Prices, Sizes, Usage, UsageKind, expected_usage
from paceline.engine.answers import Answer
from paceline.engine.audit import Kind
from paceline.engine.books import Books
from paceline.engine.bucket import EndKind
from paceline.engine.dimensions import Dimension, Window
from paceline.engine.keys import child_keys
from paceline.engine.operations import Disposition, Refusal
from paceline.engine.reserving import Reserving
from paceline.engine.sizes import fill
from paceline.engine.state import Ended, Reservation
from paceline.engine.stats import Stats
from paceline.engine.teaching import FLIGHT_US, UNKNOWN_CALL, Call, Teacher

_FORGOTTEN_AT_ONCE = 1_000
"""Ended reservations, for their age, in one step: about 2 ms."""
_SPARE = 4_096
"""Expiries of ended reservations, kept beyond as many as are open, before they are swept."""
_NO_ANSWER = op.Outcome(Disposition.NO_RESPONSE)


class Charged(msgspec.Struct, frozen=True):
    """What stands in each bucket, what upstream may have counted beyond it, and the cost in nano-dollars.

    ``stated`` is what the answer says: the amounts by dimension, without those of shares.
    """

    stated: tuple[tuple[Dimension, int], ...]
    amounts: tuple[int, ...]
    overs: tuple[int, ...]
    cost: int


class Settling:
    """Ends reservations."""

    def __init__(self, books: Books, reserving: Reserving, teacher: Teacher, stats: Stats) -> None:
        self._books = books
        self._reserving = reserving
        self._teacher = teacher
        self._stats = stats
        self._hindsight = stats.hindsight
        self._audit = stats.audit
        self._expiries = [(one.expires_at, one.key) for one in books.state.open.values()]
        heapify(self._expiries)

    def watch(self, expires_at: int, key: str) -> None:
        """A reservation was opened, or its expiry moved."""
        heappush(self._expiries, (expires_at, key))
        if len(self._expiries) > 2 * len(self._books.state.open) + _SPARE:
            self._expiries = [(one.expires_at, one.key) for one in self._books.state.open.values()]
            heapify(self._expiries)

    # -- Commit -------------------------------------------------------------------------------------------------

    def commit(self, operation: op.Commit) -> Answer:
        """Settle a reservation by what its call did cost."""
        state = self._books.state
        reservation = state.open.get(operation.key)
        if reservation is not None:
            return self._commit_open(reservation, operation.outcome)
        context = operation.context
        if context is None and operation.key in self._reserving.waiting:
            return an.Invalid("reservation_id", "still waits: there is no grant to commit; release it instead")
        ended = state.ended.get(operation.key)
        if ended is not None and (ended.granted_at is not None or context is None):
            return self._commit_ended(operation, ended)
        if context is None:
            return an.Invalid("context", "is needed, because the reservation is not known here")
        if context.count > 1 and context.key == operation.key:
            return an.Invalid("reservation_id", "is a bulk grant: commit its child reservations")
        return self._commit_forgotten(operation.key, context, operation.outcome)

    def _commit_open(self, reservation: Reservation, outcome: op.Outcome) -> Answer:
        books = self._books
        numbers = reservation.buckets
        charged = self._charge_reservation(reservation, outcome)
        forfeits = self.forfeits(numbers, reservation.holds, charged.amounts, reservation.ordinal)
        coming, going = _stated(outcome)
        books.emit(ev.Settled(reservation.key, charged.amounts, forfeits, charged.overs, charged.cost, coming, going))
        self._stats.settled(reservation.pool, outcome)
        self._reserving.turns.settled(reservation, charged.amounts)
        self._hindsight.settled(
            reservation.key,
            reservation.pool,
            reservation.tenant,
            outcome,
            charged.amounts,
            forfeits,
            (numbers, reservation.holds),
        )
        self._ended(Kind.SETTLED, reservation, charged.amounts, charged.cost)
        if outcome.observation is not None:
            self._teacher.observe(
                reservation.pool,
                outcome.observation,
                books.now,
                Call(reservation.granted_at, numbers, charged.amounts),
                Call(reservation.granted_at, numbers, reservation.holds),
            )
        elif outcome.disposition is Disposition.SUCCEEDED:
            self._teacher.accepted(reservation.pool, reservation.granted_at, books.now)
        self._teacher.hold_to_readings(numbers, books.now)
        return an.Committed(charged.stated, charged.cost)

    def _commit_ended(self, operation: op.Commit, ended: Ended) -> Answer:
        books, outcome = self._books, operation.outcome
        if ended.kind is EndKind.TOGETHER:
            return an.Invalid("reservation_id", "is a bulk grant: commit its child reservations")
        if ended.kind is EndKind.TOMBSTONE:
            return an.Invalid("reservation_id", "was released before it was granted: there is nothing to commit")
        charges = ended.charges
        if ended.kind is EndKind.SETTLED:
            return an.Committed(
                books.recipe(ended.pool, ended.buckets).by_dimension(charges), ended.cost, duplicate=True
            )
        charged = self._charge(
            ended.pool, ended.buckets, ended.holds, ended.prices, ended.sizes, ended.output_tokens, outcome
        )
        forfeits = self.forfeits(ended.buckets, charges, charged.amounts, ended.ordinal, ended.ended_at)
        books.emit(ev.Replaced(operation.key, charged.amounts, forfeits, charged.overs, charged.cost))
        self._stats.settled(ended.pool, outcome)
        self._hindsight.settled(operation.key, ended.pool, "", outcome, charged.amounts, forfeits)
        self._audit.ended(
            books.now,
            Kind.SETTLED,
            operation.key,
            ended.pool,
            ended.shares,
            "",
            ended.buckets,
            charged.amounts,
            charged.cost,
        )
        self._teacher.observe(
            ended.pool,
            outcome.observation,
            books.now,
            Call(ended.granted_at, ended.buckets, charged.amounts),
            Call(ended.granted_at, ended.buckets, ended.holds),
        )
        self._teacher.hold_to_readings(ended.buckets, books.now)
        return an.Committed(charged.stated, charged.cost, late=True)

    def _again(self, ended: Ended) -> Answer:
        """The first answer, marked."""
        if not ended.buckets:
            return an.Committed(duplicate=True)
        charges = self._books.recipe(ended.pool, ended.buckets).by_dimension(ended.charges)
        return an.Committed(charges, ended.cost, duplicate=True)

    def _commit_forgotten(self, key: str, context: op.Context, outcome: op.Outcome) -> Answer:
        """Book a call from the context of its grant; this ledger has lost or never had the reservation."""
        books = self._books
        if context.pool not in books.state.pools:
            return an.Invalid("context", "names a pool that this ledger does not have")
        if self.is_stale(context.granted_at):
            self._teacher.observe(context.pool, outcome.observation, books.now, UNKNOWN_CALL, UNKNOWN_CALL)
            return an.Committed(stale=True)
        numbers = books.plan(context.pool, context.shares)
        if numbers is None:
            return an.Invalid("context", f"the ledger has its most limits ({books.caps.buckets})", full=True)
        frozen = dict(context.charges)
        holds = tuple(frozen.get(books.state.buckets[number].dimension, 0) for number in numbers)
        charged = self._charge(context.pool, numbers, holds, context.prices, None, None, outcome)
        made_at = max(context.granted_at, self._made_at(outcome))
        self._book(key, context.pool, context.shares, numbers, charged, context.granted_at, made_at)
        self._stats.settled(context.pool, outcome)
        self._hindsight.settled(key, context.pool, context.tenant, outcome)
        self._audit.ended(
            books.now,
            Kind.SETTLED,
            key,
            context.pool,
            context.shares,
            context.tenant,
            numbers,
            charged.amounts,
            charged.cost,
        )
        self._teacher.observe(
            context.pool,
            outcome.observation,
            books.now,
            Call(context.granted_at, numbers, charged.amounts),
            Call(context.granted_at, numbers, holds),
        )
        self._teacher.hold_to_readings(numbers, books.now)
        return an.Committed(charged.stated, charged.cost, late=True)

    def is_stale(self, granted_at: int) -> bool:
        """Whether a grant of that instant may have been settled and forgotten."""
        return granted_at <= self._books.state.horizon or granted_at < self._books.now - self._books.caps.memory_us

    def observe(self, operation: op.Observe) -> Answer:
        """Book a call that was made without a grant."""
        books, candidate, outcome = self._books, operation.candidate, operation.outcome
        if operation.key:
            ended = books.state.ended.get(operation.key)
            if ended is not None:
                return self._again(ended)
            if operation.key in books.state.open or operation.key in self._reserving.waiting:
                return an.Invalid("observation_id", "is the id of a reservation")
        pool = books.state.pools.get(candidate.pool)
        if pool is None:
            return an.Invalid("target", "has no pool in this ledger")
        numbers = books.plan(candidate.pool, candidate.shares)
        if numbers is None:
            return an.Invalid("tenant", f"the ledger has its most limits ({books.caps.buckets})", full=True)
        kind = (candidate.pool, operation.tenant, operation.route)
        sizes, _ = fill(books.state.learned, pool.profile, kind, candidate.estimate)
        holds = books.recipe(candidate.pool, numbers).holds(sizes, candidate.prices)
        charged = self._charge(candidate.pool, numbers, holds, candidate.prices, sizes, None, outcome)
        made_at = self._made_at(outcome, operation.age_us)
        # How long it was under way is not known: no reading is taken to have missed it.
        granted_at = books.now if made_at == books.now else made_at - FLIGHT_US
        self._book(operation.key, candidate.pool, candidate.shares, numbers, charged, granted_at, made_at)
        self._stats.settled(candidate.pool, outcome)
        self._hindsight.settled(operation.key, candidate.pool, operation.tenant, outcome)
        self._audit.ended(
            books.now,
            Kind.SETTLED,
            operation.key,
            candidate.pool,
            candidate.shares,
            operation.tenant,
            numbers,
            charged.amounts,
            charged.cost,
        )
        self._teacher.observe(
            candidate.pool,
            outcome.observation,
            books.now,
            Call(None, numbers, charged.amounts),
            Call(None, numbers, holds),
        )
        self._teacher.hold_to_readings(numbers, books.now)
        return an.Committed(charged.stated, charged.cost)

    def _book(
        self,
        key: str,
        pool: str,
        shares: tuple[str, ...],
        numbers: tuple[int, ...],
        charged: Charged,
        granted_at: int,
        made_at: int,
    ) -> None:
        """Charge a call that upstream had begun to count by ``made_at``.

        What the buckets have lost since makes up for it: they would have lost less, had it been booked in time.
        """
        books = self._books
        books.advance_all(numbers)
        absorbed: tuple[int, ...] = ()
        if made_at < books.now:
            buckets = books.state.buckets
            absorbed = tuple(
                min(charge, buckets[number].losses.since(made_at))
                for number, charge in zip(numbers, charged.amounts, strict=True)
            )
        late = None if made_at == books.now else made_at
        books.emit(
            ev.Booked(
                key, pool, shares, numbers, charged.amounts, charged.overs, granted_at, charged.cost, late, absorbed
            )
        )

    def _made_at(self, outcome: op.Outcome, age_us: int = 0) -> int:
        """When upstream had begun to count a call, at the latest."""
        told = 0 if outcome.observation is None else outcome.observation.age_us
        return self._books.now - max(told, age_us)

    # -- what a call is charged in the end -------------------------------------------------------------------------

    def _charge_reservation(self, reservation: Reservation, outcome: op.Outcome) -> Charged:
        return self._charge(
            reservation.pool,
            reservation.buckets,
            reservation.holds,
            reservation.prices,
            reservation.sizes,
            reservation.output_tokens,
            outcome,
        )

    def _charge(
        self,
        pool: str,
        numbers: tuple[int, ...],
        holds: tuple[int, ...],
        prices: Prices,
        sizes: Sizes | None,
        output_tokens: int | None,
        outcome: op.Outcome,
    ) -> Charged:
        books = self._books
        if outcome.disposition is Disposition.NOT_SENT:
            nothing = (0,) * len(numbers)
            return Charged(books.recipe(pool, numbers).by_dimension(nothing), nothing, nothing, 0)
        usage = outcome.usage
        if outcome.unknown and usage is not None and sizes is not None:
            produced = sizes.output_tokens if output_tokens is None else output_tokens
            expected = expected_usage(msgspec.structs.replace(sizes, output_tokens=produced))
            usage = msgspec.structs.replace(usage, **{name: getattr(expected, name) for name in outcome.unknown})
        if outcome.usage_kind is UsageKind.MISSING or usage is None:
            refused_counts = books.state.pools[pool].profile.refused_counts
            usage = _unreported(sizes, output_tokens, outcome, refused_counts)
        recipe = books.recipe(pool, numbers)
        most = None
        if outcome.usage_kind is not UsageKind.FINAL:
            most = books.state.pools[pool].profile.max_output_tokens if sizes is None else sizes.max_output_tokens
        amounts, overs = recipe.charges(usage, prices, holds, most)
        return Charged(recipe.by_dimension(amounts), amounts, overs, amounts[recipe.spend])

    def forfeits(
        self,
        numbers: tuple[int, ...],
        holds: tuple[int, ...],
        charges: tuple[int, ...],
        ordinal: int,
        ended_at: int | None = None,
    ) -> tuple[int, ...]:
        """What of each refund may not be credited. Brings the buckets to the present.

        What ended at ``ended_at``, in a month that is over, gives nothing back to this one.
        """
        self._books.advance_all(numbers)
        buckets = self._books.state.buckets
        forfeits = []
        for number, hold, charge in zip(numbers, holds, charges, strict=True):
            bucket = buckets[number]
            back = hold - charge
            if back <= 0 or (not bucket.peaks.levels and bucket.level + back < bucket.burst and ended_at is None):
                forfeits.append(0)
            elif ended_at is not None and bucket.window is Window.MONTH and ended_at < bucket.turned_at:
                forfeits.append(back)
            else:
                forfeits.append(back - bucket.credit(ordinal, back))
        return tuple(forfeits)

    # -- Release, expiry, forgetting --------------------------------------------------------------------------------

    def release(self, operation: op.Release) -> Answer:
        """The call was never made."""
        key, state = operation.key, self._books.state
        reservation = state.open.get(key)
        if reservation is not None:
            self._release_open(reservation)
            return an.Released(released=True)
        if key in self._reserving.waiting:
            self._reserving.withdraw(key)
            self._books.emit(ev.Tombstoned(key))
            return an.Released(released=True)
        ended = state.ended.get(key)
        if ended is None:
            context = operation.context
            if context is not None and context.count > 1 and context.key == key:
                return self._release_all(child_keys(key, context.count))
            if context is not None and self.is_stale(context.granted_at):
                return an.Released(stale=True)
            self._books.emit(ev.Tombstoned(key))
            return an.Released(tombstone=True)
        if ended.kind is EndKind.TOGETHER:
            return self._release_all(ended.keys)
        if ended.kind is EndKind.EXPIRED:
            nothing = (0,) * len(ended.buckets)
            forfeits = self.forfeits(ended.buckets, ended.charges, nothing, ended.ordinal, ended.ended_at)
            self._books.emit(ev.Replaced(key, nothing, forfeits, nothing, 0, released=True))
            self._audit.ended(self._books.now, Kind.RELEASED, key, ended.pool, ended.shares, "", ended.buckets, nothing)
            self._teacher.hold_to_readings(ended.buckets, self._books.now)
            return an.Released(released=True, late=True)
        return an.Released(duplicate=True)

    def _release_all(self, keys: tuple[str, ...]) -> Answer:
        """Release what is still open of a bulk grant."""
        still_open = [reservation for key in keys if (reservation := self._books.state.open.get(key)) is not None]
        for reservation in still_open:
            self._release_open(reservation)
        return an.Released(released=bool(still_open), duplicate=not still_open)

    def _release_open(self, reservation: Reservation) -> None:
        nothing = (0,) * len(reservation.holds)
        forfeits = self.forfeits(reservation.buckets, reservation.holds, nothing, reservation.ordinal)
        self._books.emit(ev.Released(reservation.key, forfeits))
        self._hindsight.released(reservation.key, forfeits)
        self._ended(Kind.RELEASED, reservation, nothing, 0)
        self._teacher.hold_to_readings(reservation.buckets, self._books.now)

    def expire(self) -> None:
        """End every hold whose time is up; what it may have used stays charged."""
        expiries, now = self._expiries, self._books.now
        while expiries and expiries[0][0] <= now:
            expires_at, key = heappop(expiries)
            reservation = self._books.state.open.get(key)
            if reservation is None or reservation.expires_at != expires_at:
                continue
            self._expire(reservation)

    def expire_now(self, operation: op.Expire) -> Answer:
        """End a hold before its time."""
        state = self._books.state
        ended = state.ended.get(operation.key)
        keys = ended.keys if ended is not None and ended.kind is EndKind.TOGETHER else (operation.key,)
        still_open = [reservation for key in keys if (reservation := state.open.get(key)) is not None]
        if not still_open:
            return an.Invalid("reservation_id", "is not an open reservation")
        for reservation in still_open:
            self._expire(reservation)
        return an.Done()

    def _expire(self, reservation: Reservation) -> None:
        charged = self._charge_reservation(reservation, _NO_ANSWER)
        numbers = reservation.buckets
        forfeits = self.forfeits(numbers, reservation.holds, charged.amounts, reservation.ordinal)
        self._books.emit(ev.Expired(reservation.key, charged.amounts, forfeits, charged.overs, charged.cost))
        self._teacher.hold_to_readings(numbers, self._books.now)
        self._stats.expired(reservation.pool)
        self._hindsight.expired(reservation.key, charged.amounts, forfeits)
        self._ended(Kind.EXPIRED, reservation, charged.amounts, charged.cost)

    def _ended(self, kind: Kind, reservation: Reservation, charges: tuple[int, ...], cost: int) -> None:
        self._audit.ended(
            self._books.now,
            kind,
            reservation.key,
            reservation.pool,
            reservation.shares,
            reservation.tenant,
            reservation.buckets,
            charges,
            cost,
        )

    def forget(self) -> None:
        """Bound the memory of ended reservations, in number and in age; after a pause, over some steps."""
        ended = self._books.state.ended
        count = max(0, len(ended) - self._books.caps.ended)
        oldest = self._books.now - self._books.caps.memory_us
        for entry in islice(ended.values(), count, max(count, _FORGOTTEN_AT_ONCE)):
            if entry.ended_at >= oldest:
                break
            count += 1
        if count:
            self._books.emit(ev.Forgotten(count))

    def wake_at(self) -> int | None:
        """When the next hold expires."""
        expiries = self._expiries
        while expiries:
            expires_at, key = expiries[0]
            reservation = self._books.state.open.get(key)
            if reservation is not None and reservation.expires_at == expires_at:
                return expires_at
            heappop(expiries)
        return None

    # -- Renew ------------------------------------------------------------------------------------------------------

    def renew(self, operation: op.Renew) -> Answer:
        """The call goes on."""
        books = self._books
        reservation = books.state.open.get(operation.key)
        if reservation is None:
            return self._renew_ended(operation)
        output = reservation.output_tokens
        if operation.output_tokens is not None:
            output = max(output or 0, operation.output_tokens)
        expires_at = reservation.expires_at
        if operation.hold_us is not None:
            expires_at = max(expires_at, books.now + operation.hold_us)
        sizes, holds, overs = self._resized(reservation, output, operation.usage)
        shrunk = any(hold < before for hold, before in zip(holds, reservation.holds, strict=True))
        now_known = (expires_at, output, sizes, holds)
        if now_known != (reservation.expires_at, reservation.output_tokens, reservation.sizes, reservation.holds):
            books.advance_all(reservation.buckets)
            forfeits: tuple[int, ...] = ()
            if shrunk:
                forfeits = self.forfeits(reservation.buckets, reservation.holds, holds, reservation.ordinal)
            changed = None if sizes == reservation.sizes else sizes
            books.emit(ev.Renewed(operation.key, expires_at, output, holds, overs, changed, forfeits))
            if expires_at != reservation.expires_at:
                self.watch(expires_at, operation.key)
        call = Call(reservation.granted_at, reservation.buckets, holds)
        self._teacher.observe(reservation.pool, operation.observation, books.now, call, call)
        if shrunk:
            self._teacher.hold_to_readings(reservation.buckets, books.now)
        return an.Renewed(expires_at - books.now)

    def _renew_ended(self, operation: op.Renew) -> Answer:
        state, context = self._books.state, operation.context
        if context is None and operation.key in self._reserving.waiting:
            return an.Invalid("reservation_id", "still waits: there is no grant to renew")
        ended = state.ended.get(operation.key)
        if ended is not None and ended.kind is EndKind.TOGETHER:
            still_open = [child for child in ended.keys if child in state.open]
            answers = [self.renew(msgspec.structs.replace(operation, key=child, usage=None)) for child in still_open]
            return answers[0] if answers else an.Renewed(ended=True)
        if ended is not None:
            call = Call(ended.granted_at, ended.buckets, ended.charges)
            self._teacher.observe(ended.pool, operation.observation, self._books.now, call, call)
            late = ended.kind is EndKind.EXPIRED
            return an.Renewed(ended=not late, late=late)
        if context is None:
            return an.Invalid("context", "is needed, because the reservation is not known here")
        self._teacher.observe(context.pool, operation.observation, self._books.now, UNKNOWN_CALL, UNKNOWN_CALL)
        stale = self.is_stale(context.granted_at)
        return an.Renewed(stale=stale, late=not stale)

    def _resized(
        self, reservation: Reservation, output: int | None, usage: Usage | None
    ) -> tuple[Sizes, tuple[int, ...], tuple[int, ...]]:
        """Sizes and holds by the output so far and by what is known of the input; what may be counted beyond them.

        Output that was expected may still come, so its hold only grows. Input that upstream has counted is exact.
        """
        old, sizes = reservation.sizes, reservation.sizes
        if usage is not None:
            sizes = msgspec.structs.replace(
                sizes,
                input_tokens=usage.input_tokens + usage.cache_write_tokens,
                cached_input_tokens=usage.cache_read_tokens,
            )
        if sizes == old and (output is None or output <= old.output_tokens):
            return old, reservation.holds, reservation.overs
        grown = msgspec.structs.replace(sizes, output_tokens=max(output or 0, old.output_tokens))
        recipe = self._books.recipe(reservation.pool, reservation.buckets)
        wanted = recipe.holds(grown, reservation.prices)
        holds, overs = [], []
        for place, (number, before) in enumerate(zip(reservation.buckets, reservation.holds, strict=True)):
            exact = usage is not None and recipe.follows_usage(place)
            hold = wanted[place] if exact else max(before, wanted[place])
            over = reservation.overs[place]
            if self._books.state.buckets[number].dimension is Dimension.OUTPUT_TOKENS:
                over = max(0, over - (hold - before))
            elif hold > before:
                over = max(over, recipe.overs(grown, wanted)[place])
            holds.append(hold)
            overs.append(over)
        return sizes, tuple(holds), tuple(overs)


def _stated(outcome: op.Outcome) -> tuple[int | None, int | None]:
    """Uncached input and output of a call of which the response said all."""
    usage = outcome.usage
    if usage is None or outcome.usage_kind is not UsageKind.FINAL or outcome.unknown:
        return None, None
    return usage.input_tokens + usage.cache_write_tokens, usage.output_tokens


def _unreported(
    sizes: Sizes | None, output_tokens: int | None, outcome: op.Outcome, refused_counts: bool
) -> Usage | None:
    """What to book when the response told no usage; ``None``: what is held stands.

    A refusal uses no tokens. A failure before any output has used its input. A call whose answer never came may have
    used all that it held, or what Renew last reported.
    """
    requests = 1 if sizes is None else sizes.requests
    refusal = None if outcome.observation is None else outcome.observation.refusal
    if outcome.disposition is Disposition.REJECTED:
        counts = refusal is None or refusal is Refusal.OTHER or refused_counts
        return Usage(requests if counts else 0)
    if refusal is Refusal.OVERLOAD:
        return Usage(requests)
    if sizes is None:
        return None
    if output_tokens is not None:
        return expected_usage(msgspec.structs.replace(sizes, output_tokens=output_tokens))
    if outcome.disposition is Disposition.FAILED:
        return expected_usage(msgspec.structs.replace(sizes, output_tokens=0))
    return None
