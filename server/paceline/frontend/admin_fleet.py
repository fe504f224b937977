"""AdminService over ledgers that several processes own: whom to ask, and how the answers become one.

Every process takes every call. What is about a ledger goes to its owner, which looks at its own ledgers only, so a call
is passed on once. A pool or a reservation that is not here is looked for at one owner after the other. Lists go ledger
by ledger, in the order of their names; a page token says which is next, and where in it.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import grpc
import msgspec
from google.protobuf.message import DecodeError, Message

from paceline.frontend.errors import Code, Problem, invalid, missing, refused, unavailable, unexpected
from paceline.frontend.explained import KNOWN, merged
from paceline.frontend.limits import ADMIN_TIMEOUT_US, DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable, Transport
from paceline.frontend.replies import CURRENCY
from paceline.ledger.commands import NodeInfo
from paceline.ledger.owner import Owner
from paceline_client.stubs import v1 as pb

ADMIN = "Admin.Call"
"""The method of the peer service: an AdminService call about the ledgers that the process owns."""

M = TypeVar("M", bound=Message)

_CODES = {int(code.value[0]): code for code in grpc.StatusCode}


class Seat(Protocol):
    """Where a ledger is. ``owner``: it is in this process. An empty ``address``: nobody knows."""

    @property
    def epoch(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def owner(self) -> Owner | None: ...


class Keeper(Protocol):
    """What administration needs of :class:`paceline.ledger.keeper.Keeper`."""

    def where(self, ledger: str) -> Seat: ...
    def ledgers(self) -> list[str]: ...
    def nodes(self) -> dict[str, NodeInfo]: ...
    async def hand_over(self, ledger: str, node: str = "") -> str: ...


class NotHere(Problem):
    """The ledgers of this process do not have it; if the code is UNAVAILABLE, one that cannot be read may."""


class AdminCall(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A call whose caller may make it."""

    method: str
    request: bytes


class AdminAnswer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The answer, or a :class:`Problem`."""

    code: int
    body: bytes = b""
    message: str = ""
    violations: tuple[tuple[str, str], ...] = ()
    retry_after_us: int | None = None
    not_here: bool = False


_encode = msgspec.msgpack.Encoder().encode
_decode_call = msgspec.msgpack.Decoder(AdminCall).decode
_decode_answer = msgspec.msgpack.Decoder(AdminAnswer).decode


class Method(msgspec.Struct, frozen=True):
    """One unary rpc, over the ledgers of this process."""

    request: type[Message]
    response: type[Message]
    serve: Callable[[Message], Awaitable[Message]]


async def serve_call(methods: Mapping[str, Method], body: bytes) -> bytes:
    """Answer another process's call from the ledgers of this one. Never raises but for cancellation."""
    problem: Problem
    try:
        call = _decode_call(body)
        method = methods.get(call.method)
        if method is None:
            raise Problem(Code.UNIMPLEMENTED, "the owner of the ledger runs a version without this call")
        answer = await method.serve(method.request.FromString(call.request))
        return _encode(AdminAnswer(0, answer.SerializeToString()))
    except Problem as error:
        problem = error
    except (DecodeError, msgspec.DecodeError):
        problem = Problem(Code.INTERNAL, "another server sent what cannot be read: do all run the same version?")
    except Exception as error:
        problem = unexpected("admin", error)
    return _encode(
        AdminAnswer(
            int(problem.code.value[0]),
            b"",
            problem.message,
            tuple(problem.violations),
            problem.retry_after_us,
            isinstance(problem, NotHere),
        )
    )


class Site(msgspec.Struct, frozen=True):
    """A process that owns ledgers; without an address it is this one."""

    node: str
    address: str = ""


_HERE = Site("")

_OF_LEDGER = {
    "GetSpend": "ledger",
    "FinalizeUpgrade": "ledger",
    "HandOverLedger": "ledger",
}
_OF_POOL = {
    "GetPool": "name",
    "PausePool": "name",
    "ResumePool": "name",
}
_LISTS = {
    "ListPools": "pools",
    "ListShares": "shares",
    "ListReservations": "reservations",
    "GetReport": "reports",
    "ListLimits": "pools",
    "ListAdvice": "pools",
}
_LISTS_OF_POOL = ("ListShares", "GetReport", "ListLimits", "ListAdvice")
"""Lists that can be of one pool."""
_RESERVATION_CHANGES = ("UpdateReservation", "CancelReservation")


