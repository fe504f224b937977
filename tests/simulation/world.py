"""A fleet of simulated processes over a simulated store, with everything real in between.

A node is the real keeper, owner, engine, shared journal and routing on its own clock; :class:`World` makes them, breaks
them as :mod:`tests.simulation.faults` says, and lets a :class:`~tests.simulation.workload.Fleet` of callers use them.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import structlog

from paceline.engine.engine import Engine, Step
from paceline.engine.operations import Operation
from paceline.engine.state import FoldError
from paceline.frontend.fleet import ASKS, FleetOptions, FleetRouter
from paceline.frontend.peers.serving import Serving
from paceline.ledger.commands import NodeInfo
from paceline.ledger.errors import LedgerError, LedgerUnavailable
from paceline.ledger.journal import Record, StoreError, _hash
from paceline.ledger.keeper import Keeper, KeeperOptions
from paceline.ledger.options import OwnerOptions, Phase
from paceline.ledger.owner import Owner
from paceline.ledger.shared import Terms
from paceline_client import _core
from tests.simulation.checks import Checks
from tests.simulation.clock import START_WALL, NodeClock
from tests.simulation.loop import Deadlock, Loop, Process, Spinning
from tests.simulation.network import NOBODY, Host, Network, SimTransport
from tests.simulation.sessions import FrontEnd, SessionFleet, server_config, setup_of
from tests.simulation.store import SimCommands, Store
from tests.simulation.versions import NEXT, NextMachine, ThisMachine
from tests.simulation.workload import Fleet, Plan

LEASE_US = 3_000_000
LAG_US = 1_000_000
LEAST_OPERATIONS = 500
TESTIFY_US = 60_000_000
TESTIFY_PAUSE_US = 300_000
HURT_US = 20_000_000
"""For so long an owner has to live to put right what the store has lost."""


def _drop(_: Any, __: str, event: Any) -> Any:
    raise structlog.DropEvent


def say_nothing() -> None:
    """Drop all log lines of this process: they cost more than the rest."""
    structlog.configure(
        processors=[_drop],
        wrapper_class=structlog.make_filtering_bound_logger(50),
        cache_logger_on_first_use=False,
    )


def is_sessions(seed: int) -> bool:
    """Whether the callers of this seed speak the whole protocol, and not only the engine's."""
    return seed % 6 == 5


