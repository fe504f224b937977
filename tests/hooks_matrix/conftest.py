"""Fixtures of the matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from anthropic._base_client import BaseClient as AnthropicBase
from openai._base_client import BaseClient as OpenAIBase

from paceline_client.hooks._trouble import troubles

pytest.register_assert_rewrite("tests.hooks_matrix.checks", "tests.hooks_matrix.judge", "tests.hooks_matrix.world")

from tests.hooks_matrix.world import Background  # noqa: E402 -- its assertions are rewritten

HURRY = 20
"""How much shorter the SDKs sleep before they retry."""


@pytest.fixture(scope="package")
def background() -> Iterator[Background]:
    """Where the servers run."""
    found = Background()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "TOKEN", "DISABLED", "MODE", "POLICY", "CA_FILE", "CERT_FILE", "KEY_FILE"):
        monkeypatch.delenv(f"PACELINE_{name}", raising=False)


@pytest.fixture(autouse=True)
def _no_trouble() -> Iterator[None]:
    """Nothing goes wrong inside the hooks that they have to hide."""
    troubles.clear()
    yield
    assert not troubles


@pytest.fixture(autouse=True)
def _short_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDKs decide whether to retry; how long they sleep before is of no interest here."""
    for base in (AnthropicBase, OpenAIBase):
        slow: Any = base._calculate_retry_timeout

        def shorter(*given: Any, _slow: Any = slow, **more: Any) -> float:
            return float(_slow(*given, **more)) / HURRY

        monkeypatch.setattr(base, "_calculate_retry_timeout", shorter)
