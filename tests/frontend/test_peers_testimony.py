"""What a deposed owner has to tell the next one is told, however long nobody decides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from paceline.engine.answers import Answer, Committed, Invalid
from paceline.engine.operations import Commit, Disposition, Operation, Outcome
from paceline.frontend import membership
from paceline.frontend.errors import unavailable
from paceline.frontend.membership import Member
from paceline.ledger.clock import SystemClock
from paceline.ledger.errors import LedgerError, LedgerFault, LedgerUnavailable

OUTCOME = Outcome(Disposition.NOT_SENT)


class Slot:
    """Answers each key as the script says, and settles it in the end."""

    account = "default"

    def __init__(self, **script: list[Answer | LedgerError]) -> None:
        self.script = script
        self.asked: list[str] = []

    def submit(self, operation: Operation, reply: Callable[[Answer | LedgerError], object]) -> None:
        assert isinstance(operation, Commit)
        self.asked.append(operation.key)
        answers = self.script.get(operation.key)
        reply(answers.pop(0) if answers else Committed())


class Router:
    def __init__(self, slot: Slot, failures: int = 0) -> None:
        self._slot = slot
        self._failures = failures

    def slot(self, _: str) -> Slot:
        self._failures -= 1
        if self._failures >= 0:
            raise unavailable("too many accounts")
        return self._slot


def member(router: Router) -> Any:
    found: Any = Member.__new__(Member)
    found.router = router
    found._clock = SystemClock()
    found._telling = set()
    return found


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_TELL_PAUSE_US", 1_000)


async def test_what_nobody_decides_is_told_again_and_nothing_else() -> None:
    away = LedgerUnavailable("nobody decides")
    slot = Slot(b=[away, away], c=[Invalid("context", "is too old")], d=[LedgerFault("poison")])
    found = member(Router(slot, failures=1))
    found._testify("default", [Commit(key, OUTCOME) for key in "abcd"])
    await asyncio.wait(found._telling, timeout=2)
    assert slot.asked == ["a", "b", "c", "d", "b", "b"]
    assert not found._telling


async def test_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_TELL_US", 20_000)
    slot = Slot(a=[LedgerUnavailable("nobody decides")] * 10_000)
    found = member(Router(slot))
    found._testify("default", [Commit("a", OUTCOME)])
    await asyncio.wait(found._telling, timeout=2)
    assert not found._telling
    assert len(slot.asked) < 100
