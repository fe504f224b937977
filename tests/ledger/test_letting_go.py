"""An owner that cannot let go, and a store that loses a ledger twice: nobody throws away what only they know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from paceline.engine import events as ev
from paceline.engine.accounting import Estimate
from paceline.engine.operations import Candidate, Reserve
from paceline.ledger.commands import Stamped
from paceline.ledger.errors import LedgerMoved
from paceline.ledger.fold import decode_payload
from paceline.ledger.journal import StoreUnavailable
from paceline.ledger.machine import EngineMachine
from paceline.ledger.options import Phase
from tests.ledger.test_keeper import Fleet, state_of, three

KEYS = {f"k{number}" for number in range(5)}
LARGE = Candidate("pool", (), Estimate(1, 10**7, 0, 0, 0))


@pytest.fixture
async def replicas() -> AsyncIterator[Fleet]:
    """Three processes; the ledger has some grants, and one process has followed them."""
    async with three() as fleet:
        for key in sorted(KEYS):
            await fleet.grant(key)
        await fleet.run(1)
        yield fleet


def strike(fleet: Fleet, how: str) -> None:
    """When the owner next lets go, something goes wrong."""
    (name,) = fleet.owners
    commands = fleet.keepers[name]._commands
    release = commands.release

    async def struck(*args: Any) -> Stamped:
        commands.release = release  # type: ignore[method-assign]
        if how == "the store is emptied":
            fleet.store.wipe()
            return await release(*args)
        if how == "the answer is lost":
            await release(*args)
        raise StoreUnavailable("no answer in time")

    commands.release = struck  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("how", ["the request is lost", "the answer is lost", "the store is emptied"])
async def test_whoever_cannot_let_go_keeps_its_books(replicas: Fleet, how: str) -> None:
    (name,) = replicas.owners
    # Nobody else has them.
    for keeper in replicas.keepers.values():
        keeper._entries["a"].fold = None
    strike(replicas, how)
    assert await replicas.keepers[name].hand_over("a") == ""
    assert replicas.owner.phase is Phase.SERVING
    if how != "the store is emptied":
        replicas.store.wipe()
    await replicas.run(8)
    assert replicas.owners == [name]
    await replicas.grant("after")
    assert set(state_of(replicas.owner).open) == {"after", *KEYS}
    assert await replicas.keepers[name].hand_over("a") != ""


async def test_whoever_does_not_know_whether_it_let_go_asks_before_it_answers(replicas: Fleet) -> None:
    """The successor may take over at once, without the end of a lease."""
    (name,) = replicas.owners
    old = replicas.owner
    strike(replicas, "the answer is lost")
    assert await replicas.keepers[name].hand_over("a") == ""
    assert old.phase is Phase.SERVING
    await replicas.run(0.5)
    with pytest.raises(LedgerMoved):
        await replicas.call(Reserve("large", (LARGE,)), old)
    await replicas.run(1)
    assert len(replicas.owners) == 1
    assert replicas.owners != [name]
    assert set(state_of(replicas.owner).open) == KEYS


async def test_after_another_record_an_owner_may_rest_on_its_lease_again(replicas: Fleet) -> None:
    (name,) = replicas.owners
    old = replicas.owner
    strike(replicas, "the request is lost")
    assert await replicas.keepers[name].hand_over("a") == ""
    assert old._shared is not None
    assert not old._shared.is_fresh()
    await replicas.grant("after")
    assert replicas.owner is old
    assert old._shared.is_fresh()


async def test_a_process_that_stops_and_cannot_hand_over_lets_go_all_the_same(replicas: Fleet) -> None:
    (name,) = replicas.owners
    old = replicas.owner
    strike(replicas, "the request is lost")
    keeper = replicas.keepers.pop(name)
    stopping = asyncio.create_task(keeper.stop(5))
    await replicas.run(3)
    assert old.phase is Phase.STOPPED
    assert stopping.done()
    # Sooner than its lease would have ended.
    assert set(state_of(replicas.owner).open) == KEYS


async def test_who_knows_nothing_of_a_ledger_lets_others_go_first_each_time_that_it_is_lost(replicas: Fleet) -> None:
    (name,) = replicas.owners
    (heir,) = [each for each, keeper in replicas.keepers.items() if keeper._entries["a"].fold is not None]
    (other,) = set(replicas.keepers) - {name, heir}
    # It has found the store empty once before, and not seen that the owner put the ledger back.
    entry = replicas.keepers[other]._entries["a"]
    entry.empty_since, entry.empty_at = replicas.clock.wall() - 10_000_000, "another"
    epoch = replicas.owner.epoch
    replicas.store.wipe()
    replicas.kill(name)
    for keeper in replicas.keepers.values():
        keeper.suspect("a", epoch)
    replicas.cut.add(heir)
    await replicas.run(0.25)
    replicas.cut.clear()
    await replicas.run(3)
    assert replicas.owners == [heir]
    assert set(state_of(replicas.owner).open) == KEYS


async def test_an_heir_who_puts_the_books_back_debits_what_may_be_lost(replicas: Fleet) -> None:
    (name,) = replicas.owners
    replicas.kill(name)
    replicas.store.wipe()
    await replicas.run(8)
    assert set(state_of(replicas.owner).open) == KEYS
    machine = EngineMachine()
    epoch = replicas.owner.epoch
    first = next(record for record in replicas.store.records["a"] if record.epoch == epoch)
    events = [event for payload in decode_payload(first.payload) for event in machine.decode(payload)]
    debits = [event.adjusted for event in events if isinstance(event, ev.Corrected)]
    assert debits
    assert max(debits) < 0
