"""Several processes and one store, in one event loop on one clock: who owns, who follows, and what survives."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Answer, Committed, Granted
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.operations import Candidate, Commit, DefinePool, Disposition, Operation, Outcome, Reserve
from paceline.engine.state import State
from paceline.ledger.clock import ManualClock
from paceline.ledger.commands import NodeInfo
from paceline.ledger.errors import LedgerError, LedgerMoved, LedgerUnavailable
from paceline.ledger.journal import StoreError, StoreUnavailable
from paceline.ledger.keeper import Keeper, Where
from paceline.ledger.machine import EngineMachine
from paceline.ledger.options import OwnerOptions, Phase
from paceline.ledger.owner import Owner
from paceline.ledger.shared import Terms
from tests.ledger.model_store import ModelCommands, ModelStore

PROFILE = Profile(
    "tokens",
    (
        Rule(Dimension.REQUESTS, hold_requests=1_000, settle_requests=1_000),
        Rule(Dimension.INPUT_TOKENS, hold_input=1_000, settle_input=1_000),
    ),
)
POOL = DefinePool(
    "pool",
    PROFILE,
    (Limit(Dimension.REQUESTS, Window.MINUTE, 600), Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 60_000)),
)
CALL = Candidate("pool", (), Estimate(1, 100, 0, 0, 0))
USED = Outcome(Disposition.SUCCEEDED, Usage(1, 90, 0, 0, 0), UsageKind.FINAL)


class Fleet:
    """Some processes. ``told`` is what deposed owners had to tell."""

    def __init__(self, options: OwnerOptions | None = None) -> None:
        self.options = OwnerOptions(gather_us=0) if options is None else options
        self.clock = ManualClock()
        self.store = ModelStore(self.clock.wall)
        self.keepers: dict[str, Keeper] = {}
        self.cut: set[str] = set()
        """Processes that cannot reach the store."""
        self.told: list[Operation] = []
        self.failing: list[tuple[str, StoreError]] = []
        """Commands that fail, once each, whoever gives them."""
        self._numbers = itertools.count(1)

    async def add(self, name: str, form: int = 2) -> Keeper:
        def fault(command: str, done: bool) -> None:
            if name in self.cut:
                raise StoreUnavailable("cut off")
            for number, (which, error) in enumerate(self.failing):
                if which == command:
                    del self.failing[number]
                    raise error

        def told(_: str, operations: Sequence[Operation]) -> None:
            self.told += operations

        keeper = Keeper(
            NodeInfo(name, f"{name}:1", "1", form, self.clock.wall()),
            ModelCommands(self.store, fault),
            EngineMachine(),
            Terms(name, f"{name}:1", form),
            on_change=lambda _: None,
            on_testimony=told,
            clock=self.clock,
            owner_options=self.options,
            nonce=lambda: next(self._numbers).to_bytes(16, "big"),
        )
        self.keepers[name] = keeper
        await keeper.start(["a"])
        return keeper

    def kill(self, name: str) -> None:
        """As SIGKILL does: nothing of it runs any more."""
        keeper = self.keepers.pop(name)
        entry = keeper._entries["a"]
        for task in (entry.task, keeper._announcing):
            if task is not None:
                task.cancel()
        owner = entry.owner
        if owner is not None:
            for each in (owner._appender, owner._beating):
                if each is not None:
                    each.cancel()

    def pause(self, name: str) -> Keeper:
        """As SIGSTOP does, as far as others can see."""
        self.cut.add(name)
        return self.keepers[name]

    async def run(self, seconds: float) -> None:
        for _ in range(int(seconds * 100)):
            self.clock.advance(10_000)
            for _ in range(12):
                await asyncio.sleep(0)

    @property
    def owners(self) -> list[str]:
        return [name for name, keeper in self.keepers.items() if keeper.where("a").owner is not None]

    @property
    def owner(self) -> Owner:
        (name,) = self.owners
        owner = self.keepers[name].where("a").owner
        assert owner is not None
        return owner

    async def call(self, operation: Operation, owner: Owner | None = None) -> Answer:
        task = asyncio.create_task((owner or self.owner).call(operation))
        for _ in range(400):
            if task.done():
                break
            await self.run(0.01)
        return await task

    async def grant(self, key: str) -> Granted:
        answer = await self.call(Reserve(key, (CALL,)))
        assert isinstance(answer, Granted)
        return answer


@asynccontextmanager
async def three(options: OwnerOptions | None = None) -> AsyncIterator[Fleet]:
    """Three processes, of which one owns a ledger with a pool."""
    fleet = Fleet(options)
    for name in ("one", "two", "three"):
        await fleet.add(name)
    await fleet.run(3)
    await fleet.call(POOL)
    yield fleet
    for name in list(fleet.keepers):
        fleet.kill(name)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with three() as fleet:
        yield fleet


def state_of(owner: Owner) -> State:
    assert isinstance(owner._books, State)
    return owner._books


async def test_one_process_owns_and_one_follows(fleet: Fleet) -> None:
    await fleet.grant("k")
    await fleet.run(1)
    (name,) = fleet.owners
    warm = [each for each, keeper in fleet.keepers.items() if keeper.info.warm]
    assert len(warm) == 1
    assert warm != [name]
    assert {keeper.where("a").node for keeper in fleet.keepers.values()} == {name}


async def test_a_killed_owner_is_followed_when_its_lease_ends(fleet: Fleet) -> None:
    grant = await fleet.grant("k")
    await fleet.call(Reserve("second", (CALL,)))
    await fleet.call(Commit("second", USED))
    (name,) = fleet.owners
    fleet.kill(name)
    await fleet.run(2)
    assert fleet.owners == []
    await fleet.run(2)
    state = state_of(fleet.owner)
    assert set(state.open) == {"k"}
    assert "second" in state.ended
    answer = await fleet.call(Commit("k", USED, grant.context))
    assert isinstance(answer, Committed)
    assert not answer.late


async def test_a_dead_owner_need_not_be_waited_for(fleet: Fleet) -> None:
    await fleet.grant("k")
    await fleet.run(1)
    (name,) = fleet.owners
    epoch = fleet.owner.epoch
    fleet.kill(name)
    for keeper in fleet.keepers.values():
        keeper.suspect("a", epoch)
    await fleet.run(0.1)
    assert fleet.owner.epoch == epoch + 1
    assert set(state_of(fleet.owner).open) == {"k"}


async def test_who_was_found_dead_at_another_primary_says_nothing_of_this_one(fleet: Fleet) -> None:
    """There an epoch may be another owner's: its number alone does not tell."""
    await fleet.grant("k")
    await fleet.run(1)
    owner = fleet.owner
    fleet.store.lose("a", 0)
    for keeper in fleet.keepers.values():
        keeper.suspect("a", owner.epoch)
    await fleet.run(5)
    assert fleet.owner is owner
    assert owner.epoch == fleet.store.heads["a"].epoch
    assert fleet.store.heads["a"].lineage == fleet.store.primary


