"""The owner, over a scripted engine and a scripted journal."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from paceline.engine.answers import Invalid
from paceline.engine.operations import Release
from paceline.ledger.clock import ManualClock
from paceline.ledger.errors import LedgerBusy, LedgerDraining, LedgerFault, LedgerStopped, LedgerUnavailable
from paceline.ledger.journal import Mark, Record, StoreCorrupt, StoreUnavailable
from paceline.ledger.options import OwnerOptions, Phase
from paceline.ledger.owner import Owner
from paceline.ledger.sqlite import SqliteStore
from tests.ledger.journal_kit import read
from tests.ledger.scripted import Caller, Machine, ScriptedJournal, keys_of, settle


class World:
    """An owner with everything around it."""

    def __init__(self, options: OwnerOptions | None = None) -> None:
        self.journal = ScriptedJournal()
        self.machine = Machine()
        self.clock = ManualClock()
        self.phases: list[Phase] = []
        self.options = OwnerOptions() if options is None else options
        self.caller = Caller(self.journal)
        self.owner = self.make()

    def make(self) -> Owner:
        return Owner(
            "a",
            self.journal,
            machine=self.machine,
            clock=self.clock,
            options=self.options,
            on_phase=self.phases.append,
        )

    def submit(self, *keys: str) -> None:
        for key in keys:
            self.owner.submit(Release(key), self.caller.reply(key))

    async def recovered(self) -> None:
        """Let time pass until the owner serves."""
        for _ in range(400):
            await settle(20)
            if self.owner.phase is Phase.SERVING:
                return
            self.clock.advance(100_000)
        pytest.fail(f"still {self.owner.phase}")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.owner.start()
    yield world
    assert world.caller.early == []
    await world.owner.stop(1)


# -- answers and their records -------------------------------------------------------------------------------


async def test_operations_of_one_turn_are_one_batch_and_one_record(world: World) -> None:
    world.submit("x", "y", "z")
    await settle()
    assert world.machine.steps[-1][1] == ["x", "y", "z"]
    assert world.journal.appending == [1]
    assert world.journal.keys() == ["x", "y", "z"]
    assert [key for key, _ in world.caller.got] == ["x", "y", "z"]
    assert await world.owner.call(Release("read")) == Invalid("read", "3")


async def test_no_answer_leaves_before_its_record_is_acknowledged(world: World) -> None:
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    assert world.caller.got == []
    world.journal.gate.set()
    await settle()
    assert world.caller.kinds() == {"x": "Invalid"}


async def test_the_owner_works_ahead_into_one_record(world: World) -> None:
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    for key in ("y", "z"):
        world.submit(key)
        await settle()
    assert [keys for _, keys in world.machine.steps if keys] == [["x"], ["y"], ["z"]]
    assert world.journal.appending == [1]
    assert world.caller.got == []
    world.journal.gate.set()
    await settle()
    assert world.journal.appending == [1, 2]
    assert world.journal.keys() == ["x", "y", "z"]
    assert [key for key, _ in world.caller.got] == ["x", "y", "z"]


async def test_a_step_without_events_leaves_after_what_is_pending(world: World) -> None:
    world.submit("read 1")
    await settle()
    assert world.caller.kinds() == {"read 1": "Invalid"}
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    world.submit("read 2")
    await settle()
    world.submit("y")
    await settle()
    world.submit("read 3")
    await settle()
    assert len(world.caller.got) == 1
    world.journal.gate.set()
    await settle()
    assert [key for key, _ in world.caller.got] == ["read 1", "x", "read 2", "y", "read 3"]


async def test_working_ahead_is_bounded() -> None:
    world = World(OwnerOptions(batch_operations=2, record_operations=4, inbox_operations=10))
    await world.owner.start()
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    world.submit(*(f"k{n}" for n in range(10)))
    await settle()
    assert [len(keys) for _, keys in world.machine.steps if keys] == [1, 2, 2]
    world.submit(*(f"l{n}" for n in range(6)))
    assert "LedgerBusy" in world.caller.kinds().values()
    busy = [result for _, result in world.caller.got]
    assert len(busy) == 2
    assert isinstance(busy[0], LedgerBusy)
    assert busy[0].retry_after_us > 0
    world.journal.gate.set()
    await settle(200)
    assert len(world.caller.got) == 17
    assert world.owner.statistics.busy == 2
    assert world.owner.waiting == 0
    await world.owner.stop(1)


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_the_store_does_answers_rest_on_the_journal(seed: int) -> None:
    """Random operations, gates and failures: no answer is early, all come once, and the books are the
    journal's."""
    random_ = random.Random(seed)
    world = World(OwnerOptions(batch_operations=4, record_operations=8, snapshot_events=10**9, check_events=40))
    await world.owner.start()
    sent = 0
    for _ in range(300):
        choice = random_.random()
        if choice < 0.5:
            for _ in range(random_.randint(1, 6)):
                kind = random_.choices(["", "read", "wait", "boom", "twice"], [10, 4, 1, 0.3, 0.3])[0]
                sent += 1
                world.submit(f"{kind} {sent}")
        elif choice < 0.65:
            world.journal.gate.clear()
        elif choice < 0.85:
            world.journal.gate.set()
        elif choice < 0.88:
            world.journal.lose.append(random_.random() < 0.5)
            world.journal.away = random_.choice([0, 0, 1, 3])
        else:
            world.clock.advance(random_.choice([1_000, 100_000, 1_200_000]))
        await settle(random_.randint(0, 5))
    world.journal.gate.set()
    world.journal.lose.clear()
    world.journal.away = 0
    for _ in range(30):
        await settle(20)
        world.clock.advance(500_000)
    await world.recovered()
    world.clock.advance(2_000_000)
    await settle()
    assert world.caller.early == []
    assert len(world.caller.got) == sent
    assert world.owner.waiting == 0
    journalled = world.journal.keys()
    acknowledged = [key for key, result in world.caller.got if isinstance(result, Invalid)]
    lost = [key for key in acknowledged if key.split()[0] not in ("read", "wait") and key not in journalled]
    assert lost == []
    assert not [key for key in journalled if key.startswith("half")]
    assert len(journalled) == len(set(journalled)) or any("waited" in key for key in journalled)
    faults = {key for key, result in world.caller.got if isinstance(result, LedgerFault)}
    assert all(key.startswith(("boom", "twice")) for key in faults)
    again = world.make()
    await again.start()
    assert keys_of(again) == journalled
    await again.stop(1)


