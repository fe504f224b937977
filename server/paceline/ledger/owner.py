"""The owner of a ledger: operations in, journalled answers out.

Operations that arrive together are decided as one batch, and their events go into one record. While a record
is being written the owner decides on, into the record behind it. An answer leaves once every record that it
may rest on is acknowledged, its own and all before it; one that changed nothing leaves with the record in
flight, or at once if there is none.

Whatever goes wrong, the journal is the truth: the owner throws its books away, loads them again, and says
:class:`LedgerUnavailable` to everybody who has no answer yet. They ask again under the same ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from enum import Enum
from typing import Any

import msgspec
import structlog

from paceline.engine.answers import Answer
from paceline.engine.operations import Operation
from paceline.ledger.clock import Clock, LedgerTime, SystemClock, Timer
from paceline.ledger.journal import RETRYABLE, Journal, Mark, Record, StoreError, StoreUnavailable, genesis
from paceline.ledger.machine import Books, Decider, Decision, EngineMachine, Machine

_log = structlog.get_logger("paceline.ledger")


class LedgerError(Exception):
    """Why an operation has no answer. It may be sent again as it is.

    ``retry_after_us``: when that makes sense. One instance may be handed to many callers: look at it, do not
    raise it.
    """

    def __init__(self, message: str, retry_after_us: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_us = retry_after_us


class LedgerBusy(LedgerError):
    """Too many operations are queued; nothing was decided."""


class LedgerUnavailable(LedgerError):
    """The journal is away. The operation may or may not be in the books."""


class LedgerDraining(LedgerError):
    """The owner is stopping; nothing was decided."""


class LedgerFault(LedgerError):
    """The engine failed on this very operation, which left no trace. Sending it again will not help."""


class LedgerStopped(LedgerUnavailable):
    """The ledger stopped for good: what is journalled cannot be folded, or the engine fails by itself."""


class Phase(Enum):
    STARTING = "starting"
    SERVING = "serving"
    REPLAYING = "replaying"
    """The engine failed: its last batch is being decided again, one operation at a time."""
    RECOVERING = "recovering"
    """The journal is away, or being read again."""
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"
    """Stopped for good by :attr:`Owner.failure`."""


class OwnerOptions(msgspec.Struct, frozen=True):
    """Bounds of an owner. Times in µs of the clock."""

    batch_operations: int = 256
    """Operations decided in one step, which is one turn of the event loop: about 25 µs each."""
    record_operations: int = 2_048
    """Operations decided ahead, into the record behind the one in flight. At most one batch more."""
    inbox_operations: int = 16_384
    """Operations waiting to be decided; more are told :class:`LedgerBusy`."""
    append_timeout_us: int = 3_000_000
    """An append that takes longer counts as failed."""
    backoff_first_us: int = 50_000
    backoff_most_us: int = 5_000_000
    """Between attempts to load the ledger again, doubling from the first to the most, until an append
    succeeds."""
    snapshot_events: int = 250_000
    snapshot_bytes: int = 64 * 1024 * 1024
    """A snapshot is written after so many events or journal bytes (at least twice the last snapshot's
    size)."""
    check_events: int = 100_000
    """A digest of the books is journalled after so many events; replay is checked against the newest."""
    dump_share: float = 0.2
    """The part of the event loop's time that a snapshot or digest may take."""
    idle_faults: int = 3
    """So many failures of the engine without an operation stop the ledger."""


LATENCY_BUCKETS = 28


class Statistics:
    """Plain counters since the start, for telemetry to read."""

    def __init__(self) -> None:
        self.operations = 0
        """Taken into a batch."""
        self.batches = 0
        self.answers = 0
        self.busy = 0
        """Refused with :class:`LedgerBusy`."""
        self.unavailable = 0
        """Answered with :class:`LedgerUnavailable`."""
        self.faults = 0
        """Answered with :class:`LedgerFault`."""
        self.appends = 0
        self.events = 0
        self.journal_bytes = 0
        self.append_us = 0
        """Sum of the time from handing a record to the journal to its acknowledgement."""
        self.append_us_histogram = [0] * LATENCY_BUCKETS
        """Entry ``i`` counts appends that took less than ``2**i`` µs, and not less than half of that."""
        self.append_failures = 0
        self.loads = 0
        """Times that the ledger was read from the journal, the first included."""
        self.load_us = 0
        """How long the last one took."""
        self.replayed_events = 0
        """Folded after the snapshot in the last one."""
        self.snapshots = 0
        self.snapshot_bytes = 0
        """Size of the last one."""
        self.last_error = ""
        """The last failure of the journal or the engine, in one line without contents of operations."""


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


