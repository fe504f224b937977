"""Wires between real processes: gRPC streams of frames, authenticated by a key that only the fleet's store knows.

Every call carries ``paceline-peer``: the node's name, the time and an HMAC-SHA256 of both. The key is in the store's
meta (:data:`META_KEY`), so that whoever may write the journals may speak, and nobody else.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import grpc
import structlog

from paceline.frontend.errors import DETAILS_KEY, Code, Problem, missing, unexpected
from paceline.frontend.peers.transport import Accept, PeerRefused, PeerUnreachable, WireClosed
from paceline.ledger.clock import Clock
from paceline_client.stubs.google_types import error_details_pb2, status_pb2

SERVICE = "paceline.peers.v1.PeerService"
STREAM = f"/{SERVICE}/Stream"
CALL = f"/{SERVICE}/Call"
META_KEY = "peers.key"
"""Where the fleet's key is kept in the store."""
TOKEN = "paceline-peer"  # noqa: S105 -- the name of a header
METHOD = "paceline-method"
PROBLEM = "paceline-problem"
"""Marks a status that the other side's handler gave, as opposed to one of the connection."""
SKEW_US = 120_000_000
"""How far the clocks of two processes may be apart."""
MAX_FRAME_BYTES = 64 * 1024 * 1024

_KEEPALIVE_MS = 1_000
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", -1),
    # A host that died without a word is noticed within two seconds.
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 300),
    ("grpc.http2.max_ping_strikes", 0),
    # A ping that probes the bandwidth would hold the others up, for a minute, on a line that has fallen silent.
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.so_reuseport", 0),
)
_CLIENT_OPTIONS = (
    *_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
_log = structlog.get_logger(__name__)

Method = Callable[[bytes], Awaitable[bytes]]
"""A handler of :meth:`~paceline.frontend.peers.transport.Transport.call`; may raise
:class:`~paceline.frontend.errors.Problem`."""


def new_key() -> bytes:
    """A fresh key for a fleet."""
    return secrets.token_bytes(32)


class Passes:
    """Makes and checks the tokens of one fleet. ``wall`` is µs since 1970."""

    def __init__(self, key: bytes, node: str, wall: Callable[[], int]) -> None:
        self._key = key
        self._node = node
        self._wall = wall

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """For a call of this node, now."""
        said = f"{self._node}:{self._wall()}"
        return ((TOKEN, f"{said}:{self._tag(said)}"),)

    def accepts(self, metadata: Mapping[str, str | bytes]) -> bool:
        """Whether a call comes from a process of this fleet, a moment ago."""
        token = metadata.get(TOKEN, "")
        if not isinstance(token, str) or len(token) > 512:
            return False
        said, _, tag = token.rpartition(":")
        if not hmac.compare_digest(self._tag(said).encode(), tag.encode()):
            return False
        at = said.rpartition(":")[2]
        return at.isdigit() and abs(self._wall() - int(at)) <= SKEW_US

    def _tag(self, said: str) -> str:
        return hmac.new(self._key, b"paceline peer\0" + said.encode(), hashlib.sha256).hexdigest()


class _GrpcWire:
    """One end of a stream. ``write`` and ``read`` are those of the call; ``end`` ends it."""

    def __init__(
        self,
        write: Callable[[bytes], Awaitable[None]],
        read: Callable[[], Awaitable[Any]],
        end: Callable[[], Awaitable[bool]],
    ) -> None:
        self._write = write
        self._read = read
        self._end = end
        self._outbox: deque[bytes] = deque()
        self._unsent = 0
        self._inbox: asyncio.Queue[bytes | WireClosed] = asyncio.Queue(_MOST_UNREAD)
        self._more = asyncio.Event()
        self._closed = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read_all())
        self._writer = asyncio.create_task(self._write_all())

    @property
    def unsent(self) -> int:
        return self._unsent

    def send(self, frame: bytes) -> None:
        if not self._closed:
            self._outbox.append(frame)
            self._unsent += len(frame)
            self._more.set()

    async def receive(self) -> bytes:
        if self._closed and self._inbox.empty():
            raise WireClosed(True)
        found = await self._inbox.get()
        if isinstance(found, WireClosed):
            self._finish(found)
            raise found
        return found

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._more.set()
            self._finish(WireClosed(True))

    async def drained(self) -> None:
        """Return once what was sent before :meth:`close` is written, or cannot be."""
        await asyncio.wait([self._writer], timeout=_FLUSH_SECONDS)
        self.cancel()

    def cancel(self) -> None:
        for task in (self._reader, self._writer):
            task.cancel()

    def _finish(self, how: WireClosed) -> None:
        self._closed = True
        self._more.set()
        if self._inbox.full():
            self._inbox.get_nowait()
        self._inbox.put_nowait(how)
        if not self.ended.done():
            self.ended.set_result(None)

    async def _read_all(self) -> None:
        how = WireClosed(False)
        try:
            while True:
                frame = await self._read()
                if not isinstance(frame, bytes):
                    break
                await self._inbox.put(frame)
            how = WireClosed(await self._end())
        except grpc.aio.AioRpcError as error:
            if error.code() is Code.UNAUTHENTICATED:
                _log.error("another server refuses this one: are both clocks right, and both of one store?")
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            pass
        except Exception as error:
            _log.error("peer stream failed", kind=type(error).__name__)
        if not self._closed:
            await self._inbox.put(how)
            if not self.ended.done():
                self.ended.set_result(None)

    async def _write_all(self) -> None:
        try:
            while True:
                while self._outbox:
                    frame = self._outbox.popleft()
                    await self._write(frame)
                    self._unsent -= len(frame)
                if self._closed:
                    return
                self._more.clear()
                await self._more.wait()
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            # The reader hears of it, and says how it ended.
            self._outbox.clear()


