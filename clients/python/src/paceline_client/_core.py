"""The protocol of a session, without threads, sockets or a clock.

A :class:`Core` holds the operations of one process towards one address: what waits to be sent, what was sent on which
stream, what is to be sent again. Whoever owns it calls its methods under one lock, with the time, and gives each
operation that ended (``Core.ended``) to the one who waits for it, after letting go of the lock.

Two kinds of operation differ in what happens to them when things go wrong. A *Reserve* has somebody who waits for it:
it ends in time, with an answer or with a :class:`Failure`. A *report* (Commit, Release, Renew, Observe) has nobody: it
is sent again until it is acknowledged, too old, or pushed out by newer ones.
"""

from __future__ import annotations

import enum
import heapq
import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Protocol

from google.protobuf.message import Message

from paceline_client import _wire as wire
from paceline_client.stubs.google_types import error_details_pb2, status_pb2
from paceline_client.stubs.paceline.v1 import common_pb2 as common
from paceline_client.stubs.paceline.v1 import coordinator_pb2 as pb

MAX_REPORTS: Final = 20_000
"""Reports without an acknowledgement. Beyond it the oldest are dropped: their holds expire, charged as estimated."""
MAX_WAITING: Final = 65_536
"""Reserves without an answer. Beyond it a call is treated as if no coordinator could be reached."""
REPORT_MAX_AGE: Final = 3_600.0
"""The ledger remembers for so long; an older report would book nothing. Unit: seconds."""
MAX_BEHIND: Final = 1_024
"""Reserves for which nobody waits. Beyond it a call is made without telling the coordinator before."""
MAX_BATCH_ITEMS: Final = 1_024
MAX_BATCH_BYTES: Final = 1_000_000
REPORT_SLOTS: Final = 0.1
"""The part of a server's open items that Reserves leave free for reports."""
FIRST_RETRY: Final = 0.02
"""Before an operation is sent again after the server said that it cannot serve it. Doubled each time. Unit: seconds."""
LAST_RETRY: Final = 5.0
PROBE_INTERVAL: Final = 1.0
"""While a coordinator is silent, one call in this time finds out whether it is back. Unit: seconds."""
SILENCE: Final = 1.0
"""A session that owes an answer and says nothing at all for so long is given up. Unit: seconds."""
HURRY: Final = 0.05
"""For the answer to a Reserve in observe mode, which is a grant anyway. Unit: seconds."""
RECENT: Final = 1.0
"""After "unavailable", no call waits for a better answer for so long; and of the calls that wait for a turn in this
process, one asks again in this time. Unit: seconds."""


class Kind(enum.Enum):
    """What an operation is."""

    RESERVE = "reserve"
    COMMIT = "commit"
    RELEASE = "release"
    RENEW = "renew"
    OBSERVE = "observe"


class State(enum.Enum):
    """Where an operation is."""

    QUEUED = 0
    SENT = 1
    PAUSED = 2
    """It will be sent again, a little later."""
    ENDED = 3


@dataclass(frozen=True, slots=True)
class Failure:
    """An operation ended without the answer that its kind has."""

    code: str
    message: str
    unreachable: bool = False
    """The coordinator was not there in time: the policy decides."""


class Waiter(Protocol):
    """Gets the operations that ended."""

    def deliver(self, operation: Operation) -> None:
        """Called once, without the lock. Must not block."""


@dataclass(slots=True, eq=False)
class Operation:
    """One item on its way."""

    kind: Kind
    request: Message
    created: float
    waiter: Waiter | None = None
    header_time: float | None = None
    """When the headers in the request were received."""
    turn_by: float = 0.0
    """Of a Reserve: when its own wait is over."""
    give_up: float = 0.0
    """Of a Reserve: when the policy decides."""
    state: State = State.QUEUED
    stream: Stream | None = None
    number: int = 0
    sent: int = 0
    """How often it was sent."""
    sent_at: float = 0.0
    tries: int = 0
    """How often the server could not serve it."""
    unavailable: bool = False
    """The server said that somebody behind it is away, and the budget for that runs."""
    timer: Timer | None = None
    result: Message | Failure | None = None
    behind: bool = False
    """Of a Reserve: its caller went ahead, and nobody waits."""
    observed: bool = False
    """Of a Reserve: the server has last observed such calls. While it is away, they go on at once."""
    hurry: bool = False
    """Such a one, which does not wait long for a server that is there either."""


