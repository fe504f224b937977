"""A front end's side of the stream to a ledger's owner: connect, say hello, send batches, hand answers up.

A link keeps nothing for later: what has no answer when it is lost is its user's to send again. It is used from one
event loop, and takes its time from a :class:`~paceline.ledger.clock.Clock` and that loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum
from random import Random
from typing import NamedTuple, Protocol

import msgspec
import structlog

from paceline.engine.answers import Answer
from paceline.engine.operations import Operation, Reserve
from paceline.frontend.peers import frames
from paceline.frontend.peers.frames import (
    Answers,
    Ask,
    Away,
    Drain,
    Failures,
    Frame,
    FrameError,
    Hello,
    NotOwner,
    Operations,
    Queued,
    Told,
    Welcome,
)
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable, Transport, Wire, WireClosed
from paceline.ledger.clock import Clock
from paceline.ledger.errors import LedgerDraining, LedgerError, LedgerStopped, LedgerUnavailable

_log = structlog.get_logger(__name__)


class Lost(Enum):
    """How a link lost its owner."""

    BROKEN = "broken"
    """The connection broke, or another owner took over: this one may have died of what it was sent."""
    MOVED = "moved"
    """The owner said that the ledger is elsewhere, or going there."""
    AWAY = "away"
    """The owner is there and cannot decide now."""


class Target(NamedTuple):
    """Where the owner of an epoch is."""

    epoch: int
    node: str
    address: str
    is_expected: bool = False
    """It was named as the successor, and this epoch has perhaps not begun: that nobody listens there says nothing of an
    owner."""


class LinkOptions(msgspec.Struct, frozen=True):
    """Bounds of a link. Times in µs."""

    connect_timeout_us: int = 1_000_000
    hello_timeout_us: int = 1_500_000
    backoff_first_us: int = 20_000
    backoff_most_us: int = 400_000
    """Between attempts to connect; each is drawn between half of it and the whole."""
    patience_us: int = 300_000
    """For how long a successor may hold back its answer to a hello."""
    away_pause_us: int = 10_000
    """Before hello is said again to an owner that has just failed to decide; doubled each time, at most 16 times it."""
    batch_operations: int = 512
    """Operations of one frame."""
    unsent_bytes: int = 4 * 1024 * 1024
    """With more than that on its way, nothing is sent for a moment."""
    unsent_pause_us: int = 5_000


class LinkUser(Protocol):
    """Whose link it is. Called from the event loop."""

    def opened(self, epoch: int) -> None:
        """The owner of ``epoch`` takes operations. Called again if it goes on under another epoch."""
        ...

    def answered(self, number: int, answer: Answer) -> None: ...
    def failed(self, number: int, error: LedgerError) -> None: ...
    def queued(self, numbers: list[int]) -> None:
        """The engine has taken these, and they wait."""
        ...

    def lost(self, how: Lost) -> None:
        """Nothing can be sent; what has no answer will get none from this link."""
        ...

    def refused(self, target: Target) -> None:
        """Nobody listens where this owner was: tried since it is known to own the ledger."""
        ...

    def hinted(self, target: Target) -> None:
        """A peer says who owns the ledger."""
        ...


class Link:
    """The stream to one ledger's owner. ``ready``: operations can be sent."""

    def __init__(
        self,
        ledger: str,
        node: str,
        transport: Transport,
        clock: Clock,
        random: Random,
        user: LinkUser,
        options: LinkOptions | None = None,
    ) -> None:
        self.ready = False
        self.epoch = 0
        """Of the owner that it is, or was last, connected to."""
        self._ledger = ledger
        self._node = node
        self._transport = transport
        self._clock = clock
        self._random = random
        self._user = user
        self._options = LinkOptions() if options is None else options
        self._target: Target | None = None
        self._least = 0
        self._credits = 0
        self._first: deque[tuple[int, Operation]] = deque()
        """What frees, and all else that is no Reserve."""
        self._reserves: deque[tuple[int, Operation]] = deque()
        self._flying: set[int] = set()
        """Sent, and neither answered nor queued."""
        self._asks: dict[int, Callable[[bytes | None], object]] = {}
        self._unasked: list[Ask] = []
        self._asked = 0
        self._time_offset: int | None = None
        self._wire: Wire | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed: asyncio.Future[None] | None = None
        self._scheduled = False
        self._away = 0
        """How often the owner has failed to decide since it last did."""
        self._closed = False

    # -- for its user -----------------------------------------------------------------------------------------

    def aim(self, target: Target | None) -> None:
        """Go to the owner of another epoch, or (``None``) nowhere. An epoch lower than one that was seen is ignored."""
        if target is not None and (target.epoch < self._least or not target.address):
            return
        if target == self._target or self._closed:
            return
        at_home = self.ready and target is not None and target.epoch <= self.epoch
        # What was expected has come true. One that is not connected yet begins again: a refusal counts from now on.
        before = self._target
        is_there = self._wire is not None and before is not None and target == before._replace(is_expected=False)
        self._target = target
        if target is not None:
            self._least = max(self._least, target.epoch)
        if at_home or is_there:
            return
        # Another owner is no sign that this one has died of anything: only a broken line is.
        self._leave(Lost.MOVED)
        self._rouse()
        if target is not None and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def forget(self) -> None:
        """Epochs begin anew: a lower one than was seen may be the newest."""
        self._least = self.epoch = 0

    def send(self, number: int, operation: Operation) -> None:
        """Send an operation with this turn's batch. Only while :attr:`ready`."""
        (self._reserves if isinstance(operation, Reserve) else self._first).append((number, operation))
        if not self._scheduled:
            self._schedule()

    def ask(self, name: str, body: bytes, reply: Callable[[bytes | None], object]) -> None:
        """Ask the owner's process, ahead of what is sent later. ``reply`` hears ``None`` if there is no answer."""
        if not self.ready:
            reply(None)
            return
        self._asked += 1
        self._asks[self._asked] = reply
        self._unasked.append(Ask(self._asked, name, body))
        if not self._scheduled:
            self._schedule()

    def is_flying(self, number: int) -> bool:
        """It was sent, and there is no word on it."""
        return number in self._flying

    @property
    def backlog(self) -> int:
        """Reserves that wait for credit."""
        return len(self._reserves)

    def now(self) -> int | None:
        """Ledger time in µs, as last heard and counted on; ``None``: not known yet."""
        return None if self._time_offset is None else self._clock.monotonic() + self._time_offset

    async def close(self) -> None:
        """End it. Its user hears no more of it."""
        self._closed = True
        self._target = None
        self._leave(None)
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])

    # -- sending ----------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        wire = self._wire
        if wire is None or not self.ready:
            return
        for ask in self._unasked:
            wire.send(frames.encode(ask))
        self._unasked.clear()
        first, reserves, flying = self._first, self._reserves, self._flying
        room = self._credits - len(flying)
        while room > 0 and (first or reserves):
            if wire.unsent > self._options.unsent_bytes:
                self._scheduled = True
                self._clock.call_at(self._clock.monotonic() + self._options.unsent_pause_us, self._flush)
                return
            batch: list[tuple[int, Operation]] = []
            most = min(room, self._options.batch_operations)
            while first and len(batch) < most:
                batch.append(first.popleft())
            while reserves and len(batch) < most:
                batch.append(reserves.popleft())
            room -= len(batch)
            for number, _ in batch:
                flying.add(number)
            wire.send(frames.encode(Operations(batch)))

    # -- the stream -------------------------------------------------------------------------------------------

    def _rouse(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None and not changed.done():
            changed.set_result(None)

    async def _pause(self, us: int | None) -> None:
        """Wait so long, or (``None``) without end; a new target ends it."""
        self._changed = changed = asyncio.get_running_loop().create_future()
        timer = None if us is None else self._clock.call_at(self._clock.monotonic() + us, self._rouse)
        try:
            await changed
        finally:
            if timer is not None:
                timer.cancel()

    def _leave(self, how: Lost | None) -> None:
        """Be connected no more."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()
        self._lose(how)

    def _lose(self, how: Lost | None) -> None:
        """What was sent and is not answered gets no answer from here."""
        was_ready, self.ready = self.ready, False
        self._first.clear()
        self._reserves.clear()
        self._unasked.clear()
        asks, self._asks = self._asks, {}
        for reply in asks.values():
            reply(None)
        if was_ready and how is not None:
            self._user.lost(how)
        self._flying.clear()

    async def _run(self) -> None:
        options = self._options
        tries = 0
        while True:
            target = self._target
            if target is None:
                tries = 0
                await self._pause(None)
                continue
            try:
                opened = await self._visit(target)
            except (FrameError, TimeoutError) as error:
                _log.warning("peer does not answer as it should", ledger=self._ledger, error=str(error))
                self._leave(Lost.BROKEN)
                opened = False
            except asyncio.CancelledError:
                raise
            except Exception as error:
                _log.error("peer link failed", ledger=self._ledger, kind=type(error).__name__)
                self._leave(Lost.BROKEN)
                opened = False
            if self._target != target:
                tries = 0
                continue
            if opened:
                # It worked until a moment ago: look at once what has become of it.
                tries = 0
            else:
                most = min(options.backoff_first_us << min(tries, 10), options.backoff_most_us)
                tries += 1
                await self._pause(int(most * (0.5 + self._random.random() / 2)))

    async def _visit(self, target: Target) -> bool:
        """Connect and stay; whether the owner took operations."""
        try:
            wire = await self._connect(target)
        except PeerRefused:
            if self._target == target and not target.is_expected:
                self._user.refused(target)
            return False
        except PeerUnreachable:
            return False
        if wire is None:
            return False
        if self._target != target:
            wire.close()
            return False
        self._wire = wire
        opened = False
        try:
            self._greet(wire)
            while self._wire is wire:
                if self.ready:
                    frame = frames.decode(await wire.receive())
                else:
                    async with asyncio.timeout(self._options.hello_timeout_us / 1e6):
                        frame = frames.decode(await wire.receive())
                if self._wire is not wire:
                    break
                if isinstance(frame, Away):
                    self._lose(Lost.AWAY)
                    await self._pause(max(1_000, frame.retry_after_us))
                    if self._wire is wire:
                        self._greet(wire)
                else:
                    self._take(frame)
                opened = opened or self.ready
        except WireClosed as closed:
            if self._wire is wire:
                self._leave(Lost.MOVED if closed.clean else Lost.BROKEN)
        return opened

    async def _connect(self, target: Target) -> Wire | None:
        """A wire; ``None`` if there is another target meanwhile. Raises as the transport does."""
        self._changed = changed = asyncio.get_running_loop().create_future()
        timeout = self._options.connect_timeout_us / 1e6
        connecting = asyncio.ensure_future(self._transport.connect(target.address, timeout))
        try:
            await asyncio.wait((connecting, changed), return_when=asyncio.FIRST_COMPLETED)
            if connecting.done():
                return connecting.result()
            return None
        except asyncio.CancelledError:
            connecting.add_done_callback(_unwanted)
            raise
        finally:
            if not connecting.done():
                connecting.add_done_callback(_unwanted)
                connecting.cancel()

    def _greet(self, wire: Wire) -> None:
        wire.send(
            frames.encode(Hello(frames.VERSION, self._ledger, self._node, self._least, self._options.patience_us))
        )

    def _take(self, frame: Frame) -> None:
        user = self._user
        if isinstance(frame, Answers):
            self._time_offset = frame.now - self._clock.monotonic()
            self._away = 0
            flying = self._flying
            for number, answer in frames.whole(frame):
                flying.discard(number)
                user.answered(number, answer)
            self._more()
        elif isinstance(frame, Queued):
            self._flying.difference_update(frame.numbers)
            user.queued(frame.numbers)
            self._more()
        elif isinstance(frame, Failures):
            self._failed(frame)
        elif isinstance(frame, Told):
            reply = self._asks.pop(frame.number, None)
            if reply is not None:
                reply(frame.body)
        elif isinstance(frame, Welcome):
            self._welcomed(frame)
        elif isinstance(frame, NotOwner):
            hands_over = self.ready and frame.epoch == self.epoch
            self._leave(Lost.MOVED)
            if hands_over:
                self._follow(frame)
            elif frame.epoch >= self._least and frame.address:
                user.hinted(Target(frame.epoch, frame.node, frame.address))
        elif isinstance(frame, Drain):
            self._leave(Lost.MOVED)
            self._follow(frame)
        else:
            raise FrameError(f"an owner does not say {type(frame).__name__}")

    def _follow(self, frame: NotOwner | Drain) -> None:
        """Go to the successor, which may not own the ledger yet: it holds our hello back until it does."""
        if frame.address:
            target = Target(self.epoch + 1, frame.node, frame.address, is_expected=True)
            self.aim(target)
            self._user.hinted(target)

    def _welcomed(self, frame: Welcome) -> None:
        if frame.epoch < self._least:
            # It does not know yet that it was deposed.
            self._leave(Lost.MOVED)
            return
        if self.ready and frame.epoch == self.epoch:
            return
        self._lose(Lost.AWAY)
        self.epoch = self._least = frame.epoch
        self._credits = max(1, frame.credits)
        self._time_offset = frame.now - self._clock.monotonic()
        self.ready = True
        self._user.opened(frame.epoch)

    def _failed(self, frame: Failures) -> None:
        away = False
        for item in frame.items:
            self._flying.discard(item.number)
            error = frames.error_of(item)
            if isinstance(error, LedgerUnavailable | LedgerDraining) and not isinstance(error, LedgerStopped):
                away = True
            self._user.failed(item.number, error)
        if away and self.ready:
            self._lose(Lost.AWAY)
            wire = self._wire
            if wire is not None:
                again = self._clock.monotonic() + (self._options.away_pause_us << min(self._away, 4))
                self._away += 1
                # Somebody else may have said hello meanwhile: another one would make the owner forget what it has.
                self._clock.call_at(again, lambda: self._greet(wire) if self._wire is wire and not self.ready else None)
        else:
            self._more()

    def _more(self) -> None:
        if (self._first or self._reserves) and not self._scheduled and self.ready:
            self._schedule()


def _unwanted(connecting: asyncio.Future[Wire]) -> None:
    """A connection that nobody waits for any more."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()
