"""Alerts from the call that causes them to the ends of their ways: Watch, the log, the webhook, the metrics."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml

from paceline.config import Config, ConfigError
from paceline.engine.dimensions import Dimension, Window
from paceline.frontend.admin import Admin
from paceline.frontend.admin_watch import Elsewhere, Hub
from paceline.frontend.alerts import Alert, Kind
from paceline.frontend.alerts.alerts import MAX_WATCHED
from paceline.frontend.alerts.lookout import MAX_STANDING, MAX_TOLD
from paceline.frontend.alerts.webhook import MAX_QUEUED
from paceline.frontend.server import Server
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import LEDGER, POOL, Caller, calling, config, reserve, running, until
from tests.frontend.receiver import Receiver
from tests.frontend.test_admin_fleet import LEDGERS, OWNERS, Nodes
from tests.frontend.test_spend import AMPLE, MILLION, spend
from tests.frontend.turned_clock import TurnedClock

ENVIRON = {"HOOK_SECRET": "s3cret", "HOOK_URL": "https://127.0.0.1:1/hunter2"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> TurnedClock:
    clock = TurnedClock(datetime(2026, 1, 31, 22, 0, tzinfo=UTC))
    monkeypatch.setattr("paceline.ledger.owner.SystemClock", lambda: clock)
    return clock


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


def fields(receiver: Receiver | None = None, cap: float = 10, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "accounts": {LEDGER: {"tier": "build", "monthly_spend_cap": cap, "pools": {"sonnet-4": AMPLE}}},
        "node": "paceline-0",
        "alerts": {"thresholds": [0.5, 0.8]},
    }
    if receiver is not None:
        url = f"http://127.0.0.1:{receiver.port}/hook?token=hunter2"
        found["alerts"]["webhook"] = {"url": url, "secret_env": "HOOK_SECRET", "timeout": "2s"}
    return found | more


async def watched(caller: Caller, wanted: int, **request: Any) -> list[pb.WatchEvent]:
    """The first so many events about alerts, from a snapshot on."""
    watch = caller.admin.Watch(pb.WatchRequest(**request))
    found: list[pb.WatchEvent] = []
    async with asyncio.timeout(10):
        while len(found) < wanted:
            message = await watch.read()
            assert isinstance(message, pb.WatchResponse)
            found += [event for event in message.events if event.HasField("alert")]
    watch.cancel()
    return found


async def test_a_threshold_goes_all_ways(receiver: Receiver, logged: list[Any]) -> None:
    async with running(fields(receiver), environ=ENVIRON) as server, calling(server) as caller:
        watching = asyncio.create_task(watched(caller, 1))
        await until(lambda: server.admin.watching == 1)
        # The server looks by itself.
        await spend(caller, pb.Usage(input_tokens=2 * MILLION))
        (event,) = await watching
        await until(lambda: receiver.got)
        (got,) = receiver.got

        alert = event.alert
        assert (alert.kind, alert.ledger, alert.threshold_permille) == (pb.ALERT_KIND_THRESHOLD, LEDGER, 500)
        assert alert.limit == pb.DimensionRef(dimension=pb.DIMENSION_SPEND, window=pb.WINDOW_MONTH)
        assert (alert.used, alert.amount) == (6_000_000_000, 10_000_000_000)

        posted = json.loads(got.body)
        assert posted == {
            "version": 1,
            "id": alert.id,
            "kind": "threshold",
            "ledger": LEDGER,
            "pool": "",
            "share": "",
            "dimension": "spend",
            "window": "month",
            "threshold": 0.5,
            "used": 6.0,
            "amount": 10.0,
            "previous_amount": None,
            "unit": "USD",
            "time": alert.time.ToJsonString(),
            "server": "paceline-0",
            "text": "spend of account default: 60.0% used ($6.00 of $10.00 a month), above the threshold of 50%",
        }
        assert got.path == "/hook?token=hunter2"
        assert got.headers["Paceline-Event"] == alert.id
        signature = hmac.new(b"s3cret", got.body, hashlib.sha256).hexdigest()
        assert got.headers["Paceline-Signature"] == f"sha256={signature}"

        (line,) = [line for line in logged if line.get("kind")]
        assert (line["event"], line["id"], line["log_level"]) == ("threshold reached", alert.id, "warning")
        assert (line["ledger"], line["dimension"], line["used"], line["amount"]) == (LEDGER, "spend", 6.0, 10.0)
        assert not any(secret in repr(logged) for secret in ("hunter2", "s3cret"))

        told = server.figures().alerts
        assert told.told == {(LEDGER, "threshold"): 1}
        assert told.posted == {"delivered": 1, "failed": 0, "dropped": 0}


async def test_a_cap_and_its_share(receiver: Receiver, clock: TurnedClock) -> None:
    shares = {"team": {"monthly_spend_cap": 4, "tenants": ["acme"]}}
    async with running(fields(receiver, 100, shares=shares), environ=ENVIRON) as server, calling(server) as caller:
        await spend(caller, pb.Usage(input_tokens=MILLION), tenant="acme")
        await server.alerts.look()
        denied = await caller.reserve(input_tokens=MILLION, tenant="acme")
        assert denied.denial.reason == pb.DENIAL_REASON_SPEND_CAP
        await server.alerts.look()
        await until(lambda: len(receiver.got) == 2)
        first, second = (json.loads(got.body) for got in receiver.got)
        assert (first["kind"], first["share"], first["threshold"], first["used"]) == ("threshold", "team", 0.5, 3.0)
        assert (second["kind"], second["share"], second["threshold"]) == ("cap_reached", "team", None)
        assert second["text"] == (
            "spend of share team in account default: the cap is reached, calls are denied; "
            "75.0% used ($3.00 of $4.00 a month)"
        )

        clock.turn(datetime(2026, 2, 1, tzinfo=UTC))
        watching = asyncio.create_task(watched(caller, 4))
        await until(lambda: server.admin.watching == 1)
        await asyncio.sleep(0.4)
        await server.alerts.look()
        events = await watching
        assert [event.removed for event in events] == [False, False, True, True]
        await spend(caller, pb.Usage(input_tokens=MILLION), tenant="acme")
        await server.alerts.look()
        await until(lambda: len(receiver.got) == 3)
        assert json.loads(receiver.got[2].body)["time"].startswith("2026-02-01T00:00:")


async def test_a_minutes_limit_of_a_pool() -> None:
    accounts = {LEDGER: {"tier": "build", "pools": {"sonnet-4": {**AMPLE, "input_tokens": 1_000}}}}
    async with running(fields(accounts=accounts)) as server, calling(server) as caller:
        await spend(caller, pb.Usage(input_tokens=900))
        await server.alerts.look()
        events = await watched(caller, 2, pools=[POOL])
        assert [event.alert.threshold_permille for event in events] == [500, 800]
        assert {(event.alert.limit.pool, event.alert.used, event.alert.amount) for event in events} == {
            (POOL, 900, 1_000)
        }
        assert server.figures().alerts.posted == {}


async def test_a_restart_tells_nothing_again(receiver: Receiver, tmp_path: Path, logged: list[Any]) -> None:
    settings = fields(receiver, store=f"embedded:{tmp_path / 'ledgers.db'}")
    async with running(settings, environ=ENVIRON) as server, calling(server) as caller:
        await spend(caller, pb.Usage(input_tokens=2 * MILLION))
        await server.alerts.look()
        await until(lambda: len(receiver.got) == 1)
    async with running(settings, environ=ENVIRON) as server, calling(server) as caller:
        (event,) = await watched_soon(server, caller)
        assert event.alert.inherited
        assert server.figures().alerts.told == {}
        # What comes after is told, even if it came before the first look.
        await spend(caller, pb.Usage(input_tokens=MILLION))
        await server.alerts.look()
        await until(lambda: len(receiver.got) == 2)
        assert json.loads(receiver.got[1].body)["threshold"] == 0.8
    assert sum(line["event"].startswith("thresholds were reached before") for line in logged) == 1


async def watched_soon(server: Server, caller: Caller) -> list[pb.WatchEvent]:
    await server.alerts.look()
    return await watched(caller, 1)


async def test_what_a_call_does_before_the_first_look_is_told(receiver: Receiver, tmp_path: Path) -> None:
    settings = fields(receiver, store=f"embedded:{tmp_path / 'ledgers.db'}")
    async with running(settings, environ=ENVIRON) as server, calling(server) as caller:
        await spend(caller, pb.Usage(input_tokens=MILLION))
    assert receiver.got == []
    async with running(settings, environ=ENVIRON) as server, calling(server) as caller:
        await spend(caller, pb.Usage(input_tokens=MILLION))
        # The server ends before its first look; the end looks once more.
    assert [json.loads(got.body)["threshold"] for got in receiver.got] == [0.5]


async def test_a_webhook_that_is_away_hurts_nobody(logged: list[Any]) -> None:
    settings = fields()
    settings["alerts"]["webhook"] = {"url_env": "HOOK_URL", "timeout": "200ms"}
    async with running(settings, environ=ENVIRON) as server, calling(server) as caller:
        await spend(caller, pb.Usage(input_tokens=2 * MILLION))
        await server.alerts.look()
        assert (await caller.reserve(reserve())).HasField("grant")
        await server.stop(0)
        assert server.figures().alerts.posted["failed"] == 1
    assert not any("hunter2" in repr(line) for line in logged)


@pytest.mark.parametrize(
    ("hook", "environ", "line"),
    [
        (
            {"url": "https://example.com/a", "secret_env": "NOT_SET"},
            {},
            "alerts.webhook.secret_env: environment variable NOT_SET holds no secret; set it, or remove the field",
        ),
        ({"url_env": "NOT_SET"}, {}, "alerts.webhook.url_env: environment variable NOT_SET holds no URL; set it"),
        (
            {"url_env": "HOOK_URL"},
            {"HOOK_URL": "ftp://host/hunter2"},
            "alerts.webhook.url_env: environment variable HOOK_URL is no URL to post to; write https://HOST/PATH",
        ),
    ],
)
def test_secrets_that_are_missing(hook: dict[str, Any], environ: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Server(config(alerts={"webhook": hook}), environ=environ)
    assert refused.value.lines == [line]


async def test_a_fault_does_not_end_the_looking(monkeypatch: pytest.MonkeyPatch, logged: list[Any]) -> None:
    monkeypatch.setattr("paceline.frontend.alerts.alerts.LOOK_S", 0.01)
    monkeypatch.setattr("paceline.frontend.alerts.alerts._MOST_BETWEEN_S", 0.01)
    async with running(fields()) as server:
        looks = 0

        async def broken() -> float:
            nonlocal looks
            looks += 1
            raise RuntimeError("boom")

        monkeypatch.setattr(server.alerts, "look", broken)
        await until(lambda: looks >= 2)
        monkeypatch.undo()
    assert any(line["event"] == "looking for alerts failed" for line in logged)


def test_the_page_is_true() -> None:
    """Its configuration is one, its JSON is what is posted, and its function checks signatures."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "alerts.md").read_text("utf-8")
    found = re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
    blocks = dict(found)
    alerts, money = (Config.model_validate(yaml.safe_load(text)) for kind, text in found if kind == "yaml")
    assert alerts.alerts.thresholds == (800, 950)
    assert money.accounts["main"].monthly_spend_cap == 800_000_000_000
    shown = json.loads(blocks["json"])
    at = 1_771_320_600_250_000
    limit = ("product", Dimension.SPEND, Window.MONTH)
    alert = Alert(Kind.THRESHOLD, "main", "", *limit, 800, 402_500_000_000, 500_000_000_000, None, at)
    posted = json.loads(alert.json("paceline-0"))
    assert {**posted, "id": ""} == {**shown, "id": ""}
    names: dict[str, Any] = {}
    exec(blocks["python"], names)
    body = alert.json("x")
    signature = "sha256=" + hmac.new(b"s3cret", body, hashlib.sha256).hexdigest()
    assert names["is_genuine"](body, signature, "s3cret")
    assert not names["is_genuine"](body + b" ", signature, "s3cret")
    for bound in (MAX_QUEUED, MAX_WATCHED, MAX_TOLD, MAX_STANDING):
        assert f"{bound:,}" in page


