"""The threads and the connection around a :class:`~paceline_client._core.Core`.

A process has one hub for each endpoint, whatever the number of its clients, threads and event loops. Two threads serve
it, both daemons and both started by the first call: one connects and reads, the other keeps the times. (gRPC adds one
that writes and one that waits for the network.)
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, cast

from google.protobuf.message import DecodeError

import paceline_client
from paceline_client import _wire as wire
from paceline_client._config import Endpoint
from paceline_client._core import SILENCE, Core, Counters, Failure, Kind, Operation, Stream, Timer, Waiter
from paceline_client._grpc import (
    anchor,
    grpc,
    is_fork_supported,
    metadata,
    open_channel,
    threads_of_grpc,
)
from paceline_client._headers import HeaderFilter
from paceline_client._local import LocalPolicy, Share
from paceline_client.stubs import v1 as stubs
from paceline_client.stubs.google_types import status_pb2

CONNECT_TIMEOUT: Final = 5.0
"""For a connection and its welcome. Unit: seconds."""
CONNECT_ONE_OF_SEVERAL: Final = 1.0
"""The same, where there are other addresses to try; more after each one that was tried in vain. Unit: seconds."""
WAITED: Final = 0.85
"""The part of the budget that is waited for. The rest is for the way back to the caller."""
LOOK: Final = 0.25
"""How often a call that waits for its turn here looks whether the coordinator is back, and the least time between two
Reserves of it on one session. Unit: seconds."""
REPORT_TIMEOUT: Final = 5.0
"""For a report that is a call of its own. Unit: seconds."""
FIRST_BACKOFF: Final = 0.05
LAST_BACKOFF: Final = 2.0
"""Between two connections: while some are back and others are not yet, the fleet may use more than the limit. Unit:
seconds."""
REFUSED_BACKOFF: Final = 5.0
"""Before the next one, when the server refused this client. Unit: seconds."""
STABLE: Final = 1.0
"""A session that lived for so long starts the back-off anew. Unit: seconds."""
DRAIN_SPREAD: Final = 0.1
"""The clients of a server that goes do not all come back in one instant. Unit: seconds."""
DRAIN_LINGER: Final = 0.5
DRAIN_POLL: Final = 0.05
"""Unit: seconds."""
EXIT_BUDGET: Final = 1.5
"""For the last reports, when the interpreter ends. Unit: seconds."""
JOIN_BUDGET: Final = 0.4
FORK_BUDGET: Final = 1.0
"""For letting go of the connection before a fork. Unit: seconds."""

PROTOCOL_VERSION: Final = 1

log = logging.getLogger("paceline_client")

Code = grpc.StatusCode
_FATAL: Final = frozenset(
    {Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.FAILED_PRECONDITION, Code.INVALID_ARGUMENT}
)


Submission = tuple[Operation, Timer | None]
"""An operation, and a timer that it makes needless."""


class Call:
    """A waiter for a thread."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def deliver(self, operation: Operation) -> None:
        self._lock.release()

    def wait(self) -> None:
        """Block until the operation has ended."""
        self._lock.acquire()


class Port:
    """The way from one event loop to a hub: what a tick of the loop submits goes in one piece."""

    def __init__(self, hub: Hub, loop: asyncio.AbstractEventLoop) -> None:
        self._hub = hub
        self._loop = loop
        self._thread = threading.get_ident()
        self._outbox: list[tuple[Operation, Timer | None]] = []
        self._inbox: deque[tuple[asyncio.Future[Operation], Operation]] = deque()
        self._called = False

    def submit(self, operation: Operation, timer: Timer | None = None) -> None:
        """Send it at the end of this tick; from another thread, at once."""
        if threading.get_ident() != self._thread or self._loop.is_closed():
            self._hub.submit(operation, timer)
            return
        if not self._outbox:
            # First, because it may raise: then nothing is left that would keep the next one from calling.
            self._loop.call_soon(self.flush)
        self._outbox.append((operation, timer))

    def flush(self) -> None:
        """Send what has gathered."""
        outbox, self._outbox = self._outbox, []
        self._hub.submit_all(outbox)

    def settle(self, future: asyncio.Future[Operation], operation: Operation) -> None:
        """Give an operation to its future, from any thread."""
        self._inbox.append((future, operation))
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                # The loop may be gone, and everybody with it who waited there.
                self._called = False

    def _deliver(self) -> None:
        self._called = False
        while self._inbox:
            future, operation = self._inbox.popleft()
            if not future.done():
                future.set_result(operation)

    def waiter(self) -> AsyncCall:
        """A waiter for a coroutine of the loop."""
        return AsyncCall(self, self._loop.create_future())


