"""What it costs to follow a ledger, and to begin as its owner: no snapshot is read or written without need."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from paceline.engine.answers import Committed
from paceline.engine.endings import PAGE_ENTRIES
from paceline.engine.events import Tombstoned
from paceline.engine.operations import Commit
from paceline.engine.state import State
from paceline.ledger.clock import ManualClock
from paceline.ledger.fold import Fold, paced
from paceline.ledger.machine import EngineMachine
from paceline.ledger.options import OwnerOptions
from tests.ledger.model_store import ModelCommands
from tests.ledger.test_keeper import USED, Fleet, state_of, three

EVENTS = 60
"""Behind which a snapshot is due."""


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with three(OwnerOptions(gather_us=0, snapshot_events=EVENTS)) as fleet:
        yield fleet


async def pair(fleet: Fleet, key: str) -> None:
    grant = await fleet.grant(key)
    assert isinstance(await fleet.call(Commit(key, USED, grant.context)), Committed)


async def until_snapshot(fleet: Fleet) -> None:
    """Calls until the owner has written its second snapshot, and the heirs know of it."""
    owner = fleet.owner
    for number in range(10 * EVENTS):
        if owner.statistics.snapshots == 2:
            break
        await pair(fleet, f"call {owner.epoch} {number}")
    assert owner.statistics.snapshots == 2
    await fleet.run(2)


async def test_an_heir_does_not_begin_with_a_snapshot_that_the_owner_before_has_written(fleet: Fleet) -> None:
    put, begun, on = ModelCommands.put_chunk, asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any) -> None:
        # Long enough for the heirs to have folded more than the snapshot has.
        begun.set()
        await on.wait()
        await put(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ModelCommands, "put_chunk", slow)
        while not begun.is_set():
            await pair(fleet, f"call {fleet.owner.sequence}")
        await pair(fleet, "last")
        await fleet.run(1)
        assert fleet.owner.statistics.snapshots == 0
        on.set()
        await fleet.run(1)
    assert fleet.owner.statistics.snapshots == 1
    (before,) = fleet.owners
    assert await fleet.keepers[before].hand_over("a")
    await fleet.run(1)
    assert fleet.owners != [before]
    fleet.store.calls.clear()
    await pair(fleet, "after")
    await fleet.run(1)
    assert fleet.owner.statistics.snapshots == 0
    assert "put_chunk" not in fleet.store.calls
    # Once it is due, it comes.
    await until_snapshot(fleet)


async def test_an_owner_that_hands_over_follows_with_the_books_that_it_has(fleet: Fleet) -> None:
    await until_snapshot(fleet)
    fleet.kill(next(name for name in fleet.keepers if name not in fleet.owners))
    await fleet.run(4)
    await pair(fleet, "warm")
    await fleet.run(2)
    (before,) = fleet.owners
    fleet.store.calls.clear()
    assert await fleet.keepers[before].hand_over("a")
    await fleet.run(1)
    await pair(fleet, "after")
    await fleet.run(2)
    keeper = fleet.keepers[before]
    assert fleet.owners != [before]
    assert "get_chunks" not in fleet.store.calls
    fold = keeper._entries["a"].fold
    assert keeper._entries["a"].warm
    assert fold is not None
    assert list(fold.books.dump()) == list(state_of(fleet.owner).dump())
    # It gets the ledger back with all that happened meanwhile.
    assert await fleet.keepers[fleet.owners[0]].hand_over("a") == before
    await fleet.run(1)
    assert fleet.owners == [before]
    assert "after" in state_of(fleet.owner).ended
    await pair(fleet, "again")


class Slow(ManualClock):
    """Every look at it takes a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.slept = 0

    def monotonic(self) -> int:
        self.advance(1_000)
        return super().monotonic()

    async def sleep_until(self, when: int) -> None:
        self.slept += when - super().monotonic()


