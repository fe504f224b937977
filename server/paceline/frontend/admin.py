"""AdminService.

What is shown comes from memory, at the instant of the question; what is changed goes through the ledger like any other
operation. The methods here are about the ledgers that this process owns; with others beside it,
:mod:`paceline.frontend.admin_fleet` sends calls to where they belong, and :mod:`paceline.frontend.admin_watch` watches
what the others own. Needs the role ``admin``.
"""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message

from paceline.engine.answers import Answer, Invalid, Released
from paceline.engine.bucket import Bucket
from paceline.engine.calendar import next_month
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
from paceline.frontend import admin_shares, explain, learned, report, view
from paceline.frontend.admin_fleet import ADMIN, Fleet, Method, NotHere, page_size, serve_call
from paceline.frontend.admin_watch import CHANGES, Elsewhere, Hub, Trackers
from paceline.frontend.advice import Adviser
from paceline.frontend.auth import Authenticator
from paceline.frontend.desk import problem_of
from paceline.frontend.errors import Code, Problem, exhausted, invalid, missing, refused, undecodable, unexpected
from paceline.frontend.limits import (
    MAX_HOLD_US,
    MAX_PAUSE_REASON_CHARS,
    MAX_RETRY_AFTER_US,
    MAX_WATCH_NAMES,
    MAX_WATCHES,
    WATCH_INTERVAL_US,
)
from paceline.frontend.places import Places
from paceline.frontend.replies import money
from paceline.frontend.requests import Requests, duration_us, label, uuid_of
from paceline.frontend.routing import Router, Slot
from paceline.frontend.session import Context
from paceline.ledger.errors import LedgerError
from paceline.providers.schema import CatalogueSpec
from paceline.providers.tiers import Tiers
from paceline_client.stubs import v1 as pb

SERVICE = "paceline.v1.AdminService"
_CHUNK = 4_096
"""Reservations looked at between two turns of the event loop."""
_MAX_WATCHED_RESERVATIONS = 20_000
_WINDOWS = frozenset(int(window) for window in Window)
_MAX_LIMIT = 1_000_000_000_000_000

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_Found = Pending | Reservation | Ended
_WAITING, _OPEN, _ENDED = -1, 0, 1
"""Parts of a list, in the order of a life: whoever moves on while pages are read may come twice, but is not missed."""


Handler = Callable[[bytes], Awaitable[bytes]]
"""Answers another process."""


