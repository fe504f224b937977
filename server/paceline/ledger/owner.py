"""The owner of a ledger: operations in, journalled answers out.

Operations that arrive together are decided as one batch, and their events go into one record. While a record
is being written the owner decides on, into the record behind it. An answer leaves once every record that it
may rest on is acknowledged, its own and all before it; one that changed nothing leaves with the record in
flight, or at once if there is none.

Whatever goes wrong, the journal is the truth: the owner throws its books away, loads them again, and says
:class:`LedgerUnavailable` to everybody who has no answer yet. They ask again under the same ids.

Over a store that several processes share it is the other way round as long as this process is the owner: what it has
acknowledged, it knows, and a store that is away, or comes back without its last writes, is waited for and told again.
Only when another owner has taken over does it throw its books away, and hands over what its successor cannot know.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any

import structlog

from paceline.engine.absence import Absence
from paceline.engine.adoption import testimony, whole_testimony
from paceline.engine.answers import Answer
from paceline.engine.operations import Operation, Reserve
from paceline.engine.state import State
from paceline.ledger.clock import Clock, LedgerTime, SystemClock, Timer
from paceline.ledger.errors import (
    LedgerBusy,
    LedgerDraining,
    LedgerError,
    LedgerFault,
    LedgerMoved,
    LedgerStopped,
    LedgerUnavailable,
)
from paceline.ledger.fold import Fold, Unfoldable, begun, decode_payload, encode_payload, formed, full, paced
from paceline.ledger.journal import (
    RETRYABLE,
    Beginning,
    Journal,
    Loaded,
    Mark,
    Record,
    StoreError,
    StoreFenced,
    StoreFull,
    StoreUnavailable,
)
from paceline.ledger.machine import Books, Decider, Decision, EngineMachine, Machine
from paceline.ledger.options import LATENCY_BUCKETS, OwnerOptions, Phase, Statistics
from paceline.ledger.shared import Bid, Known, SharedJournal, StoreDeposed, StoreHeld, StoreLost
from paceline.ledger.tasks import halt

_log = structlog.get_logger("paceline.ledger")


Reply = Callable[[Answer | LedgerError], object]


class _Batch:
    """Decided and not acknowledged: what goes into one record, and the answers that wait for it."""

    __slots__ = ("answers", "at", "count", "operations", "payloads")

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.answers: list[tuple[int, Answer]] = []
        self.operations = 0
        self.count = 0
        """Events."""
        self.at = 0


class Owner:
    """Runs one ledger over its journal, in one event loop. All methods are called from that loop.

    ``on_phase`` is called after each change of :attr:`phase`.
    """

    def __init__(
        self,
        ledger: str,
        journal: Journal | SharedJournal,
        *,
        machine: Machine | None = None,
        clock: Clock | None = None,
        options: OwnerOptions | None = None,
        on_phase: Callable[[Phase], object] | None = None,
    ) -> None:
        self.ledger = ledger
        self.phase = Phase.STARTING
        self.statistics = Statistics()
        self.failure: LedgerStopped | None = None
        self.epoch = 0
        self.inherited_at: int | None = None
        """Ledger time of the last record of the process before this one; ``None``: there was none."""
        self.testimony: list[Operation] = []
        """Once deposed: what the successor must be told, because the store may have lost it."""
        self.left: Fold | None = None
        """Once handed over: the books, for this process to follow its successor with."""
        self.form: int | None = None
        """The form that the ledger's owners may write; ``None``: this version's."""
        self.took_over = False
        """Of a shared ledger: the owner before had not let go."""
        self._journal = journal
        self._shared = journal if isinstance(journal, SharedJournal) else None
        self._machine: Machine = EngineMachine() if machine is None else machine
        self._clock: Clock = SystemClock() if clock is None else clock
        self._options = OwnerOptions() if options is None else options
        self._on_phase = on_phase
        self._log = _log.bind(ledger=ledger)

        self._refusal: LedgerError | None = LedgerUnavailable(f"ledger {ledger!r} has not started")
        self._inbox: list[tuple[int, Operation]] = []
        self._inbox_most = self._options.inbox_operations
        self._replies: dict[int, Reply] = {}
        self._ticket = 0
        self._scheduled = False
        self._due = False
        """A step is due although nothing may be queued."""

        self._books: Books
        self._decider: Decider
        self._tainted = False
        """The engine failed in a step: the books hold a part of it."""
        self._time: LedgerTime | None = None
        self._wake_at: int | None = None
        self._timer: Timer | None = None
        self._timer_at = 0

        self._queued: _Batch | None = None
        self._flying: _Batch | None = None
        self._flying_since = 0
        self._watching = False
        self._seq = 0
        self._hash = b""
        self._journalled_at = 0
        self._appender: asyncio.Task[None] | None = None
        self._more: asyncio.Future[None] | None = None
        """Wakes the appender."""
        self._beating: asyncio.Task[None] | None = None
        """Renews the lease."""
        self._settled: list[asyncio.Future[None]] = []
        """Wait for nothing to be queued or in flight."""

        self._bid: Bid | None = None
        """What this owner knows of its own ledger, when it has to read it again."""
        self._stalled = False
        """The shared store is away, and everybody was told."""
        self._stalled_at = 0
        self._recovery: asyncio.Task[None] | None = None
        self._backoff_us = 0
        self._idle_faults = 0
        self._dumping: asyncio.Task[None] | None = None
        self._snapshot_seq = 0
        self._snapshot_size = 0
        self._events_since_snapshot = 0
        self._bytes_since_snapshot = 0
        self._events_since_check = 0
        self._handler: asyncio.AbstractEventLoop

    # -- for callers -----------------------------------------------------------------------------------------

    async def start(self, fold: Fold | None = None, bid: Bid | None = None) -> None:
        """Load the ledger and serve. Raises :class:`~paceline.ledger.journal.StoreError` or
        :class:`LedgerStopped`.

        Of a shared ledger: ``fold`` are books that have followed its journal so far, which this owner makes its own.
        """
        self._handler = asyncio.get_running_loop()
        try:
            await self._load(fold, bid)
        except LedgerStopped as error:
            self._fail(error)
            raise
        except StoreError as error:
            self.statistics.last_error = str(error)
            self._refusal = LedgerUnavailable(str(error))
            raise
        self._enter(Phase.SERVING)
        self._due = True
        self._schedule()
        if self._shared is not None:
            self._beating = asyncio.create_task(self._beat(self._shared))

    @property
    def _written_form(self) -> int:
        return self._machine.form if self.form is None else self.form

    @property
    def engine(self) -> Decider:
        """The engine over the present books. Another one after each load."""
        return self._decider

    @property
    def is_living(self) -> bool:
        """Whether it owns the ledger, as far as it knows."""
        return self.phase not in (Phase.DEPOSED, Phase.STOPPED, Phase.FAILED)

    @property
    def waiting(self) -> int:
        """Operations without an answer."""
        return len(self._replies)

    @property
    def sequence(self) -> int:
        """Number of the newest record, which may be in flight."""
        return self._seq

    def now(self) -> int:
        """Ledger time in µs."""
        return 0 if self._time is None else self._time.now()

    def submit(self, operation: Operation, reply: Reply) -> None:
        """Have ``operation`` decided; ``reply`` is called once, from the event loop, maybe before this
        returns.

        A Reserve that waits is answered when its turn comes. To give one up, submit its Release.
        """
        inbox = self._inbox
        if self._refusal is not None:
            reply(self._refusal)
        elif len(inbox) >= (self._inbox_most * 3 // 4 if isinstance(operation, Reserve) else self._inbox_most):
            self.statistics.busy += 1
            reply(LedgerBusy(f"ledger {self.ledger!r} has too many operations queued", 100_000))
        else:
            self._ticket = ticket = self._ticket + 1
            self._replies[ticket] = reply
            inbox.append((ticket, operation))
            if not self._scheduled:
                self._scheduled = True
                self._handler.call_soon(self._turn)

    async def call(self, operation: Operation) -> Answer:
        """The answer to one operation. Raises :class:`LedgerError`. Cancelling does not withdraw the
        operation."""
        answered: asyncio.Future[Answer | LedgerError] = asyncio.get_running_loop().create_future()

        def reply(result: Answer | LedgerError) -> None:
            if not answered.done():
                answered.set_result(result)

        self.submit(operation, reply)
        result = await answered
        if isinstance(result, LedgerError):
            raise type(result)(result.message, result.retry_after_us)
        return result

    async def stop(self, drain_timeout: float) -> None:
        """Refuse what is new, answer what is decided, write a snapshot, and let the journal go.

        Takes at most ``drain_timeout`` seconds and a little; waiting Reserves are told
        :class:`LedgerDraining`.
        """
        if self.phase in (Phase.STOPPED, Phase.DRAINING):
            return
        deadline = self._clock.monotonic() + int(drain_timeout * 1e6)
        healthy = self.phase in (Phase.SERVING, Phase.REPLAYING)
        draining = LedgerDraining(f"the server of ledger {self.ledger!r} is stopping: ask another one, or again")
        if self.phase is not Phase.FAILED:
            self._refusal = draining
            if self.phase is not Phase.REPLAYING:
                self._enter(Phase.DRAINING)
        try:
            if healthy:
                async with asyncio.timeout(drain_timeout):
                    await self._quiet()
        except TimeoutError:
            self._log.warning("ledger did not drain in time", unanswered=len(self._replies))
        self._enter(Phase.DRAINING)
        await halt([self._recovery])
        if healthy and self._shared is not None and not self._is_deposed():
            # What the store may have lost a moment ago is put back.
            try:
                async with asyncio.timeout(max(0.1, (deadline - self._clock.monotonic()) / 1e6)):
                    await self._write_shared(self._shared, None)
            except StoreDeposed as error:
                self._deposed(error)
                return
            except TimeoutError:
                self._log.warning("the store could not be asked at the end")
        self._answer_all(draining)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await halt([self._dumping])
        await halt([self._beating])
        if healthy and self._is_folded() and self._seq > self._snapshot_seq:
            dump = self._snapshot(self._mark(), begun(self._books.dump(self._written_form)), throttle=False)
            try:
                async with asyncio.timeout(max(0.0, (deadline - self._clock.monotonic()) / 1e6)):
                    await dump
            except (TimeoutError, StoreError) as error:
                self._log.warning("no snapshot at the end; the next start replays the journal", error=str(error))
        await halt([self._appender])
        self._appender = None
        with contextlib.suppress(TimeoutError, StoreError):
            async with asyncio.timeout(max(0.1, (deadline - self._clock.monotonic()) / 1e6)):
                await self._journal.close()
        self._refusal = draining
        self._enter(Phase.STOPPED)

    async def hand_over(self, successor: str, timeout: float) -> None:
        """Let another process own a shared ledger: write what is decided, tell those who wait to ask there, let go.

        Takes at most ``timeout`` seconds. If the store could not be told (which raises
        :class:`~paceline.ledger.journal.StoreError`, or not, if it was the time that ran out), this owner goes on:
        as long as it lives, what the store loses can be put back.
        """
        if self._shared is None or self.phase is not Phase.SERVING:
            return
        moved = LedgerMoved(f"ledger {self.ledger!r} moves to {successor or 'another process'}")
        self._refusal = moved
        self._enter(Phase.DRAINING)
        self._inbox = []
        self._due = False
        self._wake(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        let_go = False
        try:
            async with asyncio.timeout(timeout):
                await self._written()
                await halt([self._beating])
                await halt([self._dumping])
                if not self._is_deposed():
                    # The successor finds everything, also if the store has just failed over, and need not allow for a
                    # time in which this owner may not have been there.
                    await self._write_shared(self._shared, None)
                    fold = self._followed(self._shared)
                    await self._shared.release(successor)
                    let_go, self.left = True, fold
        except StoreDeposed as error:
            self._deposed(error)
        except TimeoutError:
            self._log.warning("the lease was not given up in time", unanswered=len(self._replies))
        finally:
            if let_go:
                for task in (self._beating, self._recovery):
                    if task is not None:
                        task.cancel()
                self._drop()
                self._answer_all(moved)
                self._enter(Phase.STOPPED)
            elif self.is_living:
                self._stay(self._shared, moved)

    def _stay(self, journal: SharedJournal, moved: LedgerMoved) -> None:
        """Go on with a ledger that could not be let go. Whoever waits is told to ask again."""
        self._answer_all(moved)
        # They come back in any order, and keep their places.
        absence = Absence(since=self.now(), gather_us=self._options.gather_us)
        self._decider = self._machine.decider(self.ledger, self._books, absence, self.form)
        if self._beating is None or self._beating.done():
            self._beating = asyncio.create_task(self._beat(journal))
        if self.phase is Phase.RECOVERING:
            self._refusal = LedgerUnavailable(f"the journal of ledger {self.ledger!r} is away")
        else:
            self._refusal = None
            self._go_on()

    def _followed(self, journal: SharedJournal) -> Fold | None:
        """The books as one has them who has followed the journal to its end; ``None``: these are others."""
        tenure = journal.tenure
        if tenure is None or not self._is_folded() or (self._seq, self._hash) != (tenure.head.seq, tenure.head.hash):
            return None
        fold = Fold(self.ledger, self._machine, self._clock)
        fold.books, fold.tail = self._books, tenure.tail
        fold.seq, fold.hash, fold.at = self._seq, self._hash, self._journalled_at
        fold.events, fold.size = self._events_since_snapshot, self._bytes_since_snapshot
        fold.snapshot_seq, fold.snapshot_size = self._snapshot_seq, self._snapshot_size
        return fold

    async def finalize(self, form: int) -> None:
        """Write ``form`` from now on; versions that do not read it cannot own the ledger any more.

        Raises :class:`~paceline.ledger.journal.StoreError`, or ``ValueError`` if this version does not write it.
        """
        if self._shared is None:
            raise ValueError("an embedded ledger has one version, which writes its own form")
        if not (self.form or 0) <= form <= self._machine.form:
            raise ValueError(
                f"form {form} cannot be written: it is {self.form}, and this version knows {self._machine.form}"
            )
        await self._shared.finalize(form)
        self.form = form
        self._decider.form = form

    # -- deciding --------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._handler.call_soon(self._turn)

    def _turn(self) -> None:
        """Decide what is queued, if there is room behind the record in flight."""
        self._scheduled = False
        if self.phase is not Phase.SERVING and self.phase is not Phase.DRAINING:
            return
        most = self._options.batch_operations
        if self._is_full():
            return
        inbox = self._inbox
        if not inbox and not self._due:
            return
        self._due = False
        if len(inbox) <= most:
            batch = inbox
            self._inbox = []
        else:
            batch = inbox[:most]
            self._inbox = inbox[most:]
            self._schedule()
        try:
            self._decide(batch)
        except Exception as error:
            self._faulted(batch, error)

    def _is_full(self) -> bool:
        return self._queued is not None and self._queued.operations >= self._options.record_operations

    def _decide(self, batch: list[tuple[int, Operation]]) -> None:
        """One step of the engine. Raises whatever the engine raises; the books are then not to be trusted."""
        assert self._time is not None  # noqa: S101 -- set by the first load
        self._tainted = True
        step: Decision = self._decider.step(self._time.now(), batch)
        payload = self._machine.encode(step.events) if step.events else b""
        self._tainted = False
        self.statistics.batches += 1
        self.statistics.operations += len(batch)
        queued = self._queued
        if payload:
            if queued is None:
                self._queued = queued = _Batch()
            queued.payloads.append(payload)
            queued.answers += step.answers
            queued.operations += len(batch)
            queued.count += len(step.events)
            queued.at = step.at
            if self._more is not None and not self._more.done():
                self._more.set_result(None)
        elif queued is not None:
            queued.answers += step.answers
            queued.operations += len(batch)
        elif self._flying is not None:
            self._flying.answers += step.answers
        elif self._shared is None or self._shared.is_fresh() or not step.answers:
            self._answer(step.answers)
        else:
            # Nothing to write, but is it still ours to say? A batch without events asks.
            self._queued = _Batch()
            self._queued.answers = step.answers
            if self._more is not None and not self._more.done():
                self._more.set_result(None)
        self._wake(step.wake_at)

    def _answer(self, answers: list[tuple[int, Answer]]) -> None:
        take = self._replies.pop
        self.statistics.answers += len(answers)
        for ticket, answer in answers:
            reply = take(ticket, None)
            if reply is not None:
                try:
                    reply(answer)
                except Exception as error:
                    self._log.error("a reply failed", error=_place(error))

    def _answer_all(self, error: LedgerError, keep: Iterable[int] = ()) -> None:
        """Tell ``error`` to all without an answer, but those who hold the tickets of ``keep``."""
        replies, kept = self._replies, set(keep)
        self._replies = {ticket: replies[ticket] for ticket in kept if ticket in replies}
        for ticket, reply in replies.items():
            if ticket in kept:
                continue
            self.statistics.unavailable += 1
            try:
                reply(error)
            except Exception as failure:
                self._log.error("a reply failed", error=_place(failure))

    # -- waking by the clock ---------------------------------------------------------------------------------

    def _wake(self, at: int | None) -> None:
        self._wake_at = at
        if at is None or self._time is None:
            return
        # Never sooner than a millisecond from now: a step that is always due must not spin.
        when = max(self._time.monotonic(at), self._clock.monotonic() + 1_000)
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._clock.call_at(when, self._woken)

    def _woken(self) -> None:
        self._timer = None
        if self._wake_at is None or self._time is None:
            return
        if self._time.now() < self._wake_at:
            self._wake(self._wake_at)
        else:
            self._due = True
            self._schedule()

    # -- appending -------------------------------------------------------------------------------------------

    async def _append_all(self) -> None:
        """Write record after record, and let the answers of each go. Ends by breaking."""
        statistics = self.statistics
        while True:
            batch = self._queued
            if batch is None:
                self._settle()
                self._more = self._handler.create_future()
                await self._more
                self._more = None
                continue
            if self._shared is not None:
                at = self._flying_since + self._options.spacing_us
                if self._clock.monotonic() < at:
                    await self._clock.sleep_until(at)
                    batch = self._queued or batch
            self._queued, self._flying = None, batch
            record = self._seal(batch) if batch.payloads else None
            dump = None
            if record is not None:
                try:
                    dump = self._dump_due(batch, len(record.payload))
                except Exception as error:
                    statistics.last_error = f"dump failed: {_place(error)}"
                    self._log.error("dump failed", error=_place(error))
            self._flying_since = self._clock.monotonic()
            self._watch()
            try:
                if self._shared is not None:
                    await self._write_shared(self._shared, record)
                elif record is not None:
                    await self._journal.append(record)
            except StoreDeposed as error:
                self._deposed(error)
                return
            except StoreError as error:
                self._broken(error)
                return
            except Exception as error:
                self._broken(StoreUnavailable(f"the journal failed: {_place(error)}"))
                return
            took = max(0, self._clock.monotonic() - self._flying_since)
            self._flying = None
            self._backoff_us = 0
            if record is not None:
                statistics.appends += 1
                statistics.events += batch.count
                statistics.journal_bytes += len(record.payload)
                statistics.append_us += took
                statistics.append_us_histogram[min(took.bit_length(), LATENCY_BUCKETS - 1)] += 1
            self._answer(batch.answers)
            if self._stalled:
                self._resume()
            if dump is not None:
                self._dumping = asyncio.create_task(self._dump(dump))
            if self._inbox or self._due:
                self._schedule()

    def _appended(self, task: asyncio.Task[None]) -> None:
        """Without it nothing is answered any more."""
        if task is self._appender and not task.cancelled() and (error := task.exception()) is not None:
            self._broken(StoreUnavailable(f"the journal failed: {_place(error)}"))

    def _seal(self, batch: _Batch) -> Record:
        """The record of a batch, which is the journal's end from now on."""
        payload = encode_payload(batch.payloads)
        record = Record.sealed(self._seq + 1, self.epoch, batch.at, self._clock.wall(), self._hash, payload)
        self._seq, self._hash, self._journalled_at = record.seq, record.hash, record.at
        return record

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._look_at(self._flying_since + self._options.append_timeout_us, 0)

    def _look_at(self, due: int, looks: int) -> None:
        since = self._flying_since
        self._clock.call_at(due, lambda: self._watched(since, due, looks))

    def _watched(self, since: int, due: int, looks: int) -> None:
        self._watching = False
        if self._flying is None:
            return
        now = self._clock.monotonic()
        if self._flying_since != since:
            looks = 0
        if now - self._flying_since < self._options.append_timeout_us:
            self._watch()
            return
        # Was it the journal, or was this process itself held up? An acknowledgement that came meanwhile takes some
        # turns of the loop to arrive; and the journal's thread may have been held up as well.
        late = now - due
        if looks < _LAST_LOOKS or (late > _LOOK_US and looks < _MOST_LOOKS):
            self._watching = True
            self._look_at(now + max(_LOOK_US, min(late, self._options.append_timeout_us)), looks + 1)
        elif self._shared is not None:
            self._stall(StoreUnavailable("an append was not acknowledged in time"))
        else:
            self._broken(StoreUnavailable("an append was not acknowledged in time"))

    async def _quiet(self) -> None:
        """Return once everything submitted is decided and written (waiting Reserves are decided to wait)."""
        while self._recovery is not None or self._inbox or self._queued is not None or self._flying is not None:
            if self._recovery is not None:
                await asyncio.wait([self._recovery])
            elif self._inbox:
                self._schedule()
                await asyncio.sleep(0 if self._flying is None else 0.001)
            else:
                await self._written()

    def _settle(self) -> None:
        for waiter in self._settled:
            if not waiter.done():
                waiter.set_result(None)
        self._settled.clear()

    async def _written(self) -> None:
        """Return once nothing is queued or in flight, be it that it failed."""
        if self._queued is not None or self._flying is not None:
            waiter = self._handler.create_future()
            self._settled.append(waiter)
            await waiter

    # -- over a shared store ---------------------------------------------------------------------------------

    async def _write_shared(self, journal: SharedJournal, record: Record | None) -> None:
        """Write a record (``None``: only ask whether the ledger is still owned here), for as long as it takes.

        Raises :class:`~paceline.ledger.shared.StoreDeposed`.
        """
        backoff = self._options.backoff_first_us
        left = [] if record is None else [record]
        while True:
            try:
                if not left:
                    await journal.confirm()
                while left:
                    await journal.append(left[0])
                    del left[0]
                return
            except StoreLost as error:
                self._warn(error)
                with contextlib.suppress(StoreUnavailable, StoreFull, StoreLost):
                    await self._refound(journal, left)
                    return
            except StoreFenced:
                raise
            except StoreError as error:
                self._warn(error)
            except Exception as error:
                self._warn(StoreUnavailable(f"the journal failed: {_place(error)}"))
            await self._clock.sleep_until(self._clock.monotonic() + backoff)
            backoff = min(2 * backoff, _SHARED_BACKOFF_MOST_US)

    async def _refound(self, journal: SharedJournal, left: list[Record]) -> None:
        """Give an empty store the books as they are, with all that is decided, which ``left`` has if it fails."""
        queued = self._queued
        if queued is not None:
            self._queued = None
            if queued.payloads:
                left.append(self._seal(queued))
            if self._flying is not None:
                self._flying.answers += queued.answers
        await journal.refound(self._mark(), paced(begun(self._books.dump(self._written_form)), self._clock, full))
        self._snapshot_seq = self._seq

    async def _renew(self, journal: SharedJournal) -> None:
        """Keep the lease while the ledger is being read, which may take longer."""
        while True:
            await self._clock.sleep_until(self._clock.monotonic() + journal.terms.lease_us // 4)
            if journal.tenure is not None:
                # What is wrong shows when the owner first writes.
                with contextlib.suppress(StoreError):
                    await journal.confirm()

    async def _beat(self, journal: SharedJournal) -> None:
        """Renew the lease when no record does it."""
        period = journal.terms.lease_us // 4
        while True:
            await self._clock.sleep_until(self._clock.monotonic() + period)
            tenure = journal.tenure
            if self._flying is not None or tenure is None or self.phase is not Phase.SERVING:
                continue
            if self._clock.monotonic() - tenure.confirmed_at < period // 2:
                continue
            try:
                await journal.confirm()
            except StoreDeposed as error:
                if self._flying is None:
                    self._deposed(error)
                    return
            except StoreLost:
                # The next batch puts the books back; without one there would be none.
                if self._queued is None and self._flying is None:
                    self._queued = _Batch()
                    if self._more is not None and not self._more.done():
                        self._more.set_result(None)
            except StoreError as error:
                self._warn(error)
            except Exception as error:
                self._warn(StoreUnavailable(f"the lease could not be renewed: {_place(error)}"))

    def _warn(self, error: StoreError) -> None:
        self.statistics.append_failures += 1
        if str(error) != self.statistics.last_error:
            self.statistics.last_error = str(error)
            self._log.error("journal failed", error=str(error), kind=type(error).__name__)

    def _stall(self, error: StoreError) -> None:
        """The store is away for too long: whoever waits is told, and what is decided is kept to be written."""
        if self._stalled or self.phase not in (Phase.SERVING, Phase.DRAINING):
            return
        self._stalled = True
        self._stalled_at = self.now()
        self._unavailable(error)

    def _resume(self) -> None:
        """The store is back, and had lost nothing or was told again. Nobody waits any more."""
        self._stalled = False
        if self.phase is not Phase.RECOVERING:
            return
        absence = Absence(since=self._stalled_at, most_us=self._options.unseen_us)
        self._decider = self._machine.decider(self.ledger, self._books, absence, self.form)
        self._go_on()

    def _is_deposed(self) -> bool:
        return self.phase is Phase.DEPOSED

    def _deposed(self, error: StoreDeposed) -> None:
        """Another owner goes on: what it cannot know is kept for it, everything else is thrown away."""
        self._log.warning("deposed", error=str(error), lost=len(error.lost), epoch=self.epoch)
        self.statistics.last_error = str(error)
        if (error.lost or error.all_lost) and not self._tainted:
            try:
                self.testimony = self._testify(error.lost, error.all_lost)
            except Exception as failure:
                self._log.error("what the store lost could not be read", error=_place(failure))
        moved = LedgerMoved(f"ledger {self.ledger!r} is owned by another process")
        self._refusal = moved
        self._inbox = []
        self._drop()
        if self._beating is not None and self._beating is not asyncio.current_task():
            self._beating.cancel()
        self._answer_all(moved)
        self._enter(Phase.DEPOSED)

    def _testify(self, lost: Sequence[Record], all_lost: bool = False) -> list[Operation]:
        if all_lost and isinstance(self._books, State):
            return list(whole_testimony(self._books))
        events = [
            event
            for record in lost
            for payload in decode_payload(record.payload)
            for event in self._machine.decode(payload)
        ]
        return list(testimony(self._books, events)) if isinstance(self._books, State) else []

    # -- failing and recovering ------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase = phase
            if self._on_phase is not None:
                self._on_phase(phase)

    def _broken(self, error: StoreError) -> None:
        """An append failed, or nobody knows: forget everything, tell everybody, load again."""
        self.statistics.append_failures += 1
        self._drop()
        self._unavailable(error)
        self._start_recovery(self._recover(None))

    def _unavailable(self, error: StoreError) -> None:
        self.statistics.last_error = str(error)
        self._log.error("journal failed", error=str(error), kind=type(error).__name__)
        stopping = self._refusal if isinstance(self._refusal, LedgerDraining | LedgerMoved) else None
        retry_after = max(self._backoff_us, self._options.backoff_first_us)
        refusal = LedgerUnavailable(f"the journal of ledger {self.ledger!r} is away", retry_after)
        self._refusal = stopping or refusal
        self._inbox = []
        self._answer_all(refusal)
        self._enter(Phase.RECOVERING)

    def _faulted(self, batch: list[tuple[int, Operation]], error: Exception) -> None:
        """The engine failed: its books cannot be trusted any more. Find the operation that did it."""
        self.statistics.last_error = f"engine failed: {_place(error)}"
        self._log.error("engine failed", operations=len(batch), error=_place(error))
        self._enter(Phase.REPLAYING)
        self._start_recovery(self._recover(batch))

    def _start_recovery(self, recovery: Coroutine[Any, Any, None]) -> None:
        old = self._recovery
        if old is not None:
            old.cancel()
        task = asyncio.create_task(recovery)
        self._recovery = task
        task.add_done_callback(self._recovered)

    def _recovered(self, task: asyncio.Task[None]) -> None:
        if task is self._recovery:
            self._recovery = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(LedgerStopped(f"ledger {self.ledger!r} cannot recover: {_place(error)}"))

    async def _recover(self, suspects: list[tuple[int, Operation]] | None) -> None:
        """Load the ledger again and serve on. ``suspects`` are decided one by one first."""
        try:
            if suspects is None:
                await self._reload()
            else:
                await self._written()
                await self._replay(suspects)
        except LedgerStopped as error:
            self._fail(error)
            return
        except StoreHeld:
            return
        self._go_on()

    def _go_on(self) -> None:
        """Serve again after a trouble, or drain on, if this owner was about to let go."""
        if isinstance(self._refusal, LedgerMoved):
            # Whoever lets go decides nothing more.
            self._enter(Phase.DRAINING)
            return
        if isinstance(self._refusal, LedgerDraining):
            self._enter(Phase.DRAINING)
        else:
            self._refusal = None
            self._enter(Phase.SERVING)
        self._due = True
        self._schedule()

    async def _reload(self) -> None:
        """Load, as often as it takes. Raises :class:`LedgerStopped` when trying again cannot help."""
        while True:
            if self._backoff_us:
                await self._clock.sleep_until(self._clock.monotonic() + self._backoff_us)
            try:
                await self._load()
            except StoreHeld as error:
                if self._shared is not None and error.head.node == self._shared.terms.node:
                    self._unavailable(error)
                else:
                    self._deposed(StoreDeposed(str(error), error.head, ()))
                    raise
            except RETRYABLE as error:
                if self.phase is Phase.RECOVERING and str(error) == self.statistics.last_error:
                    self._log.info("journal is still away", error=str(error))
                else:
                    self._unavailable(error)
            except StoreError as error:
                raise LedgerStopped(str(error)) from error
            else:
                # Kept until an append succeeds: a store that can be read may still not be written.
                self._backoff_us = self._longer_backoff()
                self._log.info("ledger loaded again", epoch=self.epoch, seq=self._seq)
                return
            self._backoff_us = self._longer_backoff()

    def _longer_backoff(self) -> int:
        return min(max(2 * self._backoff_us, self._options.backoff_first_us), self._options.backoff_most_us)

    async def _replay(self, suspects: list[tuple[int, Operation]]) -> None:
        """Decide each operation alone; the one that makes the engine fail gets :class:`LedgerFault`."""
        pending = deque(suspects)
        while True:
            kept = [ticket for ticket, _ in pending] + [ticket for ticket, _ in self._inbox]
            self._answer_all(LedgerUnavailable(f"ledger {self.ledger!r} was loaded again"), kept)
            self._backoff_us = 0 if not self._idle_faults else self._longer_backoff()
            await self._reload()
            self._backoff_us = 0
            try:
                self._decide([])
            except Exception as error:
                self._idle_faults += 1
                self._log.error("engine failed without an operation", error=_place(error))
                if self._idle_faults >= self._options.idle_faults:
                    raise LedgerStopped(
                        f"ledger {self.ledger!r} stopped: its engine fails by itself ({_place(error)})"
                    ) from error
                continue
            self._idle_faults = 0
            if await self._each_alone(pending):
                return

    async def _each_alone(self, pending: deque[tuple[int, Operation]]) -> bool:
        """Take operations off ``pending``. ``False``: the books must be loaded again before the next."""
        while pending:
            if self._is_full():
                await self._written()
            ticket, operation = pending.popleft()
            if ticket not in self._replies:
                continue
            try:
                self._decide([(ticket, operation)])
            except Exception as error:
                self.statistics.faults += 1
                kind = type(operation).__name__
                self._log.error("operation made the engine fail", kind=kind, error=_place(error))
                await self._written()
                reply = self._replies.pop(ticket, None)
                if reply is not None:
                    reply(LedgerFault(f"this {kind} made the server fail; it left no trace, and others go on"))
                return False
            await asyncio.sleep(0)
        return True

    def _fail(self, error: LedgerStopped) -> None:
        """Stop for good, loudly, with the journal as it is."""
        self.failure = error
        self.statistics.last_error = error.message
        self._log.critical("ledger stopped", error=error.message)
        self._refusal = error
        self._inbox = []
        self._drop()
        if self._beating is not None:
            self._beating.cancel()
        self._answer_all(error)
        self._enter(Phase.FAILED)

    def _drop(self) -> None:
        """Forget what is decided and not acknowledged, and end what works on it."""
        for task in (self._appender, self._dumping):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        self._appender = self._dumping = None
        self._queued = self._flying = None
        self._stalled = False
        self._more = None
        self._settle()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake_at = None

    # -- loading ---------------------------------------------------------------------------------------------

    async def _load(self, fold: Fold | None = None, bid: Bid | None = None) -> None:
        """Books, engine and place in the journal, from the journal."""
        self._drop()
        started = self._clock.monotonic()
        renewing = None if self._shared is None else asyncio.create_task(self._renew(self._shared))
        try:
            loaded, fold = await self._fold(fold, bid)
        finally:
            await halt([renewing])
        self._books = fold.books
        self._tainted = False
        self.form = loaded.form
        self._start_time(loaded.beginning, fold.at)
        self._decider = self._machine.decider(self.ledger, fold.books, self._absence(loaded.beginning), loaded.form)
        self.epoch = loaded.epoch
        self.took_over = loaded.beginning is not None and loaded.beginning.took_over
        self._seq, self._hash, self._journalled_at = fold.seq, fold.hash, fold.at
        self._snapshot_seq, self._snapshot_size = fold.snapshot_seq, fold.snapshot_size
        self._events_since_snapshot, self._bytes_since_snapshot = fold.events, fold.size
        self._events_since_check = 0
        self.statistics.loads += 1
        self.statistics.load_us = self._clock.monotonic() - started
        self.statistics.replayed_events = fold.events
        self._appender = asyncio.create_task(self._append_all())
        self._appender.add_done_callback(self._appended)
        if self.phase is Phase.STARTING:
            self._refusal = None

    async def _fold(self, fold: Fold | None, bid: Bid | None) -> tuple[Loaded, Fold]:
        if self._shared is None:
            loaded = await self._journal.load()  # type: ignore[union-attr]
        else:
            if self._shared.tenure is not None:
                self._bid = Bid(self._shared.tenure.head.epoch, self._shared.tenure.head.epoch, self.form or 0)
            bid = bid if self._bid is None else self._bid
            known = None if fold is None else Known(fold.seq, fold.hash, fold.tail)
            loaded = await self._shared.take(bid, known)
        if fold is None or not loaded.resumed:
            fold = Fold(self.ledger, self._machine, self._clock)
        fold.share = full
        fold.check = loaded.check
        try:
            if loaded.snapshot is not None:
                await fold.restore(loaded.snapshot, loaded.chunks)
            async for page in loaded.pages:
                await fold.follow(page)
            if loaded.is_empty and self._shared is not None and loaded.beginning is not None:
                dump = fold.books.dump(self._machine.form if loaded.form is None else loaded.form)
                mark = Mark(fold.seq, fold.at, fold.hash, b"")
                await self._shared.refound(mark, paced(begun(dump), self._clock, full))
                fold.snapshot_seq, fold.events, fold.size = fold.seq, 0, 0
                loaded.beginning = Beginning(max(loaded.beginning.now, fold.at), fold.at, True, True)
        except Unfoldable as error:
            cause = error if error.__cause__ is None else error.__cause__
            raise LedgerStopped(
                f"ledger {self.ledger!r}: {error.what} cannot be folded ({_place(cause)}): run the version that wrote "
                "it, or restore the store from a backup; nothing was changed"
            ) from cause
        if self._shared is not None and self._shared.tenure is not None:
            self._shared.tenure.tail = fold.tail
        return loaded, fold

    def _start_time(self, beginning: Beginning | None, at: int) -> None:
        if self._time is not None:
            self._time.at_least(at)
        elif beginning is None:
            self._time = LedgerTime(self._clock, at)
            self.inherited_at = at or None
        else:
            self._time = LedgerTime(self._clock, at, beginning.now)
            self.inherited_at = beginning.seen_until

    def _absence(self, beginning: Beginning | None) -> Absence | None:
        """What a new owner of a shared ledger cannot have seen; ``None``: an embedded one starts."""
        if beginning is None or self._shared is None:
            return None
        if beginning.seen_until is None:
            return Absence(since=beginning.now)
        away = beginning.now - beginning.seen_until
        unseen = 0 if away <= self._options.held_us and not beginning.is_new_primary else self._options.unseen_us
        loss = self._shared.terms.lag_us if beginning.is_new_primary else 0
        # After a planned change the front ends know at once where to go.
        gather = self._options.gather_us if beginning.took_over else self._options.gather_us // 3
        return Absence(beginning.seen_until, unseen, loss, gather)

    # -- snapshots -------------------------------------------------------------------------------------------

    def _is_folded(self) -> bool:
        """Whether the books are those of the journal, no less and no more."""
        return self._appender is not None and self._queued is None and self._flying is None and not self._tainted

    def _mark(self) -> Mark:
        return Mark(self._seq, self._journalled_at, self._hash, b"")

    def _dump_due(self, batch: _Batch, size: int) -> tuple[Mark, Iterator[bytes], bool] | None:
        """Called when the books are the fold up to the record just made: a dump of them, if one is due."""
        options = self._options
        self._events_since_snapshot += batch.count
        self._bytes_since_snapshot += size
        self._events_since_check += batch.count
        if self._tainted or (self._dumping is not None and not self._dumping.done()):
            return None
        most = max(options.snapshot_bytes, 2 * self._snapshot_size)
        snapshot = self._events_since_snapshot >= options.snapshot_events or self._bytes_since_snapshot >= most
        if not snapshot and self._events_since_check < options.check_events:
            return None
        self._events_since_check = 0
        if snapshot:
            self._events_since_snapshot = self._bytes_since_snapshot = 0
        return self._mark(), begun(self._books.dump(self._written_form)), snapshot

    async def _dump(self, dump: tuple[Mark, Iterator[bytes], bool]) -> None:
        mark, chunks, snapshot = dump
        try:
            if snapshot:
                await self._snapshot(mark, chunks, throttle=True)
            else:
                digest = hashlib.sha256()
                async for chunk in self._paced(chunks, throttle=True):
                    digest.update(chunk)
                await self._journal.write_check(
                    Mark(mark.seq, mark.at, mark.hash, formed(self._written_form, digest.digest()))
                )
        except StoreError as error:
            # Appends go on, or fail by themselves; the next dump tries again.
            self.statistics.last_error = str(error)
            self._log.warning("no snapshot", error=str(error))
        except Exception as error:
            self.statistics.last_error = f"dump failed: {_place(error)}"
            self._log.error("dump failed", error=_place(error))

    async def _snapshot(self, mark: Mark, chunks: Iterator[bytes], *, throttle: bool) -> None:
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in self._paced(chunks, throttle):
                size += len(chunk)
                yield chunk

        await self._journal.write_snapshot(mark, counted())
        self._snapshot_seq, self._snapshot_size = mark.seq, size
        self.statistics.snapshots += 1
        self.statistics.snapshot_bytes = size

    def _paced(self, chunks: Iterator[bytes], throttle: bool) -> AsyncIterator[bytes]:
        return paced(chunks, self._clock, (lambda: self._options.dump_share) if throttle else full)


_LOOK_US = 20_000
_LAST_LOOKS = 3
_MOST_LOOKS = 10
"""How often, and how far apart, to look again for an acknowledgement whose time is over: more often only while
even the looking is late."""

_SHARED_BACKOFF_MOST_US = 500_000
"""Between attempts to write to a shared store that is away."""


def _place(error: BaseException) -> str:
    """The kind of an error and the line that raised it. Not its message, which may repeat what a caller
    sent."""
    trace = error.__traceback__
    if trace is None:
        return type(error).__name__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return f"{type(error).__name__} in {code.co_name}, line {trace.tb_lineno}"
