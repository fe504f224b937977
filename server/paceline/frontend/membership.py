"""Which part a process has among those that serve the same ledgers, and what that takes.

========  =======================================================================================
alone     one process, an embedded store: every ledger is owned here, and nobody else is there
host      the first of several workers over an embedded store: owns every ledger, for all of them
guest     another worker: owns nothing, and passes everything to the host
member    one of many over a shared store: ledgers move between them
========  =======================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any, Protocol

import msgspec
import structlog

import paceline
from paceline.config import Config
from paceline.config.peers import peer_address
from paceline.engine.answers import Answer, Invalid
from paceline.engine.operations import Operation
from paceline.engine.state import State
from paceline.frontend.errors import Problem
from paceline.frontend.fallback import Fallback, blind_us, pool_limits
from paceline.frontend.fleet import ASKS, FleetOptions, FleetRouter, FleetSlot
from paceline.frontend.limits import FALLBACK_EXPIRY_US, FALLBACK_GRACE_US
from paceline.frontend.peers.rpc import META_KEY, Method, Passes, PeerService, PeerTransport, new_key
from paceline.frontend.peers.serving import Handler, Serving
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable
from paceline.frontend.routing import Router, SetupOf, Slot
from paceline.frontend.shares import SURRENDER, Place, inherit, serve_ask, serve_surrender
from paceline.ledger.clock import SystemClock
from paceline.ledger.commands import Commands, NodeInfo
from paceline.ledger.errors import LedgerError, LedgerFault
from paceline.ledger.journal import Store
from paceline.ledger.keeper import Keeper, Where
from paceline.ledger.machine import EngineMachine
from paceline.ledger.options import OwnerOptions, Phase
from paceline.ledger.owner import Owner
from paceline.ledger.shared import Terms

_log = structlog.get_logger(__name__)

SHARE = "share"
"""Asks for fallback shares: see :mod:`paceline.frontend.shares`."""
BEGIN = "Worker.Begin"
"""What a guest asks the host first."""
_BEGIN_SECONDS = 30.0
_BEGIN_PAUSE_SECONDS = 0.05
_CALL_SECONDS = 2.0
_REFRESH_SECONDS = 2.0
_DRAINING_SECONDS = 0.2
_GENERATION_BITS = 32
_TELL_US = 60_000_000
"""For so long what a deposed owner knows is told again, as long as nobody decides."""
_TELL_PAUSE_US = 300_000
_TELL_BATCH = 1_000
_TELL_AT_LEAST_SECONDS = 1.0


class Worker(msgspec.Struct, frozen=True):
    """One of several processes that serve one address. ``index`` counts from 0."""

    index: int
    count: int
    generation: int
    """How often this worker was started before."""
    directory: str
    """Private to them; ``peer.sock`` is where the host listens for the guests, if the store is embedded."""
    key: bytes
    listen: str
    """The address, with the port that it became."""

    @property
    def host_address(self) -> str:
        """Where the guests find the host."""
        return f"unix:{self.directory}/peer.sock"


class Begun(msgspec.Struct, frozen=True, array_like=True):
    """The host's answer to :data:`BEGIN`."""

    signing_key: bytes
    ledgers: list[str]
    has_grants: bool


class Membership(Protocol):
    """One process's part. ``router`` is there from the beginning."""

    node: str
    router: Router
    place: Place
    transport: PeerTransport | None
    """To the other processes; ``None``: there are none."""
    methods: dict[str, Method]
    """What the others may call here, by name; may be added to."""
    keeper: Keeper | None
    """Of a shared store."""

    def where(self, ledger: str) -> Where:
        """Where a ledger is."""
        ...

    def ledgers(self) -> list[str]:
        """All that are known of, sorted."""
        ...

    def nodes(self) -> dict[str, NodeInfo]:
        """The processes of a shared store that live."""
        ...

    async def hand_over(self, ledger: str, node: str = "") -> str:
        """Let ``node`` (empty: whoever is next) own a ledger of this process. To which it went; empty: to none."""
        ...

    async def start(self, accounts: Iterable[str]) -> None:
        """Serve these ledgers, and those that are there already."""
        ...

    @property
    def visitors(self) -> int:
        """Streams of processes that cannot go on without this one."""
        ...

    @property
    def has_grants(self) -> bool:
        """Something is granted that can be settled nowhere else once this process has ended."""
        ...

    async def leave(self, timeout: float) -> None:
        """Let the others own what is owned here. Callers keep their places."""
        ...

    async def stop(self, drain_timeout: float) -> None:
        """Leave."""
        ...