async def test_a_lease_that_ended_before_the_primary_changed_is_no_sign_that_its_owner_is_gone(fleet: Fleet) -> None:
    """The store took no writes for longer than a lease, and then fails over: the owner comes to the new one first."""
    await fleet.grant("k")
    await fleet.run(1)
    owner = fleet.owner
    fleet.cut.update(fleet.keepers)
    await fleet.run(6)
    fleet.store.lose("a", 0)
    fleet.cut.clear()
    await fleet.run(3)
    assert fleet.owner is owner
    assert owner.phase is Phase.SERVING


async def test_a_paused_owner_is_deposed_and_grants_nothing_more(fleet: Fleet) -> None:
    (name,) = fleet.owners
    old = fleet.owner
    fleet.pause(name)
    await fleet.run(5)
    new = [each for each in fleet.owners if each != name]
    assert len(new) == 1
    fleet.cut.clear()
    with pytest.raises(LedgerUnavailable):
        await fleet.call(Reserve("k", (CALL,)), old)
    await fleet.run(1)
    assert old.phase is Phase.DEPOSED
    assert fleet.owners == new
    assert "k" not in state_of(fleet.owner).open


async def test_denials_need_the_lease_too(fleet: Fleet) -> None:
    (name,) = fleet.owners
    old = fleet.owner
    await fleet.call(Reserve("large", (Candidate("pool", (), Estimate(1, 10**7, 0, 0, 0)),)))
    fleet.pause(name)
    await fleet.run(5)
    # One more look at what changes nothing: it must ask the store before it says no.
    asked = asyncio.create_task(old.call(Reserve("large", (Candidate("pool", (), Estimate(1, 10**7, 0, 0, 0)),))))
    fleet.cut.clear()
    await fleet.run(1)
    with pytest.raises(LedgerMoved):
        await asked