class Admin:
    """The service. ``provider_of`` names the provider of an account; ``fleet``: other processes own ledgers too;
    ``tiers``: what the catalogue says of pools; ``alerts``: what stands in a ledger, for those that watch;
    ``requests``: reads calls that are not made, to explain them."""

    def __init__(
        self,
        router: Router,
        authenticator: Authenticator,
        places: Places,
        provider_of: Callable[[str], str],
        fleet: Fleet | None = None,
        tiers: Tiers | None = None,
        alerts: Callable[[str], Iterator[tuple[str, pb.WatchEvent]]] | None = None,
        requests: Requests | None = None,
    ) -> None:
        self._fleet = fleet
        self._requests = requests
        self._alerts = alerts
        self._tiers = Tiers(CatalogueSpec(), {}) if tiers is None else tiers
        self._router = router
        self._authenticator = authenticator
        self._places = places
        self._provider_of = provider_of
        self._pause_reasons: dict[str, str] = {}
        """By pool; never more than there are pools."""
        elsewhere = None if fleet is None else Elsewhere(fleet)
        self._trackers = Trackers(self.watched, self.last_state)
        self._hub = Hub(self.watched, self.last_state, elsewhere)
        self._watches: set[asyncio.Task[object]] = set()
        self.requests: Counter[tuple[str, str]] = Counter()
        """Unary calls that ended, by method and status."""

        self._methods = {
            "ListLedgers": _method(pb.ListLedgersRequest, pb.ListLedgersResponse, self._list_ledgers),
            "GetLedger": _method(pb.GetLedgerRequest, pb.GetLedgerResponse, self._get_ledger),
            "ListPools": _method(pb.ListPoolsRequest, pb.ListPoolsResponse, self._list_pools),
            "GetPool": _method(pb.GetPoolRequest, pb.GetPoolResponse, self._get_pool),
            "PausePool": _method(pb.PausePoolRequest, pb.PausePoolResponse, self._pause_pool),
            "ResumePool": _method(pb.ResumePoolRequest, pb.ResumePoolResponse, self._resume_pool),
            "UpdateLimit": _method(pb.UpdateLimitRequest, pb.UpdateLimitResponse, self._update_limit),
            "SetMode": _method(pb.SetModeRequest, pb.SetModeResponse, self._set_mode),
            "ListShares": _method(pb.ListSharesRequest, pb.ListSharesResponse, self._list_shares),
            "GetShare": _method(pb.GetShareRequest, pb.GetShareResponse, self._get_share),
            "UpdateShare": _method(pb.UpdateShareRequest, pb.UpdateShareResponse, self._update_share),
            "GetSpend": _method(pb.GetSpendRequest, pb.GetSpendResponse, self._get_spend),
            "ListReservations": _method(
                pb.ListReservationsRequest, pb.ListReservationsResponse, self._list_reservations
            ),
            "GetReservation": _method(pb.GetReservationRequest, pb.GetReservationResponse, self._get_reservation),
            "UpdateReservation": _method(
                pb.UpdateReservationRequest, pb.UpdateReservationResponse, self._update_reservation
            ),
            "CancelReservation": _method(
                pb.CancelReservationRequest, pb.CancelReservationResponse, self._cancel_reservation
            ),
            "Explain": _method(pb.ExplainRequest, pb.ExplainResponse, self._explain),
            "GetReport": _method(pb.GetReportRequest, pb.GetReportResponse, self._get_report),
            "ListLimits": _method(pb.ListLimitsRequest, pb.ListLimitsResponse, self._list_limits),
            "ListAdvice": _method(pb.ListAdviceRequest, pb.ListAdviceResponse, self._list_advice),
            "FinalizeUpgrade": _method(pb.FinalizeUpgradeRequest, pb.FinalizeUpgradeResponse, self._finalize_upgrade),
            "HandOverLedger": _method(pb.HandOverLedgerRequest, pb.HandOverLedgerResponse, self._hand_over_ledger),
        }
        if fleet is not None:
            fleet.methods = self._methods

    def handler(self) -> grpc.GenericRpcHandler:
        """What to add to a server."""
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: self._unary(name, method) for name, method in self._methods.items()
        }
        handlers["Watch"] = grpc.unary_stream_rpc_method_handler(self._watch)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def peer_handlers(self) -> dict[str, Handler]:
        """What to register with the peer service: questions of other processes about the ledgers owned here."""

        async def call(body: bytes) -> bytes:
            return await serve_call(self._methods, body)

        async def changes(body: bytes) -> bytes:
            return self._trackers.serve(body)

        return {ADMIN: call, CHANGES: changes}

    @property
    def watching(self) -> int:
        """Watches that are open."""
        return len(self._watches)

    def close(self) -> None:
        """End every watch."""
        for task in self._watches:
            task.cancel()

    async def _serve(self, name: str, message: Message) -> Message:
        if self._fleet is None:
            return await self._methods[name].serve(message)
        answer = await self._fleet.serve(name, message)
        if isinstance(answer, pb.GetPoolResponse):
            self._complete(answer.pool)
        elif isinstance(answer, pb.ListPoolsResponse):
            for pool in answer.pools:
                self._complete(pool)
        elif isinstance(answer, pb.ListLimitsResponse):
            for limits in answer.pools:
                self._complete(limits.pool)
        return answer

    def _complete(self, pool: pb.Pool) -> None:
        """An owner knows the targets that its own callers have named; this server may know others."""
        if not pool.targets:
            pool.targets.extend(self._targets(pool.name))

    def _unary(self, name: str, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def handle(raw: bytes, context: Context) -> bytes:
            problem: Problem
            try:
                identity = self._authenticator.administrator(context.invocation_metadata())
                try:
                    message = method.request.FromString(raw)
                except DecodeError:
                    raise undecodable() from None
                if isinstance(message, pb.ExplainRequest) and message.HasField("request"):
                    message.identity = message.identity or identity.name
                body = (await self._serve(name, message)).SerializeToString()
                self.requests[name, "OK"] += 1
                return body
            except Problem as error:
                problem = error
            except Exception as error:
                problem = unexpected("admin", error)
            self.requests[name, problem.code.name] += 1
            await problem.abort(context)
            return b""

        return grpc.unary_unary_rpc_method_handler(handle)

    # -- ledgers and pools --------------------------------------------------------------------------------------

    async def _list_ledgers(self, request: pb.ListLedgersRequest) -> pb.ListLedgersResponse:
        slots = sorted(self._slots(), key=lambda slot: slot.account)
        page, token = _page(slots, request.page_size, request.page_token, lambda slot: slot.account)
        return pb.ListLedgersResponse(ledgers=map(self.ledger, page), next_page_token=token)

    async def _get_ledger(self, request: pb.GetLedgerRequest) -> pb.GetLedgerResponse:
        return pb.GetLedgerResponse(ledger=self.ledger(self._slot(request.name, "name")))

    async def _finalize_upgrade(self, request: pb.FinalizeUpgradeRequest) -> pb.FinalizeUpgradeResponse:
        slot = self._slot(request.ledger, "ledger")
        if request.form < 0:
            raise invalid("form", "must not be negative")
        await _fleet(self._fleet).finalize(slot.account, request.form)
        return pb.FinalizeUpgradeResponse(ledger=self.ledger(slot))

    async def _hand_over_ledger(self, request: pb.HandOverLedgerRequest) -> pb.HandOverLedgerResponse:
        slot = self._slot(request.ledger, "ledger")
        return pb.HandOverLedgerResponse(node=await _fleet(self._fleet).hand_over(slot.account, request.node))

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
        shown = view.limit(after, slot.owner.now())
        learned.origin(shown, after, self._tiers)
        return pb.UpdateLimitResponse(limit=shown)

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
            slots = self._slots()
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

    async def _update_share(self, request: pb.UpdateShareRequest) -> pb.UpdateShareResponse:
        slot = self._slot(request.share.ledger, "share.ledger")
        await self._change(slot, admin_shares.operation(view.books(slot), request))
        state = view.books(slot)
        return pb.UpdateShareResponse(share=view.share(slot, state, state.shares[request.share.name], ""))

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
        bucket = None if number is None else state.buckets[number]
        cap = UNLIMITED if bucket is None else bucket.amount
        if bucket is None and request.share:
            # Its budget is made with the first call.
            share = state.shares.get(request.share)
            caps = () if share is None else share.caps
            found = [each.amount for each in caps if each.dimension is Dimension.SPEND]
            if not found:
                raise missing("share: has no spend cap in this ledger")
            cap = found[0]
        response = pb.GetSpendResponse(spent=money(0), held=money(0))
        end = next_month(now)
        if bucket is not None:
            response.held.CopyFrom(money(bucket.held))
            if now < bucket.turns_at:
                # The books turn with the first call of a month, not before.
                end = bucket.turns_at
                response.spent.CopyFrom(money(max(0, bucket.burst - bucket.level - bucket.held)))
        if cap < UNLIMITED:
            response.cap.CopyFrom(money(cap))
        response.end_time.CopyFrom(view.timestamp(end))
        last = view.timestamp(end - 1).ToDatetime()
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
        size = page_size(request.page_size)
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
            raise NotHere(Code.NOT_FOUND, "reservation_id: no reservation of this id is on the books")
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

    async def _explain(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        if explain.subject(request) == "reservation_id":
            names = [request.identity] if request.identity else self._authenticator.names()
            return explain.reservation(self._books(""), names, request.reservation_id, self._reservation)
        identity = self._authenticator.named(request.identity)
        if self._requests is None or identity is None:
            raise refused("identity", "is not one that is configured")
        return explain.request(self._router.slots, self._requests, identity, request.request)

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

    async def _list_limits(self, request: pb.ListLimitsRequest) -> pb.ListLimitsResponse:
        page, token = self._page_of_pools(request.ledger, request.pool, request.page_size, request.page_token)
        response = pb.ListLimitsResponse(next_page_token=token)
        for slot, state, pool in page:
            record = None if slot.engine is None else slot.engine.stats.hindsight.demand.pools.get(pool.name)
            shown = self.pool(slot, state, pool)
            response.pools.append(learned.pool_limits(state, pool, shown, record, self._tiers, slot.owner.now()))
        return response

    async def _list_advice(self, request: pb.ListAdviceRequest) -> pb.ListAdviceResponse:
        page, token = self._page_of_pools(request.ledger, request.pool, request.page_size, request.page_token)
        response = pb.ListAdviceResponse(next_page_token=token)
        for slot, state, pool in page:
            if slot.engine is not None:
                demand = slot.engine.stats.hindsight.demand
                if request.pool or pool.name in demand.pools:
                    adviser = Adviser(slot.account, state, demand, self._tiers, slot.owner.now())
                    response.pools.append(adviser.advise(pool))
                    # It looks at all pools of the ledger.
                    await asyncio.sleep(0)
        return response

    # -- what both show and change need -----------------------------------------------------------------------------

    def ledger(self, slot: Slot) -> pb.Ledger:
        """As it is shown."""
        message = view.ledger(slot, self._provider_of(slot.account))
        if self._fleet is not None:
            message.owner, message.newest_form = self._fleet.node, self._fleet.form
        return message

    def pool(self, slot: Slot, state: State, pool: Pool) -> pb.Pool:
        """As it is shown."""
        shown = view.pool(slot, state, pool, self._targets(pool.name), self._pause_reasons.get(pool.name, ""))
        for limit, number in zip(shown.limits, pool.buckets, strict=True):
            learned.origin(limit, state.buckets[number], self._tiers)
        return shown

    def _targets(self, pool: str) -> Iterable[pb.Target]:
        targets: dict[bytes, pb.Target] = {}
        for destination in islice(self._places.destinations(pool), view.MAX_SHOWN_TARGETS):
            targets[destination.grant_target] = destination.target
        return targets.values()

    def _slot(self, name: str, path: str) -> Slot:
        if not name:
            raise invalid(path, "is required: the name of a ledger")
        slot = self._router.slots.get(name)
        if slot is None or slot.is_remote:
            raise NotHere(Code.NOT_FOUND, f"{path}: this server has no ledger of this name")
        return slot

    def _slots(self) -> list[Slot]:
        """The ledgers that are owned here."""
        return [slot for slot in self._router.slots.values() if not slot.is_remote]

    def _books(self, ledger: str) -> list[tuple[Slot, State]]:
        """The books of one ledger, or of all, by name."""
        slots = [self._slot(ledger, "ledger")] if ledger else self._slots()
        return [(slot, view.books(slot)) for slot in sorted(slots, key=lambda slot: slot.account)]

    def _pool(self, name: str, path: str) -> tuple[Slot, State, Pool]:
        if not name:
            raise invalid(path, "is required: the name of a pool")
        slots = self._slots()
        for slot in slots:
            state = slot.state
            if state is not None and name in state.pools:
                state = view.books(slot)
                return slot, state, state.pools[name]
        away = next((slot for slot in slots if not slot.ready), None)
        if away is None:
            raise NotHere(Code.NOT_FOUND, f"{path}: no ledger has a pool of this name; `paceline pools` lists them")
        problem = view.away(away)
        raise NotHere(problem.code, problem.message, problem.violations, problem.retry_after_us)

    def _page_of_pools(
        self, ledger: str, name: str, size: int, token: str
    ) -> tuple[Iterable[tuple[Slot, State, Pool]], str]:
        """One pool, or a page of those of one ledger or of all, by ledger and name."""
        if name:
            found = [self._pool(name, "pool")]
            if ledger and ledger != found[0][0].account:
                raise missing("pool: the ledger has no pool of this name")
        else:
            found = [(slot, state, pool) for slot, state in self._books(ledger) for pool in state.pools.values()]
            found.sort(key=lambda each: (each[0].account, each[2].name))
        return _page(found, size, token, lambda each: f"{each[0].account}\0{each[2].name}")

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
                await self._serve("GetLedger", pb.GetLedgerRequest(name=name))
            for name in request.pools:
                await self._serve("GetPool", pb.GetPoolRequest(name=name))
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

    def watched(self, ledger: str, reservations: bool) -> Iterator[tuple[str, pb.WatchEvent]]:
        """Everything that is watched of one ledger that is owned here, or of all, under names that sort by kind."""
        for slot in self._slots():
            account = slot.account
            if ledger not in ("", account):
                continue
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
            if self._alerts is not None:
                yield from self._alerts(account)
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


def _method(request: type[M], response: type[Message], serve: Callable[[M], Awaitable[Message]]) -> Method:
    # A method is called with messages of its own kind only.
    return Method(request, response, cast(Callable[[Message], Awaitable[Message]], serve))


def _fleet(fleet: Fleet | None) -> Fleet:
    if fleet is None:
        raise refused("ledger", "is kept by one server alone, in a store that no other one can use")
    return fleet


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


def _page(entries: Sequence[T], asked: int, token: str, name_of: Callable[[T], str]) -> tuple[Iterable[T], str]:
    """The entries after the one that ``token`` names, and the next token."""
    size = page_size(asked)
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
