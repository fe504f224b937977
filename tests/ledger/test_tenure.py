"""An owner's side of a shared journal, against the store's rules, with answers lost and stores that go back."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.ledger.clock import ManualClock
from paceline.ledger.commands import NodeInfo
from paceline.ledger.journal import Mark, Record, StoreFenced, StoreUnavailable, StoreVersion, genesis
from paceline.ledger.lease import Head
from paceline.ledger.shared import Bid, SharedJournal, StoreDeposed, StoreHeld, StoreLost, Terms
from paceline.ledger.succession import PATIENCE_US, ROLLOUT_US, due, heirs, ranking
from tests.ledger.model_store import ModelCommands, ModelStore


class Desk:
    """One process that writes to a ledger ``a``. ``acknowledged`` are the records that it may rely on."""

    def __init__(self, store: ModelStore, clock: ManualClock, name: str, form: int = 2) -> None:
        self.fails: list[bool] = []
        """For each command to come that fails: whether it is carried out all the same."""
        self.acknowledged: list[Record] = []
        numbers = itertools.count(1)
        self.journal = SharedJournal(
            "a",
            ModelCommands(store, self._fault),
            Terms(name, f"{name}:1", form),
            clock=clock,
            nonce=lambda: name.encode().ljust(8) + next(numbers).to_bytes(8, "big"),
        )

    def _fault(self, name: str, done: bool) -> None:
        if self.fails and self.fails[0] is done:
            self.fails.pop(0)
            raise StoreUnavailable(f"{name} got no answer")

    async def take(self, depose: int = 0) -> list[Record]:
        loaded = await self.journal.take(Bid(depose))
        records = [record for page in [page async for page in loaded.pages] for record in page]
        self.acknowledged = records
        return records

    def next(self, payload: bytes = b"x") -> Record:
        tenure = self.journal.tenure
        assert tenure is not None
        head = tenure.head
        return Record.sealed(head.seq + 1, head.epoch, head.at + 1, 0, head.hash, payload)

    async def append(self, record: Record) -> None:
        for _ in range(6):
            try:
                await self.journal.append(record)
            except StoreUnavailable:
                # The lease is renewed meanwhile, whether the record was written or not.
                await self.journal.confirm()
                continue
            self.acknowledged.append(record)
            return
        raise AssertionError("not written")

    async def refound(self) -> None:
        last = self.acknowledged[-1]

        async def chunks() -> object:
            yield b"books up to %d" % last.seq

        await self.journal.refound(Mark(last.seq, last.at, last.hash, b""), chunks())  # type: ignore[arg-type]


def settle(clock: ManualClock) -> None:
    clock.advance(10_000_000)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.lists(st.booleans(), max_size=1)),
            st.tuples(st.just("confirm"), st.lists(st.booleans(), max_size=1)),
            st.tuples(st.just("lose"), st.integers(1, 5)),
            st.tuples(st.just("wipe"), st.none()),
        ),
        max_size=25,
    )
)
@settings(max_examples=120, deadline=None)
def test_while_the_owner_lives_nothing_acknowledged_is_lost(steps: list[tuple[str, object]]) -> None:
    async def run() -> None:
        clock = ManualClock()
        store = ModelStore(clock.wall)
        desk = Desk(store, clock, "one")
        await desk.take()
        for kind, what in steps:
            if kind == "lose" and store.records.get("a"):
                assert isinstance(what, int)
                store.lose("a", min(what, len(store.records["a"])))
            elif kind == "wipe":
                store.wipe()
            elif kind in ("append", "confirm"):
                assert isinstance(what, list)
                desk.fails = list(what)
                try:
                    if kind == "append":
                        await desk.append(desk.next())
                    else:
                        await desk.journal.confirm()
                except StoreLost:
                    desk.fails = []
                    if desk.acknowledged:
                        await desk.refound()
                    else:
                        return
                except StoreUnavailable:
                    pass
                desk.fails = []
        try:
            await desk.journal.confirm()
        except StoreLost:
            if not desk.acknowledged:
                return
            await desk.refound()
        head = store.heads["a"]
        tail = [record.hash for record in store.records.get("a", [])]
        assert [record.hash for record in desk.acknowledged[len(desk.acknowledged) - len(tail) :]] == tail
        if desk.acknowledged:
            last = desk.acknowledged[-1]
            assert (head.seq, head.hash) == (last.seq, last.hash)
            # What is not in the log is in the snapshot.
            assert len(tail) == len(desk.acknowledged) - head.snapshot_seq

    asyncio.run(run())


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 3), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_deposed_owner_knows_what_the_winner_may_lack(written: int, lost: int, won: int, flying: bool) -> None:
    async def run() -> None:
        clock = ManualClock()
        store = ModelStore(clock.wall)
        old, new = Desk(store, clock, "old"), Desk(store, clock, "new")
        await old.take()
        for _ in range(written):
            await old.append(old.next())
        if lost:
            store.lose("a", min(lost, written))
        settle(clock)
        inherited = await new.take()
        for _ in range(won):
            await new.append(new.next(b"new"))
        attempt = old.append(old.next()) if flying else old.journal.confirm()
        with pytest.raises(StoreDeposed) as deposed:
            await attempt
        missing = [record for record in old.acknowledged if record not in inherited]
        assert list(deposed.value.lost) == missing

    asyncio.run(run())


async def test_two_owners_are_never_both_believed() -> None:
    clock = ManualClock()
    store = ModelStore(clock.wall)
    one, two = Desk(store, clock, "one"), Desk(store, clock, "two")
    await one.take()
    await one.append(one.next())
    with pytest.raises(StoreHeld) as held:
        await two.take()
    assert held.value.left_us == 3_000_000
    assert one.journal.is_fresh()
    clock.advance(2_500_000)
    assert not one.journal.is_fresh()
    clock.advance(500_000)
    assert [record.seq for record in await two.take()] == [1]
    await two.append(two.next())
    with pytest.raises(StoreFenced):
        await one.append(one.next())
    assert [record.epoch for record in store.records["a"]] == [1, 2]


async def test_a_claim_whose_answer_was_lost_is_made_again() -> None:
    clock = ManualClock()
    store = ModelStore(clock.wall)
    desk = Desk(store, clock, "one")
    desk.fails = [True]
    await desk.take()
    await desk.append(desk.next())
    assert store.heads["a"].epoch == 1


async def test_ledger_time_goes_on_by_the_stores() -> None:
    clock = ManualClock()
    store = ModelStore(clock.wall)
    one, two = Desk(store, clock, "one"), Desk(store, clock, "two")
    await one.take()
    record = Record.sealed(1, 1, 5_000, 0, genesis("a"), b"")
    await one.append(record)
    clock.advance(1_000_000)
    await one.journal.confirm()
    clock.advance(4_000_000)
    await two.take()
    assert two.journal.tenure is not None
    beginning = two.journal.tenure.beginning
    assert (beginning.now, beginning.seen_until) == (5_005_000, 1_005_000)
    assert not beginning.is_new_primary
    store.primary = "second"
    clock.advance(3_500_000)
    with pytest.raises(StoreHeld):
        await one.take()
    clock.advance(500_000)
    await one.take()
    assert one.journal.tenure is not None
    assert one.journal.tenure.beginning.is_new_primary


async def test_an_older_version_does_not_touch_a_newer_journal() -> None:
    clock = ManualClock()
    store = ModelStore(clock.wall)
    new, old = Desk(store, clock, "new", form=3), Desk(store, clock, "old", form=2)
    await new.take()
    settle(clock)
    with pytest.raises(StoreVersion, match="run a newer version"):
        await old.take()


def nodes(*names: str, draining: str = "") -> dict[str, NodeInfo]:
    return {name: NodeInfo(name, "", "", 2, place, name != draining) for place, name in enumerate(names)}


def test_ledgers_spread_and_all_agree() -> None:
    fleet = nodes("a", "b", "c")
    first = [ranking(f"ledger {number}", fleet.values())[0] for number in range(300)]
    assert all(first.count(name) > 60 for name in fleet)
    order = ranking("x", fleet.values())
    # Whoever leaves, the others keep their order.
    for gone in fleet:
        rest = {name: info for name, info in fleet.items() if name != gone}
        assert ranking("x", rest.values()) == [name for name in order if name != gone]


def test_the_newest_follows_one_that_drains() -> None:
    fleet = nodes("a", "b", "c", "d", draining="b")
    assert heirs("x", fleet, "b") == ["d", "c", "a"]


def test_one_that_drains_has_nobody_begin_to_read() -> None:
    fleet = nodes("a", "b", "c", "d", draining="b")
    fleet["c"] = msgspec.structs.replace(fleet["c"], warm=("x", "y"))
    assert heirs("x", fleet, "b") == ["c", "d", "a"]
    fleet["a"] = msgspec.structs.replace(fleet["a"], warm=("x",))
    assert heirs("x", fleet, "b") == ["c", "a", "d"]
    fleet["d"] = msgspec.structs.replace(fleet["d"], warm=("z",))
    assert heirs("x", fleet, "b") == ["c", "a", "d"]


def test_while_a_rollout_may_be_under_way_the_newest_keeps_itself_warm() -> None:
    fleet = nodes("a", "b", "c", "d")
    others = [fleet[name] for name in ("a", "c", "d")]
    usual = ranking("x", others)
    assert heirs("x", fleet, "b", now=3 + ROLLOUT_US) == usual
    for newest in ("a", "c", "d"):
        fleet = nodes(*[name for name in "abcd" if name != newest], newest)
        now = fleet[newest].started_at + ROLLOUT_US - 1
        assert heirs("x", fleet, "b", now=now) == [newest, *(name for name in usual if name != newest)]
        # One that the newest owns has the newest of the others.
        assert newest not in heirs("x", fleet, newest, now=now)


HEAD = Head(4, b"n", "owner", "", 1, b"h", 1, 0, 0, 3_000_000, 0, b"", "here", 2)


def test_when_a_ledger_may_be_taken() -> None:
    def at(
        head: Head | None, rank: int = 0, dead: int | None = None, lineage: str = "here", since: int = 0
    ) -> tuple[int, int]:
        return due(head, 1_000_000, "me", rank, lineage=lineage, lag_us=500_000, dead_since=dead, primary_since=since)

    assert at(None) == (0, 0)
    assert at(HEAD) == (3_000_000, 0)
    assert at(HEAD, 2) == (3_000_000 + 2 * PATIENCE_US, 0)
    assert at(HEAD, 1, dead=900_000) == (900_000 + PATIENCE_US, 4)
    assert at(HEAD, 0, dead=900_000, lineage="there") == (3_500_000, 0)
    # A lease that was over when the primary changed: whoever writes to the one before may do so for the lag.
    over = msgspec.structs.replace(HEAD, until=100_000)
    assert at(over) == (100_000, 0)
    assert at(over, 1, lineage="there", since=900_000) == (1_400_000 + PATIENCE_US, 0)
    mine = msgspec.structs.replace(over, node="me")
    assert at(mine) == (1_000_000, 4)
    assert at(mine, lineage="there", since=900_000) == (1_400_000, 0)