@pytest.mark.parametrize(("share", "least", "most"), [(None, 0, 0), (0.25, 250_000, 350_000)])
async def test_what_nobody_waits_for_leaves_the_loop_to_others(share: float | None, least: int, most: int) -> None:
    """A hundred pieces of a millisecond, within a quarter of the time."""
    clock = Slow()
    count = 0
    async for _ in paced(iter([b""] * 100), clock, lambda: share):
        count += 1
    assert count == 100
    assert least <= clock.slept <= most


async def test_the_share_may_change_meanwhile() -> None:
    """Who has to take over reads on at once."""
    clock, shares = Slow(), iter([0.25] * 10 + [None] * 1_000)
    async for _ in paced(iter([b""] * 100), clock, lambda: next(shares)):
        pass
    assert 20_000 <= clock.slept <= 40_000


async def test_a_snapshot_is_read_within_its_share(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads rests between chunks, and not once the ledger is needed."""
    await until_snapshot(fleet)
    head = fleet.store.heads["a"]
    keeper = fleet.keepers[fleet.owners[0]]
    journal = keeper.journal("a")
    assert journal is not None
    mark, chunks = await journal.snapshot_of(head)
    assert mark is not None
    rests: list[float] = []
    monkeypatch.setattr("paceline.ledger.fold.time.sleep", rests.append)
    for share in (0.25, None):
        rests.clear()
        fold = Fold("a", EngineMachine(), Slow())
        fold.share = lambda share=share: share  # type: ignore[misc]
        await fold.restore(mark, chunks)
        assert bool(rests) == (share is not None)
        assert fold.seq == mark.seq


async def test_who_asks_for_a_hand_over_waits_for_an_heir_that_is_warm(fleet: Fleet) -> None:
    """Not the callers."""
    await until_snapshot(fleet)
    (before,) = fleet.owners
    others = [name for name in fleet.keepers if name != before]
    for name in others:
        fleet.keepers[name]._entries["a"].warm = False
        fleet.keepers[name]._entries["a"].not_before = fleet.clock.monotonic() + 2_000_000
    await fleet.run(1)
    moving = asyncio.create_task(fleet.keepers[before].hand_over("a"))
    await fleet.run(0.5)
    assert not moving.done()
    await pair(fleet, "meanwhile")
    await fleet.run(3)
    assert await moving in others
    assert fleet.owners == [moving.result()]
    assert fleet.keepers[moving.result()].statistics.take_overs == 0


async def test_who_has_let_go_does_not_ask_for_what_it_has_given_to_another(fleet: Fleet) -> None:
    (before,) = fleet.owners
    await fleet.run(2)
    (after,) = [each for each in fleet.keepers if each != before and fleet.keepers[each]._entries["a"].warm]
    fleet.cut.add(after)
    fleet.store.calls.clear()
    assert await fleet.keepers[before].hand_over("a", after) == after
    await fleet.run(1)
    assert not fleet.owners
    assert "acquire" not in fleet.store.calls
    await fleet.run(6)
    assert len(fleet.owners) == 1


async def test_books_that_are_not_needed_go_in_pieces(fleet: Fleet) -> None:
    """At once, not when the collector of cycles finds them; but not all at once."""
    await until_snapshot(fleet)
    (name,) = [name for name, keeper in fleet.keepers.items() if keeper._entries["a"].fold is not None]
    keeper = fleet.keepers[name]
    fold = keeper._entries["a"].fold
    assert fold is not None
    books = fold.books
    assert isinstance(books, State)
    for number in range(5 * PAGE_ENTRIES):
        books.apply(Tombstoned(f"more {number}"))
    left = [len(books.ended._pages)]
    assert left[0] > 5
    # Somebody who comes before it is warm.
    keeper._entries["a"].warm = False
    keeper._keep_fold(keeper._entries["a"], None)
    while left[-1]:
        await asyncio.sleep(0)
        left.append(len(books.ended._pages))
    assert all(before - after <= 1 for before, after in itertools.pairwise(left))
    await fleet.run(2)
    assert not keeper._dissolving
    # It follows anew, with others.
    for _ in range(10):
        if not keeper._entries["a"].warm:
            await fleet.run(1)
    assert keeper._entries["a"].warm
    assert keeper._entries["a"].fold is not fold
