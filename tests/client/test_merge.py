"""Mergers: every item is answered once, whatever becomes of the others and of the calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline_client import AsyncClient, AsyncMerger, Client, Denied, Grant, Merger
from paceline_client.stubs import v1 as pb
from tests.client.fake import Fake, denied, granted, until

Connect = Callable[..., Client]
ConnectAsync = Callable[..., AsyncClient]


def pressed(request: pb.ReserveRequest, level: int = 0) -> pb.ReserveResponse:
    """A grant while requests are nearly used up."""
    response = granted(request)
    response.dimensions.add(pool="p", dimension=pb.DIMENSION_REQUESTS, burst=100, level=level)
    response.dimensions.add(pool="p", dimension=pb.DIMENSION_INPUT_TOKENS, burst=1_000, level=900)
    return response


class Upstream:
    """Answers items with their double, or as it is told."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate: threading.Event | None = None
        self.entered = threading.Event()

    def send(self, grant: Grant, items: list[int]) -> list[int | Exception]:
        self.calls.append(items)
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if -1 in items:
            raise OSError("the call failed")
        grant.commit_usage(input_tokens=len(items), output_tokens=1)
        return [KeyError(item) if item == 113 else 2 * item for item in items]

    async def send_async(self, grant: Grant, items: list[int]) -> list[int | Exception]:
        await asyncio.sleep(0)
        return self.send(grant, items)


OPTIONS: dict[str, Any] = {"model": "m", "size": lambda item: 10, "max_delay": 0.01, "max_wait": 20}


class Both:
    """A merger of either kind, fed alike: all items at once."""

    def __init__(self, kind: str, connect: Connect, connect_async: ConnectAsync) -> None:
        self.kind, self.connect, self.connect_async = kind, connect, connect_async

    def answers(self, upstream: Upstream, items: list[int], first: int | None = 0, **options: Any) -> list[Any]:
        """The results and errors, in order. ``first``: an item before them, of which the merger learns."""
        options = OPTIONS | options
        if self.kind == "sync":
            with Merger(self.connect(), upstream.send, **options) as merger:
                if first is not None:
                    assert merger.submit(first).result(20) == 2 * first
                futures: list[Future[int]] = [merger.submit(item) for item in items]
                return [each.exception(20) or each.result(0) for each in futures]

        async def run() -> list[Any]:
            async with AsyncMerger(self.connect_async(), upstream.send_async, **options) as other:
                if first is not None:
                    assert await other.submit(first) == 2 * first
                waiting = asyncio.gather(*(other.submit(item) for item in items), return_exceptions=True)
                return list(await asyncio.wait_for(waiting, 20))

        return asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def both(request: pytest.FixtureRequest, connect: Connect, connect_async: ConnectAsync) -> Both:
    return Both(request.param, connect, connect_async)


def test_while_requests_bind_items_are_merged(both: Both, server: Fake) -> None:
    server.on_reserve = pressed
    upstream = Upstream()
    ask: dict[str, Any] = {"input_tokens": 7, "max_output_tokens": 5, "tenant": "t"}
    assert both.answers(upstream, list(range(1, 26)), max_items=10, **ask) == [2 * each for each in range(1, 26)]
    # What came first to either worker differs; that far fewer calls are made does not.
    assert upstream.calls[0] == [0]
    assert 3 <= len(upstream.calls) - 1 <= 5
    assert max(map(len, upstream.calls)) == 10
    assert sorted(each for call in upstream.calls for each in call) == list(range(26))
    for reserve, call in zip(server.items("reserve"), upstream.calls, strict=True):
        assert reserve.tenant == "t"
        if len(call) in (1, 10):
            sizes = reserve.candidates[0].estimate
            assert (sizes.input_tokens, sizes.max_output_tokens) == (7 + 10 * len(call), 5 * len(call))
    until(lambda: len(server.items("commit")) == len(upstream.calls))


