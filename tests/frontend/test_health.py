"""Two accounts through the front end, of which the better one gets into trouble: the calls go to the other, and return.

The ledgers' time is turned by the test: a step is 40 ms, a call takes 120.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

import pytest
import pytest_asyncio

from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import MODEL, Caller, calling, new_id, running, succeeded
from tests.frontend.turned_clock import TurnedClock

STEP_US = 40_000
FLIGHT = 3
"""Steps that a call takes."""
SECOND = 25
"""Steps of a second."""
AMPLE = {"requests": 600_000, "input_tokens": 600_000_000, "output_tokens": 60_000_000}
FIELDS = {"accounts": {name: {"tier": "build", "pools": {"sonnet-4": AMPLE}} for name in ("first", "second")}}
FIRST = "anthropic/first/sonnet-4"
Answers = Callable[[str], pb.Outcome]
"""What an upstream answers to a call of an account."""


class Clock(TurnedClock):
    """Of the ledgers."""

    def __init__(self) -> None:
        super().__init__(datetime(2026, 3, 3, 12, tzinfo=UTC))

    def forward(self, us: int) -> None:
        self._turned += us


class Traffic:
    """Calls, one each step, that take either account, the first one by preference."""

    def __init__(self, caller: Caller, clock: Clock) -> None:
        self.caller = caller
        self.clock = clock
        self.denied: list[pb.Denial] = []
        self._flying: deque[tuple[int, pb.ReserveRequest, pb.Grant]] = deque()
        self._now = 0

    async def run(self, seconds: float, upstream: Answers) -> list[str]:
        """The account of each call, in turn."""
        went: list[str] = []
        for _ in range(int(seconds * SECOND)):
            self.clock.forward(STEP_US)
            self._now += 1
            while self._flying and self._flying[0][0] <= self._now:
                _, request, grant = self._flying.popleft()
                outcome = upstream(grant.target.account)
                await self.caller.coordinator.Commit(
                    pb.CommitRequest(reservation_id=request.reservation_id, context=grant.context, outcome=outcome)
                )
            request = pb.ReserveRequest(reservation_id=new_id())
            for account in ("first", "second"):
                candidate = request.candidates.add(target=pb.Target(model=MODEL, account=account))
                candidate.estimate.input_tokens = 90
                candidate.estimate.output_tokens = 80
            answer = await self.caller.reserve(request)
            if answer.HasField("grant"):
                went.append(answer.grant.target.account)
                self._flying.append((self._now + FLIGHT, request, answer.grant))
            else:
                self.denied.append(answer.denial)
        return went


def well(_: str) -> pb.Outcome:
    return succeeded()


def failing(status: int, kind: str, message: str, retry_after: int = 0) -> Answers:
    """The first account refuses."""

    def answer(account: str) -> pb.Outcome:
        if account == "second":
            return succeeded()
        error = pb.UpstreamError(type=kind, message=message)
        if retry_after:
            error.retry_after.FromSeconds(retry_after)
        return pb.Outcome(disposition=pb.DISPOSITION_REJECTED, http_status=status, error=error)

    return answer


@pytest_asyncio.fixture
async def traffic(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Traffic]:
    clock = Clock()
    monkeypatch.setattr("paceline.ledger.owner.SystemClock", lambda: clock)
    async with running(FIELDS) as server, calling(server) as caller:
        await _known(server)
        yield Traffic(caller, clock)


async def _known(server: Server) -> None:
    assert sorted(server.router.slots) == ["first", "second"]


def part(went: list[str], account: str = "first") -> float:
    return went.count(account) / len(went)


async def test_an_overloaded_account_is_left_within_two_seconds_and_used_again(traffic: Traffic) -> None:
    assert part(await traffic.run(3, well)) == 1
    overloaded = failing(529, "overloaded_error", "Overloaded")
    await traffic.run(2, overloaded)
    # What still goes there are the probes that find out whether it is well: not more than one a second.
    assert (await traffic.run(12, overloaded)).count("first") <= 13
    within = 0
    while part(await traffic.run(1, well)) < 0.95:
        within += 1
        assert within <= 10
    assert part(await traffic.run(4, well)) >= 0.99
    assert traffic.denied == []


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (429, "rate_limit_error", "This request would exceed your rate limit."),
        (503, "api_error", "Service unavailable"),
    ],
)
async def test_an_account_that_asks_to_be_left_alone(traffic: Traffic, status: int, kind: str, message: str) -> None:
    await traffic.run(1, well)
    refusing = failing(status, kind, message, retry_after=20)
    await traffic.run(2, refusing)
    assert (await traffic.run(10, refusing)).count("first") <= 11
    await traffic.run(30, well)
    assert part(await traffic.run(5, well)) >= 0.95
    assert traffic.denied == []


async def test_a_spend_stop_and_a_pause(traffic: Traffic) -> None:
    stopped = failing(400, "invalid_request_error", "Your credit balance is too low to access the API.")
    await traffic.run(1, stopped)
    assert part(await traffic.run(5, stopped)) == 0
    await traffic.caller.admin.ResumePool(pb.ResumePoolRequest(name=FIRST))
    assert part(await traffic.run(2, well)) == 1
    await traffic.caller.admin.PausePool(pb.PausePoolRequest(name=FIRST))
    assert part(await traffic.run(1, well)) == 0
    await traffic.caller.admin.ResumePool(pb.ResumePoolRequest(name=FIRST))
    assert part(await traffic.run(1, well)) == 1
    assert traffic.denied == []
