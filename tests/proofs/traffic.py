"""A client process of a proof: makes reservations over raw stubs, never gives up, and logs every answer it receives.

A request whose answer is lost, because the server was killed, is sent again under the same id until it is answered. The
log is JSON, a line for each answer, written when the answer arrives and before anything else is done with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec

from paceline_client.stubs import v1 as pb
from tests.proofs.process import FAST_RECONNECT

BATCH_ITEMS = 64
RETRY_SECONDS = 0.05
HOLD_SECONDS = 15
"""Longer than a flow takes, however often the server is killed under it; else its Commit is late, which is no fault."""
GIVE_UP_SECONDS = 120.0
"""A flow that is not answered for so long is an error: nothing here takes longer than a few seconds."""

_AGAIN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_ASK_AGAIN = {
    pb.DENIAL_REASON_LIMIT,
    pb.DENIAL_REASON_TIMEOUT,
    pb.DENIAL_REASON_QUEUE_FULL,
    pb.DENIAL_REASON_DRAINING,
    pb.DENIAL_REASON_BLOCKED,
}

_TRANSPORT = ("rst_stream", "goaway", "socket closed", "connection reset", "stream removed", "internal error from core")

Message = Any
"""A request or response of the contract."""

_OPERATIONS = {
    "reserve": "Reserve",
    "commit": "Commit",
    "release": "Release",
    "renew": "Renew",
    "observe": "Observe",
}


class Refused(Exception):
    """The server answered with an error that is not about its being away."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code = code


class Broken(Exception):
    """No answer: the connection broke."""


class Unary:
    """One rpc for each operation."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stub = pb.CoordinatorServiceStub(channel)
        self._calls = {kind: getattr(stub, name) for kind, name in _OPERATIONS.items()}

    async def ask(self, kind: str, request: Message, seconds: float) -> Message:
        try:
            return await self._calls[kind](request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            if error.code() in _AGAIN or _is_transport(error):
                raise Broken from error
            raise Refused(error.code().value[0], error.details() or "") from error


def _is_transport(error: grpc.aio.AioRpcError) -> bool:
    """Whether gRPC itself says so, because the peer is gone: it uses INTERNAL and UNKNOWN for some resets."""
    told = (error.details() or "").lower()
    return any(word in told for word in _TRANSPORT)


class InSession:
    """All operations as items of one stream, which is opened again when it breaks."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self._stub = pb.CoordinatorServiceStub(channel)
        self._name = name
        self._queue: asyncio.Queue[tuple[str, Message, asyncio.Future[Message]]] = asyncio.Queue()
        self._open: dict[int, asyncio.Future[Message]] = {}
        self._number = 0
        self.sessions = 0

    async def ask(self, kind: str, request: Message, seconds: float) -> Message:
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((kind, request, answer))
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError:
            raise Broken from None

    async def run(self) -> None:
        """Keep a session open. Ends by being cancelled."""
        while True:
            try:
                await self._one()
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AGAIN and not _is_transport(error):
                    raise
            lost, self._open = self._open, {}
            for answer in lost.values():
                if not answer.done():
                    answer.set_exception(Broken())
            await asyncio.sleep(RETRY_SECONDS)

    async def _one(self) -> None:
        stream = self._stub.Session()
        try:
            await stream.write(pb.SessionRequest(hello=pb.Hello(instance_id=self._name)))
            welcome = await stream.read()
            if not isinstance(welcome, pb.SessionResponse):
                return
            self.sessions += 1
            writer = asyncio.create_task(self._write(stream))
            try:
                while True:
                    message = await stream.read()
                    if not isinstance(message, pb.SessionResponse):
                        return
                    for item in message.batch.items:
                        self._answered(item)
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        finally:
            stream.cancel()

    async def _write(self, stream: Any) -> None:
        while True:
            taken = [await self._queue.get()]
            while len(taken) < BATCH_ITEMS and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            message = pb.SessionRequest()
            for kind, request, answer in taken:
                if answer.done():
                    continue
                self._number += 1
                self._open[self._number] = answer
                item = message.batch.items.add(number=self._number)
                getattr(item, kind).CopyFrom(request)
            await stream.write(message)

    def _answered(self, item: pb.ResponseItem) -> None:
        answer = self._open.pop(item.number, None)
        if answer is None or answer.done():
            return
        what = item.WhichOneof("result")
        if what == "error":
            code = item.error.code
            if code in {each.value[0] for each in _AGAIN}:
                answer.set_exception(Broken())
            else:
                answer.set_exception(Refused(code, item.error.message))
        else:
            answer.set_result(getattr(item, what or ""))


