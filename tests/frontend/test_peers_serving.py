"""The owner's side of a peer's stream: what it takes, what it refuses, and what it says when the ledger goes."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from paceline.engine.answers import Answer, Committed, Denied, DimensionState, Granted, Reason, Touched
from paceline.engine.dimensions import Dimension, Window
from paceline.engine.operations import NO_PRICES, Commit, Context, Disposition, Outcome, Renew
from paceline.frontend.peers import frames
from paceline.frontend.peers.frames import (
    Answers,
    Ask,
    Away,
    Drain,
    Failures,
    Frame,
    FrameError,
    Hello,
    NotOwner,
    Operations,
    Queued,
    Told,
    Welcome,
)
from paceline.frontend.peers.serving import ServingOptions
from paceline.frontend.peers.transport import WireClosed
from paceline.ledger.errors import LedgerBusy, LedgerDraining, LedgerFault, LedgerStopped, LedgerUnavailable
from paceline.ledger.options import Phase
from tests.frontend.fleet_harness import LEDGER, Call, FakeOwner, Network, Node, reserve, until

OUTCOME = Outcome(Disposition.NOT_SENT)


class Peer:
    """A front end that says exactly what a test wants."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.wire: Any = None

    async def connect(self) -> Peer:
        self.wire = await self.node.network.connect(self.node.name, 1)
        return self

    def say(self, frame: Frame) -> None:
        self.wire.send(frames.encode(frame))

    async def hear(self) -> Any:
        async with asyncio.timeout(2):
            return frames.decode(await self.wire.receive())

    async def hello(self, epoch: int = 0, patience_us: int = 0, version: int = frames.VERSION) -> Any:
        self.say(Hello(version, LEDGER, "peer", epoch, patience_us))
        return await self.hear()


async def peer_of(node: Node) -> Peer:
    return await Peer(node).connect()


async def test_hello_and_welcome() -> None:
    node = Node(Network(), "one")
    owner = node.own(4)
    peer = await peer_of(node)
    welcome = await peer.hello(epoch=4)
    assert welcome == Welcome(frames.VERSION, 4, "one", ServingOptions().credits, owner.at)
    assert node.keeper.wanted == {LEDGER}
    # A later version is spoken with in ours.
    assert (await (await peer_of(node)).hello(version=frames.VERSION + 1)).version == frames.VERSION


@pytest.mark.parametrize(
    "first", [b"\xc1garbage", frames.encode(Operations([])), frames.encode(Hello(0, LEDGER, "", 0))]
)
async def test_what_is_no_hello_ends_the_stream(first: bytes) -> None:
    node = Node(Network(), "one")
    node.own(1)
    peer = await peer_of(node)
    peer.wire.send(first)
    with pytest.raises(WireClosed):
        await peer.wire.receive()
    await until(lambda: node.serving.streams == 0)


async def test_who_is_not_the_owner_says_who_is_and_passes_nothing_on() -> None:
    network = Network()
    node, other = Node(network, "one"), Node(network, "two")
    owner = other.own(3)
    node.keeper.tell(3, "two")
    peer = await peer_of(node)
    assert await peer.hello(epoch=2) == NotOwner(3, "two", "two")
    peer.say(Operations([(1, Commit("a", OUTCOME))]))
    await asyncio.sleep(0.02)
    assert owner.asked == []


async def test_the_answer_is_held_back_for_who_is_about_to_own_it() -> None:
    node = Node(Network(), "two")
    node.keeper.tell(3, "one")
    peer = await peer_of(node)
    asking = asyncio.create_task(peer.hello(epoch=4, patience_us=300_000))
    await asyncio.sleep(0.03)
    assert not asking.done()
    node.own(4)
    assert isinstance(await asking, Welcome)


async def test_patience_is_bounded() -> None:
    node = Node(Network(), "two", serving=ServingOptions(patience_most_us=50_000))
    node.keeper.tell(3, "one")
    peer = await peer_of(node)
    assert await peer.hello(epoch=4, patience_us=60_000_000) == NotOwner(3, "one", "one")


async def test_an_owner_that_cannot_decide_yet_says_so() -> None:
    node = Node(Network(), "one")
    owner = node.own(1)
    owner.phase = Phase.RECOVERING
    peer = await peer_of(node)
    assert isinstance(await peer.hello(), Away)
    owner.phase = Phase.SERVING
    assert isinstance(await peer.hello(), Welcome)


async def test_answers_of_one_turn_leave_together_and_share_what_they_share() -> None:
    node = Node(Network(), "one")
    owner = node.own(1)
    owner.hold = True
    peer = await peer_of(node)
    await peer.hello()
    peer.say(Operations([(number, reserve(f"r{number}")) for number in range(5)] + [(9, Commit("c", OUTCOME))]))
    await until(lambda: len(owner.held) == 6)
    owner.answer_all()
    answers = await peer.hear()
    assert isinstance(answers, Answers)
    assert len(answers.touched) == 1
    whole = dict(frames.whole(answers))
    assert [type(whole[number]) for number in (0, 4, 9)] == [Granted, Granted, Committed]
    assert node.serving.undecided == 0


