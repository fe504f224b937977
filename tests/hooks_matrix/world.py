"""A coordinator and an upstream for one case, on a loop of their own, and a record of what the coordinator was asked.

Applications run in the test's thread, blocking ones too, so the servers cannot.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import pytest

from paceline.config import Config
from paceline.engine.answers import Answer
from paceline.engine.bucket import Bucket
from paceline.engine.operations import Operation
from paceline.engine.state import State
from paceline.frontend.server import Server
from paceline.ledger.errors import LedgerError
from paceline.ledger.owner import Owner
from paceline.upstream import Call, Scenario
from paceline.upstream.http import Upstream
from tests.frontend.harness import config

T = TypeVar("T")

WAIT: Final = 20.0
"""The longest that anything here is waited for, in seconds."""
QUICK: Final = Scenario(first_byte_ms=0, tokens_per_second=0, chunk_ms=10)
"""Answers come at once, so that what an application sees is the same each time."""
# Above what the upstream allows, so that knowing its limits means having learned them.
POOLS: Final[Mapping[str, Mapping[str, Any]]] = {
    "anthropic": {
        "provider": "anthropic",
        "pools": {"sonnet-5": {"requests": 6_000, "input_tokens": 3_000_000, "output_tokens": 600_000}},
    },
    "openai": {"provider": "openai", "pools": {"gpt-5": {"requests": 6_000, "tokens": 3_000_000}}},
}
TINY: Final[Mapping[str, Mapping[str, Any]]] = {
    "anthropic": {
        "provider": "anthropic",
        "pools": {"sonnet-5": {"requests": 60, "input_tokens": 5, "output_tokens": 60_000}},
    },
    "openai": {"provider": "openai", "pools": {"gpt-5": {"requests": 60, "tokens": 5}}},
}
"""No call ever fits."""


class Background:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it there, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT)
        self.loop.close()


@dataclass
class Record:
    """What a ledger was asked, in order, and what it answered."""

    entries: list[tuple[Operation, list[Answer | LedgerError]]] = field(default_factory=list)

    def of(self, kind: type[T]) -> list[tuple[T, Answer | LedgerError | None]]:
        """The operations of a kind with their answers. ``None``: not yet."""
        return [
            (operation, answers[0] if answers else None)
            for operation, answers in self.entries
            if isinstance(operation, kind)
        ]


@contextmanager
def recorded() -> Iterator[Record]:
    """Record every operation of every ledger in this process."""
    record = Record()
    submit = Owner.submit

    def submit_and_record(owner: Owner, operation: Operation, reply: Callable[[Any], object]) -> None:
        answers: list[Answer | LedgerError] = []
        record.entries.append((operation, answers))

        def reply_and_record(answer: Answer | LedgerError) -> object:
            answers.append(answer)
            return reply(answer)

        submit(owner, operation, reply_and_record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Owner, "submit", submit_and_record)
        yield record


class World:
    """One case's servers. ``server`` is there if it was asked for."""

    def __init__(self, background: Background, upstream: Upstream, server: Server | None, record: Record) -> None:
        self.upstream = upstream
        self.record = record
        self._background = background
        self._server = server

    @property
    def address(self) -> str:
        assert self._server is not None
        return self._server.address

    @property
    def calls(self) -> list[Call]:
        """What came to the upstream, by its own log."""
        return list(self.upstream.account.calls)

    @property
    def state(self) -> State:
        """The coordinator's books."""
        assert self._server is not None
        if not self._server.router.slots:
            # Nobody has asked for anything.
            return State("")
        (slot,) = self._server.router.slots.values()
        assert slot.state is not None
        return slot.state

    @property
    def stats(self) -> Any:
        """What the coordinator has counted."""
        assert self._server is not None
        (slot,) = self._server.router.slots.values()
        assert slot.engine is not None
        return slot.engine.stats

    def buckets(self) -> list[Bucket]:
        """Those of the pool."""
        return [bucket for bucket in self.state.buckets if bucket.pool and not bucket.share]

    def stop_server(self) -> None:
        """The coordinator goes away."""
        assert self._server is not None
        self._background.run(self._server.stop(0))

    def change(self, **fields: Any) -> None:
        """Change the scenario of the upstream."""

        async def change() -> None:
            self.upstream.change(**fields)

        self._background.run(change())


@contextmanager
def world(
    background: Background, scenario: Mapping[str, Any], pools: Mapping[str, Any] | None, provider: str
) -> Iterator[World]:
    """Fresh servers. Without ``pools`` there is no coordinator."""
    server: Server | None = None
    with recorded() as record:
        if pools is not None:
            settings: Config = config(accounts={"default": pools[provider]})
            server = Server(settings, environ={})
            background.run(server.start())
        upstream = Upstream(scenario=QUICK)
        background.run(upstream.listen("127.0.0.1", 0))
        found = World(background, upstream, server, record)
        try:
            if scenario:
                found.change(**scenario)
            yield found
        finally:
            background.run(upstream.close())
            if server is not None and not server.draining:
                background.run(server.stop(0))


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that nobody announces."""
    end = time.monotonic() + WAIT / 2
    while not condition():
        assert time.monotonic() < end, f"not within {WAIT / 2} s: {what}"
        time.sleep(0.005)
