"""A client process: the callers of one row on one Session with one server, who write down what they see.

Of the ``--of`` processes of a run each makes its part of every source, so that every tenant calls on all servers. A
stream's call counts from the instant at which it was due, also if this process was late to make it. Nothing is sent
again: an error is a fault of the run, and is written down as one.

Progress goes to standard output as JSON, a line a second. At the end all calls go to ``--log``, and what went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
import msgspec
import uvloop

from bench.fairness.real.replay import Seen
from bench.fairness.real.rows import BY_NAME, Source
from bench.workloads import seeded
from paceline_client.stubs import v1 as pb
from tests.proofs.answers import INPUT, REQUESTS
from tests.replicas.logbook import told

HELLO_SECONDS = 10.0
AGAIN_SECONDS = 1.0
"""Before a backlog calls again that was denied."""
BATCH_ITEMS = 64
MOST_CALLS = 200_000
"""Of one process in one run; it ends with a fault above it."""
MOST_FAULTS = 20
_FINAL = {pb.DENIAL_REASON_LIMIT, pb.DENIAL_REASON_TIMEOUT, pb.DENIAL_REASON_QUEUE_FULL}
_DIMENSIONS = (REQUESTS, INPUT)


class Log(msgspec.Struct):
    """What one process leaves behind."""

    calls: list[Seen]
    faults: list[str]


def now() -> int:
    """µs of the machine's monotonic clock."""
    return time.monotonic_ns() // 1_000


def vector(charges: dict[int, int]) -> tuple[int, int]:
    """By dimension of the laboratory."""
    return charges.get(_DIMENSIONS[0], 0), charges.get(_DIMENSIONS[1], 0)


