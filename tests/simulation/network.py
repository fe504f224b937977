"""A simulated network: every message takes its time, and links can be slow, cut one way or both, or break.

Connections are ordered streams, as TCP gives them: while a link is cut, what was sent waits, and a connection that
waits too long breaks. A message that is lost for good is therefore a broken connection. What reaches a stopped process
waits in front of it; what reaches a dead one is answered by its machine: refused, or reset.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from paceline.frontend.peers.transport import Accept, PeerRefused, PeerUnreachable, Wire, WireClosed
from tests.simulation.loop import Loop, Process

KEEPALIVE_US = 2_500_000
"""A connection whose other side has not been heard for so long breaks, once the link is cut."""

NOBODY = contextvars.Context()
"""The world's own turns: no process's."""

CallHandler = Callable[[str, bytes], Awaitable[bytes]]


class Host:
    """A place in the network. ``process`` is what runs there now; ``None``: nothing, but the machine answers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: Process | None = None
        self.accept: Accept | None = None
        self.services: dict[str, Accept] = {}
        """Who else serves connections, by name."""
        self.answer_call: CallHandler | None = None
        self.wires: list[SimWire] = []
        self.asks: dict[Asked, None] = {}
        """Questions of clients that its process has, in their order."""


class Network:
    """Links between named hosts. Every draw is from one generator, in the order of the sends."""

    def __init__(self, loop: Loop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.hosts: dict[str, Host] = {}
        self.base_us = 300
        """The usual time of a message, one way."""
        self.extra_us: dict[tuple[str, str], int] = {}
        """Up to so much more on slow links."""
        self.cuts: dict[tuple[str, str], int] = {}
        """Links on which nothing arrives, and how many faults cut them."""
        self.waiting: dict[tuple[str, str], list[Callable[[], object]]] = {}
        """What is tried again once a link is whole."""
        self.messages = 0

    def host(self, name: str) -> Host:
        return self.hosts.setdefault(name, Host(name))

    def delay(self, source: str, target: str) -> int:
        self.messages += 1
        random = self.rng.random()
        took = self.base_us + int(self.base_us * 2 * random * random)
        extra = self.extra_us.get((source, target))
        return took if extra is None else took + int(extra * random)

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self.cuts

    def cut(self, source: str, target: str) -> None:
        """Nothing gets through in this direction, until :meth:`heal`."""
        link = source, target
        self.cuts[link] = self.cuts.get(link, 0) + 1
        host = self.hosts.get(source)
        for wire in () if host is None else list(host.wires):
            if wire.target == target:
                self.loop.at(self.loop.now + KEEPALIVE_US, wire.starve, context=NOBODY)

    def heal(self, source: str, target: str) -> None:
        link = source, target
        left = self.cuts.get(link, 0) - 1
        if left > 0:
            self.cuts[link] = left
            return
        self.cuts.pop(link, None)
        for retry in self.waiting.pop(link, ()):
            retry()

    def heal_all(self) -> None:
        self.extra_us.clear()
        for source, target in list(self.cuts):
            self.cuts[source, target] = 1
            self.heal(source, target)

    def break_wires(self, one: str, other: str | None = None) -> int:
        """Reset the connections of a host, or those to one other."""
        host = self.hosts.get(one)
        wires = [] if host is None else [wire for wire in host.wires if other is None or wire.target == other]
        for wire in wires:
            wire.reset()
        return len(wires)

    def died(self, name: str) -> None:
        """A host's process is gone: its connections are reset by its machine."""
        host = self.host(name)
        host.process = None
        host.accept = None
        host.services = {}
        host.answer_call = None
        for wire in list(host.wires):
            wire.reset()
        for asked in list(host.asks):
            asked.lose()


class SimWire:
    """One end of a connection: a :class:`~paceline.frontend.peers.transport.Wire`."""

    def __init__(self, network: Network, source: str, target: str, process: Process) -> None:
        self.source = source
        self.target = target
        self.process = process
        self.other = self
        self._network = network
        self._frames: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended: WireClosed | None = None
        self._closed = False
        self._arrives_at = 0
        """When the last frame sent gets there: none may overtake."""
        self._stuck: deque[bytes | None] | None = None
        """What waits for the link to be healed; ``None`` in it is the end of the stream."""
        self._unsent = 0
        self._since = network.loop.now
        network.host(source).wires.append(self)

    @property
    def is_joined(self) -> bool:
        """Somebody has accepted it."""
        return self.other is not self

    # -- as the product sees it ------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        if not self._closed and self._ended is None:
            self._send(frame)

    @property
    def unsent(self) -> int:
        return self._unsent

    async def receive(self) -> bytes:
        while not self._frames:
            if self._ended is not None:
                raise WireClosed(self._ended.clean)
            if self._closed:
                raise WireClosed(True)
            waiter = self._waiter
            if waiter is None or waiter.done():
                self._waiter = waiter = asyncio.get_running_loop().create_future()
            await waiter
        return self._frames.popleft()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._ended is None:
                self._send(None)
            self._wake()
            self._forget()

    # -- underneath ------------------------------------------------------------------------------------------------

    def _send(self, frame: bytes | None) -> None:
        if frame is not None:
            self._unsent += len(frame)
        if self._stuck is not None:
            self._stuck.append(frame)
            return
        network = self._network
        link = self.source, self.target
        if link in network.cuts:
            self._stuck = deque((frame,))
            network.waiting.setdefault(link, []).append(self._unstick)
            network.loop.at(network.loop.now + KEEPALIVE_US, self.starve, context=NOBODY)
            return
        self._travel(frame)

    def _travel(self, frame: bytes | None) -> None:
        loop = self._network.loop
        self._arrives_at = max(self._arrives_at + 1, loop.now + self._network.delay(self.source, self.target))
        loop.at(self._arrives_at, self._arrive, frame, context=self.other.process.context)

    def _arrive(self, frame: bytes | None) -> None:
        other = self.other
        if frame is None:
            other._end(clean=True)
            return
        self._unsent -= len(frame)
        if other._ended is None and not other._closed:
            other._frames.append(frame)
            other._wake()

    def _unstick(self) -> None:
        stuck, self._stuck = self._stuck, None
        if stuck is not None and self._ended is None:
            for frame in stuck:
                self._travel(frame)

    def starve(self) -> None:
        """The link has been cut for so long that both sides may give up."""
        network = self._network
        if network.is_cut(self.source, self.target) or network.is_cut(self.target, self.source):
            self.reset()

    def reset(self) -> None:
        """Break it, at both ends: each notices a little later, and a machine that is cut off by its own timer."""
        loop = self._network.loop
        for end in (self, self.other) if self.is_joined else (self,):
            if end._ended is None:
                at = loop.now + self._network.delay(end.target, end.source)
                loop.at(at, end._end, False, context=end.process.context)
            end._forget()

    def _end(self, clean: bool) -> None:
        if self._ended is None:
            self._ended = WireClosed(clean)
            if not clean:
                self._frames.clear()
            self._wake()
            self._forget()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _forget(self) -> None:
        wires = self._network.host(self.source).wires
        if self in wires:
            wires.remove(self)


class SimTransport:
    """A node's :class:`~paceline.frontend.peers.transport.Transport`."""

    def __init__(self, network: Network, name: str, process: Process) -> None:
        self._network = network
        self._name = name
        self._process = process

    async def connect(self, address: str, timeout: float, service: str = "") -> Wire:
        network, loop = self._network, self._network.loop
        opened: asyncio.Future[SimWire] = loop.create_future()
        mine = SimWire(network, self._name, address, self._process)

        def arrive() -> None:
            process = network.host(address).process
            if process is None or process.dead:
                back(PeerRefused(address))
            else:
                # A stopped process does not get to it, and says nothing.
                loop.at(loop.now, accept, context=process.context)

        def accept() -> None:
            host = network.host(address)
            process = host.process
            serve = host.services.get(service) if service else host.accept
            if process is None or serve is None:
                back(PeerRefused(address))
                return
            theirs = SimWire(network, address, self._name, process)
            mine.other, theirs.other = theirs, mine
            asyncio.get_running_loop().create_task(_serve(serve, theirs))
            back(None)

        def back(error: Exception | None) -> None:
            if not network.is_cut(address, self._name):
                at = loop.now + network.delay(address, self._name)
                loop.at(at, answered, error, context=self._process.context)

        def answered(error: Exception | None) -> None:
            if opened.done():
                return
            if error is None:
                opened.set_result(mine)
            else:
                opened.set_exception(error)

        if not network.is_cut(self._name, address):
            loop.at(loop.now + network.delay(self._name, address), arrive, context=NOBODY)
        try:
            async with asyncio.timeout(timeout):
                return await opened
        except TimeoutError:
            mine._forget()
            if mine.is_joined:
                mine.reset()
            raise PeerUnreachable(address) from None
        except PeerRefused:
            mine._forget()
            raise

    async def call(self, address: str, method: str, body: bytes, timeout: float) -> bytes:
        network, loop = self._network, self._network.loop
        answer: asyncio.Future[bytes] = loop.create_future()

        def arrive() -> None:
            process = network.host(address).process
            if process is None or process.dead:
                back(None, PeerRefused(address))
            else:
                loop.at(loop.now, handle, context=process.context)

        def handle() -> None:
            handler = network.host(address).answer_call
            if handler is None:
                back(None, PeerRefused(address))
            else:
                asyncio.get_running_loop().create_task(run(handler))

        async def run(handler: CallHandler) -> None:
            try:
                back(await handler(method, body), None)
            except Exception as error:
                back(None, PeerUnreachable(f"{address}: {error!r}"))

        def back(result: bytes | None, error: Exception | None) -> None:
            if not network.is_cut(address, self._name):
                at = loop.now + network.delay(address, self._name)
                loop.at(at, answered, result, error, context=self._process.context)

        def answered(result: bytes | None, error: Exception | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result or b"")

        if not network.is_cut(self._name, address):
            loop.at(loop.now + network.delay(self._name, address), arrive, context=NOBODY)
        try:
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise PeerUnreachable(address) from None


async def _serve(accept: Accept, wire: SimWire) -> None:
    try:
        await accept(wire)
    finally:
        wire.close()


class Caller:
    """A client program's connections to nodes: it asks, and hears once, or that the connection broke.

    ``ask`` hands ``deliver(reply)`` to the node's process; what ``reply`` is given comes back as ``heard``.
    """

    def __init__(self, network: Network, name: str) -> None:
        self.name = name
        self._network = network

    def ask(
        self, target: str, deliver: Callable[[Host, Callable[[Any], None]], object], heard: Callable[[Any], object]
    ) -> Asked:
        return Asked(self._network, self.name, target, deliver, heard)


class Broken:
    """What is heard of a question whose connection broke: nobody knows what became of it."""


class Refused:
    """What is heard if nobody listens there."""


BROKEN = Broken()
REFUSED = Refused()


class Asked:
    """One question under way."""

    __slots__ = ("_deliver", "_heard", "_network", "done", "source", "target")

    def __init__(
        self,
        network: Network,
        source: str,
        target: str,
        deliver: Callable[[Host, Callable[[Any], None]], object],
        heard: Callable[[Any], object],
    ) -> None:
        self._network = network
        self.source = source
        self.target = target
        self._deliver = deliver
        self._heard = heard
        self.done = False
        self._forth()

    def _forth(self) -> None:
        network = self._network
        link = self.source, self.target
        if link in network.cuts:
            network.waiting.setdefault(link, []).append(self._forth)
            network.loop.at(network.loop.now + KEEPALIVE_US, self._starve, context=NOBODY)
            return
        at = network.loop.now + network.delay(*link)
        network.loop.at(at, self._arrive, context=NOBODY)

    def _arrive(self) -> None:
        if self.done:
            return
        loop, host = self._network.loop, self._network.host(self.target)
        process = host.process
        if process is None or process.dead:
            self._back(REFUSED)
            return
        host.asks[self] = None
        loop.at(loop.now, self._handle, context=process.context)

    def _handle(self) -> None:
        self._deliver(self._network.host(self.target), self._back)

    def _back(self, answer: Any) -> None:
        network = self._network
        link = self.target, self.source
        if link in network.cuts:
            network.waiting.setdefault(link, []).append(lambda: self._back(answer))
            return
        network.loop.at(network.loop.now + network.delay(*link), self.hear, answer, context=NOBODY)

    def hear(self, answer: Any) -> None:
        self._network.host(self.target).asks.pop(self, None)
        if not self.done:
            self.done = True
            self._heard(answer)

    def lose(self) -> None:
        """The connection is reset."""
        network = self._network
        at = network.loop.now + network.delay(self.target, self.source)
        network.loop.at(at, self.hear, BROKEN, context=NOBODY)

    def _starve(self) -> None:
        if self._network.is_cut(self.source, self.target):
            self.hear(BROKEN)
