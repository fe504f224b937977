"""Processes of a fleet in one event loop: wires of two queues, owners and keepers that do as they are told."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any, cast

from paceline.engine.answers import Answer, Committed, Denied, Granted, Invalid, Reason, Released, Renewed, Touched
from paceline.engine.operations import NO_PRICES, Candidate, Commit, Context, Operation, Release, Renew, Reserve
from paceline.frontend.fleet import ASKS, FleetOptions, FleetRouter, FleetSlot
from paceline.frontend.peers.link import LinkOptions
from paceline.frontend.peers.serving import Serving, ServingOptions
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable, WireClosed
from paceline.ledger.clock import SystemClock
from paceline.ledger.errors import LedgerError
from paceline.ledger.options import Phase
from paceline.ledger.owner import Owner

LEDGER = "default"


class MemoryWire:
    """One end of a stream."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[bytes | WireClosed] = asyncio.Queue()
        self.other: MemoryWire
        self.ended: WireClosed | None = None
        self.sent = 0

    @property
    def unsent(self) -> int:
        return 0

    def send(self, frame: bytes) -> None:
        if self.ended is None:
            self.sent += 1
            self.other.inbox.put_nowait(frame)

    async def receive(self) -> bytes:
        found = await self.inbox.get()
        if isinstance(found, WireClosed):
            self.inbox.put_nowait(found)
            raise found
        return found

    def close(self) -> None:
        self.end(WireClosed(True))
        self.other.end(WireClosed(True))

    def end(self, how: WireClosed) -> None:
        if self.ended is None:
            self.ended = how
            self.inbox.put_nowait(how)


class Network:
    """Every node's address is its name."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.silent: set[str] = set()
        """They do not answer, though they live."""
        self.silence = 0.05
        self.connects: list[str] = []
        self.wires: list[tuple[str, MemoryWire]] = []

    async def connect(self, address: str, timeout: float) -> MemoryWire:
        self.connects.append(address)
        await asyncio.sleep(0)
        if address in self.silent:
            await asyncio.sleep(self.silence)
            raise PeerUnreachable(address)
        node = self.nodes.get(address)
        if node is None:
            raise PeerRefused(address)
        here, there = MemoryWire(), MemoryWire()
        here.other, there.other = there, here
        self.wires.append((address, there))
        node.tasks.append(asyncio.create_task(node.serving.accept(there)))
        return here

    async def call(self, address: str, method: str, body: bytes, timeout: float) -> bytes:
        raise PeerUnreachable(address)

    def kill(self, name: str) -> None:
        """The process is gone: its connections break, and nobody listens there."""
        node = self.nodes.pop(name)
        self.cut(name)
        for task in node.tasks:
            task.cancel()

    def cut(self, name: str) -> None:
        """Its connections break."""
        for address, wire in self.wires:
            if address == name and wire.ended is None:
                wire.end(WireClosed(False))
                wire.other.end(WireClosed(False))


class FakeOwner:
    """Records what it is asked. ``hold``: answers nothing; ``refusal``: answers that."""

    def __init__(self, epoch: int) -> None:
        self.phase = Phase.SERVING
        self.epoch = epoch
        self.inherited_at: int | None = None
        self.hold = False
        self.refusal: LedgerError | None = None
        self.asked: list[Operation] = []
        self.held: list[tuple[Operation, Any]] = []
        self.engine: Any = None
        self.at = 5_000_000

    def now(self) -> int:
        return self.at

    def submit(self, operation: Operation, reply: Any) -> None:
        if isinstance(operation, Renew) and not operation.key:
            # The fence, which is answered once all before it is decided.
            if not self.hold:
                reply(Invalid("context", "is needed"))
            return
        self.asked.append(operation)
        if self.refusal is not None:
            reply(self.refusal)
        elif self.hold or (isinstance(operation, Reserve) and operation.key.startswith("wait")):
            self.held.append((operation, reply))
        else:
            reply(answer_to(operation))

    def answer_all(self, error: LedgerError | None = None) -> None:
        held, self.held = self.held, []
        for operation, reply in held:
            reply(answer_to(operation) if error is None else error)

    @property
    def keys(self) -> list[str]:
        return [getattr(operation, "key", type(operation).__name__) for operation in self.asked]


TOUCHED = Touched()


def answer_to(operation: Operation) -> Answer:
    if isinstance(operation, Reserve):
        if operation.key.startswith("deny"):
            return Denied(Reason.LIMIT, "pool", None, None, TOUCHED)
        context = Context(LEDGER, operation.key, "pool", (), "", "", 0, (), NO_PRICES)
        return Granted((operation.key,), 0, 1, operation.waited_us, None, context, TOUCHED)
    if isinstance(operation, Commit):
        return Committed()
    if isinstance(operation, Release):
        return Released(released=True)
    if isinstance(operation, Renew):
        return Renewed(1)
    return Invalid("kind", "unknown")


class FakeWhere:
    def __init__(
        self, epoch: int = 0, node: str = "", address: str = "", owner: FakeOwner | None = None, era: str = ""
    ) -> None:
        self.era = era
        self.epoch = epoch
        self.node = node
        self.address = address
        self._owner = owner

    @property
    def owner(self) -> Owner | None:
        return cast(Owner | None, self._owner)


class FakeKeeper:
    """Believes what the test tells it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.at: dict[str, FakeWhere] = {}
        self.wanted: set[str] = set()
        self.suspected: list[tuple[str, int]] = []
        self.hints: list[tuple[int, str]] = []

    def where(self, ledger: str) -> FakeWhere:
        return self.at.get(ledger) or FakeWhere()

    def want(self, ledger: str) -> None:
        self.wanted.add(ledger)

    def suspect(self, ledger: str, epoch: int) -> None:
        self.suspected.append((ledger, epoch))

    def hint(self, ledger: str, epoch: int, node: str, address: str) -> None:
        self.hints.append((epoch, node))

    def tell(self, epoch: int, name: str, owner: FakeOwner | None = None, ledger: str = LEDGER, era: str = "") -> None:
        """Something changed."""
        self.at[ledger] = FakeWhere(epoch, name, name, owner, era)
        self.node.router.changed(ledger)
        self.node.serving.moved(ledger)


