"""One thread for calls that block, so that the event loop never does."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

SWITCH_SECONDS = 0.001

P = ParamSpec("P")
T = TypeVar("T")

_Job = tuple[Callable[[], Any], "asyncio.Future[Any]", asyncio.AbstractEventLoop]


class Worker:
    """Runs what it is given, one after the other, in the order given.

    While the event loop is busy, the thread gets the interpreter back only at its switch interval, up to
    three times a call. At Python's 5 ms that is 30 ms for an append that takes 0.1 ms (measured), so a worker
    lowers it, for the whole process, to 1 ms: 2 ms.

    The thread is a daemon: a disk that hangs must not keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run ``function`` in the thread. Cancelling the future drops the result; it does not stop the
        call."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put((lambda: function(*args, **kwargs), future, loop))
        return future

    def end(self) -> None:
        """Let the thread end once it has done what it was given."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future, loop = job
            result: Any = None
            failure: BaseException | None = None
            try:
                result = function()
            except BaseException as error:  # belongs to whoever called
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_resolve, future, result, failure)
            del job, function, future, loop, result, failure


def _resolve(future: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)
