"""Fixtures of the tests of the Python client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from paceline_client import AsyncClient, Client
from paceline_client._hub import leave
from tests.client.fake import Fake

BUDGET = 5.0
"""For tests that are not about it: a busy machine is not an unreachable coordinator."""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "TOKEN", "DISABLED", "MODE", "POLICY", "CA_FILE", "CERT_FILE", "KEY_FILE"):
        monkeypatch.delenv(f"PACELINE_{name}", raising=False)


@pytest.fixture
def server() -> Iterator[Fake]:
    """A scripted server."""
    fake = Fake().start()
    yield fake
    fake.stop()


@pytest.fixture
def connect(server: Fake) -> Iterator[Callable[..., Client]]:
    """Makes clients of the scripted server."""
    clients: list[Client] = []

    def make(address: str | None = None, **options: Any) -> Client:
        client = Client(address or server.address, **{"budget": BUDGET, **options})
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close(0.2)


@pytest.fixture
def connect_async(server: Fake) -> Iterator[Callable[..., AsyncClient]]:
    """Makes clients of the scripted server, for asyncio."""
    clients: list[AsyncClient] = []

    def make(address: str | None = None, **options: Any) -> AsyncClient:
        client = AsyncClient(address or server.address, **{"budget": BUDGET, **options})
        clients.append(client)
        return client

    yield make
    for client in clients:
        if not client._closed and client._desk is not None:
            client._closed = True
            leave(client._desk.hub, 0.2)
