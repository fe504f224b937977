"""A call with the caller's own continuation: which step is taken, what it asks for, and the deadline of the whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_client import (
    Answer,
    AsyncClient,
    Candidate,
    Client,
    Denied,
    Grant,
    Local,
    RequestRefused,
    Step,
    Target,
    Turn,
    Unavailable,
    UnmappedAccount,
    estimate_tokens,
)
from paceline_client._config import options
from paceline_client._plan import Plan, plan
from paceline_client._steps import Walk
from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import status_pb2
from tests.client.fake import Fake, denied, granted

RESPONSE = {"usage": {"input_tokens": 3, "output_tokens": 5}}
LONG, SHORT = "word " * 4_000, "word " * 40


def never(turn: Turn) -> Any:
    """For calls that must not be made."""
    raise AssertionError(turn)


async def never_awaited(turn: Turn) -> Any:
    """The same."""
    raise AssertionError(turn)


@dataclass
class Both:
    """A client of either kind, called alike."""

    client: Client | AsyncClient

    def call(self, send: Callable[[Turn], Any], **ask: Any) -> Answer[Any]:
        client = self.client
        if isinstance(client, Client):
            return client.call(send, **ask)

        async def sent(turn: Turn) -> Any:
            await asyncio.sleep(0)
            return send(turn)

        async def run() -> Answer[Any]:
            assert isinstance(client, AsyncClient)
            answer = await client.call(sent, **ask)
            assert await client.flush(10)
            return answer

        return asyncio.run(run())

    def flush(self) -> None:
        if isinstance(self.client, Client):
            assert self.client.flush(10)
        else:
            assert asyncio.run(self.client.flush(10))


@pytest.fixture(params=["sync", "async"])
def both(
    request: pytest.FixtureRequest, connect: Callable[..., Client], connect_async: Callable[..., AsyncClient]
) -> Both:
    return Both(connect() if request.param == "sync" else connect_async())


def by_model(reasons: Mapping[str, pb.DenialReason.ValueType]) -> Callable[[pb.ReserveRequest], pb.ReserveResponse]:
    """Denies the models (or ladders) named, and grants the others."""

    def answer(request: pb.ReserveRequest) -> pb.ReserveResponse:
        reason = reasons.get(request.ladder or request.candidates[0].target.model)
        return granted(request) if reason is None else denied(reason)

    return answer


# -- which step is taken ------------------------------------------------------------------------------------------


def test_the_call_as_asked_for_is_step_0(both: Both, server: Fake) -> None:
    answer = both.call(lambda turn: RESPONSE, model="m", max_output_tokens=7, steps=[Local("cached")])
    both.flush()
    assert (answer.value, answer.step, answer.passed) == (RESPONSE, 0, ())
    assert answer.grant is not None
    assert answer.grant.target.model == "m"
    (commit,) = server.items("commit")
    assert commit.outcome.usage == pb.Usage(input_tokens=3, output_tokens=5)


@pytest.mark.parametrize(
    "reason",
    [
        pb.DENIAL_REASON_TOO_LARGE,
        pb.DENIAL_REASON_LIMIT,
        pb.DENIAL_REASON_TIMEOUT,
        pb.DENIAL_REASON_BLOCKED,
        pb.DENIAL_REASON_QUEUE_FULL,
        pb.DENIAL_REASON_SPEND_CAP,
        pb.DENIAL_REASON_POOL_CLOSED,
        pb.DENIAL_REASON_POOL_PAUSED,
    ],
)
def test_a_denial_leads_to_the_next_step(both: Both, server: Fake, reason: pb.DenialReason.ValueType) -> None:
    server.on_reserve = by_model({"chat": reason, "middle": reason})
    turns = []

    def send(turn: Turn) -> object:
        turns.append(turn)
        return RESPONSE

    answer = both.call(
        send,
        ladder="chat",
        prompt=LONG,
        max_output_tokens=900,
        tenant="t",
        max_wait=5,
        steps=[Step(model="middle"), Step(prompt=SHORT, model="small", max_output_tokens=90), Local("cached")],
    )
    both.flush()
    assert (answer.step, [each.reason for each in answer.passed if isinstance(each, Denied)]) == (
        2,
        [pb.DenialReason.Name(reason).removeprefix("DENIAL_REASON_").lower()] * 2,
    )
    (turn,) = turns
    assert (turn.model, turn.prompt, turn.max_output_tokens, turn.step) == ("small", SHORT, 90, 2)
    first, second, third = server.items("reserve")
    assert {each.tenant for each in (first, second, third)} == {"t"}
    assert first.ladder_estimate.input_tokens == estimate_tokens(LONG)
    assert second.candidates[0].estimate.input_tokens == estimate_tokens(LONG, "middle")
    assert second.candidates[0].estimate.max_output_tokens == 900
    assert third.candidates[0].estimate == pb.Estimate(
        input_tokens=estimate_tokens(SHORT, "small"), max_output_tokens=90
    )
    assert len(server.items("commit")) == 1


def test_a_local_answer_makes_no_call(both: Both, server: Fake) -> None:
    server.on_reserve = lambda request: denied()
    for cached in ("cached", lambda: "cached"):
        answer = both.call(never, model="m", steps=[Step(max_output_tokens=10), Local(cached)])
        assert (answer.value, answer.step, answer.grant, len(answer.passed)) == ("cached", 2, None, 2)


def test_a_local_answer_may_be_awaited(connect_async: Callable[..., AsyncClient], server: Fake) -> None:
    server.on_reserve = lambda request: denied()

    async def look() -> str:
        return "cached"

    async def run() -> None:
        assert (await connect_async().call(never, model="m", steps=[Local(look)])).value == "cached"

    asyncio.run(run())


def test_without_a_step_that_is_left_the_last_denial_is_raised(both: Both, server: Fake) -> None:
    server.on_reserve = by_model({"m": pb.DENIAL_REASON_TOO_LARGE, "n": pb.DENIAL_REASON_LIMIT})
    with pytest.raises(Denied) as caught:
        both.call(never, model="m", steps=[Step(model="n")])
    assert caught.value.reason == "limit"
    assert isinstance(caught.value.__cause__, Denied)
    assert caught.value.__cause__.reason == "too_large"


def test_what_was_released_needs_no_other_step(both: Both, server: Fake) -> None:
    server.on_reserve = lambda request: denied(pb.DENIAL_REASON_RELEASED)
    with pytest.raises(Denied, match="released"):
        both.call(never, model="m", steps=[Local("cached")])
    assert len(server.items("reserve")) == 1


def test_in_observe_mode_the_call_is_made_as_asked_for(connect: Callable[..., Client], server: Fake) -> None:
    server.on_reserve = lambda request: denied()
    client = connect(mode="observe")
    answer = client.call(lambda turn: RESPONSE, model="m", accounts={"main": 1}, steps=[Local("cached")])
    assert (answer.step, answer.value) == (0, RESPONSE)
    assert client.flush(10)


def test_the_callers_own_mistake_is_no_denial(both: Both, server: Fake) -> None:
    server.on_reserve = lambda request: status_pb2.Status(code=3, message="tenant: is too long")
    with pytest.raises(RequestRefused):
        both.call(never, model="m", steps=[Local("cached")])
    assert len(server.items("reserve")) == 1


def test_an_error_of_the_call_itself_is_no_denial(both: Both, server: Fake) -> None:
    def send(turn: Turn) -> None:
        # Such as a hook raises for a call inside this one.
        raise Denied("limit")

    with pytest.raises(Denied):
        both.call(send, model="m", steps=[Local("cached")])
    both.flush()
    assert len(server.items("reserve")) == len(server.items("commit")) == 1


def test_the_callers_own_commit_stands(both: Both, server: Fake) -> None:
    both.call(lambda turn: turn.grant.commit_usage(output_tokens=9), model="m")
    both.flush()
    (commit,) = server.items("commit")
    assert commit.outcome.usage == pb.Usage(output_tokens=9)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_without_a_coordinator_the_local_answer_is_left(kind: type[Client] | type[AsyncClient]) -> None:
    client = kind("127.0.0.1:1", policy="closed", budget=0.1)
    answer = Both(client).call if isinstance(client, Client) else None
    if answer is not None:
        found = answer(never, model="m", max_wait=0, steps=[Step(model="n"), Local("cached")])
    else:

        async def run() -> Answer[str]:
            assert isinstance(client, AsyncClient)
            return await client.call(never, model="m", max_wait=0, steps=[Step(model="n"), Local("cached")])

        found = asyncio.run(run())
    assert found.value == "cached"
    assert [type(each) for each in found.passed] == [Unavailable] * 2


def test_disabled_the_call_is_made_as_asked_for() -> None:
    client = Client(disabled=True)
    answer = client.call(
        lambda turn: (turn.model, turn.client, turn.prompt),
        model="m",
        prompt=LONG,
        accounts={"main": 1, "spare": 2},
        steps=[Local("cached")],
    )
    assert (answer.value, answer.step) == (("m", 1, LONG), 0)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Local("a"), Step(model="n")], "never denied"),
        ([Step(after=3)], "same as the call"),
        ([Step(model="n", ladder="l")], "at most one"),
        ([Step(model="n", after=-1)], "after"),
        ([Step(model="n")] * 33, "at most 32"),
        (["cached"], "neither"),
    ],
)
def test_steps_that_make_no_sense(both: Both, server: Fake, steps: Sequence[Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        both.call(never, model="m", steps=steps)
    with pytest.raises(ValueError, match="raise_on_denial"):
        both.call(never, model="m", raise_on_denial=False)
    assert not server.items("reserve")


def test_prompts_and_answers_are_not_shown() -> None:
    turn = Turn(Grant(None, target=Target("m")), 0, "secret", "secret")
    assert "secret" not in f"{Step(prompt='secret')} {Local('secret')} {turn} {Answer('secret', 0, None)}"


# -- what a step asks for -----------------------------------------------------------------------------------------


def walk(
    steps: Sequence[Step | Local], prompt: object = None, clock: Callable[[], float] = lambda: 0.0, **ask: Any
) -> Walk:
    nothing: dict[str, Any] = dict.fromkeys(
        ("address", "token", "policy", "disabled", "mode", "priority", "ca_file", "cert_file", "key_file")
    )
    given = options(**nothing, transport="session", budget=1, local_scale=1, tenant="", workspace="", route="")
    return Walk(plan(ask, given), prompt, steps, None, clock)  # type: ignore[arg-type]


def second(step: Step, prompt: object = None, **ask: Any) -> Plan:
    found = walk([step], prompt, **ask)
    assert found.asked() is not None
    assert found.turn(Denied("limit")) is None
    asked = found.asked()
    assert asked is not None
    return asked


def test_a_prompt_of_its_own_is_counted_anew() -> None:
    asked = second(Step(prompt=SHORT), model="m", input_tokens=9_000, cached_input_tokens=5_000, output_tokens=3)
    assert asked.candidates == (Candidate("m", input_tokens=estimate_tokens(SHORT, "m"), output_tokens=3),)
    asked = second(Step(prompt=SHORT, input_tokens=7, cached_input_tokens=2), model="m", input_tokens=9_000)
    assert asked.candidates == (Candidate("m", input_tokens=7, cached_input_tokens=2),)


def test_other_candidates() -> None:
    own = [Candidate("a", account="x", input_tokens=5), Candidate("b")]
    asked = second(Step(candidates=own, max_output_tokens=4), LONG, model="m", input_tokens=1)
    size = estimate_tokens(LONG, "b")
    assert asked.candidates == (
        Candidate("a", account="x", input_tokens=5, max_output_tokens=4),
        Candidate("b", input_tokens=size, max_output_tokens=4),
    )
    asked = second(Step(ladder="cheap"), model="m", account="x", input_tokens=5)
    assert (asked.ladder, asked.candidates) == ("cheap", (Candidate("", input_tokens=5),))
    asked = second(Step(model="n"), ladder="chat", input_tokens=5)
    assert (asked.ladder, asked.candidates) == ("", (Candidate("n", input_tokens=5),))


# -- deadlines ----------------------------------------------------------------------------------------------------


@given(
    max_wait=st.floats(0, 100),
    afters=st.lists(st.none() | st.floats(0, 100), max_size=6),
    spent=st.lists(st.floats(0, 1), min_size=7, max_size=7),
    grants_at=st.integers(0, 7),
)
@settings(max_examples=200, deadline=None)
def test_one_deadline_for_all_steps(
    max_wait: float, afters: list[float | None], spent: list[float], grants_at: int
) -> None:
    """Whatever part of its wait each takes: together no longer than ``max_wait``, each no longer than it is worth."""
    now = 0.0
    steps = [Step(model=f"m{number}", after=after) for number, after in enumerate(afters)]
    found = walk(steps, clock=lambda: now, model="m", max_wait=max_wait)
    for number in range(len(steps) + 1):
        asked = found.asked()
        assert asked is not None
        worth = afters[number] if number < len(afters) else None
        assert asked.max_wait == max(0.0, min(max_wait - now, max_wait if worth is None else worth))
        now += asked.max_wait * spent[number]
        if number == grants_at:
            turn = found.turn([Grant(None, target=Target("m"))])
            assert turn is not None
            assert turn.step == number == len(found.passed)
            break
        if number == len(steps):
            with pytest.raises(Denied):
                found.turn(Denied("timeout"))
        else:
            assert found.turn(Denied("timeout")) is None
    assert now <= max_wait * (1 + 1e-9)


def test_the_wait_of_a_step_ends_when_it_is_not_worth_more(both: Both, server: Fake) -> None:
    def answer(request: pb.ReserveRequest) -> pb.ReserveResponse | None:
        waits[request.candidates[0].target.model] = request.max_wait.ToNanoseconds() / 1e9
        if request.candidates[0].target.model == "m":
            time.sleep(0.2)
            return denied(pb.DENIAL_REASON_TIMEOUT)
        return granted(request)

    waits: dict[str, float] = {}
    server.on_reserve = answer
    taken = both.call(lambda turn: RESPONSE, model="m", max_wait=20, steps=[Step(model="n", after=0.2), Local("x")])
    assert taken.step == 1
    assert waits["m"] <= 0.2
    assert 15 < waits["n"] <= 19.8


# -- accounts -----------------------------------------------------------------------------------------------------


def on_account(name: str) -> Callable[[pb.ReserveRequest], pb.ReserveResponse]:
    def answer(request: pb.ReserveRequest) -> pb.ReserveResponse:
        response = granted(request)
        response.grant.target.account = name
        return response

    return answer


def test_the_client_of_the_granted_account(both: Both, server: Fake) -> None:
    server.on_reserve = on_account("spare")
    clients = {"main": "client a", "spare": "client b"}
    answer = both.call(lambda turn: turn.client, model="m", accounts=clients)
    assert answer.value == "client b"
    both.flush()
    sent = b"".join(item.SerializeToString() for batch in server.batches for item in batch)
    assert b"client" not in sent


def test_an_account_without_an_entry_is_an_error_and_released(both: Both, server: Fake) -> None:
    server.on_reserve = on_account("third")
    with pytest.raises(UnmappedAccount, match=r"'third' \(target.account\).*`accounts`.*main, spare") as caught:
        both.call(never, model="m", accounts={"main": "secret", "spare": "secret"}, steps=[Step(model="n"), Local("x")])
    assert (caught.value.account, caught.value.field) == ("third", "accounts")
    assert "secret" not in f"{caught.value!r} {caught.value}"
    both.flush()
    assert len(server.items("reserve")) == len(server.items("release")) == 1
    assert not server.items("commit")


def test_accounts_of_a_block(connect: Callable[..., Client], server: Fake) -> None:
    client = connect()
    server.on_reserve = on_account("spare")
    with client.reserve(model="m") as grant:
        assert grant.choose({"main": 1, "spare": 2}) == 2
        grant.commit_usage(output_tokens=1)
    with pytest.raises(UnmappedAccount), client.reserve(model="m") as grant:
        grant.choose({"main": 1})
    assert client.flush(10)
    assert (len(server.items("commit")), len(server.items("release"))) == (1, 1)


# -- what a grant says of the limits ------------------------------------------------------------------------------


def test_the_limits_of_a_grant(connect: Callable[..., Client], server: Fake) -> None:
    def answer(request: pb.ReserveRequest) -> pb.ReserveResponse:
        response = granted(request, waited=1.5)
        response.binding_dimension.dimension = pb.DIMENSION_REQUESTS
        response.dimensions.add(
            pool="p", dimension=pb.DIMENSION_REQUESTS, window=pb.WINDOW_MINUTE, limit=50, burst=40, level=0, held=3
        )
        response.dimensions.add(pool="p", share="s", dimension=pb.DIMENSION_TOKENS)
        return response

    server.on_reserve = answer
    with connect().reserve(model="m") as grant:
        grant.commit_usage(output_tokens=1)
    assert grant.binding == "requests"
    one, other = grant.limits
    assert (one.dimension, one.window, one.limit, one.burst, one.level, one.held) == (
        "requests",
        "minute",
        50,
        40,
        0,
        3,
    )
    assert (other.share, other.limit, other.burst, other.level) == ("s", None, None, None)
    server.on_reserve = granted
    assert connect().acquire(model="m").binding == ""
    assert (Client(disabled=True).acquire(model="m").binding, Client(disabled=True).acquire(model="m").limits) == (
        "",
        (),
    )