@pytest.mark.parametrize("dimension", [None, pb.DIMENSION_INPUT_TOKENS])
def test_otherwise_each_goes_alone(both: Both, server: Fake, dimension: pb.Dimension.ValueType | None) -> None:
    def answer(request: pb.ReserveRequest) -> pb.ReserveResponse:
        response = pressed(request, level=80 if dimension is None else 10)
        if dimension is not None:
            response.binding_dimension.dimension = dimension
        return response

    server.on_reserve = answer
    upstream = Upstream()
    assert both.answers(upstream, [1, 2, 3, 4]) == [2, 4, 6, 8]
    assert sorted(upstream.calls) == [[0], [1], [2], [3], [4]]


def test_items_have_results_and_errors_of_their_own(both: Both, server: Fake) -> None:
    server.on_reserve = pressed
    first, error, last = both.answers(Upstream(), [1, 113, 3], max_items=3)
    assert (first, last) == (2, 6)
    assert isinstance(error, KeyError)


def test_an_error_of_the_call_is_that_of_its_items_only(both: Both, server: Fake) -> None:
    server.on_reserve = pressed
    found = both.answers(Upstream(), [1, -1, 3, 4], max_items=2)
    assert [type(each) for each in found] == [OSError, OSError, int, int]
    until(lambda: len(server.items("commit")) == 3)


def test_as_many_results_as_items(both: Both, server: Fake) -> None:
    upstream = Upstream()
    upstream.send = lambda grant, items: [1, 2, 3]  # type: ignore[method-assign]
    (error,) = both.answers(upstream, [1], first=None)
    assert isinstance(error, ValueError)
    assert "3 results for 1 items" in str(error)


def test_a_denial_is_the_error_of_the_items_and_says_what_binds(both: Both, server: Fake) -> None:
    def answer(request: pb.ReserveRequest) -> pb.ReserveResponse:
        response = denied()
        response.binding_dimension.dimension = pb.DIMENSION_REQUESTS
        return response if not served else granted(request)

    served: list[int] = []
    server.on_reserve = answer
    with Merger(both.connect(), Upstream().send, **OPTIONS) as merger:
        error = merger.submit(1).exception(20)
        assert isinstance(error, Denied)
        assert error.reason == "limit"
        assert merger.merging
    assert [type(each) for each in both.answers(Upstream(), [1, 2], first=None)] == [Denied, Denied]


def test_what_is_too_large_together_is_asked_for_in_parts(both: Both, server: Fake) -> None:
    def answer(request: pb.ReserveRequest) -> pb.ReserveResponse:
        large = request.candidates[0].estimate.input_tokens > 20
        return denied(pb.DENIAL_REASON_TOO_LARGE) if large else pressed(request)

    server.on_reserve = answer
    upstream = Upstream()
    assert both.answers(upstream, [1, 2, 3, 4, 5], max_items=5) == [2, 4, 6, 8, 10]
    assert max(map(len, upstream.calls)) == 2


def test_too_many_items(connect: Connect, server: Fake) -> None:
    upstream = Upstream()
    upstream.gate = threading.Event()
    with Merger(connect(), upstream.send, **OPTIONS, max_calls=1, max_waiting=3) as merger:
        futures = [merger.submit(0)]
        assert upstream.entered.wait(10)
        futures += [merger.submit(item) for item in (1, 2, 3)]
        with pytest.raises(Denied, match="queue_full"):
            merger.submit(4)
        assert futures[1].cancel()
        futures.append(merger.submit(5))
        upstream.gate.set()
        assert [each.result(20) for each in (futures[0], *futures[2:])] == [0, 4, 6, 10]
    assert all(1 not in call for call in upstream.calls)
    with pytest.raises(RuntimeError, match="closed"):
        merger.submit(1)


def test_a_thread_that_gives_up_leaves_the_others_alone(connect: Connect, server: Fake) -> None:
    server.on_reserve = pressed
    upstream = Upstream()
    with Merger(connect(), upstream.send, **(OPTIONS | {"max_delay": 60}), max_items=3) as merger:
        assert merger.submit(0).result(20) == 0
        futures = [merger.submit(item) for item in (1, 2)]
        assert futures[0].cancel()
        futures += [merger.submit(item) for item in (3, 4)]
        assert [each.result(20) for each in futures[1:]] == [4, 6, 8]
        with pytest.raises(CancelledError):
            futures[0].result(0)
    assert upstream.calls == [[0], [2, 3, 4]]