async def test_a_planned_change_is_quick(fleet: Fleet) -> None:
    await fleet.grant("k")
    await fleet.run(1)
    (name,) = fleet.owners
    keeper = fleet.keepers.pop(name)
    old = fleet.owner if fleet.owners else keeper.where("a").owner
    assert old is not None
    await fleet.call(Reserve("most", (Candidate("pool", (), Estimate(550, 1, 0, 0, 0)),)), old)
    waiting = asyncio.create_task(
        old.call(Reserve("w", (Candidate("pool", (), Estimate(400, 1, 0, 0, 0)),), max_wait_us=10**8))
    )
    await fleet.run(0.05)
    stopping = asyncio.create_task(keeper.stop(5))
    began = fleet.clock.monotonic()
    moved_at = 0
    while not fleet.owners:
        await fleet.run(0.01)
        if old.phase is not Phase.SERVING and not moved_at:
            moved_at = fleet.clock.monotonic()
    assert fleet.clock.monotonic() - moved_at < 100_000
    assert fleet.clock.monotonic() - began < 3_000_000
    with pytest.raises(LedgerError):
        await waiting
    assert set(state_of(fleet.owner).open) == {"k", "most"}
    assert fleet.keepers[fleet.owners[0]].statistics.take_overs == 0
    await fleet.run(1)
    await stopping


async def test_what_a_failover_lost_is_put_back(fleet: Fleet) -> None:
    for number in range(5):
        await fleet.grant(f"k{number}")
    fleet.store.lose("a", 3)
    assert fleet.store.heads["a"].seq < fleet.owner.sequence
    await fleet.grant("after")
    records = fleet.store.records["a"]
    assert [record.seq for record in records] == list(range(records[0].seq, fleet.owner.sequence + 1))
    await fleet.run(3)
    assert len(fleet.owners) == 1
    (name,) = fleet.owners
    fleet.kill(name)
    await fleet.run(6)
    assert set(state_of(fleet.owner).open) == {"after", *(f"k{number}" for number in range(5))}


async def test_an_empty_store_gets_the_books_back(fleet: Fleet) -> None:
    for number in range(5):
        await fleet.grant(f"k{number}")
    (name,) = fleet.owners
    fleet.store.wipe()
    await fleet.grant("after")
    assert fleet.owners == [name]
    await fleet.run(2)
    fleet.kill(name)
    await fleet.run(6)
    assert set(state_of(fleet.owner).open) == {"after", *(f"k{number}" for number in range(5))}


async def test_the_winner_hears_of_what_the_store_lost(fleet: Fleet) -> None:
    (name,) = fleet.owners
    old = fleet.owner
    await fleet.grant("kept")
    fleet.pause(name)
    fleet.cut.clear()
    for number in range(3):
        await fleet.grant(f"lost{number}")
    fleet.cut.add(name)
    fleet.store.lose("a", 3)
    await fleet.run(8)
    (new,) = [each for each in fleet.owners if each != name]
    assert set(state_of_keeper(fleet.keepers[new]).open) == {"kept"}
    fleet.cut.clear()
    await fleet.run(3)
    assert old.phase is Phase.DEPOSED
    assert len(fleet.told) == 3
    for operation in fleet.told:
        await fleet.call(operation)
    assert set(state_of(fleet.owner).open) == {"kept", "lost0", "lost1", "lost2"}