class Log:
    """Append-only, and written at once."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, **line: object) -> None:
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")


def grant_line(request: pb.ReserveRequest, grant: pb.Grant) -> dict[str, object]:
    """What a grant told its caller; the amounts are those that its signed context carries."""
    ledger, key, pool, _, _, _, granted_at, charges, *_ = msgspec.msgpack.decode(grant.context[1:-16])
    return {
        "k": "grant",
        "id": request.reservation_id,
        "key": key,
        "count": request.count or 1,
        "children": list(grant.child_reservation_ids),
        "ledger": ledger,
        "pool": pool,
        "at": granted_at,
        "holds": charges,
    }


def money(amount: Any) -> int:
    return int(amount.units) * 1_000_000_000 + int(amount.nanos)


class Client:
    """Flows of one process. ``goal`` is the number of pairs: reservations granted and committed, both acknowledged."""

    def __init__(self, log: Log, goal: int, rng: random.Random) -> None:
        self.pairs = 0
        self.goal = goal
        self.rng = rng
        self.counts: Counter[str] = Counter()
        self.ways: list[Unary | InSession] = []
        self._log = log
        self._later: set[asyncio.Task[None]] = set()
        self._flows: tuple[tuple[int, Callable[[Unary | InSession], Awaitable[None]]], ...] = (
            (66, self._plain),
            (6, self._released),
            (6, self._bulk),
            (4, self._abandoned),
            (5, self._doubled),
            (5, self._renewed),
            (3, self._withdrawn),
            (3, self._observed),
            (2, self._over_accounts),
        )

    # -- asking ---------------------------------------------------------------------------------------------------

    async def _ask(self, way: Unary | InSession, kind: str, request: Message, seconds: float = 10.0) -> Message:
        """An answer, however often it takes."""
        give_up = time.monotonic() + GIVE_UP_SECONDS
        attempts = 0
        while True:
            attempts += 1
            try:
                answer = await way.ask(kind, request, seconds)
            except Broken:
                self.counts["broken"] += 1
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
            else:
                if attempts > 1:
                    self.counts["answered after a break"] += 1
                return answer

    async def _reserve(self, way: Unary | InSession, request: pb.ReserveRequest) -> pb.Grant | None:
        for _ in range(400):
            answer = await self._ask(way, "reserve", request, 5.0 + request.max_wait.seconds)
            if answer.WhichOneof("result") == "grant":
                self._log.write(**grant_line(request, answer.grant))
                self.counts["grants"] += max(1, len(answer.grant.child_reservation_ids))
                if answer.grant.waited.seconds or answer.grant.waited.nanos:
                    self.counts["grants after a wait"] += 1
                grant: pb.Grant = answer.grant
                return grant
            reason = answer.denial.reason
            self._log.write(k="denial", id=request.reservation_id, reason=reason)
            self.counts["denials"] += 1
            if reason not in _ASK_AGAIN:
                return None
            await asyncio.sleep(self.rng.uniform(0.01, 0.1))
        return None

    async def _commit(
        self, way: Unary | InSession, number: str, context: bytes, estimate: tuple[int, int], **more: object
    ) -> None:
        outcome, usage = self._outcome(estimate)
        if more and outcome.disposition == pb.DISPOSITION_NOT_SENT:
            outcome.disposition = pb.DISPOSITION_FAILED
        answer = await self._ask(
            way, "commit", pb.CommitRequest(reservation_id=number, context=context, outcome=outcome)
        )
        self._log.write(
            k="commit",
            id=number,
            dup=answer.duplicate,
            late=answer.late,
            stale=answer.stale,
            charges=[(each.dimension, each.charged) for each in answer.settlements],
            cost=money(answer.cost),
            usage=usage,
            **more,
        )
        self.counts["commits"] += 1
        for name in ("duplicate", "late", "stale"):
            self.counts[f"commits, {name}"] += getattr(answer, name)
        if not more.get("again"):
            self.pairs += 1

    async def _release(self, way: Unary | InSession, request: pb.ReleaseRequest) -> None:
        answer = await self._ask(way, "release", request)
        self._log.write(
            k="release",
            id=request.reservation_id,
            released=answer.released,
            dup=answer.duplicate,
            tombstone=answer.tombstone,
            late=answer.late,
        )
        self.counts["releases"] += 1

    # -- what is asked --------------------------------------------------------------------------------------------

    def _id(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def _request(self, hold_seconds: int = HOLD_SECONDS) -> tuple[pb.ReserveRequest, tuple[int, int]]:
        rng = self.rng
        estimate = (rng.randint(1, 4_000), rng.randint(1, 1_000))
        request = pb.ReserveRequest(
            reservation_id=self._id(),
            tenant=rng.choices(("chat", "search", "research-1", "poor", "", "other"), (30, 20, 15, 5, 15, 15))[0],
            priority=rng.choice(
                (pb.PRIORITY_INTERACTIVE, pb.PRIORITY_STANDARD, pb.PRIORITY_BATCH, pb.PRIORITY_UNSPECIFIED)
            ),
        )
        request.hold.seconds = hold_seconds
        request.max_wait.FromMilliseconds(rng.choice((0, 50, 500, 3_000)))
        model = rng.choices(("claude-sonnet-5", "claude-haiku-5-5", "claude-opus-5-5"), (60, 30, 10))[0]
        self._candidate(request, model, estimate)
        return request, estimate

    def _candidate(
        self, request: pb.ReserveRequest, model: str, estimate: tuple[int, int], account: str = "main"
    ) -> None:
        request.candidates.add(
            target=pb.Target(provider="anthropic", account=account, model=model),
            estimate=pb.Estimate(
                input_tokens=estimate[0], output_tokens=estimate[1], max_output_tokens=2 * estimate[1]
            ),
        )

    def _outcome(self, estimate: tuple[int, int]) -> tuple[pb.Outcome, list[int] | None]:
        """An outcome, and the usage if it is final."""
        rng = self.rng
        usage = [
            rng.randint(0, 2 * estimate[0]),
            rng.choice((0, 0, rng.randint(0, 2_000))),
            rng.choice((0, 0, rng.randint(0, 500))),
            rng.randint(0, 2 * estimate[1]),
        ]
        names = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens")
        chance = rng.random()
        if chance < 0.80:
            outcome = pb.Outcome(disposition=pb.DISPOSITION_SUCCEEDED, http_status=200)
            for name, tokens in zip(names, usage, strict=True):
                setattr(outcome.usage, name, tokens)
            if chance < 0.08:
                # A reading near the limit, so that the column of adjustments moves.
                outcome.header_age.FromMilliseconds(rng.randint(0, 50))
                outcome.headers.add(name="anthropic-ratelimit-requests-limit", value=b"60000")
                remaining = str(rng.randint(50_000, 60_000)).encode()
                outcome.headers.add(name="anthropic-ratelimit-requests-remaining", value=remaining)
            return outcome, usage
        if chance < 0.85:
            return pb.Outcome(disposition=pb.DISPOSITION_REJECTED), None
        if chance < 0.89:
            return pb.Outcome(disposition=pb.DISPOSITION_FAILED, http_status=500), None
        if chance < 0.94:
            outcome = pb.Outcome(disposition=pb.DISPOSITION_ABORTED, usage_kind=pb.USAGE_KIND_PARTIAL)
            outcome.usage.input_tokens, outcome.usage.output_tokens = usage[0], usage[3]
            return outcome, None
        if chance < 0.98:
            return pb.Outcome(disposition=pb.DISPOSITION_NO_RESPONSE), None
        return pb.Outcome(disposition=pb.DISPOSITION_NOT_SENT), None

    # -- flows ----------------------------------------------------------------------------------------------------

    async def _plain(self, way: Unary | InSession) -> None:
        request, estimate = self._request()
        grant = await self._reserve(way, request)
        if grant is not None:
            await asyncio.sleep(self.rng.choice((0, 0, self.rng.uniform(0, 0.05))))
            await self._commit(way, request.reservation_id, grant.context, estimate)

    async def _released(self, way: Unary | InSession) -> None:
        request, _ = self._request()
        grant = await self._reserve(way, request)
        if grant is not None:
            context = grant.context if self.rng.random() < 0.5 else b""
            for _ in range(self.rng.choice((1, 1, 2))):
                await self._release(way, pb.ReleaseRequest(reservation_id=request.reservation_id, context=context))

    async def _bulk(self, way: Unary | InSession) -> None:
        request, estimate = self._request()
        request.count = self.rng.randint(2, 6)
        request.allow_partial = self.rng.random() < 0.7
        grant = await self._reserve(way, request)
        if grant is None:
            return
        for child in grant.child_reservation_ids:
            if self.rng.random() < 0.85:
                await self._commit(way, child, grant.context, estimate)
        # What is left goes back together.
        await self._release(way, pb.ReleaseRequest(reservation_id=request.reservation_id, context=grant.context))

    async def _abandoned(self, way: Unary | InSession) -> None:
        hold = self.rng.choice((1, 1, 2))
        request, estimate = self._request(hold)
        grant = await self._reserve(way, request)
        if grant is None:
            return
        chance = self.rng.random()
        if chance < 0.6:
            self._log.write(k="abandoned", id=request.reservation_id)
            return

        async def later() -> None:
            await asyncio.sleep(hold + 0.3)
            if chance < 0.9:
                await self._commit(way, request.reservation_id, grant.context, estimate)
            else:
                await self._release(
                    way, pb.ReleaseRequest(reservation_id=request.reservation_id, context=grant.context)
                )

        task = asyncio.create_task(later())
        self._later.add(task)

    async def _doubled(self, way: Unary | InSession) -> None:
        """Everything twice, and at the same time."""
        request, estimate = self._request()
        other = self.rng.choice(self.ways)
        grants = await asyncio.gather(self._reserve(way, request), self._reserve(other, request))
        grant = grants[0] or grants[1]
        if grant is not None:
            number = request.reservation_id
            await asyncio.gather(
                self._commit(way, number, grant.context, estimate, again=False),
                self._commit(other, number, grant.context, estimate, again=True),
            )

    async def _renewed(self, way: Unary | InSession) -> None:
        request, estimate = self._request()
        grant = await self._reserve(way, request)
        if grant is None:
            return
        produced = 0
        for _ in range(self.rng.randint(1, 3)):
            produced += self.rng.randint(0, estimate[1])
            renew = pb.RenewRequest(
                reservation_id=request.reservation_id, context=grant.context, output_tokens=produced
            )
            renew.hold.seconds = self.rng.choice((20, 60))
            answer = await self._ask(way, "renew", renew)
            self._log.write(k="renew", id=request.reservation_id, ended=answer.ended, late=answer.late)
            self.counts["renewals"] += 1
        await self._commit(way, request.reservation_id, grant.context, estimate)

    async def _withdrawn(self, way: Unary | InSession) -> None:
        """Released before, or while, it is reserved."""
        request, _ = self._request()
        release = pb.ReleaseRequest(reservation_id=request.reservation_id)
        release.targets.add().CopyFrom(request.candidates[0].target)
        await self._release(way, release)
        grant = await self._reserve(way, request)
        if grant is not None:
            self._log.write(k="error", id=request.reservation_id, what="granted after it had been withdrawn")

    async def _observed(self, way: Unary | InSession) -> None:
        number = self._id()
        outcome, usage = self._outcome((1_000, 300))
        request = pb.ObserveRequest(observation_id=number, tenant="chat", outcome=outcome)
        request.target.provider, request.target.account = "anthropic", "main"
        request.target.model = "claude-sonnet-5"
        for _ in range(self.rng.choice((1, 1, 2))):
            answer = await self._ask(way, "observe", request)
            self._log.write(
                k="observe",
                id=number,
                dup=answer.duplicate,
                charges=[(each.dimension, each.charged) for each in answer.settlements],
                cost=money(answer.cost),
                usage=usage,
            )
            self.counts["observations"] += 1

    async def _over_accounts(self, way: Unary | InSession) -> None:
        request, estimate = self._request()
        self._candidate(request, "claude-sonnet-5", estimate, "spare")
        grant = await self._reserve(way, request)
        if grant is not None:
            await self._commit(way, request.reservation_id, grant.context, estimate)

    # -- the run --------------------------------------------------------------------------------------------------

    async def work(self, way: Unary | InSession, weights: tuple[int, ...]) -> None:
        """Flow after flow, until the goal is reached."""
        flows = [flow for _, flow in self._flows]
        while self.pairs < self.goal:
            flow = self.rng.choices(flows, weights)[0]
            try:
                await flow(way)
            except Refused as error:
                self._log.write(k="error", id="", what=f"{flow.__name__}: {error}")
                self.counts["errors"] += 1
            except Broken:
                self._log.write(k="error", id="", what=f"{flow.__name__}: no answer for {GIVE_UP_SECONDS:.0f} s")
                self.counts["errors"] += 1

    async def run(self, address: str, tasks: int, name: str) -> None:
        weights = tuple(weight for weight, _ in self._flows)
        async with grpc.aio.insecure_channel(address, options=FAST_RECONNECT) as channel:
            session = InSession(channel, name)
            self.ways = [Unary(channel), session]
            running = asyncio.create_task(session.run())
            progress = asyncio.create_task(self._tell())
            try:
                work = [self.work(self.ways[place % 2], weights) for place in range(tasks)]
                done = asyncio.ensure_future(asyncio.gather(*work))
                waited: list[asyncio.Future[Any]] = [done, running]
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    done.cancel()
                    running.result()
                await done
                for result in await asyncio.gather(*self._later, return_exceptions=True):
                    if isinstance(result, BaseException):
                        self._log.write(k="error", id="", what=f"late: {result!r}")
            finally:
                running.cancel()
                progress.cancel()
            self.counts["sessions"] = session.sessions

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            print(self.pairs, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    client = Client(Log(options.log), options.pairs, random.Random(options.seed))
    asyncio.run(client.run(options.address, options.tasks, options.log.stem))
    print(client.pairs, json.dumps(client.counts), flush=True)


if __name__ == "__main__":
    main()