class Node:
    """A place for a server process, which comes and goes."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.name = f"node-{number}"
        self.number = number
        self.process: Process | None = None
        self.keeper: Keeper | None = None
        self.clock = NodeClock(world.loop)
        self.starts = 0
        self.router: FleetRouter | None = None
        self.serving: Serving | None = None
        self.front: FrontEnd | None = None
        self.newer = 0
        self.stopping = False
        self.telling = 0
        """Of what a deposed owner has to tell, what has not been heard yet."""

    @property
    def process_name(self) -> str:
        return "" if self.process is None else self.process.name

    @property
    def is_running(self) -> bool:
        return self.process is not None and not self.process.dead

    def start(self, newer: int = 0) -> None:
        """Begin a process."""
        world = self.world
        self.starts += 1
        self.newer = newer
        self.stopping = False
        self.telling = 0
        process = self.process = Process(f"{self.name}/{self.starts}")
        rng = world.rng_clock
        self.clock = NodeClock(
            world.loop,
            first=rng.randrange(10**12),
            drift=rng.randint(-200, 200),
            skew=0 if rng.random() < 0.5 else rng.randint(-3_600_000_000, 3_600_000_000),
        )
        world.network.host(self.name).process = process
        world.loop.at(world.loop.now, self._boot, process, context=process.context)

    def _boot(self, process: Process) -> None:
        world = self.world
        random_of = random.Random(f"{world.seed}/{process.name}")
        machine = (NextMachine if self.newer else ThisMachine)(self._watch)
        commands = SimCommands(world.store, self.name, process)
        info = NodeInfo(self.name, self.name, f"0.{self.newer}", machine.form, self.clock.wall())
        link_random = random.Random(random_of.getrandbits(64))
        router = FleetRouter(
            self.name,
            SimTransport(world.network, self.name, process),
            self.clock,
            link_random,
            world.setup_of,
            options=FleetOptions(),
        )
        keeper = Keeper(
            info,
            commands,
            machine,
            Terms(self.name, self.name, machine.form, LEASE_US, LAG_US),
            on_change=self._changed,
            on_testimony=self._testified,
            clock=self.clock,
            options=world.keeper_options,
            owner_options=world.owner_options,
            nonce=lambda: random_of.randbytes(16),
        )
        router.attach(keeper)
        self.serving = Serving(self.name, keeper, self.clock, asks=ASKS, prepare=router.prepare, want=keeper.want)
        self.router, self.keeper = router, keeper
        world.network.host(self.name).accept = self.serving.accept
        if world.server_config is not None:
            self.front = FrontEnd(self, router)
            world.network.host(self.name).services["sessions"] = self.front.accept
        world.loop.create_task(self._open(keeper, router))

    def _watch(self, engine: Engine, operations: Sequence[tuple[int, Operation]], step: Step) -> None:
        self.world.checks.stepped(self, engine, operations, step)

    async def _open(self, keeper: Keeper, router: FleetRouter) -> None:
        await router.open(self.world.ledgers)
        while True:
            try:
                await keeper.start(self.world.ledgers)
                return
            except StoreError:
                await self.clock.sleep_until(self.clock.monotonic() + 300_000)

    def _changed(self, ledger: str) -> None:
        self.world.note("changed", self.name, ledger)
        if self.router is not None and self.serving is not None:
            self.router.changed(ledger)
            self.serving.moved(ledger)

    def _testified(self, ledger: str, told: Sequence[Operation]) -> None:
        self.world.note("testimony", self.name, len(told))
        if self.router is not None:
            until = self.clock.monotonic() + TESTIFY_US
            self.telling += len(told)
            for operation in told:
                self._testify(ledger, operation, until)

    def _testify(self, ledger: str, operation: Operation, until: int) -> None:
        """Tell the next owner, as soon as there is one."""
        router, now = self.router, self.clock.monotonic()
        if router is None or now > until:
            self.telling -= 1
            return

        def heard(answer: Any) -> None:
            self.world.checks.adopted(answer)
            if isinstance(answer, LedgerError):
                self.clock.call_at(
                    self.clock.monotonic() + TESTIFY_PAUSE_US, lambda: self._testify(ledger, operation, until)
                )
            else:
                self.telling -= 1

        router.slot(ledger).submit(operation, heard)

    def submit(self, ledger: str, operation: Operation, back: Callable[[Any], None]) -> None:
        """A client's operation arrives at this process."""
        router = self.router
        if router is None:
            back(LedgerUnavailable("it begins"))
            return
        router.slot(ledger).submit(operation, back)

    def owner(self, ledger: str) -> Owner | None:
        if not self.is_running or self.keeper is None:
            return None
        return self.keeper.where(ledger).owner

    def finalize(self) -> bool:
        """An operator finalizes the upgrade of what this node owns. Whether there was anything to do."""
        owners = [owner for ledger in self.world.ledgers if (owner := self.owner(ledger)) is not None]
        process = self.process
        if not owners or process is None:
            return False

        async def finalize() -> None:
            for owner in owners:
                try:
                    await owner.finalize(NEXT)
                except (StoreError, ValueError) as error:
                    self.world.note("not finalized", type(error).__name__)

        self.world.loop.at(
            self.world.loop.now, lambda: self.world.loop.create_task(finalize()), context=process.context
        )
        return True

    # -- faults ------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        if self.process is not None:
            self.world.loop.kill_process(self.process)
            self.world.ended.setdefault(self.process.name, self.world.loop.now)
            self.world.network.died(self.name)
            self.keeper = self.router = self.serving = self.front = None
            self.world.store.links.pop(self.name, None)

    def stop(self, then: Callable[[], object]) -> None:
        """As SIGTERM: the process drains, hands over, and ends."""
        process, keeper, router = self.process, self.keeper, self.router
        if process is None or keeper is None or router is None or self.stopping:
            then()
            return
        self.stopping = True
        self.world.ended.setdefault(process.name, self.world.loop.now)

        async def drain() -> None:
            await keeper.stop(5.0)
            # As a server does: what is being told is told before it goes.
            until = self.clock.monotonic() + 20_000_000
            while self.telling and self.clock.monotonic() < until:
                await self.clock.sleep_until(self.clock.monotonic() + 100_000)
            await router.stop(1.0)
            self.world.loop.at(self.world.loop.now, ended, context=NOBODY)

        def ended() -> None:
            if self.process is process:
                self.kill()
            then()

        self.world.loop.at(self.world.loop.now, lambda: self.world.loop.create_task(drain()), context=process.context)


