"""The owner's side of the streams of its peers: check the hello, pass operations to the owner, send its answers back.

Nothing is passed on to a third process: who is not the owner says who is. Answers that come in one turn of the event
loop leave in one frame. Used from one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
import structlog

from paceline.engine.answers import Answer
from paceline.engine.operations import Operation, Renew, Reserve
from paceline.frontend.peers import frames
from paceline.frontend.peers.frames import (
    Ask,
    Away,
    Drain,
    Frame,
    FrameError,
    Hello,
    NotOwner,
    Operations,
    Told,
    Welcome,
)
from paceline.frontend.peers.transport import Wire, WireClosed
from paceline.ledger.clock import Clock
from paceline.ledger.errors import LedgerBusy, LedgerError
from paceline.ledger.options import Phase
from paceline.ledger.owner import Owner

_log = structlog.get_logger(__name__)

_FENCE = Renew("")
"""Changes nothing, and is answered once all before it is decided. No reservation has this key."""

_LEAST_CREDITS = 64

Handler = Callable[[str, Owner, bytes], bytes]
"""Answers a question about a ledger that is owned here: ledger, owner, body. Must not block."""


class Seat(Protocol):
    """Where a ledger is: what :meth:`Whereabouts.where` says."""

    @property
    def epoch(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def owner(self) -> Owner | None: ...
    @property
    def era(self) -> str: ...


class Whereabouts(Protocol):
    """The part of a keeper that serving needs."""

    def where(self, ledger: str) -> Seat: ...


class ServingOptions(msgspec.Struct, frozen=True):
    """Bounds of serving. Times in µs."""

    credits: int = 1_024
    """Operations of one stream without a word on them, at most."""
    busy_operations: int = 8_192
    """With more than that undecided, over all streams, Reserves are refused; what frees is taken."""
    streams: int = 4_096
    hello_timeout_us: int = 2_000_000
    patience_most_us: int = 500_000
    away_retry_us: int = 20_000
    unsent_bytes: int = 16 * 1024 * 1024
    """A peer that reads so much slower than it asks is cut off."""


class Serving:
    """Serves the wires of all peers of one process.

    ``prepare`` is called with a ledger before operations reach its owner: what this process has to define goes first.
    """

    def __init__(
        self,
        node: str,
        keeper: Whereabouts,
        clock: Clock,
        *,
        asks: Mapping[str, Handler] | None = None,
        prepare: Callable[[str], object] | None = None,
        want: Callable[[str], object] | None = None,
        options: ServingOptions | None = None,
    ) -> None:
        self.node = node
        self.keeper = keeper
        self.clock = clock
        self.asks = dict(asks or {})
        self.prepare = prepare
        self.want = want
        self.options = ServingOptions() if options is None else options
        self.undecided = 0
        """Operations of all streams without a word on them."""
        self.shed = 0
        """Reserves refused since the start, because too much was undecided."""
        self._streams: dict[str, dict[_Stream, None]] = {}
        """By ledger, in the order in which they came."""
        self._count = 0
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}

    @property
    def streams(self) -> int:
        """Open streams."""
        return self._count

    @property
    def credits(self) -> int:
        """Of a stream that begins now: many together are not to send more than is taken."""
        options = self.options
        share = options.busy_operations // (2 * max(1, self._count))
        return max(1, min(options.credits, max(_LEAST_CREDITS, share)))

    async def accept(self, wire: Wire) -> None:
        """Serve one wire until it ends. Never raises but for cancellation."""
        if self._count >= self.options.streams:
            wire.close()
            return
        self._count += 1
        try:
            async with asyncio.timeout(self.options.hello_timeout_us / 1e6):
                hello = frames.decode(await wire.receive())
            if not isinstance(hello, Hello):
                raise FrameError("the first frame is no hello")
            stream = _Stream(self, wire, hello.ledger)
            streams = self._streams.setdefault(hello.ledger, {})
            streams[stream] = None
            try:
                await stream.run(hello)
            finally:
                stream.end()
                streams.pop(stream, None)
                if not streams:
                    self._streams.pop(hello.ledger, None)
        except (WireClosed, TimeoutError):
            pass
        except FrameError as error:
            _log.warning("peer refused", error=str(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _log.error("peer stream failed", kind=type(error).__name__)
        finally:
            self._count -= 1
            wire.close()

    def moved(self, ledger: str) -> None:
        """To be called at every change of ``keeper.where(ledger)``."""
        for waiter in self._waiting.pop(ledger, ()):
            if not waiter.done():
                waiter.set_result(None)
        for stream in list(self._streams.get(ledger, ())):
            stream.check()

    def drain(self, ledger: str, node: str = "", address: str = "") -> None:
        """The owner lets go of a ledger: tell its peers, with the successor if there is one."""
        for stream in list(self._streams.get(ledger, ())):
            stream.drain(node, address)

    async def changed(self, ledger: str, us: int) -> None:
        """Return at the next change of a ledger, or after ``us``."""
        waiters = self._waiting.setdefault(ledger, {})
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters[waiter] = None
        timer = self.clock.call_at(
            self.clock.monotonic() + us, lambda: None if waiter.done() else waiter.set_result(None)
        )
        try:
            await waiter
        finally:
            timer.cancel()
            waiters.pop(waiter, None)
            if not waiters and self._waiting.get(ledger) is waiters:
                del self._waiting[ledger]


class _Stream:
    """One front end's stream for one ledger."""

    def __init__(self, serving: Serving, wire: Wire, ledger: str) -> None:
        self._serving = serving
        self._wire = wire
        self._ledger = ledger
        self._version = frames.VERSION
        self._owner: Owner | None = None
        self._epoch = -1
        self._round = 0
        """Counts welcomes: answers to what came before one are not sent behind it."""
        self._undecided: set[int] = set()
        self._answers: list[tuple[int, Answer]] = []
        self._failures: list[frames.Failure] = []
        self._queued: list[int] = []
        self._scheduled = False
        self._ended = False

    async def run(self, hello: Hello) -> None:
        wire = self._wire
        await self._greeted(hello)
        while not self._ended:
            frame: Frame = frames.decode(await wire.receive())
            if isinstance(frame, Operations):
                self._operations(frame.items)
            elif isinstance(frame, Ask):
                self._ask(frame)
            elif isinstance(frame, Hello):
                if frame.ledger != self._ledger:
                    raise FrameError("a stream is for one ledger")
                await self._greeted(frame)
            else:
                raise FrameError(f"a front end does not say {type(frame).__name__}")

    def end(self) -> None:
        """The stream is over; answers that come later go nowhere."""
        self._ended = True
        self._forget()

    def check(self) -> None:
        """Where the ledger is may have changed."""
        if self._owner is None:
            return
        seat = self._serving.keeper.where(self._ledger)
        if seat.owner is None:
            # One turn later: that it is gone, and where to, may be said one after the other.
            asyncio.get_running_loop().call_soon(self._gone)
        elif seat.owner is not self._owner or seat.epoch != self._epoch:
            # What was sent before is not decided, or not acknowledged: its owner says so itself, or has forgotten it.
            self._flush()
            self._rest(Away(1_000))

    def _gone(self) -> None:
        if self._ended or self._owner is None:
            return
        seat = self._serving.keeper.where(self._ledger)
        if seat.owner is None:
            self._go(seat)
        else:
            self.check()

    def drain(self, node: str, address: str) -> None:
        """Tell the peer to go to the successor."""
        if self._owner is not None:
            self._flush()
            self._rest(Drain(node, address))

    async def _greeted(self, hello: Hello) -> None:
        """Answer a hello."""
        serving = self._serving
        if hello.version < frames.OLDEST:
            raise FrameError(f"version {hello.version} of the protocol is no longer spoken here")
        self._version = min(hello.version, frames.VERSION)
        if serving.want is not None:
            serving.want(self._ledger)
        left = min(hello.patience_us, serving.options.patience_most_us)
        until = serving.clock.monotonic() + left
        while True:
            seat = serving.keeper.where(self._ledger)
            owner = seat.owner
            if owner is not None and seat.epoch >= hello.epoch:
                if _decides(owner):
                    self._welcome(owner, seat.epoch)
                    return
                if serving.clock.monotonic() >= until:
                    self._wire.send(frames.encode(Away(serving.options.away_retry_us)))
                    return
                await serving.changed(self._ledger, 5_000)
                continue
            if seat.epoch > hello.epoch:
                self._go(seat)
                return
            if serving.clock.monotonic() >= until:
                if seat.node == serving.node:
                    # It is being read here, or was lost a moment ago and nobody is known to have it.
                    self._wire.send(frames.encode(Away(serving.options.away_retry_us)))
                else:
                    self._go(seat)
                return
            # The ledger changes hands, and comes here perhaps.
            await serving.changed(self._ledger, until - serving.clock.monotonic())

    def _welcome(self, owner: Owner, epoch: int) -> None:
        serving = self._serving
        self._forget()
        self._owner, self._epoch = owner, epoch
        self._round += 1
        self._wire.send(frames.encode(Welcome(self._version, epoch, serving.node, serving.credits, owner.now())))

    def _go(self, seat: Seat) -> None:
        """Say who owns the ledger, and end."""
        self._flush()
        self._rest(NotOwner(seat.epoch, seat.node, seat.address))
        self._ended = True
        self._wire.close()

    def _rest(self, frame: Frame) -> None:
        """Say why nothing more is decided here for now."""
        self._wire.send(frames.encode(frame))
        self._forget()
        self._owner = None

    def _forget(self) -> None:
        self._serving.undecided -= len(self._undecided)
        self._undecided = set()
        self._answers.clear()
        self._failures.clear()
        self._queued.clear()

    # -- operations -------------------------------------------------------------------------------------------

    def _operations(self, items: list[tuple[int, Operation]]) -> None:
        owner = self._owner
        if owner is None:
            # They crossed with our word that nothing is decided here.
            return
        serving = self._serving
        if serving.prepare is not None:
            serving.prepare(self._ledger)
        undecided, round_ = self._undecided, self._round
        waiting: list[int] = []
        for number, operation in items:
            if isinstance(operation, Reserve):
                if serving.undecided >= serving.options.busy_operations:
                    serving.shed += 1
                    busy = LedgerBusy(f"the owner of ledger {self._ledger!r} has too much to do", 100_000)
                    self._failures.append(frames.failure(number, busy))
                    self._schedule()
                    continue
                if operation.max_wait_us > 0:
                    waiting.append(number)
            undecided.add(number)
            serving.undecided += 1
            owner.submit(operation, _Replier(self, number, round_))
        if waiting and self._owner is owner:
            owner.submit(_FENCE, _Fence(self, waiting, round_))

    def reply(self, number: int, round_: int, answer: Answer | LedgerError) -> None:
        """The owner's answer to an operation."""
        if round_ != self._round or self._ended or self._owner is None:
            return
        if number in self._undecided:
            self._undecided.remove(number)
            self._serving.undecided -= 1
        if isinstance(answer, LedgerError):
            self._failures.append(frames.failure(number, answer))
        else:
            self._answers.append((number, answer))
        if not self._scheduled:
            self._schedule()

    def passed(self, numbers: list[int], round_: int) -> None:
        """Everything up to these Reserves is decided: those without an answer wait."""
        if round_ != self._round or self._ended or self._owner is None:
            return
        undecided = self._undecided
        queued = [number for number in numbers if number in undecided]
        if queued:
            undecided.difference_update(queued)
            self._serving.undecided -= len(queued)
            self._queued += queued
            self._schedule()

    def _ask(self, ask: Ask) -> None:
        owner = self._owner
        handler = self._serving.asks.get(ask.name)
        body: bytes | None = None
        if owner is not None and handler is not None:
            try:
                body = handler(self._ledger, owner, ask.body)
            except Exception as error:
                _log.error("a peer's question failed", name=ask.name, kind=type(error).__name__)
        self._wire.send(frames.encode(Told(ask.number, body)))

    # -- answers ----------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        wire, owner = self._wire, self._owner
        if self._ended or owner is None:
            return
        if self._answers:
            answers, self._answers = self._answers, []
            wire.send(frames.answers(answers, owner.now()))
        if self._queued:
            queued, self._queued = self._queued, []
            wire.send(frames.encode(frames.Queued(queued)))
        if self._failures:
            failures, self._failures = self._failures, []
            wire.send(frames.encode(frames.Failures(failures)))
        if wire.unsent > self._serving.options.unsent_bytes:
            _log.warning("a peer reads too slowly", ledger=self._ledger)
            self._ended = True
            wire.close()


class _Replier:
    """Where an answer goes. A class, because a closure for each operation costs more."""

    __slots__ = ("number", "round", "stream")

    def __init__(self, stream: _Stream, number: int, round_: int) -> None:
        self.stream = stream
        self.number = number
        self.round = round_

    def __call__(self, answer: Answer | LedgerError) -> None:
        self.stream.reply(self.number, self.round, answer)


class _Fence:
    __slots__ = ("numbers", "round", "stream")

    def __init__(self, stream: _Stream, numbers: list[int], round_: int) -> None:
        self.stream = stream
        self.numbers = numbers
        self.round = round_

    def __call__(self, answer: Answer | LedgerError) -> None:
        if not isinstance(answer, LedgerError):
            self.stream.passed(self.numbers, self.round)


def _decides(owner: Owner) -> bool:
    """It takes operations: those of a ledger that has stopped for good are told so by it."""
    return owner.phase in (Phase.SERVING, Phase.REPLAYING, Phase.FAILED)
