"""A server in the test's own event loop, and callers of it over real connections."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from paceline.config import Config
from paceline.frontend.errors import DETAILS_KEY
from paceline.frontend.server import Server
from paceline.ledger.journal import Store
from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import error_details_pb2, status_pb2

MODEL = "claude-sonnet-4-5"
OTHER_MODEL = "claude-opus-4-5"
POOL = "anthropic/default/sonnet-4"
LEDGER = "default"


def config(**fields: Any) -> Config:
    """A configuration with one small account; ``fields`` are those of the file."""
    base: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "store": "embedded:",
        "metrics_listen": "off",
        "accounts": {
            LEDGER: {
                "tier": "build",
                "pools": {"sonnet-4": {"requests": 60, "input_tokens": 60_000, "output_tokens": 6_000}},
            }
        },
        "limits": {"drain_timeout": "2s"},
    }
    return Config.model_validate(base | fields)


def new_id() -> str:
    return str(uuid.uuid4())


def reserve(
    reservation_id: str | None = None,
    *,
    model: str = MODEL,
    account: str = "",
    input_tokens: int = 100,
    output_tokens: int = 100,
    wait: float = 0,
    **fields: Any,
) -> pb.ReserveRequest:
    """A Reserve of one candidate."""
    request = pb.ReserveRequest(
        reservation_id=new_id() if reservation_id is None else reservation_id,
        candidates=[
            pb.Candidate(
                target=pb.Target(model=model, account=account),
                estimate=pb.Estimate(
                    input_tokens=input_tokens, output_tokens=output_tokens, max_output_tokens=output_tokens
                ),
            )
        ],
        **fields,
    )
    request.max_wait.FromMicroseconds(int(wait * 1e6))
    return request


def succeeded(input_tokens: int = 90, output_tokens: int = 80) -> pb.Outcome:
    return pb.Outcome(
        disposition=pb.DISPOSITION_SUCCEEDED,
        http_status=200,
        usage=pb.Usage(input_tokens=input_tokens, output_tokens=output_tokens),
    )


def commit(request: pb.ReserveRequest, context: bytes, outcome: pb.Outcome | None = None) -> pb.CommitRequest:
    return pb.CommitRequest(
        reservation_id=request.reservation_id,
        context=context,
        outcome=succeeded() if outcome is None else outcome,
    )


class Caller:
    """A client of a running server."""

    def __init__(self, server: Server, token: str | None = None) -> None:
        self.server = server
        self.channel = grpc.aio.insecure_channel(server.address)
        self.metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        self.coordinator: pb.CoordinatorServiceAsyncStub = pb.CoordinatorServiceStub(self.channel)
        self.admin: pb.AdminServiceAsyncStub = pb.AdminServiceStub(self.channel)

    async def reserve(self, request: pb.ReserveRequest | None = None, **fields: Any) -> pb.ReserveResponse:
        call = self.coordinator.Reserve(
            reserve(**fields) if request is None else request, metadata=self.metadata, timeout=20
        )
        return await call

    async def raw(self, service: str, method: str, data: bytes) -> bytes:
        """A unary call with these very bytes."""
        call: Any = self.channel.unary_unary(f"/{service}/{method}")
        answer: bytes = await call(data, metadata=self.metadata, timeout=20)
        return answer

    async def close(self) -> None:
        await self.channel.close()


class Talk:
    """A Session, from the client's side."""

    def __init__(self, caller: Caller) -> None:
        self.call = caller.coordinator.Session(metadata=caller.metadata)
        self.number = 0
        self.shares: list[pb.FallbackShare] = []
        self.drained = False
        self._ready: dict[int, pb.ResponseItem] = {}

    async def hello(self, **fields: Any) -> pb.Welcome:
        await self.call.write(pb.SessionRequest(hello=pb.Hello(**fields)))
        message = await self.call.read()
        assert isinstance(message, pb.SessionResponse)
        return message.welcome

    async def send(self, *items: pb.RequestItem) -> list[int]:
        """Send a batch; items without a number get one."""
        for item in items:
            if not item.number:
                self.number += 1
                item.number = self.number
        await self.call.write(pb.SessionRequest(batch=pb.RequestBatch(items=items)))
        return [item.number for item in items]

    async def answer(self, number: int, timeout: float = 10) -> pb.ResponseItem:
        """The answer to one item, whatever comes before it."""
        async with asyncio.timeout(timeout):
            while number not in self._ready:
                await self._read()
        return self._ready.pop(number)

    async def answers(self, numbers: Sequence[int]) -> list[pb.ResponseItem]:
        return [await self.answer(number) for number in numbers]

    async def drain(self, timeout: float = 10) -> None:
        async with asyncio.timeout(timeout):
            while not self.drained:
                await self._read()

    async def one(self, **op: Any) -> pb.ResponseItem:
        """Send one item and wait for its answer."""
        (number,) = await self.send(pb.RequestItem(**op))
        return await self.answer(number)

    async def _read(self) -> None:
        message = await self.call.read()
        if not isinstance(message, pb.SessionResponse):
            raise EOFError(f"the session ended with {await self.call.code()}")
        if message.WhichOneof("message") == "drain":
            self.drained = True
        self.shares += message.batch.fallback_shares
        for item in message.batch.items:
            assert item.number not in self._ready, "an item was answered twice"
            self._ready[item.number] = item


@asynccontextmanager
async def running(
    fields: Mapping[str, Any] | None = None, *, store: Store | None = None, environ: dict[str, str] | None = None
) -> AsyncIterator[Server]:
    """A server that is stopped at the end."""
    server = Server(config(**(fields or {})), store=store, environ=environ or {})
    await server.start()
    try:
        yield server
    finally:
        if not server.draining:
            await server.stop(0)


@asynccontextmanager
async def calling(server: Server, token: str | None = None) -> AsyncIterator[Caller]:
    caller = Caller(server, token)
    try:
        yield caller
    finally:
        await caller.close()


def violations(error: grpc.aio.AioRpcError) -> list[str]:
    """The fields that a BadRequest names."""
    return [violation.field for violation in bad_request(details(error)).field_violations]


def details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    found = dict(error.trailing_metadata() or ())
    status = status_pb2.Status()
    raw = found.get(DETAILS_KEY, b"")
    assert isinstance(raw, bytes)
    status.ParseFromString(raw)
    return status


def bad_request(status: status_pb2.Status) -> error_details_pb2.BadRequest:
    found = error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(found)
    return found


def retry_after(status: status_pb2.Status) -> float | None:
    found = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(found):
            return found.retry_delay.ToTimedelta().total_seconds()
    return None


def state_of(server: Server, ledger: str = LEDGER) -> Any:
    """The books of a ledger of this server."""
    state = server.router.slots[ledger].state
    assert state is not None
    return state


async def until(condition: Any, timeout: float = 5) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 -- nobody announces it
            await asyncio.sleep(0.005)