async def test_a_reply_that_fails_harms_nobody(world: World) -> None:
    def fails(result: object) -> None:
        raise RuntimeError("gone")

    world.owner.submit(Release("w"), fails)
    world.submit("x")
    await settle()
    assert world.caller.kinds() == {"x": "Invalid"}


# -- time ----------------------------------------------------------------------------------------------------


async def test_a_waiting_operation_is_answered_when_its_time_comes(world: World) -> None:
    world.submit("wait")
    await settle()
    world.clock.advance(999_000)
    await settle()
    assert world.caller.got == []
    world.clock.advance(2_000)
    await settle()
    assert world.caller.kinds() == {"wait": "Invalid"}
    assert world.journal.keys() == ["waited 1"]


async def test_ledger_time_starts_at_the_later_of_journal_and_wall_and_never_goes_back() -> None:
    world = World()
    await world.owner.start()
    world.clock.advance(5_000_000)
    world.submit("x")
    await settle()
    last = world.machine.steps[-1][0]
    assert last == world.clock.wall()
    await world.owner.stop(1)
    for wall, expected in ((last - 10**9, last), (last + 10**9, last + 10**9)):
        world.clock.set_wall(wall)
        owner = world.make()
        await owner.start()
        assert owner.now() == expected
        world.clock.set_wall(0)
        world.clock.advance(7)
        assert owner.now() == expected + 7
        await owner.stop(1)


# -- the journal fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [False, True])
async def test_a_failed_append_is_resolved_by_the_journal(world: World, written: bool) -> None:
    world.submit("before", "wait")
    await settle()
    world.journal.gate.clear()
    world.journal.lose.append(written)
    world.submit("x")
    await settle()
    world.submit("y")
    await settle()
    world.journal.gate.set()
    await world.recovered()
    assert world.caller.kinds() == {
        "before": "Invalid",
        "wait": "LedgerUnavailable",
        "x": "LedgerUnavailable",
        "y": "LedgerUnavailable",
    }
    assert world.journal.keys() == ["before", "x"] if written else ["before"]
    world.submit("z")
    await settle()
    assert dict(world.caller.got)["z"] == Invalid("z", "3" if written else "2")
    assert world.owner.statistics.append_failures == 1
    assert world.owner.statistics.loads == 2


