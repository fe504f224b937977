"""AdminService over the ledgers of this server.

What is shown comes from memory, at the instant of the question; what is changed goes through the ledger like any other
operation. Needs the role ``admin``.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from paceline.engine.answers import Answer, Invalid, Released
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import GAUGES, UNLIMITED, Dimension, Limit, Window
from paceline.engine.operations import (
    Expire,
    Mode,
    Operation,
    Release,
    Renew,
    SetLimit,
    SetMode,
    SetPaused,
)
from paceline.engine.state import Ended, Pool, Reservation, State
from paceline.engine.waiting import Pending
from paceline.frontend import report, view
from paceline.frontend.auth import Authenticator
from paceline.frontend.desk import problem_of
from paceline.frontend.errors import Code, Problem, exhausted, invalid, missing, refused, undecodable, unexpected
from paceline.frontend.limits import (
    DEFAULT_PAGE_SIZE,
    MAX_HOLD_US,
    MAX_PAGE_SIZE,
    MAX_PAUSE_REASON_CHARS,
    MAX_RETRY_AFTER_US,
    MAX_WATCH_NAMES,
    MAX_WATCHES,
    WATCH_INTERVAL_US,
)
from paceline.frontend.places import Places
from paceline.frontend.replies import money
from paceline.frontend.requests import duration_us, label, uuid_of
from paceline.frontend.routing import Router, Slot
from paceline.frontend.session import Context
from paceline.ledger.owner import LedgerError
from paceline_client.stubs import v1 as pb

SERVICE = "paceline.v1.AdminService"
_CHUNK = 4_096
"""Reservations looked at between two turns of the event loop."""
_MAX_WATCHED_RESERVATIONS = 20_000
_MAX_GONE = 20_000
_EVENTS_A_MESSAGE = 256
_WINDOWS = frozenset(int(window) for window in Window)
_MAX_LIMIT = 1_000_000_000_000_000

M = TypeVar("M", bound=Message)
T = TypeVar("T")
R = TypeVar("R", contravariant=True)

_Found = Pending | Reservation | Ended
_WAITING, _OPEN, _ENDED = -1, 0, 1
"""Parts of a list, in the order of a life: whoever moves on while pages are read may come twice, but is not missed."""


class Admin:
    """The service. ``provider_of`` names the provider of an account."""

    def __init__(
        self, router: Router, authenticator: Authenticator, places: Places, provider_of: Callable[[str], str]
    ) -> None:
        self._router = router
        self._authenticator = authenticator
        self._places = places
        self._provider_of = provider_of
        self._pause_reasons: dict[str, str] = {}
        """By pool; never more than there are pools."""
        self._hub = _Hub(self)
        self._watches: set[asyncio.Task[object]] = set()
        self.requests: Counter[tuple[str, str]] = Counter()
        """Unary calls that ended, by method and status."""

    def handler(self) -> grpc.GenericRpcHandler:
        """What to add to a server."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "ListLedgers": self._unary(pb.ListLedgersRequest, self._list_ledgers),
                "GetLedger": self._unary(pb.GetLedgerRequest, self._get_ledger),
                "ListPools": self._unary(pb.ListPoolsRequest, self._list_pools),
                "GetPool": self._unary(pb.GetPoolRequest, self._get_pool),
                "PausePool": self._unary(pb.PausePoolRequest, self._pause_pool),
                "ResumePool": self._unary(pb.ResumePoolRequest, self._resume_pool),
                "UpdateLimit": self._unary(pb.UpdateLimitRequest, self._update_limit),
                "SetMode": self._unary(pb.SetModeRequest, self._set_mode),
                "ListShares": self._unary(pb.ListSharesRequest, self._list_shares),
                "GetShare": self._unary(pb.GetShareRequest, self._get_share),
                "UpdateShare": self._unary(pb.UpdateShareRequest, self._update_share),
                "GetSpend": self._unary(pb.GetSpendRequest, self._get_spend),
                "ListReservations": self._unary(pb.ListReservationsRequest, self._list_reservations),
                "GetReservation": self._unary(pb.GetReservationRequest, self._get_reservation),
                "UpdateReservation": self._unary(pb.UpdateReservationRequest, self._update_reservation),
                "CancelReservation": self._unary(pb.CancelReservationRequest, self._cancel_reservation),
                "Explain": self._unary(pb.ExplainRequest, self._explain),
                "GetReport": self._unary(pb.GetReportRequest, self._get_report),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            },
        )

    @property
    def watching(self) -> int:
        """Watches that are open."""
        return len(self._watches)

    def close(self) -> None:
        """End every watch."""
        for task in self._watches:
            task.cancel()

    def _unary(self, kind: type[M], serve: _Serve[M]) -> grpc.RpcMethodHandler[bytes, bytes]:
        method = kind.__name__.removesuffix("Request")

        async def handle(raw: bytes, context: Context) -> bytes:
            problem: Problem
            try:
                self._authenticator.administrator(context.invocation_metadata())
                try:
                    message = kind.FromString(raw)
                except DecodeError:
                    raise undecodable() from None
                body = (await serve(message)).SerializeToString()
                self.requests[method, "OK"] += 1
                return body
            except Problem as error:
                problem = error
            except Exception as error:
                problem = unexpected("admin", error)
            self.requests[method, problem.code.name] += 1
            await problem.abort(context)
            return b""

        return grpc.unary_unary_rpc_method_handler(handle)

    # -- ledgers and pools --------------------------------------------------------------------------------------

    async def _list_ledgers(self, request: pb.ListLedgersRequest) -> pb.ListLedgersResponse:
        slots = [self._router.slots[name] for name in sorted(self._router.slots)]
        page, token = _page(slots, request.page_size, request.page_token, lambda slot: slot.account)
        return pb.ListLedgersResponse(ledgers=map(self.ledger, page), next_page_token=token)

    async def _get_ledger(self, request: pb.GetLedgerRequest) -> pb.GetLedgerResponse:
        return pb.GetLedgerResponse(ledger=self.ledger(self._slot(request.name, "name")))

    async def _list_pools(self, request: pb.ListPoolsRequest) -> pb.ListPoolsResponse:
        found = [(slot, state, pool) for slot, state in self._books(request.ledger) for pool in state.pools.values()]
        found.sort(key=lambda each: each[2].name)
        page, token = _page(found, request.page_size, request.page_token, lambda each: each[2].name)
        return pb.ListPoolsResponse(pools=[self.pool(*each) for each in page], next_page_token=token)

    async def _get_pool(self, request: pb.GetPoolRequest) -> pb.GetPoolResponse:
        return pb.GetPoolResponse(pool=self.pool(*self._pool(request.name, "name")))

    async def _pause_pool(self, request: pb.PausePoolRequest) -> pb.PausePoolResponse:
        slot, state, pool = self._pool(request.name, "name")
        label(request.reason, "reason", MAX_PAUSE_REASON_CHARS)
        if request.HasField("expires_in"):
            raise _later("expires_in", "a pause that ends by itself; leave it empty and resume the pool")
        _check_etag(request.etag, view.pool_etag(state, pool))
        await self._change(slot, SetPaused(pool.name, True))
        self._pause_reasons[pool.name] = request.reason
        return pb.PausePoolResponse(pool=self.pool(*self._pool(request.name, "name")))

    async def _resume_pool(self, request: pb.ResumePoolRequest) -> pb.ResumePoolResponse:
        slot, state, pool = self._pool(request.name, "name")
        _check_etag(request.etag, view.pool_etag(state, pool))
        await self._change(slot, SetPaused(pool.name, False))
        self._pause_reasons.pop(pool.name, None)
        return pb.ResumePoolResponse(pool=self.pool(*self._pool(request.name, "name")))

    async def _update_limit(self, request: pb.UpdateLimitRequest) -> pb.UpdateLimitResponse:
        label(request.reason, "reason", MAX_PAUSE_REASON_CHARS)
        slot, state, pool = self._pool(request.limit.pool, "limit.pool")
        if request.limit.share:
            raise _later("limit.share", "overrides of shares; change the configuration")
        dimension = _dimension(request.limit.dimension, "limit.dimension")
        if request.limit.window and request.limit.window not in _WINDOWS:
            raise invalid("limit.window", "is not known: use one of the values of Window")
        bucket = self._bucket(state, request.limit)
        limit: Limit | None
        change = request.WhichOneof("change")
        if change == "override":
            limit = self._override(request.override, bucket)
        elif change == "clear" and request.clear:
            limit = None
        else:
            raise invalid("override", "or `clear: true` is required")
        _check_etag(request.etag, view.limit_etag(bucket))
        await self._change(slot, SetLimit(pool.name, dimension, limit))
        after = self._bucket(view.books(slot), request.limit)
        return pb.UpdateLimitResponse(limit=view.limit(after, slot.owner.now()))

    def _override(self, override: pb.LimitOverride, bucket: Bucket) -> Limit:
        if override.HasField("expires_in"):
            raise _later("override.expires_in", "an override that ends by itself; leave it empty and clear it")
        amount = override.limit if override.HasField("limit") else bucket.amount
        burst = override.burst if override.HasField("burst") else None
        if not override.HasField("limit") and burst is None:
            raise invalid("override.limit", "or `override.burst` is required")
        for name, value in (("limit", amount), ("burst", burst)):
            if value is not None and not 0 <= value <= max(_MAX_LIMIT, bucket.amount):
                raise invalid(f"override.{name}", f"must be from 0 to {_MAX_LIMIT:,}")
        if burst is not None and bucket.dimension in GAUGES:
            raise invalid("override.burst", "does not go with a gauge: leave it empty")
        return Limit(bucket.dimension, bucket.window, amount, burst)

    async def _set_mode(self, request: pb.SetModeRequest) -> pb.SetModeResponse:
        tenant = label(request.tenant, "tenant")
        if request.mode == pb.MODE_UNSPECIFIED:
            raise _later("mode", "removing a setting; set ENFORCE or OBSERVE")
        if request.mode not in (pb.MODE_ENFORCE, pb.MODE_OBSERVE):
            raise invalid("mode", "is not known: use ENFORCE or OBSERVE")
        if request.pool:
            slots = [self._pool(request.pool, "pool")[0]]
            if request.ledger and request.ledger != slots[0].account:
                raise missing("pool: the ledger has no pool of this name")
        elif request.ledger:
            slots = [self._slot(request.ledger, "ledger")]
        else:
            slots = list(self._router.slots.values())
        operation = SetMode(Mode(request.mode), request.pool, tenant)
        for slot in slots:
            await self._change(slot, operation)
        settings = [
            setting
            for slot in slots
            for setting in view.modes(slot, view.books(slot))
            if (not request.pool or setting.pool in ("", request.pool))
            and (not tenant or setting.tenant in ("", tenant))
        ]
        return pb.SetModeResponse(settings=settings)

    # -- shares and spend ---------------------------------------------------------------------------------------

    async def _list_shares(self, request: pb.ListSharesRequest) -> pb.ListSharesResponse:
        ledger = request.ledger
        if request.pool:
            slot = self._pool(request.pool, "pool")[0]
            if ledger and ledger != slot.account:
                raise missing("pool: the ledger has no pool of this name")
            ledger = slot.account
        found = [
            (slot, state, share)
            for slot, state in self._books(ledger)
            for share in state.shares.values()
            if not request.parent or share.name.rpartition("/")[0] == request.parent
        ]
        found.sort(key=lambda each: (each[0].account, each[2].name))
        page, token = _page(
            found, request.page_size, request.page_token, lambda each: f"{each[0].account}\0{each[2].name}"
        )
        shares = [view.share(slot, state, share, request.pool) for slot, state, share in page]
        return pb.ListSharesResponse(shares=shares, next_page_token=token)

    async def _get_share(self, request: pb.GetShareRequest) -> pb.GetShareResponse:
        if request.pool:
            slot, state, _ = self._pool(request.pool, "pool")
        else:
            slot = self._slot(request.ledger, "ledger")
            state = view.books(slot)
        share = state.shares.get(request.name)
        if share is None:
            raise missing("name: the ledger has no share of this name")
        return pb.GetShareResponse(share=view.share(slot, state, share, request.pool))

    async def _update_share(self, _: pb.UpdateShareRequest) -> pb.UpdateShareResponse:
        raise _later("share", "changing shares while the server runs; change the configuration and restart")

    async def _get_spend(self, request: pb.GetSpendRequest) -> pb.GetSpendResponse:
        slot = self._slot(request.ledger, "ledger")
        state = view.books(slot)
        now = slot.owner.now()
        if request.pool:
            raise _later("pool", "spend by pool; leave it empty")
        if request.HasField("month"):
            try:
                month = request.month.ToDatetime()
            except (ValueError, OverflowError):
                raise invalid("month", "is no time: `seconds` or `nanos` are out of range") from None
            if month.timetuple()[:2] != view.timestamp(now).ToDatetime().timetuple()[:2]:
                raise _later("month", "past months; leave it empty for the present one")
        number = state.addresses.get(("", request.share, Dimension.SPEND, Window.MONTH))
        if number is None:
            if request.share:
                raise missing("share: has no spend cap in this ledger")
            return pb.GetSpendResponse(spent=money(0), held=money(0))
        bucket = state.buckets[number]
        spent = 0 if now >= bucket.turns_at else max(0, bucket.burst - bucket.level - bucket.held)
        response = pb.GetSpendResponse(spent=money(spent), held=money(bucket.held))
        if bucket.amount < UNLIMITED:
            response.cap.CopyFrom(money(bucket.amount))
        if now < bucket.turns_at:
            end = view.timestamp(bucket.turns_at)
            response.end_time.CopyFrom(end)
            last = view.timestamp(bucket.turns_at - 1).ToDatetime()
            response.start_time.FromDatetime(last.replace(day=1, hour=0, minute=0, second=0, microsecond=0))
        return response

    # -- reservations -------------------------------------------------------------------------------------------

    async def _list_reservations(self, request: pb.ListReservationsRequest) -> pb.ListReservationsResponse:
        wanted = set(request.states) or {pb.RESERVATION_STATE_WAITING, pb.RESERVATION_STATE_OPEN}
        for place, value in enumerate(request.states):
            if value not in pb.ReservationState.values():
                raise invalid(f"states[{place}]", "is not known: use the values of ReservationState")
        if pb.RESERVATION_STATE_UNSPECIFIED in wanted:
            wanted = set(pb.ReservationState.values())
        least_age = duration_us(request.min_age, "min_age", MAX_RETRY_AFTER_US, cut=True)
        size = _size(request.page_size)
        skip_ledger, skip_part, skip_at, skip_key = _unpack(request.page_token)
        response = pb.ListReservationsResponse()
        last = ("", 0, -1, "")
        for slot, state in self._books(request.ledger):
            if slot.account < skip_ledger:
                continue
            here = slot.account == skip_ledger
            latest = slot.owner.now() - least_age
            for part in (_WAITING, _OPEN, _ENDED):
                if here and part < skip_part:
                    continue
                resume = here and part == skip_part
                seen = 0
                for at, key, found in self._part(slot, state, part, wanted):
                    seen += 1
                    if seen % _CHUNK == 0:
                        await asyncio.sleep(0)
                    if resume:
                        if at < skip_at or (at == skip_at and key != skip_key):
                            continue
                        resume = False
                        if key == skip_key:
                            continue
                    if _created(found) > latest or not _matches(key, found, request):
                        continue
                    message = self._reservation(slot, state, key, found)
                    if message.state not in wanted:
                        continue
                    if len(response.reservations) == size:
                        response.next_page_token = _pack(*last)
                        return response
                    response.reservations.append(message)
                    last = (slot.account, part, at, key)
        return response

    @staticmethod
    def _part(
        slot: Slot, state: State, part: int, wanted: set[pb.ReservationState.ValueType]
    ) -> Iterator[tuple[int, str, _Found]]:
        """The entries of a part at this moment, each after where it stands; none if their state is not wanted."""
        if part == _WAITING:
            engine = slot.engine
            if engine is not None and pb.RESERVATION_STATE_WAITING in wanted:
                for waiter in engine.waiters():
                    yield waiter.ordinal, waiter.key, waiter
        elif part == _OPEN:
            if pb.RESERVATION_STATE_OPEN in wanted:
                for key, reservation in list(state.open.items()):
                    yield reservation.ordinal, key, reservation
        elif wanted - {pb.RESERVATION_STATE_OPEN, pb.RESERVATION_STATE_WAITING}:
            for key, ended in list(state.ended.items()):
                yield ended.ended_at, key, ended

    @staticmethod
    def _reservation(slot: Slot, state: State, key: str, found: _Found) -> pb.Reservation:
        if isinstance(found, Pending):
            return view.waiting(slot, found)
        if isinstance(found, Reservation):
            return view.opened(slot, state, found)
        return view.ended(slot, state, key, found)

    def _find(self, number: str, identity: str) -> tuple[Slot, State, str, _Found]:
        number = uuid_of(number, "reservation_id")
        names = [identity] if identity else self._authenticator.names()
        found: list[tuple[Slot, State, str, _Found]] = []
        for slot, state in self._books(""):
            engine = slot.engine
            for name in names:
                key = f"{name}/{number}"
                waiter = None if engine is None else engine.waiters().get(key)
                entry = state.open.get(key) or waiter or state.ended.get(key)
                if entry is not None:
                    found.append((slot, state, key, entry))
        if not found:
            raise missing("reservation_id: no reservation of this id is on the books")
        if len({key for _, _, key, _ in found}) > 1:
            raise refused("identity", "several identities use this id: name one")
        # One ledger may have it while others have a tombstone.
        return next((each for each in found if not isinstance(each[3], Ended)), found[0])

    async def _get_reservation(self, request: pb.GetReservationRequest) -> pb.GetReservationResponse:
        return pb.GetReservationResponse(
            reservation=self._reservation(*self._find(request.reservation_id, request.identity))
        )

    async def _update_reservation(self, request: pb.UpdateReservationRequest) -> pb.UpdateReservationResponse:
        slot, _, key, found = self._find(request.reservation_id, request.identity)
        if not request.HasField("expires_in"):
            raise invalid("expires_in", "is required: when the hold shall end, from now")
        us = duration_us(request.expires_in, "expires_in", MAX_HOLD_US)
        if not isinstance(found, Reservation):
            raise refused("reservation_id", "the reservation is not open")
        _check_etag(request.etag, view.reservation_etag(found))
        if slot.owner.now() + us < found.expires_at:
            raise _later("expires_in", "an earlier end; cancel the reservation, or choose a later one")
        await self._change(slot, Renew(key, hold_us=us))
        return pb.UpdateReservationResponse(reservation=self._again(request.reservation_id, key))

    async def _cancel_reservation(self, request: pb.CancelReservationRequest) -> pb.CancelReservationResponse:
        slot, _, key, found = self._find(request.reservation_id, request.identity)
        if isinstance(found, Ended):
            raise refused("reservation_id", "the reservation has ended")
        _check_etag(request.etag, view.reservation_etag(found))
        withdraw = isinstance(found, Pending)
        answer = await self._change(slot, Release(key) if withdraw or request.not_sent else Expire(key))
        if isinstance(found, Pending) and isinstance(answer, Released) and answer.released:
            end = view.books(slot).ended.get(key)
            if end is not None and end.granted_at is None:
                return pb.CancelReservationResponse(reservation=view.withdrawn(slot, found, end))
        return pb.CancelReservationResponse(reservation=self._again(request.reservation_id, key))

    def _again(self, number: str, key: str) -> pb.Reservation:
        return self._reservation(*self._find(number, key.rpartition("/")[0]))

    async def _explain(self, _: pb.ExplainRequest) -> pb.ExplainResponse:
        raise _later("subject", "explanations: they need the audit export, which is not written yet")

    async def _get_report(self, request: pb.GetReportRequest) -> pb.GetReportResponse:
        tenant = label(request.tenant, "tenant")
        ledger = request.ledger
        if request.pool:
            slot = self._pool(request.pool, "pool")[0]
            if ledger and ledger != slot.account:
                raise missing("pool: the ledger has no pool of this name")
            ledger = slot.account
        slots = {slot.account: slot for slot, _ in self._books(ledger)}
        found = report.keys(slots.values(), request.pool, tenant, request.by_tenant)
        page, token = _page(list(found), request.page_size, request.page_token, lambda key: "\0".join(map(str, key)))
        reports = [report.report(slots[key[0]], key, found[key]) for key in page]
        return pb.GetReportResponse(reports=reports, next_page_token=token)

    # -- what both show and change need -----------------------------------------------------------------------------

    def ledger(self, slot: Slot) -> pb.Ledger:
        """As it is shown."""
        return view.ledger(slot, self._provider_of(slot.account))

    def pool(self, slot: Slot, state: State, pool: Pool) -> pb.Pool:
        """As it is shown."""
        targets: dict[bytes, pb.Target] = {}
        for destination in islice(self._places.destinations(pool.name), view.MAX_SHOWN_TARGETS):
            targets[destination.grant_target] = destination.target
        return view.pool(slot, state, pool, targets.values(), self._pause_reasons.get(pool.name, ""))

    def _slot(self, name: str, path: str) -> Slot:
        if not name:
            raise invalid(path, "is required: the name of a ledger")
        slot = self._router.slots.get(name)
        if slot is None:
            raise missing(f"{path}: this server has no ledger of this name")
        return slot

    def _books(self, ledger: str) -> list[tuple[Slot, State]]:
        """The books of one ledger, or of all, by name."""
        slots = [self._slot(ledger, "ledger")] if ledger else self._router.slots.values()
        return [(slot, view.books(slot)) for slot in sorted(slots, key=lambda slot: slot.account)]

    def _pool(self, name: str, path: str) -> tuple[Slot, State, Pool]:
        if not name:
            raise invalid(path, "is required: the name of a pool")
        for slot in self._router.slots.values():
            state = slot.state
            if state is not None and name in state.pools:
                state = view.books(slot)
                return slot, state, state.pools[name]
        away = next((slot for slot in self._router.slots.values() if not slot.ready), None)
        raise missing(f"{path}: no ledger has a pool of this name") if away is None else view.away(away)

    @staticmethod
    def _bucket(state: State, limit: pb.DimensionRef) -> Bucket:
        """A pool's own limit. Without a window, that of its shortest."""
        for window in (Window(limit.window),) if limit.window in _WINDOWS else Window:
            number = state.addresses.get((limit.pool, "", _dimension(limit.dimension, "limit.dimension"), window))
            if number is not None:
                return state.buckets[number]
        raise missing("limit: the pool has no limit of this dimension and window")

    @staticmethod
    async def _change(slot: Slot, operation: Operation) -> Answer:
        answered: asyncio.Future[Answer | LedgerError] = asyncio.get_running_loop().create_future()

        def reply(answer: Answer | LedgerError) -> None:
            if not answered.done():
                answered.set_result(answer)

        slot.submit(operation, reply)
        answer = await answered
        if isinstance(answer, LedgerError):
            raise problem_of(answer)
        if isinstance(answer, Invalid):
            raise refused(answer.field, answer.message)
        return answer

    # -- watch --------------------------------------------------------------------------------------------------

    async def _watch(self, raw: bytes, context: Context) -> None:
        problem: Problem
        task = asyncio.current_task()
        try:
            self._authenticator.administrator(context.invocation_metadata())
            try:
                request = pb.WatchRequest.FromString(raw)
            except DecodeError:
                raise undecodable() from None
            if len(self._watches) >= MAX_WATCHES:
                raise exhausted(f"this server has its most watches ({MAX_WATCHES})", 1_000_000)
            if len(request.ledgers) + len(request.pools) > MAX_WATCH_NAMES:
                raise invalid("pools", f"and ledgers have too many entries: at most {MAX_WATCH_NAMES} together")
            for name in request.ledgers:
                self._slot(name, "ledgers")
            for name in request.pools:
                self._pool(name, "pools")
            interval = max(
                WATCH_INTERVAL_US, duration_us(request.min_interval, "min_interval", MAX_RETRY_AFTER_US, cut=True)
            )
            if task is not None:
                self._watches.add(task)
            try:
                async for response in self._hub.follow(request, interval / 1e6):
                    await context.write(response.SerializeToString())
                return
            finally:
                if task is not None:
                    self._watches.discard(task)
        except Problem as error:
            problem = error
        except (asyncio.CancelledError, grpc.aio.BaseError):
            raise
        except Exception as error:
            problem = unexpected("watch", error)
        await problem.abort(context)

    def resources(self, reservations: bool) -> Iterator[tuple[str, pb.WatchEvent]]:
        """Everything that is watched, under names that sort by kind."""
        for slot in list(self._router.slots.values()):
            account = slot.account
            yield f"ledger\0{account}", pb.WatchEvent(ledger=self.ledger(slot))
            state = slot.state
            if state is None:
                continue
            for pool in state.pools.values():
                yield f"pool\0{account}\0{pool.name}", pb.WatchEvent(pool=self.pool(slot, state, pool))
            for share in state.shares.values():
                yield f"share\0{account}\0{share.name}", pb.WatchEvent(share=view.share(slot, state, share, ""))
            for setting in view.modes(slot, state):
                yield f"mode\0{account}\0{setting.pool}\0{setting.tenant}", pb.WatchEvent(mode=setting)
            if reservations:
                for found in islice(state.open.values(), _MAX_WATCHED_RESERVATIONS):
                    event = pb.WatchEvent(reservation=view.opened(slot, state, found))
                    yield f"reservation\0{account}\0{found.key}", event

    def last_state(self, name: str) -> pb.WatchEvent | None:
        """A reservation that is no longer open."""
        _, account, key = name.split("\0", 2)
        slot = self._router.slots.get(account)
        state = None if slot is None else slot.state
        ended = None if state is None else state.ended.get(key)
        if slot is None or state is None or ended is None:
            return None
        return pb.WatchEvent(reservation=view.ended(slot, state, key, ended))


