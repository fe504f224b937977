"""``python -m bench.replicas.paused``: the owner stands still (SIGSTOP) for longer than its lease, and goes on.

It must grant nothing after that, and write nothing: every grant that any caller was told is looked up in the journal,
which is recounted from its first record on, with the epoch that wrote it; no record of an epoch may follow one of a
later epoch.
"""

from __future__ import annotations

import time
from typing import Any

from bench.replicas.site import end, parser, say, site
from tests.proofs.recount import Recount
from tests.replicas.checks import conserved, judge
from tests.replicas.fleet import Clients
from tests.replicas.scene import MIX, now


class ByEpoch(Recount):
    """Which epoch wrote each grant."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.granted_by: dict[str, int] = {}

    def _on_grant(self, key: str, *more: Any) -> None:
        self.granted_by[key] = max(self.epochs)
        super()._on_grant(key, *more)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--times", type=int, default=20)
    asked.add_argument("--seconds", type=float, default=10.0, help="how long the owner stands still")
    asked.add_argument("--rate", type=float, default=200.0, help="calls a second")
    options = asked.parse_args()
    say(f"seed {options.seed}, 3 servers, one Redis, {options.times} pauses of {options.seconds:g} s")
    faults: list[str] = []
    resumed: list[tuple[int, int, int, int]] = []
    """Server, when, when the next pause began, the epoch that it had."""
    with (
        site() as on,
        Clients(
            on.folder, on.fleet.addresses, seed=options.seed, mix=MIX, max_wait=5, deadline=20, patience=1
        ) as clients,
    ):
        clients.rate(options.rate)
        clients.flowing(50)
        for _ in range(options.times):
            owner = on.owner()
            epoch = on.fleet.epoch()
            paused = time.monotonic()
            owner.pause()
            heir = on.fleet.wait_owner(but=owner, seconds=20)
            clients.flowing(50)
            time.sleep(max(0.0, paused + options.seconds - time.monotonic()))
            at = now()
            owner.resume()
            time.sleep(2.0)
            clients.flowing(50)
            owner.wait_healthy()
            if on.owner() is owner:
                faults.append(f"{owner.name} has the ledger of {heir.name} again, whom nobody troubled")
            resumed.append((owner.number, at, now(), epoch))
        logs = clients.stop()
        on.recorder.stop()
        stored = on.recorder.stored()
        judgement = judge(logs, stored)
        faults += judgement.faults + conserved(judgement) + on.fleet.faults()
    history = ByEpoch(stored.name)
    history.follow(stored)
    old = new = 0
    clean = 0
    for number, start, stop, epoch in resumed:
        wrong = 0
        for entry in judgement.entries:
            if entry.kind != "grant" or entry.server != number or not start <= entry.answered <= stop:
                continue
            by = history.granted_by.get(f"anonymous/{entry.id}", 0)
            if by > epoch:
                new += 1
            elif 0 < by <= epoch:
                # Decided and journalled before the pause; only its answer comes late.
                old += 1
            else:
                wrong += 1
        clean += not wrong
    say(
        f"answers of resumed servers: {new:,} grants of later owners that they passed on, {old:,} that they had "
        f"decided and journalled before they stood still; {judgement.recount.seq:,} records, epochs "
        f"{sorted(judgement.recount.epochs)}"
    )
    if clean < options.times:
        faults.append(f"only {clean} of {options.times} resumed owners granted nothing")
    end(faults, f"{clean} of {options.times} resumed owners granted nothing after losing the lease")


if __name__ == "__main__":
    main()
