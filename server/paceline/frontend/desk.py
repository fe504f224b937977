"""One operation's way: checked, routed to its ledger, answered into the sink that it came from.

The two ways in, unary calls and sessions, differ only in their sinks. An answer that cannot be delivered is the sink's
to report: :meth:`Desk.abandon` then gives the reservation back, unless the same id has been asked for again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from paceline.engine.answers import Answer, Committed, Denied, Granted, Invalid, Reason, Released, Renewed, Touched
from paceline.engine.dimensions import Dimension
from paceline.engine.operations import NO_PRICES, Context, Release, Reserve
from paceline.frontend.auth import Caller
from paceline.frontend.errors import Code, Problem, exhausted, refused, unavailable, unexpected
from paceline.frontend.limits import MAX_ORPHANS, ORPHAN_GRACE_US
from paceline.frontend.places import Destination
from paceline.frontend.replies import Replies, draining
from paceline.frontend.requests import Known, Recall, Requests, Reservation
from paceline.frontend.routing import Found, Router, Slot, look_up
from paceline.ledger.errors import (
    LedgerBusy,
    LedgerDraining,
    LedgerError,
    LedgerFault,
    LedgerStopped,
    LedgerUnavailable,
)
from paceline_client.stubs import v1 as pb

# Fields of ResponseItem, which also name the kind of an operation.
RESERVE = 2
COMMIT = 3
RELEASE = 4
RENEW = 5
OBSERVE = 6
CANCEL = 7
ERROR = 8

_NO_CHOICES: tuple[tuple[int, Destination], ...] = ()
_NOBODY_WAITS = frozenset({Reason.RELEASED, Reason.TOO_LARGE, Reason.POOL_CLOSED, Reason.POOL_PAUSED})
"""Denials that waiting does not change."""


class Sink(Protocol):
    """Where answers go. Called from the event loop, once for each ticket."""

    shared: set[str]
    """Pools whose fallback share this client has."""

    def answered(self, ticket: Ticket, body: bytes, granted: bool) -> None:
        """An encoded answer. A grant is delivered or abandoned by the sink."""
        ...

    def failed(self, ticket: Ticket, problem: Problem) -> None:
        """No answer."""
        ...

    def share(self, ticket: Ticket, ledger: str, pool: str, touched: Touched) -> None:
        """A pool that is not in ``shared`` was granted from, by an answer that follows."""
        ...

    def demand(self, ledger: str, pool: str, charges: Sequence[tuple[Dimension, int]], count: int) -> None:
        """So many calls were granted, each holding ``charges``."""
        ...


class _Elsewhere(Exception):
    """The reservation may be known where another process owns the ledger: it has to be looked for."""

    def __init__(self, key: str) -> None:
        super().__init__("elsewhere")
        self.key = key


class Ticket:
    """One operation on its way. ``number`` and ``field`` are those of its item."""

    # Defaults of the class: most operations need few of them, and there are many operations.
    key = ""
    slot: Slot | None = None
    choices: tuple[tuple[int, Destination], ...] = _NO_CHOICES
    """The caller's candidates in the order of the engine's."""
    context: Context | None = None
    pool = ""
    priced = True
    wide: Wide | None = None
    found: Found | None = None
    """Where the reservation was found, if it was looked for."""
    is_searched = False

    def __init__(self, desk: Desk, sink: Sink, caller: Caller, number: int, field: int) -> None:
        self.desk = desk
        self.sink = sink
        self.caller = caller
        self.number = number
        self.field = field

    # -- replies of the owner -----------------------------------------------------------------------------------

    def reserved(self, answer: Answer | LedgerError) -> None:
        try:
            if type(answer) is Granted:
                sink = self.sink
                body = self.desk.replies.granted(answer, self.choices, len(self.caller.prefix))
                context = answer.context
                pool = context.pool
                sink.demand(context.ledger, pool, context.charges, len(answer.keys))
                if pool not in sink.shared:
                    sink.share(self, context.ledger, pool, answer.touched)
                sink.answered(self, body, True)
            elif type(answer) is Denied:
                self.desk.unclaim(self.key)
                self.sink.answered(self, self.desk.replies.denied(answer), False)
            elif isinstance(answer, LedgerDraining):
                self.desk.unclaim(self.key)
                self.sink.answered(self, draining(), False)
            else:
                self.desk.unclaim(self.key)
                self.sink.failed(self, self._problem(answer))
        except Problem as problem:
            self.desk.unclaim(self.key)
            self.sink.failed(self, problem)
        except Exception as error:
            if type(answer) is Granted:
                # Nobody has it.
                self.desk.abandon(self)
            else:
                self.desk.unclaim(self.key)
            self.sink.failed(self, unexpected("reserve", error))

    def committed(self, answer: Answer | LedgerError) -> None:
        try:
            if type(answer) is Committed:
                context = self.context
                slot = self.slot
                body = self.desk.replies.committed(
                    answer,
                    "" if slot is None else slot.account,
                    self.pool if context is None else context.pool,
                    context,
                    self.priced,
                )
                self.sink.answered(self, body, False)
            else:
                self.sink.failed(self, self._problem(answer))
        except Exception as error:
            self.sink.failed(self, unexpected("commit", error))

    def released(self, answer: Answer | LedgerError) -> None:
        try:
            if type(answer) is Released:
                self.sink.answered(self, self.desk.replies.released(answer), False)
            else:
                self.sink.failed(self, self._problem(answer))
        except Exception as error:
            self.sink.failed(self, unexpected("release", error))

    def renewed(self, answer: Answer | LedgerError) -> None:
        try:
            if type(answer) is Renewed:
                self.sink.answered(self, self.desk.replies.renewed(answer), False)
            else:
                self.sink.failed(self, self._problem(answer))
        except Exception as error:
            self.sink.failed(self, unexpected("renew", error))

    def _problem(self, answer: Answer | LedgerError) -> Problem:
        if isinstance(answer, LedgerError):
            return problem_of(answer)
        if isinstance(answer, Invalid):
            if self.slot is not None and "pool" in answer.message:
                self.slot.forget_definitions()
            if answer.full:
                return exhausted(f"{answer.field}: {answer.message}", 1_000_000)
            return refused(self._path(answer.field), answer.message)
        raise TypeError(f"{type(answer).__name__} is no answer to this operation")

    def _path(self, field: str) -> str:
        """A field of the engine's operation as the caller knows it: candidates may have been added."""
        head, bracket, rest = field.partition("[")
        if head != "candidates" or not bracket:
            return field
        place, _, tail = rest.partition("]")
        known = place.isdigit() and int(place) < len(self.choices)
        return f"candidates[{self.choices[int(place)][0]}]{tail}" if known else field


