"""The matrix sees the mistakes that a hook could make."""

from __future__ import annotations

from typing import Any

import pytest

from paceline_client._grant import Grant
from paceline_client._outcome import CallOutcome
from paceline_client._send import Account
from paceline_client.hooks._call import Attempt
from paceline_client.hooks._scan import Scanner
from paceline_client.hooks._session import Session
from tests.hooks_matrix.application import MODES, Mode
from tests.hooks_matrix.judge import judge
from tests.hooks_matrix.sdk_anthropic import AnthropicSdk
from tests.hooks_matrix.situations import SITUATIONS, Form
from tests.hooks_matrix.world import Background

pytestmark = pytest.mark.parametrize("mode", MODES)


def caught(background: Background, mode: Mode, name: str, form: Form) -> None:
    """The cell is red."""
    (row,) = (row for row in SITUATIONS if row.name == name)
    with pytest.raises(AssertionError):
        judge(background, AnthropicSdk(), mode, form, row)


def test_committed_twice(background: Background, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    once: Any = Account.commit

    def twice(self: Account, *arguments: Any) -> None:
        once(self, *arguments)
        once(self, *arguments)

    monkeypatch.setattr(Account, "commit", twice)
    caught(background, mode, "success", "json")


def test_usage_of_the_beginning_is_taken_for_final(
    background: Background, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Attempt.feed

    def hasty(self: Attempt, data: bytes) -> None:
        reader = self._scanner
        feed(self, data)
        if reader is not None and reader.begun:
            self._succeeded(200, None, reader.usage, reader.model)

    monkeypatch.setattr(Attempt, "feed", hasty)
    # In one piece with the end it would be no mistake.
    caught(background, mode, "cut off by the caller", "stream")


def test_retry_reuses_the_reservation(background: Background, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Attempt] = []
    begin: Any = Session.begin
    begin_async: Any = Session.begin_async

    def reuse(self: Session, *arguments: Any) -> Attempt:
        kept[:] = kept or [begin(self, *arguments)]
        return Attempt(kept[0].grant, kept[0]._size, self.seen)

    async def reuse_async(self: Session, *arguments: Any) -> Attempt:
        kept[:] = kept or [await begin_async(self, *arguments)]
        return Attempt(kept[0].grant, kept[0]._size, self.seen)

    monkeypatch.setattr(Session, "begin", reuse)
    monkeypatch.setattr(Session, "begin_async", reuse_async)
    caught(background, mode, "429 then success", "json")


def test_cut_off_is_released(background: Background, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: Attempt, reader: Scanner | None) -> None:
        self._settle(CallOutcome("not_sent"))

    monkeypatch.setattr(Attempt, "_aborted", forget)
    caught(background, mode, "cut off by the caller", "stream")


def test_headers_are_kept(background: Background, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: Grant, *arguments: Any, **named: Any) -> None:
        pass

    monkeypatch.setattr(Grant, "report", keep)
    caught(background, mode, "success", "stream")
