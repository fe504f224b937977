"""``paceline report`` over real processes: its figures are those of the upstream."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest

from paceline.cli.report import quantile
from paceline_client import AsyncClient
from paceline_client.hooks.anthropic import PacelineMiddleware
from paceline_client.stubs import v1 as pb
from tests.cli.conftest import PACELINE, clean_environment, free_address
from tests.cli.test_commands import Command, paceline

__all__ = ["paceline"]

pytestmark = pytest.mark.process

MODEL = "claude-sonnet-5"
POOL = "anthropic/default/sonnet-5"
CALLS, SECONDS = 60, 3.0
"""Twenty calls in a second, where the upstream lets one through in a second, and ten at first."""
CONFIG = """
modes: {default: %s}
accounts:
  default:
    tier: build
    pools:
      sonnet-5: {requests: {amount: 60, burst: 10}, input_tokens: 10_000_000, output_tokens: 10_000_000}
"""


class Upstream:
    """``paceline upstream`` in a process of its own."""

    def __init__(self) -> None:
        command = [PACELINE, "upstream", "--burst-seconds", "10", "--seed", "7"]
        command += ["--model-group", "sonnet:claude-sonnet-*:requests=60,input_tokens=10000000,output_tokens=10000000"]
        for each in ("first_byte_ms=20", "tokens_per_second=0", "overload_probability=0.06"):
            command += ["--scenario", each]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment())
        assert self.process.stdout is not None
        self.url = next(word for word in self.process.stdout.readline().split() if word.startswith("http"))

    def truth(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx2.get(self.url + "/sim/truth", trust_env=False).json()
        return found


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    found = Upstream()
    yield found
    found.process.terminate()
    found.process.communicate(timeout=20)


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a server in the mode that the test names."""
    (tmp_path / "config.yaml").write_text(CONFIG % request.param)
    listen = free_address()
    command = [PACELINE, "serve", "--listen", listen, "--config", str(tmp_path / "config.yaml")]
    command += ["--store", "embedded:", "--metrics-listen", "off"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=clean_environment())
    subprocess.run(
        [PACELINE, "health", "--address", listen, "--wait", "30"], check=True, timeout=40, env=clean_environment()
    )
    yield listen
    process.terminate()
    process.wait(20)


async def traffic(upstream: Upstream, client: AsyncClient, max_wait: float) -> float:
    """Calls at an even pace, each tried once. The longest time that one took."""
    middleware = PacelineMiddleware(client, tenant="chat", max_wait=max_wait)
    slowest = 0.0
    async with anthropic.AsyncAnthropic(
        base_url=upstream.url, api_key="none", max_retries=0, middleware=[middleware]
    ) as sdk:

        async def one(number: int) -> None:
            nonlocal slowest
            await asyncio.sleep(number * SECONDS / CALLS)
            before = time.monotonic()
            try:
                await sdk.messages.create(
                    model=MODEL, max_tokens=16, messages=[{"role": "user", "content": f"call {number}"}]
                )
            except anthropic.APIStatusError as error:
                assert error.status_code in (429, 529)  # noqa: PT017
            slowest = max(slowest, time.monotonic() - before)

        await asyncio.gather(*(one(number) for number in range(CALLS)))
    return slowest


def counts(report: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {
        each["decision"].removeprefix("DECISION_").lower(): {
            name: int(value) for name, value in each.items() if name != "decision"
        }
        for each in report["decisions"]
    }


@pytest.mark.parametrize(
    ("server", "mode", "max_wait"),
    [("observe", "enforce", 0), ("observe", "enforce", 30), ("enforce", "observe", 30)],
    indirect=["server"],
)
async def test_the_report_has_the_numbers_of_the_upstream(
    server: str, mode: Any, max_wait: float, upstream: Upstream, paceline: Command
) -> None:
    client = AsyncClient(server, mode=mode, budget=10)
    slowest = await traffic(upstream, client, max_wait)
    assert slowest < 2, "a call was held back"
    assert await client.flush(10)
    await client.aclose()
    truth = upstream.truth()
    assert truth["refused"] > 10
    assert truth["overloaded"] > 2

    said = await asyncio.to_thread(paceline, "report", "--json", "--address", server)
    assert said.code == 0, said.err
    (report,) = json.loads(said.out)
    assert (report["pool"], report["mode"]) == (POOL, "MODE_OBSERVE")
    by_decision = counts(report)
    for what in ("accepted", "refused", "overloaded"):
        assert sum(each.get(what, 0) for each in by_decision.values()) == truth[what]
    assert sum(each["calls"] for each in by_decision.values()) == CALLS
    held = sum(each.get("refused", 0) for name, each in by_decision.items() if name in ("waited", "denied"))
    # The limits are known, so nearly all refusals are of calls that Paceline would have held back.
    assert held >= 0.8 * truth["refused"]
    if max_wait:
        assert by_decision["waited"]["calls"] > 20
        assert int(sum(int(cell["calls"]) for cell in report["waits"]["cells"])) == by_decision["waited"]["calls"]
    else:
        assert "waited" not in by_decision
        # A few for an overload, of which observing lets every call through all the same.
        reasons = {denial["reason"]: int(denial["calls"]) for denial in report["denials"]}
        assert sum(reasons.values()) == by_decision["denied"]["calls"]
        assert reasons.keys() <= {"DENIAL_REASON_LIMIT", "DENIAL_REASON_BLOCKED"}

    text = (await asyncio.to_thread(paceline, "report", "--address", server, "--pool", POOL, "--by-tenant")).out
    print(text)
    assert f"{POOL} · tenant chat · since 2" in text
    through = truth["refused"] - held
    assert (
        f"of {truth['refused']:,} refusals by the upstream, {held:,} were calls that Paceline would have held back;\n"
        f"    {through:,} it would have let through\n"
    ) in text
    nobody = await asyncio.to_thread(paceline, "report", "--address", server, "--tenant", "somebody else")
    assert (nobody.code, nobody.out) == (0, "no calls yet\n")
    (await asyncio.to_thread(paceline, "report", "--address", server, "--pool", "nope")).is_error("NOT_FOUND", "pool")


@pytest.mark.parametrize("server", ["enforce"], indirect=True)
async def test_in_enforce_mode_it_shows_what_was_decided(server: str, upstream: Upstream, paceline: Command) -> None:
    client = AsyncClient(server, budget=10)
    await traffic(upstream, client, 0)
    assert await client.flush(10)
    await client.aclose()
    truth = upstream.truth()
    said = await asyncio.to_thread(paceline, "report", "--json", "--address", server)
    (report,) = json.loads(said.out)
    assert report["mode"] == "MODE_ENFORCE"
    by_decision = counts(report)
    # What is denied is not sent, so nothing is refused that was known before.
    assert by_decision["at_once"]["calls"] == truth["calls"]
    assert by_decision["denied"]["calls"] == CALLS - truth["calls"]
    assert by_decision["at_once"].get("refused", 0) == truth["refused"]
    text = (await asyncio.to_thread(paceline, "report", "--address", server)).out
    assert "enforced: what Paceline did" in text
    assert "went at once" in text
    assert f"denied: {CALLS - truth['calls']} for limit (requests)" in text


def test_quantiles_are_upper_bounds() -> None:
    waits = pb.WaitReport()
    for seconds, calls in ((1, 90), (5, 8), (10, 2)):
        waits.cells.add(calls=calls).up_to.seconds = seconds
    waits.longest.seconds = 7
    assert [quantile(waits, part) for part in (0.5, 0.9, 0.95, 0.99, 1)] == ["1 s", "1 s", "5 s", "7 s", "7 s"]
