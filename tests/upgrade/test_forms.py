"""Up to the next version of the journal, back, and up for good: what each version reads of the other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from paceline.engine import events as ev
from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Committed, Granted
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import Candidate, Commit, DefinePool, Disposition, Outcome, Reserve
from paceline.engine.state import FORMAT, FoldError, State
from paceline.ledger.clock import ManualClock
from paceline.ledger.errors import LedgerStopped
from paceline.ledger.journal import Journal, StoreVersion
from paceline.ledger.machine import EngineMachine
from paceline.ledger.owner import Owner
from paceline.ledger.shared import SharedJournal, Terms
from paceline.ledger.sqlite import SqliteStore
from tests.ledger.model_store import ModelCommands, ModelStore
from tests.upgrade.next_version import NEXT, NextMachine, NextState

SECOND = 1_000_000
TOKENS = Dimension.INPUT_TOKENS
POOL = DefinePool(
    "p",
    Profile("one", (Rule(TOKENS, hold_input=1_000, settle_input=1_000),)),
    (Limit(TOKENS, Window.MINUTE, 6_000),),
)
USED = Outcome(Disposition.SUCCEEDED, Usage(input_tokens=70), UsageKind.FINAL)


def reserve(key: str) -> Reserve:
    return Reserve(key, (Candidate("p", estimate=Estimate(input_tokens=100)),))


class Site:
    """One shared store, and one process at a time that owns its ledger."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = ModelStore(self.clock.monotonic)
        self.lives = 0
        self._ticking: asyncio.Task[None] | None = None

    async def _tick(self) -> None:
        """Time goes on, a millisecond a turn of the loop."""
        while True:
            self.clock.advance(1_000)
            await asyncio.sleep(0)

    async def own(self, machine: EngineMachine) -> Owner:
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())
        self.lives += 1
        terms = Terms(f"node-{self.lives}", "", machine.form)
        journal = SharedJournal("acme", ModelCommands(self.store), terms, clock=self.clock)
        owner = Owner("acme", journal, machine=machine, clock=self.clock)
        await owner.start()
        return owner

    @property
    def form(self) -> int:
        return self.store.heads["acme"].form


def engine_of(owner: Owner) -> Engine:
    assert isinstance(owner.engine, Engine)
    return owner.engine


async def work(owner: Owner, name: str) -> None:
    """One call that settles, one that stays open."""
    for part in ("done", "open"):
        assert isinstance(await owner.call(reserve(f"{name}/{part}")), Granted)
    assert isinstance(await owner.call(Commit(f"{name}/done", USED)), Committed)


async def test_up_and_back_and_up_for_good() -> None:
    site = Site()
    names = []
    owner = await site.own(EngineMachine())
    await owner.call(POOL)
    # Each time by a record behind the snapshot, then by the snapshot of an orderly end.
    for number, machine in enumerate((EngineMachine(), NextMachine(), EngineMachine(), NextMachine())):
        await owner.stop(1)
        owner = await site.own(machine)
        await work(owner, f"life-{number}")
        names.append(f"life-{number}")
        for name in names:
            again = await owner.call(Commit(f"{name}/done", USED))
            assert isinstance(again, Committed)
            assert again.duplicate
            assert isinstance(await owner.call(reserve(f"{name}/open")), Granted)
        assert site.form == FORMAT
        assert len(engine_of(owner).state.open) == len(names)

    state = engine_of(owner).state
    assert isinstance(state, NextState)
    assert state.noted == 0
    await owner.finalize(NEXT)
    assert site.form == NEXT
    await work(owner, "final")
    assert state.noted == 2
    await owner.stop(1)

    with pytest.raises(StoreVersion, match="run a newer version") as refused:
        await site.own(EngineMachine())
    assert "\n" not in str(refused.value)
    owner = await site.own(NextMachine())
    state = engine_of(owner).state
    assert isinstance(state, NextState)
    assert state.noted == 2
    assert len(state.open) == len(names) + 1
    await owner.stop(1)


async def test_an_owner_that_died_is_followed_by_the_version_before() -> None:
    """No snapshot: the records alone, and those of a form that may not be written yet are not among them."""
    site = Site()
    owner = await site.own(EngineMachine())
    await owner.call(POOL)
    await owner.stop(1)
    died = await site.own(NextMachine())
    await work(died, "died")
    site.clock.advance(60 * SECOND)
    owner = await site.own(EngineMachine())
    assert list(engine_of(owner).state.open) == ["died/open"]
    assert engine_of(owner).form == FORMAT
    await owner.stop(1)
    await died.stop(0)


async def test_a_form_that_is_not_known_cannot_be_finalized() -> None:
    site = Site()
    owner = await site.own(EngineMachine())
    with pytest.raises(ValueError, match="this version knows"):
        await owner.finalize(NEXT)
    assert site.form == FORMAT
    await owner.stop(1)


@pytest.mark.parametrize("orderly", [True, False])
async def test_an_embedded_ledger_tells_the_version_before_what_to_do(tmp_path: Path, orderly: bool) -> None:
    """It has one version, which writes its own form from the first: going back needs a backup."""
    clock = ManualClock()

    async def own(machine: EngineMachine) -> tuple[SqliteStore, Owner]:
        store = SqliteStore(tmp_path / "books.db")
        await store.open()
        journal: Journal = store.journal("acme")
        return store, Owner("acme", journal, machine=machine, clock=clock)

    store, owner = await own(EngineMachine())
    await owner.start()
    await owner.call(POOL)
    await owner.stop(1)
    await store.close()
    store, owner = await own(NextMachine())
    await owner.start()
    await work(owner, "next")
    if orderly:
        await owner.stop(1)
    await store.close()
    store, owner = await own(EngineMachine())
    with pytest.raises(LedgerStopped, match="run the version that wrote it, or restore the store from a backup"):
        await owner.start()
    await store.close()


def test_dumps_are_of_the_form_that_is_asked_for() -> None:
    engine = NextMachine().decider("acme", NextState("acme"))
    engine.step(SECOND, [(1, POOL), (2, reserve("a"))])
    state = engine.state
    assert isinstance(state, NextState)
    assert state.noted == 1
    old, new = list(state.dump(FORMAT)), list(state.dump())
    assert (NextState.format_of(old[0]), NextState.format_of(new[0])) == (FORMAT, NEXT)
    assert State.restore(old).digest() == State.restore(old).digest()
    assert list(State.restore(old).dump()) == old
    assert NextState.restore(new).noted == 1
    with pytest.raises(FoldError, match=f"format {NEXT}"):
        State.restore(new)
    for wrong in (FORMAT - 1, NEXT + 1):
        with pytest.raises(ValueError, match="snapshots"):
            next(state.dump(wrong))
    with pytest.raises(ValueError, match="snapshots"):
        next(State("acme").dump(NEXT))


def test_nothing_new_is_written_before_the_upgrade_is_final() -> None:
    machine = NextMachine()
    engine = machine.decider("acme", NextState("acme"), form=FORMAT)
    step = engine.step(SECOND, [(1, POOL), (2, reserve("a"))])
    assert ev.decode(machine.encode(step.events)) == step.events
    engine.form = NEXT
    step = engine.step(SECOND, [(1, reserve("b"))])
    assert type(step.events[-1]).__name__ == "Noted"
    assert machine.decode(machine.encode(step.events)) == step.events