class World:
    """One run of one seed."""

    def __init__(self, seed: int, *, nodes: int = 3, calls: int = 215) -> None:
        self.seed = seed
        self.loop = Loop()
        draw = random.Random(f"{seed}/shape")
        self.rng_clock = random.Random(f"{seed}/clock")
        self.network = Network(self.loop, random.Random(f"{seed}/network"))
        self.store = Store(self.loop, self.network, random.Random(f"{seed}/store"))
        self.checks = Checks(self)
        self.store.on_write = self.checks.wrote
        self.machine = NextMachine()
        """Reads every version."""
        self.span_us = draw.randrange(24, 34) * 1_000_000
        self.ledgers = ["acme"] if draw.random() < 0.7 else ["acme", "beta"]
        self.is_quiet = draw.random() < 0.6
        """On the second ledger hardly anything happens but denials."""
        look = draw.choice((120_000, 200_000))
        self.keeper_options = KeeperOptions(announce_us=1_000_000, announce_ttl_us=3_500_000, close_look_us=look)
        small = draw.random() < 0.5
        self.owner_options = OwnerOptions(
            snapshot_events=draw.choice((150, 400)) if small else 250_000,
            check_events=draw.choice((40, 100)) if small else 100_000,
            # As in the product: some close looks long.
            gather_us=3 * look,
        )
        count = nodes if draw.random() < 0.7 else nodes + draw.choice((1, 2))
        self.nodes = [Node(self, number) for number in range(count)]
        self.plan = Plan(random.Random(f"{seed}/plan"), calls, self.span_us)
        self.server_config: tuple[Any, Any] | None = None
        """Of runs that speak the whole protocol."""
        workload = random.Random(f"{seed}/workload")
        self.fleet: Fleet | SessionFleet
        if is_sessions(seed):
            self.server_config = server_config(tuple(self.ledgers), 60 * workload.choice((4, 6, 8)), 1_500_000)
            self.fleet = SessionFleet(self, workload, calls)
        else:
            self.fleet = Fleet(self, workload, self.plan)
        self.trace: list[tuple[Any, ...]] = []
        self.silences: list[tuple[int, int, str]] = []
        """When a node lived, and others could not know that it does not decide."""
        self.troubles: list[tuple[int, int, frozenset[str]]] = []
        """When something was wrong, and with which hosts."""
        self.coverage: Counter[tuple[str, str]] = Counter()
        self.faults = 0
        self.replaced: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        """When processes ended, or were told to."""
        self.is_final = False
        """An upgrade was finalized: the version before cannot come back."""

    # -- what others ask -----------------------------------------------------------------------------------------------

    def note(self, *what: Any) -> None:
        self.trace.append((self.loop.now, *what))

    def setup_of(self, ledger: str) -> Sequence[Operation]:
        """What every process's configuration says of a ledger."""
        return (self.plan.pool,) if self.server_config is None else setup_of(self, ledger)

    @property
    def store_changed(self) -> bool:
        return len(self.store.primaries) > 1

    def submit(self, node: Node, ledger: str, operation: Operation, back: Callable[[Any], None]) -> None:
        node.submit(ledger, operation, back)

    def trouble(self, start: int, end: int, *hosts: str) -> None:
        """From ``start`` to ``end`` (µs) something is wrong with these hosts; none: with everything."""
        self.troubles.append((start, end, frozenset(hosts)))

    def was_troubled(self, host: str, start: int, end: int, others: Sequence[str] = ()) -> bool:
        return any(
            began < end and start < ended and (not hosts or host in hosts or any(each in hosts for each in others))
            for began, ended, hosts in self.troubles
        )

    def was_replaced(self, ledger: str, at: int) -> bool:
        """Whether an owner has put its books in the place of what was written at ``at``."""
        return at <= self.replaced.get(ledger, -1)

    def was_silent(self, node: str, start: int, end: int) -> bool:
        return any(began < end and start < ended and host == node for began, ended, host in self.silences)

    def was_hurt(self, node: str, process: str, at: int) -> bool:
        """Whether a process ended, was paused or was cut off soon after ``at``, or a moment before."""
        until = at + HURT_US
        if self.ended.get(process, until) < until:
            return True
        return any(began < until and at < ended + 1_000_000 and node in hosts for began, ended, hosts in self.troubles)

    def owners_of(self, ledger: str) -> list[Node]:
        """The nodes that believe that they own a ledger."""
        return [node for node in self.nodes if node.owner(ledger) is not None]

    def owner_of(self, ledger: str) -> tuple[Node, Engine] | None:
        """The living owner that the store knows."""
        head = self.store.primary.head(ledger)
        for node in self.nodes:
            owner = node.owner(ledger)
            if owner is not None and head is not None and head.node == node.name and owner.epoch == head.epoch:
                engine = owner.engine
                assert isinstance(engine, Engine)
                return node, engine
        return None

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        from tests.simulation.faults import Faults

        loop = self.loop
        with patched(loop, self.seed, self.store.sealed):
            try:
                draw = random.Random(f"{self.seed}/start")
                for node in self.nodes:
                    loop.at(draw.randrange(400_000), node.start, context=NOBODY)
                loop.at(600_000, self.fleet.start, self.span_us, context=NOBODY)
                faults = Faults(self, random.Random(f"{self.seed}/faults"))
                faults.plan(2_000_000, self.span_us)
                loop.advance(self.span_us + 2_000_000)
                while self.fleet.operations < LEAST_OPERATIONS and not self.checks.violations:
                    self.fleet.more(10)
                    loop.advance(loop.now + 1_000_000)
                faults.heal()
                self._settle()
                self.checks.finish()
            except (Deadlock, Spinning, FoldError) as error:
                self.checks.violate(f"{type(error).__name__}: {error}")
            for failure in loop.lost()[:3]:
                self.checks.violate(f"nobody caught {failure}")
            self.digest = self._digest()
            loop.close()

    def _settle(self) -> None:
        """Everything works again: the rest of the calls end, then the journal stands still."""
        loop, fleet = self.loop, self.fleet
        end = loop.now + 45_000_000
        while fleet.open and loop.now < end and not self.checks.violations:
            loop.advance(min(end, loop.now + 1_000_000))
        if fleet.open and not self.checks.violations:
            waiting = [call for call in fleet.calls.values() if call.state != "over"][:3]
            states = ", ".join(f"{call.key} {call.state}" for call in waiting)
            self.checks.violate(f"{fleet.open} calls never ended: {states}")
        still = loop.now + 15_000_000
        while loop.now < still:
            loop.advance(loop.now + 500_000)
            if all(self._is_still(ledger) for ledger in self.ledgers):
                return

    def _is_still(self, ledger: str) -> bool:
        found = self.owner_of(ledger)
        if found is None:
            return False
        owner = found[0].owner(ledger)
        head = self.store.primary.head(ledger)
        return owner is not None and head is not None and owner.phase is Phase.SERVING and owner.sequence == head.seq

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.loop.now, self.loop.calls, self.network.messages, self.store.commands)).encode())
        for entry in self.trace:
            digest.update(repr(entry).encode())
        for primary in self.store.primaries:
            for name, record, epoch, nonce, at in primary.accepted:
                digest.update(repr((name, epoch, nonce, at)).encode() + record.hash)
        digest.update(repr(sorted(self.checks.counts.items())).encode())
        return digest.hexdigest()