class Node:
    """One process."""

    def __init__(
        self,
        network: Network,
        name: str,
        *,
        options: FleetOptions | None = None,
        serving: ServingOptions | None = None,
    ) -> None:
        self.name = name
        self.network = network
        self.tasks: list[asyncio.Task[None]] = []
        self.clock = SystemClock()
        self.router = FleetRouter(
            name,
            network,
            self.clock,
            Random(name),
            lambda _: (),
            options=FleetOptions(away_us=400_000) if options is None else options,
            link_options=LinkOptions(backoff_first_us=2_000, backoff_most_us=10_000),
        )
        self.keeper = FakeKeeper(self)
        self.router.attach(self.keeper)
        self.serving = Serving(
            name,
            self.keeper,
            self.clock,
            asks=ASKS,
            prepare=self.router.prepare,
            want=self.keeper.want,
            options=serving,
        )
        if isinstance(network, Network):
            network.nodes[name] = self

    @property
    def slot(self) -> FleetSlot:
        slot = self.router.slot(LEDGER)
        assert isinstance(slot, FleetSlot)
        return slot

    def own(self, epoch: int) -> FakeOwner:
        """It owns the ledger from now on."""
        owner = FakeOwner(epoch)
        self.keeper.tell(epoch, self.name, owner)
        return owner


class Call:
    """An operation at a slot, and what came of it."""

    def __init__(self, slot: FleetSlot, operation: Operation) -> None:
        self.answers: list[Answer | LedgerError] = []
        slot.submit(operation, self.answers.append)

    @property
    def answer(self) -> Any:
        """The answer or error; ``None``: there is none yet."""
        assert len(self.answers) < 2, "answered twice"
        return self.answers[0] if self.answers else None


def reserve(key: str, wait_us: int = 0, waited_us: int = 0) -> Reserve:
    return Reserve(key, (Candidate("pool"),), max_wait_us=wait_us, waited_us=waited_us)


async def until(condition: Any, timeout: float = 2) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 -- nobody announces it
            await asyncio.sleep(0.001)
