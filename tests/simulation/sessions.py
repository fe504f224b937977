"""The second way to drive a run: the whole protocol, from the client library's core to the server's Session handler.

Callers are programs that hold a :class:`paceline_client._core.Core` each, the sans-I/O half of the client library, and
one stream to one node, over the simulated network. On the node the real ``Sessions`` serves it, with the real desk,
requests and replies, over the same router as in the first way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import grpc

from paceline.config import Config, catalogue, definitions
from paceline.config import Shares as TenantShares
from paceline.engine.answers import Committed, Denied, Granted, Reason, Released, Touched
from paceline.engine.operations import DefinePool, Priority
from paceline.engine.operations import Operation as LedgerOperation
from paceline.frontend.auth import Authenticator
from paceline.frontend.context import Signer
from paceline.frontend.desk import Desk
from paceline.frontend.fallback import Fallback
from paceline.frontend.fleet import FleetRouter
from paceline.frontend.peers.transport import PeerRefused, PeerUnreachable, Wire, WireClosed
from paceline.frontend.places import Places
from paceline.frontend.replies import Replies
from paceline.frontend.requests import Requests
from paceline.frontend.session import Sessions
from paceline.frontend.shares import Shares
from paceline.providers.headers import ALLOWED_HEADERS, parse
from paceline_client import _core
from paceline_client._core import Core, Failure, Kind, Operation, Stream
from paceline_client.stubs import v1 as pb
from tests.simulation.loop import Call as Due
from tests.simulation.loop import Process
from tests.simulation.network import SimTransport
from tests.simulation.workload import Call

if TYPE_CHECKING:
    from tests.simulation.world import Node, World

MODEL = "claude-sonnet-4-5"
KEY = bytes(range(32))
BUDGET_S = 2.0
"""For how long a Reserve may look for somebody who decides, beyond its own wait."""
LATE_US = 50_000
SETTLE_US = 45_000_000


@lru_cache(maxsize=8)
def server_config(ledgers: tuple[str, ...], requests: int, tokens: int) -> tuple[Config, Any]:
    """A configuration of these accounts, with one small pool each; and its catalogue."""
    pool = {"requests": requests, "input_tokens": tokens, "output_tokens": tokens}
    config = Config.model_validate(
        {
            "listen": "127.0.0.1:0",
            "store": "embedded:",
            "metrics_listen": "off",
            "accounts": {name: {"tier": "build", "pools": {"sonnet-4": dict(pool)}} for name in ledgers},
        }
    )
    return config, catalogue(config)


class FrontEnd:
    """What serves sessions in one process."""

    def __init__(self, node: Node, router: FleetRouter) -> None:
        assert node.world.server_config is not None
        config, known = node.world.server_config
        places = Places(known, TenantShares(config).shares_of)
        signer = Signer(KEY)
        self.desk = Desk(Requests(places, signer, parse, ALLOWED_HEADERS), Replies(signer, router.layout_of), router)
        clock = node.clock
        self.sessions = Sessions(
            self.desk,
            Authenticator(),
            Shares(clock.monotonic, Fallback(clock.monotonic, node=node.name), _Elsewhere()),
            server_version="0",
            header_names=ALLOWED_HEADERS,
        )

    async def accept(self, wire: Wire) -> None:
        """Serve one stream."""
        context: Any = _Context(wire)
        context.task = asyncio.current_task()
        try:
            await self.sessions.handle(context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            return


def setup_of(world: World, account: str) -> list[LedgerOperation]:
    """What a server's configuration defines."""
    assert world.server_config is not None
    config, known = world.server_config
    found = definitions(config, known, account)
    return [one for one in found if not isinstance(one, DefinePool) or one.pool.endswith("/sonnet-4")]


class _Elsewhere:
    """Nobody shares out anything."""

    def is_local(self, ledger: str) -> bool:
        return False

    def leads(self, ledger: str) -> bool:
        return False


