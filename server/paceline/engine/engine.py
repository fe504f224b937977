"""The engine: batches of operations and the time in, answers and events out.

:meth:`Engine.step` decides operations one after the other. What it decides becomes events, folded into the state at
once; nothing else ever changes the books, and an event carries results, so replaying the journal needs no decision.

Where to find what: Reserve, waiting and granting in :mod:`~paceline.engine.reserving`; Commit, Release, Renew and
expiry in :mod:`~paceline.engine.settling`; taking over in :mod:`~paceline.engine.absence` and
:mod:`~paceline.engine.adoption`; readings of headers in :mod:`~paceline.engine.teaching`; pools, shares and
limits in :mod:`~paceline.engine.definitions`; refusals that are not about budget in
:mod:`~paceline.engine.pressing`; one dimension's arithmetic in :mod:`~paceline.engine.bucket`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from paceline.engine import events as ev
from paceline.engine import operations as op
from paceline.engine.absence import Absence, begin_after
from paceline.engine.adoption import Adopting
from paceline.engine.answers import Answer, Committed
from paceline.engine.books import Books, Caps
from paceline.engine.definitions import Definitions
from paceline.engine.explaining import Explainer
from paceline.engine.operations import Operation
from paceline.engine.reserving import Reserving
from paceline.engine.settling import Settling
from paceline.engine.state import FORMAT, State
from paceline.engine.stats import Stats
from paceline.engine.teaching import Teacher
from paceline.engine.waiting import Waiters

__all__ = ["Caps", "Engine", "Step"]


class Step(msgspec.Struct):
    """What a step did: answers by ticket, events to journal, and when the next step is due without operations."""

    at: int
    answers: list[tuple[int, Answer]]
    events: list[ev.Event]
    wake_at: int | None


class Engine:
    """Decides for one ledger. Not thread-safe; the caller owns the time."""

    def __init__(
        self,
        ledger: str,
        state: State | None = None,
        caps: Caps = Caps(),  # noqa: B008
        absence: Absence | None = None,
        form: int = FORMAT,
    ) -> None:
        """``absence``: what is known of the time after the last event of ``state``; ``None``: nothing was missed.

        ``form``: no kind of event is made that came with a later form. See :attr:`form`.
        """
        self.state = State(ledger) if state is None else state
        self.stats = Stats()
        self._books = Books(self.state, caps)
        self._definitions = Definitions(self._books)
        self._teacher = Teacher(self._books, self._definitions, self.stats)
        self._reserving = Reserving(self._books, self._teacher, self.stats)
        self._settling = Settling(self._books, self._reserving, self._teacher, self.stats)
        self._adopting = Adopting(self._books, self._reserving, self._settling, self._teacher)
        self._absence = absence
        self.form = form
        """The form of the journal that is in force. It may be raised between steps, when an operator has finalized an
        upgrade."""

    def step(self, now: int, operations: Sequence[tuple[int, Operation]]) -> Step:
        """Decide a batch at ``now`` (µs of ledger time; earlier than before counts as before).

        A Reserve that waits is answered by a later step, under the ticket that it came with.
        """
        books, reserving, settling = self._books, self._reserving, self._settling
        answers: list[tuple[int, Answer]] = []
        books.begin(now)
        self.stats.hindsight.begin(books.state.buckets, books.now)
        absence, self._absence = self._absence, None
        if absence is not None:
            begin_after(books, absence)
            reserving.gather(books.now + absence.gather_us)
        reserving.begin(answers)
        settling.expire()
        self._teacher.pressing.tick()
        for ticket, operation in operations:
            if isinstance(operation, op.Reserve):
                reserving.reserve(ticket, operation)
            elif isinstance(operation, op.Commit):
                answer = settling.commit(operation)
                answers.append((ticket, answer))
                if isinstance(answer, Committed) and not answer.stale:
                    # Perhaps by the context of another owner's grant, while its Reserve was sent here too and waits.
                    reserving.tell(operation.key)
            elif isinstance(operation, op.Renew):
                answers.append((ticket, settling.renew(operation)))
            elif isinstance(operation, op.Release):
                answers.append((ticket, settling.release(operation)))
            elif isinstance(operation, op.Observe):
                answers.append((ticket, settling.observe(operation)))
            elif isinstance(operation, op.Expire):
                answers.append((ticket, settling.expire_now(operation)))
            elif isinstance(operation, op.Adopt):
                answers.append((ticket, self._adopting.adopt(operation)))
            else:
                answers.append((ticket, self._definitions.define(operation)))
        reserving.turns.serve()
        for expires_at, key in reserving.granted:
            settling.watch(expires_at, key)
        settling.forget()
        books.finish()
        return Step(books.now, answers, books.events, self._wake_at())

    def waiting(self) -> dict[str, int]:
        """Number of waiters by pool; one that waits for several pools counts in each."""
        return {pool: len(line) for pool, line in self._reserving.waiting.lines.items() if len(line)}

    def waiters(self) -> Waiters:
        """Those that wait, to look at."""
        return Waiters(self._reserving.waiting)

    def explainer(self, now: int) -> Explainer:
        """Says why calls wait, and how one would be decided, at ``now`` (µs of ledger time). For use at once."""
        books = self._books
        books.now = max(now, books.now)
        return Explainer(books, self._reserving)

    def _wake_at(self) -> int | None:
        times = [at for at in (self._reserving.turns.wake_at(), self._settling.wake_at()) if at is not None]
        return max(self._books.now + 1, min(times)) if times else None
