"""One operation's way: checked, routed to its ledger, answered into the sink that it came from.

The two ways in, unary calls and sessions, differ only in their sinks. An answer that cannot be delivered is the sink's
to report: :meth:`Desk.abandon` then gives the reservation back, unless the same id has been asked for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from paceline.engine.answers import Answer, Committed, Denied, Granted, Invalid, Released, Renewed, Touched
from paceline.engine.dimensions import Dimension
from paceline.engine.operations import NO_PRICES, Context, Release
from paceline.frontend.auth import Caller
from paceline.frontend.errors import Code, Problem, exhausted, refused, unavailable, unexpected
from paceline.frontend.limits import MAX_ORPHANS, ORPHAN_GRACE_US
from paceline.frontend.places import Destination
from paceline.frontend.replies import Replies, draining
from paceline.frontend.requests import Known, Recall, Requests
from paceline.frontend.routing import Found, Router, Slot, look_up
from paceline.frontend.spread import Spread, Spreads, used, withdrawn
from paceline.ledger.errors import (
    LedgerBusy,
    LedgerDraining,
    LedgerError,
    LedgerFault,
    LedgerStopped,
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
    spread: Spread | None = None
    """It goes to several ledgers, and has no answer yet."""
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

    def refused(self, problem: Problem) -> None:
        """A Reserve that no ledger decides."""
        self.desk.unclaim(self.key)
        self.sink.failed(self, problem)

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
        self.spreads = Spreads(router)
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
            try:
                self.spreads.start(ticket, plan)
            except Problem:
                self.unclaim(key)
                raise
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
        if ticket.spread is not None:
            ticket.spread.withdraw()
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
                raise used()
            ended = state.ended.get(key)
            if ended is not None:
                raise used() if ended.granted_at is not None else withdrawn()

    def _claim(self, key: str) -> None:
        self._claims[key] = self._claims.get(key, 0) + 1


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


def _nobody(_: Answer | LedgerError) -> None:
    """For an answer that nobody waits for: if the ledger is away, the hold's expiry does it."""