async def test_a_task_that_gives_up_leaves_the_others_alone(connect_async: ConnectAsync, server: Fake) -> None:
    server.on_reserve = pressed
    upstream = Upstream()
    begun, gate = asyncio.Event(), asyncio.Event()

    async def send(grant: Grant, items: list[int]) -> list[int | Exception]:
        if items != [0]:
            begun.set()
            await gate.wait()
        return upstream.send(grant, items)

    async with AsyncMerger(connect_async(), send, **OPTIONS, max_items=3) as merger:
        await merger.submit(0)
        tasks = [asyncio.create_task(merger.submit(item)) for item in (1, 2, 3)]
        await begun.wait()
        tasks[0].cancel()
        gate.set()
        assert await asyncio.gather(*tasks[1:]) == [4, 6]
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
    assert upstream.calls == [[0], [1, 2, 3]]


async def test_a_call_that_nobody_waits_for_is_cancelled(connect_async: ConnectAsync, server: Fake) -> None:
    server.on_reserve = pressed
    begun = asyncio.Event()

    async def send(grant: Grant, items: list[int]) -> list[int | Exception]:
        if items != [0]:
            begun.set()
            await asyncio.sleep(3_600)
        grant.commit_usage(output_tokens=1)
        return [0]

    client = connect_async()
    async with AsyncMerger(client, send, **OPTIONS, max_items=2) as merger:
        await merger.submit(0)
        tasks = [asyncio.create_task(merger.submit(item)) for item in (1, 2)]
        await begun.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert await client.flush(10)
    assert [each.outcome.disposition for each in server.items("commit")] == [
        pb.DISPOSITION_SUCCEEDED,
        pb.DISPOSITION_ABORTED,
    ]


def test_an_item_waits_no_longer_than_it_was_told(both: Both, server: Fake) -> None:
    """All calls are busy. What has waited for ``max_delay`` and ``max_wait`` is denied meanwhile, not afterwards."""
    gate = threading.Event()
    upstream = Upstream()
    options = OPTIONS | {"max_wait": 0.2, "max_calls": 1}

    async def stuck(grant: Grant, items: list[int]) -> list[int | Exception]:
        upstream.entered.set()
        await asyncio.to_thread(gate.wait, 20)
        return [0] * len(items)

    async def run() -> BaseException | None:
        async with AsyncMerger(both.connect_async(), stuck, **options) as other:
            task = asyncio.create_task(other.submit(1))
            await asyncio.to_thread(upstream.entered.wait, 10)
            try:
                await asyncio.wait_for(other.submit(2), 10)
            except Denied as late:
                return late
            finally:
                gate.set()
                await task
        return None

    if both.kind == "sync":
        upstream.gate = gate
        with Merger(both.connect(), upstream.send, **options) as merger:
            merger.submit(1)
            assert upstream.entered.wait(10)
            error = merger.submit(2).exception(10)
            gate.set()
    else:
        error = asyncio.run(run())
    assert isinstance(error, Denied)
    assert (error.reason, error.local) == ("timeout", True)


async def test_the_reservation_waits_for_what_is_left(connect_async: ConnectAsync, server: Fake) -> None:
    begun = asyncio.Event()

    async def send(grant: Grant, items: list[int]) -> list[int | Exception]:
        begun.set()
        await asyncio.sleep(0.3 if items == [0] else 0)
        grant.commit_usage(output_tokens=1)
        return list(items)

    async with AsyncMerger(connect_async(), send, **(OPTIONS | {"max_wait": 5, "max_calls": 1})) as merger:
        busy = asyncio.create_task(merger.submit(0))
        await begun.wait()
        # It waits 0.3 s for the only place, of the 5 s and the delay that it has.
        await merger.submit(1)
        await busy
    first, second = (each.max_wait.ToNanoseconds() / 1e9 for each in server.items("reserve"))
    assert 0 < second < 4.75 < first <= 5


@pytest.mark.parametrize("options", [{"max_calls": 0}, {"max_items": 0}, {"raise_on_denial": False}, {"ladder": "l"}])
def test_options_that_make_no_sense(connect: Connect, connect_async: ConnectAsync, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"max_|raise_on_denial|exactly one"):
        Merger(connect(), Upstream().send, **(OPTIONS | options))
    with pytest.raises(ValueError, match=r"max_|raise_on_denial|exactly one"):
        AsyncMerger(connect_async(), Upstream().send_async, **(OPTIONS | options))


