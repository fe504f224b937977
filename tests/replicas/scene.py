"""A fleet under load, for a test to do something to it, and the judgement at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.proofs.recount import Stored
from tests.replicas.again import forgotten
from tests.replicas.checks import Connect, Judgement, conserved, judge, read_log
from tests.replicas.fleet import AMPLE, KEEPING, LEDGER, Clients, Fleet, Server, pool_config
from tests.replicas.logbook import Answered, read

RATE = 120.0
"""New calls a second: little, since a test is not a benchmark, and runs beside others."""
MIX = "varied=8,doubled=1,released=1,renewed=1"


def now() -> int:
    """Monotonic µs, as in the clients' logs."""
    return time.monotonic_ns() // 1_000


@dataclass
class Scene:
    """What is on."""

    fleet: Fleet
    clients: Clients
    connect: Connect
    """To the store, past every fault."""
    deeds: list[int] = field(default_factory=list)

    def deed(self) -> int:
        """Something is done now."""
        self.deeds.append(now())
        return self.deeds[-1]

    def flowing(self, pairs: int = 60, seconds: float = 20.0) -> float:
        """Until so many more pairs are done. How long that took, seconds."""
        began, goal = time.monotonic(), self.clients.pairs + pairs
        self.clients.wait(lambda: self.clients.pairs >= goal, f"{pairs} more pairs\n{self.fleet.tails()}", seconds)
        return time.monotonic() - began

    def away(self) -> int:
        """How often a server has said so far that it cannot answer now."""
        return sum(count for what, count in self.clients.notes.items() if what.startswith(("item: ", "denial: ")))

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{self.fleet.tails()}"
            time.sleep(0.02)

    def stored(self) -> Stored:
        """The whole journal, as the store holds it."""
        client = self.connect()
        try:
            records = read_log(client)
        finally:
            client.close()
        epoch = int.from_bytes(records[-1][1][40:48], "big") if records else 0
        return Stored(LEDGER, records, None, epoch)

    def finish(self, *, may_fail: bool = False) -> Judgement:
        """No new calls; then every answer against the journal, and every settlement asked for once more."""
        logs = self.clients.stop()
        judgement = judge(logs, self.stored(), may_fail=may_fail)
        judgement.faults += conserved(judgement)
        judgement.faults += self.ask_again(judgement.entries)
        judgement.faults += self.fleet.faults()
        return judgement

    def stop_and_read(self) -> list[Answered]:
        """No new calls; everything that the clients wrote down."""
        return list(read(self.clients.stop()))

    def ask_again(self, entries: Sequence[Answered]) -> list[str]:
        """Of every server that runs."""
        return [fault for server in self.fleet.awake()[:1] for fault in forgotten(server.address, entries)]

    def others(self, server: Server) -> list[Server]:
        return [each for each in self.fleet.servers if each is not server]


@contextlib.contextmanager
def scene(
    folder: Path,
    urls: str | Sequence[str],
    connect: Connect,
    *,
    servers: int = 3,
    limits: dict[str, Any] | None = None,
    more: str = "",
    rate: float = RATE,
    mix: str = MIX,
    seed: int = 1,
    own: Sequence[str] = (),
    module: str = KEEPING,
    **options: Any,
) -> Iterator[Scene]:
    """A fleet with an owner, and callers who are being answered."""
    config = pool_config(limits or AMPLE, more)
    with (
        Fleet(folder, servers, config, urls, own=own, module=module) as fleet,
        Clients(folder, fleet.addresses, seed=seed, mix=mix, **options) as clients,
    ):
        clients.rate(rate)
        found = Scene(fleet, clients, connect)
        found.flowing(60)
        yield found
