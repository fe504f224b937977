"""A client process: callers over Sessions with all servers of a fleet, who write down what they ask and are told.

Each call is a Reserve and, once granted, a Commit (or, for a part of them, a Release, a Renew before the Commit, or
nothing). A request whose answer is lost is sent again under the same id, over another connection; one that is not
answered by its deadline has failed. Calls come at a rate, or from so many callers who call again at once.

Commands come by standard input, one a line: ``rate N`` (calls a second), ``callers N``, ``stop``. Progress goes to
standard output as JSON, a line every tenth of a second, and once more at the end with ``"end": true``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import uvloop

from paceline_client.stubs import v1 as pb
from tests.proofs.process import FAST_RECONNECT
from tests.proofs.traffic import money
from tests.replicas.logbook import Answered, Writer

BATCH_ITEMS = 64
RECONNECT_SECONDS = 0.05
AGAIN_SECONDS = 0.05
"""Before asking again somebody who could not answer."""
PROGRESS_SECONDS = 0.1
HELLO_SECONDS = 2.0
END_SECONDS = 20.0
TICK_SECONDS = 0.01
"""Calls that are due in it are begun together."""

_RETRYABLE = {
    grpc.StatusCode.UNAVAILABLE.value[0],
    grpc.StatusCode.DEADLINE_EXCEEDED.value[0],
    grpc.StatusCode.CANCELLED.value[0],
    grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
    grpc.StatusCode.ABORTED.value[0],
}
_FINAL_DENIALS = {
    pb.DENIAL_REASON_LIMIT,
    pb.DENIAL_REASON_TIMEOUT,
    pb.DENIAL_REASON_QUEUE_FULL,
    pb.DENIAL_REASON_BLOCKED,
}


def now() -> int:
    return time.monotonic_ns() // 1_000


class Op:
    """One request until it is answered, over however many connections."""

    __slots__ = (
        "asked",
        "away",
        "broken",
        "call",
        "deadline",
        "done",
        "flights",
        "kind",
        "last",
        "request",
        "sent",
        "server",
    )

    def __init__(self, kind: str, call: Call, request: Any, deadline: int) -> None:
        self.kind = kind
        self.call = call
        self.request = request
        self.asked = now()
        self.last = self.asked
        self.deadline = self.asked + deadline
        self.sent = 0
        self.server = -1
        """That it was sent to last."""
        self.flights = 0
        self.broken = 0
        self.away = 0
        self.done = False


class Call:
    """One reservation of one caller."""

    __slots__ = ("caller", "context", "id", "kind", "usage")

    def __init__(self, id_: str, kind: str, usage: tuple[int, int, int, int], caller: bool) -> None:
        self.id = id_
        self.kind = kind
        self.usage = usage
        self.caller = caller
        self.context = b""


class Link:
    """One Session with one server, opened again when it ends."""

    def __init__(self, load: Load, server: int, address: str) -> None:
        self.server = server
        self.live = False
        self.open: dict[int, Op] = {}
        self._address = address
        self._load = load
        self._queue: deque[Op] = deque()
        self._wake = asyncio.Event()
        self._number = 0

    def put(self, op: Op) -> None:
        op.sent += 1
        op.flights += 1
        op.server = self.server
        op.last = now()
        self._queue.append(op)
        self._wake.set()

    async def run(self) -> None:
        """Keep a session open. Ends by being cancelled."""
        async with grpc.aio.insecure_channel(self._address, options=FAST_RECONNECT) as channel:
            stub = pb.CoordinatorServiceStub(channel)
            while True:
                try:
                    await self._session(stub)
                except (grpc.aio.AioRpcError, TimeoutError) as error:
                    self._load.note(
                        f"session: {error.code().name if isinstance(error, grpc.aio.AioRpcError) else 'hello'}"
                    )
                except asyncio.InvalidStateError:
                    self._load.note("session: ended while written to")
                finally:
                    self._lost()
                await asyncio.sleep(RECONNECT_SECONDS)

    def _lost(self) -> None:
        self.live = False
        lost = [*self.open.values(), *self._queue]
        self.open.clear()
        self._queue.clear()
        for op in lost:
            op.flights -= 1
            if not op.done:
                op.broken += 1
                self._load.again(op)

    async def _session(self, stub: Any) -> None:
        stream = stub.Session()
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                await stream.write(pb.SessionRequest(hello=pb.Hello(instance_id=self._load.name, protocol_version=1)))
                welcome = await stream.read()
            if not isinstance(welcome, pb.SessionResponse):
                return
            self.live = True
            self._load.connected()
            writer = asyncio.create_task(self._write(stream))
            try:
                while self.live or self.open or self._queue:
                    message = await stream.read()
                    if not isinstance(message, pb.SessionResponse):
                        return
                    if message.HasField("drain"):
                        self.live = False
                        self._load.note("session: drain")
                    at = now()
                    for item in message.batch.items:
                        self._answered(item, at)
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        finally:
            stream.cancel()

    async def _write(self, stream: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                message = pb.SessionRequest()
                for _ in range(min(BATCH_ITEMS, len(self._queue))):
                    op = self._queue.popleft()
                    if op.done:
                        op.flights -= 1
                        continue
                    self._number += 1
                    self.open[self._number] = op
                    item = message.batch.items.add(number=self._number)
                    getattr(item, op.kind).CopyFrom(op.request)
                await stream.write(message)

    def _answered(self, item: pb.ResponseItem, at: int) -> None:
        op = self.open.pop(item.number, None)
        if op is None:
            return
        op.flights -= 1
        what = item.WhichOneof("result")
        if what != "error":
            self._load.answered(op, getattr(item, what or ""), at, self.server)
        elif op.done:
            return
        elif item.error.code in _RETRYABLE:
            op.away += 1
            self._load.note(f"item: {item.error.code} {item.error.message[:80]}")
            self._load.later(op)
        else:
            self._load.failed(op, f"{item.error.code} {item.error.message}", at)


class Load:
    """All callers of this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name: str = options.log.stem
        self.rng = random.Random(options.seed)
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.pairs = 0
        self.open = 0
        """Calls in progress."""
        self._options = options
        self._log = Writer(options.log)
        self._links: list[Link] = []
        self._homeless: deque[Op] = deque()
        self._ops: set[Op] = set()
        self._rate = 0.0
        self._callers = 0
        self._going = True
        self._due = 0.0
        self._waits: list[int] = []
        mix = dict(each.split("=") for each in options.mix.split(",") if each)
        self._kinds = list(mix) or ["plain"]
        self._weights = [float(weight) for weight in mix.values()] or [1.0]

    # -- requests -------------------------------------------------------------------------------------------------

    def _start(self, caller: bool) -> None:
        options, rng = self._options, self.rng
        kind = rng.choices(self._kinds, self._weights)[0]
        usage = (options.input, 0, 0, options.output)
        if kind == "varied":
            usage = (rng.randint(1, options.input), 0, 0, rng.randint(1, options.output))
        call = Call(str(uuid.UUID(int=rng.getrandbits(128), version=4)), kind, usage, caller)
        request = pb.ReserveRequest(reservation_id=call.id, tenant=options.tenant, route="replicas")
        candidate = request.candidates.add()
        candidate.target.model = options.model
        if options.account:
            candidate.target.account = options.account
        candidate.estimate.input_tokens = options.input
        candidate.estimate.output_tokens = options.output
        candidate.estimate.max_output_tokens = options.output
        request.hold.FromMilliseconds(int(1_000 * (options.short_hold if kind == "abandoned" else options.hold)))
        request.max_wait.FromMilliseconds(int(1_000 * options.max_wait))
        self.open += 1
        op = self._ask("reserve", call, request, options.deadline + options.max_wait)
        if kind == "doubled":
            self._send(op)

    def _ask(self, kind: str, call: Call, request: Any, deadline: float) -> Op:
        op = Op(kind, call, request, int(deadline * 1e6))
        self._ops.add(op)
        self._send(op)
        return op

    def _send(self, op: Op) -> None:
        links = [link for link in self._links if link.live and link.server != op.server]
        if not links:
            links = [link for link in self._links if link.live]
        if links:
            self.rng.choice(links).put(op)
        elif op.flights <= 0:
            self._homeless.append(op)

    def again(self, op: Op) -> None:
        """A connection broke under it."""
        if op.flights <= 0:
            self._send(op)

    def later(self, op: Op) -> None:
        """Its server could not answer."""
        if op.flights <= 0:
            asyncio.get_running_loop().call_later(AGAIN_SECONDS, lambda: None if op.done else self._send(op))

    def connected(self) -> None:
        waiting, self._homeless = self._homeless, deque()
        for op in waiting:
            if not op.done:
                self._send(op)

    def note(self, what: str) -> None:
        if len(self.notes) < 100 or what in self.notes:
            self.notes[what] += 1

    # -- answers --------------------------------------------------------------------------------------------------

    def answered(self, op: Op, answer: Any, at: int, server: int) -> None:
        kind, again = op.kind, op.done
        call = op.call
        entry = Answered(kind, call.id, op.asked, at, op.sent, server, op.broken, op.away)
        if kind == "reserve":
            if answer.WhichOneof("result") == "grant":
                entry.kind = "grant"
                entry.context = answer.grant.context
                entry.waited = answer.grant.waited.seconds * 1_000_000 + answer.grant.waited.nanos // 1_000
            else:
                entry.kind = "denial"
                entry.reason = answer.denial.reason
                if entry.reason not in _FINAL_DENIALS and not again:
                    op.away += 1
                    self.note(f"denial: {entry.reason}")
                    self.later(op)
                    return
        elif kind == "commit":
            entry.charges = tuple((each.dimension, each.charged) for each in answer.settlements)
            entry.cost = money(answer.cost)
            entry.duplicate, entry.late, entry.stale = answer.duplicate, answer.late, answer.stale
            entry.usage = call.usage
        elif kind == "release":
            entry.released, entry.duplicate, entry.late = answer.released, answer.duplicate, answer.late
        self._log.write(entry)
        self.counts[entry.kind] += 1
        if again:
            self.counts["answered twice"] += 1
            return
        self._end(op)
        self._waits.append(at - op.asked)
        if entry.kind == "grant":
            call.context = entry.context
            if self._options.think:
                asyncio.get_running_loop().call_later(self._options.think, self._granted, call)
            else:
                self._granted(call)
        elif entry.kind == "denial":
            asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._over, call)
        elif kind == "renew":
            self._commit(call)
        else:
            if kind == "commit":
                self.pairs += 1
            self._over(call)

    def _granted(self, call: Call) -> None:
        deadline = self._options.deadline
        if call.kind == "released":
            request = pb.ReleaseRequest(reservation_id=call.id, context=call.context)
            self._ask("release", call, request, deadline)
        elif call.kind == "abandoned":
            self._over(call)
        elif call.kind == "renewed":
            renew = pb.RenewRequest(reservation_id=call.id, context=call.context, output_tokens=1)
            renew.hold.FromMilliseconds(int(1_000 * self._options.hold))
            self._ask("renew", call, renew, deadline)
        else:
            self._commit(call)

    def _commit(self, call: Call) -> None:
        outcome = pb.Outcome(disposition=pb.DISPOSITION_SUCCEEDED, http_status=200, usage_kind=pb.USAGE_KIND_FINAL)
        outcome.usage.input_tokens, outcome.usage.output_tokens = call.usage[0], call.usage[3]
        request = pb.CommitRequest(reservation_id=call.id, context=call.context, outcome=outcome)
        self._ask("commit", call, request, self._options.deadline)

    def failed(self, op: Op, what: str, at: int) -> None:
        self._end(op)
        self._log.write(
            Answered("failed", op.call.id, op.asked, at, op.sent, -1, op.broken, op.away, what=f"{op.kind}: {what}")
        )
        self.counts["failed"] += 1
        self.note(f"failed {op.kind}: {what[:80]}")
        self._over(op.call)

    def _end(self, op: Op) -> None:
        op.done = True
        self._ops.discard(op)

    def _over(self, call: Call) -> None:
        self.open -= 1
        if call.caller and self._going and self.open < self._callers:
            self._start(True)

    # -- the run --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        addresses: Sequence[str] = self._options.addresses.split(",")
        self._links = [
            Link(self, number, address)
            for number, address in enumerate(addresses)
            for _ in range(self._options.sessions)
        ]
        tasks = [asyncio.create_task(link.run()) for link in self._links]
        tasks += [asyncio.create_task(each) for each in (self._arrive(), self._sweep(), self._tell())]
        tasks.append(asyncio.create_task(self._listen()))
        waiting = asyncio.gather(*tasks)
        try:
            while self._going or (self.open and time.monotonic() < self._end_by):
                await asyncio.wait([waiting], timeout=0.02)
                if waiting.done():
                    waiting.result()
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            for op in list(self._ops):
                self.failed(op, "no answer at the end", now())
            self._log.close()
            print(json.dumps(self._progress() | {"end": True}), flush=True)

    _end_by = 0.0

    async def _listen(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            command, _, value = line.decode().partition(" ")
            if command == "rate":
                self._rate, self._due = float(value), time.monotonic()
            elif command == "callers":
                self._callers = int(value)
                while self.open < self._callers:
                    self._start(True)
            else:
                break
        self._rate = 0.0
        self._callers = 0
        self._end_by = time.monotonic() + END_SECONDS
        self._going = False
        await asyncio.Event().wait()

    async def _arrive(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            at = time.monotonic()
            started = 0
            while self._rate and self._due <= at and started < 2_000 and self.open < self._options.most:
                self._start(False)
                self._due += self.rng.expovariate(self._rate)
                started += 1
            if self._rate and self.open >= self._options.most:
                # Nothing is held back for later: that would be a burst which the rate does not have.
                self._due = at
                self.counts["held back"] += 1

    async def _sweep(self) -> None:
        """Give up what is past its deadline; ask elsewhere what a server keeps for too long."""
        while True:
            await asyncio.sleep(0.1)
            at = now()
            patience = int((self._options.patience + self._options.max_wait) * 1e6)
            for op in list(self._ops):
                if at > op.deadline:
                    self.failed(op, f"no answer in time (sent {op.sent}, broken {op.broken}, away {op.away})", at)
                elif at - op.last > patience:
                    self.counts["asked elsewhere"] += 1
                    self._send(op)
                    op.last = at
            self._log.flush()

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            print(json.dumps(self._progress()), flush=True)

    def _progress(self) -> dict[str, object]:
        waits, self._waits = sorted(self._waits), []
        return {
            "at": now(),
            "pairs": self.pairs,
            "open": self.open,
            "counts": dict(self.counts),
            "notes": dict(self.notes),
            "median": waits[len(waits) // 2] if waits else 0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", required=True, help="of the servers, with commas between")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--sessions", type=int, default=1, help="with each server")
    parser.add_argument("--mix", default="", help="kinds of calls with weights, such as plain=9,released=1")
    parser.add_argument("--model", default="claude-sonnet-5")
    parser.add_argument("--account", default="")
    parser.add_argument("--tenant", default="replicas")
    parser.add_argument("--input", type=int, default=100)
    parser.add_argument("--output", type=int, default=20)
    parser.add_argument("--hold", type=float, default=60.0)
    parser.add_argument("--short-hold", type=float, default=1.0, help="of reservations that are abandoned")
    parser.add_argument("--max-wait", type=float, default=0.0)
    parser.add_argument("--think", type=float, default=0.0, help="between grant and Commit")
    parser.add_argument("--deadline", type=float, default=10.0, help="of each request, beside its max wait")
    parser.add_argument("--patience", type=float, default=7.0, help="before asking another server as well")
    parser.add_argument("--most", type=int, default=8_192, help="calls at the same time")
    uvloop.run(Load(parser.parse_args()).run())


if __name__ == "__main__":
    main()