async def test_the_heir_puts_back_what_the_store_and_the_owner_have_lost(fleet: Fleet) -> None:
    for number in range(5):
        await fleet.grant(f"k{number}")
    await fleet.run(0.2)
    (name,) = fleet.owners
    fleet.kill(name)
    fleet.store.lose("a", 3)
    await fleet.run(8)
    assert set(state_of(fleet.owner).open) == {f"k{number}" for number in range(5)}


async def test_the_heir_puts_the_books_back_into_an_empty_store(fleet: Fleet) -> None:
    for number in range(5):
        await fleet.grant(f"k{number}")
    await fleet.run(0.2)
    (name,) = fleet.owners
    fleet.kill(name)
    fleet.store.wipe()
    await fleet.run(8)
    assert set(state_of(fleet.owner).open) == {f"k{number}" for number in range(5)}
    sequence = fleet.owner.sequence
    await fleet.grant("after")
    assert fleet.owner.sequence > sequence


async def test_an_heir_whose_claim_fails_keeps_its_books(fleet: Fleet) -> None:
    for number in range(5):
        await fleet.grant(f"k{number}")
    await fleet.run(0.2)
    (name,) = fleet.owners
    fleet.kill(name)
    fleet.store.lose("a", 3)
    fleet.failing = [("acquire", StoreUnavailable("the primary has changed"))] * 2
    await fleet.run(10)
    assert not fleet.failing
    assert set(state_of(fleet.owner).open) == {f"k{number}" for number in range(5)}


@pytest.mark.parametrize("command", ["append", "renew"])
async def test_a_living_owner_keeps_its_books_whatever_the_store_says(fleet: Fleet, command: str) -> None:
    await fleet.grant("k")
    owner = fleet.owner
    fleet.store.lose("a", 1)
    fleet.failing = [(command, StoreError("WRONGPASS"))] * 2
    await fleet.grant("after")
    await fleet.run(2)
    assert fleet.owner is owner
    assert owner.phase is Phase.SERVING
    assert set(state_of(owner).open) == {"k", "after"}


async def test_books_that_do_not_arrive_whole_are_sent_again(fleet: Fleet) -> None:
    for number in range(3):
        await fleet.grant(f"k{number}")
    fleet.store.wipe()
    fleet.failing = [("put_chunk", StoreUnavailable("slow")), ("reassert", StoreUnavailable("slow"))]
    await asyncio.gather(*(fleet.grant(f"after{number}") for number in range(3)))
    (name,) = fleet.owners
    await fleet.run(1)
    fleet.kill(name)
    await fleet.run(8)
    keys = {f"k{number}" for number in range(3)} | {f"after{number}" for number in range(3)}
    assert set(state_of(fleet.owner).open) == keys


async def test_whoever_began_with_nothing_is_told_everything(fleet: Fleet) -> None:
    (name,) = fleet.owners
    old = fleet.owner
    for number in range(3):
        await fleet.grant(f"k{number}")
    await fleet.run(0.2)
    # Nobody has followed, and nobody remembers.
    for keeper in fleet.keepers.values():
        keeper._entries["a"].fold = None
        keeper._entries["a"].highest = 0
    fleet.pause(name)
    fleet.store.wipe()
    await fleet.run(8)
    (new,) = [each for each in fleet.owners if each != name]
    assert not state_of_keeper(fleet.keepers[new]).open
    fleet.cut.clear()
    await fleet.run(3)
    assert old.phase is Phase.DEPOSED
    await fleet.call(POOL)
    for operation in fleet.told:
        await fleet.call(operation)
    assert set(state_of(fleet.owner).open) == {f"k{number}" for number in range(3)}


async def test_a_store_that_is_away_is_waited_for(fleet: Fleet) -> None:
    await fleet.grant("k")
    for name in fleet.keepers:
        fleet.cut.add(name)
    asked = asyncio.create_task(fleet.owner.call(Reserve("during", (CALL,))))
    await fleet.run(4)
    with pytest.raises(LedgerUnavailable):
        await asked
    fleet.cut.clear()
    await fleet.run(3)
    assert fleet.owner.phase is Phase.SERVING
    again = await fleet.grant("during")
    assert again.keys == ("during",)


def state_of_keeper(keeper: Keeper) -> State:
    where: Where = keeper.where("a")
    assert where.owner is not None
    return state_of(where.owner)