class Tools(msgspec.Struct):
    """What every part is made of. ``heard`` is told of each ledger that begins to decide, or ends to."""

    config: Config
    machine: EngineMachine
    setup_of: SetupOf
    fallback: Fallback
    heard: Callable[[Slot], object]


def _most(config: Config) -> int:
    return config.limits.max_accounts + len(config.accounts)


def _state(slot: Slot | None) -> State | None:
    return None if slot is None else slot.state


class _Shares:
    """Where fallback shares of a ledger are accounted: with its owner."""

    def __init__(self, router: Router, leads: Callable[[Slot], bool]) -> None:
        self._router = router
        self._leads = leads

    def is_local(self, ledger: str) -> bool:
        slot = self._router.slots.get(ledger)
        return slot is not None and slot.local is not None

    def leads(self, ledger: str) -> bool:
        slot = self._router.slots.get(ledger)
        return slot is not None and slot.local is not None and self._leads(slot)


def _asks(tools: Tools, router: Callable[[], Router], place: Callable[[], Place]) -> dict[str, Handler]:
    """What this process answers about its ledgers."""

    def share(ledger: str, _: Owner, body: bytes) -> bytes:
        state = _state(router().slots.get(ledger))
        return serve_ask(
            tools.fallback,
            ledger,
            body,
            lambda pool: None if state is None else pool_limits(state, pool),
            leads=place().leads(ledger),
        )

    return {**ASKS, SHARE: share}


class Alone:
    """Every ledger is here."""

    is_again = False
    """This process takes the place of one that has ended, whose clients may be others'."""

    def __init__(self, tools: Tools, store: Store, node: str = "") -> None:
        self.node = node
        self.transport: PeerTransport | None = None
        self.methods: dict[str, Method] = {}
        self.keeper: Keeper | None = None
        self._tools = tools
        self._store = store

        def owner(account: str, heard: Callable[[Phase], object]) -> Owner:
            return Owner(account, store.journal(account), machine=tools.machine, on_phase=heard)

        self.router = Router(
            owner, tools.setup_of, most=_most(tools.config), on_change=self._changed, on_begin=self._begun
        )
        self.place: Place = _Shares(self.router, lambda slot: slot.ready)

    @property
    def visitors(self) -> int:
        return 0

    @property
    def has_grants(self) -> bool:
        return any(slot.state is not None and slot.state.open for slot in self.router.slots.values())

    def _begun(self, slot: Slot) -> None:
        owner = slot.owner
        wait = blind_us(owner.inherited_at, owner.now(), 0)
        if owner.inherited_at is None and self.is_again:
            # The store keeps nothing; the clients still have what was handed out before.
            wait = FALLBACK_EXPIRY_US + FALLBACK_GRACE_US
        self._tools.fallback.begin(slot.account, owner.epoch, wait)
        self._changed(slot)

    def _changed(self, slot: Slot) -> None:
        self._tools.heard(slot)

    def where(self, ledger: str) -> Where:
        slot = self.router.slots.get(ledger)
        return Where() if slot is None or not slot.started else Where(slot.owner.epoch, self.node, "", slot.owner)

    def ledgers(self) -> list[str]:
        return sorted(self.router.slots)

    def nodes(self) -> dict[str, NodeInfo]:
        return {}

    async def hand_over(self, ledger: str, node: str = "") -> str:
        return ""

    async def start(self, accounts: Iterable[str]) -> None:
        await self.router.open(dict.fromkeys([*accounts, *await self._store.ledgers()]))

    async def leave(self, timeout: float) -> None:
        pass

    async def stop(self, drain_timeout: float) -> None:
        await self.router.stop(drain_timeout)


