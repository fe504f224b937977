"""Fallback shares over many front ends: what clients hold never adds up to more than the limit, whoever owns."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.answers import DimensionState, Touched
from paceline.engine.dimensions import Dimension, Window
from paceline.frontend import shares as module
from paceline.frontend.fallback import Amounts, Fallback, blind_us
from paceline.frontend.limits import FALLBACK_EXPIRY_US, FALLBACK_GRACE_US
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable, Wire
from paceline.frontend.shares import HELD_US, RETRY_US, Shares, inherit, serve_ask, serve_surrender

EXPIRY = 60_000_000
SECOND = 1_000_000
LEDGER = "main"
POOLS = ("one", "two")
LIMIT = 1_000
TOUCHED = {
    pool: Touched(None, (DimensionState(pool, "", Dimension.REQUESTS, Window.MINUTE, LIMIT, LIMIT, LIMIT, 0),))
    for pool in POOLS
}
CHARGES = ((Dimension.REQUESTS, 1),)


def limits_of(pool: str) -> Amounts | None:
    return {Dimension.REQUESTS: LIMIT} if pool in POOLS else None


@dataclass
class World:
    """Some servers, of which one owns the ledger, and clients that may be connected to any of them."""

    count: int = 3
    now: int = 0
    owner: int = 0
    epoch: int = 1
    refusing: set[int] = field(default_factory=set)
    """Servers that cannot be asked for their accounts."""
    servers: list[Server] = field(default_factory=list)
    held: list[tuple[int, str, str, int]] = field(default_factory=list)
    """Until when, who, of which pool, how much: every share that a client may go by."""

    def __post_init__(self) -> None:
        self.servers = [Server(self, number) for number in range(self.count)]
        self.servers[0].fallback.begin(LEDGER, 1, 0)

    def check(self) -> None:
        self.held = [entry for entry in self.held if entry[0] > self.now]
        for pool in POOLS:
            worst: dict[str, int] = {}
            for _, client, name, amount in self.held:
                if name == pool:
                    worst[client] = max(amount, worst.get(client, 0))
            assert sum(worst.values()) <= LIMIT, worst

    def take_over(self, number: int, *, crashed: bool) -> None:
        before, self.owner = self.owner, number
        self.epoch += 1
        if crashed:
            self.servers[before] = Server(self, before)
        elif before != number:
            self.servers[before].fallback.freeze(LEDGER)
        fallback = self.servers[number].fallback
        who = (f"n{before}", str(before))
        asyncio.run(inherit(fallback, _Network(self), LEDGER, self.epoch, EXPIRY, who))


class Server:
    """One process: the accounts of what it owns, and its front end. Also says where the ledger is."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.fallback = Fallback(lambda: world.now, node=f"n{number}", expiry_us=EXPIRY, most=100)
        self.shares = Shares(lambda: world.now, self.fallback, self, expiry_us=EXPIRY, most=100)
        self.asked: list[tuple[bytes, int]] = []
        self.answers: list[tuple[bytes, int, bytes]] = []

    def is_local(self, ledger: str) -> bool:
        return self.world.owner == self.number

    def leads(self, ledger: str) -> bool:
        return self.is_local(ledger)

    def grant(self, client: str, pool: str) -> Amounts | None:
        """A call of ``client`` is granted here."""
        self.shares.note(client, LEDGER, pool, CHARGES, 2)
        share = self.shares.share(client, LEDGER, pool, TOUCHED[pool])
        if share is None:
            return None
        amounts = {Dimension(each.dimension): each.per_minute for each in share.amounts}
        until = self.world.now + share.expires_in.ToMicroseconds()
        self.world.held.append((until, client, pool, amounts[Dimension.REQUESTS]))
        return amounts

    def report(self, client: str, pool: str) -> None:
        """``client`` has the newest share and uses no older one."""
        self.shares.arrived(client, pool)
        held = self.world.held
        mine = [entry for entry in held if entry[1:3] == (client, pool)]
        self.world.held = [entry for entry in held if entry not in mine[:-1]]

    def ask(self) -> None:
        self.asked += [(body, self.world.now) for _, body in self.shares.asks()]

    def serve_oldest(self) -> None:
        """The owner answers this front end's oldest ask, if it is not too late."""
        if self.asked:
            body, sent_at = self.asked.pop(0)
            owner = self.world.servers[self.world.owner]
            answer = serve_ask(owner.fallback, LEDGER, body, limits_of, leads=True)
            self.answers.append((body, sent_at, answer))

    def hear_oldest(self) -> None:
        if self.answers:
            body, sent_at, answer = self.answers.pop(0)
            if self.world.now <= sent_at + SECOND:
                self.shares.answered(LEDGER, body, sent_at, answer)

    def settle(self) -> None:
        """One whole turn of asking."""
        self.ask()
        while self.asked:
            self.serve_oldest()
        while self.answers:
            self.hear_oldest()