class _Serve(Protocol[R]):
    async def __call__(self, request: R, /) -> Message: ...


class _Entry:
    __slots__ = ("encoded", "event", "revision")

    def __init__(self, revision: int, event: pb.WatchEvent, encoded: bytes) -> None:
        self.revision = revision
        self.event = event
        self.encoded = encoded


class _Hub:
    """What all watches share: the newest state of everything, each with the revision in which it changed.

    A resume token is the hub's name and a revision. What has gone is kept for the last ``_MAX_GONE``; an older token is
    OUT_OF_RANGE. Nothing is looked at while nobody watches.
    """

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._name = secrets.token_hex(4)
        self._revision = 0
        self._entries: dict[str, _Entry] = {}
        self._gone: deque[tuple[int, str, pb.WatchEvent]] = deque()
        self._forgotten = 0
        """The newest revision of what was dropped from ``_gone``."""
        self._looked = 0.0
        self._with_reservations = 0

    async def follow(self, request: pb.WatchRequest, interval: float) -> AsyncIterator[pb.WatchResponse]:
        """The snapshot, then changes, for one watch."""
        if request.reservations:
            self._with_reservations += 1
        try:
            seen = self._resume(request.resume_token)
            self._look(force=True)
            if seen is None:
                events = [entry.event for entry in self._entries.values() if _watched(entry.event, request)]
                for part in _parts(events):
                    yield pb.WatchResponse(phase=pb.WATCH_PHASE_SNAPSHOT, events=part)
                seen = self._revision
                yield pb.WatchResponse(phase=pb.WATCH_PHASE_SNAPSHOT_END, resume_token=self._token(seen))
            while True:
                if seen < self._forgotten:
                    raise _too_old()
                changed = [event for event in self._since(seen) if _watched(event, request)]
                if self._revision > seen:
                    seen = self._revision
                    parts = list(_parts(changed))
                    for place, part in enumerate(parts):
                        token = self._token(seen) if place == len(parts) - 1 else ""
                        yield pb.WatchResponse(phase=pb.WATCH_PHASE_CHANGE, resume_token=token, events=part)
                await asyncio.sleep(interval)
                self._look()
        finally:
            if request.reservations:
                self._with_reservations -= 1

    def _token(self, revision: int) -> str:
        return f"{self._name}.{revision}"

    def _resume(self, token: str) -> int | None:
        if not token:
            return None
        name, _, revision = token.partition(".")
        if name != self._name or not revision.isdigit() or len(revision) > 18:
            raise _too_old()
        if not self._forgotten <= int(revision) <= self._revision:
            raise _too_old()
        return int(revision)

    def _since(self, revision: int) -> Iterator[pb.WatchEvent]:
        for entry in self._entries.values():
            if entry.revision > revision:
                yield entry.event
        for at, _, event in self._gone:
            if at > revision:
                yield event

    def _look(self, force: bool = False) -> None:
        """Find what has changed, not more often than four times a second."""
        now = asyncio.get_running_loop().time()
        if not force and now - self._looked < WATCH_INTERVAL_US / 1e6 / 2:
            return
        self._looked = now
        revision = self._revision + 1
        changed = False
        left = dict.fromkeys(self._entries)
        reservations = self._with_reservations > 0
        for name, event in self._admin.resources(reservations):
            left.pop(name, None)
            encoded = event.SerializeToString(deterministic=True)
            entry = self._entries.get(name)
            if entry is None or entry.encoded != encoded:
                event.time.GetCurrentTime()
                self._entries[name] = _Entry(revision, event, encoded)
                changed = True
        for name in left:
            if name.startswith("reservation\0") and not reservations:
                del self._entries[name]
                continue
            self._remove(revision, name)
            changed = True
        if changed:
            self._revision = revision

    def _remove(self, revision: int, name: str) -> None:
        entry = self._entries.pop(name)
        event = self._admin.last_state(name) if name.startswith("reservation\0") else None
        if event is None:
            event = pb.WatchEvent()
            event.CopyFrom(entry.event)
            event.removed = True
        event.time.GetCurrentTime()
        self._gone.append((revision, name, event))
        if len(self._gone) > _MAX_GONE:
            self._forgotten = self._gone.popleft()[0]


