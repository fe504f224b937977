"""The state of a ledger: the fold of its events, and nothing else.

:meth:`State.apply` adds and assigns; every decision was taken before the event was made. Waiters are not here: they
are soft, and die with the process that keeps them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import msgspec

from paceline.engine import events as ev
from paceline.engine.accounting import Prices, Profile, Sizes
from paceline.engine.bucket import Bucket, EndKind
from paceline.engine.calendar import next_month
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.endings import Endings
from paceline.engine.operations import Class, Mode, Priority
from paceline.engine.outside import MOST
from paceline.engine.pressure import Pressure
from paceline.engine.sizes import Kind, Kinds, Learned, note, sample
from paceline.engine.terms import Part, Terms

CHUNK_ENTRIES = 1_000
CHUNK_KINDS = 250
FORMAT = 2
"""Version of the snapshot's form. One that only adds fields with defaults reads the one before."""
OLDEST_FORMAT = 1
"""The oldest that is read."""
WRITTEN_FORMATS = (FORMAT,)
"""Those that can be written: the newest, and the one before as long as an upgrade may not be finalized."""


class Reservation(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An open hold. ``holds`` and ``overs`` go with ``buckets``; replaced, never changed in place."""

    key: str
    pool: str
    shares: tuple[str, ...]
    tenant: str
    route: str
    priority: Priority
    buckets: tuple[int, ...]
    holds: tuple[int, ...]
    overs: tuple[int, ...]
    sizes: Sizes
    prices: Prices
    index: int
    granted_at: int
    expires_at: int
    ordinal: int
    output_tokens: int | None = None
    """Output reported by Renew so far."""
    max_output_tokens: int | None = None
    """The cap that the caller asked for."""
    asked_input: int = 0
    asked_output: int = 0
    """The caller's own estimates, in tokens. Zero: there was none."""


class Ended(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is remembered of an ended id. ``granted_at`` of ``None``: it was never granted here."""

    kind: EndKind
    ended_at: int
    pool: str = ""
    shares: tuple[str, ...] = ()
    buckets: tuple[int, ...] = ()
    charges: tuple[int, ...] = ()
    overs: tuple[int, ...] = ()
    cost: int = 0
    index: int = 0
    max_output_tokens: int | None = None
    granted_at: int | None = None
    ordinal: int = 0
    prices: Prices = Prices()
    keys: tuple[str, ...] = ()
    sizes: Sizes | None = None
    output_tokens: int | None = None
    holds: tuple[int, ...] = ()


class Pool(msgspec.Struct, array_like=True):
    """A pool's definition and condition. ``buckets`` are numbers in :attr:`State.buckets`."""

    name: str
    profile: Profile
    learn: bool
    buckets: list[int] = msgspec.field(default_factory=list)
    paused: bool = False
    blocked_until: int = 0
    closed: bool = False
    """``blocked_until`` stands for the upstream's spend cap, or for its quota of zero."""
    pressure: Pressure | None = None
    """What refusals that were not about budget have put in force: an overload, a bound on concurrency, ramps."""
    blocked_at: int = 0
    """Since when ``blocked_until`` holds."""


class Share(msgspec.Struct, array_like=True, frozen=True):
    """A share; its fields up to ``guarantee_parts`` are those of :class:`~paceline.engine.terms.Terms`."""

    name: str
    caps: tuple[Limit, ...]
    weight: int = 1
    guarantees: tuple[Limit, ...] = ()
    cap_parts: tuple[Part, ...] = ()
    guarantee_parts: tuple[Part, ...] = ()
    override: bool = False
    """An operator has set this; what the configuration says waits in ``configured``."""
    configured: Terms | None = None

    @property
    def terms(self) -> Terms:
        """What is in force."""
        return Terms(self.caps, self.weight, self.guarantees, self.cap_parts, self.guarantee_parts)


class Head(msgspec.Struct, array_like=True):
    """Everything of a snapshot but the long maps."""

    format: int
    ledger: str
    at: int
    ordinal: int
    horizon: int
    buckets: list[Bucket]
    pools: list[Pool]
    shares: list[Share]
    modes: list[tuple[str, str, Mode]]
    configured_modes: list[tuple[str, str, Mode]]
    classes: tuple[Class, ...] = ()


class OpenChunk(msgspec.Struct, array_like=True, tag="open"):
    entries: list[Reservation]


class EndedChunk(msgspec.Struct, array_like=True, tag="ended"):
    entries: list[tuple[str, Ended]]


class LearnedChunk(msgspec.Struct, array_like=True, tag="learned"):
    entries: list[tuple[Kind, Learned]]


Chunk = bytes
"""One piece of a snapshot: about a millisecond's work to make or to read."""

_encode = msgspec.msgpack.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(Head).decode
_decode_chunk = msgspec.msgpack.Decoder(OpenChunk | EndedChunk | LearnedChunk).decode


class FoldError(Exception):
    """An event does not fit the state: the journal is damaged, or this version cannot read it."""


class State:
    """All books of one ledger.

    ``open`` and ``ended`` are ordered by grant and by end. ``horizon`` is the latest end that was forgotten: a
    reservation granted before it may have been settled already, and nobody remembers.
    """

    def __init__(self, ledger: str) -> None:
        self.ledger = ledger
        self.at = 0
        self.ordinal = 0
        self.horizon = -1
        self.buckets: list[Bucket] = []
        self.addresses: dict[tuple[str, str, Dimension, Window], int] = {}
        """Numbers of buckets by pool, share, dimension and window."""
        self.pools: dict[str, Pool] = {}
        self.shares: dict[str, Share] = {}
        self.classes: tuple[Class, ...] = ()
        """What the configuration says of priorities."""
        self.modes: dict[tuple[str, str], Mode] = {}
        """Those in force, by pool and tenant."""
        self.configured_modes: dict[tuple[str, str], Mode] = {}
        """What the configuration said last; an operator may have set others since."""
        self.open: dict[str, Reservation] = {}
        self.open_in: dict[str, dict[str, Reservation]] = {}
        self.ended: Endings[Ended] = Endings()
        self.learned: Kinds = {}
        """What calls turned out to be, by their kind; the newest settlement's last."""
        self._fold: dict[type[Any], Callable[[Any], None]] = {
            ev.Clocked: self._clocked,
            ev.Advanced: self._advanced,
            ev.PoolDefined: self._pool_defined,
            ev.BucketAdded: self._bucket_added,
            ev.ShareDefined: self._share_defined,
            ev.ClassesDefined: self._classes_defined,
            ev.LimitMoved: self._limit_moved,
            ev.LimitClaimed: self._limit_claimed,
            ev.LimitConfirmed: self._limit_confirmed,
            ev.OutsideLearned: self._outside_learned,
            ev.Foreseen: self._foreseen,
            ev.Granted: self._granted,
            ev.GrantedTogether: self._granted_together,
            ev.Renewed: self._renewed,
            ev.Settled: self._settled,
            ev.Released: self._released,
            ev.Expired: self._expired,
            ev.Replaced: self._replaced,
            ev.Booked: self._booked,
            ev.Tombstoned: self._tombstoned,
            ev.Forgotten: self._forgotten,
            ev.Corrected: self._corrected,
            ev.ReadingKept: self._reading_kept,
            ev.PoolBlocked: self._pool_blocked,
            ev.PoolPaused: self._pool_paused,
            ev.ModeSet: self._mode_set,
            ev.Withheld: self._withheld,
            ev.Pressed: self._pressed,
        }

    def apply(self, event: ev.Event) -> None:
        """Fold one event. Raises :class:`FoldError` if it does not fit."""
        try:
            self._fold[type(event)](event)
        except (KeyError, IndexError, TypeError) as error:
            raise FoldError(f"event {type(event).__name__} does not fit the state: {error!r}") from error

    # -- snapshots ----------------------------------------------------------------------------------------------

    def dump(self, form: int = FORMAT) -> Iterator[Chunk]:
        """The state in chunks, as it is when the first is taken, whatever happens between the chunks.

        ``form`` is the version to write it in, for a version before this one to read. Raises ``ValueError``, when the
        first chunk is taken, if it is not one of :data:`WRITTEN_FORMATS`.
        """
        if form not in WRITTEN_FORMATS:
            raise ValueError(f"this version writes snapshots of format {WRITTEN_FORMATS}, not {form}")
        head = _encode(
            Head(
                form,
                self.ledger,
                self.at,
                self.ordinal,
                self.horizon,
                self.buckets,
                list(self.pools.values()),
                list(self.shares.values()),
                [(pool, tenant, mode) for (pool, tenant), mode in self.modes.items()],
                [(pool, tenant, mode) for (pool, tenant), mode in self.configured_modes.items()],
                self.classes,
            )
        )
        opened, ended = list(self.open.values()), self.ended.frozen()
        learned = [(kind, each.copy()) for kind, each in self.learned.items()]
        yield head
        for start in range(0, len(opened), CHUNK_ENTRIES):
            yield _encode(OpenChunk(opened[start : start + CHUNK_ENTRIES]))
        while entries := list(islice(ended, CHUNK_ENTRIES)):
            yield _encode(EndedChunk(entries))
        for start in range(0, len(learned), CHUNK_KINDS):
            yield _encode(LearnedChunk(learned[start : start + CHUNK_KINDS]))

    @staticmethod
    def format_of(first: Chunk) -> int:
        """The format of a dump, by its first chunk. Raises :class:`msgspec.ValidationError`."""
        return _decode_head(first).format

    @classmethod
    def restore(cls, chunks: Iterable[Chunk]) -> State:
        """The inverse of :meth:`dump`. Raises :class:`FoldError` on damage or an unknown format."""
        try:
            source = iter(chunks)
            head = _decode_head(next(source))
            if not OLDEST_FORMAT <= head.format <= FORMAT:
                raise FoldError(f"snapshot has format {head.format}, this version reads {OLDEST_FORMAT} to {FORMAT}")
            state = cls(head.ledger)
            state.at, state.ordinal, state.horizon = head.at, head.ordinal, head.horizon
            state.buckets = head.buckets
            for number, bucket in enumerate(head.buckets):
                state.addresses[bucket.pool, bucket.share, bucket.dimension, bucket.window] = number
            state.pools = {pool.name: pool for pool in head.pools}
            state.open_in = {pool.name: {} for pool in head.pools}
            state.shares = {share.name: share for share in head.shares}
            state.classes = head.classes
            state.modes = {(pool, tenant): mode for pool, tenant, mode in head.modes}
            state.configured_modes = {(pool, tenant): mode for pool, tenant, mode in head.configured_modes}
            for data in source:
                chunk = _decode_chunk(data)
                if isinstance(chunk, OpenChunk):
                    for reservation in chunk.entries:
                        state.open[reservation.key] = reservation
                        state.open_in[reservation.pool][reservation.key] = reservation
                elif isinstance(chunk, LearnedChunk):
                    state.learned.update(chunk.entries)
                else:
                    state.ended.update(chunk.entries)
        except (msgspec.DecodeError, StopIteration, KeyError) as error:
            raise FoldError(f"snapshot cannot be read: {error}") from error
        return state

    def digest(self) -> bytes:
        """A fingerprint of the books: equal states have equal digests on any machine."""
        digest = hashlib.blake2b(digest_size=16)
        for chunk in self.dump():
            digest.update(chunk)
        return digest.digest()

    # -- the fold -----------------------------------------------------------------------------------------------

    def _clocked(self, event: ev.Clocked) -> None:
        self.at = event.at

    def _advanced(self, event: ev.Advanced) -> None:
        self.buckets[event.bucket].advance(self.at, event.refilled, event.carry, event.lost)

    def _withheld(self, event: ev.Withheld) -> None:
        self.buckets[event.bucket].withhold(event.since, event.until, event.refilled, event.carry, event.lost)

    def _pool_defined(self, event: ev.PoolDefined) -> None:
        pool = self.pools.get(event.pool)
        if pool is None:
            self.pools[event.pool] = Pool(event.pool, event.profile, event.learn)
            self.open_in[event.pool] = {}
        else:
            pool.profile, pool.learn = event.profile, event.learn

    def _bucket_added(self, event: ev.BucketAdded) -> None:
        number = len(self.buckets)
        bucket = Bucket(
            event.pool,
            event.share,
            event.dimension,
            event.window,
            event.amount,
            event.burst,
            self.at,
            level=event.level,
            refilled=event.level,
            turns_at=next_month(self.at) if event.window is Window.MONTH else 0,
            turned_at=self.at,
            configured=event.amount,
            configured_burst=event.burst,
            ruling=event.amount,
            ruling_burst=event.burst,
            override=event.override,
            guessed=event.guessed,
        )
        self.buckets.append(bucket)
        self.addresses[event.pool, event.share, event.dimension, event.window] = number
        if event.pool and not event.share:
            self.pools[event.pool].buckets.append(number)

    def _share_defined(self, event: ev.ShareDefined) -> None:
        self.shares[event.share] = Share(*msgspec.structs.astuple(event))

    def _classes_defined(self, event: ev.ClassesDefined) -> None:
        self.classes = event.classes

    def _limit_moved(self, event: ev.LimitMoved) -> None:
        bucket = self.buckets[event.bucket]
        bucket.lower(self.ordinal + 1, 0)
        if event.amount != bucket.amount:
            # A burst that moves denies no limit.
            bucket.pending = None
            if event.amount < bucket.amount:
                # Of a smaller limit others have no more than their part.
                bucket.outside = bucket.outside * event.amount // bucket.amount
        bucket.amount = event.amount
        bucket.carry = 0
        bucket.move_burst(event.burst)
        bucket.level += event.adjusted
        bucket.adjusted += event.adjusted
        bucket.configured = event.configured
        bucket.configured_burst = event.configured_burst
        bucket.override = event.override
        bucket.guessed = False
        bucket.outside = min(bucket.outside, event.amount * MOST // 1_000)
        bucket.learned_at = self.at if event.learned else None
        if not event.learned:
            bucket.ruling, bucket.ruling_burst = event.amount, event.burst

    def _limit_claimed(self, event: ev.LimitClaimed) -> None:
        bucket = self.buckets[event.bucket]
        bucket.pending, bucket.pending_at = event.amount, self.at

    def _limit_confirmed(self, event: ev.LimitConfirmed) -> None:
        self.buckets[event.bucket].learned_at = self.at

    def _outside_learned(self, event: ev.OutsideLearned) -> None:
        bucket = self.buckets[event.bucket]
        bucket.outside, bucket.outside_at = event.rate, self.at

    def _foreseen(self, event: ev.Foreseen) -> None:
        bucket = self.buckets[event.bucket]
        moved = bucket.foreseen - event.amount
        if moved > 0:
            # What finds no place would have been lost at the rim.
            moved = min(moved, max(0, bucket.burst - bucket.level))
        bucket.foreseen = event.amount
        bucket.adjust(self.ordinal, moved)

    def _granted(self, event: ev.Granted) -> None:
        self.ordinal += 1
        ordinal = self.ordinal
        reservation = Reservation(
            event.key,
            event.pool,
            event.shares,
            event.tenant,
            event.route,
            event.priority,
            event.buckets,
            event.holds,
            event.overs,
            event.sizes,
            event.prices,
            event.index,
            self.at,
            event.expires_at,
            ordinal,
            max_output_tokens=event.max_output_tokens,
            asked_input=event.asked_input,
            asked_output=event.asked_output,
        )
        self.open[event.key] = reservation
        self.open_in[event.pool][event.key] = reservation
        pressure = self.pools[event.pool].pressure
        if pressure is not None and pressure.overload is not None:
            pressure.overload.note_grant(self.at)
        buckets, at = self.buckets, self.at
        for number, hold, over in zip(event.buckets, event.holds, event.overs, strict=True):
            buckets[number].open(ordinal, at, hold, over)

    def _granted_together(self, event: ev.GrantedTogether) -> None:
        self.ended[event.key] = Ended(EndKind.TOGETHER, self.at, granted_at=self.at, keys=event.keys)

    def _renewed(self, event: ev.Renewed) -> None:
        old = self.open[event.key]
        new = msgspec.structs.replace(
            old,
            expires_at=event.expires_at,
            output_tokens=event.output_tokens,
            holds=event.holds,
            overs=event.overs,
            sizes=old.sizes if event.sizes is None else event.sizes,
        )
        self.open[event.key] = new
        self.open_in[old.pool][event.key] = new
        for place, number in enumerate(old.buckets):
            bucket = self.buckets[number]
            hold, before = new.holds[place], old.holds[place]
            over = new.overs[place] - old.overs[place]
            if hold < before:
                bucket.shrink(old.ordinal, self.ordinal, old.granted_at, before, hold, over, event.forfeits[place])
            else:
                bucket.grow(self.ordinal + 1, old.granted_at, hold - before, over)

    def _settled(self, event: ev.Settled) -> None:
        self._learn_sizes(self.open[event.key], event)
        self._end(event.key, EndKind.SETTLED, event.charges, event.forfeits, event.overs, event.cost)

    def _learn_sizes(self, reservation: Reservation, event: ev.Settled) -> None:
        """A call that ended with its final usage is a sample of its kind."""
        coming, going = event.input_tokens, event.output_tokens
        if coming is None or going is None or not (coming or going):
            return
        took = (self.at - reservation.granted_at) // 1_000
        asked = (reservation.asked_input, reservation.asked_output)
        kind = (reservation.pool, reservation.tenant, reservation.route)
        note(self.learned, kind, sample((coming, going), asked, took, reservation.max_output_tokens))

    def _expired(self, event: ev.Expired) -> None:
        self._end(event.key, EndKind.EXPIRED, event.charges, event.forfeits, event.overs, event.cost)

    def _released(self, event: ev.Released) -> None:
        nothing = (0,) * len(event.forfeits)
        self._end(event.key, EndKind.RELEASED, nothing, event.forfeits, nothing, 0)

    def _end(
        self,
        key: str,
        kind: EndKind,
        charges: tuple[int, ...],
        forfeits: tuple[int, ...],
        overs: tuple[int, ...],
        cost: int,
    ) -> None:
        reservation = self.open.pop(key)
        del self.open_in[reservation.pool][key]
        buckets, at, newest = self.buckets, self.at, self.ordinal
        granted_at, ordinal = reservation.granted_at, reservation.ordinal
        for number, hold, over, charge, forfeit, over_now in zip(
            reservation.buckets, reservation.holds, reservation.overs, charges, forfeits, overs, strict=True
        ):
            buckets[number].close(kind, at, granted_at, ordinal, newest, hold, over, charge, forfeit, over_now)
        self.ended[key] = self._remembered(reservation, kind, charges, overs, cost)

    def _remembered(
        self,
        reservation: Reservation,
        kind: EndKind,
        charges: tuple[int, ...],
        overs: tuple[int, ...],
        cost: int,
    ) -> Ended:
        """What is kept of a reservation that ended. A settled one is only ever answered again, and keeps less."""
        final = kind is EndKind.SETTLED
        return Ended(
            kind,
            self.at,
            reservation.pool,
            reservation.shares,
            reservation.buckets,
            charges,
            () if final else overs,
            cost,
            reservation.index,
            reservation.max_output_tokens,
            reservation.granted_at,
            reservation.ordinal,
            reservation.prices,
            (),
            None if final else reservation.sizes,
            None if final else reservation.output_tokens,
            () if final else reservation.holds,
        )

    def _replaced(self, event: ev.Replaced) -> None:
        old = self.ended[event.key]
        for place, number in enumerate(old.buckets):
            bucket = self.buckets[number]
            before, charge = old.charges[place], event.charges[place]
            if old.kind is EndKind.EXPIRED:
                bucket.refundable -= before
            bucket.recharge(old.ordinal, self.ordinal, before, charge, event.forfeits[place])
            if old.granted_at is not None:
                over = event.overs[place] - old.overs[place]
                bucket.amend_end(old.ended_at, old.granted_at, charge - before, over)
        self.ended[event.key] = msgspec.structs.replace(
            old,
            kind=EndKind.RELEASED if event.released else EndKind.SETTLED,
            charges=event.charges,
            overs=event.overs,
            cost=event.cost,
        )

    def _booked(self, event: ev.Booked) -> None:
        made_at = self.at if event.made_at is None else event.made_at
        absorbed = event.absorbed or (0,) * len(event.buckets)
        for number, charge, over, back in zip(event.buckets, event.charges, event.overs, absorbed, strict=True):
            bucket = self.buckets[number]
            bucket.book(self.ordinal, charge, back, made_at)
            if bucket.is_read:
                bucket.note_end(made_at, event.granted_at, 0, charge, over)
        if event.key:
            self.ended.pop(event.key, None)
            self.ended[event.key] = Ended(
                EndKind.SETTLED,
                self.at,
                event.pool,
                event.shares,
                event.buckets,
                event.charges,
                event.overs,
                event.cost,
                granted_at=event.granted_at,
                ordinal=self.ordinal + 1,
            )

    def _tombstoned(self, event: ev.Tombstoned) -> None:
        self.ended[event.key] = Ended(EndKind.TOMBSTONE, self.at)

    def _forgotten(self, event: ev.Forgotten) -> None:
        for key in list(islice(self.ended, event.count)):
            ended = self.ended.pop(key)
            if any(child in self.open for child in ended.keys):
                # A bulk request is known as long as one of its calls is open: it goes to the end of the line.
                self.ended[key] = ended
                continue
            self.horizon = max(self.horizon, ended.ended_at)
            if ended.kind is EndKind.EXPIRED:
                for number, charge in zip(ended.buckets, ended.charges, strict=True):
                    self.buckets[number].refundable -= charge

    def _corrected(self, event: ev.Corrected) -> None:
        self.buckets[event.bucket].adjust(self.ordinal, event.adjusted)

    def _reading_kept(self, event: ev.ReadingKept) -> None:
        bucket, constraint = self.buckets[event.bucket], event.constraint
        bucket.constraint = None if constraint is None else msgspec.structs.replace(constraint)
        bucket.guessed = False

    def _pool_blocked(self, event: ev.PoolBlocked) -> None:
        pool = self.pools[event.pool]
        pool.blocked_until, pool.closed, pool.blocked_at = event.until, event.closed, self.at

    def _pressed(self, event: ev.Pressed) -> None:
        self.pools[event.pool].pressure = None if event.pressure is None else event.pressure.copy()

    def _pool_paused(self, event: ev.PoolPaused) -> None:
        self.pools[event.pool].paused = event.paused

    def _mode_set(self, event: ev.ModeSet) -> None:
        for modes in (self.modes, self.configured_modes) if event.configured else (self.modes,):
            if event.mode is None:
                modes.pop((event.pool, event.tenant), None)
            else:
                modes[event.pool, event.tenant] = event.mode
