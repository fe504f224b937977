"""Decisions in files: each that was taken is there with why, nothing secret is, and what is lost is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline.engine.audit import Audit, Kind, Record
from paceline.frontend import audit
from paceline.frontend.audit_export import AuditExport
from paceline.frontend.server import StartError
from paceline.telemetry.rotation import RotatingFile
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import POOL, calling, commit, reserve, running, succeeded
from tests.frontend.test_explain import SMALL


def entries(path: Path) -> list[audit.Entry]:
    return list(audit.read(path.read_bytes().splitlines()))


async def test_every_decision_is_written_with_why(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    token = "t0psecret-token-of-ann"
    identities = [{"name": "ann", "token_env": "ANN", "roles": ["call", "teach", "admin"], "tenants": ["*"]}]
    fields = SMALL | {"audit": {"path": str(path)}, "identities": identities}
    async with running(fields, environ={"ANN": token}) as server, calling(server, token) as caller:
        first = reserve(tenant="blue", route="chat", priority=pb.PRIORITY_INTERACTIVE)
        denied = reserve(tenant="blue")
        grant = (await caller.reserve(first)).grant
        denial = (await caller.reserve(denied)).denial
        outcome = succeeded(input_tokens=70, output_tokens=30)
        outcome.headers.add(name="x-api-key", value=b"sk-of-somebody")
        await caller.coordinator.Commit(commit(first, grant.context, outcome), metadata=caller.metadata)
        assert server.audit is not None
        server.audit.look()
        assert server.figures().audit is not None
        assert server.audit.dropped == 0
    granted, turned_down, settled = entries(path)
    assert (granted.event, granted.reservation_id, granted.identity) == ("granted", first.reservation_id, "ann")
    assert (granted.pool, granted.tenant, granted.route, granted.priority) == (POOL, "blue", "chat", "interactive")
    assert (turned_down.event, turned_down.reason, turned_down.binding) == ("denied", "limit", "requests")
    assert turned_down.wait_us == denial.retry_after.ToMicroseconds()
    part = audit.bound(turned_down)
    assert part is not None
    assert (part.pool, part.amount, part.available) == (POOL, 1, 0)
    charged = {part.dimension: part.amount for part in settled.limits}
    assert (charged["requests"], charged["input_tokens"], charged["output_tokens"]) == (1, 70, 30)
    text = path.read_text()
    assert not [secret for secret in (token, "sk-of", "api-key") if secret in text]


async def test_a_place_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot write the audit to .*No such file"):
        async with running({"audit": {"path": str(tmp_path / "none" / "a.jsonl")}}):
            pass


class Slot:
    """As much of a slot as the export looks at."""

    def __init__(self, account: str, found: Audit) -> None:
        self.account = account
        self.engine: Any = self
        self.stats = self.state = self
        self.audit = found
        self.buckets: list[Any] = []


def note(found: Audit, count: int) -> None:
    for number in range(count):
        found.note(Record(number, Kind.RELEASED, f"svc/{found.count}", "p"))


async def test_what_is_forgotten_before_it_was_looked_at_is_counted(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "a.jsonl", 1_000_000, 2)
    slot = Slot("one", Audit(most=10))
    slots = [slot]
    export = AuditExport(lambda: slots, file)  # type: ignore[arg-type, return-value]
    note(slot.audit, 7)
    export.look()
    note(slot.audit, 14)
    export.look()
    assert export.missed == 4
    # The ledger is read anew: what its last engine decided is not lost.
    note(slot.audit, 3)
    slot.audit = Audit(most=10)
    note(slot.audit, 2)
    export.look()
    note(slot.audit, 1)
    slots.clear()
    export.look()
    await export.close(5)
    assert (file.written, export.dropped) == (7 + 10 + 3 + 2 + 1, 4)
    assert len(entries(tmp_path / "a.jsonl")) == file.written
