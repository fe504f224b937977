"""The body of a response, passed on as it comes and shown to the attempt that it belongs to."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from queue import SimpleQueue
from typing import Any

import httpx2

from paceline_client.hooks._call import Attempt


class SyncTap(httpx2.SyncByteStream):
    """Wraps a body that is read with ``for``. Whatever else it can do, it still can."""

    def __init__(self, body: httpx2.SyncByteStream, attempt: Attempt) -> None:
        self._body = body
        self._attempt = attempt
        _watch(self, attempt)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._body, name)

    def __iter__(self) -> Iterator[bytes]:
        attempt = self._attempt
        try:
            for chunk in self._body:
                attempt.feed(chunk)
                yield chunk
        except BaseException:
            attempt.dropped()
            raise
        attempt.exhausted()

    def close(self) -> None:
        try:
            self._body.close()
        finally:
            self._attempt.dropped()


class AsyncTap(httpx2.AsyncByteStream):
    """The same for a body that is read with ``async for``."""

    def __init__(self, body: httpx2.AsyncByteStream, attempt: Attempt) -> None:
        self._body = body
        self._attempt = attempt
        _watch(self, attempt)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._body, name)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        attempt = self._attempt
        chunks = self._body.__aiter__()
        try:
            async for chunk in chunks:
                attempt.feed(chunk)
                yield chunk
        except BaseException:
            attempt.dropped()
            raise
        finally:
            # In the task that read it; else the loop would close it later, in another.
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()
        attempt.exhausted()

    async def aclose(self) -> None:
        try:
            await self._body.aclose()
        finally:
            self._attempt.dropped()


# -- bodies that are thrown away ------------------------------------------------------------------------------------
#
# A finalizer may run in any thread at any moment, also in one that holds a lock which settling needs. So it only puts
# the attempt on a queue (whose `put` may interrupt itself), and a thread of its own settles it.

_dropped: SimpleQueue[Attempt] = SimpleQueue()
_open: weakref.WeakSet[Attempt] = weakref.WeakSet()
_lock = threading.Lock()
_reaping_in = 0
"""The process that the thread runs in: a fork does not take it along."""


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


# Of a thread that held it, the child of a fork has nothing but the lock.
os.register_at_fork(after_in_child=_renew_lock)


def _watch(tap: SyncTap | AsyncTap, attempt: Attempt) -> None:
    global _dropped, _reaping_in
    if _reaping_in != os.getpid():
        with _lock:
            if _reaping_in != os.getpid():
                if not _reaping_in:
                    # After the hub's own, so it runs before that sends the last reports.
                    atexit.register(_at_exit)
                _dropped = SimpleQueue()
                threading.Thread(target=_reap, args=(_dropped,), name="paceline-dropped", daemon=True).start()
                _reaping_in = os.getpid()
    finalizer = weakref.finalize(tap, _thrown_away, attempt)
    finalizer.atexit = False
    _open.add(attempt)


def _thrown_away(attempt: Attempt) -> None:
    if not attempt.settled:
        _dropped.put(attempt)


def _reap(dropped: SimpleQueue[Attempt]) -> None:
    while True:
        dropped.get().dropped()


def _at_exit() -> None:
    for attempt in list(_open):
        attempt.dropped()
