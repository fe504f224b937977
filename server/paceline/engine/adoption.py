"""What a deposed owner had acknowledged and the store has lost: handed to the owner that followed, taken over there.

An owner whose last records were lost, and in whose place another one has gone on, throws its books away. But callers
rest on what it told them: :func:`testimony` says it, one :class:`~paceline.engine.operations.Adopt` for each key, and
:class:`Adopting` brings it into the other's books, by the same kinds of event as if it had been decided there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from paceline.engine import answers as an
from paceline.engine import events as ev
from paceline.engine.accounting import Sizes
from paceline.engine.answers import Answer
from paceline.engine.books import Books
from paceline.engine.bucket import EndKind
from paceline.engine.dimensions import GAUGES, Dimension, Window
from paceline.engine.operations import Adopt, Amounts
from paceline.engine.reserving import Reserving
from paceline.engine.settling import Settling
from paceline.engine.state import Ended, Reservation, State
from paceline.engine.teaching import Teacher

_NO_SIZES = Sizes(0, 0, 0, 0, 0)
_Address = tuple[str, str, Dimension, Window]


def testimony(state: State, events: Iterable[ev.Event]) -> list[Adopt]:
    """The present condition, in ``state``, of all that ``events`` have told of; they are folded into it already.

    In the order in which each was first told of. What ``state`` has forgotten since is left out.
    """
    told: list[Adopt] = []
    seen: set[str] = set()
    at = 0
    for place, event in enumerate(events):
        if isinstance(event, ev.Clocked):
            at = event.at
        elif isinstance(event, ev.Booked) and not event.key:
            told.append(_unnamed(state, event, at, place))
        elif isinstance(event, _OF_KEYS) and event.key not in seen:
            seen.add(event.key)
            reservation, ended = state.open.get(event.key), state.ended.get(event.key)
            if reservation is not None:
                told.append(_open(state, reservation, at))
            elif ended is not None:
                told.append(_ended(state, event.key, ended, at))
    return told


def whole_testimony(state: State) -> list[Adopt]:
    """All that ``state`` remembers, for a ledger that has begun anew without any of it."""
    ended = [
        _ended(state, key, one, state.at if one.granted_at is None else one.granted_at)
        for key, one in state.ended.items()
    ]
    return [*ended, *(_open(state, one, one.granted_at) for one in state.open.values())]


_OF_KEYS = (
    ev.Granted
    | ev.GrantedTogether
    | ev.Renewed
    | ev.Settled
    | ev.Released
    | ev.Expired
    | ev.Replaced
    | ev.Booked
    | ev.Tombstoned
)


def _open(state: State, one: Reservation, at: int) -> Adopt:
    return Adopt(
        one.key,
        at,
        None,
        one.granted_at,
        one.expires_at,
        one.pool,
        one.shares,
        one.tenant,
        one.route,
        one.priority,
        tuple(_amounts(state, one.buckets, one.holds, one.overs, ())),
        one.sizes,
        one.prices,
        one.index,
        one.output_tokens,
        one.max_output_tokens,
    )


def _ended(state: State, key: str, ended: Ended, at: int) -> Adopt:
    return Adopt(
        key,
        at,
        ended.kind,
        ended.granted_at,
        0,
        ended.pool,
        ended.shares,
        amounts=tuple(_amounts(state, ended.buckets, ended.holds or ended.charges, ended.overs, ended.charges)),
        sizes=ended.sizes,
        prices=ended.prices,
        index=ended.index,
        output_tokens=ended.output_tokens,
        max_output_tokens=ended.max_output_tokens,
        cost=ended.cost,
        keys=ended.keys,
    )


def _unnamed(state: State, event: ev.Booked, at: int, place: int) -> Adopt:
    """A call that is booked and not remembered gets a name, so that it is adopted once."""
    name = hashlib.blake2b(ev.encode([ev.Clocked(at), event]) + place.to_bytes(8, "big"), digest_size=16).hexdigest()
    amounts = tuple(_amounts(state, event.buckets, event.charges, event.overs, event.charges))
    return Adopt(
        f"unnamed/{name}",
        at,
        EndKind.SETTLED,
        event.granted_at,
        pool=event.pool,
        shares=event.shares,
        amounts=amounts,
        cost=event.cost,
    )


def _amounts(
    state: State,
    numbers: tuple[int, ...],
    holds: tuple[int, ...],
    overs: tuple[int, ...],
    charges: tuple[int, ...],
) -> Iterator[Amounts]:
    none = (0,) * len(numbers)
    for number, hold, over, charge in zip(numbers, holds or none, overs or none, charges or none, strict=True):
        bucket = state.buckets[number]
        yield Amounts(bucket.pool, bucket.share, bucket.dimension, bucket.window, hold, over, charge)


class Adopting:
    """Takes over what another owner of this ledger has told.

    Where a key is known here, what is known stands, but for its end: one that is open, or has expired, ends as it was
    told to have ended; and a settlement stands whatever is known, since the call was made. Adopting twice changes
    nothing.
    """

    def __init__(self, books: Books, reserving: Reserving, settling: Settling, teacher: Teacher) -> None:
        self._books = books
        self._reserving = reserving
        self._settling = settling
        self._teacher = teacher

    def adopt(self, told: Adopt) -> Answer:
        """Take over one key."""
        state = self._books.state
        reservation, ended = state.open.get(told.key), state.ended.get(told.key)
        if reservation is not None:
            self._bring_on(reservation, told)
        elif ended is not None and (ended.kind is not EndKind.TOMBSTONE or told.kind is not EndKind.SETTLED):
            self._replace(told.key, ended, told)
        elif self._settling.is_stale(told.at):
            return an.Invalid("at", "is older than what is remembered")
        elif told.kind is EndKind.TOMBSTONE:
            self._books.emit(ev.Tombstoned(told.key))
        elif told.kind is EndKind.TOGETHER:
            self._together(told)
        else:
            refusal = self._grant(told)
            if refusal is not None:
                return refusal
        self._reserving.tell(told.key)
        return an.Done()

    # -- keys that are not known here -------------------------------------------------------------------------------

    def _grant(self, told: Adopt) -> an.Invalid | None:
        """Open a reservation as it was opened elsewhere, and end it if it has ended there."""
        books, state = self._books, self._books.state
        if told.pool not in state.pools:
            return an.Invalid("pool", "is not known here")
        if told.granted_at is None:
            return an.Invalid("granted_at", "is missing")
        if told.kind is None and len(state.open) >= books.caps.open:
            most = books.caps.open
            return an.Invalid("key", f"the ledger has its most open reservations ({most})", full=True)
        plan = books.plan(told.pool, told.shares)
        if plan is None:
            return an.Invalid("shares", f"the ledger has its most limits ({books.caps.buckets})", full=True)
        found = [
            (number, amounts)
            for amounts in told.amounts
            if (number := state.addresses.get(_address(amounts))) is not None
        ]
        # Buckets of money come last in every recipe, and one of the account is always there.
        found.sort(key=lambda pair: pair[1].dimension is Dimension.SPEND)
        if plan[-1] not in (number for number, _ in found):
            found.append((plan[-1], Amounts("", "", Dimension.SPEND, Window.MONTH, 0)))
        numbers = tuple(number for number, _ in found)
        holds = tuple(amounts.hold for _, amounts in found)
        overs = tuple(amounts.over if told.kind is None else 0 for _, amounts in found)
        books.advance_all(numbers)
        # It counts from then: a reading that was taken since may have seen it.
        books.emit(ev.Clocked(min(told.granted_at, books.now)))
        books.emit(
            ev.Granted(
                told.key,
                told.pool,
                told.shares,
                told.tenant,
                told.route,
                told.priority,
                numbers,
                holds,
                overs,
                _NO_SIZES if told.sizes is None else told.sizes,
                told.prices,
                told.index,
                told.expires_at,
                told.max_output_tokens,
            )
        )
        books.emit(ev.Clocked(books.now))
        if told.output_tokens is not None:
            books.emit(ev.Renewed(told.key, told.expires_at, told.output_tokens, holds, overs))
        reservation = state.open[told.key]
        if told.kind is None:
            self._settling.watch(told.expires_at, told.key)
            self._teacher.hold_to_readings(numbers, books.now)
        else:
            self._end(reservation, told, told.kind)
        return None

    def _together(self, told: Adopt) -> None:
        state = self._books.state
        known = tuple(key for key in told.keys if key in state.open or key in state.ended)
        if known:
            self._books.emit(ev.GrantedTogether(told.key, known))

    # -- keys that are known ----------------------------------------------------------------------------------------

    def _bring_on(self, reservation: Reservation, told: Adopt) -> None:
        """It is open here: end it as it was told to have ended, or let it go on for as long as it was told to."""
        if told.kind is EndKind.SETTLED or told.kind is EndKind.RELEASED:
            self._end(reservation, told, told.kind)
        elif told.kind is None:
            self._renew(reservation, told)

    def _renew(self, reservation: Reservation, told: Adopt) -> None:
        books = self._books
        expires_at = max(reservation.expires_at, told.expires_at)
        output = reservation.output_tokens
        if told.output_tokens is not None:
            output = max(output or 0, told.output_tokens)
        told_of = {_address(amounts): amounts for amounts in told.amounts}
        holds, overs = [], []
        for number, hold, over in zip(reservation.buckets, reservation.holds, reservation.overs, strict=True):
            amounts = told_of.get(self._address_of(number))
            grown = amounts is not None and amounts.hold > hold
            holds.append(amounts.hold if amounts is not None and grown else hold)
            overs.append(amounts.over if amounts is not None and grown else over)
        now_known = (expires_at, output, tuple(holds))
        if now_known == (reservation.expires_at, reservation.output_tokens, reservation.holds):
            return
        books.advance_all(reservation.buckets)
        books.emit(ev.Renewed(told.key, expires_at, output, tuple(holds), tuple(overs)))
        if expires_at != reservation.expires_at:
            self._settling.watch(expires_at, told.key)

    def _end(self, reservation: Reservation, told: Adopt, kind: EndKind) -> None:
        numbers = reservation.buckets
        charges, overs = self._ends(numbers, reservation.holds, told, kind)
        forfeits = self._settling.forfeits(numbers, reservation.holds, charges, reservation.ordinal)
        if kind is EndKind.RELEASED:
            self._books.emit(ev.Released(told.key, forfeits))
        elif kind is EndKind.EXPIRED:
            self._books.emit(ev.Expired(told.key, charges, forfeits, overs, told.cost))
        else:
            self._books.emit(ev.Settled(told.key, charges, forfeits, overs, told.cost))
        self._teacher.hold_to_readings(numbers, self._books.now)

    def _replace(self, key: str, ended: Ended, told: Adopt) -> None:
        """It has ended here, and otherwise where it was told of."""
        late = told.kind is EndKind.SETTLED and ended.kind in (EndKind.EXPIRED, EndKind.RELEASED)
        if not late and not (told.kind is EndKind.RELEASED and ended.kind is EndKind.EXPIRED):
            return
        charges, overs = self._ends(ended.buckets, ended.holds, told, EndKind.SETTLED if late else EndKind.RELEASED)
        forfeits = self._settling.forfeits(ended.buckets, ended.charges, charges, ended.ordinal, ended.ended_at)
        self._books.emit(ev.Replaced(key, charges, forfeits, overs, told.cost if late else 0, not late))
        self._teacher.hold_to_readings(ended.buckets, self._books.now)

    def _ends(
        self, numbers: tuple[int, ...], holds: tuple[int, ...], told: Adopt, kind: EndKind
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands in these buckets, and what upstream may have counted beyond it.

        Where nothing was told of a bucket, what is held stands, but for gauges.
        """
        if kind is EndKind.RELEASED:
            nothing = (0,) * len(numbers)
            return nothing, nothing
        told_of = {_address(amounts): amounts for amounts in told.amounts}
        charges, overs = [], []
        for number, hold in zip(numbers, holds, strict=True):
            amounts = told_of.get(self._address_of(number))
            if amounts is None:
                charges.append(0 if self._books.state.buckets[number].dimension in GAUGES else hold)
                overs.append(0)
            else:
                charges.append(amounts.charge)
                overs.append(amounts.over)
        return tuple(charges), tuple(overs)

    def _address_of(self, number: int) -> _Address:
        bucket = self._books.state.buckets[number]
        return bucket.pool, bucket.share, bucket.dimension, bucket.window


def _address(amounts: Amounts) -> _Address:
    return amounts.pool, amounts.share, amounts.dimension, amounts.window