_MOST_UNREAD = 64
"""Frames that were read and not taken; beyond that gRPC holds the sender back."""
_FLUSH_SECONDS = 1.0


class PeerTransport:
    """A :class:`~paceline.frontend.peers.transport.Transport` over gRPC, for one process."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def connect(self, address: str, timeout: float) -> _GrpcWire:
        try:
            async with asyncio.timeout(timeout):
                await _knock(address)
                channel = grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)
                try:
                    await channel.channel_ready()
                    stream: Any = channel.stream_stream(STREAM)
                    call = stream(metadata=self._passes.metadata())
                except BaseException:
                    await channel.close()
                    raise
        except TimeoutError:
            raise PeerUnreachable(f"{address} does not answer") from None

        async def end() -> bool:
            return bool(await call.code() is Code.OK)

        wire = _GrpcWire(call.write, call.read, end)
        self._spawn(self._tidy(wire, call, channel))
        return wire

    async def call(self, address: str, method: str, body: bytes, timeout: float) -> bytes:
        """Raises :class:`~paceline.frontend.errors.Problem` as the other side's handler did."""
        channel = self._channels.get(address)
        if channel is None:
            async with _InTime(address, timeout):
                await _knock(address)
            if len(self._channels) >= _MOST_CHANNELS:
                old = self._channels.pop(next(iter(self._channels)))
                self._spawn(old.close(None))
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)
        unary: Any = channel.unary_unary(CALL)
        try:
            answer = await unary(body, metadata=(*self._passes.metadata(), (METHOD, method)), timeout=timeout)
            return cast(bytes, answer)
        except grpc.aio.AioRpcError as error:
            trailers = {str(key): value for key, value in error.trailing_metadata() or ()}
            if PROBLEM in trailers:
                raise _problem(error, trailers.get(DETAILS_KEY)) from None
            if self._channels.get(address) is channel:
                del self._channels[address]
                self._spawn(channel.close(None))
            async with _InTime(address, timeout):
                await _knock(address)
            raise PeerUnreachable(f"{address}: {error.code().name}") from None

    async def close(self) -> None:
        """End everything."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_FLUSH_SECONDS)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _tidy(wire: _GrpcWire, call: Any, channel: grpc.aio.Channel) -> None:
        try:
            await wire.ended
        finally:
            wire.cancel()
            call.cancel()
            await channel.close()


_MOST_CHANNELS = 64


class _InTime:
    """Bounds a wait for a peer; what comes too late is :class:`PeerUnreachable`."""

    def __init__(self, address: str, timeout: float) -> None:
        self._address = address
        self._timeout = asyncio.timeout(timeout)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise PeerUnreachable(f"{self._address} does not answer") from None


async def _knock(address: str) -> None:
    """Whether somebody listens; gRPC itself does not tell a refusal from silence. Raises :class:`PeerRefused`."""
    try:
        if address.startswith("unix:"):
            _, writer = await asyncio.open_unix_connection(address.removeprefix("unix:").removeprefix("//"))
        else:
            host, _, port = address.rpartition(":")
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (ConnectionRefusedError, FileNotFoundError):
        raise PeerRefused(f"nobody listens on {address}") from None
    except (OSError, ValueError) as error:
        raise PeerUnreachable(f"{address}: {error}") from None
    writer.transport.abort()


def _problem(error: grpc.aio.AioRpcError, details: Any) -> Problem:
    """What the other side's handler raised."""
    violations: list[tuple[str, str]] = []
    retry_after: int | None = None
    if isinstance(details, bytes):
        status = status_pb2.Status.FromString(details)
        for detail in status.details:
            bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(bad):
                violations += [(each.field, each.description) for each in bad.field_violations]
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.ToMicroseconds()
    return Problem(error.code(), error.details() or "", tuple(violations), retry_after)


