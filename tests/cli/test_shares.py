"""``paceline shares`` over a running server: what it shows, and what it changes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from paceline.frontend.server import Server
from tests.cli.test_commands import Command, paceline
from tests.cli.test_limits import Ask
from tests.frontend.harness import LEDGER, POOL, Caller, calling, running

__all__ = ["paceline"]

FIELDS = {
    "shares": {
        "team": {
            "weight": 3,
            "cap": {"requests": 10},
            "monthly_spend_cap": 5,
            "tenants": ["acme"],
            "shares": {"app": {"guarantee_part": {"input_tokens": 0.125}}},
        }
    }
}


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running(FIELDS) as found:
        yield found


@pytest.fixture
async def caller(server: Server) -> AsyncIterator[Caller]:
    async with calling(server) as found:
        yield found


@pytest.fixture
def ask(paceline: Command, server: Server) -> Ask:
    return Ask(paceline, server)


async def test_what_is_shown(ask: Ask, caller: Caller) -> None:
    await caller.reserve(tenant="acme")
    lines = (await ask("shares")).out.splitlines()
    assert lines[1].split() == [
        "team", LEDGER, "3", "requests=10", "spend=$5.00", "-", "requests", "in", POOL, "9", "1",
    ]  # fmt: skip
    assert lines[-1].split() == ["team/app", LEDGER, "1", "-", "input_tokens=12.5%", "-", "-", "-"]
    (child,) = await ask.json("shares", "--parent", "team")
    assert child["guarantees"] == [{"dimension": "DIMENSION_INPUT_TOKENS", "window": "WINDOW_MINUTE", "permille": 125}]


async def test_what_is_not_named_stays(ask: Ask) -> None:
    said = await ask("shares", "set", "team", "--weight", "7", "--cap", "input_tokens=25%", "--cap", "requests=none")
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[1].split()[:5] == ["team", LEDGER, "7", "spend=$5.00", "input_tokens=25%"]
    await ask("shares", "set", "team", "--guarantee", "requests=5", "--cap", "spend=2.5", "--cap", "requests/day=1,000")
    (team, _) = await ask.json("shares")
    assert team["weight"] == 7
    assert [(cap["dimension"], cap["window"], cap.get("units"), cap.get("permille")) for cap in team["caps"]] == [
        ("DIMENSION_SPEND", "WINDOW_MONTH", "2500000000", None),
        ("DIMENSION_REQUESTS", "WINDOW_DAY", "1000", None),
        ("DIMENSION_INPUT_TOKENS", "WINDOW_MINUTE", None, 250),
    ]
    assert [each["units"] for each in team["guarantees"]] == ["5"]
    made = await ask("shares", "set", "team/new", "--create", "--weight", "0")
    assert made.out.splitlines()[1].split()[:3] == ["team/new", LEDGER, "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["team"], "nothing to change: give --weight, --cap or --guarantee"),
        (["nobody", "--weight", "2"], "there is no share 'nobody': `paceline shares` lists them, --create makes one"),
        (["team", "--cap", "requests"], "--cap 'requests' cannot be read: write DIMENSION=AMOUNT"),
        (["team", "--cap", "stars=1"], "there is no dimension 'stars'; there are: requests, input_tokens"),
        (["team", "--cap", "requests/eon=1"], "there is no window 'eon'; use minute, day or month"),
        (["team", "--cap", "requests=1.5"], "has too many places"),
        (["team", "--cap", "requests=101%"], "is more than 100%"),
        (["team", "--guarantee", "spend=1"], "INVALID_ARGUMENT: share.guarantees[0]"),
        (["team", "--guarantee", "requests=11"], "FAILED_PRECONDITION: share.guarantees: of requests 11 is above"),
    ],
)
async def test_what_cannot_be_is_said(ask: Ask, arguments: list[str], message: str) -> None:
    said = await ask("shares", "set", *arguments)
    assert said.code == 2
    assert message in said.err