class AsyncCall:
    """A waiter for a coroutine."""

    __slots__ = ("_port", "future")

    def __init__(self, port: Port, future: asyncio.Future[Operation]) -> None:
        self._port = port
        self.future = future

    def deliver(self, operation: Operation) -> None:
        self._port.settle(self.future, operation)


class Hub:
    """One endpoint, as this process sees it."""

    def __init__(self, endpoint: Endpoint, clock: Callable[[], float] = time.monotonic) -> None:
        self.endpoint = endpoint
        self.clock = clock
        self.headers = HeaderFilter()
        self.users = 0
        self.orphaned = False
        """Forked off a process whose gRPC cannot be used in a child: nothing is contacted."""
        self._warned: set[str] = set()
        self._fresh()

    def _fresh(self) -> None:
        """A state in which nothing was started yet. In the child of a fork, nothing of the parent is left."""
        self.instance = uuid.uuid4().hex
        self.core = Core(self.endpoint.budget * WAITED)
        self.core.on_share = self._learn
        self.local = LocalPolicy(self.endpoint.local_scale)
        """Not the parent's: the parts of all processes add up to the limit."""
        self._chance = random.Random()
        self._place = self._chance.randrange(len(self.endpoint.addresses))
        """Among the addresses: which one is tried next. The processes of a fleet begin at different ones."""
        self._failed = 0
        """Addresses that were tried in vain since one was reached."""
        self._backoff = FIRST_BACKOFF
        self._lock = threading.Lock()
        self._to_write = threading.Condition(self._lock)
        self._to_time = threading.Condition(self._lock)
        self._to_link = threading.Condition(self._lock)
        self._settled = threading.Condition(self._lock)
        self._timer_due: float | None = None
        self._started = False
        self._suspended = False
        self._closed = False
        self._unary = self.endpoint.transport == "unary"
        self._timer_thread: threading.Thread | None = None
        self._links: set[threading.Thread] = set()
        self._calls: dict[Stream, grpc.Call | grpc.Channel] = {}
        self._leaving: set[Stream] = set()
        """Without sessions: those whose server does not answer, while there are others to ask."""
        self._channels: set[grpc.Channel] = set()
        self._grpc_threads: set[threading.Thread] = set()
        self._ports: dict[asyncio.AbstractEventLoop, Port] = {}

    # -- callers ------------------------------------------------------------------------------------------------

    def submit(self, operation: Operation, timer: Timer | None = None) -> None:
        """Send an operation, and forget a timer."""
        self.submit_all(((operation, timer),))

    def submit_all(self, operations: Sequence[Submission]) -> None:
        """Send several, in one message if they fit."""
        now = self.clock()
        with self._lock:
            core = self.core
            if self._closed or self.orphaned:
                ended = self._refuse(operations)
            else:
                if not self._started:
                    self._start(now)
                for operation, timer in operations:
                    if timer is not None:
                        core.cancel_timer(timer)
                    core.submit(operation, now)
                ended = self._after()
        self._deliver(ended)

    def abandon(self, operation: Operation) -> bool:
        """Nobody waits any more. Whether the operation may have reached the server."""
        with self._lock:
            return self.core.abandon(operation)

    def caught_up(self, operation: Operation) -> None:
        """What follows from the answer to a Reserve for which nobody waits has been submitted."""
        with self._lock:
            self.core.behind.discard(operation)

    def call_at(self, due: float, action: Callable[[float], None], holds: Callable[[], bool] | None = None) -> Timer:
        """Call ``action`` under the lock, in the thread that keeps the times."""
        with self._lock:
            timer = self.core.call_at(due, action, holds)
            self._after_timer()
            return timer

    def cancel_timer(self, timer: Timer) -> None:
        with self._lock:
            self.core.cancel_timer(timer)

    def port(self) -> Port:
        """The port of the running loop."""
        loop = asyncio.get_running_loop()
        port = self._ports.get(loop)
        if port is None:
            for each in [each for each in list(self._ports) if each.is_closed()]:
                self._ports.pop(each, None)
            port = self._ports[loop] = Port(self, loop)
        return port

    def call(self) -> Call:
        """A waiter for a thread."""
        return Call()

    @property
    def is_hopeless(self) -> bool:
        """Nobody has been reached for longer than a call would wait."""
        with self._lock:
            down = None if self.core.can_report else self.core.down_since
        return self._closed or (down is not None and self.clock() - down > self.endpoint.budget)

    @property
    def is_back(self) -> bool:
        """There is a session, and nothing is known against it. Looked at often, so without the lock."""
        stream = self.core.current
        return stream is not None and stream.silent_since is None and self.core.down_since is None

    def may_ask(self, asked: float, failed: float) -> bool:
        """Whether a call that asked in vain should ask again. Unit: seconds, of the clock.

        A session is not enough: its server may be well, and what it keeps its ledger in be away. So at once only on a
        new session; on the one that failed, once another call was served there, or as the one that finds out.
        """
        core = self.core
        stream = core.current
        if stream is None or not self.is_back:
            return False
        if stream.welcomed is not None and stream.welcomed > asked:
            return True
        now = self.clock()
        if now < failed + LOOK:
            return False
        if core.served > failed:
            return True
        with self._lock:
            return core.may_look(now)

    def flush(self, timeout: float, *, hopeless: bool = True) -> bool:
        """Wait until every report is acknowledged. ``hopeless``: also while nobody can be reached."""
        deadline = self.clock() + timeout
        for port in list(self._ports.values()):
            if port._thread == threading.get_ident():
                port.flush()
        with self._lock:
            while (self.core.reports or self.core.behind) and not self._closed:
                now = self.clock()
                left = deadline - now
                down = None if self.core.can_report else self.core.down_since
                if not hopeless and down is not None:
                    left = min(left, down + self.endpoint.budget - now)
                if left <= 0:
                    return False
                self._settled.wait(min(left, 0.05))
            return not (self.core.reports or self.core.behind)

    def close(self) -> None:
        """End everything. What was not sent is lost."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = list(self.core.waiting)
            for operation in waiting:
                self.core.abandon(operation)
                operation.result = Failure("UNAVAILABLE", "the client is closed", unreachable=True)
            calls, threads = self._cut()
            if self._timer_thread is not None:
                threads.append(self._timer_thread)
        self._deliver(waiting)
        for call in calls:
            _cancel(call)
        deadline = time.monotonic() + JOIN_BUDGET
        me = threading.current_thread()
        for thread in threads:
            if thread is not me:
                thread.join(max(0.0, deadline - time.monotonic()))

    def warn(self, key: str, text: str, error: BaseException | None = None) -> None:
        """Log a warning, once."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning(text, exc_info=error)

    def _deliver(self, ended: list[Operation]) -> None:
        """Give them to those who wait. One that fails must not keep the others, nor this thread, from going on."""
        for operation in ended:
            waiter: Waiter | None = operation.waiter
            if waiter is None:
                continue
            try:
                waiter.deliver(operation)
            except Exception as error:
                self.warn(f"deliver {type(error)}", f"paceline: an answer could not be used: {error!r}", error)

    def statistics(self) -> dict[str, int | float | bool | None]:
        """What is going on, for debugging."""
        with self._lock:
            core = self.core
            counters: Counters = core.counters
            return {
                "connected": core.current is not None,
                "down_for": None if core.down_since is None else self.clock() - core.down_since,
                "waiting": len(core.waiting),
                "unacknowledged_reports": core.reports,
                **{name: getattr(counters, name) for name in Counters.__slots__},
            }

    # -- inside, under the lock -----------------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        self._started = True
        anchor()
        _watch_forks()
        self.core.went_down(now)
        self._timer_thread = threading.Thread(target=self._keep_time, name="paceline-timer", daemon=True)
        self._timer_thread.start()
        self._link(0.0)

    def _link(self, delay: float) -> None:
        thread = threading.Thread(target=self._connect, args=(delay,), name="paceline-link", daemon=True)
        self._links.add(thread)
        thread.start()

    def _refuse(self, operations: Sequence[Submission]) -> list[Operation]:
        why = "the client is closed" if self._closed else "this process was forked without support for gRPC"
        ended = []
        for operation, _ in operations:
            operation.result = Failure("UNAVAILABLE", why, unreachable=True)
            ended.append(operation)
        return ended

    def _after(self) -> list[Operation]:
        """Wake whoever has something to do. The operations that ended."""
        core = self.core
        if core.has_queued:
            self._to_write.notify_all()
        self._after_timer()
        if not core.reports:
            self._settled.notify_all()
        ended = core.ended
        if not ended:
            # Not the list that the next ones go into: whoever waits with it in hand would keep them.
            return []
        core.ended = []
        return ended

    def _after_timer(self) -> None:
        due = self.core.next_due
        if due is not None and (self._timer_due is None or due < self._timer_due):
            self._timer_due = due
            self._to_time.notify()

    def _learn(self, message: stubs.FallbackShare, now: float) -> None:
        self.local.learn(
            Share(
                pool=message.pool,
                per_minute={
                    wire.DIMENSIONS.get(amount.dimension, str(amount.dimension)): amount.per_minute
                    for amount in message.amounts
                },
                expires_at=now + wire.seconds(message.expires_in),
                targets=[wire.target_of(target) for target in message.targets],
            )
        )

    def _cut(self) -> tuple[list[grpc.Call | grpc.Channel], list[threading.Thread]]:
        """Wake every thread so that it ends. The calls to be cancelled, and the threads."""
        calls = list(self._calls.values())
        now = self.clock()
        for stream in list(self._calls):
            self.core.broken(stream, now)
        for condition in (self._to_write, self._to_link, self._to_time, self._settled):
            condition.notify_all()
        return calls, [*self._links, *self._grpc_threads]

    @property
    def _stopped(self) -> bool:
        return self._closed or self._suspended

    # -- the thread that keeps the times ------------------------------------------------------------------------

    def _keep_time(self) -> None:
        lock = self._lock
        with lock:
            while not self._closed:
                now = self.clock()
                self._timer_due = due = self.core.tick(now)
                ended = self._after()
                suspects, self.core.suspects = self.core.suspects, []
                calls = [self._calls[stream] for stream in suspects if stream in self._calls]
                if ended or calls:
                    lock.release()
                    try:
                        self._deliver(ended)
                        for call in calls:
                            _cancel(call)
                    finally:
                        lock.acquire()
                    continue
                self._to_time.wait(None if due is None else max(0.0, due - now))

    # -- the thread that connects and reads -----------------------------------------------------------------------

    def _connect(self, delay: float) -> None:
        """Have a session, and a new one when it breaks, until it is drained or the hub stops."""
        thread = threading.current_thread()
        try:
            while self._pause(delay):
                stream = Stream(unary=self._unary)
                try:
                    fatal = self._serve_unary(stream) if stream.unary else self._serve(stream)
                except Exception:
                    # Without this thread nobody would ever connect again.
                    log.exception("paceline: the session broke")
                    fatal = True
                if stream.draining:
                    return
                with self._lock:
                    self._move_on(stream)
                    delay = self._next_delay(stream, fatal)
                if self._unary and not stream.unary:
                    delay = 0.0
        finally:
            with self._lock:
                self._links.discard(thread)

    def _move_on(self, stream: Stream) -> None:
        """The next session is another server's, if there are several."""
        self._place = (self._place + 1) % len(self.endpoint.addresses)
        self._failed = 0 if stream.welcomed is not None else self._failed + 1

    def _next_delay(self, stream: Stream, fatal: bool = False) -> float:
        """The delay before the next session, when this one has ended or is drained."""
        if 0 < self._failed < len(self.endpoint.addresses) and not fatal:
            # The others may be well: find out before anybody waits.
            return 0.0
        lived = 0.0 if stream.welcomed is None else self.clock() - stream.welcomed
        if fatal:
            self._backoff = REFUSED_BACKOFF
        elif lived >= STABLE:
            self._backoff = FIRST_BACKOFF
        backoff = self._backoff
        self._backoff = max(backoff, min(backoff * 1.8, LAST_BACKOFF))
        if stream.welcomed is not None and backoff == FIRST_BACKOFF:
            return max(backoff, DRAIN_SPREAD if stream.draining else 0.0) * self._chance.random()
        return backoff * (0.5 + 0.5 * self._chance.random())

    def _pause(self, delay: float) -> bool:
        """Wait. Whether to go on."""
        until = self.clock() + delay
        with self._lock:
            while not self._stopped:
                left = until - self.clock()
                if left <= 0:
                    return True
                self._to_link.wait(left)
        return False

    def _serve(self, stream: Stream) -> bool:
        """One session, from its connection to its end. Whether the server refused it for good."""
        fatal: Failure | None = None
        channel: grpc.Channel | None = None
        timer: Timer | None = None
        try:
            before = threads_of_grpc()
            with self._lock:
                address = self.endpoint.addresses[self._place]
            channel = open_channel(self.endpoint, address)
            call = stubs.CoordinatorServiceStub(channel).Session(
                self._outgoing(stream), metadata=metadata(self.endpoint)
            )
            with self._lock:
                mine = threads_of_grpc() - before
                self._grpc_threads = {each for each in self._grpc_threads if each.is_alive()} | mine
                self._channels.add(channel)
                self._calls[stream] = call
                patience = CONNECT_TIMEOUT
                if len(self.endpoint.addresses) > 1:
                    patience = min(CONNECT_ONE_OF_SEVERAL * (1 + self._failed), CONNECT_TIMEOUT)
                timer = self.core.call_at(self.clock() + patience, lambda _at: self._not_welcomed(stream))
                self._after_timer()
                if self._stopped:
                    call.cancel()
            for message in call:
                self._receive(stream, message)
        except grpc.RpcError as error:
            code = error.code()
            if code is Code.UNIMPLEMENTED:
                self._unary = True
            elif code in _FATAL:
                fatal = Failure(code.name, error.details() or "")
                self.warn(f"session {code.name}", f"the coordinator refuses this client: {fatal.code}: {fatal.message}")
        except OSError as error:
            # A certificate that cannot be read.
            fatal = Failure("FAILED_PRECONDITION", str(error))
            self.warn("files", f"cannot connect to the coordinator: {error}")
        finally:
            with self._lock:
                if timer is not None:
                    self.core.cancel_timer(timer)
                self._calls.pop(stream, None)
                if not self._suspended:
                    self.core.broken(stream, self.clock(), fatal)
                self._to_write.notify_all()
                ended = self._after()
            self._deliver(ended)
            if channel is not None:
                channel.close()
                with self._lock:
                    self._channels.discard(channel)
        return fatal is not None

    def _not_welcomed(self, stream: Stream) -> None:
        if stream.welcomed is None and not stream.closed:
            self.core.suspects.append(stream)

    def _outgoing(self, stream: Stream) -> Iterator[stubs.SessionRequest]:
        """What goes out. gRPC runs this in a thread of its own, which sends one message before it asks for the next."""
        yield stubs.SessionRequest(
            hello=stubs.Hello(
                client_version=paceline_client.__version__,
                protocol_version=PROTOCOL_VERSION,
                language="python",
                instance_id=self.instance,
            )
        )
        while True:
            with self._lock:
                while True:
                    if stream.closed or self._stopped:
                        return
                    message = self.core.take(stream, self.clock())
                    if message is not None:
                        break
                    self._to_write.wait()
            yield message

    def _receive(self, stream: Stream, message: stubs.SessionResponse) -> None:
        what = message.WhichOneof("message")
        with self._lock:
            now = self.clock()
            if stream.closed:
                return
            if what == "batch":
                self.core.answers(stream, message.batch, now)
            elif what == "welcome":
                if message.welcome.header_names:
                    self.headers = HeaderFilter(message.welcome.header_names)
                self.core.welcome(stream, message.welcome, now)
                self._watch(stream, now)
            elif what == "drain" and not stream.draining:
                self.core.drain(stream, now)
                self._let_go(stream, now + wire.seconds(message.drain.grace) + 1.0, now)
                if not self._stopped:
                    self._move_on(stream)
                    self._link(self._next_delay(stream))
                self._to_write.notify_all()
            ended = self._after()
        self._deliver(ended)

    def _watch(self, stream: Stream, now: float) -> None:
        """Cut the session once its server owes the receipt of a report for too long and says nothing.

        Callers that wait for their turn would not find out by themselves before their wait is over.
        """

        def look(at: float) -> None:
            if stream.closed:
                return
            reports = [op for op in stream.open.values() if op.kind is not Kind.RESERVE]
            oldest = min((op.sent_at for op in reports), default=at)
            if max(oldest, stream.heard) + SILENCE < at and stream.heard <= oldest:
                # They have waited for longer than the budget.
                for operation in [op for op in self.core.waiting if op.stream is stream]:
                    self.core._unreachable(operation, at)
                self.core.suspects.append(stream)
            else:
                self._watch(stream, at)

        self.core.call_at(now + SILENCE / 2, look)

    def _let_go(self, stream: Stream, until: float, needed: float) -> None:
        """Cut a drained stream, once it has not been needed for a moment or its server should be gone.

        ``needed`` is when it was last needed: a grant that has just come is not yet in its caller's hands.
        """

        def look(now: float) -> None:
            if stream.closed:
                return
            done = self.core.is_done(stream)
            if now >= until or (done and (self.core.current is not None or now - needed >= DRAIN_LINGER)):
                self.core.suspects.append(stream)
            else:
                self._let_go(stream, until, needed if done else now)

        self.core.call_at(min(until, self.clock() + DRAIN_POLL), look)

    # -- without a session ----------------------------------------------------------------------------------------

    def _serve_unary(self, stream: Stream) -> bool:
        """Send each operation as a call of its own."""
        with self._lock:
            address = self.endpoint.addresses[self._place]
        channel = open_channel(self.endpoint, address)
        stub = stubs.CoordinatorServiceStub(channel)
        methods = {
            "reserve": stub.Reserve,
            "commit": stub.Commit,
            "release": stub.Release,
            "renew": stub.Renew,
            "observe": stub.Observe,
        }
        identity = metadata(self.endpoint)
        with self._lock:
            self._channels.add(channel)
            self._calls[stream] = channel
            self.core.start_unary(stream, self.clock())
        try:
            while True:
                with self._lock:
                    while True:
                        if stream.closed or self._stopped or stream in self._leaving:
                            return False
                        message = self.core.take(stream, self.clock())
                        if message is not None:
                            break
                        self._to_write.wait()
                before = threads_of_grpc()
                for item in message.batch.items:
                    what = item.WhichOneof("op")
                    if what is None or what == "cancel":
                        continue
                    timeout = REPORT_TIMEOUT
                    if what == "reserve":
                        timeout = wire.seconds(item.reserve.max_wait) + self.endpoint.budget + 1.0
                    # The methods have one shape, which the type of a table of them cannot say.
                    future = methods[what].future(getattr(item, what), timeout=timeout, metadata=identity)  # type: ignore[attr-defined]
                    future.add_done_callback(self._done(stream, item.number, what))
                with self._lock:
                    mine = threads_of_grpc() - before
                    self._grpc_threads = {each for each in self._grpc_threads if each.is_alive()} | mine
        finally:
            with self._lock:
                self._calls.pop(stream, None)
                self._leaving.discard(stream)
                if not self._suspended:
                    self.core.broken(stream, self.clock())
            channel.close()
            with self._lock:
                self._channels.discard(channel)

    def _done(self, stream: Stream, number: int, what: str) -> Callable[[grpc.Future[object]], None]:
        def done(future: grpc.Future[object]) -> None:
            item = stubs.ResponseItem(number=number)
            away = False
            try:
                getattr(item, what).CopyFrom(future.result())
            except grpc.RpcError as error:
                code = error.code()
                away = code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
                item.error.CopyFrom(_status(error))
            except (grpc.FutureCancelledError, grpc.FutureTimeoutError):
                item.error.CopyFrom(status_pb2.Status(code=14, message="cancelled"))
                away = True
            with self._lock:
                if stream.closed:
                    return
                now = self.clock()
                if away:
                    self.core.went_down(now)
                    if len(self.endpoint.addresses) > 1:
                        self._leaving.add(stream)
                        self._to_write.notify_all()
                else:
                    self.core.reached(stream, now)
                self.core.answers(stream, stubs.ResponseBatch(items=[item]), now)
                ended = self._after()
            self._deliver(ended)

        return done

    # -- forks --------------------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Let go of the connection. The lock is held until the fork is over."""
        self._lock.acquire()
        if not self._started or self._closed:
            return
        self._suspended = True
        calls, threads = self._cut()
        channels = list(self._channels)
        self._lock.release()
        deadline = time.monotonic() + FORK_BUDGET
        for call in calls:
            _cancel(call)
        for channel in channels:
            channel.close()
        me = threading.current_thread()
        for thread in threads:
            if thread is not me:
                thread.join(max(0.0, deadline - time.monotonic()))
        self._lock.acquire()
        threads = [*threads, *self._grpc_threads]
        for thread in threads:
            if thread is not me:
                thread.join(max(0.0, deadline - time.monotonic()))
        self.orphaned = any(thread.is_alive() and thread is not me for thread in threads)

    def after_fork_in_parent(self) -> None:
        """Go on, with a new connection."""
        self.orphaned = False
        if self._suspended:
            self._suspended = False
            self._link(0.0)
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Begin anew. What was on its way belongs to the parent."""
        if not is_fork_supported() and self._started:
            self.orphaned = True
        if self.orphaned:
            self.warn(
                "orphaned",
                "paceline: this process was forked off one that used gRPC without support for that; set "
                "GRPC_ENABLE_FORK_SUPPORT=1 or import paceline_client before grpc. It goes on by its policy.",
            )
        self._fresh()


def _cancel(call: grpc.Call | grpc.Channel) -> None:
    if isinstance(call, grpc.Channel):
        call.close()
    else:
        call.cancel()


def _status(error: grpc.RpcError) -> status_pb2.Status:
    """The status of a failed call, with its details."""
    trailing = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata() or ())
    for name, value in trailing:
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                return status_pb2.Status.FromString(value)
    number: int = error.code().value[0]
    return status_pb2.Status(code=number, message=error.details() or "")


# -- the hubs of this process ---------------------------------------------------------------------------------------

_hubs: dict[Endpoint, Hub] = {}
_hubs_lock = threading.Lock()
_watching = False


def join(endpoint: Endpoint) -> Hub:
    """The hub of an endpoint, for one more client."""
    with _hubs_lock:
        hub = _hubs.get(endpoint)
        if hub is None:
            hub = _hubs[endpoint] = Hub(endpoint)
        hub.users += 1
        return hub


def leave(hub: Hub, timeout: float) -> bool:
    """One client less. The last one sends what is left and closes. Whether every report was acknowledged."""
    with _hubs_lock:
        hub.users -= 1
        last = hub.users <= 0
        if last and _hubs.get(hub.endpoint) is hub:
            del _hubs[hub.endpoint]
    done = hub.flush(timeout, hopeless=False)
    if last:
        hub.close()
    return done


def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_BUDGET
    for hub in list(_hubs.values()):
        hub.flush(max(0.0, deadline - time.monotonic()), hopeless=False)
        hub.close()


def _watch_forks() -> None:
    """Registered after gRPC's own handlers, so that ours run before them."""
    global _watching
    if not _watching:
        _watching = True
        os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


_forking: list[Hub] = []


def _before_fork() -> None:
    _hubs_lock.acquire()
    _forking[:] = _hubs.values()
    for hub in _forking:
        if is_fork_supported():
            hub.before_fork()
        else:
            hub._lock.acquire()


def _after_in_parent() -> None:
    for hub in _forking:
        hub.after_fork_in_parent()
    _forking.clear()
    _hubs_lock.release()


def _after_in_child() -> None:
    global _hubs_lock
    for hub in _forking:
        hub.after_fork_in_child()
    _forking.clear()
    _hubs_lock = threading.Lock()


def _tell_apart() -> None:
    """In a child: clients that were made before the fork, and had not contacted anybody yet, are not the parent's."""
    for hub in list(_hubs.values()):
        if not hub._started:
            hub._fresh()


# Clients are often made before a server forks its workers, and the watch for forks begins with the first call.
os.register_at_fork(after_in_child=_tell_apart)
atexit.register(_at_exit)
