"""A Session: batches of operations over one long stream.

The handler's own coroutine writes: whatever is ready goes into one message. A task beside it reads. Answers are encoded
when they come and joined when they are written.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, deque
from collections.abc import Sequence
from typing import Final, cast

import grpc
import msgspec
from google.protobuf.message import DecodeError

from paceline.engine.answers import Touched
from paceline.engine.dimensions import Dimension
from paceline.frontend import desk as kinds
from paceline.frontend import wire
from paceline.frontend.auth import Authenticator, Caller
from paceline.frontend.desk import Desk, Ticket
from paceline.frontend.errors import Code, Problem, exhausted, invalid, unavailable, undecodable, unexpected
from paceline.frontend.limits import (
    HELLO_TIMEOUT_US,
    MAX_BATCH_ITEMS,
    MAX_BUSY_ITEMS,
    MAX_OPEN_ITEMS,
    MAX_OUTBOX_BYTES,
    MAX_RESPONSE_BYTES,
    MAX_SESSION_POOLS,
    MAX_SESSIONS,
)
from paceline.frontend.requests import label
from paceline.frontend.shares import Shares
from paceline_client.stubs import v1 as pb

PROTOCOL_VERSION = 1

Context = grpc.aio.ServicerContext[bytes, bytes]

_ITEM = wire.key(1, 2)
_NUMBER = wire.key(1, 0)
_FIELDS: Final = {field: wire.key(field, 2) for field in range(kinds.RESERVE, kinds.ERROR + 1)}
_BATCH_FIELD = 2
_SHARES_FIELD = 2
_FIELD_OF: Final = {
    "reserve": kinds.RESERVE,
    "commit": kinds.COMMIT,
    "release": kinds.RELEASE,
    "renew": kinds.RENEW,
    "observe": kinds.OBSERVE,
    "cancel": kinds.CANCEL,
}
_CANCELLED = Problem(Code.CANCELLED, "cancelled by the caller")


class SessionCaps(msgspec.Struct, frozen=True):
    """Bounds of sessions."""

    sessions: int = MAX_SESSIONS
    batch_items: int = MAX_BATCH_ITEMS
    batch_bytes: int = 1_048_576
    open_items: int = MAX_OPEN_ITEMS
    busy_items: int = MAX_BUSY_ITEMS
    outbox_bytes: int = MAX_OUTBOX_BYTES
    hello_timeout_us: int = HELLO_TIMEOUT_US


class _Nowhere:
    """The sink of a Reserve that was cancelled: it has its answer, and is being released."""

    def __init__(self) -> None:
        self.shared: set[str] = set()

    def answered(self, ticket: Ticket, body: bytes, granted: bool) -> None:
        pass

    def failed(self, ticket: Ticket, problem: Problem) -> None:
        pass

    def demand(self, ledger: str, pool: str, charges: Sequence[tuple[Dimension, int]], count: int) -> None:
        pass

    def share(self, ticket: Ticket, ledger: str, pool: str, touched: Touched) -> None:
        pass


_NOWHERE = _Nowhere()


class Tally:
    """Items of all sessions that were answered, by operation, and those that failed, by operation and status."""

    def __init__(self) -> None:
        self.answered = [0] * (kinds.ERROR + 1)
        self.failed: Counter[tuple[int, str]] = Counter()


class Session:
    """One stream. A :class:`~paceline.frontend.desk.Sink` for its items.

    ``open`` are the Reserves without an answer, ``busy`` counts the other operations: the caller hears of a cap on the
    first, since they may wait for long; above one on the second the stream is not read for a moment.
    """

    def __init__(
        self, desk: Desk, caller: Caller, caps: SessionCaps, shares: Shares, context: Context, tally: Tally
    ) -> None:
        self.id = secrets.token_hex(8)
        self.shared: set[str] = set()
        self.open: dict[int, Ticket] = {}
        self.busy = 0
        self._desk = desk
        self._caller = caller
        self._caps = caps
        self._shares = shares
        self._context = context
        self._tally = tally
        self._sent_with: dict[str, str] = {}
        """Pools whose share went out with a grant, by its id."""
        self._outbox: list[bytes] = []
        self._size = 0
        self._granted: list[Ticket] = []
        """Grants in the outbox."""
        self._full: deque[tuple[list[bytes], list[Ticket]]] = deque()
        """Outboxes that make a message of their own, each with its grants."""
        self._full_size = 0
        self._writing: list[Ticket] = []
        """Grants in the message that is being written."""
        self._wake: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._drain_us: int | None = None
        self._ended: Problem | None = None
        self._read_all = False

    # -- the sink -----------------------------------------------------------------------------------------------

    def answered(self, ticket: Ticket, body: bytes, granted: bool) -> None:
        self._tally.answered[ticket.field] += 1
        if ticket.field == kinds.RESERVE:
            self.open.pop(ticket.number, None)
            if granted:
                self._granted.append(ticket)
        else:
            self.busy -= 1
        self._put(ticket.number, ticket.field, body)

    def failed(self, ticket: Ticket, problem: Problem) -> None:
        self._tally.failed[ticket.field, problem.code.name] += 1
        if ticket.field == kinds.RESERVE:
            if self.open.get(ticket.number) is ticket:
                del self.open[ticket.number]
        else:
            self.busy -= 1
        self._put(ticket.number, kinds.ERROR, problem.status().SerializeToString())

    def demand(self, ledger: str, pool: str, charges: Sequence[tuple[Dimension, int]], count: int) -> None:
        self._shares.note(self._caller.instance, ledger, pool, charges, count)

    def share(self, ticket: Ticket, ledger: str, pool: str, touched: Touched) -> None:
        share = self._shares.share(self._caller.instance, ledger, pool, touched)
        if share is not None:
            if len(self.shared) >= MAX_SESSION_POOLS:
                self.shared.clear()
            self.shared.add(pool)
            self._outbox.append(wire.block(_SHARES_FIELD, share.SerializeToString()))
            if len(self._sent_with) >= MAX_SESSION_POOLS:
                self._sent_with.clear()
            # The grant follows in the same message: who reports on it has the share.
            self._sent_with[ticket.key] = pool

    def _put(self, number: int, field: int, body: bytes) -> None:
        varint = wire.varint
        numbered = varint(number)
        length = varint(len(body))
        size = 2 + len(numbered) + len(length) + len(body)
        self._outbox += (_ITEM, varint(size), _NUMBER, numbered, _FIELDS[field], length, body)
        self._size += size
        if self._size > MAX_RESPONSE_BYTES:
            self._full.append((self._outbox, self._granted))
            self._full_size += self._size
            self._outbox, self._granted, self._size = [], [], 0
        if self._wake is not None:
            self._rouse()

    # -- the stream ---------------------------------------------------------------------------------------------

    def drain(self, grace_us: int) -> None:
        """Tell the client that the server goes."""
        self._drain_us = grace_us
        self._rouse()

    @property
    def pending(self) -> int:
        """Items without a delivered answer."""
        queued = sum(len(granted) for _, granted in self._full)
        return len(self.open) + self.busy + len(self._granted) + len(self._writing) + queued

    async def run(self) -> Problem | None:
        """Serve until the stream ends; what it is to be ended with, if that is our doing."""
        reader = asyncio.create_task(self._read())
        try:
            while True:
                if self._drain_us is not None and self._drain_us >= 0:
                    drain = pb.SessionResponse()
                    drain.drain.grace.FromMicroseconds(self._drain_us)
                    self._drain_us = -1
                    await self._context.write(drain.SerializeToString())
                if self._outbox or self._full:
                    await self._flush()
                elif self._ended is not None or (self._read_all and not self.open and not self.busy):
                    return self._ended
                else:
                    self._wake = asyncio.get_running_loop().create_future()
                    await self._wake
                    # Answers come in bursts: let the rest of this one be put before it is written.
                    await asyncio.sleep(0)
        finally:
            self._wake = None
            reader.cancel()
            queued = [ticket for _, granted in self._full for ticket in granted]
            self._desk.abandon_later([*self.open.values(), *self._granted, *self._writing, *queued])

    async def _flush(self) -> None:
        if self._full:
            outbox, self._writing = self._full.popleft()
            if not self._full:
                self._full_size = 0
        else:
            outbox, self._outbox = self._outbox, []
            self._writing, self._granted = self._granted, []
            self._size = 0
        body = b"".join(outbox)
        await self._context.write(wire.block(_BATCH_FIELD, body))
        delivered = self._desk.delivered
        for ticket in self._writing:
            delivered(ticket.key)
        self._writing = []
        room = self._room
        if room is not None and self._has_room():
            self._room = None
            room.set_result(None)

    def _has_room(self) -> bool:
        return self._size + self._full_size <= self._caps.outbox_bytes and self.busy <= self._caps.busy_items

    def _rouse(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)

    async def _read(self) -> None:
        try:
            while True:
                raw: object = cast(object, await self._context.read())
                if not isinstance(raw, bytes):
                    break
                self._message(raw)
                while not self._has_room():
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room
        except Problem as problem:
            self._ended = problem
        except asyncio.CancelledError:
            raise
        except grpc.aio.BaseError:
            pass
        except Exception as error:
            self._ended = unexpected("session", error)
        self._read_all = True
        self._rouse()

    def _message(self, raw: bytes) -> None:
        try:
            message = pb.SessionRequest.FromString(raw)
        except DecodeError:
            raise undecodable() from None
        what = message.WhichOneof("message")
        if what == "hello":
            raise invalid("hello", "may be sent once, as the first message")
        if what is None:
            raise invalid("message", "is required: hello first, then batches")
        items = message.batch.items
        if len(items) > self._caps.batch_items:
            raise exhausted(f"the batch has too many items: at most {self._caps.batch_items} (see Welcome)")
        for item in items:
            self._item(item)

    def _item(self, item: pb.RequestItem) -> None:
        number = item.number
        what = item.WhichOneof("op")
        desk = self._desk
        ticket = Ticket(desk, self, self._caller, number, kinds.CANCEL if what is None else _FIELD_OF[what])
        try:
            if what == "reserve":
                if not number or number in self.open:
                    raise invalid("number", "must be from 1 up, and not that of an item still without an answer")
                if len(self.open) >= self._caps.open_items:
                    raise exhausted(f"too many items without an answer: at most {self._caps.open_items} (see Welcome)")
                self.open[number] = ticket
                desk.reserve(item.reserve, ticket, self._caller)
                return
            self.busy += 1
            if not number:
                raise invalid("number", "must be from 1 up")
            if what == "commit":
                desk.commit(item.commit, ticket, self._caller)
            elif what == "renew":
                desk.renew(item.renew, ticket, self._caller)
            elif what == "release":
                desk.release(item.release, ticket, self._caller)
            elif what == "observe":
                desk.observe(item.observe, ticket, self._caller)
            elif what == "cancel":
                self._cancel(item.cancel, ticket)
            else:
                raise invalid("op", "is required: one operation of this version of the contract")
            if self._sent_with:
                pool = self._sent_with.pop(ticket.key, None)
                if pool is not None:
                    self._shares.arrived(self._caller.instance, pool)
        except Problem as problem:
            self.failed(ticket, problem)
        except Exception as error:
            self.failed(ticket, unexpected("session", error))

    def _cancel(self, number: int, ticket: Ticket) -> None:
        waiting = self.open.get(number)
        if waiting is not None:
            self._desk.abandon(waiting)
            self.failed(waiting, _CANCELLED)
            waiting.sink = _NOWHERE
        self.answered(ticket, pb.CancelResult(cancelled=waiting is not None).SerializeToString(), False)


class Sessions:
    """All sessions of a server."""

    def __init__(
        self,
        desk: Desk,
        authenticator: Authenticator,
        shares: Shares,
        *,
        server_version: str,
        header_names: frozenset[str],
        caps: SessionCaps | None = None,
    ) -> None:
        self._desk = desk
        self._authenticator = authenticator
        self._shares = shares
        self._version = server_version
        self._headers = sorted(header_names)
        self._caps = SessionCaps() if caps is None else caps
        self._count = 0
        self.running: set[Session] = set()
        self.opened = 0
        self.tally = Tally()

    async def handle(self, context: Context) -> None:
        """The handler of the rpc."""
        problem: Problem | None
        try:
            problem = await self._serve(context)
        except Problem as error:
            problem = error
        except (asyncio.CancelledError, grpc.aio.BaseError):
            raise
        except Exception as error:
            problem = unexpected("session", error)
        if problem is not None:
            await problem.abort(context)

    def drain(self, grace_us: int) -> None:
        """Tell every client that the server goes."""
        for session in self.running:
            session.drain(grace_us)

    def refresh_shares(self) -> None:
        """Send every fallback share again with the next grant of its pool."""
        for session in self.running:
            session.shared.clear()

    @property
    def pending(self) -> int:
        """Items without a delivered answer."""
        return sum(session.pending for session in self.running)

    async def _serve(self, context: Context) -> Problem | None:
        identity = self._authenticator.caller(context.invocation_metadata())
        if self._count >= self._caps.sessions:
            raise exhausted("this server has its most sessions: use another one, or unary calls", 1_000_000)
        self._count += 1
        session: Session | None = None
        try:
            caller = await self._hello(context, identity)
            if caller is None:
                return None
            if self._desk.draining:
                # Accepted and told to go, a client without another server would come back at once.
                raise unavailable("this server is going away: use another one, or come back later")
            session = Session(self._desk, caller, self._caps, self._shares, context, self.tally)
            self.opened += 1
            # From here on it hears of a drain, which it passes on after the welcome.
            self.running.add(session)
            await context.write(self._welcome(session).SerializeToString())
            return await session.run()
        finally:
            self._count -= 1
            if session is not None:
                self.running.discard(session)

    async def _hello(self, context: Context, anybody: Caller) -> Caller | None:
        raw: object = None
        try:
            async with asyncio.timeout(self._caps.hello_timeout_us / 1e6):
                raw = cast(object, await context.read())
        except TimeoutError:
            raise invalid("hello", "did not come: send it as the first message, at once") from None
        if not isinstance(raw, bytes):
            return None
        try:
            message = pb.SessionRequest.FromString(raw)
        except DecodeError:
            raise undecodable() from None
        if message.WhichOneof("message") != "hello":
            raise invalid("hello", "must be the first message")
        hello = message.hello
        if hello.protocol_version < 0:
            raise Problem(
                Code.FAILED_PRECONDITION,
                f"hello.protocol_version: this server speaks version {PROTOCOL_VERSION}; yours is older",
                (("hello.protocol_version", f"must be at least {PROTOCOL_VERSION}, or zero for 1"),),
            )
        for name in ("client_version", "language", "instance_id"):
            label(getattr(hello, name), f"hello.{name}")
        tenant = label(hello.tenant, "hello.tenant")
        workspace = label(hello.workspace, "hello.workspace")
        identity = self._authenticator.identify(context.invocation_metadata())
        instance = f"{identity.name}/{hello.instance_id or secrets.token_hex(8)}"
        caller = Caller(identity, instance, tenant, workspace)
        if tenant:
            caller.check_tenant(tenant)
        if workspace:
            caller.check_workspace(workspace)
        return caller

    def _welcome(self, session: Session) -> pb.SessionResponse:
        return pb.SessionResponse(
            welcome=pb.Welcome(
                server_version=self._version,
                protocol_version=PROTOCOL_VERSION,
                session_id=session.id,
                header_names=self._headers,
                max_batch_items=self._caps.batch_items,
                max_batch_bytes=self._caps.batch_bytes,
                max_open_items=self._caps.open_items,
            )
        )