class Host(Alone):
    """Every ledger is here, and other processes of this machine have callers too."""

    def __init__(self, tools: Tools, store: Store, worker: Worker, signing_key: bytes) -> None:
        super().__init__(tools, store, f"worker-{worker.index}")
        self.is_again = worker.generation > 0
        self._worker = worker
        passes = Passes(worker.key, self.node, SystemClock().wall)
        self.transport = PeerTransport(passes)
        self._serving = Serving(
            self.node,
            self,
            SystemClock(),
            asks=_asks(tools, lambda: self.router, lambda: self.place),
            prepare=self.router.prepare,
            want=self._want,
        )
        self._service = PeerService(passes, self._serving.accept, self.methods)
        self._signing_key = signing_key

    @property
    def visitors(self) -> int:
        return self._serving.streams

    def where(self, ledger: str) -> Where:
        """Here, always."""
        slot = self.router.slots.get(ledger)
        if slot is None or not slot.started:
            return Where(0, self.node, self._worker.host_address, None)
        owner = slot.owner
        # A store that keeps nothing begins again at the first epoch.
        epoch = (self._worker.generation << _GENERATION_BITS) + owner.epoch
        return Where(epoch, self.node, self._worker.host_address, owner)

    def _want(self, ledger: str) -> None:
        with contextlib.suppress(Problem):
            self.router.slot(ledger)

    def _changed(self, slot: Slot) -> None:
        super()._changed(slot)
        self._serving.moved(slot.account)

    async def start(self, accounts: Iterable[str]) -> None:
        await super().start(accounts)
        self.methods[BEGIN] = self._begin
        await self._service.start(self._worker.host_address)

    async def stop(self, drain_timeout: float) -> None:
        await super().stop(drain_timeout)
        await self._service.stop()
        if self.transport is not None:
            await self.transport.close()

    async def _begin(self, _: bytes) -> bytes:
        return msgspec.msgpack.encode(Begun(self._signing_key, list(self.router.slots), self.has_grants))


class _HostKeeper:
    """Every ledger is with the host."""

    def __init__(self, worker: Worker) -> None:
        self._where = Where(0, "worker-0", worker.host_address)

    def where(self, ledger: str) -> Where:
        return self._where

    def want(self, ledger: str) -> None:
        pass

    def suspect(self, ledger: str, epoch: int) -> None:
        """It is started again by itself."""

    def hint(self, ledger: str, epoch: int, node: str, address: str) -> None:
        pass


class Guest:
    """No ledger is here."""

    def __init__(self, tools: Tools, worker: Worker) -> None:
        self.node = f"worker-{worker.index}"
        self.methods: dict[str, Method] = {}
        self.keeper: Keeper | None = None
        self._address = worker.host_address
        clock = SystemClock()
        transport = PeerTransport(Passes(worker.key, self.node, clock.wall))
        self.transport: PeerTransport | None = transport
        self._calls = transport
        router = FleetRouter(
            self.node,
            transport,
            clock,
            Random(),
            tools.setup_of,
            most=_most(tools.config),
            options=FleetOptions(away_us=tools.config.away_us),
            on_change=tools.heard,
        )
        self._keeper = _HostKeeper(worker)
        router.attach(self._keeper)
        self._refreshing: asyncio.Task[None] | None = None
        self._pause_seconds = _REFRESH_SECONDS
        self.has_grants = False
        self.visitors = 0
        self.router: Router = router
        self.place: Place = _Shares(self.router, lambda _: False)

    async def begin(self) -> Begun:
        """What the host says of the store. Raises :class:`~paceline.frontend.peers.transport.PeerUnreachable`."""
        deadline = asyncio.get_running_loop().time() + _BEGIN_SECONDS
        while True:
            try:
                return await self._ask()
            except (PeerRefused, PeerUnreachable, Problem) as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise PeerUnreachable(f"the first worker does not answer: {error}") from None
                await asyncio.sleep(_BEGIN_PAUSE_SECONDS)

    def where(self, ledger: str) -> Where:
        return self._keeper.where(ledger)

    def ledgers(self) -> list[str]:
        return sorted(self.router.slots)

    def nodes(self) -> dict[str, NodeInfo]:
        return {}

    async def hand_over(self, ledger: str, node: str = "") -> str:
        return ""

    async def start(self, accounts: Iterable[str]) -> None:
        await self.router.open(accounts)
        self._refreshing = asyncio.create_task(self._refresh())

    async def leave(self, timeout: float) -> None:
        self._pause_seconds = _DRAINING_SECONDS
        with contextlib.suppress(PeerRefused, PeerUnreachable, Problem, msgspec.MsgspecError):
            await self._ask()

    async def stop(self, drain_timeout: float) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
        await self.router.stop(drain_timeout)
        await self._calls.close()

    async def _refresh(self) -> None:
        """Other workers may have brought new ledgers."""
        while True:
            left = self._pause_seconds
            while left > 0 and left <= self._pause_seconds:
                await asyncio.sleep(_DRAINING_SECONDS)
                left -= _DRAINING_SECONDS
            with contextlib.suppress(PeerRefused, PeerUnreachable, Problem, msgspec.MsgspecError):
                await self._ask()

    async def _ask(self) -> Begun:
        body = await self._calls.call(self._address, BEGIN, b"", _CALL_SECONDS)
        begun = msgspec.msgpack.decode(body, type=Begun)
        self.has_grants = begun.has_grants
        if not self.router.closed:
            await self.router.open(begun.ledgers)
        return begun


