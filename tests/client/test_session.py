"""The session: batches, breaks, drains, bounds, and what happens when nobody is there."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from paceline_client import AsyncClient, Client, Grant, RequestRefused, Unavailable
from paceline_client import _core as core
from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import error_details_pb2, status_pb2
from tests.client.fake import Fake, denied, granted, until

Connect = Callable[..., Client]
ConnectAsync = Callable[..., AsyncClient]


def hub(client: Client | AsyncClient) -> Any:
    assert client._desk is not None
    return client._desk.hub


async def call(client: AsyncClient, **ask: Any) -> None:
    async with client.reserve(**{"model": "m", **ask}) as grant:
        grant.commit_usage(output_tokens=1)


# -- batches ----------------------------------------------------------------------------------------------------------


async def test_one_tick_of_the_loop_makes_one_message(connect_async: ConnectAsync, server: Fake) -> None:
    client = connect_async()
    await call(client)
    await client.flush()
    server.batches.clear()
    grants = await asyncio.gather(*(client.acquire(model="m") for _ in range(50)))
    assert [len(batch) for batch in server.batches] == [50]
    for grant in grants:
        grant.commit_usage(output_tokens=1)
    await client.flush()
    assert [len(batch) for batch in server.batches] == [50, 50]


async def test_the_bounds_of_the_server_are_kept(connect_async: ConnectAsync, server: Fake) -> None:
    server.welcome.max_batch_items = 7
    server.welcome.max_batch_bytes = 600
    server.welcome.max_open_items = 20
    most = 0

    def hold(request: pb.ReserveRequest) -> None:
        nonlocal most
        most = max(most, sum(item.HasField("reserve") for item in server.sessions[0].open.values()))

    server.on_reserve = hold
    client = connect_async()
    tasks = [asyncio.create_task(client.acquire(model="m", max_wait=60)) for _ in range(40)]
    await asyncio.to_thread(server.wait_for, "reserve", 18)
    await asyncio.sleep(0.05)
    # A tenth of the places is left for reports, which pass.
    assert len(server.items("reserve")) == most == 18
    client.observe("m", output_tokens=1)
    await asyncio.to_thread(server.wait_for, "observe")
    session = server.sessions[0]
    server.on_reserve = granted
    session.send(
        *(
            pb.ResponseItem(number=number, reserve=granted(item.reserve))
            for number, item in list(session.open.items())
            if item.HasField("reserve")
        )
    )
    assert all(await asyncio.gather(*tasks))
    assert max(len(batch) for batch in server.batches) <= 7
    sizes = [pb.RequestBatch(items=batch).ByteSize() for batch in server.batches if len(batch) > 1]
    assert max(sizes) <= 600


async def test_hello_says_who_it_is(connect_async: ConnectAsync, server: Fake) -> None:
    client = connect_async(token="the token")
    await call(client)
    hello = server.sessions[0].hello
    assert hello.language == "python"
    assert hello.client_version
    assert hello.instance_id == hub(client).instance
    assert server.tokens == {"Bearer the token"}
    assert "the token" not in repr(client._options) + repr(client)


async def test_the_server_says_which_headers_it_wants(connect_async: ConnectAsync, server: Fake) -> None:
    server.welcome.header_names.extend(["x-wanted-*", "exact", "*", "authorization"])
    client = connect_async()
    async with client.reserve(model="m") as grant:
        grant.commit_usage(
            headers={"X-Wanted-1": "1", "exact": "2", "retry-after": "3", "Authorization": "4", "other": "5"}
        )
    await client.flush()
    assert {(each.name, each.value) for each in server.items("commit")[0].outcome.headers} == {
        ("x-wanted-1", b"1"),
        ("exact", b"2"),
    }


# -- breaks -----------------------------------------------------------------------------------------------------------


async def test_a_break_before_the_answer_gives_one_grant(connect_async: ConnectAsync, server: Fake) -> None:
    client = connect_async()
    await call(client)
    await client.flush()
    server.mute = True
    task = asyncio.create_task(client.acquire(model="m", max_wait=30))
    await asyncio.to_thread(server.wait_for, "reserve", 2)
    await asyncio.sleep(0.3)
    server.mute = False
    server.break_sessions()
    grant = await task
    _, first, again = server.items("reserve")
    assert first.reservation_id == again.reservation_id == grant.reservation_id
    assert server.grants[grant.reservation_id] == 1
    # The time that it has waited is not waited again.
    assert again.max_wait.ToNanoseconds() < first.max_wait.ToNanoseconds() - 0.25e9
    assert client.statistics()["resent"] == 1
    grant.release()


async def test_a_break_before_the_acknowledgement_commits_again(connect_async: ConnectAsync, server: Fake) -> None:
    client = connect_async()
    grant = await client.acquire(model="m")
    server.mute = True
    grant.commit_usage(output_tokens=1, headers={"retry-after": "1"})
    await asyncio.to_thread(server.wait_for, "commit")
    await asyncio.sleep(0.1)
    server.mute = False
    server.break_sessions()
    assert await client.flush(10)
    first, again = server.items("commit")
    assert first.reservation_id == again.reservation_id
    # An age is that of the moment of sending.
    assert again.outcome.header_age.ToNanoseconds() > first.outcome.header_age.ToNanoseconds() + 0.05e9


async def test_one_that_the_server_withdrew_asks_anew(connect_async: ConnectAsync, server: Fake) -> None:
    client = connect_async()
    await call(client)
    await client.flush()
    server.mute = True
    task = asyncio.create_task(client.acquire(model="m", max_wait=30))
    first = (await asyncio.to_thread(server.wait_for, "reserve", 2))[1]
    server.decided[first.reservation_id] = denied(pb.DENIAL_REASON_RELEASED)
    server.mute = False
    server.break_sessions()
    grant = await task
    assert grant.reservation_id != first.reservation_id
    grant.release()


async def test_reports_wait_for_the_server_to_come_back(connect_async: ConnectAsync, server: Fake) -> None:
    client = connect_async()
    grants = [await client.acquire(model="m") for _ in range(3)]
    server.stop()
    for grant in grants:
        grant.commit_usage(output_tokens=1)
    assert not await client.flush(0.2)
    server.start()
    assert await client.flush(15)
    assert {each.reservation_id for each in server.items("commit")} == {each.reservation_id for each in grants}


async def test_what_the_server_cannot_serve_now_is_sent_again(connect_async: ConnectAsync, server: Fake) -> None:
    away = status_pb2.Status(code=14, message="the owner is away")
    answers: list[Any] = [away, denied(pb.DENIAL_REASON_DRAINING), away]
    reports = [away, away]
    server.on_reserve = lambda request: answers.pop(0) if answers else granted(request)
    server.on_report = lambda what, request: reports.pop(0) if reports else None
    client = connect_async()
    await call(client)
    assert await client.flush()
    assert len(server.items("reserve")) == 4
    assert len({each.reservation_id for each in server.items("reserve")}) == 1
    assert len(server.items("commit")) == 3


async def test_the_delay_that_the_server_asks_for_is_kept(connect_async: ConnectAsync, server: Fake) -> None:
    busy = status_pb2.Status(code=8, message="busy")
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(300)
    busy.details.add().Pack(info)
    answers: list[Any] = [busy]
    server.on_reserve = lambda request: answers.pop(0) if answers else granted(request)
    client = connect_async()
    before = time.monotonic()
    await call(client)
    assert time.monotonic() - before >= 0.3


async def test_a_refused_report_is_dropped_and_said_once(
    connect_async: ConnectAsync, server: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    server.on_report = lambda what, request: status_pb2.Status(code=3, message="bad context")
    client = connect_async()
    await call(client)
    await call(client)
    assert await client.flush()
    assert len(server.items("commit")) == 2
    assert client.statistics()["refused_reports"] == 2
    assert [record.getMessage() for record in caplog.records] == [
        "paceline: a commit was not accepted: INVALID_ARGUMENT: bad context"
    ]


async def test_a_refused_identity_is_an_error_not_an_outage(connect_async: ConnectAsync, server: Fake) -> None:
    server.refuse = grpc.StatusCode.UNAUTHENTICATED
    client = connect_async()
    with pytest.raises(RequestRefused, match="UNAUTHENTICATED"):
        await client.acquire(model="m", max_wait=60)
    with pytest.raises(RequestRefused, match="UNAUTHENTICATED"):
        await client.acquire(model="m", max_wait=60)


async def test_a_server_without_sessions_gets_single_calls(connect_async: ConnectAsync, server: Fake) -> None:
    server.refuse = grpc.StatusCode.UNIMPLEMENTED
    client = connect_async()
    await call(client)
    assert await client.flush()
    assert server.unary == ["reserve", "commit"]


# -- drain ------------------------------------------------------------------------------------------------------------


async def test_a_drain_moves_new_items_and_keeps_the_old(connect_async: ConnectAsync, server: Fake) -> None:
    client = connect_async()
    await call(client)
    await client.flush()
    server.on_reserve = lambda request: None if request.route == "wait" else granted(request)
    waiting = asyncio.create_task(client.acquire(model="m", route="wait", max_wait=30))
    await asyncio.to_thread(server.wait_for, "reserve", 2)
    old = server.drain()
    await asyncio.to_thread(until, lambda: len(server.sessions) == 1 and hub(client).core.counters.sessions == 2)
    await call(client, route="new")
    assert await client.flush()
    (new,) = server.sessions
    assert new is not old
    assert not waiting.done()
    ((number, item),) = old.open.items()
    old.send(pb.ResponseItem(number=number, reserve=granted(item.reserve)))
    grant = await waiting
    grant.release()
    # With nothing left on it, the old one is closed.
    assert await asyncio.to_thread(old.ended.wait, 5)
    assert client.statistics()["drains"] == 1
    assert len([each for each in server.items("reserve") if each.route == "wait"]) == 1


async def test_a_drain_whose_server_goes_before_it_answers(connect_async: ConnectAsync, server: Fake) -> None:
    client = connect_async()
    await call(client)
    server.on_reserve = lambda request: None
    waiting = asyncio.create_task(client.acquire(model="m", max_wait=30))
    await asyncio.to_thread(server.wait_for, "reserve", 2)
    server.on_reserve = granted
    old = server.drain()
    await asyncio.to_thread(until, lambda: len(server.sessions) == 1)
    old.out.put(grpc.StatusCode.UNAVAILABLE)
    grant = await waiting
    assert server.grants[grant.reservation_id] == 1
    grant.release()


def test_what_is_granted_may_be_committed_while_the_server_drains(connect: Connect, server: Fake) -> None:
    client = connect(budget=0.1)
    grant = client.acquire(model="m")
    server.refuse = grpc.StatusCode.UNAVAILABLE
    old = server.drain(20)
    # Longer than anybody waits for a server, and than a session is kept that nobody needs.
    assert not old.ended.wait(1.0)
    grant.commit_usage(output_tokens=1)
    client.close()
    assert len(server.items("commit")) == 1


def test_a_drained_session_that_nobody_needs_is_closed(connect: Connect, server: Fake) -> None:
    client = connect()
    grant = client.acquire(model="m")
    server.refuse = grpc.StatusCode.UNAVAILABLE
    old = server.drain(20)
    grant.release()
    assert client.flush()
    assert old.ended.wait(5)


def test_a_server_that_drains_every_session_is_not_stormed(connect: Connect, server: Fake) -> None:
    client = connect()
    client.acquire(model="m").release()
    assert client.flush()
    until_then = time.monotonic() + 2.0
    while time.monotonic() < until_then:
        if server.sessions:
            server.drain(20)
        time.sleep(0.002)
    assert 3 <= hub(client).core.counters.drains <= 12


# -- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["session", "unary"])
@pytest.mark.parametrize("max_wait", [0.0, 5.0])
def test_nobody_there_is_found_out_within_the_budget(connect: Connect, transport: str, max_wait: float) -> None:
    # A port on which nobody listens.
    client = connect("127.0.0.1:9", policy="closed", budget=0.25, transport=transport)
    before = time.monotonic()
    with pytest.raises(Unavailable):
        client.acquire(model="m", max_wait=max_wait)
    assert time.monotonic() - before < 0.25 + 0.5
    client.statistics()
    times = []
    for _ in range(10):
        before = time.monotonic()
        with pytest.raises(Unavailable):
            client.acquire(model="m", max_wait=max_wait)
        times.append(time.monotonic() - before)
    # Known to be away, it costs nobody anything; without a session one call in a second probes.
    assert sorted(times)[-2] < 0.1


@pytest.mark.parametrize("transport", ["session", "unary"])
def test_one_that_does_not_answer_is_found_out(connect: Connect, server: Fake, transport: str) -> None:
    client = connect(policy="closed", budget=0.25, transport=transport)
    client.acquire(model="m").release()
    assert client.flush()
    server.on_reserve = lambda request: None if transport == "session" else status_pb2.Status(code=14)
    server.mute = True
    before = time.monotonic()
    with pytest.raises(Unavailable):
        client.acquire(model="m")
    assert 0.1 < time.monotonic() - before < 0.25 + 0.5


def test_a_silent_session_is_replaced(connect: Connect, server: Fake) -> None:
    client = connect(policy="closed", budget=0.25)
    client.acquire(model="m").release()
    assert client.flush()
    (silent,) = server.sessions
    silent.mute = True
    with pytest.raises(Unavailable):
        client.acquire(model="m")
    assert silent.ended.wait(5)
    until(lambda: len(server.sessions) == 2)
    client.acquire(model="m").release()
    # What may have been granted meanwhile was given back.
    assert client.flush()
    assert server.items("reserve")[1].reservation_id in {each.reservation_id for each in server.items("release")}


def test_a_server_that_is_slow_once_keeps_its_session(connect: Connect, server: Fake) -> None:
    client = connect(policy="closed", budget=0.25)
    client.acquire(model="m").release()

    def slowly(request: pb.ReserveRequest) -> pb.ReserveResponse:
        time.sleep(0.5)
        return granted(request)

    server.on_reserve = slowly
    with pytest.raises(Unavailable):
        client.acquire(model="m")
    server.on_reserve = granted
    assert client.flush(10)
    client.acquire(model="m").release()
    assert client.statistics()["breaks"] == 0


def test_a_break_while_waiting_has_the_budget_from_then_on(connect: Connect, server: Fake) -> None:
    client = connect(policy="closed", budget=0.25)
    client.acquire(model="m").release()
    server.on_reserve = lambda request: None
    timer = threading.Timer(0.4, server.stop)
    timer.start()
    before = time.monotonic()
    with pytest.raises(Unavailable):
        client.acquire(model="m", max_wait=60)
    assert 0.6 < time.monotonic() - before < 2.0
    timer.join()


async def test_the_server_is_asked_to_answer_within_max_wait(connect_async: ConnectAsync, server: Fake) -> None:
    server.on_reserve = lambda request: None
    client = connect_async(policy="closed", budget=0.25)
    before = time.monotonic()
    with pytest.raises(Unavailable):
        await client.acquire(model="m", max_wait=0.5)
    assert 0.7 < time.monotonic() - before < 1.5
    assert server.items("reserve")[0].max_wait.ToNanoseconds() <= 0.5e9


# -- bounds -----------------------------------------------------------------------------------------------------------


async def test_memory_is_bounded_under_many_calls(connect_async: ConnectAsync, server: Fake) -> None:
    client = connect_async()

    async def worker(count: int) -> None:
        for _ in range(count):
            await call(client, max_wait=30)

    await asyncio.gather(*(worker(5) for _ in range(200)))
    await client.flush(10)
    gc.collect()
    before = len(gc.get_objects())
    server.batches.clear()
    server.grants.clear()
    server.decided.clear()
    await asyncio.gather(*(worker(50) for _ in range(200)))
    assert await client.flush(20)
    assert len(server.grants) == 10_000
    server.batches.clear()
    server.grants.clear()
    server.decided.clear()
    state = hub(client).core
    assert state.reports == 0
    assert not state.waiting
    assert len(state._timers) < 2_000
    assert not state._report_queue
    assert not state._reserve_queue
    assert sum(len(stream.open) for stream in state.streams) == 0
    for _ in range(20):
        # The thread of the session may still have the last answers in its hands.
        gc.collect()
        if not any(type(each) is Grant for each in gc.get_objects()):
            break
        await asyncio.sleep(0.1)
    assert not [each for each in gc.get_objects() if type(each) is Grant]
    assert len(gc.get_objects()) - before < 5_000


def test_the_queue_of_reports_is_bounded(connect: Connect, server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "MAX_REPORTS", 10)
    client = connect("127.0.0.1:9", policy="open", budget=0.01)
    for _ in range(30):
        with client.reserve(model="m") as grant:
            grant.commit_usage(output_tokens=1)
    assert client.statistics()["unacknowledged_reports"] == 10
    assert client.statistics()["dropped_reports"] == 20


def test_a_closed_client_is_an_error_and_leaves_no_threads(server: Fake) -> None:
    # Those of earlier tests, which left a client on purpose.
    before = set(threading.enumerate())
    client = Client(server.address, budget=5)
    client.acquire(model="m").release()
    client.close()
    assert len(server.items("release")) == 1
    with pytest.raises(RuntimeError, match="closed"):
        client.acquire(model="m")
    until(lambda: not [each for each in set(threading.enumerate()) - before if each.name.startswith("paceline")])
    with Client(server.address, budget=5) as again:
        again.acquire(model="m").release()
    assert len(server.items("release")) == 2


def test_the_threads_of_grpc_are_known(connect: Connect, server: Fake) -> None:
    # A fork waits for them. If gRPC changes how it makes them, this says so.
    client = connect()
    client.acquire(model="m").release()
    assert len(hub(client)._grpc_threads) == 2