def _watched(event: pb.WatchEvent, request: pb.WatchRequest) -> bool:
    kind = event.WhichOneof("resource")
    ledger, pool = "", ""
    if kind == "ledger":
        ledger = event.ledger.name
    elif kind == "pool":
        ledger, pool = event.pool.ledger, event.pool.name
    elif kind == "share":
        ledger, pool = event.share.ledger, event.share.pool
    elif kind == "mode":
        ledger, pool = event.mode.ledger, event.mode.pool
    elif kind == "reservation":
        if not request.reservations:
            return False
        ledger, pool = event.reservation.ledger, event.reservation.pool
    if request.ledgers and ledger not in request.ledgers:
        return False
    return not request.pools or not pool or pool in request.pools


def _parts(events: Sequence[pb.WatchEvent]) -> Iterator[Sequence[pb.WatchEvent]]:
    for start in range(0, len(events), _EVENTS_A_MESSAGE):
        yield events[start : start + _EVENTS_A_MESSAGE]


def _too_old() -> Problem:
    return Problem(Code.OUT_OF_RANGE, "resume_token: is too old, or of another server: start without one")


def _later(field: str, what: str) -> Problem:
    return Problem(Code.UNIMPLEMENTED, f"{field}: this version does not have {what}")


def _check_etag(given: str, actual: str) -> None:
    if given and given != actual:
        raise Problem(Code.ABORTED, "etag: it was changed since: read it again")