async def test_while_the_store_is_away_callers_are_told_at_once(world: World) -> None:
    world.journal.lose.append(False)
    world.journal.away = 6
    world.submit("x")
    await settle()
    assert world.owner.phase is Phase.RECOVERING
    started = world.clock.monotonic()
    world.submit("y")
    assert world.caller.kinds()["y"] == "LedgerUnavailable"
    told = dict(world.caller.got)["y"]
    assert isinstance(told, LedgerUnavailable)
    assert told.retry_after_us > 0
    await world.recovered()
    waited = world.clock.monotonic() - started
    assert 50_000 * (2**5 - 1) <= waited <= 5_000_000 * 6
    world.submit("z")
    await settle()
    assert world.caller.kinds()["z"] == "Invalid"
    assert world.phases == [Phase.SERVING, Phase.RECOVERING, Phase.SERVING]


async def test_an_append_that_hangs_counts_as_failed(world: World) -> None:
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    world.clock.advance(2_000_000)
    await settle()
    assert world.caller.got == []
    world.clock.advance(1_100_000)
    await settle()
    assert world.caller.kinds() == {"x": "LedgerUnavailable"}
    world.journal.gate.set()
    await world.recovered()
    world.submit("y")
    await settle()
    assert world.caller.kinds()["y"] == "Invalid"


async def test_a_loop_that_was_held_up_is_no_failure_of_the_journal(world: World) -> None:
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    # The answer has come, and the loop was too late to look, four times over.
    world.journal.gate.set()
    for _ in range(4):
        world.clock._monotonic += 4_000_000
        world.clock.advance(0)
    await settle()
    assert world.caller.kinds() == {"x": "Invalid"}
    assert world.owner.statistics.append_failures == 0
    assert world.owner.phase is Phase.SERVING


async def test_a_loop_that_is_always_late_sees_an_append_that_hangs(world: World) -> None:
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    for _ in range(20):
        world.clock._monotonic += 4_000_000
        world.clock.advance(0)
        await settle()
    assert world.caller.kinds() == {"x": "LedgerUnavailable"}
    world.journal.gate.set()


async def test_a_store_that_reads_but_does_not_write_is_not_asked_all_the_time(world: World) -> None:
    world.journal.lose = [False] * 40
    for number in range(200):
        world.submit(f"k{number}")
        await settle(20)
        world.clock.advance(50_000)
    assert world.journal.loads < 20


async def test_a_journal_that_raises_anything_else_is_a_failed_append(world: World) -> None:
    async def append(record: Record) -> None:
        raise ZeroDivisionError

    world.journal.append = append  # type: ignore[method-assign]
    world.submit("x")
    await settle()
    del world.journal.append
    await world.recovered()
    world.submit("y")
    await settle()
    assert world.caller.kinds() == {"x": "LedgerUnavailable", "y": "Invalid"}


# -- the engine fails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["boom", "unencodable"])
async def test_a_poisonous_operation_fails_alone(world: World, bad: str) -> None:
    world.submit("wait", "x")
    await settle()
    with structlog.testing.capture_logs() as logs:
        world.submit("a", "b", bad, "read", "c", bad + " 2", "d")
        await settle(10)
        world.submit("later")
        await world.recovered()
        await settle()
    assert world.caller.kinds() == {
        "wait": "LedgerUnavailable",
        "x": "Invalid",
        "a": "Invalid",
        "b": "Invalid",
        bad: "LedgerFault",
        "read": "Invalid",
        "c": "Invalid",
        bad + " 2": "LedgerFault",
        "d": "Invalid",
        "later": "Invalid",
    }
    assert world.journal.keys() == ["x", "a", "b", "c", "d", "later"]
    assert world.owner.statistics.faults == 2
    named = [log for log in logs if log.get("kind") == "Release"]
    assert len(named) == 2
    assert "secret" not in str(logs)
    assert bad not in str([{**log, "error": ""} for log in logs])


async def test_what_fails_only_once_is_answered(world: World) -> None:
    world.submit("x", "twice", "y")
    await world.recovered()
    await settle()
    assert world.caller.kinds() == {"x": "Invalid", "twice": "Invalid", "y": "Invalid"}
    assert world.journal.keys() == ["x", "twice", "y"]


async def test_what_was_decided_before_a_fault_is_kept(world: World) -> None:
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    world.submit("y")
    await settle()
    world.submit("boom")
    await settle()
    world.submit("z")
    await settle()
    assert world.owner.phase is Phase.REPLAYING
    assert world.caller.got == []
    world.journal.gate.set()
    await world.recovered()
    await settle()
    assert world.caller.kinds() == {"x": "Invalid", "y": "Invalid", "boom": "LedgerFault", "z": "Invalid"}
    assert world.journal.keys() == ["x", "y", "z"]


