"""An attempt settles once whatever happens in whatever order, and what goes wrong in a hook stays there."""

from __future__ import annotations

import logging
import random
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import Anthropic
from hypothesis import given
from hypothesis import strategies as st

from paceline_client import Client, Grant, Target
from paceline_client._outcome import CallOutcome
from paceline_client.hooks import _call, _session
from paceline_client.hooks import anthropic as hook
from paceline_client.hooks._call import Attempt
from paceline_client.hooks._size import Seen, Size
from paceline_client.hooks._trouble import troubles
from paceline_client.stubs import v1 as pb
from tests.client.fake import Fake
from tests.hooks.stub import DELTA, END, MODEL, OVERLOADED, START, Stub, streaming
from tests.hooks.test_anthropic import ASK

STREAM = httpx2.Headers({"content-type": "text/event-stream"})


class Recorded(Grant):
    """A grant that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(None, target=Target(MODEL))
        self.outcomes: list[CallOutcome] = []

    def _settle(self, outcome: CallOutcome) -> None:
        self.outcomes.append(outcome)


STEPS = {
    "start": lambda attempt: attempt.feed(START),
    "text": lambda attempt: attempt.feed(DELTA),
    "half": lambda attempt: attempt.feed(DELTA[: random.randrange(len(DELTA))]),
    "end": lambda attempt: attempt.feed(END),
    "error": lambda attempt: attempt.feed(OVERLOADED),
    "exhausted": lambda attempt: attempt.exhausted(),
    "dropped": lambda attempt: attempt.dropped(),
    "failed": lambda attempt: attempt.failed(RuntimeError()),
    "not sent": lambda attempt: attempt.failed(RuntimeError(), sent=False),
    "refused": lambda attempt: attempt.answered(429, STREAM, b"{}"),
    "answered": lambda attempt: attempt.answered(200, STREAM, b'{"usage": {"input_tokens": 1}}'),
    "odd": lambda attempt: attempt.answered(200, STREAM, b"<html>"),
    "replaced": lambda attempt: attempt.replaced(object()),
}
ENDS = {"end", "exhausted", "dropped", "failed", "not sent", "refused", "answered", "odd", "replaced"}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=12))
def test_it_settles_once_and_by_what_came_first(steps: list[str]) -> None:
    grant = Recorded()
    attempt = Attempt(grant, Size(1), Seen())
    attempt.arrived(200, STREAM)
    for step in steps:
        before = list(grant.outcomes)
        STEPS[step](attempt)
        assert grant.outcomes[: len(before)] == before
    assert len(grant.outcomes) <= 1
    if ENDS - {"end"} & set(steps):
        assert len(grant.outcomes) == 1
    assert attempt.settled == bool(grant.outcomes)
    if "error" not in steps and "half" not in steps and grant.outcomes and "end" in steps[:1]:
        assert grant.outcomes[0].disposition == "succeeded"
    # A half line before another one may make a line that cannot be read: said, and no more.
    troubles.clear()


class Broken(Exception):
    pass


def broken(*_: Any, **__: Any) -> Any:
    raise Broken


@pytest.mark.parametrize(
    ("where", "name", "kind", "reserved"),
    [
        (hook, "of_messages", "an estimate", 0),
        (_session, "Attempt", "a reservation", 1),
        (_call, "scanner", "the headers of a response", 1),
        (_call, "read_body", "the body of a response", 1),
    ],
)
def test_a_bug_in_the_hook_does_not_reach_the_application(
    where: Any,
    name: str,
    kind: str,
    reserved: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    coordinator: Fake,
    paceline: Client,
    upstream: Stub,
) -> None:
    monkeypatch.setattr(where, name, broken)
    middleware = hook.PacelineMiddleware(paceline)
    with (
        caplog.at_level(logging.WARNING, "paceline_client"),
        Anthropic(api_key="k", base_url=upstream.url, middleware=[middleware]) as client,
    ):
        for _ in range(2):
            assert client.messages.create(**ASK).usage.output_tokens == 5
            assert len(list(client.messages.create(**ASK, stream=True))) == 9
    assert troubles[kind] >= 2
    assert [record.getMessage() for record in caplog.records].count(
        f"paceline: a hook failed at {kind!r}; the call goes on without it. Said once."
    ) == 1
    assert bool(coordinator.items("reserve")) == bool(reserved)
    troubles.clear()


def test_a_stream_that_cannot_be_read_here_goes_on(coordinator: Fake, paceline: Client, upstream: Stub) -> None:
    bad = START + b"event: message_delta\ndata: {not json\n\n"
    upstream.scripts.append(streaming(bad))
    with (
        Anthropic(api_key="k", base_url=upstream.url, middleware=[hook.PacelineMiddleware(paceline)]) as client,
        pytest.raises(ValueError, match="Expecting property name"),
    ):
        list(client.messages.create(**ASK, stream=True))
    (commit,) = coordinator.wait_for("commit")
    assert commit.outcome.disposition == pb.DISPOSITION_ABORTED
    assert troubles["the body of a response"] == 1
    troubles.clear()


def test_an_answer_of_another_middleware_is_settled_as_it_is(
    coordinator: Fake, paceline: Client, upstream: Stub
) -> None:
    class Cached(anthropic.Middleware):
        def handle(self, request: Any, call_next: Any) -> Any:
            return call_next(request).parse()

    chain = [hook.PacelineMiddleware(paceline), Cached()]
    with Anthropic(api_key="k", base_url=upstream.url, middleware=chain) as client:
        assert client.messages.create(**ASK).usage.output_tokens == 5
    (commit,) = coordinator.wait_for("commit")
    assert (commit.outcome.usage.output_tokens, commit.outcome.usage_kind) == (5, pb.USAGE_KIND_FINAL)
