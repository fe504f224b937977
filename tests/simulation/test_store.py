"""The simulated store does what the real one's scripts do, where the pure rules of a head say nothing."""

from __future__ import annotations

import msgspec
import pytest

from paceline.ledger.journal import StoreUnavailable, genesis
from paceline.ledger.lease import Claim
from tests.simulation.loop import Process
from tests.simulation.store import SimCommands
from tests.simulation.world import World


def test_a_snapshot_of_which_a_failover_has_lost_parts_does_not_count() -> None:
    world = World(1)
    process = Process("node-0/1")
    commands = SimCommands(world.store, "node-0", process)
    seen: list[str] = []

    async def write() -> None:
        lineage = await commands.lineage()
        claim = Claim("node-0", "node-0", b"n" * 16, 3_000_000, lineage, genesis("acme"), 1, 1)
        head = (await commands.acquire("acme", claim)).head
        assert head is not None
        await commands.put_chunk("acme", "whole", 0, b"first")
        world.store.fail_over(world.loop.now - world.store.primary.effects[-1][0] + 1)
        await commands.put_chunk("acme", "whole", 1, b"second")
        new = msgspec.structs.replace(head, snapshot="whole", snapshot_chunks=2)
        with pytest.raises(StoreUnavailable, match="parts"):
            await commands.keep_snapshot("acme", head.epoch, head.nonce, "whole", 0, 0, b"", b"", 2, 0)
        with pytest.raises(StoreUnavailable, match="parts"):
            await commands.reassert("acme", head, new, ())
        assert (await commands.head("acme")).head == head
        await commands.put_chunk("acme", "whole", 0, b"first")
        kept = (await commands.keep_snapshot("acme", head.epoch, head.nonce, "whole", 0, 0, b"", b"", 2, 0)).head
        assert kept is not None
        seen.append(kept.snapshot)
        seen.append(str(await commands.get_chunks("acme", "whole", 0, 9)))

    world.loop.at(0, lambda: world.loop.create_task(write()), context=process.context)
    world.loop.advance(10_000_000)
    assert seen == ["whole", "[b'first', b'second']"], world.loop.lost()
    world.loop.close()