# -- with other servers -----------------------------------------------------------------------------------------------


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    async with AsyncExitStack() as stack:
        found = Nodes()
        for name in ("one", "two"):
            accounts = {
                ledger: {"tier": "build", "monthly_spend_cap": 10, "pools": {"sonnet-4": AMPLE}}
                for ledger in LEDGERS
                if OWNERS[ledger] == name
            }
            server = await stack.enter_async_context(running({"accounts": accounts}))
            found.add(name, server)
            found.admins[name] = Admin(
                server.router,
                server.authenticator,
                server.admin._places,
                lambda _: "anthropic",
                found.fleets[name],
                alerts=server.alerts.watched,
            )
        yield found


async def test_the_owner_tells_and_every_server_shows(nodes: Nodes) -> None:
    admin = nodes.admins["one"]
    stream = Hub(admin.watched, admin.last_state, Elsewhere(nodes.fleets["one"])).follow(pb.WatchRequest(), 0.13)
    async with asyncio.timeout(10):
        while (await anext(stream)).phase != pb.WATCH_PHASE_SNAPSHOT_END:
            pass
    async with calling(nodes.servers["two"]) as caller:
        await spend(caller, pb.Usage(input_tokens=3 * MILLION), account="beta")
    for server in nodes.servers.values():
        await server.alerts.look()
    found: list[pb.Alert] = []
    async with asyncio.timeout(10):
        while not found:
            response = await anext(stream)
            found = [event.alert for event in response.events if event.HasField("alert")]
    assert [(alert.ledger, alert.threshold_permille) for alert in found] == [("beta", 800)]
    assert [dict(nodes.servers[name].alerts.counts) for name in ("one", "two")] == [{}, {("beta", "threshold"): 1}]
    await stream.aclose()
