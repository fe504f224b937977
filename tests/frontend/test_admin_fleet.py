"""AdminService over several processes: any of them takes any call, whoever owns the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TypeVar

import msgspec
import pytest
from google.protobuf.message import Message

from paceline.frontend.admin import Admin
from paceline.frontend.admin_fleet import ADMIN, Fleet
from paceline.frontend.admin_watch import Elsewhere, Hub
from paceline.frontend.errors import Code, Problem
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable, Wire
from paceline.frontend.server import Server
from paceline.ledger.commands import NodeInfo
from paceline.ledger.owner import Owner
from paceline_client.stubs import v1 as pb
from tests.frontend.harness import Caller, new_id, reserve, running

M = TypeVar("M", bound=Message)
LEDGERS = ("alpha", "beta", "gamma")
OWNERS = {"alpha": "one", "beta": "two", "gamma": "two"}
FORM = 4


class Where(msgspec.Struct, frozen=True):
    epoch: int
    node: str
    address: str
    owner: Owner | None


class Nodes:
    """Some servers, each with ledgers of its own, that know of one another."""

    def __init__(self) -> None:
        self.servers: dict[str, Server] = {}
        self.admins: dict[str, Admin] = {}
        self.fleets: dict[str, Fleet] = {}
        self.owners = dict(OWNERS)
        """By ledger; an empty name: nobody."""
        self.dead: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.handed: list[tuple[str, str, str]] = []
        self.old: set[str] = set()

    def add(self, name: str, server: Server) -> None:
        self.servers[name] = server
        fleet = self.fleets[name] = Fleet(name, Keeper(self, name), Network(self), FORM)
        self.admins[name] = Admin(
            server.router,
            server.authenticator,
            server.admin._places,
            lambda _: "anthropic",
            fleet,
            requests=server.desk.requests,
        )

    async def ask(self, node: str, name: str, request: Message, kind: type[M]) -> M:
        answer = await self.fleets[node].serve(name, request)
        assert isinstance(answer, kind)
        return answer

    async def refused(self, node: str, name: str, request: Message) -> Problem:
        with pytest.raises(Problem) as caught:
            await self.fleets[node].serve(name, request)
        return caught.value


class Keeper:
    def __init__(self, nodes: Nodes, name: str) -> None:
        self.nodes_ = nodes
        self.name = name

    def where(self, ledger: str) -> Where:
        owner = self.nodes_.owners.get(ledger, "")
        slot = self.nodes_.servers[self.name].router.slots.get(ledger)
        local = slot.local if slot is not None and owner == self.name else None
        return Where(7, owner, owner, local)

    def ledgers(self) -> list[str]:
        return sorted(self.nodes_.owners)

    def nodes(self) -> dict[str, NodeInfo]:
        return {
            name: NodeInfo(name, name, "1", FORM - 1 if name in self.nodes_.old else FORM, 0)
            for name in self.nodes_.servers
        }

    async def hand_over(self, ledger: str, node: str = "") -> str:
        self.nodes_.handed.append((self.name, ledger, node))
        return node or "three"


class Network:
    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    async def connect(self, address: str, timeout: float) -> Wire:
        raise PeerRefused

    async def call(self, address: str, method: str, body: bytes, timeout: float) -> bytes:
        self.nodes.calls.append((address, method))
        if address in self.nodes.dead:
            raise PeerUnreachable
        await asyncio.sleep(0)
        return await self.nodes.admins[address].peer_handlers()[method](body)


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    async with AsyncExitStack() as stack:
        found = Nodes()
        for name in ("one", "two"):
            accounts = {
                ledger: {"tier": "build", "pools": {"sonnet-4": {"requests": 60}}}
                for ledger in LEDGERS
                if OWNERS[ledger] == name
            }
            server = await stack.enter_async_context(running({"accounts": accounts}))
            found.add(name, server)
        yield found


def pool_of(ledger: str) -> str:
    return f"anthropic/{ledger}/sonnet-4"


async def grant(nodes: Nodes, ledger: str, reservation_id: str | None = None) -> str:
    caller = Caller(nodes.servers[OWNERS[ledger]])
    try:
        request = reserve(reservation_id, account=ledger)
        assert (await caller.reserve(request)).HasField("grant")
        return request.reservation_id
    finally:
        await caller.close()


@pytest.mark.parametrize("node", ["one", "two"])
async def test_ledgers_are_shown_wherever_they_are(nodes: Nodes, node: str) -> None:
    await grant(nodes, "beta")
    found = (await nodes.ask(node, "ListLedgers", pb.ListLedgersRequest(), pb.ListLedgersResponse)).ledgers
    assert [(ledger.name, ledger.owner, ledger.state, ledger.newest_form) for ledger in found] == [
        (name, OWNERS[name], pb.LEDGER_STATE_READY, FORM) for name in LEDGERS
    ]
    assert [ledger.open_reservations for ledger in found] == [0, 1, 0]
    first = await nodes.ask(node, "ListLedgers", pb.ListLedgersRequest(page_size=2), pb.ListLedgersResponse)
    rest = await nodes.ask(
        node, "ListLedgers", pb.ListLedgersRequest(page_token=first.next_page_token), pb.ListLedgersResponse
    )
    assert [ledger.name for ledger in (*first.ledgers, *rest.ledgers)] == list(LEDGERS)
    assert not rest.next_page_token


async def test_a_ledger_whose_owner_is_away_is_shown_as_that(nodes: Nodes) -> None:
    nodes.dead = {"two"}
    nodes.owners["gamma"] = ""
    found = (await nodes.ask("one", "ListLedgers", pb.ListLedgersRequest(), pb.ListLedgersResponse)).ledgers
    assert [(ledger.name, ledger.owner, ledger.state) for ledger in found] == [
        ("alpha", "one", pb.LEDGER_STATE_READY),
        ("beta", "two", pb.LEDGER_STATE_UNAVAILABLE),
        ("gamma", "", pb.LEDGER_STATE_UNAVAILABLE),
    ]
    assert "does not answer" in found[1].state_reason
    assert (await nodes.refused("one", "GetLedger", pb.GetLedgerRequest(name="delta"))).code is Code.NOT_FOUND
    assert (await nodes.refused("one", "ListPools", pb.ListPoolsRequest())).code is Code.UNAVAILABLE
    assert (await nodes.refused("one", "GetPool", pb.GetPoolRequest(name=pool_of("beta")))).code is Code.UNAVAILABLE
    # One that is here is found all the same.
    await nodes.ask("one", "GetPool", pb.GetPoolRequest(name=pool_of("alpha")), pb.GetPoolResponse)


@pytest.mark.parametrize("node", ["one", "two"])
async def test_a_decision_is_explained_wherever_the_ledger_is(nodes: Nodes, node: str) -> None:
    number = await grant(nodes, "beta")
    asked = pb.ExplainRequest(reservation_id=number)
    found = await nodes.ask(node, "Explain", asked, pb.ExplainResponse)
    assert (found.reservation.ledger, found.reservation.state) == ("beta", pb.RESERVATION_STATE_OPEN)
    assert (found.decision.grant.pool, found.steps[0].message) == (pool_of("beta"), "granted at once")
    assert (await nodes.refused(node, "Explain", pb.ExplainRequest(reservation_id=new_id()))).code is Code.NOT_FOUND
    call = pb.ExplainRequest(request=reserve("", account="beta"), identity="anonymous")
    call.request.candidates.append(reserve("", account="alpha").candidates[0])
    found = await nodes.ask(node, "Explain", call, pb.ExplainResponse)
    assert found.decision.grant.pool == pool_of("beta")
    assert [step.candidate_index for step in found.steps] == [0, 1]
    # One that is away may know it, unless it is open here.
    nodes.dead = {"two"} if node == "one" else {"one"}
    other = new_id()
    assert (await nodes.refused(node, "Explain", pb.ExplainRequest(reservation_id=other))).code is Code.UNAVAILABLE
    here = await grant(nodes, "alpha" if node == "one" else "beta")
    await nodes.ask(node, "Explain", pb.ExplainRequest(reservation_id=here), pb.ExplainResponse)


@pytest.mark.parametrize("node", ["one", "two"])
async def test_limits_and_advice_come_from_the_owner(nodes: Nodes, node: str) -> None:
    await grant(nodes, "beta")
    asked = pb.ListLimitsRequest(pool=pool_of("beta"))
    (limits,) = (await nodes.ask(node, "ListLimits", asked, pb.ListLimitsResponse)).pools
    assert limits.pool.name == pool_of("beta")
    assert limits.details[0].at_risk == 1
    everything = (await nodes.ask(node, "ListLimits", pb.ListLimitsRequest(), pb.ListLimitsResponse)).pools
    assert {found.pool.ledger for found in everything} == set(LEDGERS)
    (advice,) = (await nodes.ask(node, "ListAdvice", pb.ListAdviceRequest(), pb.ListAdviceResponse)).pools
    assert (advice.pool, advice.calls) == (pool_of("beta"), 1)
    for name, nowhere in (("ListLimits", pb.ListLimitsRequest), ("ListAdvice", pb.ListAdviceRequest)):
        assert (await nodes.refused(node, name, nowhere(pool="x"))).code is Code.NOT_FOUND


@pytest.mark.parametrize("node", ["one", "two"])
async def test_lists_go_ledger_by_ledger_in_pages(nodes: Nodes, node: str) -> None:
    for ledger in LEDGERS:
        for _ in range(3):
            await grant(nodes, ledger)
    for size in (1, 2, 3, 4, 9, 100):
        owners: list[str] = []
        ids: list[str] = []
        token = ""
        while True:
            request = pb.ListReservationsRequest(page_size=size, page_token=token)
            page = await nodes.ask(node, "ListReservations", request, pb.ListReservationsResponse)
            assert len(page.reservations) <= size
            owners += [each.ledger for each in page.reservations]
            ids += [each.reservation_id for each in page.reservations]
            token = page.next_page_token
            if not token:
                break
        assert owners == [ledger for ledger in LEDGERS for _ in range(3)]
        assert len(set(ids)) == 9
    pools = (await nodes.ask(node, "ListPools", pb.ListPoolsRequest(), pb.ListPoolsResponse)).pools
    assert list(dict.fromkeys(pool.ledger for pool in pools)) == list(LEDGERS)
    assert len({pool.name for pool in pools}) == len(pools)
    of_one = (await nodes.ask(node, "ListPools", pb.ListPoolsRequest(ledger="gamma"), pb.ListPoolsResponse)).pools
    assert [pool.name for pool in of_one] == [pool.name for pool in pools if pool.ledger == "gamma"]
    bad = await nodes.refused(node, "ListPools", pb.ListPoolsRequest(page_token="%%%"))
    assert bad.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("node", ["one", "two"])
@pytest.mark.parametrize("ledger", ["alpha", "beta"])
async def test_changes_reach_the_owner_once(nodes: Nodes, node: str, ledger: str) -> None:
    name = pool_of(ledger)
    paused = await nodes.ask(node, "PausePool", pb.PausePoolRequest(name=name, reason="test"), pb.PausePoolResponse)
    assert (paused.pool.state, paused.pool.state_reason) == (pb.POOL_STATE_PAUSED, "test")
    assert len(nodes.calls) <= 1
    again = pb.PausePoolRequest(name=name, etag="wrong")
    assert (await nodes.refused(node, "PausePool", again)).code is Code.ABORTED
    resumed = await nodes.ask(node, "ResumePool", pb.ResumePoolRequest(name=name), pb.ResumePoolResponse)
    assert resumed.pool.state == pb.POOL_STATE_OPEN
    change = pb.UpdateLimitRequest(
        limit=pb.DimensionRef(pool=name, dimension=pb.DIMENSION_REQUESTS), override=pb.LimitOverride(limit=7)
    )
    after = await nodes.ask(node, "UpdateLimit", change, pb.UpdateLimitResponse)
    assert after.limit.state.limit == 7
    change.limit.dimension = pb.DIMENSION_QUEUED_REQUESTS
    problem = await nodes.refused(node, "UpdateLimit", change)
    assert (problem.code, problem.message.partition(":")[0]) == (Code.NOT_FOUND, "limit")
    missing = await nodes.refused(node, "GetPool", pb.GetPoolRequest(name="anthropic/zeta/x"))
    assert missing.code is Code.NOT_FOUND


@pytest.mark.parametrize("node", ["one", "two"])
async def test_a_share_is_changed_by_the_owner(nodes: Nodes, node: str) -> None:
    request = pb.UpdateShareRequest(share=pb.Share(ledger="beta", name="team", weight=5), allow_missing=True)
    changed = (await nodes.ask(node, "UpdateShare", request, pb.UpdateShareResponse)).share
    assert (changed.ledger, changed.weight) == ("beta", 5)
    request.share.etag, request.share.weight = changed.etag, 6
    await nodes.ask(node, "UpdateShare", request, pb.UpdateShareResponse)
    assert (await nodes.refused(node, "UpdateShare", request)).code is Code.ABORTED
    listed = await nodes.ask(node, "ListShares", pb.ListSharesRequest(), pb.ListSharesResponse)
    assert [(share.ledger, share.name, share.weight) for share in listed.shares] == [("beta", "team", 6)]
    request.share.ledger = "zeta"
    assert (await nodes.refused(node, "UpdateShare", request)).code is Code.NOT_FOUND


async def test_a_mode_is_set_everywhere(nodes: Nodes) -> None:
    answer = await nodes.ask("one", "SetMode", pb.SetModeRequest(mode=pb.MODE_OBSERVE), pb.SetModeResponse)
    assert [setting.ledger for setting in answer.settings] == list(LEDGERS)
    for ledger in LEDGERS:
        found = await nodes.ask("two", "GetLedger", pb.GetLedgerRequest(name=ledger), pb.GetLedgerResponse)
        assert found.ledger.mode == pb.MODE_OBSERVE
    only = pb.SetModeRequest(ledger="beta", mode=pb.MODE_ENFORCE)
    assert [each.ledger for each in (await nodes.ask("one", "SetMode", only, pb.SetModeResponse)).settings] == ["beta"]
    by_pool = pb.SetModeRequest(pool=pool_of("gamma"), mode=pb.MODE_ENFORCE)
    found_modes = (await nodes.ask("one", "SetMode", by_pool, pb.SetModeResponse)).settings
    assert {each.ledger for each in found_modes} == {"gamma"}


async def test_reservations_are_found_and_ended_wherever_they_are(nodes: Nodes) -> None:
    number = await grant(nodes, "beta")
    asked = pb.GetReservationRequest(reservation_id=number)
    found = await nodes.ask("one", "GetReservation", asked, pb.GetReservationResponse)
    assert (found.reservation.ledger, found.reservation.state) == ("beta", pb.RESERVATION_STATE_OPEN)
    cancel = pb.CancelReservationRequest(reservation_id=number, not_sent=True)
    ended = await nodes.ask("one", "CancelReservation", cancel, pb.CancelReservationResponse)
    assert ended.reservation.state == pb.RESERVATION_STATE_RELEASED
    assert (await nodes.refused("one", "CancelReservation", cancel)).code is Code.FAILED_PRECONDITION
    unknown = pb.GetReservationRequest(reservation_id=new_id())
    assert (await nodes.refused("one", "GetReservation", unknown)).code is Code.NOT_FOUND
    nodes.owners["gamma"] = ""
    assert (await nodes.refused("one", "GetReservation", unknown)).code is Code.UNAVAILABLE


async def test_one_that_holds_goes_before_a_tombstone_elsewhere(nodes: Nodes) -> None:
    number = await grant(nodes, "beta")
    caller = Caller(nodes.servers["one"])
    try:
        # The first server does not know the second one here: it leaves a tombstone.
        await caller.coordinator.Release(pb.ReleaseRequest(reservation_id=number))
    finally:
        await caller.close()
    for node in ("one", "two"):
        asked = pb.GetReservationRequest(reservation_id=number)
        found = await nodes.ask(node, "GetReservation", asked, pb.GetReservationResponse)
        assert found.reservation.ledger == "beta"


async def test_a_ledger_that_has_moved_is_asked_where_it_is_now(nodes: Nodes) -> None:
    nodes.owners["alpha"] = "two"  # and it is not there yet
    problem = await nodes.refused("one", "GetSpend", pb.GetSpendRequest(ledger="alpha"))
    assert (problem.code, nodes.calls) == (Code.UNAVAILABLE, [("two", ADMIN)])


async def test_upgrades_are_finalized_by_the_owner(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    forms: list[tuple[str, int]] = []

    async def finalize(owner: Owner, form: int) -> None:
        if form > FORM:
            raise ValueError("form 5 cannot be written")
        forms.append((owner.ledger, form))

    monkeypatch.setattr(Owner, "finalize", finalize)
    request = pb.FinalizeUpgradeRequest(ledger="beta")
    answer = await nodes.ask("one", "FinalizeUpgrade", request, pb.FinalizeUpgradeResponse)
    assert (answer.ledger.name, forms) == ("beta", [("beta", FORM)])
    too_new = pb.FinalizeUpgradeRequest(ledger="beta", form=FORM + 1)
    assert (await nodes.refused("one", "FinalizeUpgrade", too_new)).code is Code.FAILED_PRECONDITION
    nodes.old = {"one"}
    problem = await nodes.refused("one", "FinalizeUpgrade", request)
    assert problem.code is Code.FAILED_PRECONDITION
    assert "'one'" in problem.message
    assert forms == [("beta", FORM)]


async def test_a_ledger_is_handed_over_by_its_owner(nodes: Nodes) -> None:
    request = pb.HandOverLedgerRequest(ledger="beta", node="one")
    answer = await nodes.ask("one", "HandOverLedger", request, pb.HandOverLedgerResponse)
    assert (answer.node, nodes.handed) == ("one", [("two", "beta", "one")])
    unknown = pb.HandOverLedgerRequest(ledger="beta", node="nine")
    assert (await nodes.refused("one", "HandOverLedger", unknown)).code is Code.FAILED_PRECONDITION
    await nodes.ask("two", "HandOverLedger", pb.HandOverLedgerRequest(ledger="beta"), pb.HandOverLedgerResponse)
    assert nodes.handed[-1] == ("two", "beta", "")


async def test_a_server_alone_has_nothing_to_hand_over(nodes: Nodes) -> None:
    caller = Caller(nodes.servers["one"])
    try:
        for call in (
            caller.admin.HandOverLedger(pb.HandOverLedgerRequest(ledger="alpha")),
            caller.admin.FinalizeUpgrade(pb.FinalizeUpgradeRequest(ledger="alpha")),
        ):
            with pytest.raises(Exception, match="kept by one server alone"):
                await call
    finally:
        await caller.close()


async def test_damage_between_servers_is_an_error_in_words(nodes: Nodes) -> None:
    handler = nodes.admins["one"].peer_handlers()[ADMIN]
    assert b"same version" in await handler(b"\xc1")
    assert b"without this call" in await handler(msgspec.msgpack.encode(("Fly", b"")))


# -- watching ---------------------------------------------------------------------------------------------------------


class Watch:
    """One watch at one server, and what it knows."""

    def __init__(self, nodes: Nodes, node: str, reservations: bool = False) -> None:
        admin = nodes.admins[node]
        self.hub = Hub(admin.watched, admin.last_state, Elsewhere(nodes.fleets[node]))
        self.stream = self.hub.follow(pb.WatchRequest(reservations=reservations), 0.13)
        self.pools: dict[str, pb.Pool] = {}
        self.ledgers: dict[str, pb.Ledger] = {}
        self.events: list[pb.WatchEvent] = []

    async def snapshot(self) -> None:
        async with asyncio.timeout(10):
            while (await self.next()).phase != pb.WATCH_PHASE_SNAPSHOT_END:
                pass

    async def next(self) -> pb.WatchResponse:
        response = await anext(self.stream)
        for event in response.events:
            self.events.append(event)
            kind = event.WhichOneof("resource")
            if kind == "pool":
                self.pools[event.pool.name] = event.pool
            elif kind == "ledger":
                self.ledgers[event.ledger.name] = event.ledger
        return response

    async def until(self, kind: str) -> pb.WatchEvent:
        async with asyncio.timeout(10):
            while True:
                seen = len(self.events)
                await self.next()
                for event in self.events[seen:]:
                    if event.WhichOneof("resource") == kind:
                        return event


async def test_a_watch_sees_the_ledgers_of_others(nodes: Nodes) -> None:
    watch = Watch(nodes, "one", reservations=True)
    await watch.snapshot()
    assert {(ledger.name, ledger.owner) for ledger in watch.ledgers.values()} == set(OWNERS.items())
    assert {pool.ledger for pool in watch.pools.values()} == set(LEDGERS)
    number = await grant(nodes, "beta")
    opened = (await watch.until("reservation")).reservation
    assert (opened.reservation_id, opened.state) == (number, pb.RESERVATION_STATE_OPEN)
    cancel = pb.CancelReservationRequest(reservation_id=number, not_sent=True)
    await nodes.ask("two", "CancelReservation", cancel, pb.CancelReservationResponse)
    ended = await watch.until("reservation")
    assert (ended.reservation.state, ended.removed) == (pb.RESERVATION_STATE_RELEASED, False)
    await watch.stream.aclose()


async def test_a_watch_without_change_is_quiet_and_an_owner_away_removes_nothing(nodes: Nodes) -> None:
    watch = Watch(nodes, "one")
    await watch.snapshot()
    nodes.dead = {"two"}
    watch.events.clear()

    async def until_all_are(state: pb.LedgerState.ValueType) -> None:
        while any(watch.ledgers[name].state != state for name in ("beta", "gamma")):
            await watch.until("ledger")

    await until_all_are(pb.LEDGER_STATE_UNAVAILABLE)
    nodes.dead = set()
    await until_all_are(pb.LEDGER_STATE_READY)
    nodes.owners["beta"] = nodes.owners["gamma"] = ""
    await until_all_are(pb.LEDGER_STATE_UNAVAILABLE)
    nodes.owners = dict(OWNERS)
    await until_all_are(pb.LEDGER_STATE_READY)
    assert not [event for event in watch.events if event.removed]
    assert not [event for event in watch.events if event.WhichOneof("resource") == "pool"]
    await watch.stream.aclose()
