"""Ledgers that move between the processes of a fleet, as one process of it sees them.

A :class:`FleetSlot` stands for one ledger, whoever owns it: this process, or another one over a
:class:`~paceline.frontend.peers.link.Link`. It keeps every operation until it is answered, and takes it to the next
owner if there is a change: what frees first, then Reserves, the longest waiting first, each with the time that it has
waited already. Ids make it harmless to send an operation twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from random import Random
from typing import Protocol

import msgspec
import structlog

from paceline.engine.answers import Answer, Invalid
from paceline.engine.dimensions import Dimension, Window
from paceline.engine.operations import Commit, DefinePool, Observe, Operation, Outcome, Renew, Reserve
from paceline.frontend.errors import refused, unavailable
from paceline.frontend.limits import MAX_DEFINED_POOLS, MAX_LEDGERS, MAX_PENDING, MAX_PENDING_RESERVES
from paceline.frontend.peers.link import Link, LinkOptions, Lost, Target
from paceline.frontend.peers.serving import Handler, Seat, Whereabouts
from paceline.frontend.peers.transport import Transport
from paceline.frontend.routing import Found, Inquiry, Reply, Router, SetupOf, Slot, Standing, layout_of, stands, summed
from paceline.ledger.clock import Clock, Timer
from paceline.ledger.errors import (
    LedgerBusy,
    LedgerDraining,
    LedgerError,
    LedgerFault,
    LedgerStopped,
    LedgerUnavailable,
)
from paceline.ledger.options import Phase
from paceline.ledger.owner import Owner

_log = structlog.get_logger(__name__)

LAYOUT = "layout"
"""Asks for a pool's limits in the order of its charges. Body: the pool's name; answer: pairs, in MessagePack."""
RECALL = "recall"
"""Asks for a reservation. Body: its key; answer: pool, age and whether it ended, or nil, in MessagePack."""
AWAY_US = 5_000_000
POISON_DEATHS = 2
_TICK_US = 20_000
_TICKS_MOST_US = 100_000
_AGED_US = 1_000
_ASK_PAUSE_US = 20_000
_ASK_US = 2_000_000

_Layout = list[tuple[Dimension, Window]]
_encode = msgspec.msgpack.Encoder().encode
_decode_layout = msgspec.msgpack.Decoder(list[tuple[Dimension, Window]]).decode
_decode_recall = msgspec.msgpack.Decoder(Standing | None).decode


class Keeper(Whereabouts, Protocol):
    """Who owns what: see :mod:`paceline.ledger.keeper`."""

    def where(self, ledger: str) -> Seat: ...
    def want(self, ledger: str) -> object:
        """Somebody should own this ledger."""
        ...

    def suspect(self, ledger: str, epoch: int) -> object:
        """Nobody listens where the owner of this epoch was."""
        ...

    def hint(self, ledger: str, epoch: int, node: str, address: str) -> object:
        """A peer says so."""
        ...


def _layout(ledger: str, owner: Owner, body: bytes) -> bytes:
    from paceline.engine.engine import Engine

    engine = owner.engine
    return _encode(layout_of(engine.state, body.decode()) if isinstance(engine, Engine) else [])


def _recall(ledger: str, owner: Owner, body: bytes) -> bytes:
    from paceline.engine.engine import Engine

    engine = owner.engine
    return _encode(stands(engine, body.decode(), owner.now()) if isinstance(engine, Engine) else None)


ASKS: Mapping[str, Handler] = {LAYOUT: _layout, RECALL: _recall}
"""Questions that every process answers about the ledgers that it owns."""


class FleetOptions(msgspec.Struct, frozen=True):
    """Bounds of a slot. Times in µs."""

    away_us: int = AWAY_US
    """For how long callers are kept while nobody decides."""
    pending: int = MAX_PENDING
    pending_reserves: int = MAX_PENDING_RESERVES
    """Operations without an answer: beyond the second Reserves are refused, beyond the first everything."""
    backlog: int = 8_192
    """Reserves that wait to be sent to another process; more are refused."""


class _Pending:
    """An operation without an answer."""

    __slots__ = ("at", "attempt", "broken", "deaths", "internal", "number", "operation", "reply", "seat", "slot")

    def __init__(self, slot: FleetSlot, number: int, operation: Operation, reply: Reply, at: int) -> None:
        self.slot = slot
        self.number = number
        self.operation = operation
        self.reply = reply
        self.at = at
        self.seat = 0
        """The seat that has it; 0: none."""
        self.attempt = 0
        self.broken = 0
        """The epoch of the owner that was lost while it had no word on it."""
        self.deaths = 0


class _Local:
    """Where an owner in this process answers."""

    __slots__ = ("attempt", "pending")

    def __init__(self, pending: _Pending) -> None:
        self.pending = pending
        self.attempt = pending.attempt

    def __call__(self, answer: Answer | LedgerError) -> None:
        pending = self.pending
        pending.slot._heard(pending, self.attempt, answer)


class FleetSlot(Slot):
    """One ledger, wherever it is owned. A :class:`~paceline.frontend.peers.link.LinkUser`.

    ``on_change`` hears when it becomes able to decide, or no more.
    """

    def __init__(
        self,
        account: str,
        node: str,
        keeper: Keeper,
        transport: Transport,
        clock: Clock,
        random: Random,
        setup: Sequence[Operation] = (),
        *,
        asks: Mapping[str, Handler] = ASKS,
        options: FleetOptions | None = None,
        link_options: LinkOptions | None = None,
        on_change: Callable[[Slot], object] | None = None,
    ) -> None:
        super().__init__(account, None, setup)
        self.epoch = 0
        """The highest epoch that was seen."""
        self.before: tuple[str, str] = ("", "")
        """Node and address of the last owner elsewhere."""
        self.resent = 0
        """Operations that were sent again, since the start."""
        self.poisoned = 0
        self.shed = 0
        self._node = node
        self._keeper = keeper
        self._clock = clock
        self._asks = asks
        self._options = FleetOptions() if options is None else options
        self._on_change = on_change
        self._link = Link(account, node, transport, clock, random, self, link_options)
        self._pending: dict[int, _Pending] = {}
        self._reserves = 0
        self._numbers = 0
        self._era = ""
        self._seat = 0
        """Counts seats; what was sent to an earlier one has to be sent again."""
        self._seated: Owner | Link | None = None
        """Who takes operations now."""
        self._sat: tuple[Owner, int] | None = None
        """The owner in this process that has the seat or had it last, and its epoch."""
        self._away_since: int | None = clock.monotonic()
        self._failing = False
        self._timer: Timer | None = None
        self._ticks = 0
        self._layouts: dict[str, _Layout | None] = {}
        """By pool; ``None``: was asked for."""
        self._shown: set[str] = set()
        self._closed = False
        self._opening: list[asyncio.Future[None]] = []

    # -- for callers ------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self._seated is not None

    @property
    def is_reachable(self) -> bool:
        return self._seated is not None or (self._seat > 0 and not self._failing)

    @property
    def away_us(self) -> int:
        since = self._away_since
        return 0 if self._seated is not None or since is None else self._clock.monotonic() - since

    @property
    def pending(self) -> int:
        """Operations without an answer."""
        return len(self._pending)

    def now(self) -> int | None:
        owner = self.local
        return owner.now() if owner is not None else self._link.now()

    def submit(self, operation: Operation, reply: Reply) -> None:
        """Have an operation decided by whoever owns the ledger; ``reply`` is called once, maybe before this returns."""
        options = self._options
        if self._failing or self._closed:
            reply(self._gone())
            return
        if isinstance(operation, Reserve):
            if self._reserves >= options.pending_reserves or self._link.backlog >= options.backlog:
                self.shed += 1
                reply(LedgerBusy(f"too many calls for ledger {self.account!r} wait here", 200_000))
                return
            self._reserves += 1
        elif len(self._pending) >= options.pending:
            reply(LedgerBusy(f"too many operations for ledger {self.account!r} wait here", 100_000))
            return
        self._numbers = number = self._numbers + 1
        pending = self._pending[number] = _Pending(self, number, operation, reply, self._clock.monotonic())
        if self._seated is not None:
            self._send(pending, 0)

    def reserve(self, operation: Operation, choices: Iterable[tuple[int, object]], reply: Reply) -> None:
        defined = self._defined
        for _, destination in choices:
            definition: DefinePool = destination.definition  # type: ignore[attr-defined]
            if defined.get(definition.pool) is not definition:
                self.define(definition)
        self.submit(operation, reply)

    def define(self, definition: DefinePool) -> None:
        if len(self._defined) >= MAX_DEFINED_POOLS:
            self._defined.clear()
        self._defined[definition.pool] = definition
        # Every owner to come is told everything anyway.
        self._tell(definition)

    def layout(self, pool: str) -> _Layout:
        if self.local is not None:
            return super().layout(pool)
        if pool in self._shown:
            # What was shown before did not fit.
            self._ask_layout(pool)
        elif len(self._shown) < MAX_DEFINED_POOLS:
            self._shown.add(pool)
        return self._layouts.get(pool) or []

    async def ask(self, name: str, body: bytes, timeout_us: int = _ASK_US) -> bytes | None:
        """Ask the owner's process; ``None``: it does not know this question.

        Raises :class:`~paceline.ledger.errors.LedgerUnavailable` if nobody answers within ``timeout_us``.
        """
        until = self._clock.monotonic() + timeout_us
        while True:
            seated, seat = self._seated, self._seat
            if seated is None:
                if self._closed or self._failing or self._clock.monotonic() >= until:
                    raise LedgerUnavailable(f"ledger {self.account!r} is away")
                await self._opened_by(until)
                continue
            if not isinstance(seated, Link):
                handler = self._asks.get(name)
                return None if handler is None else handler(self.account, seated, body)
            told: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
            seated.ask(name, body, lambda answer, told=told: None if told.done() else told.set_result(answer))  # type: ignore[misc]
            timer = self._clock.call_at(until, lambda told=told: None if told.done() else told.set_result(None))  # type: ignore[misc]
            try:
                answer = await told
            finally:
                timer.cancel()
            if answer is None and self._clock.monotonic() >= until:
                raise LedgerUnavailable(f"the owner of ledger {self.account!r} does not answer")
            if answer is not None or (seat == self._seat and self._seated is seated):
                return answer

    async def close(self, error: LedgerError) -> None:
        """Tell everybody who has no answer ``error``, and follow the ledger no more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unseat()
        await self._link.close()
        self._fail_all(error)

    def check(self) -> None:
        """To be called at every change of ``keeper.where``."""
        if self._closed:
            return
        where = self._keeper.where(self.account)
        owner = where.owner
        if where.era != self._era:
            # Another primary of the store, which may have gone back: its epochs count from now on.
            self._era = where.era
            self.epoch = 0
            self._link.forget()
        if owner is not None and where.epoch >= self.epoch:
            if self.local is not owner:
                self.local, self.started = owner, True
                self._link.aim(None)
            if owner.phase in _USABLE:
                if self._seated is not owner or self._sat != (owner, owner.epoch):
                    self._sit(owner)
            elif self._seated is owner:
                self._unseat()
        else:
            if self.local is not None:
                self.local = None
                if not isinstance(self._seated, Link):
                    self._unseat()
            if where.address and where.node != self._node and where.epoch >= self.epoch:
                self.before = (where.node, where.address)
                self._link.aim(Target(where.epoch, where.node, where.address))

    # -- sending ----------------------------------------------------------------------------------------------

    def _send(self, pending: _Pending, elapsed: int) -> None:
        operation = pending.operation
        if elapsed > _AGED_US:
            operation = aged(operation, elapsed)
        pending.seat = self._seat
        seated = self._seated
        if isinstance(seated, Link):
            pool = _pool_of(operation)
            if pool is not None and pool not in self._layouts:
                self._ask_layout(pool)
            seated.send(pending.number, operation)
        elif seated is not None:
            if self._epoch != seated.epoch:
                self._tell_all()
            pending.attempt += 1
            seated.submit(operation, _Local(pending))

    def _tell(self, operation: Operation) -> None:
        """Define something, unless nobody takes it now."""
        seated = self._seated
        if isinstance(seated, Link):
            self._numbers = number = self._numbers + 1
            seated.send(number, operation)
        elif seated is not None:
            seated.submit(operation, self._was_defined)

    def _tell_all(self) -> None:
        seated = self._seated
        if not isinstance(seated, Link) and seated is not None:
            # Elsewhere it is the owner's own process that knows what the configuration says.
            self._epoch = seated.epoch
            for operation in self.setup:
                seated.submit(operation, self._was_defined)
        for definition in list(self._defined.values()):
            self._tell(definition)

    def _ask_layout(self, pool: str) -> None:
        if len(self._layouts) >= MAX_DEFINED_POOLS:
            self._layouts.clear()
        self._layouts.setdefault(pool, None)

        def told(body: bytes | None) -> None:
            found = None if body is None else _decode_layout(body)
            if found:
                self._layouts[pool] = found
            elif self._layouts.get(pool) is None:
                self._layouts.pop(pool, None)

        self._link.ask(LAYOUT, pool.encode(), told)

    # -- seats ------------------------------------------------------------------------------------------------

    def _sit(self, owner: Owner) -> None:
        """An owner in this process takes operations."""
        if self._sat != (owner, owner.epoch):
            self._sat = (owner, owner.epoch)
            self._seat += 1
        self._seated = owner
        self._begin(owner.epoch)

    def opened(self, epoch: int) -> None:
        if self._closed or epoch < self.epoch:
            return
        self._sat = None
        self._seat += 1
        self._seated = self._link
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        """Somebody decides: define, then bring everything that has no answer."""
        self.epoch = max(self.epoch, epoch)
        self._away_since = None
        self._failing = False
        self._tell_all()
        seat, now = self._seat, self._clock.monotonic()
        frees: list[_Pending] = []
        reserves: list[_Pending] = []
        for pending in list(self._pending.values()):
            if pending.seat == seat:
                continue
            if pending.broken:
                if pending.broken < epoch:
                    pending.deaths += 1
                pending.broken = 0
                if pending.deaths >= POISON_DEATHS:
                    self._poisoned(pending)
                    continue
            self.resent += pending.attempt > 0 or pending.seat > 0
            (reserves if isinstance(pending.operation, Reserve) else frees).append(pending)
        reserves.sort(key=_longest_waiting)
        seated = self._seated
        for pending in (*frees, *reserves):
            if self._seated is not seated or self._seat != seat:
                # Lost again meanwhile; the next seat gets the rest.
                break
            if pending.number in self._pending:
                self._send(pending, now - pending.at)
        for waiter in self._opening:
            if not waiter.done():
                waiter.set_result(None)
        self._opening.clear()
        self._changed()

    def _unseat(self) -> None:
        """Nobody decides."""
        was, self._seated = self._seated, None
        if self._away_since is None:
            self._away_since = self._clock.monotonic()
        self._watch()
        if was is not None:
            self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self)

    def begin_watch(self) -> None:
        """Begin to follow the ledger."""
        self._keeper.want(self.account)
        self.check()
        if self._seated is None:
            self._watch()

    def _watch(self) -> None:
        if self._timer is None and not self._closed:
            delay = min(_TICK_US << min(self._ticks, 6), _TICKS_MOST_US)
            self._ticks += 1
            self._timer = self._clock.call_at(self._clock.monotonic() + delay, self._tick)

    def _tick(self) -> None:
        """Nobody decides: look again, and see whose patience is over."""
        self._timer = None
        if self._closed:
            return
        self.check()
        if self._seated is not None:
            return
        since = self._away_since
        if since is not None and not self._failing and self._clock.monotonic() - since >= self._options.away_us:
            self._failing = True
            _log.error("ledger is away", ledger=self.account, unanswered=len(self._pending))
            self._fail_all(self._gone())
            for waiter in self._opening:
                if not waiter.done():
                    waiter.set_result(None)
            self._opening.clear()
            self._changed()
        self._watch()

    async def _opened_by(self, until: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._opening.append(waiter)
        timer = self._clock.call_at(until, lambda: None if waiter.done() else waiter.set_result(None))
        try:
            await waiter
        finally:
            timer.cancel()

    # -- answers ----------------------------------------------------------------------------------------------

    def answered(self, number: int, answer: Answer) -> None:
        pending = self._pending.get(number)
        if pending is not None:
            self._settle(pending, answer)
        elif isinstance(answer, Invalid):
            self._was_defined(answer)

    def failed(self, number: int, error: LedgerError) -> None:
        pending = self._pending.get(number)
        if pending is None:
            return
        if _is_passing(error):
            pending.seat = 0
            self._overdue(pending, error)
        else:
            self._settle(pending, error)

    def _heard(self, pending: _Pending, attempt: int, answer: Answer | LedgerError) -> None:
        """An owner in this process has answered, maybe one that lost the ledger long ago."""
        if pending.number not in self._pending:
            return
        if not isinstance(answer, LedgerError):
            self._settle(pending, answer)
        elif attempt == pending.attempt and pending.seat == self._seat:
            if not _is_passing(answer):
                self._settle(pending, answer)
                return
            pending.seat = 0
            if self._seated is not None and not isinstance(self._seated, Link):
                self._unseat()
            self._overdue(pending, answer)

    def _overdue(self, pending: _Pending, error: LedgerError) -> None:
        """The owner could not decide. Whoever did not mean to wait has waited enough by now?"""
        operation = pending.operation
        waits = isinstance(operation, Reserve) and operation.max_wait_us > 0
        if not waits and self._clock.monotonic() - pending.at >= self._options.away_us:
            self._settle(pending, error)

    def queued(self, numbers: list[int]) -> None:
        """The link itself keeps what has no word on it."""

    def lost(self, how: Lost) -> None:
        link = self._link
        if how is Lost.BROKEN:
            for pending in self._pending.values():
                if pending.seat == self._seat and link.is_flying(pending.number):
                    pending.broken = link.epoch
        if self._seated is link:
            self._unseat()
            self.check()

    def refused(self, target: Target) -> None:
        self._keeper.suspect(self.account, target.epoch)

    def hinted(self, target: Target) -> None:
        if target.node != self._node and target.epoch >= self.epoch:
            self._link.aim(target)
        # Another process is believed to own the ledger once it does; this one, if it is chosen, has to make haste.
        if target.node == self._node or not target.is_expected:
            self._keeper.hint(self.account, target.epoch, target.node, target.address)

    def _settle(self, pending: _Pending, answer: Answer | LedgerError) -> None:
        del self._pending[pending.number]
        if isinstance(pending.operation, Reserve):
            self._reserves -= 1
        if not isinstance(answer, LedgerError):
            self._ticks = 0
        try:
            pending.reply(answer)
        except Exception as error:
            _log.error("a reply failed", ledger=self.account, kind=type(error).__name__)

    def _poisoned(self, pending: _Pending) -> None:
        self.poisoned += 1
        kind = type(pending.operation).__name__
        _log.error("operation was in flight when two owners died", ledger=self.account, kind=kind)
        self._settle(pending, LedgerFault(f"two servers have ended while they had this {kind}: it is not sent again"))

    def _fail_all(self, error: LedgerError) -> None:
        for pending in list(self._pending.values()):
            if pending.number in self._pending:
                self._settle(pending, error)

    def _gone(self) -> LedgerError:
        if self._closed:
            return LedgerDraining(f"the server stops, and leaves ledger {self.account!r} to others: ask another one")
        return LedgerUnavailable(f"nobody decides for ledger {self.account!r} now", 200_000)

    def _was_defined(self, answer: Answer | LedgerError) -> None:
        if isinstance(answer, Invalid):
            _log.warning("definition refused", ledger=self.account, field=answer.field, message=answer.message)
            self._defined.clear()
        elif isinstance(answer, LedgerError):
            self._epoch = -1


_USABLE = frozenset({Phase.SERVING, Phase.REPLAYING, Phase.FAILED})


def _is_passing(error: LedgerError) -> bool:
    """Another owner, or the same one later, will decide."""
    return isinstance(error, LedgerUnavailable | LedgerDraining) and not isinstance(error, LedgerStopped)


def _longest_waiting(pending: _Pending) -> tuple[int, int]:
    operation = pending.operation
    return (pending.at - operation.waited_us if isinstance(operation, Reserve) else pending.at), pending.number


def _pool_of(operation: Operation) -> str | None:
    """The pool whose limits the answer will name."""
    if isinstance(operation, Commit):
        return None if operation.context is None else operation.context.pool
    if isinstance(operation, Observe):
        return operation.candidate.pool
    if isinstance(operation, Reserve) and operation.candidates:
        return operation.candidates[0].pool
    return None


def aged(operation: Operation, elapsed: int) -> Operation:
    """An operation that is sent ``elapsed`` µs after it came: a Reserve has waited so long already, and what upstream
    said is so much older."""
    replace = msgspec.structs.replace
    if isinstance(operation, Reserve):
        left = max(0, operation.max_wait_us - elapsed)
        return replace(operation, waited_us=operation.waited_us + elapsed, max_wait_us=left)
    if isinstance(operation, Commit):
        return replace(operation, outcome=_aged_outcome(operation.outcome, elapsed))
    if isinstance(operation, Observe):
        outcome = _aged_outcome(operation.outcome, elapsed)
        return replace(operation, outcome=outcome, age_us=operation.age_us + elapsed)
    if isinstance(operation, Renew) and operation.observation is not None:
        seen = operation.observation
        return replace(operation, observation=replace(seen, age_us=seen.age_us + elapsed))
    return operation


def _aged_outcome(outcome: Outcome, elapsed: int) -> Outcome:
    seen = outcome.observation
    if seen is None:
        return outcome
    return msgspec.structs.replace(outcome, observation=msgspec.structs.replace(seen, age_us=seen.age_us + elapsed))


async def _ask(slot: FleetSlot, key: str, timeout_us: int) -> Standing | LedgerError | None:
    try:
        body = await slot.ask(RECALL, key.encode(), timeout_us)
    except LedgerError as error:
        return error
    return None if body is None else _decode_recall(body)


class FleetRouter(Router):
    """The ledgers of a fleet, as one process of it sees them. :meth:`attach` a keeper before anything else.

    ``on_change`` hears of every ledger that becomes able to decide, or no more.
    """

    is_spread = True

    def __init__(
        self,
        node: str,
        transport: Transport,
        clock: Clock,
        random: Random,
        setup_of: SetupOf,
        *,
        most: int = MAX_LEDGERS,
        asks: Mapping[str, Handler] = ASKS,
        options: FleetOptions | None = None,
        link_options: LinkOptions | None = None,
        on_change: Callable[[Slot], object] | None = None,
    ) -> None:
        self.slots: dict[str, Slot] = {}
        self.closed = False
        self._node = node
        self._transport = transport
        self._clock = clock
        self._random = random
        self._setup_of = setup_of
        self._most = most
        self._asks = asks
        self._options = options
        self._link_options = link_options
        self._on_change = on_change
        self._keeper: Keeper
        self._fleet: dict[str, FleetSlot] = {}

    def attach(self, keeper: Keeper) -> None:
        """Follow this keeper."""
        self._keeper = keeper

    def changed(self, ledger: str) -> None:
        """To be called at every change of ``keeper.where(ledger)``, before its peers hear of it."""
        slot = self._fleet.get(ledger)
        if slot is not None:
            slot.check()
        elif not self.closed and len(self.slots) < self._most:
            self._made(ledger)

    def prepare(self, ledger: str) -> None:
        """What this process has to define at a ledger that it owns is submitted when this returns."""
        slot = self._fleet.get(ledger)
        if slot is None:
            if not self.closed and len(self.slots) < self._most:
                self._made(ledger)
        elif slot.local is None or not slot.ready:
            slot.check()

    async def open(self, accounts: Iterable[str]) -> None:
        """Follow these ledgers. Does not wait until somebody decides for them."""
        for account in accounts:
            if account not in self._fleet and len(self.slots) < self._most:
                self._made(account)

    def slot(self, account: str, path: str = "target.account") -> Slot:
        slot = self._fleet.get(account)
        if slot is None:
            if len(self.slots) >= self._most or self.closed:
                raise refused(path, f"is new, and this server has its most accounts ({self._most})")
            slot = self._made(account)
        return slot

    async def inquire(self, key: str, timeout_us: int, unasked: Container[str] = ()) -> Inquiry:
        """Every ledger's owner is asked at once; not one that has been away for as long as that."""
        known = self.look(key)
        away = [slot for slot in self._fleet.values() if slot.engine is None]
        ask = [slot for slot in away if slot.away_us < timeout_us and slot.account not in unasked]
        silent: list[Slot] = [slot for slot in away if slot not in ask]
        told: list[tuple[Slot, Standing | None]] = []
        for slot, answer in zip(ask, await asyncio.gather(*(_ask(slot, key, timeout_us) for slot in ask)), strict=True):
            if isinstance(answer, LedgerError):
                silent.append(slot)
            else:
                told.append((slot, answer))
        there = summed(told, silent)
        return Inquiry((*known.found, *there.found), (*known.waiting, *there.waiting), there.silent)

    async def locate(self, key: str) -> Found | None:
        inquiry = await self.inquire(key, _ASK_US)
        best, silent = inquiry.best, inquiry.silent
        if silent and (best is None or best.withdrawn):
            raise unavailable(f"ledger {silent[0].account!r} is away, and it might know the reservation: ask again")
        return best

    async def stop(self, drain_timeout: float) -> None:
        """Leave every ledger; who still waits is told to ask another server."""
        self.closed = True
        error = LedgerDraining("the server stops: ask another one")
        await asyncio.gather(*(slot.close(error) for slot in self._fleet.values()))

    def _made(self, account: str) -> FleetSlot:
        slot = FleetSlot(
            account,
            self._node,
            self._keeper,
            self._transport,
            self._clock,
            self._random,
            self._setup_of(account),
            asks=self._asks,
            options=self._options,
            link_options=self._link_options,
            on_change=self._on_change,
        )
        self._fleet[account] = self.slots[account] = slot
        slot.begin_watch()
        return slot