async def test_an_append_that_fails_during_a_fault_is_an_outage(world: World) -> None:
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    world.submit("boom", "y")
    await settle()
    world.journal.lose.append(False)
    world.journal.gate.set()
    await world.recovered()
    assert set(world.caller.kinds().values()) == {"LedgerUnavailable"}
    assert world.journal.keys() == []


@pytest.mark.parametrize("events", [1, 2])
async def test_no_snapshot_is_taken_of_half_a_step(events: int) -> None:
    world = World(OwnerOptions(snapshot_events=events))
    await world.owner.start()
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    world.submit("y")
    await settle()
    world.submit("boom")
    await settle()
    world.journal.gate.set()
    await world.recovered()
    await settle()
    await world.owner.stop(1)
    loaded, _ = await read(world.journal)
    assert list(loaded.chunks) == [b"head", b"x\ny"]


async def test_an_engine_that_fails_once_by_itself_goes_on(world: World) -> None:
    world.submit("wait")
    await settle()
    world.machine.fails_idle = 2
    world.clock.advance(1_100_000)
    await world.recovered()
    world.submit("x")
    await settle()
    assert world.caller.kinds() == {"wait": "LedgerUnavailable", "x": "Invalid"}


async def test_an_engine_that_always_fails_by_itself_stops_its_ledger(world: World) -> None:
    world.submit("wait")
    await settle()
    world.machine.fails_idle = 1_000
    for _ in range(20):
        world.clock.advance(1_100_000)
        await settle(20)
    assert world.owner.phase is Phase.FAILED
    assert isinstance(world.owner.failure, LedgerStopped)
    with pytest.raises(LedgerStopped, match="fails by itself"):
        await world.owner.call(Release("x"))
    assert world.machine.fails_idle > 990


# -- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["start", "reload"])
async def test_what_cannot_be_folded_stops_the_ledger_and_resets_nothing(where: str) -> None:
    world = World()
    await world.owner.start()
    world.submit("x", "unfoldable")
    await settle()
    if where == "start":
        await world.owner.stop(0)
        world.owner = world.make()
        with pytest.raises(LedgerStopped, match="record 1 cannot be folded"):
            await world.owner.start()
    else:
        world.journal.lose.append(False)
        world.submit("y")
        for _ in range(5):
            await settle()
            world.clock.advance(1_000_000)
    assert world.owner.phase is Phase.FAILED
    world.submit("z")
    assert world.caller.kinds()["z"] == "LedgerStopped"
    assert world.journal.keys() == ["x", "unfoldable"]
    await world.owner.stop(1)
    assert world.journal.keys() == ["x", "unfoldable"]


async def test_a_damaged_store_stops_the_ledger() -> None:
    world = World()
    await world.owner.start()
    world.submit("x")
    await settle()

    async def load() -> None:
        raise StoreCorrupt("record 7 is damaged")

    world.journal.load = load  # type: ignore[method-assign, assignment]
    world.journal.lose.append(False)
    world.submit("y")
    for _ in range(5):
        await settle()
        world.clock.advance(1_000_000)
    assert world.owner.phase is Phase.FAILED
    assert "record 7 is damaged" in world.owner.statistics.last_error
    await world.owner.stop(1)


async def test_a_start_without_a_store_says_so() -> None:
    world = World()
    world.submit("early")
    assert world.caller.kinds() == {"early": "LedgerUnavailable"}
    world.journal.away = 1
    with pytest.raises(StoreUnavailable, match="the store is away"):
        await world.owner.start()
    await world.owner.start()
    await world.owner.stop(1)


# -- snapshots -----------------------------------------------------------------------------------------------


async def test_snapshots_and_digests_are_taken_as_configured() -> None:
    world = World(OwnerOptions(snapshot_events=50, check_events=20))
    await world.owner.start()
    for number in range(120):
        world.submit(f"k{number}")
        await settle(8)
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert world.journal.snapshots == 2
    assert len(world.journal.checks) >= 3
    assert len(world.journal.keys()) < 60
    owner = world.make()
    await owner.start()
    assert keys_of(owner) == [f"k{number}" for number in range(120)]
    assert owner.statistics.replayed_events < 60
    await owner.stop(1)
    await world.owner.stop(1)