class Caller:
    """All callers of this process. ``stream`` is an open Session."""

    def __init__(self, stream: Any, options: argparse.Namespace) -> None:
        self.calls: list[Seen] = []
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self._stream = stream
        self._options = options
        self._row = BY_NAME[options.row]
        self._number = 0
        self._answers: dict[int, Callable[[Any, int], None]] = {}
        self._out: asyncio.Queue[pb.RequestItem] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """From ``--begin`` to ``--end``."""
        options = self._options
        tasks = [self._loop.create_task(each) for each in (self._read(), self._write(), self._progress())]
        for source in self._row.sources:
            chance = seeded(options.seed, source.kind.tenant, options.place)
            tasks.append(self._loop.create_task(self._call(source, chance)))
        with contextlib.suppress(TimeoutError):
            # None of them ends by itself.
            async with asyncio.timeout(max(0.0, (options.end - now()) / 1e6)):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError):
                self._fault(f"ended before its time: {outcome!r}")

    # -- who calls ------------------------------------------------------------------------------------------------

    async def _call(self, source: Source, chance: random.Random) -> None:
        begin: int = self._options.begin
        await asyncio.sleep(max(0, begin - now()) / 1e6)
        if not source.rate:
            of, place = self._options.of, self._options.place
            for _ in range(source.depth // of + (place < source.depth % of)):
                self._offer(source, chance, now(), again=True)
            await asyncio.Event().wait()
        due = float(begin)
        while True:
            due += chance.expovariate(source.rate / self._options.of) * 1e6
            if due > now():
                await asyncio.sleep((due - now()) / 1e6)
            self._offer(source, chance, int(due))

    def _offer(self, source: Source, chance: random.Random, due: int, *, again: bool = False) -> None:
        if len(self.calls) >= MOST_CALLS:
            raise RuntimeError(f"more than {MOST_CALLS:,} calls")
        made = source.kind.call(len(self.calls), chance)
        seen = Seen(
            str(uuid.UUID(int=chance.getrandbits(128), version=4)),
            made.tenant,
            made.tokens,
            made.priority,
            made.shares,
            made.pools,
            made.max_wait_us,
            made.took_us,
            min(due, now()),
        )
        self.calls.append(seen)
        request = pb.ReserveRequest(
            reservation_id=seen.key,
            tenant=seen.tenant,
            priority=cast("pb.Priority.ValueType", seen.priority),
            route="fairness",
        )
        for pool in seen.pools:
            candidate = request.candidates.add()
            candidate.target.model = f"claude-{pool}"
            candidate.estimate.input_tokens = seen.tokens
            candidate.estimate.output_tokens = candidate.estimate.max_output_tokens = 1
        request.hold.FromSeconds(60)
        request.max_wait.FromMicroseconds(seen.max_wait_us)
        self.counts["offered"] += 1

        def answered(answer: Any, at: int) -> None:
            if answer.WhichOneof("result") == "grant":
                self._granted(seen, answer.grant, at)
                pause = 0.0
            else:
                self._denied(seen, answer.denial, at)
                pause = AGAIN_SECONDS
            if again:
                self._loop.call_later(pause, lambda: self._offer(source, chance, now(), again=True))

        self._send("reserve", request, answered)

    def _granted(self, seen: Seen, grant: pb.Grant, at: int) -> None:
        self.counts["granted"] += 1
        seen.granted_at, seen.pool = at, seen.pools[grant.candidate_index]
        seen.held = vector(dict(told(grant.context)[7]))
        self._expect(seen, seen.held)
        if not grant.pool.endswith(seen.pool):
            self._fault(f"granted in {grant.pool} instead of {seen.pool}")
        self._loop.call_later(seen.took_us / 1e6, lambda: self._commit(seen, grant.context))

    def _denied(self, seen: Seen, denial: pb.Denial, at: int) -> None:
        self.counts["denied"] += 1
        seen.denied_at = at
        if denial.reason not in _FINAL:
            self._fault(f"denied with {pb.DenialReason.Name(denial.reason)}: {denial.message}")

    def _commit(self, seen: Seen, context: bytes) -> None:
        outcome = pb.Outcome(disposition=pb.DISPOSITION_SUCCEEDED, http_status=200, usage_kind=pb.USAGE_KIND_FINAL)
        outcome.usage.input_tokens, outcome.usage.output_tokens = seen.tokens, 1

        def answered(answer: Any, at: int) -> None:
            self.counts["settled"] += 1
            seen.settled_at = at
            seen.settled = vector({each.dimension: each.charged for each in answer.settlements})
            self._expect(seen, seen.settled)

        request = pb.CommitRequest(reservation_id=seen.key, context=context, outcome=outcome)
        self._send("commit", request, answered)

    def _expect(self, seen: Seen, charged: tuple[int, int]) -> None:
        if charged != (1, seen.tokens):
            self._fault(f"{seen.tokens} tokens were charged as {charged}")

    def _fault(self, what: str) -> None:
        self.counts["faults"] += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(what)

    # -- the Session ----------------------------------------------------------------------------------------------

    def _send(self, kind: str, request: Any, answered: Callable[[Any, int], None]) -> None:
        self._number += 1
        self._answers[self._number] = answered
        item = pb.RequestItem(number=self._number)
        getattr(item, kind).CopyFrom(request)
        self._out.put_nowait(item)

    async def _write(self) -> None:
        while True:
            message = pb.SessionRequest()
            message.batch.items.append(await self._out.get())
            while len(message.batch.items) < BATCH_ITEMS and not self._out.empty():
                message.batch.items.append(self._out.get_nowait())
            await self._stream.write(message)

    async def _read(self) -> None:
        while isinstance(message := await self._stream.read(), pb.SessionResponse):
            at = now()
            for item in message.batch.items:
                answered, what = self._answers.pop(item.number), item.WhichOneof("result")
                if what == "error":
                    self._fault(f"error {item.error.code}: {item.error.message}")
                else:
                    answered(getattr(item, what or ""), at)
            if message.HasField("drain"):
                self._fault("the server asks to go away")

    async def _progress(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            print(json.dumps(self.counts), flush=True)


async def _main(options: argparse.Namespace) -> None:
    async with grpc.aio.insecure_channel(options.address) as channel:
        stub: Any = pb.CoordinatorServiceStub(channel)
        stream = stub.Session()
        async with asyncio.timeout(HELLO_SECONDS):
            hello = pb.Hello(instance_id=f"fairness-{options.place}", protocol_version=1)
            await stream.write(pb.SessionRequest(hello=hello))
            await stream.read()
        caller = Caller(stream, options)
        await caller.run()
        stream.cancel()
    options.log.write_bytes(msgspec.msgpack.encode(Log(caller.calls, caller.faults)))


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="of its server")
    parser.add_argument("--row", required=True, choices=sorted(BY_NAME))
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--place", type=int, required=True, help="of this process, from 0")
    parser.add_argument("--of", type=int, required=True, help="so many processes")
    parser.add_argument("--begin", type=int, required=True, help="µs of the monotonic clock")
    parser.add_argument("--end", type=int, required=True, help="µs of the monotonic clock")
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    if options.end <= now():
        sys.exit("it is over already")
    uvloop.run(_main(options))


if __name__ == "__main__":
    main()
