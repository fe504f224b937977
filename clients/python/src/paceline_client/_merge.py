"""Mergers: many small prompts, and fewer calls, where requests are what binds."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Final, Generic, Self, TypeVar, Unpack

from paceline_client._client import AsyncClient, Client, _granted
from paceline_client._errors import Denied
from paceline_client._estimate import estimate_tokens
from paceline_client._gather import Bounds, Entry, Gather, Sense
from paceline_client._grant import Grant
from paceline_client._plan import Ask, Plan

__all__ = ["AsyncMerger", "Merger"]

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_ITEMS: Final = 20
MAX_TOKENS: Final = 8_000
MAX_DELAY: Final = 0.05
"""Unit: seconds."""
MAX_CALLS: Final = 8
"""Calls of one merger at a time, those that wait for their turn included."""
MAX_WAITING: Final = 1_024


class _Merging(Generic[Item]):
    """What both kinds share: bounds, sizes, and what an answer teaches. No method waits."""

    def __init__(
        self,
        client: Client | AsyncClient,
        size: Callable[[Item], int] | None,
        bounds: Bounds,
        max_calls: int,
        ask: Ask,
    ) -> None:
        if max_calls < 1:
            raise ValueError("max_calls must be at least 1")
        plan = client._plan(ask)
        if not plan.raise_on_denial:
            raise ValueError("a merger has no raise_on_denial: a denial is the error of its items")
        self._owner = client
        self._plan = plan
        self._size = size
        self._bounds = bounds
        self._gather = Gather(bounds)
        self._sense = Sense()
        self._free = max_calls
        self._closed = False
        self._process = os.getpid()

    @property
    def merging(self) -> bool:
        """Whether items are merged now: a limit counted in calls is what binds, or nearly does."""
        return self._sense.merging

    def _entry(self, item: Item, now: float, future: Future[Result] | asyncio.Future[Result]) -> Entry:
        if self._process != os.getpid():
            raise RuntimeError("a merger belongs to the process that made it")
        if self._size is None:
            tokens = estimate_tokens(item, self._plan.candidates[0].model or None)
        else:
            tokens = max(0, self._size(item))
        return Entry(item, tokens, now, now + self._bounds.max_delay + self._plan.max_wait, future, future.done)

    def _asked(self, group: Sequence[Entry], now: float) -> Plan:
        """The reservation for one call with these items."""
        if self._owner._closed:
            raise RuntimeError("the client is closed")
        tokens, count = sum(entry.tokens for entry in group), len(group)
        candidates = tuple(
            replace(
                each,
                input_tokens=(each.input_tokens or 0) + tokens,
                output_tokens=_times(each.output_tokens, count),
                max_output_tokens=_times(each.max_output_tokens, count),
                min_output_tokens=_times(each.min_output_tokens, count),
            )
            for each in self._plan.candidates
        )
        left = min(entry.ends for entry in group) - now
        return replace(self._plan, candidates=candidates, max_wait=max(0.0, min(self._plan.max_wait, left)))

    def _learn(self, grant: Grant) -> None:
        if grant.binding:
            self._sense.bound(grant.binding)
        elif limits := grant.limits:
            self._sense.seen(limits)

    def _split(self, group: list[Entry], denied: Denied) -> list[list[Entry]]:
        """What to ask for instead of a call that is denied. Empty: nothing."""
        if denied.reason != "too_large":
            self._sense.bound(denied.dimension)
            return []
        middle = len(group) // 2
        return [group[middle:], group[:middle]] if middle else []


class Merger(_Merging[Item], Generic[Item, Result]):
    """Makes calls for items, one for each or one for several, as the limits demand. For threads.

    ``send`` gets the grant and a list of items, makes one call, commits it (``grant.commit(response)``) and returns a
    list with the result of each item in its order; an exception in the list is that item's error. What ``send``
    raises, and a denial, is the error of all its items. Close a merger, or use it with ``with``.
    """

    def __init__(
        self,
        client: Client,
        send: Callable[[Grant, list[Item]], Sequence[Result | Exception]],
        *,
        size: Callable[[Item], int] | None = None,
        max_items: int = MAX_ITEMS,
        max_tokens: int = MAX_TOKENS,
        max_delay: float = MAX_DELAY,
        max_calls: int = MAX_CALLS,
        max_waiting: int = MAX_WAITING,
        **ask: Unpack[Ask],
    ) -> None:
        """``size`` says how many tokens an item has; without it they are estimated.

        A call has at most ``max_items`` items and ``max_tokens`` of their tokens, and an item waits at most
        ``max_delay`` seconds for others. ``max_calls`` are made at a time, and ``max_waiting`` items wait at most.

        ``ask`` is as for :meth:`Client.reserve`: ``input_tokens`` is what each call has beside its items (a system
        prompt), counts of output are those of one item, and ``max_wait`` is that of an item, behind ``max_delay``.
        """
        super().__init__(client, size, Bounds(max_items, max_tokens, max_delay, max_waiting), max_calls, ask)
        self._client = client
        self._send = send
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(max_calls, thread_name_prefix="paceline-merge")
        self._thread: threading.Thread | None = None

    def submit(self, item: Item) -> Future[Result]:
        """Its result, later. Raises ``Denied`` (``queue_full``) if too many items wait."""
        future: Future[Result] = Future()
        entry = self._entry(item, time.monotonic(), future)
        with self._changed:
            if self._closed:
                raise RuntimeError("the merger is closed")
            if not self._gather.add(entry):
                raise _full(self._bounds)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="paceline-merger", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Take no more items, and wait for those that are there."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        """Hand out calls as items, time and free places allow, until closed and empty."""
        while True:
            with self._changed:
                while True:
                    now = time.monotonic()
                    merging, free = self._sense.merging, self._free > 0
                    group = self._gather.take(now, merging=merging, flush=self._closed) if free else []
                    late = self._gather.expired(now)
                    if group or late:
                        break
                    due = self._gather.due(merging=merging, free=free)
                    if due is None and self._closed:
                        return
                    self._changed.wait(None if due is None else max(0.0, due - now))
                self._free -= bool(group)
            # Outside the lock: whoever waits may have callbacks.
            for entry in late:
                if entry.future.set_running_or_notify_cancel():
                    entry.future.set_exception(_late())
            if not group:
                continue
            # From here on they cannot be cancelled.
            group = [entry for entry in group if entry.future.set_running_or_notify_cancel()]
            try:
                self._pool.submit(self._run, group)
            except RuntimeError as error:
                # The interpreter ends.
                _fail(group, error)
                self._freed()

    def _run(self, group: list[Entry]) -> None:
        todo = [group] if group else []
        try:
            while todo:
                self._one(todo.pop(), todo)
        finally:
            self._freed()

    def _one(self, group: list[Entry], todo: list[list[Entry]]) -> None:
        try:
            plan = self._asked(group, time.monotonic())
            try:
                grant = _granted(plan, self._client._decide(plan))
            except Denied as denied:
                smaller = self._split(group, denied)
                todo += smaller
                if not smaller:
                    _fail(group, denied)
                return
            self._learn(grant)
            with grant:
                results = self._send(grant, [entry.item for entry in group])
            _deliver(group, results)
        except BaseException as error:
            # An interruption too must reach those who wait, who are elsewhere.
            _fail(group, error)

    def _freed(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()


class AsyncMerger(_Merging[Item], Generic[Item, Result]):
    """The same for asyncio: ``send`` is awaited. It belongs to the event loop that first uses it."""

    def __init__(
        self,
        client: AsyncClient,
        send: Callable[[Grant, list[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        size: Callable[[Item], int] | None = None,
        max_items: int = MAX_ITEMS,
        max_tokens: int = MAX_TOKENS,
        max_delay: float = MAX_DELAY,
        max_calls: int = MAX_CALLS,
        max_waiting: int = MAX_WAITING,
        **ask: Unpack[Ask],
    ) -> None:
        """As for :class:`Merger`."""
        super().__init__(client, size, Bounds(max_items, max_tokens, max_delay, max_waiting), max_calls, ask)
        self._client = client
        self._send = send
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, item: Item) -> Result:
        """The result of the item. Raises ``Denied`` (``queue_full``) if too many items wait.

        Cancelled, the item is withdrawn, or its result thrown away; the others of its call get theirs.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("a merger belongs to one event loop")
        if self._closed:
            raise RuntimeError("the merger is closed")
        future: asyncio.Future[Result] = loop.create_future()
        if not self._gather.add(self._entry(item, loop.time(), future)):
            raise _full(self._bounds)
        self._work(loop)
        return await future

    async def aclose(self) -> None:
        """Take no more items, and wait for those that are there."""
        self._closed = True
        while self._loop is not None and (len(self._gather) or self._tasks):
            self._work(self._loop)
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the calls that items, time and free places allow, and come back when the next may be due."""
        now = loop.time()
        merging = self._sense.merging
        while self._free and (group := self._gather.take(now, merging=merging, flush=self._closed)):
            self._free -= 1
            task = loop.create_task(self._run(group))
            self._tasks.add(task)
            task.add_done_callback(self._ended)
            _watch(group, task)
        _fail(self._gather.expired(now), _late())
        due = self._gather.due(merging=merging, free=self._free > 0)
        timer = self._timer
        if timer is not None and (due is None or timer.when() != due):
            timer.cancel()
            self._timer = timer = None
        if due is not None and timer is None:
            self._timer = loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._loop is not None:
            self._work(self._loop)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._free += 1
        if self._loop is not None and not self._loop.is_closed():
            self._work(self._loop)

    async def _run(self, group: list[Entry]) -> None:
        todo = [group]
        while todo:
            # Those that were cancelled before their call began are left out.
            left = [entry for entry in todo.pop() if not entry.is_gone()]
            if left:
                await self._one(left, todo)

    async def _one(self, group: list[Entry], todo: list[list[Entry]]) -> None:
        try:
            plan = self._asked(group, asyncio.get_running_loop().time())
            try:
                grant = _granted(plan, await self._client._decide(plan))
            except Denied as denied:
                smaller = self._split(group, denied)
                todo += smaller
                if not smaller:
                    _fail(group, denied)
                return
            self._learn(grant)
            with grant:
                results = await self._send(grant, [entry.item for entry in group])
            _deliver(group, results)
        except asyncio.CancelledError:
            for each in [*group, *(entry for rest in todo for entry in rest)]:
                each.future.cancel()
            raise
        except Exception as error:
            _fail(group, error)
        except BaseException as error:
            _fail(group, error)
            raise


def _times(count: int | None, items: int) -> int | None:
    return None if count is None else count * items


def _watch(group: list[Entry], task: asyncio.Task[None]) -> None:
    """When nobody waits for any of them any more, their call is cancelled."""
    left = len(group)

    def done(future: asyncio.Future[Result]) -> None:
        nonlocal left
        left -= 1
        if not left:
            task.cancel()

    for entry in group:
        entry.future.add_done_callback(done)


def _deliver(group: Sequence[Entry], results: Sequence[Result | Exception]) -> None:
    found = list(results)
    if len(found) != len(group):
        raise ValueError(f"send returned {len(found)} results for {len(group)} items")
    for entry, result in zip(group, found, strict=True):
        if entry.is_gone():
            continue
        if isinstance(result, BaseException):
            entry.future.set_exception(result)
        else:
            entry.future.set_result(result)


def _fail(group: Sequence[Entry], error: BaseException) -> None:
    for entry in group:
        if not entry.is_gone():
            entry.future.set_exception(error)


def _full(bounds: Bounds) -> Denied:
    return Denied("queue_full", message=f"{bounds.max_waiting} items of this merger wait already", local=True)


def _late() -> Denied:
    return Denied("timeout", message="no call of the merger was free in time", local=True)