@pytest.mark.parametrize(("form", "refused"), [(7, True), (6, False)])
async def test_replay_is_checked_against_the_digest(world: World, form: int, refused: bool) -> None:
    """Unless another version wrote it: its dumps have another form, so a difference proves nothing."""
    world.submit("x", "y")
    await settle()
    last = world.journal._records[-1]
    wrong = b"w" * 26 + b"form" + form.to_bytes(2, "big")
    await world.journal.write_check(Mark(last.seq, last.at, last.hash, wrong))
    if refused:
        with pytest.raises(LedgerStopped, match="record 1 cannot be folded"):
            await world.make().start()
    else:
        await world.make().start()


async def test_a_snapshot_that_cannot_be_written_does_not_stop_the_ledger() -> None:
    world = World(OwnerOptions(snapshot_events=1))
    await world.owner.start()

    async def write_snapshot(mark: Mark, chunks: object) -> None:
        raise StoreUnavailable("not now")

    world.journal.write_snapshot = write_snapshot  # type: ignore[method-assign]
    for key in ("x", "y", "z"):
        world.submit(key)
        await settle()
    assert world.caller.kinds() == dict.fromkeys("xyz", "Invalid")
    assert world.owner.phase is Phase.SERVING
    del world.journal.write_snapshot
    world.submit("w")
    await settle()
    assert world.journal.snapshots == 1
    await world.owner.stop(1)


# -- stopping ------------------------------------------------------------------------------------------------


async def test_a_stop_answers_what_is_decided_and_writes_a_snapshot() -> None:
    world = World()
    await world.owner.start()
    world.journal.gate.clear()
    world.submit("wait", "x")
    await settle()
    world.submit("y")
    stopping = asyncio.create_task(world.owner.stop(5))
    await settle()
    world.submit("late")
    assert world.caller.kinds() == {"late": "LedgerDraining"}
    world.journal.gate.set()
    await stopping
    assert world.caller.kinds() == {
        "late": "LedgerDraining",
        "x": "Invalid",
        "y": "Invalid",
        "wait": "LedgerDraining",
    }
    assert world.caller.early == []
    assert world.owner.phase is Phase.STOPPED
    loaded, tail = await read(world.journal)
    assert (list(loaded.chunks), tail) == ([b"head", b"x\ny"], [])
    with pytest.raises(LedgerDraining):
        await world.owner.call(Release("after"))
    await world.owner.stop(1)


async def test_a_stop_is_bounded() -> None:
    world = World()
    await world.owner.start()
    world.journal.gate.clear()
    world.submit("x")
    await settle()
    started = time.monotonic()
    await world.owner.stop(0.2)
    assert time.monotonic() - started < 1
    assert world.caller.kinds() == {"x": "LedgerDraining"}


async def test_a_stop_while_the_store_is_away(world: World) -> None:
    world.journal.lose.append(False)
    world.journal.away = 10**6
    world.submit("x")
    await settle()
    started = time.monotonic()
    await world.owner.stop(5)
    assert time.monotonic() - started < 1
    assert world.owner.phase is Phase.STOPPED


async def test_a_stop_during_a_fault(world: World) -> None:
    world.submit("x", "boom", "y")
    await asyncio.sleep(0)
    await world.owner.stop(5)
    assert world.caller.kinds() == {"x": "Invalid", "boom": "LedgerFault", "y": "Invalid"}
    assert world.owner.phase is Phase.STOPPED


# -- over a file ---------------------------------------------------------------------------------------------


async def test_over_a_file_with_its_own_clock(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    await store.open()
    owner = Owner(
        "a", store.journal("a"), machine=Machine(), options=OwnerOptions(snapshot_events=500, check_events=200)
    )
    await owner.start()
    total = 4_000
    left = asyncio.Semaphore(200)

    async def one(number: int) -> None:
        async with left:
            await owner.call(Release(f"k{number}"))

    async with asyncio.TaskGroup() as group:
        for number in range(total):
            group.create_task(one(number))
    assert owner.statistics.answers == total
    assert owner.statistics.snapshots > 1
    assert sum(owner.statistics.append_us_histogram) == owner.statistics.appends
    await owner.stop(5)
    owner = Owner("a", store.journal("a"), machine=Machine())
    await owner.start()
    assert owner.statistics.replayed_events == 0
    assert sorted(keys_of(owner)) == sorted(f"k{number}" for number in range(total))
    await owner.stop(5)
    await store.close()


async def test_unavailable_is_what_stopped_is_too() -> None:
    assert issubclass(LedgerStopped, LedgerUnavailable)