class Desk:
    """Takes the operations of all callers of one server."""

    def __init__(
        self,
        requests: Requests,
        replies: Replies,
        router: Router,
        *,
        orphan_grace_us: int = ORPHAN_GRACE_US,
    ) -> None:
        self.requests = requests
        self.replies = replies
        self.router = router
        self.draining = False
        self.wides: dict[str, Wide] = {}
        self._claims: dict[str, int] = {}
        """Reserves by key whose answer is still to be delivered. Bounded by the caps of the sinks."""
        self._orphans = 0
        self._grace_us = orphan_grace_us
        self._searches: set[asyncio.Task[None]] = set()
        """For reservations without a context. Bounded by the caps of the sinks."""

    @property
    def undelivered(self) -> int:
        """Reserves that have no delivered answer yet."""
        return len(self._claims)

    # -- operations; they raise Problem -------------------------------------------------------------------------

    def reserve(
        self, message: pb.ReserveRequest, ticket: Ticket, caller: Caller, wait_cap_us: int | None = None
    ) -> None:
        """Start a Reserve."""
        plan = self.requests.reserve(message, caller, wait_cap_us)
        if self.draining:
            ticket.sink.answered(ticket, draining(), False)
            return
        operation = plan.operation
        key = operation.key
        ticket.key = key
        ticket.choices = plan.choices
        account = plan.account
        slots = self.router.slots
        if account is None:
            self._claim(key)
            self._wide(ticket, plan)
            return
        slot = slots.get(account)
        if slot is None:
            slot = self.router.slot(account, "candidates[0].target.account")
        if len(slots) > 1 and not slot.knows(key):
            self._unknown_elsewhere(key, slot)
        ticket.slot = slot
        claims = self._claims
        claims[key] = claims.get(key, 0) + 1
        slot.reserve(operation, plan.choices, ticket.reserved)

    def commit(self, message: pb.CommitRequest, ticket: Ticket, caller: Caller) -> None:
        """Start a Commit."""
        try:
            self._commit(message, ticket, caller, self.recall)
        except _Elsewhere as where:
            self._search(ticket, where.key, lambda found: self._commit(message, ticket, caller, self._recall_of(found)))

    def _commit(self, message: pb.CommitRequest, ticket: Ticket, caller: Caller, recall: Recall) -> None:
        operation = self.requests.commit(message, caller, recall)
        ticket.key = operation.key
        context = ticket.context = operation.context
        if context is None:
            ticket.pool = recall(operation.key, None).pool or ""
        else:
            ticket.priced = context.prices != NO_PRICES
        slot = ticket.slot = self._home(operation.key, context, ticket)
        slot.submit(operation, ticket.committed)

    def release(self, message: pb.ReleaseRequest, ticket: Ticket, caller: Caller) -> None:
        """Start a Release. Of an id that nobody knows, every ledger that might see it is told."""
        operation, accounts = self.requests.release(message, caller)
        ticket.key = operation.key
        context = operation.context
        if context is not None:
            ticket.slot = self._home(operation.key, context, ticket)
            ticket.slot.submit(operation, ticket.released)
            return
        slot = self.router.known(operation.key)
        if slot is None and self.router.is_spread:
            self._search(ticket, operation.key, lambda found: self._release(operation, accounts, ticket, found))
        else:
            self._release(operation, accounts, ticket, slot)

    def _release(self, operation: Release, accounts: Sequence[str], ticket: Ticket, known: Slot | Found | None) -> None:
        if known is not None:
            slots = [known.slot if isinstance(known, Found) else known]
        elif accounts:
            slots = [self.router.slot(account, f"targets[{place}].account") for place, account in enumerate(accounts)]
        else:
            slots = list(self.router.slots.values())
        if len(slots) == 1:
            slots[0].submit(operation, ticket.released)
        else:
            _Everywhere(ticket, slots, operation)

    def renew(self, message: pb.RenewRequest, ticket: Ticket, caller: Caller) -> None:
        """Start a Renew."""
        try:
            self._renew(message, ticket, caller, self.recall)
        except _Elsewhere as where:
            self._search(ticket, where.key, lambda found: self._renew(message, ticket, caller, self._recall_of(found)))

    def _renew(self, message: pb.RenewRequest, ticket: Ticket, caller: Caller, recall: Recall) -> None:
        operation = self.requests.renew(message, caller, recall)
        ticket.key = operation.key
        ticket.slot = self._home(operation.key, operation.context, ticket)
        ticket.slot.submit(operation, ticket.renewed)

    def observe(self, message: pb.ObserveRequest, ticket: Ticket, caller: Caller) -> None:
        """Start an Observe."""
        operation, destination = self.requests.observe(message, caller)
        ticket.pool = destination.pool
        ticket.priced = destination.priced
        ticket.slot = slot = self.router.slot(destination.account)
        slot.reserve(operation, destination.alone, ticket.committed)

    # -- grants that nobody receives ----------------------------------------------------------------------------

    def delivered(self, key: str) -> None:
        """A grant reached its caller."""
        self._claims.pop(key, None)

    def unclaim(self, key: str) -> None:
        """There is nothing to deliver: one caller fewer waits for this id."""
        count = self._claims.get(key, 0)
        if count > 1:
            self._claims[key] = count - 1
        else:
            self._claims.pop(key, None)

    def abandon(self, ticket: Ticket) -> None:
        """Give back, or withdraw, a Reserve whose caller no longer wants it, unless another waits for the same id."""
        count = self._claims.get(ticket.key, 0)
        if count != 1:
            self.unclaim(ticket.key)
            return
        del self._claims[ticket.key]
        self.withdraw(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        """Release a Reserve wherever it is now."""
        if ticket.wide is not None:
            ticket.wide.withdraw()
        elif ticket.slot is not None:
            ticket.slot.submit(Release(ticket.key), _nobody)

    def abandon_later(self, tickets: Sequence[Ticket]) -> None:
        """The same for a caller that is gone, after a moment in which it may ask again under the same ids."""
        if not tickets:
            return
        if self._orphans + len(tickets) > MAX_ORPHANS or self._grace_us <= 0:
            self._abandon_all(tickets, counted=False)
            return
        self._orphans += len(tickets)
        asyncio.get_running_loop().call_later(self._grace_us / 1e6, self._abandon_all, tickets)

    def _abandon_all(self, tickets: Sequence[Ticket], counted: bool = True) -> None:
        if counted:
            self._orphans -= len(tickets)
        for ticket in tickets:
            self.abandon(ticket)

    # -- routing ------------------------------------------------------------------------------------------------

    def recall(self, key: str, context: Context | None) -> Known:
        """What is known of a grant: its pool, and how long ago it was. Raises :class:`_Elsewhere`."""
        if context is not None:
            slot = self.router.slots.get(context.ledger)
            now = None if slot is None else slot.now()
            return Known(context.pool, None if now is None else max(0, now - context.granted_at))
        slot = self.router.known(key)
        state = None if slot is None else slot.state
        if slot is None or state is None:
            if self.router.is_spread:
                raise _Elsewhere(key)
            return Known(None, None)
        found = look_up(state, key, slot.now() or 0)
        return Known(None, None) if found is None else Known(found[0], found[1])

    def _recall_of(self, found: Found | None) -> Recall:
        """The same, once every ledger was asked."""

        def recall(key: str, context: Context | None) -> Known:
            if context is not None:
                return self.recall(key, context)
            return Known(None, None) if found is None else Known(found.pool, found.age_us)

        return recall

    def _search(self, ticket: Ticket, key: str, go_on: Callable[[Found | None], object]) -> None:
        """Find a reservation in the ledgers that others own, then go on."""

        async def search() -> None:
            try:
                ticket.found = await self.router.locate(key)
                ticket.is_searched = True
                go_on(ticket.found)
            except Problem as problem:
                ticket.sink.failed(ticket, problem)
            except Exception as error:
                ticket.sink.failed(ticket, unexpected("search", error))

        task = asyncio.get_running_loop().create_task(search())
        self._searches.add(task)
        task.add_done_callback(self._searches.discard)

    def _home(self, key: str, context: Context | None, ticket: Ticket) -> Slot:
        """The ledger of a reservation. Raises :class:`Problem` if nobody knows it, and :class:`_Elsewhere`."""
        if context is not None:
            slot = self.router.slots.get(context.ledger)
            return self.router.slot(context.ledger, "context") if slot is None else slot
        slot = self.router.known(key) if ticket.found is None else ticket.found.slot
        if slot is None:
            if self.router.is_spread and not ticket.is_searched:
                raise _Elsewhere(key)
            away = next((each for each in self.router.slots.values() if not each.ready), None)
            if away is not None:
                raise unavailable(f"ledger {away.account!r} is away, and might know the reservation: ask again")
            raise refused("context", "the reservation is not known here: send the context of its grant")
        return slot

    def _unknown_elsewhere(self, key: str, slot: Slot) -> None:
        """Ids are unique over all ledgers. Raises :class:`Problem` if another one has granted this id."""
        for other in self.router.slots.values():
            if other is slot:
                continue
            state = other.state
            if state is None:
                continue
            if key in state.open:
                raise _used()
            ended = state.ended.get(key)
            if ended is not None:
                raise _used() if ended.granted_at is not None else _withdrawn()

    def _claim(self, key: str) -> None:
        self._claims[key] = self._claims.get(key, 0) + 1

    def _wide(self, ticket: Ticket, plan: Reservation) -> None:
        key = plan.operation.key
        running = self.wides.get(key)
        if running is not None:
            running.join(ticket)
            return
        wide = Wide(self, ticket, plan)
        try:
            known = self.router.known(key)
            if known is None and self.router.is_spread:
                self._begin_later(wide, key)
                return
            state = None if known is None else known.state
            ended = None if state is None else state.ended.get(key)
            wide.begin(known, ended is not None and ended.granted_at is None)
        except Problem:
            self.unclaim(key)
            self.wides.pop(key, None)
            raise

    def _begin_later(self, wide: Wide, key: str) -> None:
        async def begin() -> None:
            try:
                found = await self.router.locate(key)
                if found is None:
                    wide.begin(None, False)
                else:
                    wide.begin(found.slot, found.ended and found.age_us is None)
            except Problem as problem:
                wide.fail(problem)
            except Exception as error:
                wide.fail(unexpected("search", error))

        task = asyncio.get_running_loop().create_task(begin())
        self._searches.add(task)
        task.add_done_callback(self._searches.discard)


class _Part:
    """The candidates of one account in a Reserve over several."""

    __slots__ = ("choices", "operation", "slot", "waitable")

    def __init__(self, slot: Slot, operation: Reserve, choices: tuple[tuple[int, Destination], ...]) -> None:
        self.slot = slot
        self.operation = operation
        self.choices = choices
        self.waitable = False


class Wide:
    """A Reserve over several accounts: ask each ledger in turn without waiting, then wait at the first where it helps.

    At most one ledger is asked at a time, and one that knows the id already is asked first and alone, so that an id has
    at most one grant. It waits in one ledger only: a turn that comes earlier in another one is missed.
    """

    def __init__(self, desk: Desk, ticket: Ticket, plan: Reservation) -> None:
        self._desk = desk
        self._key = plan.operation.key
        self._tickets = [ticket]
        self._parts: deque[_Part] = deque()
        self._asked: list[_Part] = []
        self._part: _Part | None = None
        self._wait_us = plan.operation.max_wait_us
        self._last: Answer | LedgerError | None = None
        self._withdrawn = False
        self._since = asyncio.get_running_loop().time()
        self._split(plan)
        desk.wides[self._key] = self
        ticket.wide = self

    def join(self, ticket: Ticket) -> None:
        """Another caller of the same id: it gets the same answer."""
        ticket.wide = self
        self._tickets.append(ticket)

    def withdraw(self) -> None:
        """Nobody wants the answer any more: ask no further ledger, and give back what the present one grants."""
        self._withdrawn = True
        self._forget()
        if self._part is not None:
            self._part.slot.submit(Release(self._key), _nobody)

    def _forget(self) -> None:
        wides = self._desk.wides
        # After a withdrawal, the id may have been asked for anew.
        if wides.get(self._key) is self:
            del wides[self._key]

    def begin(self, known: Slot | None, withdrawn: bool) -> None:
        """Ask the first ledger. ``known``: the one that knows the id; ``withdrawn``: from a release of it."""
        if self._withdrawn:
            return
        if known is not None:
            self._parts = deque(part for part in self._parts if part.slot is known)
            if not self._parts:
                raise _withdrawn() if withdrawn else _used()
        self._next()

    def _split(self, plan: Reservation) -> None:
        by_account: dict[str, list[int]] = {}
        for place, (_, destination) in enumerate(plan.choices):
            by_account.setdefault(destination.account, []).append(place)
        operation = plan.operation
        for account, places in by_account.items():
            index = plan.choices[places[0]][0]
            slot = self._desk.router.slot(account, f"candidates[{index}].target.account")
            part = msgspec.structs.replace(
                operation, candidates=tuple(operation.candidates[place] for place in places), max_wait_us=0
            )
            self._parts.append(_Part(slot, part, tuple(plan.choices[place] for place in places)))

    def _next(self) -> None:
        if self._parts:
            self._ask(self._parts.popleft())
            return
        elapsed = int((asyncio.get_running_loop().time() - self._since) * 1e6)
        left = self._wait_us - elapsed
        waitable = next((part for part in self._asked if part.waitable), None)
        if left > 0 and waitable is not None:
            self._wait_us = 0
            waitable.operation = msgspec.structs.replace(waitable.operation, max_wait_us=left)
            self._ask(waitable)
        else:
            self._finish(self._last)

    def _ask(self, part: _Part) -> None:
        self._part = part
        part.slot.reserve(part.operation, part.choices, self._reply)

    def _reply(self, answer: Answer | LedgerError) -> None:
        part = self._part
        if part is None:
            return
        if self._withdrawn:
            if isinstance(answer, Granted):
                part.slot.submit(Release(self._key), _nobody)
            return
        try:
            released = isinstance(answer, Denied) and answer.reason is Reason.RELEASED
            undecided = isinstance(answer, LedgerBusy | LedgerDraining)
            if released or not (isinstance(answer, Denied) or undecided):
                # A grant, or nobody knows whether there is one: no other ledger may be asked.
                self._finish(answer)
                return
            if isinstance(answer, Denied):
                part.waitable = answer.reason not in _NOBODY_WAITS
                if self._last is None or not isinstance(self._last, Denied) or _sooner(answer, self._last):
                    self._last = answer
            elif self._last is None:
                self._last = answer
            self._asked.append(part)
            self._next()
        except Problem as problem:
            self.fail(problem)
        except Exception as error:
            self.fail(unexpected("reserve", error))

    def _finish(self, answer: Answer | LedgerError | None) -> None:
        self._forget()
        part = self._part
        for ticket in self._tickets:
            if part is not None:
                ticket.slot = part.slot
                ticket.choices = part.choices
            ticket.wide = None
            ticket.reserved(LedgerUnavailable("no ledger was asked") if answer is None else answer)

    def fail(self, problem: Problem) -> None:
        """Tell everybody who waits."""
        self._forget()
        for ticket in self._tickets:
            ticket.wide = None
            self._desk.unclaim(self._key)
            ticket.sink.failed(ticket, problem)


class _Everywhere:
    """A Release that every ledger is told. One that held the reservation answers for all."""

    def __init__(self, ticket: Ticket, slots: Sequence[Slot], operation: Release) -> None:
        self._ticket = ticket
        self._left = len(slots)
        self._best = Released(tombstone=True)
        self._error: Answer | LedgerError | None = None
        if not slots:
            ticket.released(self._best)
        for slot in slots:
            slot.submit(operation, self._reply)

    def _reply(self, answer: Answer | LedgerError) -> None:
        self._left -= 1
        if not isinstance(answer, Released):
            self._error = answer
        elif answer.released or (answer.duplicate and not self._best.released):
            self._best = answer
        if self._left == 0:
            decided = self._best.released or self._best.duplicate or self._error is None
            self._ticket.released(self._best if decided or self._error is None else self._error)


def problem_of(error: LedgerError) -> Problem:
    """What callers are told of a ledger's trouble."""
    if isinstance(error, LedgerBusy):
        return exhausted(error.message, error.retry_after_us or 100_000)
    if isinstance(error, LedgerFault):
        return Problem(Code.ABORTED, error.message)
    if isinstance(error, LedgerStopped):
        return unavailable("the ledger has stopped itself, and an operator must look at it: see the server's log")
    return unavailable(error.message)


def _sooner(one: Denied, other: Denied) -> bool:
    if one.retry_after_us is None:
        return False
    return other.retry_after_us is None or one.retry_after_us < other.retry_after_us


def _used() -> Problem:
    return refused("reservation_id", "was used for a call to another account: use a new id")


def _withdrawn() -> Problem:
    return refused("reservation_id", "was released before: use a new id")


def _nobody(_: Answer | LedgerError) -> None:
    """For an answer that nobody waits for: if the ledger is away, the hold's expiry does it."""
