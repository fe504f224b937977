"""A Reserve whose candidates lie in several ledgers: one of them grants it, and no other keeps anything of it.

The ledgers are asked in the caller's order without waiting, and the first that grants is taken; where none does, it
waits in all that it may wait in and takes the first turn. All are asked under the id itself. What a ledger may hold of
it afterwards, a waiter, a grant, or one of an earlier attempt that could not be asked for, is taken back by a Release,
which also leaves a tombstone: so nothing that is still on its way to that ledger can be granted there.

Times in µs. Used from one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum, auto
from functools import partial
from typing import Protocol

import msgspec

from paceline.engine.answers import Answer, Denied, Granted, Invalid, Reason
from paceline.engine.operations import Reserve
from paceline.frontend.errors import Problem, refused, unavailable, unexpected
from paceline.frontend.places import Destination
from paceline.frontend.requests import Reservation
from paceline.frontend.routing import Inquiry, Router, Slot
from paceline.frontend.withdrawals import Withdrawals
from paceline.ledger.clock import Clock, SystemClock, Timer
from paceline.ledger.errors import LedgerBusy, LedgerDraining, LedgerError, LedgerStopped, LedgerUnavailable

OFFER_US = 250_000
"""For so long an offer waits for the ledgers of better candidates, and everything for one that does not answer."""
AGAIN_US = 1_000_000
"""Between two attempts at a ledger that was away, while a turn in another one is waited for."""
_AGED_US = 1_000

_NOBODY_WAITS = frozenset({Reason.RELEASED, Reason.TOO_LARGE, Reason.POOL_CLOSED, Reason.POOL_PAUSED})
"""Denials that waiting does not change."""


class Asker(Protocol):
    """Who wants the answer: :class:`paceline.frontend.desk.Ticket`."""

    slot: Slot | None
    choices: tuple[tuple[int, Destination], ...]
    spread: Spread | None

    def reserved(self, answer: Answer | LedgerError) -> None: ...
    def refused(self, problem: Problem) -> None: ...


class Stage(Enum):
    """How far a ledger has come with a Reserve."""

    FRESH = auto()
    """Not asked."""
    ASKED = auto()
    """Asked without waiting; no answer."""
    WAITING = auto()
    """Asked to wait; no answer."""
    OFFERED = auto()
    DENIED = auto()
    FAILED = auto()
    """Nobody could decide; whether it was granted is not known."""


_UNANSWERED = (Stage.ASKED, Stage.WAITING)


class Part:
    """The candidates of one account. ``operation`` does not wait."""

    __slots__ = ("answer", "asked_at", "choices", "crowded", "operation", "silent", "slot", "stage", "waited")

    def __init__(self, slot: Slot, operation: Reserve, choices: tuple[tuple[int, Destination], ...]) -> None:
        self.slot = slot
        self.operation = operation
        self.choices = choices
        self.stage = Stage.FRESH
        self.answer: Answer | LedgerError | None = None
        """The last one."""
        self.asked_at = 0
        self.silent = False
        """The ledger could not be asked what it knows of the id."""
        self.crowded = False
        """An earlier attempt waits there, whatever this one is answered."""
        self.waited = False
        """It was asked to wait."""

    def may_wait(self, again: bool) -> bool:
        """Waiting may help here. ``again``: also where nobody could decide before."""
        answer = self.answer
        if self.stage is Stage.DENIED:
            return not self.waited and isinstance(answer, Denied) and answer.reason not in _NOBODY_WAITS
        if self.stage is Stage.FAILED:
            return (again or not self.waited) and _passes(answer)
        return self.stage is Stage.FRESH

    @property
    def may_hold(self) -> bool:
        """The ledger may have a waiter or a grant, of what it was asked."""
        if self.stage is Stage.FAILED:
            return not isinstance(self.answer, LedgerBusy | LedgerDraining | Invalid)
        return self.stage not in (Stage.FRESH, Stage.DENIED)

    @property
    def is_released(self) -> bool:
        """The id was withdrawn there."""
        return isinstance(self.answer, Denied) and self.answer.reason is Reason.RELEASED


class Spread:
    """One Reserve over several ledgers. ``askers`` all get its answer."""

    def __init__(self, spreads: Spreads, key: str, parts: Sequence[Part], wait_us: int, asker: Asker) -> None:
        self.key = key
        self.parts = list(parts)
        self.askers = [asker]
        self._spreads = spreads
        self._clock = spreads.clock
        self._wait_us = wait_us
        self._since = self._clock.monotonic()
        self._patient = True
        """Better candidates may still be waited for."""
        self._waits = False
        """None grants at once: a turn is waited for in all."""
        self._begun = False
        self._done = False
        self._busy = False
        self._timers: list[Timer] = []
        self._again: Timer | None = None
        asker.spread = self

    def join(self, asker: Asker) -> None:
        """Another caller of the same id: it gets the same answer."""
        asker.spread = self
        self.askers.append(asker)

    def begin(self, inquiry: Inquiry) -> None:
        """Ask. Raises :class:`Problem` if the id cannot be used."""
        if self._done:
            return
        self._begun = True
        for part in self.parts:
            part.silent = part.slot in inquiry.silent
            part.crowded = part.slot in inquiry.waiting
        best = inquiry.best
        if best is not None:
            if best.withdrawn and any(part.silent for part in self.parts):
                raise unavailable("a ledger is away, and it might know the reservation: ask again")
            ranks = {found.slot: found.rank for found in inquiry.found}
            mine = [part for part in self.parts if ranks.get(part.slot) == best.rank]
            if not mine:
                raise withdrawn() if best.withdrawn else used()
            for part in self.parts if best.rank else ():
                if part is not mine[0] and (part.silent or part.crowded or (part in mine and not best.ended)):
                    # Of an attempt through a front end that has ended since.
                    self._spreads.withdrawals.submit(part.slot, self.key, part.operation.hold_us)
            # Once granted always that grant: nobody else is asked.
            self.parts = mine[:1]
        self._timers.append(self._clock.call_at(self._since + OFFER_US, self._hurry))
        if self._wait_us > 0:
            # The ledgers themselves answer by then; but for those that do not answer at all.
            self._timers.append(self._clock.call_at(self._since + self._wait_us + OFFER_US, self._give_up))
        self._go_on()

    def withdraw(self) -> None:
        """Nobody wants the answer any more."""
        if self._end():
            for part in self.parts:
                if not self._begun or part.may_hold or part.silent or part.crowded:
                    self._spreads.withdrawals.submit(part.slot, self.key, part.operation.hold_us)

    def fail(self, problem: Problem) -> None:
        """Tell everybody who waits."""
        if self._end():
            for asker in self.askers:
                asker.spread = None
                asker.refused(problem)

    # -- what happens -------------------------------------------------------------------------------------------

    def _answered(self, part: Part, answer: Answer | LedgerError) -> None:
        self._spreads.silent.discard(part.slot.account)
        if self._done:
            # What it may have granted is taken back already.
            return
        part.answer = answer
        if isinstance(answer, Granted):
            part.stage = Stage.OFFERED
        elif isinstance(answer, Denied):
            part.stage = Stage.DENIED
            if part.is_released:
                # By another attempt that was granted elsewhere, or for good: the others will say so in a moment.
                self._timers.append(self._clock.call_at(self._clock.monotonic() + OFFER_US, self._released))
        else:
            part.stage = Stage.FAILED
        self._go_on()

    def _hurry(self) -> None:
        self._patient = False
        silent = self._spreads.silent
        silent.update(part.slot.account for part in self.parts if self._is_overdue(part))
        later = max((part.asked_at for part in self.parts if part.stage is Stage.ASKED), default=self._since)
        if later > self._since:
            self._timers.append(self._clock.call_at(later + OFFER_US, self._go_on))
        self._go_on()

    def _give_up(self) -> None:
        if not self._done:
            self._finish_without()

    def _released(self) -> None:
        if not self._done and not any(part.stage is Stage.OFFERED for part in self.parts):
            self._finish_without()

    def _look_again(self) -> None:
        self._again = None
        self._go_on(again=True)

    # -- what follows -------------------------------------------------------------------------------------------

    def _go_on(self, again: bool = False) -> None:
        """Do all that the answers so far allow. An answer may come while another ledger is asked."""
        if self._busy:
            return
        self._busy = True
        try:
            while not self._done and self._step(again):
                again = False
        except Exception as error:
            self.fail(unexpected("reserve", error))
        finally:
            self._busy = False

    def _step(self, again: bool) -> bool:
        """One thing to do; whether there may be more."""
        for part in self.parts:
            if part.stage is Stage.OFFERED:
                self._finish(part, part.answer)
                return False
            if self._holds_up(part):
                break
        unanswered = any(part.stage in _UNANSWERED for part in self.parts)
        if any(part.is_released for part in self.parts):
            if not unanswered and not any(part.stage is Stage.OFFERED for part in self.parts):
                self._finish_without()
            return False
        if self._waits:
            return self._wait(again)
        for part in self.parts:
            if part.stage is Stage.FRESH and not self._is_away(part):
                self._ask(part, 0)
                return True
            if self._holds_up(part) and part.slot.ready:
                return False
        if not unanswered and self._wait_us <= 0:
            # Before it is denied, also those that are only slow.
            slow = [part for part in self.parts if part.stage is Stage.FRESH and part.slot.away_us < OFFER_US]
            for part in slow:
                if not self._done:
                    self._ask(part, 0)
            if slow:
                return True
        denied = any(part.stage is Stage.DENIED for part in self.parts)
        if unanswered:
            timely = any(part.stage is Stage.ASKED and not self._is_overdue(part) for part in self.parts)
            if self._patient or (timely and self._wait_us <= 0) or not (denied or self._wait_us > 0):
                return False
        if self._wait_us > 0 or all(part.stage is Stage.FRESH for part in self.parts):
            self._waits = True
            return True
        self._finish_without()
        return False

    def _holds_up(self, part: Part) -> bool:
        """A worse candidate is not taken before this one has answered, and not asked, unless its owner is away."""
        return part.stage is Stage.ASKED and self._patient

    def _is_overdue(self, part: Part) -> bool:
        return part.stage is Stage.ASKED and self._clock.monotonic() - part.asked_at >= OFFER_US

    def _is_away(self, part: Part) -> bool:
        slot = part.slot
        return slot.away_us >= OFFER_US or slot.account in self._spreads.silent

    def _wait(self, again: bool) -> bool:
        """Wait wherever it helps; whether there may be more to do."""
        left = self._wait_us - self._elapsed()
        asked = [part for part in self.parts if part.may_wait(again)] if left > 0 or not self._wait_us else []
        for part in asked:
            if not self._done:
                self._ask(part, max(0, left))
        if asked:
            return True
        if not any(part.stage in _UNANSWERED for part in self.parts):
            self._finish_without()
        elif self._again is None and any(part.may_wait(True) for part in self.parts):
            self._again = self._clock.call_at(self._clock.monotonic() + AGAIN_US, self._look_again)
        return False

    def _ask(self, part: Part, wait_us: int) -> None:
        operation = part.operation
        if wait_us > 0:
            elapsed = self._elapsed()
            waited = elapsed if elapsed > _AGED_US else 0
            operation = msgspec.structs.replace(operation, max_wait_us=wait_us, waited_us=operation.waited_us + waited)
        part.stage = Stage.WAITING if self._waits else Stage.ASKED
        part.waited = self._waits
        part.asked_at = self._clock.monotonic()
        if not self._patient and not self._waits:
            self._timers.append(self._clock.call_at(part.asked_at + OFFER_US, self._go_on))
        part.answer = None
        try:
            part.slot.reserve(operation, part.choices, partial(self._answered, part))
        except Problem as problem:
            self._answered(part, LedgerUnavailable(problem.message))

    def _elapsed(self) -> int:
        return self._clock.monotonic() - self._since

    # -- the end ------------------------------------------------------------------------------------------------

    def _finish_without(self) -> None:
        """Nobody grants: of the denials the one that hopes soonest, unless there was hope where nobody decided."""
        denied = [part for part in self.parts if isinstance(part.answer, Denied)]
        failed = [part for part in self.parts if isinstance(part.answer, LedgerError | Invalid)]
        best = min(denied, key=_hope, default=None)
        if best is not None and (not failed or _hope(best) < _NEVER):
            self._finish(best, best.answer)
        else:
            part = min(failed, key=_weight, default=self.parts[0])
            self._finish(part, part.answer)

    def _finish(self, taken: Part, answer: Answer | LedgerError | None) -> None:
        if not self._end():
            return
        if not isinstance(answer, LedgerError) and answer is not None:
            # After an error the caller may ask again under the same id: it finds what is there.
            granted = isinstance(answer, Granted)
            for part in self.parts:
                if granted and part is taken:
                    continue
                earlier = part.crowded or (part.silent and (granted or part.stage is not Stage.FRESH))
                if earlier or part.may_hold:
                    self._spreads.withdrawals.submit(part.slot, self.key, part.operation.hold_us)
        told = LedgerUnavailable("no ledger has answered in time") if answer is None else answer
        for asker in self.askers:
            asker.slot = taken.slot
            asker.choices = taken.choices
            asker.spread = None
            asker.reserved(told)

    def _end(self) -> bool:
        if self._done:
            return False
        self._done = True
        for timer in self._timers:
            timer.cancel()
        if self._again is not None:
            self._again.cancel()
        self._spreads.forget(self)
        return True


_NEVER = 1 << 62


def _hope(part: Part) -> int:
    answer = part.answer
    if not isinstance(answer, Denied) or answer.retry_after_us is None:
        # Of an id that was withdrawn, that is all there is to say.
        return -1 if isinstance(answer, Denied) and answer.reason is Reason.RELEASED else _NEVER
    return answer.retry_after_us


def _weight(part: Part) -> tuple[bool, bool]:
    """Errors that pass are told before those that do not."""
    return isinstance(part.answer, Invalid), not _passes(part.answer)


def _passes(answer: Answer | LedgerError | None) -> bool:
    """It may be decided later."""
    if isinstance(answer, LedgerUnavailable):
        return not isinstance(answer, LedgerStopped)
    return isinstance(answer, LedgerBusy) or (isinstance(answer, Invalid) and answer.full)


def used() -> Problem:
    """The id is that of another call."""
    return refused("reservation_id", "was used for a call to another account: use a new id")


def withdrawn() -> Problem:
    """The id was released, elsewhere."""
    return refused("reservation_id", "was released before: use a new id")


class Spreads:
    """All Reserves over several ledgers of one server."""

    def __init__(self, router: Router, clock: Clock | None = None) -> None:
        self.running: dict[str, Spread] = {}
        """By key. Bounded by the caps of the sinks."""
        self.silent: set[str] = set()
        """Accounts whose ledger owes an answer for longer than an offer waits: at most as many as there are."""
        self.clock: Clock = SystemClock() if clock is None else clock
        self.withdrawals = Withdrawals(self.clock)
        self._router = router
        self._tasks: set[asyncio.Task[None]] = set()
        """Inquiries. Bounded by the caps of the sinks."""

    def start(self, asker: Asker, plan: Reservation) -> None:
        """Begin with a Reserve, or join the one that is under way. Raises :class:`Problem`."""
        key = plan.operation.key
        running = self.running.get(key)
        if running is not None:
            running.join(asker)
            return
        spread = Spread(self, key, self._split(plan), plan.operation.max_wait_us, asker)
        self.running[key] = spread
        inquiry = self._router.look(key)
        if inquiry.silent and self._router.is_spread:
            task = asyncio.get_running_loop().create_task(self._begin_later(spread))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        try:
            spread.begin(inquiry)
        except Problem:
            self.forget(spread)
            raise

    def forget(self, spread: Spread) -> None:
        """It has its answer. After a withdrawal, the id may have been asked for anew."""
        if self.running.get(spread.key) is spread:
            del self.running[spread.key]

    # -- helpers ------------------------------------------------------------------------------------------------

    async def _begin_later(self, spread: Spread) -> None:
        try:
            spread.begin(await self._router.inquire(spread.key, OFFER_US, self.silent))
        except Problem as problem:
            spread.fail(problem)
        except Exception as error:
            spread.fail(unexpected("search", error))

    def _split(self, plan: Reservation) -> list[Part]:
        by_account: dict[str, list[int]] = {}
        for place, (_, destination) in enumerate(plan.choices):
            by_account.setdefault(destination.account, []).append(place)
        operation = plan.operation
        parts: list[Part] = []
        for account, places in by_account.items():
            index = plan.choices[places[0]][0]
            slot = self._router.slot(account, f"candidates[{index}].target.account")
            one = msgspec.structs.replace(
                operation, candidates=tuple(operation.candidates[place] for place in places), max_wait_us=0
            )
            parts.append(Part(slot, one, tuple(plan.choices[place] for place in places)))
        return parts