def _dimension(value: int, path: str) -> Dimension:
    try:
        return Dimension(value)
    except ValueError:
        raise invalid(path, "is required: one of the values of Dimension") from None


def _size(asked: int) -> int:
    if asked < 0:
        raise invalid("page_size", "must not be negative")
    return min(asked or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def _page(entries: Sequence[T], asked: int, token: str, name_of: Callable[[T], str]) -> tuple[Iterable[T], str]:
    """The entries after the one that ``token`` names, and the next token."""
    size = _size(asked)
    start = 0
    if token:
        last = _unpack(token)[0]
        start = next((place for place, entry in enumerate(entries) if name_of(entry) > last), len(entries))
    page = entries[start : start + size]
    more = start + size < len(entries)
    return page, _pack(name_of(page[-1]), 0, 0, "") if more else ""


def _pack(name: str, part: int, at: int, key: str) -> str:
    return base64.urlsafe_b64encode(f"1\n{name}\n{part}\n{at}\n{key}".encode()).decode()


def _unpack(token: str) -> tuple[str, int, int, str]:
    if not token:
        return "", 0, -1, ""
    try:
        version, name, part, at, key = base64.urlsafe_b64decode(token.encode()).decode().split("\n")
        if version != "1":
            raise ValueError
        return name, int(part), int(at), key
    except ValueError:
        raise invalid("page_token", "is not one of this server: start at the first page") from None


def _created(found: _Found) -> int:
    if isinstance(found, Pending):
        return found.since
    return found.granted_at or (0 if isinstance(found, Reservation) else found.ended_at)


def _matches(key: str, found: _Found, request: pb.ListReservationsRequest) -> bool:
    """Whether a reservation passes the filters that need no message."""
    if request.pool and request.pool not in (found.pools if isinstance(found, Pending) else (found.pool,)):
        return False
    if request.identity and not key.startswith(request.identity + "/"):
        return False
    if request.workspace and (not found.shares or found.shares[-1] != request.workspace):
        return False
    if isinstance(found, Ended):
        return not (request.tenant or request.route or request.priority)
    return (
        (not request.tenant or found.tenant == request.tenant)
        and (not request.route or found.route == request.route)
        and (not request.priority or int(found.priority) == request.priority)
    )
