"""What a front end does with its callers' operations while the owner of their ledger changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from paceline.engine.answers import Committed, Granted, Released
from paceline.engine.operations import Commit, Disposition, Observation, Outcome, Release, Reserve
from paceline.frontend.fleet import FleetOptions, aged
from paceline.ledger.errors import LedgerBusy, LedgerDraining, LedgerFault, LedgerStopped, LedgerUnavailable
from paceline.ledger.options import Phase
from tests.frontend.fleet_harness import LEDGER, Call, FakeOwner, Network, Node, reserve, until

OUTCOME = Outcome(Disposition.NOT_SENT)


class World:
    """A front end, and two processes that may own its ledger."""

    def __init__(self) -> None:
        self.network = Network()
        self.front = Node(self.network, "front")
        self.one = Node(self.network, "one")
        self.two = Node(self.network, "two")

    def own(self, node: Node, epoch: int) -> FakeOwner:
        """``node`` owns the ledger, and everybody hears of it."""
        owner = node.own(epoch)
        for other in (self.front, self.one, self.two):
            if other is not node:
                other.keeper.tell(epoch, node.name)
        return owner

    def call(self, operation: Any) -> Call:
        return Call(self.front.slot, operation)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    found = World()
    yield found
    for node in (found.front, found.one, found.two):
        await node.router.stop(0)
        for task in node.tasks:
            task.cancel()


async def test_an_operation_goes_to_the_owner_and_its_answer_comes_back(world: World) -> None:
    owner = world.own(world.one, 1)
    calls = [world.call(reserve("a")), world.call(Commit("b", OUTCOME)), world.call(Release("c"))]
    await until(lambda: all(call.answer for call in calls))
    assert [type(call.answer) for call in calls] == [Granted, Committed, Released]
    assert set(owner.keys) == {"a", "b", "c"}
    assert world.front.slot.is_remote
    assert not world.one.slot.is_remote
    assert world.front.slot.now() == pytest.approx(owner.at, abs=1_000_000)


async def test_what_frees_goes_first_and_the_longest_waiting_reserve_next(world: World) -> None:
    calls = [
        world.call(reserve("young", 60_000_000)),
        world.call(reserve("old", 60_000_000, waited_us=9_000_000)),
        world.call(Commit("paid", OUTCOME)),
        world.call(Release("freed")),
    ]
    await asyncio.sleep(0.03)
    owner = world.own(world.one, 1)
    await until(lambda: all(call.answer for call in calls))
    assert owner.keys == ["paid", "freed", "old", "young"]
    young = owner.asked[3]
    assert isinstance(young, Reserve)
    assert young.waited_us >= 30_000
    assert young.waited_us + young.max_wait_us == 60_000_000


async def test_callers_keep_their_places_when_the_owner_dies(world: World) -> None:
    owner = world.own(world.one, 1)
    calls = [world.call(reserve(f"wait{number}", 60_000_000)) for number in range(5)]
    await until(lambda: len(owner.held) == 5)
    world.network.kill("one")
    await until(lambda: (LEDGER, 1) in world.front.keeper.suspected)
    later = world.call(reserve("wait-later", 60_000_000))
    successor = world.own(world.two, 2)
    await until(lambda: len(successor.held) == 6)
    assert successor.keys == [*(f"wait{number}" for number in range(5)), "wait-later"]
    assert all(isinstance(op, Reserve) and op.waited_us > 0 for op in successor.asked[:5])
    successor.answer_all()
    await until(lambda: all(call.answer for call in [*calls, later]))
    assert all(isinstance(call.answer, Granted) for call in calls)


async def test_a_seat_in_this_process_is_resent_from_too(world: World) -> None:
    here = world.own(world.front, 1)
    call = world.call(reserve("wait", 60_000_000))
    assert len(here.held) == 1
    # It loses the ledger; its late word is no answer.
    there = world.own(world.two, 2)
    here.answer_all(LedgerUnavailable("deposed"))
    await until(lambda: there.held)
    assert not call.answer
    there.answer_all()
    await until(lambda: call.answer)
    assert isinstance(call.answer, Granted)


async def test_a_grant_that_a_deposed_owner_had_acknowledged_counts(world: World) -> None:
    here = world.own(world.front, 1)
    call = world.call(reserve("wait", 60_000_000))
    there = world.own(world.two, 2)
    here.answer_all()
    assert isinstance(call.answer, Granted)
    await asyncio.sleep(0.02)
    there.answer_all()
    assert len(call.answers) == 1


async def test_in_flight_at_two_deaths_is_poison(world: World) -> None:
    owner = world.own(world.one, 1)
    owner.hold = True
    bad = world.call(Commit("bad", OUTCOME))
    await until(lambda: owner.held)
    world.network.kill("one")
    await until(lambda: not world.front.slot.ready)
    second = world.own(world.two, 2)
    second.hold = True
    await until(lambda: second.held)
    assert not bad.answer
    world.network.kill("two")
    await until(lambda: not world.front.slot.ready)
    third = Node(world.network, "three")
    owner = third.own(3)
    good = world.call(Commit("good", OUTCOME))
    world.front.keeper.tell(3, "three")
    await until(lambda: bad.answer and good.answer)
    assert isinstance(bad.answer, LedgerFault)
    assert isinstance(good.answer, Committed)
    assert owner.keys == ["good"]


async def test_another_owner_is_no_death(world: World) -> None:
    owner = world.own(world.one, 1)
    owner.hold = True
    call = world.call(Commit("good", OUTCOME))
    await until(lambda: owner.held)
    second = world.own(world.two, 2)
    second.hold = True
    await until(lambda: second.held)
    third = Node(world.network, "three")
    third.own(3)
    world.front.keeper.tell(3, "three")
    await until(lambda: call.answer)
    assert isinstance(call.answer, Committed)


async def test_who_waits_in_the_queue_is_no_poison(world: World) -> None:
    waiting = world.call(reserve("wait", 60_000_000))
    owner = FakeOwner(0)
    nodes = (world.one, world.two, Node(world.network, "three"), Node(world.network, "four"))
    for epoch, node in enumerate(nodes, 1):
        owner = node.own(epoch)
        world.front.keeper.tell(epoch, node.name)
        await until(lambda owner=owner: owner.held)
        # The word that it is queued is on its way.
        await asyncio.sleep(0.02)
        if node.name != "four":
            world.network.kill(node.name)
    assert not waiting.answer
    owner.answer_all()
    await until(lambda: waiting.answer)
    assert isinstance(waiting.answer, Granted)


async def test_a_broken_connection_is_no_death(world: World) -> None:
    owner = world.own(world.one, 1)
    owner.hold = True
    call = world.call(Commit("a", OUTCOME))
    for count in range(1, 5):
        await until(lambda count=count: len(owner.held) == count)
        world.network.cut("one")
    await until(lambda: len(owner.held) == 5)
    owner.answer_all()
    await until(lambda: call.answer)
    assert isinstance(call.answer, Committed)


async def test_nobody_decides_for_too_long(world: World) -> None:
    slot = world.front.slot
    begun = asyncio.get_running_loop().time()
    call = world.call(reserve("a", 60_000_000))
    await until(lambda: call.answer)
    took = asyncio.get_running_loop().time() - begun
    assert type(call.answer) is LedgerUnavailable
    assert 0.3 < took < 0.8
    at_once = world.call(Commit("b", OUTCOME))
    assert type(at_once.answer) is LedgerUnavailable
    assert slot.pending == 0
    world.own(world.one, 1)
    await until(lambda: slot.ready)
    again = world.call(Commit("c", OUTCOME))
    await until(lambda: again.answer)
    assert isinstance(again.answer, Committed)


async def test_an_owner_that_cannot_decide_for_a_moment_is_waited_for(world: World) -> None:
    owner = world.own(world.one, 1)
    await until(lambda: world.front.slot.ready)
    owner.refusal = LedgerUnavailable("the journal is away", 50_000)
    call = world.call(Commit("a", OUTCOME))
    await until(lambda: owner.asked)
    owner.phase = Phase.RECOVERING
    await asyncio.sleep(0.05)
    assert not call.answer
    owner.refusal, owner.phase = None, Phase.SERVING
    await until(lambda: call.answer)
    assert isinstance(call.answer, Committed)


async def test_a_store_that_stays_away_is_said_in_time(world: World) -> None:
    owner = world.own(world.one, 1)
    await until(lambda: world.front.slot.ready)
    # The owner itself goes on serving, and fails at each operation.
    owner.refusal = LedgerUnavailable("the journal is away", 50_000)
    call = world.call(Commit("a", OUTCOME))
    begun = asyncio.get_running_loop().time()
    await until(lambda: call.answer)
    assert type(call.answer) is LedgerUnavailable
    assert asyncio.get_running_loop().time() - begun < 0.9
    assert len(owner.asked) < 60, "it was asked without pause"


async def test_a_ledger_that_stopped_for_good_says_so_at_once(world: World) -> None:
    owner = world.own(world.one, 1)
    owner.refusal, owner.phase = LedgerStopped("broken"), Phase.FAILED
    call = world.call(Commit("a", OUTCOME))
    await until(lambda: call.answer)
    assert type(call.answer) is LedgerStopped


async def test_reserves_are_shed_before_what_frees(world: World) -> None:
    options = FleetOptions(away_us=400_000, pending=4, pending_reserves=2)
    front = Node(world.network, "small", options=options)
    calls = [Call(front.slot, reserve(f"r{number}")) for number in range(3)]
    assert [type(call.answer) for call in calls] == [type(None), type(None), LedgerBusy]
    frees = [Call(front.slot, Commit(f"c{number}", OUTCOME)) for number in range(3)]
    assert [type(call.answer) for call in frees] == [type(None), type(None), LedgerBusy]
    world.one.own(1)
    front.keeper.tell(1, "one")
    await until(lambda: all(call.answer for call in calls + frees))
    assert isinstance(calls[0].answer, Granted)
    # There is room again.
    again = Call(front.slot, reserve("r9"))
    await until(lambda: again.answer)
    assert isinstance(again.answer, Granted)
    await front.router.stop(0)


async def test_a_lower_epoch_is_never_gone_back_to(world: World) -> None:
    world.own(world.two, 7)
    await until(lambda: world.front.slot.ready)
    old = FakeOwner(6)
    world.one.keeper.tell(6, "one", old)
    world.front.keeper.tell(6, "one")
    call = world.call(Commit("a", OUTCOME))
    await until(lambda: call.answer)
    assert old.asked == []
    # Nor here.
    mine = FakeOwner(5)
    world.front.keeper.tell(5, "front", mine)
    call = world.call(Commit("b", OUTCOME))
    await until(lambda: call.answer)
    assert mine.asked == []
    assert world.front.slot.epoch == 7


async def test_a_store_that_has_gone_back_counts_anew(world: World) -> None:
    world.own(world.two, 7)
    await until(lambda: world.front.slot.ready)
    owner = FakeOwner(1)
    world.two.keeper.tell(1, "one", era="new")
    world.one.keeper.tell(1, "one", owner, era="new")
    world.front.keeper.tell(1, "one", era="new")
    call = world.call(Commit("a", OUTCOME))
    await until(lambda: call.answer)
    assert owner.keys == ["a"]


async def test_a_deposed_owner_that_does_not_know_it_is_not_believed(world: World) -> None:
    stale = world.one.own(3)
    world.front.keeper.tell(4, "one")
    call = world.call(Commit("a", OUTCOME))
    await asyncio.sleep(0.05)
    assert stale.asked == []
    assert not call.answer
    fresh = world.own(world.two, 4)
    await until(lambda: call.answer)
    assert fresh.keys == ["a"]


async def test_the_one_asked_says_who_owns_it(world: World) -> None:
    owner = world.two.own(5)
    world.one.keeper.tell(5, "two")
    # The front end still believes the old owner to be it.
    world.front.keeper.tell(4, "one")
    call = world.call(Commit("a", OUTCOME))
    await until(lambda: call.answer)
    assert isinstance(call.answer, Committed)
    assert owner.keys == ["a"]
    assert world.front.keeper.hints == [(5, "two")]


async def test_a_drain_leads_to_the_successor(world: World) -> None:
    owner = world.own(world.one, 1)
    call = world.call(reserve("wait", 60_000_000))
    await until(lambda: owner.held)
    world.one.serving.drain(LEDGER, "two", "two")
    # Its keeper has said nothing yet; the successor holds the hello back until it owns the ledger.
    await asyncio.sleep(0.03)
    assert not call.answer
    begun = asyncio.get_running_loop().time()
    successor = world.two.own(2)
    await until(lambda: successor.held)
    assert asyncio.get_running_loop().time() - begun < 0.02
    successor.answer_all()
    await until(lambda: call.answer)
    assert isinstance(call.answer, Granted)
    assert world.front.keeper.suspected == []


async def test_only_the_successor_is_told_to_make_haste(world: World) -> None:
    world.own(world.one, 1)
    slots = (world.front.slot, world.two.slot)
    await until(lambda: all(slot.ready for slot in slots))
    world.one.serving.drain(LEDGER, "two", "two")
    await until(lambda: world.two.keeper.hints)
    await asyncio.sleep(0.02)
    assert world.two.keeper.hints == [(2, "two")]
    assert not world.front.keeper.hints


async def test_a_successor_that_does_not_listen_yet_is_not_dead(world: World) -> None:
    """Its epoch has not begun: were it taken for dead now, it would be deposed as soon as it begins."""
    world.own(world.one, 1)
    await until(lambda: world.front.slot.ready)
    world.network.kill("two")
    world.one.serving.drain(LEDGER, "two", "two")
    await until(lambda: world.network.connects.count("two") >= 3)
    assert world.front.keeper.suspected == []
    world.front.keeper.tell(2, "two")
    await until(lambda: world.front.keeper.suspected)
    assert set(world.front.keeper.suspected) == {(LEDGER, 2)}


async def test_a_hello_to_a_successor_is_said_once(world: World) -> None:
    """That it owns the ledger is heard while it holds the hello back: the line is the right one already."""
    world.own(world.one, 1)
    await until(lambda: world.front.slot.ready)
    world.one.serving.drain(LEDGER, "two", "two")
    await until(lambda: "two" in world.network.connects)
    await asyncio.sleep(0.02)
    lines = len(world.network.connects)
    world.front.keeper.tell(2, "two")
    await asyncio.sleep(0.02)
    world.two.own(2)
    await until(lambda: world.front.slot.ready)
    assert len(world.network.connects) == lines


async def test_who_stops_tells_its_callers_to_ask_elsewhere(world: World) -> None:
    owner = world.own(world.one, 1)
    call = world.call(reserve("wait", 60_000_000))
    await until(lambda: owner.held)
    await world.front.router.stop(0)
    assert type(call.answer) is LedgerDraining
    late = world.call(Commit("late", OUTCOME))
    assert type(late.answer) is LedgerDraining


async def test_a_silent_owner_does_not_hold_up_the_way_to_the_next(world: World) -> None:
    world.network.silence = 5.0
    world.network.silent.add("one")
    world.front.keeper.tell(1, "one")
    call = world.call(Commit("a", OUTCOME))
    await until(lambda: world.network.connects)
    world.own(world.two, 2)
    begun = asyncio.get_running_loop().time()
    await until(lambda: call.answer)
    assert asyncio.get_running_loop().time() - begun < 0.1


async def test_reconnecting_is_bounded(world: World) -> None:
    world.front.keeper.tell(1, "nobody")
    world.call(Commit("a", OUTCOME))
    began = asyncio.get_running_loop().time()
    await until(lambda: len(world.network.connects) >= 6, timeout=10)
    # After the first few, each attempt waits for 5 ms at least.
    assert len(world.network.connects) <= 5 + (asyncio.get_running_loop().time() - began) / 0.005


def test_what_is_sent_late_is_as_old_as_it_is() -> None:
    commit = Commit("a", Outcome(Disposition.NOT_SENT, observation=Observation(age_us=5)))
    later = aged(commit, 7)
    assert isinstance(later, Commit)
    assert later.outcome.observation is not None
    assert later.outcome.observation.age_us == 12
    waits = aged(reserve("a", 10), 25)
    assert isinstance(waits, Reserve)
    assert (waits.max_wait_us, waits.waited_us) == (0, 25)
