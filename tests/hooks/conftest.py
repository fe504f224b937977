"""Fixtures of the tests of the hooks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paceline_client import Client
from paceline_client._hub import leave
from paceline_client.hooks._trouble import troubles
from tests.client.fake import Fake
from tests.hooks.stub import Stub

BUDGET = 5.0
"""A busy machine is not an unreachable coordinator."""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "TOKEN", "DISABLED", "POLICY", "CA_FILE", "CERT_FILE", "KEY_FILE"):
        monkeypatch.delenv(f"PACELINE_{name}", raising=False)


@pytest.fixture(autouse=True)
def _no_trouble() -> Iterator[None]:
    """Nothing goes wrong inside the hooks, unless the test says so and clears it."""
    troubles.clear()
    yield
    assert not troubles


@pytest.fixture
def coordinator() -> Iterator[Fake]:
    """A scripted coordinator, which records what it is told."""
    fake = Fake().start()
    yield fake
    fake.stop()


@pytest.fixture
def paceline(coordinator: Fake) -> Iterator[Client]:
    """A client of it."""
    client = Client(coordinator.address, budget=BUDGET)
    yield client
    if client._desk is not None:
        client._closed = True
        leave(client._desk.hub, 0.2)


@pytest.fixture
def upstream() -> Iterator[Stub]:
    """A scripted upstream."""
    stub = Stub()
    yield stub
    stub.stop()