async def test_those_that_wait_are_said_to_be_queued() -> None:
    node = Node(Network(), "one")
    owner = node.own(1)
    peer = await peer_of(node)
    await peer.hello()
    peer.say(Operations([(1, reserve("wait1", 5_000_000)), (2, reserve("now", 5_000_000))]))
    first, second = await peer.hear(), await peer.hear()
    assert [number for number, _ in frames.whole(first)] == [2]
    assert second == Queued([1])
    owner.answer_all()
    assert [number for number, _ in frames.whole(await peer.hear())] == [1]


async def test_nothing_is_said_to_be_queued_before_it_is_decided() -> None:
    node = Node(Network(), "one")
    owner = node.own(1)
    owner.hold = True
    peer = await peer_of(node)
    await peer.hello()
    peer.say(Operations([(1, reserve("wait", 5_000_000))]))
    await until(lambda: owner.held)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(peer.wire.receive(), 0.03)
    assert node.serving.undecided == 1


async def test_too_much_undecided_sheds_reserves_and_nothing_else() -> None:
    node = Node(Network(), "one", serving=ServingOptions(busy_operations=3))
    owner = node.own(1)
    owner.hold = True
    peer = await peer_of(node)
    await peer.hello()
    peer.say(Operations([(number, reserve(f"r{number}")) for number in range(5)] + [(9, Commit("c", OUTCOME))]))
    refused = await peer.hear()
    assert isinstance(refused, Failures)
    assert [(each.number, type(frames.error_of(each))) for each in refused.items] == [(3, LedgerBusy), (4, LedgerBusy)]
    assert owner.keys == ["r0", "r1", "r2", "c"]
    assert node.serving.shed == 2
    # What a peer has left behind does not count against the others.
    peer.wire.close()
    await until(lambda: node.serving.undecided == 0)


async def test_a_front_end_keeps_to_its_credits() -> None:
    network = Network()
    node = Node(network, "one", serving=ServingOptions(credits=10))
    front = Node(network, "front")
    owner = node.own(1)
    front.keeper.tell(1, "one")
    await until(lambda: front.slot.ready)
    owner.hold = True
    calls = [Call(front.slot, reserve(f"r{number}")) for number in range(25)]
    frees = Call(front.slot, Commit("frees", OUTCOME))
    await until(lambda: len(owner.held) == 10)
    await asyncio.sleep(0.02)
    assert len(owner.held) == 10
    # What frees overtakes the Reserves that wait for credit.
    assert "frees" in owner.keys
    owner.hold = False
    owner.answer_all()
    await until(lambda: frees.answer and all(call.answer for call in calls))
    # Those that wait in the engine's queue need no credit.
    waits = [Call(front.slot, reserve(f"wait{number}", 9_000_000)) for number in range(25)]
    await until(lambda: len(owner.held) == 25)
    assert not any(call.answer for call in waits)
    await front.router.stop(0)


async def test_many_streams_get_few_credits_each() -> None:
    node = Node(Network(), "one", serving=ServingOptions(credits=1_000, busy_operations=4_000))
    node.own(1)
    credits = [(await (await peer_of(node)).hello()).credits for _ in range(40)]
    assert credits[:2] == [1_000, 1_000]
    assert credits[9] == 200
    assert credits[39] == 64


async def test_the_end_of_ownership_is_said_and_late_answers_go_nowhere() -> None:
    node = Node(Network(), "one")
    owner = node.own(1)
    owner.hold = True
    peer = await peer_of(node)
    await peer.hello()
    peer.say(Operations([(1, Commit("a", OUTCOME))]))
    await until(lambda: owner.held)
    node.keeper.tell(2, "two")
    assert await peer.hear() == NotOwner(2, "two", "two")
    owner.answer_all()
    with pytest.raises(WireClosed):
        await peer.wire.receive()


async def test_that_it_is_gone_and_where_to_are_one_word() -> None:
    node = Node(Network(), "one")
    node.own(1)
    peer = await peer_of(node)
    await peer.hello()
    node.keeper.tell(1, "")
    node.keeper.tell(1, "two")
    assert await peer.hear() == NotOwner(1, "two", "two")


async def test_a_drain_is_said_once_decided_answers_are_out() -> None:
    node = Node(Network(), "one")
    owner = node.own(1)
    peer = await peer_of(node)
    await peer.hello()
    peer.say(Operations([(1, Commit("a", OUTCOME))]))
    await until(lambda: owner.asked)
    node.serving.drain(LEDGER, "two", "two")
    assert isinstance(await peer.hear(), Answers)
    assert await peer.hear() == Drain("two", "two")