class Fleet:
    """Sends calls to where they belong. ``form`` is the newest form of journals that this process writes."""

    def __init__(self, node: str, keeper: Keeper, transport: Transport, form: int) -> None:
        self.node = node
        self.keeper = keeper
        self.transport = transport
        self.form = form
        self.methods: Mapping[str, Method] = {}

    async def serve(self, name: str, request: Message) -> Message:
        """Answer a call about any ledger. Raises :class:`Problem`."""
        if name in _LISTS:
            return await self._list(name, request)
        if name == "ListLedgers":
            return await self._list_ledgers(request)
        if name == "GetLedger":
            return await self._get_ledger(request)
        if name == "SetMode":
            return await self._set_mode(request)
        if name == "GetReservation":
            return (await self._reservation(request))[1]
        if name == "Explain":
            return await self._explain(request)
        if name in _RESERVATION_CHANGES:
            return await self._change_reservation(name, request)
        if name in _OF_LEDGER:
            return await self._at(_text(request, _OF_LEDGER[name]), _OF_LEDGER[name], name, request)
        if name == "UpdateLimit" or name in _OF_POOL:
            return await self._anywhere(name, request)
        if isinstance(request, pb.UpdateShareRequest):
            return await self._at(request.share.ledger, "share.ledger", name, request)
        if name == "GetShare":
            if not _text(request, "pool") and _text(request, "ledger"):
                return await self._at(_text(request, "ledger"), "ledger", name, request)
            return await self._anywhere(name, request)
        return await self._here(name, request)

    # -- one process ------------------------------------------------------------------------------------------------

    async def _here(self, name: str, request: Message) -> Message:
        return await self.methods[name].serve(request)

    async def _ask(self, site: Site, name: str, request: Message) -> Message:
        """One process's answer. Raises :class:`Problem`."""
        if not site.address:
            return await self._here(name, request)
        body = _encode(AdminCall(name, request.SerializeToString()))
        try:
            answer = _decode_answer(await self.transport.call(site.address, ADMIN, body, ADMIN_TIMEOUT_US / 1e6))
        except (PeerRefused, PeerUnreachable):
            raise unavailable(f"server {site.node!r}, which owns the ledger, does not answer: ask again") from None
        except msgspec.DecodeError:
            raise unavailable(f"server {site.node!r} gives an answer that cannot be read: ask again") from None
        if answer.code == 0:
            return self.methods[name].response.FromString(answer.body)
        kind = NotHere if answer.not_here else Problem
        code = _CODES.get(answer.code, Code.UNKNOWN)
        raise kind(code, answer.message, answer.violations, answer.retry_after_us)

    def _site(self, ledger: str, path: str) -> Site:
        """The owner of a ledger. Raises :class:`Problem`."""
        if not ledger:
            raise invalid(path, "is required: the name of a ledger")
        seat = self.keeper.where(ledger)
        if seat.owner is not None:
            return _HERE
        if ledger not in self.keeper.ledgers():
            raise missing(f"{path}: there is no ledger of this name")
        if not seat.address or seat.node == self.node:
            raise unavailable(f"ledger {ledger!r} has no owner now: ask again")
        return Site(seat.node, seat.address)

    async def _at(self, ledger: str, path: str, name: str, request: Message) -> Message:
        site = self._site(ledger, path)
        try:
            return await self._ask(site, name, request)
        except NotHere as problem:
            if self._site(ledger, path) == site:
                raise unavailable(f"ledger {ledger!r} is changing its owner: ask again") from problem
        # It has moved meanwhile.
        return await self._ask(self._site(ledger, path), name, request)

    # -- some process -----------------------------------------------------------------------------------------------

    def _sites(self) -> tuple[list[Site], list[str]]:
        """This process and the owners of other ledgers, and the ledgers that nobody is known to own."""
        sites = {_HERE: None}
        lost: list[str] = []
        for ledger in self.keeper.ledgers():
            seat = self.keeper.where(ledger)
            if seat.owner is not None:
                continue
            if seat.address and seat.node != self.node:
                sites[Site(seat.node, seat.address)] = None
            else:
                lost.append(ledger)
        return list(sites), lost

    async def _anywhere(self, name: str, request: Message) -> Message:
        """The answer of the first process that has what the request names."""
        sites, lost = self._sites()
        away: Problem | None = None
        last: Problem | None = None
        for site in sites:
            try:
                return await self._ask(site, name, request)
            except NotHere as problem:
                last = problem
                if problem.code is Code.UNAVAILABLE:
                    away = problem
            except Problem as problem:
                if not site.address or problem.code is not Code.UNAVAILABLE:
                    raise
                away = problem
        if away is None and lost:
            away = unavailable(f"ledger {lost[0]!r} has no owner now: ask again")
        raise away or last or missing("there is nothing of this name")

    async def _reservation(self, request: Message) -> tuple[Site, pb.GetReservationResponse]:
        """A reservation, and who has it. One ledger may have it while others have a tombstone."""
        sites, lost = self._sites()
        found: list[tuple[Site, pb.GetReservationResponse]] = []
        away: Problem | None = None
        last: Problem | None = None
        for site in sites:
            try:
                answer = await self._ask(site, "GetReservation", request)
            except NotHere as problem:
                last = problem
                if problem.code is Code.UNAVAILABLE:
                    away = problem
            except Problem as problem:
                if not site.address or problem.code is not Code.UNAVAILABLE:
                    raise
                away = problem
            else:
                if isinstance(answer, pb.GetReservationResponse):
                    found.append((site, answer))
        alive = [each for each in found if each[1].reservation.state in _ALIVE]
        if not alive and away is None and lost:
            away = unavailable(f"ledger {lost[0]!r} has no owner now, and may know it: ask again")
        if not found:
            raise away or last or missing("reservation_id: no reservation of this id is on the books")
        if len({answer.reservation.identity for _, answer in found}) > 1:
            raise refused("identity", "several identities use this id: name one")
        granted = [each for each in found if each[1].reservation.state != pb.RESERVATION_STATE_TOMBSTONE]
        return (alive or granted or found)[0]

    async def _explain(self, request: Message) -> Message:
        """What all processes know of a reservation, or say of a call, as one."""
        sites, lost = self._sites()
        found: list[pb.ExplainResponse] = []
        away: Problem | None = None
        last: Problem | None = None
        for site in sites:
            try:
                answer = await self._ask(site, "Explain", request)
            except NotHere as problem:
                last = problem
                if problem.code is Code.UNAVAILABLE:
                    away = problem
            except Problem as problem:
                if not site.address or problem.code is not Code.UNAVAILABLE:
                    raise
                away = problem
            else:
                if isinstance(answer, pb.ExplainResponse):
                    found.append(answer)
        if away is None and lost:
            away = unavailable(f"ledger {lost[0]!r} has no owner now, and may know it: ask again")
        decided = any(each.reservation.state in KNOWN for each in found)
        if away is not None and not decided:
            # What is away may have what others only denied, or would grant what others would not.
            raise away
        if not found:
            raise last or missing("reservation_id: no reservation of this id is on the books")
        return merged(found)

    async def _change_reservation(self, name: str, request: Message) -> Message:
        asked = pb.GetReservationRequest(
            reservation_id=_text(request, "reservation_id"), identity=_text(request, "identity")
        )
        site, _ = await self._reservation(asked)
        return await self._ask(site, name, request)

    # -- all ledgers ------------------------------------------------------------------------------------------------

    async def _set_mode(self, request: Message) -> Message:
        if _text(request, "pool"):
            return await self._anywhere("SetMode", request)
        if _text(request, "ledger"):
            return await self._at(_text(request, "ledger"), "ledger", "SetMode", request)
        response = pb.SetModeResponse()
        for ledger in self.keeper.ledgers():
            part = pb.SetModeRequest.FromString(request.SerializeToString())
            part.ledger = ledger
            answer = await self._at(ledger, "ledger", "SetMode", part)
            if isinstance(answer, pb.SetModeResponse):
                response.settings.extend(answer.settings)
        return response

    async def _list(self, name: str, request: Message) -> Message:
        ledger = _text(request, "ledger")
        if ledger:
            return await self._at(ledger, "ledger", name, request)
        if name in _LISTS_OF_POOL and _text(request, "pool"):
            return await self._anywhere(name, request)
        field = _LISTS[name]
        left = page_size(_number(request, "page_size"))
        first, inner = _unpack(_text(request, "page_token"))
        response = self.methods[name].response()
        for ledger in self.keeper.ledgers():
            if ledger < first:
                continue
            if left == 0:
                _set(response, "next_page_token", _pack(ledger, ""))
                return response
            part = type(request)()
            part.CopyFrom(request)
            _set(part, "ledger", ledger)
            _set(part, "page_size", left)
            _set(part, "page_token", inner if ledger == first else "")
            answer = await self._at(ledger, "ledger", name, part)
            entries = getattr(answer, field)
            getattr(response, field).extend(entries)
            left -= len(entries)
            more = _text(answer, "next_page_token")
            if more:
                _set(response, "next_page_token", _pack(ledger, more))
                return response
        return response

    async def _list_ledgers(self, request: Message) -> Message:
        size = page_size(_number(request, "page_size"))
        first, _ = _unpack(_text(request, "page_token"))
        names = [name for name in self.keeper.ledgers() if name >= first]
        ledgers = await asyncio.gather(*(self.ledger(name) for name in names[:size]))
        token = _pack(names[size], "") if len(names) > size else ""
        return pb.ListLedgersResponse(ledgers=ledgers, next_page_token=token)

    async def _get_ledger(self, request: Message) -> Message:
        name = _text(request, "name")
        if not name:
            raise invalid("name", "is required: the name of a ledger")
        if name not in self.keeper.ledgers():
            raise missing("name: there is no ledger of this name")
        return pb.GetLedgerResponse(ledger=await self.ledger(name))

    async def ledger(self, name: str) -> pb.Ledger:
        """A ledger as its owner shows it; if that cannot be asked, what is known here."""
        try:
            answer = await self._at(name, "name", "GetLedger", pb.GetLedgerRequest(name=name))
        except Problem as problem:
            return self.lost(name, problem.message)
        return answer.ledger if isinstance(answer, pb.GetLedgerResponse) else self.lost(name, "")

    def lost(self, name: str, reason: str) -> pb.Ledger:
        """A ledger whose owner does not answer."""
        seat = self.keeper.where(name)
        return pb.Ledger(
            name=name,
            account=name,
            state=pb.LEDGER_STATE_UNAVAILABLE,
            state_reason=reason,
            currency_code=CURRENCY,
            owner=seat.node,
            epoch=seat.epoch,
        )

    # -- what only owners do ----------------------------------------------------------------------------------------

    async def finalize(self, ledger: str, form: int) -> None:
        """Have a ledger that is owned here written in a newer form. Raises :class:`Problem`."""
        owner = self.keeper.where(ledger).owner
        if owner is None:
            raise NotHere(Code.UNAVAILABLE, f"ledger {ledger!r} is not owned here: ask again")
        nodes = self.keeper.nodes().values()
        form = form or max((info.form for info in nodes), default=self.form)
        older = sorted(info.node for info in nodes if info.form < form)
        if older:
            raise refused("form", f"{form} is not known to server {older[0]!r}: upgrade it first")
        try:
            await owner.finalize(form)
        except ValueError as error:
            raise refused("form", str(error)) from None

    async def hand_over(self, ledger: str, node: str) -> str:
        """Have a ledger that is owned here given to another process; its name. Raises :class:`Problem`."""
        if self.keeper.where(ledger).owner is None:
            raise NotHere(Code.UNAVAILABLE, f"ledger {ledger!r} is not owned here: ask again")
        living = sorted(name for name, info in self.keeper.nodes().items() if info.ready and name != self.node)
        if node == self.node:
            return node
        if node and node not in living:
            shown = ", ".join(living[:20]) or "none"
            raise refused("node", f"there is no other server {node!r} that takes ledgers; there are: {shown}")
        if not living:
            raise refused("node", "there is no other server that takes ledgers")
        found = await self.keeper.hand_over(ledger, node)
        if not found:
            raise unavailable(f"ledger {ledger!r} could not be handed over now: ask again")
        return found


_ALIVE = frozenset({pb.RESERVATION_STATE_OPEN, pb.RESERVATION_STATE_WAITING})


def page_size(asked: int) -> int:
    """Entries of one page. Raises :class:`Problem`."""
    if asked < 0:
        raise invalid("page_size", "must not be negative")
    return min(asked or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def _text(message: Message, field: str) -> str:
    return str(getattr(message, field, ""))


def _number(message: Message, field: str) -> int:
    return int(getattr(message, field, 0))


def _set(message: Message, field: str, value: str | int) -> None:
    setattr(message, field, value)


def _pack(ledger: str, inner: str) -> str:
    return base64.urlsafe_b64encode(f"2\n{ledger}\n{inner}".encode()).decode()


def _unpack(token: str) -> tuple[str, str]:
    if not token:
        return "", ""
    try:
        version, ledger, inner = base64.urlsafe_b64decode(token.encode()).decode().split("\n")
        if version != "2":
            raise ValueError
    except ValueError:
        raise invalid("page_token", "is not one of this server: start at the first page") from None
    return ledger, inner