class _Context:
    """What a handler sees of its stream."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.task: asyncio.Task[Any] | None = None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def read(self) -> object:
        try:
            return await self._wire.receive()
        except WireClosed as closed:
            if not closed.clean and self.task is not None:
                self.task.cancel()
            return grpc.aio.EOF

    async def write(self, message: bytes) -> None:
        self._wire.send(message)

    async def abort(self, code: Any, message: str, metadata: Any = ()) -> None:
        self._wire.close()
        raise grpc.aio.AbortError(message)


class Program:
    """One process of callers: a core, and its stream."""

    def __init__(self, fleet: SessionFleet, number: int) -> None:
        self.fleet = fleet
        self.world = fleet.world
        self.name = f"program-{number}"
        self.process = Process(self.name)
        self.world.network.host(self.name).process = self.process
        self.rng = random.Random(f"{self.world.seed}/{self.name}")
        self.core = Core(BUDGET_S, self.rng)
        self.signer = Signer(KEY)
        self.node = number
        self.stream: Stream | None = None
        self.wire: Wire | None = None
        self._timer: Due | None = None
        self._pumping = False

    @property
    def now(self) -> float:
        return self.world.loop.now / 1e6

    def start(self) -> None:
        self.core.went_down(self.now)
        self.world.loop.create_task(self._run())

    async def _run(self) -> None:
        transport = SimTransport(self.world.network, self.name, self.process)
        while True:
            node = self.world.nodes[self.node % len(self.world.nodes)].name
            try:
                wire = await transport.connect(node, 1.0, "sessions")
            except (PeerRefused, PeerUnreachable):
                await self._pause()
                continue
            stream = Stream()
            self.wire = wire
            with contextlib.suppress(WireClosed, TimeoutError):
                await self._serve(wire, stream)
            wire.close()
            self.core.broken(stream, self.now)
            self.after()
            await self._pause()

    async def _pause(self) -> None:
        self.node += 1
        await asyncio.sleep(0.02 + 0.2 * self.rng.random())

    async def _serve(self, wire: Wire, stream: Stream) -> None:
        hello = pb.SessionRequest()
        hello.hello.protocol_version = 1
        hello.hello.instance_id = self.name
        wire.send(hello.SerializeToString())
        async with asyncio.timeout(1.0):
            first = pb.SessionResponse.FromString(await wire.receive())
        self.core.welcome(stream, first.welcome, self.now)
        self.stream = stream
        self.pump()
        while not stream.closed:
            message = pb.SessionResponse.FromString(await wire.receive())
            if message.WhichOneof("message") == "drain":
                self.core.drain(stream, self.now)
                self.after()
                return
            self.core.answers(stream, message.batch, self.now)
            self.after()

    def submit(self, operation: Operation) -> None:
        self.core.submit(operation, self.now)
        self.after()

    def after(self) -> None:
        """What is to be done after anything happened to the core."""
        core = self.core
        while core.ended:
            ended, core.ended = core.ended, []
            for operation in ended:
                if operation.waiter is not None:
                    operation.waiter.deliver(operation)
        if core.suspects:
            suspects, core.suspects = core.suspects, []
            if self.stream in suspects and self.wire is not None:
                self.wire.close()
        self.pump()

    def pump(self) -> None:
        core, stream, wire = self.core, self.stream, self.wire
        if stream is not None and wire is not None and not stream.closed:
            while (message := core.take(stream, self.now)) is not None:
                wire.send(message.SerializeToString())
        due = core.next_due
        if due is not None:
            at = round(due * 1e6) + 1
            if self._timer is None or self._timer.callback is None or self._timer.when > at:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self.world.loop.at(at, self._tick, context=self.process.context)

    def _tick(self) -> None:
        self._timer = None
        self.core.tick(self.now)
        self.after()


class _Reserving:
    """Waits for the answer to a Reserve."""

    def __init__(self, fleet: SessionFleet, program: Program, call: Call) -> None:
        self.fleet = fleet
        self.program = program
        self.call = call

    def deliver(self, operation: Operation) -> None:
        self.fleet.reserved(self.program, self.call, operation)


class _Settling:
    """Waits for the acknowledgement of a report."""

    def __init__(self, fleet: SessionFleet, call: Call) -> None:
        self.fleet = fleet
        self.call = call

    def deliver(self, operation: Operation) -> None:
        self.fleet.settled(self.call, operation)


class SessionFleet:
    """All callers of a run, in a few programs. The world asks of it what it asks of the other kind of fleet."""

    def __init__(self, world: World, rng: random.Random, calls: int) -> None:
        self.world = world
        self.rng = rng
        self.planned = calls
        self.calls: dict[str, Call] = {}
        self.open = 0
        self.begun = 0
        self.until = 0
        self.programs = [Program(self, number) for number in range(4)]
        self.clients: list[Any] = self.programs

    @property
    def operations(self) -> int:
        return sum(program.core.counters.items for program in self.programs)

    def start(self, span_us: int) -> None:
        loop = self.world.loop
        self.until = loop.now + span_us
        for program in self.programs:
            loop.at(loop.now, program.start, context=program.process.context)
        for _ in range(self.planned):
            self._later(int(span_us * self.rng.random()))

    def more(self, count: int) -> None:
        for _ in range(count):
            self._later(0)

    def _later(self, after: int) -> None:
        self.begun += 1
        self.open += 1
        program = self.programs[self.begun % len(self.programs)]
        self.world.loop.at(self.world.loop.now + after, self._begin, program, context=program.process.context)

    def _begin(self, program: Program) -> None:
        rng, world = self.rng, self.world
        number = _core.new_id()
        ledger = world.ledgers[0] if len(world.ledgers) == 1 or rng.random() < 0.8 else world.ledgers[1]
        call = Call(f"anonymous/{number}", ledger, program.name, program.node % len(world.nodes), world.loop.now)
        self.calls[call.key] = call
        call.size = 1_000 if rng.random() < 0.75 else 6_000
        call.priority = rng.choice((Priority.INTERACTIVE, Priority.STANDARD, Priority.BATCH))
        call.max_wait_us = rng.choice((0, 1_000_000, 4_000_000, 10_000_000))
        draw = rng.random()
        call.fate = "commit" if draw < 0.8 else "release" if draw < 0.88 else "renew" if draw < 0.96 else "crash"
        world.checks.began(call)
        request = pb.ReserveRequest(
            reservation_id=number,
            candidates=[
                pb.Candidate(
                    target=pb.Target(model=MODEL, account=ledger),
                    estimate=pb.Estimate(input_tokens=call.size, output_tokens=10, max_output_tokens=10),
                )
            ],
            priority=pb.Priority.ValueType(int(call.priority)),
        )
        request.hold.FromMicroseconds(12_000_000)
        operation = Operation(
            Kind.RESERVE,
            request,
            program.now,
            _Reserving(self, program, call),
            turn_by=program.now + call.max_wait_us / 1e6,
        )
        program.submit(operation)

    def reserved(self, program: Program, call: Call, operation: Operation) -> None:
        world, result = self.world, operation.result
        late = world.loop.now - call.born_at - call.max_wait_us - int(BUDGET_S * 1e6)
        if late > LATE_US:
            world.checks.violate(f"{call.key} ended {late / 1e6:.3f} s after its patience and its budget")
        request = operation.request
        assert isinstance(request, pb.ReserveRequest)
        key = f"anonymous/{request.reservation_id}"
        if key != call.key:
            # The server had withdrawn it when its stream broke: it went on under another id.
            call.key = key
            self.calls[key] = call
            world.checks.began(call)
        if isinstance(result, pb.ReserveResponse) and result.HasField("grant"):
            context = self.program_context(program, result.grant.context, key)
            call.granted = Granted((key,), 0, 0, 0, None, context, Touched())
            world.checks.granted(call, call.granted)
            self._go(program, call, result.grant)
        elif isinstance(result, pb.ReserveResponse):
            name = pb.DenialReason.Name(result.denial.reason).removeprefix("DENIAL_REASON_")
            if name in Reason.__members__:
                world.checks.denied(call, Denied(Reason[name], "", None, None, Touched()))
            self._end(call)
        elif isinstance(result, Failure):
            world.checks.counts[f"failed {result.code}"] += 1
            if not result.unreachable and result.code not in ("CANCELLED",):
                world.checks.violate(f"{call.key} was refused: {result.code}: {result.message}")
            # Whoever gives a Reserve up says so.
            targets = [candidate.target for candidate in request.candidates]
            release = pb.ReleaseRequest(reservation_id=request.reservation_id, targets=targets)
            self._report(program, call, Kind.RELEASE, release)

    @staticmethod
    def program_context(program: Program, sealed: bytes, key: str) -> Any:
        return program.signer.open(sealed, key)

    def _go(self, program: Program, call: Call, grant: pb.Grant) -> None:
        rng, loop = self.rng, self.world.loop
        took = int(rng.expovariate(1 / 900_000)) + 20_000
        number = call.key.partition("/")[2]
        if call.fate == "crash":
            call.crashed = True
            self._end(call)
            return
        if call.fate == "renew":
            renew = pb.RenewRequest(reservation_id=number, context=grant.context)
            loop.at(loop.now + took // 2, self._renew, program, renew, context=program.process.context)
        if call.fate == "release":
            report: Any = pb.ReleaseRequest(reservation_id=number, context=grant.context)
            kind = Kind.RELEASE
        else:
            used = int(call.size * rng.uniform(0.2, 1.1))
            outcome = pb.Outcome(
                disposition=pb.DISPOSITION_SUCCEEDED,
                http_status=200,
                usage=pb.Usage(input_tokens=used, output_tokens=5),
            )
            report = pb.CommitRequest(reservation_id=number, context=grant.context, outcome=outcome)
            kind = Kind.COMMIT
        loop.at(loop.now + took, self._report, program, call, kind, report, context=program.process.context)

    def _renew(self, program: Program, request: pb.RenewRequest) -> None:
        program.submit(Operation(Kind.RENEW, request, program.now))

    def _report(self, program: Program, call: Call, kind: Kind, request: Any) -> None:
        call.state = "settling"
        program.submit(Operation(kind, request, program.now, _Settling(self, call)))

    def settled(self, call: Call, operation: Operation) -> None:
        result = operation.result
        if isinstance(result, pb.CommitResponse):
            self.world.checks.settled(call, Committed(late=result.late, stale=result.stale, duplicate=result.duplicate))
        elif isinstance(result, pb.ReleaseResponse):
            self.world.checks.settled(call, Released(released=True))
        elif isinstance(result, Failure):
            self.world.checks.counts[f"report failed {result.code}"] += 1
            if len(self.world.owners_of(call.ledger)) <= 1 and not self.world.store_changed:
                self.world.checks.violate(f"{call.key}: its {operation.kind.value} was refused: {result.message}")
        self._end(call)

    def _end(self, call: Call) -> None:
        if call.state != "over":
            call.state = "over"
            self.open -= 1