# -- what must not be real ---------------------------------------------------------------------------------------------


@contextmanager
def patched(loop: Loop, seed: int, sealed_by: dict[bytes, Record]) -> Any:
    """The product's modules see the loop's time and the seed's randomness, for as long as this lasts."""
    drawn = random.Random(f"{seed}/entropy")
    _core._ids.seed(f"{seed}/ids")

    def seeded(x: Any = None) -> random.Random:
        return random.Random(drawn.getrandbits(64) if x is None else x)

    fakes: dict[str, Any] = {
        "time": SimpleNamespace(
            monotonic=lambda: loop.now / 1e6,
            monotonic_ns=lambda: loop.now * 1_000,
            perf_counter=lambda: loop.now / 1e6,
            perf_counter_ns=lambda: loop.now * 1_000,
            time=lambda: (START_WALL + loop.now) / 1e6,
            time_ns=lambda: (START_WALL + loop.now) * 1_000,
        ),
        "secrets": SimpleNamespace(
            token_bytes=lambda count=32: drawn.randbytes(count),
            token_hex=lambda count=32: drawn.randbytes(count).hex(),
            token_urlsafe=lambda count=32: drawn.randbytes(count).hex(),
        ),
        "random": SimpleNamespace(
            random=drawn.random,
            uniform=drawn.uniform,
            randrange=drawn.randrange,
            randint=drawn.randint,
            choice=drawn.choice,
            shuffle=drawn.shuffle,
            Random=seeded,
        ),
    }
    real = {"time": time, "secrets": sys.modules["secrets"], "random": random}
    changed: list[tuple[ModuleType, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if not name.startswith("paceline.") or module is None:
            continue
        for attribute, original in real.items():
            if module.__dict__.get(attribute) is original:
                changed.append((module, attribute, original))
                setattr(module, attribute, fakes[attribute])
        if module.__dict__.get("Random") is random.Random:
            changed.append((module, "Random", random.Random))
            module.Random = seeded  # type: ignore[attr-defined]
    seal = Record.__dict__["sealed"]

    def sealed(seq: int, epoch: int, at: int, wall: int, previous: bytes, payload: bytes) -> Record:
        record = Record(seq, epoch, at, wall, previous, payload, _hash(seq, epoch, at, wall, previous, payload))
        sealed_by[record.hash] = record
        return record

    type.__setattr__(Record, "sealed", staticmethod(sealed))
    try:
        yield
    finally:
        type.__setattr__(Record, "sealed", seal)
        for module, attribute, original in changed:
            setattr(module, attribute, original)


__all__ = ["Host", "Node", "World"]
