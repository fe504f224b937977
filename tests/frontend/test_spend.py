"""Money, end to end: what calls cost, caps of accounts and shares, months in UTC, and what a denial says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import LEDGER, POOL, Caller, calling, commit, reserve, running
from tests.frontend.turned_clock import TurnedClock

NANO = 1_000_000_000
AMPLE = {"requests": 1_000_000, "input_tokens": 1_000_000_000, "output_tokens": 1_000_000_000}
MILLION = 1_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> TurnedClock:
    clock = TurnedClock(datetime(2026, 1, 31, 22, 0, tzinfo=UTC))
    monkeypatch.setattr("paceline.ledger.owner.SystemClock", lambda: clock)
    return clock


@asynccontextmanager
async def account(cap: float | str, shares: dict[str, Any] | None = None) -> AsyncIterator[tuple[Server, Caller]]:
    """A server with one account with ample limits, and a cap in dollars a month."""
    fields = {
        "accounts": {LEDGER: {"tier": "build", "monthly_spend_cap": cap, "pools": {"sonnet-4": AMPLE}}},
        "shares": shares or {},
    }
    async with running(fields) as server, calling(server) as caller:
        yield server, caller


async def spend(caller: Caller, usage: pb.Usage, **fields: Any) -> pb.CommitResponse:
    """A call that cost what it was expected to, or so."""
    request = reserve(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, **fields)
    granted = await caller.reserve(request)
    assert granted.HasField("grant"), granted
    outcome = pb.Outcome(
        disposition=pb.DISPOSITION_SUCCEEDED, http_status=200, usage=usage, usage_kind=pb.USAGE_KIND_FINAL
    )
    answer: pb.CommitResponse = await caller.coordinator.Commit(commit(request, granted.grant.context, outcome))
    return answer


def dollars(money: Any) -> float:
    assert money.currency_code == "USD"
    return float(money.units + money.nanos / NANO)


async def spent(caller: Caller, share: str = "") -> pb.GetSpendResponse:
    answer: pb.GetSpendResponse = await caller.admin.GetSpend(pb.GetSpendRequest(ledger=LEDGER, share=share))
    return answer


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        (pb.Usage(input_tokens=MILLION), 3.0),
        (pb.Usage(output_tokens=MILLION), 15.0),
        (pb.Usage(cache_read_tokens=MILLION), 0.3),
        (pb.Usage(cache_write_tokens=MILLION), 3.75),
        (pb.Usage(input_tokens=1_000, cache_read_tokens=90_000, cache_write_tokens=4_000, output_tokens=500), 0.0525),
        (pb.Usage(input_tokens=1), 0.000003),
        (pb.Usage(cache_read_tokens=1), 0.0000003),
    ],
)
async def test_what_a_call_costs(usage: pb.Usage, cost: float) -> None:
    """Claude Sonnet 4.5, in dollars a million tokens: input 3, cache reads 0.30, cache writes 3.75, output 15."""
    async with account("unlimited") as (_, caller):
        answer = await spend(caller, usage)
        assert dollars(answer.cost) == pytest.approx(cost, abs=1e-12)
        shown = await spent(caller)
        assert dollars(shown.spent) == pytest.approx(cost, abs=1e-12)
        assert dollars(shown.held) == 0
        assert not shown.HasField("cap")
        settled = {(each.dimension, each.window): each.charged for each in answer.settlements}
        assert settled[pb.DIMENSION_SPEND, pb.WINDOW_MONTH] == round(cost * NANO)


async def test_the_answer_to_a_repeated_commit_costs_nothing_more() -> None:
    async with account("unlimited") as (_, caller):
        request = reserve(input_tokens=MILLION, output_tokens=0)
        granted = await caller.reserve(request)
        outcome = pb.Outcome(
            disposition=pb.DISPOSITION_SUCCEEDED,
            usage=pb.Usage(input_tokens=MILLION),
            usage_kind=pb.USAGE_KIND_FINAL,
        )
        first = await caller.coordinator.Commit(commit(request, granted.grant.context, outcome))
        again = await caller.coordinator.Commit(commit(request, granted.grant.context, outcome))
        assert again.duplicate
        assert first.cost == again.cost
        assert dollars((await spent(caller)).spent) == 3.0


async def test_a_call_that_was_not_made_costs_nothing() -> None:
    async with account(10) as (_, caller):
        request = reserve(input_tokens=MILLION)
        granted = await caller.reserve(request)
        shown = await spent(caller)
        assert dollars(shown.spent) == 0
        assert dollars(shown.held) == pytest.approx(3.0, abs=0.01)
        await caller.coordinator.Release(
            pb.ReleaseRequest(reservation_id=request.reservation_id, context=granted.grant.context)
        )
        shown = await spent(caller)
        assert (dollars(shown.spent), dollars(shown.held)) == (0, 0)


async def test_an_accounts_cap_denies_until_the_month_turns(clock: TurnedClock) -> None:
    async with account(10) as (_, caller):
        await spend(caller, pb.Usage(input_tokens=3 * MILLION))
        shown = await spent(caller)
        assert (dollars(shown.spent), dollars(shown.cap)) == (9.0, 10.0)
        assert shown.start_time.ToDatetime(UTC) == datetime(2026, 1, 1, tzinfo=UTC)
        assert shown.end_time.ToDatetime(UTC) == datetime(2026, 2, 1, tzinfo=UTC)

        answer = await caller.reserve(input_tokens=MILLION)
        denial = answer.denial
        assert (denial.reason, denial.pool) == (pb.DENIAL_REASON_SPEND_CAP, POOL)
        assert "spend cap" in denial.message
        left = denial.retry_after.ToTimedelta()
        assert timedelta(hours=1, minutes=59) < left <= timedelta(hours=2)
        binding = answer.binding_dimension
        assert (binding.dimension, binding.window) == (pb.DIMENSION_SPEND, pb.WINDOW_MONTH)
        assert (binding.share, binding.pool) == ("", "")
        # What fits still passes.
        assert (await caller.reserve(input_tokens=MILLION // 10)).HasField("grant")

        clock.turn(datetime(2026, 1, 31, 23, 59, 50, tzinfo=UTC))
        assert (await caller.reserve(input_tokens=MILLION)).HasField("denial")
        clock.turn(datetime(2026, 2, 1, tzinfo=UTC))
        # Nobody has called yet, and yet it is February.
        shown = await spent(caller)
        assert dollars(shown.spent) == 0
        assert shown.start_time.ToDatetime(UTC) == datetime(2026, 2, 1, tzinfo=UTC)
        assert shown.end_time.ToDatetime(UTC) == datetime(2026, 3, 1, tzinfo=UTC)
        await spend(caller, pb.Usage(input_tokens=3 * MILLION))
        shown = await spent(caller)
        assert dollars(shown.spent) == 9.0
        assert shown.start_time.ToDatetime(UTC) == datetime(2026, 2, 1, tzinfo=UTC)


async def test_a_waiting_call_is_not_kept_for_a_month(clock: TurnedClock) -> None:
    async with account(10) as (_, caller):
        await spend(caller, pb.Usage(input_tokens=3 * MILLION))
        answer = await caller.reserve(input_tokens=MILLION, wait=60)
        assert answer.denial.reason == pb.DENIAL_REASON_SPEND_CAP


async def test_a_call_above_the_whole_cap_is_told_so() -> None:
    async with account(10) as (_, caller):
        denial = (await caller.reserve(input_tokens=4 * MILLION)).denial
        assert denial.reason == pb.DENIAL_REASON_SPEND_CAP
        assert not denial.HasField("retry_after"), "no month will do"


async def test_a_shares_cap_denies_its_own_calls_only(clock: TurnedClock) -> None:
    shares = {
        "team": {
            "monthly_spend_cap": 10,
            "tenants": ["acme"],
            "shares": {"small": {"monthly_spend_cap": 4, "tenants": ["tiny"]}},
        },
        "free": {"tenants": ["other"]},
    }
    async with account(1_000, shares) as (_, caller):
        unused = await spent(caller, "team/small")
        assert (dollars(unused.spent), dollars(unused.held), dollars(unused.cap)) == (0, 0, 4)
        assert unused.end_time.ToDatetime(UTC) == datetime(2026, 2, 1, tzinfo=UTC)
        with pytest.raises(grpc.aio.AioRpcError, match="has no spend cap"):
            await spent(caller, "free")
        await spend(caller, pb.Usage(input_tokens=MILLION), tenant="tiny")
        assert dollars((await spent(caller, "team/small")).spent) == 3.0
        assert dollars((await spent(caller, "team")).spent) == 3.0
        answer = await caller.reserve(input_tokens=MILLION, tenant="tiny")
        assert answer.denial.reason == pb.DENIAL_REASON_SPEND_CAP
        assert answer.binding_dimension.share == "team/small"
        assert answer.denial.pool == POOL
        assert timedelta(hours=1) < answer.denial.retry_after.ToTimedelta() <= timedelta(hours=2)

        await spend(caller, pb.Usage(input_tokens=2 * MILLION), tenant="acme")
        answer = await caller.reserve(input_tokens=MILLION, tenant="acme")
        assert answer.denial.reason == pb.DENIAL_REASON_SPEND_CAP
        assert answer.binding_dimension.share == "team"
        # The share inside has a dollar left, and its parent as well.
        await spend(caller, pb.Usage(input_tokens=MILLION // 10), tenant="tiny")
        await spend(caller, pb.Usage(input_tokens=2 * MILLION), tenant="other")
        await spend(caller, pb.Usage(input_tokens=2 * MILLION))
        assert dollars((await spent(caller)).spent) == 21.3

        clock.turn(datetime(2026, 2, 1, tzinfo=UTC))
        await spend(caller, pb.Usage(input_tokens=MILLION), tenant="tiny")
        assert dollars((await spent(caller, "team")).spent) == 3.0


async def test_money_without_a_price_is_not_capped() -> None:
    async with account(1) as (_, caller):
        request = reserve(model="of-no-catalogue", input_tokens=20_000, output_tokens=100)
        granted = await caller.reserve(request)
        assert granted.HasField("grant")
        answer = await caller.coordinator.Commit(commit(request, granted.grant.context))
        assert not answer.HasField("cost")