@dataclass(slots=True, eq=False)
class Stream:
    """One session, as far as the protocol goes."""

    unary: bool = False
    open: dict[int, Operation] = field(default_factory=dict)
    next_number: int = 1
    max_items: int = MAX_BATCH_ITEMS
    max_bytes: int = MAX_BATCH_BYTES
    max_open: int = 0
    reserves: int = 0
    """Of the open items, those that are Reserves."""
    welcomed: float | None = None
    heard: float = 0.0
    """When the last message came."""
    silent_since: float | None = None
    """An operation sent then got no answer in time. Void once something is heard."""
    draining: bool = False
    closed: bool = False


@dataclass(slots=True)
class Counters:
    """What has happened so far."""

    batches: int = 0
    items: int = 0
    resent: int = 0
    dropped_reports: int = 0
    refused_reports: int = 0
    sessions: int = 0
    breaks: int = 0
    drains: int = 0
    unreachable: int = 0
    unobserved: int = 0
    """Reserves for which nobody waited, and that got no answer."""


@dataclass(slots=True)
class Timer:
    action: Callable[[float], None] | None
    holds: Callable[[], bool] = lambda: False
    """Whether it belongs to a grant that somebody still holds."""


class Core:
    """The operations of one process towards one address."""

    def __init__(self, budget: float, chance: random.Random | None = None) -> None:
        self.budget = budget
        self.current: Stream | None = None
        """The stream that new operations go to."""
        self.streams: set[Stream] = set()
        self.down_since: float | None = None
        self.fatal: Failure | None = None
        """The server refused the session itself; retried, but slowly, and callers hear of it."""
        self.ended: list[Operation] = []
        """Operations that ended and were not delivered yet."""
        self.suspects: list[Stream] = []
        """Streams to be cut: their server is silent."""
        self.counters = Counters()
        self.reports = 0
        """Reports that are not acknowledged."""
        self.waiting: set[Operation] = set()
        """Reserves that are not answered."""
        self.behind: set[Operation] = set()
        """Reserves for which nobody waits, until what follows from their answers is submitted."""
        self.on_share: Callable[[common.FallbackShare, float], None] | None = None
        self._chance = chance or random.Random()
        self._report_queue: deque[Operation] = deque()
        self._reserve_queue: deque[Operation] = deque()
        self._paused_reports: set[Operation] = set()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_ids = count()
        self._dead_timers = 0
        self._last_unavailable = float("-inf")
        self._last_probe = float("-inf")
        self._last_look = float("-inf")
        self.served = float("-inf")
        """When the last Reserve was answered with a decision."""

    # -- callers ------------------------------------------------------------------------------------------------

    def submit(self, operation: Operation, now: float) -> None:
        """Take an operation. A Reserve that cannot reach anybody in time ends at once."""
        if operation.kind is not Kind.RESERVE:
            self._report_queue.append(operation)
            self.reports += 1
            if self.reports > MAX_REPORTS:
                self._drop_oldest()
            return
        failure = self.fatal if self.current is None else None
        if failure is None and ((operation.observed and self.current is None) or self._is_away(now)):
            failure = Failure("UNAVAILABLE", "the coordinator cannot be reached", unreachable=True)
            self.counters.unreachable += 1
        if failure is None and len(self.waiting) >= MAX_WAITING:
            failure = Failure("RESOURCE_EXHAUSTED", "too many calls of this process wait", unreachable=True)
        if failure is None and operation.behind and len(self.behind) >= MAX_BEHIND:
            failure = Failure("RESOURCE_EXHAUSTED", "too many calls of this process went ahead", unreachable=True)
        if failure is not None:
            operation.state = State.ENDED
            operation.result = failure
            self.counters.unobserved += operation.behind
            self.ended.append(operation)
            return
        operation.give_up = operation.turn_by + self.budget
        stream = self.current
        if operation.behind:
            self.behind.add(operation)
            operation.give_up = now + self.budget
        elif operation.observed and (operation.hurry or stream is None or stream.silent_since is not None):
            operation.give_up = now + min(self.budget, HURRY)
        self.waiting.add(operation)
        queue = self._reserve_queue
        if len(queue) > 2 * len(self.waiting) + 64:
            self._reserve_queue = queue = deque(op for op in queue if op.state is State.QUEUED)
        queue.append(operation)
        operation.timer = self.call_at(operation.give_up, lambda at: self._give_up(operation, at))

    def abandon(self, operation: Operation) -> bool:
        """Nobody waits for this Reserve any more. Whether it may have reached the server and is not answered yet."""
        if operation.state is State.ENDED:
            return False
        sent = operation.sent > 0
        self._leave_stream(operation)
        self._finish(operation, None, deliver=False)
        return sent

    def may_look(self, now: float) -> bool:
        """Whether a caller that waits for its turn here may find out if Reserves are decided again."""
        if now < self._last_look + RECENT:
            return False
        self._last_look = now
        return True

    def _is_away(self, now: float) -> bool:
        stream = self.current
        if self.down_since is not None:
            away = now >= self.down_since + self.budget
        else:
            away = stream is not None and stream.silent_since is not None
        if away and stream is not None and now >= self._last_probe + PROBE_INTERVAL:
            # Nothing else would find out that it is back.
            self._last_probe = now
            return False
        return away

    # -- streams ------------------------------------------------------------------------------------------------

    def welcome(self, stream: Stream, message: pb.Welcome, now: float) -> None:
        """The session is open: it takes new operations from now on."""
        stream.max_items = min(message.max_batch_items or MAX_BATCH_ITEMS, MAX_BATCH_ITEMS)
        stream.max_bytes = min(message.max_batch_bytes or MAX_BATCH_BYTES, MAX_BATCH_BYTES)
        stream.max_open = message.max_open_items
        self._open(stream, now)
        for share in message.fallback_shares:
            self._share(share, now)

    def start_unary(self, stream: Stream, now: float) -> None:
        """Operations go out as single calls from now on."""
        stream.max_open = 1_000
        self._open(stream, now)

    def _open(self, stream: Stream, now: float) -> None:
        stream.welcomed = stream.heard = now
        self.current = stream
        self.streams.add(stream)
        self.down_since = None
        self.fatal = None
        self._last_probe = float("-inf")
        self.counters.sessions += 1

    def take(self, stream: Stream, now: float) -> pb.SessionRequest | None:
        """The next message for the stream: all that waits, as far as the server's bounds allow.

        While nobody else is there, one that is drained takes reports: what its server has granted may be settled there.
        """
        if stream.closed:
            return None
        queues = [self._report_queue]
        if stream is self.current:
            queues.append(self._reserve_queue)
        elif self.current is not None or not stream.draining:
            return None
        chosen: list[Operation] = []
        size = 0
        room = stream.max_items
        open_room = stream.max_open - len(stream.open) if stream.max_open else room
        reserve_room = room
        if stream.max_open:
            reserve_room = int(stream.max_open * (1 - REPORT_SLOTS)) - stream.reserves
        message = pb.SessionRequest()
        items = message.batch.items
        for queue in queues:
            while queue and len(chosen) < room and len(chosen) < open_room:
                operation = queue[0]
                if operation.state is not State.QUEUED:
                    queue.popleft()
                    continue
                is_reserve = operation.kind is Kind.RESERVE
                if is_reserve and reserve_room <= 0:
                    break
                if not is_reserve and now - operation.created > REPORT_MAX_AGE:
                    queue.popleft()
                    self.counters.dropped_reports += 1
                    self._finish(operation, Failure("DEADLINE_EXCEEDED", "the report is too old"))
                    continue
                self._stamp(operation, now)
                length = operation.request.ByteSize() + 24
                if chosen and size + length > stream.max_bytes:
                    break
                queue.popleft()
                size += length
                number = stream.next_number
                stream.next_number = number + 1
                item = items.add(number=number)
                getattr(item, operation.kind.value).CopyFrom(operation.request)
                operation.number = number
                operation.stream = stream
                operation.state = State.SENT
                if operation.sent:
                    self.counters.resent += 1
                operation.sent += 1
                operation.sent_at = now
                stream.open[number] = operation
                if is_reserve:
                    stream.reserves += 1
                    reserve_room -= 1
                chosen.append(operation)
        if not chosen:
            return None
        self.counters.batches += 1
        self.counters.items += len(chosen)
        return message

    def answers(self, stream: Stream, batch: pb.ResponseBatch, now: float) -> None:
        """Answers have come."""
        self._heard(stream, now)
        for share in batch.fallback_shares:
            self._share(share, now)
        for item in batch.items:
            operation = stream.open.pop(item.number, None)
            if operation is None:
                continue
            if operation.kind is Kind.RESERVE:
                stream.reserves -= 1
            if operation.state is not State.ENDED:
                operation.stream = None
                self._answer(operation, item, now)

    def drain(self, stream: Stream, now: float) -> None:
        """The server goes: the stream takes no Reserve, and once another one is there, nothing."""
        if not stream.draining:
            stream.draining = True
            self.counters.drains += 1
        if self.current is stream:
            self.current = None
            self.went_down(now)

    def broken(self, stream: Stream, now: float, fatal: Failure | None = None) -> None:
        """The stream is over. What was not answered is sent again on the next one, under the same ids."""
        if stream.closed:
            return
        stream.closed = True
        self.streams.discard(stream)
        self.counters.breaks += 1
        if self.current is stream:
            self.current = None
        left = [operation for operation in stream.open.values() if operation.state is not State.ENDED]
        stream.open.clear()
        for operation in left:
            operation.stream = None
            operation.state = State.QUEUED
        # In the order of their numbers, before what came later.
        self._report_queue.extendleft(op for op in reversed(left) if op.kind is not Kind.RESERVE)
        self._reserve_queue.extendleft(op for op in reversed(left) if op.kind is Kind.RESERVE)
        if self.current is not None:
            return
        self.went_down(now)
        self._go_on(now)
        if self._is_away(now):
            self._fail_unsent(now)
        if fatal is not None:
            self.fatal = fatal
            for operation in list(self.waiting):
                self._finish(operation, fatal)

    def went_down(self, now: float) -> None:
        """Nobody can be reached from now on. Reserves that are not with a server have the budget to find one."""
        if self.down_since is not None:
            return
        self.down_since = now
        self._go_on(now)

        def too_long(at: float) -> None:
            if self.down_since == now:
                self._fail_unsent(at)

        self.call_at(now + self.budget, too_long)

    def reached(self, stream: Stream, now: float) -> None:
        """A single call found somebody."""
        self._heard(stream, now)
        self.down_since = None

    # -- time ---------------------------------------------------------------------------------------------------

    def call_at(self, due: float, action: Callable[[float], None], holds: Callable[[], bool] | None = None) -> Timer:
        """Call ``action`` from :meth:`tick`, once it is due."""
        timer = Timer(action) if holds is None else Timer(action, holds)
        heapq.heappush(self._timers, (due, next(self._timer_ids), timer))
        return timer

    def cancel_timer(self, timer: Timer) -> None:
        """Forget a timer. Memory stays bounded by the live ones."""
        if timer.action is None:
            return
        timer.action = None
        self._dead_timers += 1
        if self._dead_timers > 64 and self._dead_timers * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].action is not None]
            heapq.heapify(self._timers)
            self._dead_timers = 0

    def tick(self, now: float) -> float | None:
        """Do what is due. When to come back; ``None``: no need."""
        timers = self._timers
        while timers and timers[0][0] <= now:
            _, _, timer = heapq.heappop(timers)
            action, timer.action = timer.action, None
            if action is None:
                self._dead_timers -= 1
            else:
                action(now)
            timers = self._timers
        return timers[0][0] if timers else None

    @property
    def next_due(self) -> float | None:
        """When :meth:`tick` has something to do."""
        return self._timers[0][0] if self._timers else None

    @property
    def has_queued(self) -> bool:
        """Whether something could be sent."""
        if self.current is not None:
            return bool(self._report_queue or self._reserve_queue)
        return bool(self._report_queue) and self.can_report

    @property
    def can_report(self) -> bool:
        """Whether there is somebody who takes reports."""
        return self.current is not None or any(stream.draining for stream in self.streams)

    def is_done(self, stream: Stream) -> bool:
        """Whether a drained stream is not needed any more."""
        if stream.open:
            return False
        if self.current is not None:
            return True
        return not self.reports and not any(timer.holds() for _, _, timer in self._timers if timer.action is not None)

    # -- inside -------------------------------------------------------------------------------------------------

    def _stamp(self, operation: Operation, now: float) -> None:
        """Write what depends on the moment of sending."""
        request = operation.request
        if isinstance(request, pb.ReserveRequest):
            wire.set_duration(request.max_wait, min(max(0.0, operation.turn_by - now), wire.MAX_WAIT))
        elif operation.header_time is not None:
            age = max(0.0, now - operation.header_time)
            if isinstance(request, pb.RenewRequest):
                wire.set_duration(request.observation.header_age, age)
            elif isinstance(request, pb.CommitRequest | pb.ObserveRequest):
                wire.set_duration(request.outcome.header_age, age)

    def _answer(self, operation: Operation, item: pb.ResponseItem, now: float) -> None:
        what = item.WhichOneof("result")
        if what == "error":
            self._error(operation, item.error, now)
            return
        if what != operation.kind.value:
            self._finish(operation, Failure("INTERNAL", f"the answer to {operation.kind.value} was {what}"))
            return
        if what == "reserve":
            self._reserved(operation, item.reserve, now)
        else:
            self._finish(operation, getattr(item, what))

    def _reserved(self, operation: Operation, answer: pb.ReserveResponse, now: float) -> None:
        self._last_unavailable = float("-inf")
        self.served = now
        for share in answer.fallback_shares:
            self._share(share, now)
        if answer.HasField("denial") and now < operation.give_up:
            reason = answer.denial.reason
            if reason == common.DENIAL_REASON_DRAINING:
                self._pause(operation, self._retry_delay(operation), now)
                return
            if reason == common.DENIAL_REASON_RELEASED and operation.sent > 1:
                # Withdrawn by the server when the stream broke, not by us.
                request = operation.request
                if isinstance(request, pb.ReserveRequest):
                    request.reservation_id = new_id()
                self._pause(operation, self._retry_delay(operation), now)
                return
        self._finish(operation, answer)

    def _error(self, operation: Operation, status: status_pb2.Status, now: float) -> None:
        code = _CODES.get(status.code, "UNKNOWN")
        if code in _RETRIED:
            first = now - self._last_unavailable > RECENT
            self._last_unavailable = now
            delay = max(_retry_info(status), self._retry_delay(operation))
            if operation.kind is not Kind.RESERVE:
                self._pause(operation, delay, now)
                return
            # The wait for somebody who is away is not the wait for a turn: it has its own, short budget.
            if not operation.unavailable:
                operation.unavailable = True
                self._limit(operation, now + (self.budget if first else 0.0))
            if now + delay < operation.give_up:
                self._pause(operation, delay, now)
                return
            self.counters.unreachable += 1
            self._finish(operation, Failure(code, status.message, unreachable=True))
            return
        if operation.kind is not Kind.RESERVE:
            self.counters.refused_reports += 1
        # The server fails at this very request, and would again. Not the caller's fault: the policy decides.
        self._finish(operation, Failure(code, status.message, unreachable=code == "ABORTED"))

    def _retry_delay(self, operation: Operation) -> float:
        delay = min(FIRST_RETRY * 2.0 ** min(operation.tries, 16), LAST_RETRY)
        return delay * (0.75 + 0.5 * self._chance.random())

    def _pause(self, operation: Operation, delay: float, now: float) -> None:
        operation.tries += 1
        operation.state = State.PAUSED
        if operation.kind is not Kind.RESERVE:
            self._paused_reports.add(operation)
        self.call_at(now + delay, lambda at: self._resume(operation, at))

    def _resume(self, operation: Operation, now: float) -> None:
        if operation.state is not State.PAUSED:
            return
        operation.state = State.QUEUED
        if operation.kind is not Kind.RESERVE:
            self._paused_reports.discard(operation)
            self._report_queue.append(operation)
        elif self.current is None and self._is_away(now):
            self._unreachable(operation, now)
        else:
            self._reserve_queue.append(operation)

    def _heard(self, stream: Stream, now: float) -> None:
        stream.heard = now
        stream.silent_since = None

    def _go_on(self, now: float) -> None:
        """Nobody can be reached: what the server only observed does not wait for it."""
        for operation in [op for op in self.waiting if op.observed and op.stream is None]:
            self._unreachable(operation, now)

    def _fail_unsent(self, now: float) -> None:
        for operation in [op for op in self.waiting if op.stream is None or op.stream.unary]:
            self._unreachable(operation, now)

    def _give_up(self, operation: Operation, now: float) -> None:
        if operation.state is not State.ENDED:
            self._unreachable(operation, now)

    def _limit(self, operation: Operation, give_up: float) -> None:
        """Bring the end of a Reserve forward."""
        if give_up < operation.give_up:
            operation.give_up = give_up
            if operation.timer is not None:
                self.cancel_timer(operation.timer)
            operation.timer = self.call_at(give_up, lambda at: self._give_up(operation, at))

    def _unreachable(self, operation: Operation, now: float) -> None:
        self.counters.unreachable += 1
        stream = operation.stream
        if stream is not None and not stream.unary and stream.heard <= operation.sent_at:
            self._suspect(stream, operation.sent_at, now)
        self._leave_stream(operation)
        self._finish(operation, Failure("UNAVAILABLE", "the coordinator did not answer in time", unreachable=True))

    def _suspect(self, stream: Stream, since: float, now: float) -> None:
        """Nothing has come on the stream since then, though something should have."""
        if stream.silent_since is not None:
            return
        stream.silent_since = since

        def still_silent(_at: float) -> None:
            if stream.silent_since == since and not stream.closed:
                self.suspects.append(stream)

        self.call_at(max(now, since + SILENCE), still_silent)

    def _leave_stream(self, operation: Operation) -> None:
        stream = operation.stream
        if stream is not None:
            # Its answer, if it comes, belongs to nobody. The place stays taken until then.
            stream.open[operation.number] = _nobody(operation)
            operation.stream = None

    def _finish(self, operation: Operation, result: Message | Failure | None, deliver: bool = True) -> None:
        if operation.state is State.ENDED:
            return
        operation.state = State.ENDED
        operation.result = result
        if operation.kind is Kind.RESERVE:
            self.waiting.discard(operation)
            self.counters.unobserved += operation.behind and isinstance(result, Failure)
            if operation.timer is not None:
                self.cancel_timer(operation.timer)
                operation.timer = None
        else:
            self.reports -= 1
            self._paused_reports.discard(operation)
        if deliver:
            self.ended.append(operation)

    def _drop_oldest(self) -> None:
        queue = self._report_queue
        while queue and queue[0].state is not State.QUEUED:
            queue.popleft()
        oldest = queue.popleft() if queue else next(iter(self._paused_reports), None)
        if oldest is not None:
            self.counters.dropped_reports += 1
            self._finish(oldest, Failure("RESOURCE_EXHAUSTED", "too many reports wait"))

    def _share(self, share: common.FallbackShare, now: float) -> None:
        if self.on_share is not None:
            self.on_share(share, now)


def _nobody(operation: Operation) -> Operation:
    """Keeps the place of an operation whose answer nobody wants."""
    return Operation(operation.kind, operation.request, operation.created, state=State.ENDED, number=operation.number)


_ids = random.Random()
# A child of a fork would go on with the numbers of its parent.
os.register_at_fork(after_in_child=_ids.seed)


def new_id() -> str:
    """A random UUID. Unique, not secret: so one seed of the system's chance is enough."""
    text = f"{_ids.getrandbits(128):032x}"
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{_VARIANT[int(text[16], 16) & 3]}{text[17:20]}-{text[20:]}"


_VARIANT: Final = "89ab"
_CODES: Final = {
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}
_RETRIED: Final = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"})


def _retry_info(status: status_pb2.Status) -> float:
    """The delay that the server asked for. Unit: seconds."""
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            return wire.seconds(info.retry_delay)
    return 0.0