class _Network:
    def __init__(self, world: World) -> None:
        self.world = world

    async def connect(self, address: str, timeout: float) -> Wire:
        raise PeerRefused

    async def call(self, address: str, method: str, body: bytes, timeout: float) -> bytes:
        assert method == module.SURRENDER
        if int(address) in self.world.refusing:
            raise PeerUnreachable
        return serve_surrender(self.world.servers[int(address)].fallback, body)


numbers = st.integers(0, 2)
step = st.one_of(
    st.tuples(st.just("pass"), st.sampled_from([0, SECOND, 12 * SECOND, HELD_US, EXPIRY - 5 * SECOND])),
    st.tuples(st.just("busy"), numbers, st.integers(0, 5), st.sampled_from(POOLS)),
    st.tuples(st.just("grant"), numbers, st.integers(0, 5), st.sampled_from(POOLS), st.booleans()),
    st.tuples(st.just("turn"), numbers),
    st.tuples(st.sampled_from(["ask", "serve", "hear", "lose"]), numbers),
    st.tuples(st.just("owner"), numbers, st.booleans(), st.booleans()),
    st.tuples(st.just("restart"), numbers),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(step, min_size=20, max_size=120))
def test_what_all_clients_hold_never_exceeds_the_limit(plan: list[tuple[object, ...]]) -> None:
    world = World()
    connected: dict[tuple[str, str], int] = {}
    for what, *arguments in plan:
        match what, arguments:
            case "pass", [int(passed)]:
                world.now += passed
            case "grant", [int(number), int(client), str(pool), bool(shows)]:
                server, name = world.servers[number], f"c{client}"
                if server.grant(name, pool) is not None:
                    connected[name, pool] = number
                elif shows and connected.get((name, pool)) == number:
                    # Only who sent the newest one hears of it.
                    server.report(name, pool)
            case "busy", [int(number), int(client), str(pool)]:
                # Until it has nearly all.
                for _ in range(3):
                    world.servers[number].settle()
                    if world.servers[number].grant(f"c{client}", pool) is not None:
                        connected[f"c{client}", pool] = number
                        world.servers[number].report(f"c{client}", pool)
                    world.now += RETRY_US
                    world.check()
            case "turn", [int(number)]:
                world.servers[number].settle()
            case "ask", [int(number)]:
                world.servers[number].ask()
            case "serve", [int(number)]:
                world.servers[number].serve_oldest()
            case "hear", [int(number)]:
                world.servers[number].hear_oldest()
            case "lose", [int(number)]:
                del world.servers[number].asked[:1]
                del world.servers[number].answers[:1]
            case "owner", [int(number), bool(crashed), bool(refuses)]:
                world.refusing = {world.owner} if refuses else set()
                world.take_over(number, crashed=crashed)
            case "restart", [int(number)]:
                if number == world.owner:
                    world.take_over(number, crashed=True)
                else:
                    world.servers[number] = Server(world, number)
            case _:
                raise AssertionError(what)
        world.check()


def test_a_share_comes_with_a_later_grant_through_any_server() -> None:
    world = World()
    assert world.servers[0].grant("a", "one") == {Dimension.REQUESTS: 500}  # here at once
    assert world.servers[1].grant("b", "one") is None
    world.servers[1].settle()
    assert world.servers[1].grant("b", "one") == {Dimension.REQUESTS: 333}
    assert world.servers[0].fallback.outstanding("one") == {Dimension.REQUESTS: 833}
    # The owner hears of the demand that came to another server: b gets more once both have shown what they have.
    for _ in range(40):
        world.now += 2 * SECOND
        for _ in range(9):
            world.servers[1].shares.note("b", LEDGER, "one", CHARGES, 1)
        for server, client in ((world.servers[0], "a"), (world.servers[1], "b")):
            server.shares.note(client, LEDGER, "one", CHARGES, 1)
            server.grant(client, "one")
            server.settle()
            server.grant(client, "one")
            server.report(client, "one")
            server.settle()
        world.check()
    out = {client: amount for _, client, _, amount in world.held}
    assert out["b"] > 2 * out["a"]
    assert 900 <= out["a"] + out["b"] <= LIMIT


def test_what_nobody_took_along_goes_back() -> None:
    world = World()
    world.servers[1].grant("b", "one")
    world.servers[1].settle()
    assert world.servers[0].fallback.outstanding("one") == {Dimension.REQUESTS: 500}
    world.now += HELD_US
    world.servers[1].settle()
    assert world.servers[0].fallback.outstanding("one") == {}
    assert world.servers[1].grant("b", "one") is None


