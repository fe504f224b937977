"""Several servers: which one a client goes to, and when to another one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from paceline_client import Client
from paceline_client import _hub as hub_module
from tests.client.fake import Fake, granted, until

Connect = Callable[..., Client]


@pytest.fixture
def other() -> Iterator[Fake]:
    fake = Fake().start()
    yield fake
    fake.stop()


def hub(client: Client) -> Any:
    assert client._desk is not None
    return client._desk.hub


def starting_at(client: Client, place: int) -> Client:
    hub(client)._place = place
    return client


def call(client: Client) -> None:
    with client.reserve(model="m") as grant:
        grant.commit_usage(output_tokens=1)


@pytest.mark.parametrize(
    ("text", "addresses", "tls"),
    [
        ("a:1", ("a:1",), False),
        ("a:1,b:2", ("a:1", "b:2"), False),
        (" a:1 , b:2,a:1", ("a:1", "b:2"), False),
        ("https://a:1/,grpcs://b:2", ("a:1", "b:2"), True),
        ("unix:/run/a,http://b", ("unix:/run/a", "b"), False),
    ],
)
def test_addresses(text: str, addresses: tuple[str, ...], tls: bool) -> None:
    with closing(Client(text)) as client:
        endpoint = client._options.endpoint
        assert (endpoint.addresses, endpoint.tls) == (addresses, tls)


@pytest.mark.parametrize("text", ["a:1,", ",", "https://a:1,b:2", "http://"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        Client(text)


def test_the_environment_names_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_ADDRESS", "a:1,b:2")
    with closing(Client()) as client:
        assert client._options.endpoint.addresses == ("a:1", "b:2")


def test_the_processes_of_a_fleet_begin_at_different_ones() -> None:
    places = set()
    for _ in range(64):
        with closing(Client("a:1,b:2,c:3")) as client:
            places.add(hub(client)._place)
    assert places == {0, 1, 2}


@pytest.mark.parametrize("transport", ["session", "unary"])
def test_one_that_is_gone_is_passed_over_within_the_budget(connect: Connect, server: Fake, transport: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    client = connect(f"{nobody},{nobody.replace('127.0.0.1', '127.0.0.2')},{server.address}", transport=transport)
    starting_at(client, 0)
    for _ in range(3):
        call(client)
    assert client.flush(5)
    assert len(server.decided) == 3


@pytest.mark.parametrize("transport", ["session", "unary"])
def test_when_its_server_dies_it_asks_the_other_one_again(
    connect: Connect, server: Fake, other: Fake, transport: str
) -> None:
    client = starting_at(connect(f"{server.address},{other.address}", transport=transport), 0)
    call(client)
    assert client.flush(5)
    server.on_reserve = lambda request: None

    def die() -> None:
        until(lambda: len(server.items("reserve") if transport == "session" else server.unary) >= 2, 5, lambda: "asked")
        server.stop()

    killer = threading.Thread(target=die)
    killer.start()
    call(client)
    killer.join()
    assert client.flush(5)
    asked = {request.reservation_id for request in server.items("reserve")}
    assert set(other.decided) <= asked or transport == "unary"
    assert len(other.decided) == 1


def test_a_drain_moves_to_the_other_one(connect: Connect, server: Fake, other: Fake) -> None:
    client = starting_at(connect(f"{server.address},{other.address}"), 0)
    call(client)
    held = client.acquire(model="m")
    server.drain()
    until(lambda: len(other.sessions) == 1, 5, lambda: "no session at the other one")
    call(client)
    assert len(other.decided) == 1
    held.commit_usage(output_tokens=1)
    assert client.flush(5)
    assert len(server.items("commit")) + len(other.items("commit")) == 3
    other.drain()
    server_sessions = len(server.sessions)
    until(lambda: len(server.sessions) > server_sessions, 5, lambda: "it does not come back in its turn")


def test_one_that_accepts_and_says_nothing_is_left(connect: Connect, server: Fake) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = connect(f"127.0.0.1:{mute.getsockname()[1]},{server.address}")
        starting_at(client, 0)
        call(client)
    assert len(server.decided) == 1
    assert hub_module.CONNECT_ONE_OF_SEVERAL < 2


def test_without_another_one_it_comes_back_to_the_same(connect: Connect, server: Fake) -> None:
    server.on_reserve = granted
    client = connect(server.address)
    call(client)
    server.break_sessions()
    call(client)
    assert len(server.decided) == 2
