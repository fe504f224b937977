"""CoordinatorService: handlers that take and give bytes, so that garbage is answered here and never by gRPC."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message

from paceline.engine.answers import Touched
from paceline.engine.dimensions import Dimension
from paceline.frontend import desk as kinds
from paceline.frontend import wire
from paceline.frontend.auth import Authenticator, Caller
from paceline.frontend.desk import Desk, Ticket
from paceline.frontend.errors import Problem, exhausted, undecodable, unexpected
from paceline.frontend.limits import DEADLINE_MARGIN_US, MAX_UNARY_CALLS
from paceline.frontend.session import Context, Sessions
from paceline.frontend.shares import Shares
from paceline_client.stubs import v1 as pb

SERVICE = "paceline.v1.CoordinatorService"
_SHARES_FIELD = 5
"""Of ReserveResponse."""
_FAR_SECONDS = 86_400.0

M = TypeVar("M", bound=Message)


class _One:
    """The sink of a unary call."""

    __slots__ = ("_encoded", "_shares", "answer", "granted", "instance", "shared")

    def __init__(self, answer: asyncio.Future[bytes], shares: Shares, instance: str) -> None:
        self.answer = answer
        self.granted = False
        self.shared: set[str] = set()
        self.instance = instance
        self._shares = shares
        self._encoded = b""

    def answered(self, ticket: Ticket, body: bytes, granted: bool) -> None:
        self.granted = granted
        if not self.answer.done():
            self.answer.set_result(body + self._encoded)

    def failed(self, ticket: Ticket, problem: Problem) -> None:
        if not self.answer.done():
            self.answer.set_exception(problem)

    def demand(self, ledger: str, pool: str, charges: Sequence[tuple[Dimension, int]], count: int) -> None:
        self._shares.note(self.instance, ledger, pool, charges, count)

    def share(self, ticket: Ticket, ledger: str, pool: str, touched: Touched) -> None:
        share = self._shares.share(self.instance, ledger, pool, touched)
        if share is not None:
            self._encoded = wire.block(_SHARES_FIELD, share.SerializeToString())


class Coordinator:
    """The service."""

    def __init__(self, desk: Desk, sessions: Sessions, authenticator: Authenticator, shares: Shares) -> None:
        self._desk = desk
        self._sessions = sessions
        self._authenticator = authenticator
        self._shares = shares
        self.running = 0
        """Unary calls in progress."""
        self.requests: Counter[tuple[str, str]] = Counter()
        """Unary calls that ended, by method and status."""

    def handler(self) -> grpc.GenericRpcHandler:
        """What to add to a server."""
        desk = self._desk
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Reserve": self._unary(kinds.RESERVE, pb.ReserveRequest, self._reserve),
                "Commit": self._unary(kinds.COMMIT, pb.CommitRequest, lambda m, t, c, _: desk.commit(m, t, c)),
                "Release": self._unary(kinds.RELEASE, pb.ReleaseRequest, lambda m, t, c, _: desk.release(m, t, c)),
                "Renew": self._unary(kinds.RENEW, pb.RenewRequest, lambda m, t, c, _: desk.renew(m, t, c)),
                "Observe": self._unary(kinds.OBSERVE, pb.ObserveRequest, lambda m, t, c, _: desk.observe(m, t, c)),
                "Session": grpc.stream_stream_rpc_method_handler(self._session),
            },
        )

    async def _session(self, _: object, context: Context) -> None:
        await self._sessions.handle(context)

    def _reserve(self, message: pb.ReserveRequest, ticket: Ticket, caller: Caller, context: Context) -> None:
        remaining = cast(float | None, context.time_remaining())
        cap = None if remaining is None else int(min(remaining, _FAR_SECONDS) * 1e6) - DEADLINE_MARGIN_US
        self._desk.reserve(message, ticket, caller, cap)

    def _unary(
        self, field: int, kind: type[M], start: Callable[[M, Ticket, Caller, Context], None]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        method = kind.__name__.removesuffix("Request")
        requests = self.requests

        async def handle(raw: bytes, context: Context) -> bytes:
            problem: Problem
            self.running += 1
            try:
                body = await self._one(raw, context, field, kind, start)
                requests[method, "OK"] += 1
                return body
            except asyncio.CancelledError:
                requests[method, "CANCELLED"] += 1
                raise
            except Problem as error:
                problem = error
            except Exception as error:
                problem = unexpected("unary", error)
            finally:
                self.running -= 1
            requests[method, problem.code.name] += 1
            await problem.abort(context)
            return b""

        return grpc.unary_unary_rpc_method_handler(handle)

    async def _one(
        self,
        raw: bytes,
        context: Context,
        field: int,
        kind: type[M],
        start: Callable[[M, Ticket, Caller, Context], None],
    ) -> bytes:
        identity = self._authenticator.identify(context.invocation_metadata())
        caller = Caller(identity)
        caller.check_calls()
        if self.running > MAX_UNARY_CALLS:
            raise exhausted("this server has its most calls in progress")
        try:
            message = kind.FromString(raw)
        except DecodeError:
            raise undecodable() from None
        sink = _One(asyncio.get_running_loop().create_future(), self._shares, f"{caller.identity}/@{context.peer()}")
        ticket = Ticket(self._desk, sink, caller, 0, field)
        start(message, ticket, caller, context)
        try:
            body = await sink.answer
        except asyncio.CancelledError:
            if field == kinds.RESERVE:
                self._desk.abandon_later((ticket,))
            raise
        if sink.granted:
            if context.done():
                self._desk.abandon_later((ticket,))
            else:
                self._desk.delivered(ticket.key)
        return body