def test_a_client_that_is_closed(connect: Connect) -> None:
    client = connect()
    with Merger(client, Upstream().send, **OPTIONS) as merger:
        client.close(0.2)
        assert isinstance(merger.submit(1).exception(10), RuntimeError)
    with pytest.raises(RuntimeError, match="the client is closed"):
        Merger(client, Upstream().send, **OPTIONS)


async def test_a_merger_belongs_to_one_loop(connect_async: ConnectAsync, server: Fake) -> None:
    merger = AsyncMerger(connect_async(), Upstream().send_async, **OPTIONS)
    assert await merger.submit(1) == 2

    def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="one event loop"):
            asyncio.run(merger.submit(2))

    await asyncio.to_thread(elsewhere)
    await merger.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await merger.submit(1)


async def test_what_waits_is_served_when_it_is_closed(connect_async: ConnectAsync, server: Fake) -> None:
    server.on_reserve = pressed
    merger = AsyncMerger(connect_async(), Upstream().send_async, **(OPTIONS | {"max_delay": 60}))
    assert await merger.submit(1) == 2
    tasks = [asyncio.create_task(merger.submit(item)) for item in (2, 3)]
    await asyncio.sleep(0)
    await asyncio.wait_for(merger.aclose(), 20)
    assert await asyncio.gather(*tasks) == [4, 6]


def test_disabled_each_goes_alone() -> None:
    with Merger(Client(disabled=True), Upstream().send, **OPTIONS) as merger:
        assert [each.result(10) for each in [merger.submit(item) for item in (1, 2, 3)]] == [2, 4, 6]


@given(
    items=st.lists(st.sampled_from([1, 2, 3, 113, -1, 4, 5]), min_size=1, max_size=30),
    given_up=st.sets(st.integers(0, 29), max_size=8),
    fates=st.lists(st.sampled_from(["pressed", "free", "denied", "large"]), min_size=1, max_size=8),
    max_items=st.integers(1, 6),
    max_calls=st.integers(1, 4),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_item_is_answered_once(
    connect_async: ConnectAsync,
    server: Fake,
    items: list[int],
    given_up: set[int],
    fates: list[str],
    max_items: int,
    max_calls: int,
) -> None:
    asked = 0

    def answer(request: pb.ReserveRequest) -> pb.ReserveResponse:
        nonlocal asked
        fate = fates[asked % len(fates)]
        asked += 1
        if fate == "denied":
            return denied()
        if fate == "large" and request.candidates[0].estimate.input_tokens > 10:
            return denied(pb.DENIAL_REASON_TOO_LARGE)
        return pressed(request, level=0 if fate == "pressed" else 90)

    server.on_reserve = answer
    sent: list[int] = []

    async def send(grant: Grant, group: list[tuple[int, int]]) -> list[Any]:
        sent.extend(number for number, _ in group)
        await asyncio.sleep(0)
        if any(item == -1 for _, item in group):
            raise OSError
        grant.commit_usage(output_tokens=1)
        return [KeyError() if item == 113 else (number, item) for number, item in group]

    async def run() -> list[Any]:
        options = OPTIONS | {"max_delay": 0.001, "max_items": max_items, "max_calls": max_calls}
        async with AsyncMerger(connect_async(), send, **options) as merger:
            tasks = [asyncio.create_task(merger.submit(pair)) for pair in enumerate(items)]
            await asyncio.sleep(0)
            for number in given_up & set(range(len(items))):
                tasks[number].cancel()
            waiting: Awaitable[list[Any]] = asyncio.gather(*tasks, return_exceptions=True)
            return await asyncio.wait_for(waiting, 20)

    for number, (item, found) in enumerate(zip(items, asyncio.run(run()), strict=True)):
        if number in given_up:
            assert isinstance(found, asyncio.CancelledError)
        elif not isinstance(found, (Denied, OSError)):
            assert isinstance(found, KeyError) if item == 113 else found == (number, item)
    assert len(sent) == len(set(sent))
