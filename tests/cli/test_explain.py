"""``paceline explain``: from a running server, and from the files of the audit without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_commands import Command, paceline
from tests.cli.test_limits import Ask
from tests.frontend.harness import LEDGER, POOL, Caller, calling, commit, new_id, reserve, running

__all__ = ["paceline"]

pytestmark = pytest.mark.asyncio(loop_scope="function")


async def test_decisions_are_explained_by_the_server_and_by_its_files(paceline: Command, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    fields = {
        "accounts": {LEDGER: {"tier": "build", "pools": {"sonnet-4": {"requests": {"amount": 6, "burst": 1}}}}},
        "audit": {"path": str(path)},
    }
    first, second = reserve(tenant="blue"), reserve()
    async with running(fields) as server, calling(server) as caller:
        ask = Ask(paceline, server)
        await _decide(caller, first, second)
        live = await ask("explain", second.reservation_id)
        assert live.code == 0, live.err
        assert f"{second.reservation_id} · denied · {POOL}" in live.out
        assert "it needs 1 request, of which nothing was left" in live.out
        assert "come back in" in live.out
        whole = await ask("explain", first.reservation_id, "--identity", "anonymous")
        assert "settled · " in whole.out
        assert "tenant blue" in whole.out
        assert "granted at once" in whole.out
        found = json.loads((await ask("explain", second.reservation_id, "--json")).out)
        assert found["decision"]["denial"]["reason"] == "DENIAL_REASON_LIMIT"
        (await ask("explain", new_id())).is_error("knows nothing of", "--from FILE")
        (await ask("explain", "x")).is_error("'x' is no reservation id")
    # The server is gone.
    again = paceline("explain", second.reservation_id, "--from", str(path))
    assert again.out == live.out
    settled = paceline("explain", first.reservation_id.upper(), "--from", str(path))
    assert settled.out == whole.out
    paceline("explain", new_id(), "--from", str(path)).is_error("nothing of", str(path), "older file")
    paceline("explain", new_id(), "--from", str(tmp_path / "none")).is_error("cannot be read: No such file")
    with path.open("ab") as lines:
        lines.write(path.read_bytes().splitlines()[0][:150])
    assert paceline("explain", first.reservation_id, "--from", str(path)).out == whole.out


async def _decide(caller: Caller, first: object, second: object) -> None:
    grant = (await caller.reserve(first)).grant  # type: ignore[arg-type]
    assert (await caller.reserve(second)).HasField("denial")  # type: ignore[arg-type]
    await caller.coordinator.Commit(commit(first, grant.context))  # type: ignore[arg-type]