_encode_payload = msgspec.msgpack.Encoder().encode
_decode_payload = msgspec.msgpack.Decoder(list[bytes]).decode


class Owner:
    """Runs one ledger over its journal, in one event loop. All methods are called from that loop.

    ``on_phase`` is called after each change of :attr:`phase`.
    """

    def __init__(
        self,
        ledger: str,
        journal: Journal,
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
        self._journal = journal
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
        self._settled: list[asyncio.Future[None]] = []
        """Wait for nothing to be queued or in flight."""

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

    async def start(self) -> None:
        """Load the ledger and serve. Raises :class:`~paceline.ledger.journal.StoreError` or
        :class:`LedgerStopped`."""
        self._handler = asyncio.get_running_loop()
        try:
            await self._load()
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

    @property
    def engine(self) -> Decider:
        """The engine over the present books. Another one after each load."""
        return self._decider

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
        elif len(inbox) >= self._inbox_most:
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
        deadline = time.monotonic() + drain_timeout
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
        await self._halt(self._recovery)
        self._answer_all(draining)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._halt(self._dumping)
        if healthy and self._is_folded() and self._seq > self._snapshot_seq:
            dump = self._snapshot(self._mark(), _begun(self._books.dump()), throttle=False)
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await dump
            except (TimeoutError, StoreError) as error:
                self._log.warning("no snapshot at the end; the next start replays the journal", error=str(error))
        await self._halt(self._appender)
        self._appender = None
        with contextlib.suppress(TimeoutError, StoreError):
            async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                await self._journal.close()
        self._refusal = draining
        self._enter(Phase.STOPPED)

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
        else:
            self._answer(step.answers)
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
            self._queued, self._flying = None, batch
            record = Record.sealed(
                self._seq + 1,
                self.epoch,
                batch.at,
                self._clock.wall(),
                self._hash,
                _encode_payload(batch.payloads),
            )
            self._seq, self._hash, self._journalled_at = record.seq, record.hash, record.at
            dump = self._dump_due(batch, len(record.payload))
            self._flying_since = self._clock.monotonic()
            self._watch()
            try:
                await self._journal.append(record)
            except StoreError as error:
                self._broken(error)
                return
            except Exception as error:
                self._broken(StoreUnavailable(f"the journal failed: {_place(error)}"))
                return
            took = max(0, self._clock.monotonic() - self._flying_since)
            self._flying = None
            self._backoff_us = 0
            statistics.appends += 1
            statistics.events += batch.count
            statistics.journal_bytes += len(record.payload)
            statistics.append_us += took
            statistics.append_us_histogram[min(took.bit_length(), LATENCY_BUCKETS - 1)] += 1
            self._answer(batch.answers)
            if dump is not None:
                self._dumping = asyncio.create_task(self._dump(dump))
            if self._inbox or self._due:
                self._schedule()

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
        stopping = self._refusal if isinstance(self._refusal, LedgerDraining) else None
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
        if not isinstance(self._refusal, LedgerDraining):
            self._refusal = None
            self._enter(Phase.SERVING)
        else:
            self._enter(Phase.DRAINING)
        self._due = True
        self._schedule()

    async def _reload(self) -> None:
        """Load, as often as it takes. Raises :class:`LedgerStopped` when trying again cannot help."""
        while True:
            if self._backoff_us:
                await self._clock.sleep_until(self._clock.monotonic() + self._backoff_us)
            try:
                await self._load()
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
        self._answer_all(error)
        self._enter(Phase.FAILED)

    def _drop(self) -> None:
        """Forget what is decided and not acknowledged, and end what works on it."""
        for task in (self._appender, self._dumping):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        self._appender = self._dumping = None
        self._queued = self._flying = None
        self._more = None
        self._settle()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake_at = None

    @staticmethod
    async def _halt(task: asyncio.Task[None] | None) -> None:
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])

    # -- loading ---------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        """Books, engine and place in the journal, from the journal."""
        self._drop()
        started = self._clock.monotonic()
        loaded = await self._journal.load()
        snapshot, check = loaded.snapshot, loaded.check
        seq, chain = (0, genesis(self.ledger)) if snapshot is None else (snapshot.seq, snapshot.hash)
        at = 0 if snapshot is None else snapshot.at
        events = size = 0
        books: Books
        if snapshot is None:
            books = self._machine.empty(self.ledger)
        else:
            try:
                books = await asyncio.to_thread(self._machine.restore, self.ledger, loaded.chunks)
                # An earlier version's dump has another form; that it is undamaged, the journal has checked.
                alike = self._machine.form_of(loaded.chunks[0]) == self._machine.form
                if alike and await _digest(books.dump()) != snapshot.digest:
                    raise ValueError("it does not give the books that were dumped")
            except Exception as error:
                raise self._unfoldable(f"the snapshot at record {seq}", error) from error
        self._snapshot_size = sum(map(len, loaded.chunks))
        pause_at = time.monotonic() + _PAUSE_SECONDS
        async for page in loaded.pages:
            for record in page:
                try:
                    for payload in _decode_payload(record.payload):
                        for event in self._machine.decode(payload):
                            books.apply(event)
                            events += 1
                    if (
                        check is not None
                        and record.seq == check.seq
                        and (check.hash != record.hash or not await self._agrees(books, check.digest))
                    ):
                        raise ValueError("the books are not what they were when it was written")
                except Exception as error:
                    raise self._unfoldable(f"record {record.seq}", error) from error
                seq, chain, at = record.seq, record.hash, max(at, record.at)
                size += len(record.payload)
                if time.monotonic() > pause_at:
                    await asyncio.sleep(0)
                    pause_at = time.monotonic() + _PAUSE_SECONDS
        self._books = books
        self._tainted = False
        self._decider = self._machine.decider(self.ledger, books)
        self.epoch = loaded.epoch
        self._seq, self._hash, self._journalled_at = seq, chain, at
        if self._time is None:
            self._time = LedgerTime(self._clock, at)
            self.inherited_at = at or None
        else:
            self._time.at_least(at)
        self._snapshot_seq = 0 if snapshot is None else snapshot.seq
        self._events_since_snapshot, self._bytes_since_snapshot = events, size
        self._events_since_check = 0
        self.statistics.loads += 1
        self.statistics.load_us = self._clock.monotonic() - started
        self.statistics.replayed_events = events
        self._appender = asyncio.create_task(self._append_all())
        if self.phase is Phase.STARTING:
            self._refusal = None

    def _unfoldable(self, what: str, error: Exception) -> LedgerStopped:
        return LedgerStopped(
            f"ledger {self.ledger!r}: {what} cannot be folded ({_place(error)}): run the version that wrote "
            "it, or restore the store from a backup; nothing was changed"
        )

    def _formed(self, digest: bytes) -> bytes:
        """A digest that tells at its end of which form of dump it is."""
        form = self._form()
        return digest[: -len(form)] + form

    def _form(self) -> bytes:
        return b"form" + self._machine.form.to_bytes(2, "big")

    async def _agrees(self, books: Books, digest: bytes) -> bool:
        """Whether a digest is that of these books. Those of other versions cannot be compared, and prove nothing."""
        return not digest.endswith(self._form()) or self._formed(await _digest(books.dump())) == digest

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
        return self._mark(), _begun(self._books.dump()), snapshot

    async def _dump(self, dump: tuple[Mark, Iterator[bytes], bool]) -> None:
        mark, chunks, snapshot = dump
        try:
            if snapshot:
                await self._snapshot(mark, chunks, throttle=True)
            else:
                digest = hashlib.sha256()
                async for chunk in self._paced(chunks, throttle=True):
                    digest.update(chunk)
                await self._journal.write_check(Mark(mark.seq, mark.at, mark.hash, self._formed(digest.digest())))
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

    async def _paced(self, chunks: Iterator[bytes], throttle: bool) -> AsyncIterator[bytes]:
        """``chunks``, between turns of the loop, within the share of its time that they may take."""
        rest = 1 / self._options.dump_share - 1 if throttle else 0.0
        owed = 0.0
        while True:
            started = time.monotonic()
            chunk = next(chunks, None)
            if chunk is None:
                return
            owed += (time.monotonic() - started) * rest
            yield chunk
            if owed > _PAUSE_SECONDS:
                await asyncio.sleep(owed)
                owed = 0.0
            else:
                await asyncio.sleep(0)


_LOOK_US = 20_000
_LAST_LOOKS = 3
_MOST_LOOKS = 10
"""How often, and how far apart, to look again for an acknowledgement whose time is over: more often only while
even the looking is late."""

_PAUSE_SECONDS = 0.002
"""How long replaying and dumping may keep the event loop at a time."""


def _begun(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """``chunks`` with the first taken already, which fixes the state that is dumped."""
    first = next(chunks, None)

    def rest() -> Iterator[bytes]:
        if first is not None:
            yield first
            yield from chunks

    return rest()


async def _digest(chunks: Iterator[bytes]) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        await asyncio.sleep(0)
    return digest.digest()


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