async def test_another_epoch_in_the_same_process_begins_with_another_hello() -> None:
    node = Node(Network(), "one")
    first = node.own(1)
    first.hold = True
    peer = await peer_of(node)
    await peer.hello()
    peer.say(Operations([(1, Commit("a", OUTCOME))]))
    await until(lambda: first.held)
    second = FakeOwner(2)
    node.keeper.tell(2, "one", second)
    assert isinstance(await peer.hear(), Away)
    # Sent before the word arrived: nobody decides it.
    peer.say(Operations([(2, Commit("b", OUTCOME))]))
    assert (await peer.hello(epoch=1)).epoch == 2
    first.answer_all()
    peer.say(Operations([(3, Commit("c", OUTCOME))]))
    assert [number for number, _ in frames.whole(await peer.hear())] == [3]
    assert second.keys == ["c"]


async def test_questions() -> None:
    node = Node(Network(), "one")
    node.own(1)

    def broken(ledger: str, owner: Any, body: bytes) -> bytes:
        raise KeyError("secret")

    node.serving.asks |= {"echo": lambda ledger, _, body: ledger.encode() + body, "broken": broken}
    peer = await peer_of(node)
    await peer.hello()
    for number, name in enumerate(("echo", "broken", "unknown")):
        peer.say(Ask(number, name, b"?"))
    assert [await peer.hear() for _ in range(3)] == [Told(0, b"default?"), Told(1, None), Told(2, None)]


async def test_a_peer_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(Network(), "one", serving=ServingOptions(unsent_bytes=100))
    node.own(1)
    peer = await peer_of(node)
    await peer.hello()
    monkeypatch.setattr(type(peer.wire), "unsent", property(lambda _: 101))
    peer.say(Operations([(1, Commit("a", OUTCOME))]))
    assert isinstance(await peer.hear(), Answers)
    with pytest.raises(WireClosed):
        await peer.hear()


async def test_streams_are_bounded() -> None:
    node = Node(Network(), "one", serving=ServingOptions(streams=1))
    node.own(1)
    first, second = await peer_of(node), await peer_of(node)
    await first.hello()
    with pytest.raises(WireClosed):
        await second.hello()


# -- frames -----------------------------------------------------------------------------------------------------


def test_errors_keep_their_kind() -> None:
    for kind in (LedgerUnavailable, LedgerBusy, LedgerDraining, LedgerFault, LedgerStopped):
        found = frames.error_of(frames.failure(7, kind("words", 5)))
        assert (type(found), found.message, found.retry_after_us) == (kind, "words", 5)
    assert type(frames.error_of(frames.Failure(1, 99, "later", 0))) is LedgerUnavailable


def test_shared_parts_come_back_as_they_were() -> None:
    state = DimensionState("pool", "", Dimension.REQUESTS, Window.MINUTE, 10, 10, 5, 1)
    one, other = Touched(Dimension.REQUESTS, (state,)), Touched()
    context = Context(LEDGER, "a", "pool", ("s",), "t", "r", 5, ((Dimension.REQUESTS, 1),), NO_PRICES)
    given: list[tuple[int, Answer]] = [
        (1, Granted(("a",), 0, 5, 6, None, context, one)),
        (2, Denied(Reason.LIMIT, "pool", Dimension.REQUESTS, 7, one)),
        (3, Granted(("b",), 0, 5, 6, 8, context, other)),
        (4, Committed(((Dimension.REQUESTS, 1),), 9)),
    ]
    frame = frames.decode(frames.answers(given, 77))
    assert isinstance(frame, Answers)
    assert frame.now == 77
    back = list(frames.whole(frame))
    assert back == given
    first, second = back[0][1], back[1][1]
    assert isinstance(first, Granted)
    assert isinstance(second, Denied)
    assert first.touched is second.touched


def test_what_a_later_version_adds_is_left_out() -> None:
    raw = msgspec.msgpack.decode(frames.encode(Operations([(1, Renew("a"))])))
    raw[1][0][1]["novelty"] = 5
    frame = frames.decode(msgspec.msgpack.encode([*raw, "more"]))
    assert frame == Operations([(1, Renew("a"))])


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x93\x05\x01", msgspec.msgpack.encode([99, 1])])
def test_garbage_is_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode(data)


def test_an_answer_must_not_refer_to_what_was_not_sent() -> None:
    context = Context(LEDGER, "a", "pool", (), "", "", 0, (), NO_PRICES)
    granted = Granted(("a",), 0, 1, 0, None, context, Touched())
    with pytest.raises(FrameError):
        list(frames.whole(Answers([(1, 3, granted)], [], 0)))