class PeerService:
    """Takes the streams and calls of the other processes, on an address of its own."""

    def __init__(self, passes: Passes, accept: Accept, methods: dict[str, Method] | None = None) -> None:
        self.methods = {} if methods is None else methods
        """By name. More may be put in at any time."""
        self._passes = passes
        self._accept = accept
        self._server: grpc.aio.Server | None = None

    async def start(self, listen: str) -> str:
        """Listen; ``HOST:PORT`` or ``unix:PATH`` with the port that it became. Raises ``RuntimeError``."""
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE,
                    {
                        "Stream": grpc.stream_stream_rpc_method_handler(self._stream),
                        "Call": grpc.unary_unary_rpc_method_handler(self._call),
                    },
                ),
            )
        )
        port = server.add_insecure_port(listen)
        await server.start()
        self._server = server
        return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """Listen no more, and end all streams."""
        if self._server is not None:
            await self._server.stop(0.2)

    async def _stream(self, _: object, context: Any) -> None:
        await self._check(context)

        async def end() -> bool:
            # The peer has closed its side; if it is gone altogether, reading has failed before.
            return not context.cancelled()

        wire = _GrpcWire(context.write, context.read, end)
        try:
            await self._accept(wire)
        finally:
            wire.close()
            await wire.drained()

    async def _call(self, body: bytes, context: Any) -> bytes:
        await self._check(context)
        name = dict(context.invocation_metadata() or ()).get(METHOD, "")
        method = self.methods.get(str(name))
        problem: Problem
        try:
            if method is None:
                raise missing("the other server does not know this method: it is of another version")
            return await method(body)
        except Problem as error:
            problem = error
        except asyncio.CancelledError:
            raise
        except Exception as error:
            problem = unexpected("peer", error)
        details = ((DETAILS_KEY, problem.status().SerializeToString()), (PROBLEM, "1"))
        await context.abort(problem.code, problem.message, details)
        return b""

    async def _check(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata() or ())
        if not self._passes.accepts(metadata):
            _log.warning("a peer was refused: not of this store, or a clock is two minutes off", peer=context.peer())
            await context.abort(Code.UNAUTHENTICATED, "not a process of this fleet, or its clock is wrong")


def passes(key: bytes, node: str, clock: Clock) -> Passes:
    """The tokens of one process."""
    return Passes(key, node, clock.wall)