@pytest.mark.parametrize("what", ["returned", "arrived"])
def test_what_has_just_expired_can_still_be_spoken_of(what: str) -> None:
    now = 0
    fallback = Fallback(lambda: now, expiry_us=EXPIRY)
    first = fallback.take("a", "one", {Dimension.REQUESTS: LIMIT})
    assert first is not None
    fallback.arrived("a", "one", first.serial)
    now = EXPIRY // 2
    second = fallback.take("a", "one", {Dimension.REQUESTS: LIMIT})
    assert second is not None
    for passed in (EXPIRY // 2, EXPIRY):
        now += passed
        getattr(fallback, what)("a", "one", second.serial)
        getattr(fallback, what)("a", "one", first.serial)
    assert fallback.outstanding("one") == {}
    assert fallback.take("a", "one", {Dimension.REQUESTS: LIMIT}) is not None


def test_a_lost_answer_is_told_again_and_a_share_told_twice_does_not_go_back() -> None:
    world = World()
    front = world.servers[1]
    front.grant("b", "one")
    front.ask()
    front.serve_oldest()
    front.answers.clear()
    world.now += 2 * SECOND
    front.settle()
    amounts = front.grant("b", "one")
    assert amounts == {Dimension.REQUESTS: 500}
    assert world.held[0][0] <= EXPIRY  # not from the second asking on
    # The same client through another server: the same share, once more.
    world.servers[2].grant("b", "one")
    world.servers[2].settle()
    assert world.servers[0].fallback.outstanding("one") == {Dimension.REQUESTS: 500}
    world.now += HELD_US
    world.servers[2].settle()
    assert world.servers[0].fallback.outstanding("one") == {Dimension.REQUESTS: 500}


@pytest.mark.parametrize("refuses", [False, True])
def test_a_new_owner_goes_on_with_the_accounts_or_waits(refuses: bool) -> None:
    world = World()
    assert world.servers[0].grant("a", "one") is not None
    world.refusing = {0} if refuses else set()
    world.take_over(1, crashed=False)
    world.now += RETRY_US
    assert (world.servers[1].grant("b", "one") is None) is refuses
    assert world.servers[0].grant("c", "one") is None
    world.now += EXPIRY
    assert world.servers[1].grant("d", "one") is not None
    world.check()


def test_what_was_to_be_told_is_told_to_an_owner_that_is_here_now() -> None:
    world = World()
    front = world.servers[1]
    front.grant("b", "one")
    front.settle()
    assert front.grant("b", "one") is not None
    front.report("b", "one")
    world.take_over(1, crashed=False)
    front.ask()
    world.now += RETRY_US
    assert front.grant("b", "one") == {Dimension.REQUESTS: 950}


def test_accounts_go_to_one_owner_only() -> None:
    world = World()
    world.servers[0].grant("a", "one")
    fallback = world.servers[0].fallback
    assert fallback.surrender(LEDGER, 2, "n1") is not None
    assert fallback.surrender(LEDGER, 2, "n1") is not None  # the answer may have been lost
    assert fallback.surrender(LEDGER, 2, "n2") is None
    assert fallback.surrender(LEDGER, 3, "n2") is None
    assert not fallback.is_sharing(LEDGER)
    # Of an epoch that is not the next, another one may know what is out.
    assert world.servers[1].fallback.surrender(LEDGER, 2, "n1") is None


def test_who_follows_itself_goes_on() -> None:
    world = World()
    world.servers[0].grant("a", "one")
    world.take_over(0, crashed=False)
    assert world.servers[0].fallback.outstanding("one") == {Dimension.REQUESTS: 500}
    assert world.servers[0].grant("b", "one") == {Dimension.REQUESTS: 333}


def test_damaged_accounts_are_not_used() -> None:
    world = World()
    fallback = Fallback(lambda: world.now, node="n9")
    assert not fallback.begin(LEDGER, 2, EXPIRY, "n0")
    assert not fallback.adopt(LEDGER, 2, b"\xc1")
    assert not fallback.adopt(LEDGER, 2, module._encode((0, [("one", [("a", {99: 1.0}, [])])])))
    assert not fallback.is_sharing(LEDGER)
    assert fallback.adopt(LEDGER, 2, module._encode((0, [])))
    assert fallback.is_sharing(LEDGER)
    assert not fallback.adopt(LEDGER, 2, module._encode((0, [])))


def test_clients_are_bounded() -> None:
    world = World()
    shares = Shares(lambda: world.now, world.servers[0].fallback, world.servers[0], expiry_us=EXPIRY, most=2)
    for client in ("a", "b", "c"):
        shares.share(client, LEDGER, "one", TOUCHED["one"])
    assert shares.share("c", LEDGER, "one", TOUCHED["one"]) is None
    world.now += EXPIRY + 1
    assert shares.share("c", LEDGER, "one", TOUCHED["one"]) is not None


def test_how_long_a_new_owner_waits() -> None:
    assert blind_us(None, 5, 3) == 0
    assert blind_us(100, 100, 3) == FALLBACK_EXPIRY_US + FALLBACK_GRACE_US + 3
    assert blind_us(100, 100 + 2 * FALLBACK_EXPIRY_US, 3) == 0


async def test_the_loop_asks_and_survives_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARE_ASK_INTERVAL_US", 1_000)
    world = World()
    front, owner = world.servers[1], world.servers[0]
    calls = 0

    async def ask(ledger: str, body: bytes) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise PeerUnreachable
        return serve_ask(owner.fallback, ledger, body, limits_of, leads=calls > 2)

    front.grant("b", "one")
    task = asyncio.create_task(front.shares.run(ask))
    try:
        async with asyncio.timeout(5):
            while world.servers[1].grant("b", "one") is None:
                world.now += RETRY_US
                await asyncio.sleep(0.002)
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert calls >= 3
