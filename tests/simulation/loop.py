"""An event loop on a virtual clock: the same calls in the same order, whenever it runs.

There is no selector, no thread and no real clock. Time moves only when nothing is left to do at the present instant,
and then jumps to the next timer. Everything that code does on the loop belongs to a :class:`Process`, which it inherits
through its context; a process that is stopped or has died gets no turn, whatever was due to it.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")

_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Process:
    """Something that can be stopped and killed as a whole: a node, between its start and its end."""

    __slots__ = ("context", "dead", "gated", "name", "parked", "stopped")

    def __init__(self, name: str) -> None:
        self.name = name
        self.context = contextvars.copy_context()
        self.context.run(_process.set, self)
        self.gated = False
        self.stopped = False
        self.dead = False
        self.parked: list[Call] = []

    def __repr__(self) -> str:
        return self.name


def current() -> Process | None:
    """Whose code is running."""
    return _process.get()


class Call:
    """A callback that is due. Also a timer's handle."""

    __slots__ = ("args", "callback", "context", "when")

    def __init__(
        self, callback: Callable[..., object] | None, args: tuple[Any, ...], context: contextvars.Context, when: int
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.when = when

    def cancel(self) -> None:
        self.callback = None
        self.args = ()

    def cancelled(self) -> bool:
        return self.callback is None


class Deadlock(Exception):
    """Nothing is due any more, and what was waited for has not happened."""


class Spinning(Exception):
    """So many callbacks at one instant that time will not go on."""


_MOST_AT_ONCE = 200_000


if TYPE_CHECKING:
    _Base = asyncio.BaseEventLoop
else:
    _Base = asyncio.AbstractEventLoop


class Loop(_Base):
    """See above. ``now`` is µs since the start of the run."""

    def __init__(self) -> None:
        self.now = 0  # not super().__init__(): nothing of it is used
        self.calls = 0
        """Callbacks made so far."""
        self.failures: list[str] = []
        """What nobody caught."""
        self._ready: deque[Call] = deque()
        self._timers: list[tuple[int, int, Call]] = []
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[Any]] = []
        self._closed = False
        self._running = False

    # -- what asyncio asks of a loop -----------------------------------------------------------------------------

    def time(self) -> float:
        return self.now / 1e6

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        if context is None:
            task = asyncio.Task(coro, loop=self, name=name)
        else:
            task = asyncio.Task(coro, loop=self, name=name, context=context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        # Kept to the end: what is left of a dead process must not run its "finally" at a moment that nobody chose.
        self._tasks.append(task)
        return task

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Call:
        call = Call(callback, args, contextvars.copy_context() if context is None else context, self.now)
        if not self._closed:
            self._ready.append(call)
        return call

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Call:
        return self.at(self.now + round(delay * 1e6), callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Call:
        return self.at(round(when * 1e6), callback, *args, context=context)

    def at(
        self, when: int, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Call:
        """Call back at ``when`` µs, in the order of the times, then of the calls of this method."""
        when = max(when, self.now)
        call = Call(callback, args, contextvars.copy_context() if context is None else context, when)
        if not self._closed:
            heapq.heappush(self._timers, (when, next(self._numbers), call))
        return call

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Runs it here and now."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.failures.append(f"{context.get('message')}: {error!r}")

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    async def shutdown_asyncgens(self) -> None:
        pass

    # -- processes -----------------------------------------------------------------------------------------------

    def stop_process(self, process: Process) -> None:
        """As SIGSTOP: it gets no turn until :meth:`resume_process`."""
        process.stopped = process.gated = True

    def resume_process(self, process: Process) -> None:
        """As SIGCONT: all that was due meanwhile happens at once, in the order in which it was due."""
        if process.dead or not process.stopped:
            return
        process.stopped = process.gated = False
        parked, process.parked = process.parked, []
        self._ready.extend(parked)

    def kill_process(self, process: Process) -> None:
        """As SIGKILL: it never gets a turn again."""
        process.dead = process.gated = True
        process.parked.clear()

    # -- running -------------------------------------------------------------------------------------------------

    def advance(self, until: int, done: Callable[[], bool] | None = None) -> bool:
        """Run to time ``until``, or to when ``done`` says so, which is asked whenever time is about to move.

        ``False``: nothing is due any more.
        """
        ready, timers = self._ready, self._timers
        take = ready.popleft
        events._set_running_loop(self)
        self._running = True
        try:
            while True:
                most = self.calls + _MOST_AT_ONCE
                while ready:
                    call = take()
                    callback = call.callback
                    if callback is None:
                        continue
                    context = call.context
                    process = context.get(_process)
                    if process is not None and process.gated:
                        if not process.dead:
                            process.parked.append(call)
                        continue
                    self.calls += 1
                    if self.calls > most:
                        raise Spinning(f"at {self.now} µs: {callback!r}")
                    try:
                        context.run(callback, *call.args)
                    except Exception as error:
                        self.failures.append(f"{callback!r}: {error!r}")
                while timers and timers[0][2].callback is None:
                    heapq.heappop(timers)
                if not timers:
                    return False
                when = timers[0][0]
                if when > until:
                    self.now = max(self.now, until)
                    return True
                if done is not None and done():
                    return True
                self.now = max(self.now, when)
                while timers and timers[0][0] <= self.now:
                    ready.append(heapq.heappop(timers)[2])
        finally:
            self._running = False
            events._set_running_loop(None)

    def run_until(self, awaitable: Coroutine[Any, Any, T], until: int) -> T:
        """Run a coroutine to its end. Raises :class:`Deadlock` if it has none before ``until``."""
        task = self.create_task(awaitable)
        self.call_soon(lambda: None)
        self.advance(until, task.done)
        if not task.done():
            raise Deadlock(f"at {self.now} µs")
        return task.result()

    def lost(self) -> list[str]:
        """What nobody caught, and tasks that ended by an exception that nobody has looked at."""
        found = list(self.failures)
        for task in self._tasks:
            if task.done() and not task.cancelled() and task._log_traceback:
                found.append(f"{task.get_coro()!r}: {task.exception()!r}")
        return found

    def close(self) -> None:
        """Nothing runs any more; what is left is thrown away."""
        if self._closed:
            return
        self._closed = True
        self._ready.clear()
        self._timers.clear()
        events._set_running_loop(self)
        try:
            for task in self._tasks:
                if not task.done():
                    coro = task.get_coro()
                    try:
                        coro.close()
                    except (RuntimeError, Exception):  # it would not go
                        continue
            self._tasks.clear()
            self.failures.clear()
        finally:
            events._set_running_loop(None)