class Member:
    """Ledgers come and go."""

    def __init__(
        self,
        tools: Tools,
        commands: Commands,
        node: str,
        peer_key: bytes,
        listen: str,
        worker: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """``options``: more arguments of the keeper."""
        self.node = node
        self.methods: dict[str, Method] = {}
        self.keeper: Keeper | None = None
        self.address = ""
        self._tools = tools
        self._commands = commands
        self._listen = listen
        self._options = dict(options or {})
        self._worker = worker
        self._clock = SystemClock()
        passes = Passes(peer_key, node, self._clock.wall)
        transport = PeerTransport(passes)
        self.transport: PeerTransport | None = transport
        self._calls = transport
        self._fleet = FleetRouter(
            node,
            transport,
            self._clock,
            Random(),
            tools.setup_of,
            most=_most(tools.config),
            asks=_asks(tools, lambda: self.router, lambda: self.place),
            options=FleetOptions(away_us=tools.config.away_us),
            on_change=tools.heard,
        )
        self.router: Router = self._fleet
        self.place: Place = _Shares(self.router, self._leads)
        self._serving = Serving(
            node,
            self,
            self._clock,
            asks=_asks(tools, lambda: self.router, lambda: self.place),
            prepare=self._fleet.prepare,
            want=self._want,
        )
        self._service = PeerService(passes, self._serving.accept, self.methods)
        self._left = False
        self._telling: set[asyncio.Task[None]] = set()
        self._owned: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def visitors(self) -> int:
        return 0

    @property
    def has_grants(self) -> bool:
        return False

    def where(self, ledger: str) -> Where:
        return Where() if self.keeper is None else self.keeper.where(ledger)

    def ledgers(self) -> list[str]:
        return [] if self.keeper is None else self.keeper.ledgers()

    def nodes(self) -> dict[str, NodeInfo]:
        return {} if self.keeper is None else self.keeper.nodes()

    async def hand_over(self, ledger: str, node: str = "") -> str:
        return "" if self.keeper is None else await self.keeper.hand_over(ledger, node)

    async def start(self, accounts: Iterable[str]) -> None:
        tools = self._tools
        listen = await self._service.start(self._listen)
        port = 0 if listen.startswith("unix:") else int(listen.rpartition(":")[2])
        self.address = peer_address(tools.config, port, listen, self._worker)
        self.methods[SURRENDER] = self._surrender
        form = tools.machine.form
        now = self._clock.wall()
        keeper = Keeper(
            NodeInfo(self.node, self.address, paceline.__version__, form, now),
            self._commands,
            tools.machine,
            Terms(self.node, self.address, form, tools.config.lease_us, tools.config.replication_lag_us),
            on_change=self._changed,
            on_testimony=self._testify,
            on_leaving=self._serving.drain,
            clock=self._clock,
            owner_options=OwnerOptions(held_us=tools.config.away_us, unseen_us=FALLBACK_EXPIRY_US + FALLBACK_GRACE_US),
            **self._options,
        )
        self.keeper = keeper
        self._fleet.attach(keeper)
        names = list(dict.fromkeys(accounts))
        await keeper.start(names)
        await self._fleet.open(dict.fromkeys([*names, *keeper.ledgers()]))

    async def leave(self, timeout: float) -> None:
        keeper = self.keeper
        if keeper is None:
            return
        self._left = True
        alone = not any(info.ready and info.node != self.node for info in keeper.nodes().values())
        await keeper.stop(timeout)
        if alone:
            # Nobody will decide: whoever waits is told now.
            await self.router.stop(0)
        elif self._telling:
            await asyncio.wait(self._telling, timeout=max(_TELL_AT_LEAST_SECONDS, timeout))

    async def stop(self, drain_timeout: float) -> None:
        if self.keeper is not None and not self._left:
            await self.keeper.stop(drain_timeout)
        await self.router.stop(0)
        for task in (*self._tasks, *self._telling):
            task.cancel()
        await self._service.stop()
        await self._calls.close()

    def _want(self, ledger: str) -> None:
        if self.keeper is not None:
            self.keeper.want(ledger)

    def _changed(self, ledger: str) -> None:
        """The keeper says so."""
        self._fleet.changed(ledger)
        self._serving.moved(ledger)
        slot = self.router.slots.get(ledger)
        owner = None if slot is None else slot.local
        if owner is None:
            if self._owned.pop(ledger, None) is not None:
                self._tools.fallback.freeze(ledger)
        elif isinstance(slot, FleetSlot) and self._owned.get(ledger) != owner.epoch and owner.phase is Phase.SERVING:
            self._owned[ledger] = owner.epoch
            self._spawn(self._inherit(ledger, owner, slot.before))

    async def _inherit(self, ledger: str, owner: Owner, before: tuple[str, str]) -> None:
        wait = blind_us(owner.inherited_at, owner.now(), self._tools.config.lease_us)
        await inherit(self._tools.fallback, self._calls, ledger, owner.epoch, wait, before)

    def _leads(self, slot: Slot) -> bool:
        journal = None if self.keeper is None else self.keeper.journal(slot.account)
        return journal is not None and journal.is_fresh() and slot.ready

    def _testify(self, ledger: str, told: Sequence[Operation]) -> None:
        """A deposed owner here tells the ledger's next one what the store may have lost."""
        task = asyncio.get_running_loop().create_task(self._tell(ledger, list(told)))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self, ledger: str, left: list[Operation]) -> None:
        """Have operations decided, whoever owns the ledger, and however often that changes meanwhile."""
        until = self._clock.monotonic() + _TELL_US
        while left:
            try:
                left = await _undecided(self.router.slot(ledger), left)
            except Problem as problem:
                _log.warning("lost charges cannot be told yet", ledger=ledger, error=problem.message)
            if left and self._clock.monotonic() >= until:
                _log.error("lost charges could not be told", ledger=ledger, operations=len(left))
                return
            if left:
                await self._clock.sleep_until(self._clock.monotonic() + _TELL_PAUSE_US)

    async def _surrender(self, body: bytes) -> bytes:
        return serve_surrender(self._tools.fallback, body)

    def _spawn(self, work: Any) -> None:
        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                raise
            except Exception as error:
                _log.error("fallback shares cannot be inherited", kind=type(error).__name__)

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _undecided(slot: Slot, operations: Sequence[Operation]) -> list[Operation]:
    """Submit operations; those that nobody could decide, in order."""
    loop = asyncio.get_running_loop()

    def asked(operation: Operation) -> asyncio.Future[bool]:
        decided: asyncio.Future[bool] = loop.create_future()

        def heard(answer: Answer | LedgerError) -> None:
            if isinstance(answer, Invalid):
                _log.error("a lost charge was refused", ledger=slot.account, field=answer.field)
            if not decided.done():
                decided.set_result(not isinstance(answer, LedgerError) or isinstance(answer, LedgerFault))

        slot.submit(operation, heard)
        return decided

    found: list[Operation] = []
    for start in range(0, len(operations), _TELL_BATCH):
        batch = operations[start : start + _TELL_BATCH]
        told = await asyncio.gather(*[asked(operation) for operation in batch])
        found += [operation for operation, done in zip(batch, told, strict=True) if not done]
    return found


async def fleet_key(commands: Commands) -> bytes:
    """The key by which the processes of one store know each other. Raises
    :class:`~paceline.ledger.journal.StoreError`."""
    return await commands.put_meta(META_KEY, new_key())
