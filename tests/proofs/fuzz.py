"""Proof: no message, however broken, crashes a server, makes it answer INTERNAL or UNKNOWN, or moves the books unasked.

Valid, bent, garbled and purely random messages go to every rpc of both services, unary and in Sessions, against a real
server process over the loopback interface. Every answer is checked: its status, that it says nothing of the server's
insides, that it carries the details which the contract promises. Afterwards, with nothing else going on, bad messages
are sent one by one, and after a refusal the journals must be as long as before. The server's memory is measured.

    python -m tests.proofs.fuzz --messages 50000 [--seed N]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import re
import secrets
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.message import DecodeError, Message

from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import error_details_pb2, status_pb2
from tests.proofs.messages import ACCOUNTS, ADMIN, COORDINATOR, POOLS, Grant, Maker
from tests.proofs.process import ServerProcess

MIB = 1 << 20
GROWTH_BYTES = 8 * MIB
"""How much the server may grow over the last two fifths of the messages.

What is bounded by number is full by then: ended ids, targets, shares of tenants, pools, accounts. Three memories are
bounded by time, or cannot be filled so soon: ends of calls for readings (ten minutes, four entries a second and limit,
about 100 bytes each: 2 MiB a minute with all pools in use), fallback shares (a minute), and what has gone from a Watch
(20,000 entries). A leak of a kilobyte per message would be 20 MiB.
"""
REMEMBERED = 1_000
TASKS = 16
REPAIR_EVERY = 500
CALL_SECONDS = 15.0
FILL_SECONDS = 120.0
SESSION_SHARE = 0.35
"""The part of the messages that goes through Sessions."""
MOST_FAULTS = 40

# Bounded memories that the configuration sets are small, so that they are soon full; the others are filled first.
CONFIG = """
log_level: warning
defaults: {{provider: anthropic, account: main}}
accounts:
  main:
    monthly_spend_cap: 1_000_000
    pools:
      sonnet-5: {{requests: 600_000, input_tokens: 900_000_000, output_tokens: 900_000_000, concurrency: 2_000}}
      haiku-5-5: {{requests: 60_000, input_tokens: 90_000_000, output_tokens: 90_000_000}}
      opus-5-5: {{requests: 600_000, input_tokens: 900_000_000, output_tokens: 900_000_000, learn: false}}
  spare:
    monthly_spend_cap: 1_000_000
    pools:
      sonnet-5: {{requests: 600_000, input_tokens: 900_000_000, output_tokens: 900_000_000, learn: false}}
      haiku-5-5: {{requests: 60_000, input_tokens: 90_000_000, output_tokens: 90_000_000}}
      opus-5-5: {{requests: 600_000, input_tokens: 900_000_000, output_tokens: 900_000_000}}
  quiet:
    monthly_spend_cap: 1_000_000
    pools:
      sonnet-5: {{requests: 600_000, input_tokens: 900_000_000, output_tokens: 900_000_000}}
shares:
  product:
    cap: {{requests: 600_000}}
    shares:
      chat: {{cap: {{input_tokens: 900_000_000}}, tenants: [chat, "chat-*"]}}
  research: {{cap: {{output_tokens: 90_000_000}}, tenants: ["research-*"]}}
identities:
  - {{name: alice, token_sha256: {alice}, roles: [call, teach], tenants: ["*"]}}
  - {{name: bob, token_sha256: {bob}, roles: [call], tenants: ["*"]}}
  - {{name: root, token_sha256: {root}, roles: [call, teach, admin], tenants: ["*"]}}
limits:
  max_hold: 3s
  default_hold: 2s
  max_wait: 200ms
  max_bulk: 20
  max_remembered: {remembered}
  max_open_reservations: 4_000
  max_open_pools: 24
  max_accounts: 12
  target_cache: 512
  drain_timeout: 500ms
"""

Code = grpc.StatusCode
REFUSALS = {
    Code.INVALID_ARGUMENT,
    Code.UNAUTHENTICATED,
    Code.PERMISSION_DENIED,
    Code.FAILED_PRECONDITION,
    Code.RESOURCE_EXHAUSTED,
}
ALLOWED = {
    "CoordinatorService": REFUSALS | {Code.OK},
    "AdminService": REFUSALS | {Code.OK, Code.NOT_FOUND, Code.ABORTED, Code.OUT_OF_RANGE, Code.UNIMPLEMENTED},
}
_BY_NUMBER = {code.value[0]: code for code in Code}
_INSIDES = re.compile(
    r'Traceback|File "|\.py\b|site-packages|object at 0x|\b[A-Z]\w+(Error|Exception)\b'
    r"|made the server fail|this server failed"
)
_LOGGED = re.compile(
    r"Traceback|unexpected error|engine failed|made the engine fail|ledger stopped|journal failed|critical", re.I
)

RESPONSES: dict[str, type[Message]] = {name: getattr(pb, f"{name}Response") for name in (*COORDINATOR, *ADMIN)}


@dataclass
class Result:
    """What was sent, what came back, and what is wrong."""

    seed: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By rpc and status."""
    kinds: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    """What Reserve and Commit answered."""
    neighbours: int = 0
    """Good items that stood beside bad ones in a Session, and were answered properly."""
    quiet: Counter[str] = field(default_factory=Counter)
    rss: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.faults

    @property
    def messages(self) -> int:
        return sum(self.kinds.values())

    def fault(self, text: str) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(text)


class Fuzz:
    """One run against one server."""

    def __init__(self, server: ServerProcess, seed: int, tokens: dict[str, str], result: Result) -> None:
        self.rng = random.Random(seed)
        self.maker = Maker(self.rng)
        self.server = server
        self.result = result
        self._tokens = tokens
        self._channel: grpc.aio.Channel
        self._blocking: grpc.Channel
        self._left = 0

    # -- checking answers -------------------------------------------------------------------------------------------

    def _text(self, where: str, text: str) -> None:
        found = _INSIDES.search(text)
        if found is not None or any(token in text for token in self._tokens.values()):
            self.result.fault(f"{where}: the status says too much: {text[:300]!r}")

    def _status(self, where: str, code: Code, message: str, details: Iterable[Any]) -> None:
        """What every refusal must and must not have."""
        self._text(where, message)
        if not message:
            self.result.fault(f"{where}: {code.name} without a message")
        names = set()
        for detail in details:
            names.add(detail.TypeName())
            if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                unpacked = error_details_pb2.BadRequest()
                detail.Unpack(unpacked)
                for violation in unpacked.field_violations:
                    self._text(where, f"{violation.field} {violation.description}")
        wanted = {Code.INVALID_ARGUMENT: "google.rpc.BadRequest", Code.RESOURCE_EXHAUSTED: "google.rpc.RetryInfo"}.get(
            code
        )
        if wanted is not None and wanted not in names:
            self.result.fault(f"{where}: {code.name} without {wanted}: {message[:200]!r}")

    def _refused(self, where: str, service: str, error: Any) -> Code:
        """The status of an error of either of gRPC's clients."""
        code: Code = error.code()
        details: list[Any] = []
        for name, value in error.trailing_metadata() or ():
            if name == "grpc-status-details-bin":
                status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
                details = list(status.details)
                if status.code != code.value[0]:
                    self.result.fault(f"{where}: the details are of status {status.code}, the rpc's is {code.name}")
        if code not in ALLOWED[service]:
            self.result.fault(f"{where}: {code.name} {(error.details() or '')[:300]!r}")
        else:
            self._status(where, code, error.details() or "", details)
        return code

    # -- unary ------------------------------------------------------------------------------------------------------

    def _metadata(self, who: str) -> tuple[tuple[str, str], ...]:
        if who == "nobody":
            return ()
        if who == "stranger":
            return (("authorization", "Bearer " + "0" * 40),)
        if who == "twice":
            return tuple(("authorization", f"Bearer {token}") for token in self._tokens.values())
        return (("authorization", f"Bearer {self._tokens[who]}"),)

    async def call(
        self, name: str, raw: bytes, who: str, where: str, *, counted: bool = True
    ) -> tuple[Code, Message | None]:
        """One call with these bytes."""
        service = "CoordinatorService" if name in COORDINATOR else "AdminService"
        path = f"/paceline.v1.{service}/{name}"
        started = time.monotonic()
        body: bytes | None = None
        try:
            if name == "Watch":
                body = await self._watch(path, raw, who)
            else:
                method: Any = self._channel.unary_unary(path)
                body = await method(raw, metadata=self._metadata(who), timeout=CALL_SECONDS)
            code = Code.OK
        except grpc.aio.AioRpcError as error:
            code = self._refused(where, service, error)
        if time.monotonic() - started > CALL_SECONDS / 2:
            self.result.fault(f"{where}: took {time.monotonic() - started:.1f} s")
        self.result.counts[name, code.name] += counted
        answer: Message | None = None
        if body is not None:
            try:
                answer = RESPONSES[name].FromString(body)
            except DecodeError:
                self.result.fault(f"{where}: the answer cannot be decoded")
            else:
                self._note(name, answer)
        return code, answer

    def _note(self, name: str, answer: Any) -> None:
        """How deep the messages reach."""
        answers = self.result.answers
        if name == "Reserve":
            answers["grants" if answer.WhichOneof("result") == "grant" else "denials"] += 1
        elif name == "Commit":
            how = ("duplicate", "late", "stale")
            answers[next((f"{each} settlements" for each in how if getattr(answer, each)), "settlements")] += 1

    async def _watch(self, path: str, raw: bytes, who: str) -> bytes | None:
        """The first messages of a stream."""
        method: Any = self._channel.unary_stream(path)
        stream = method(raw, metadata=self._metadata(who), timeout=CALL_SECONDS)
        body: bytes | None = None
        try:
            async with asyncio.timeout(0.3):
                for _ in range(3):
                    read = await stream.read()
                    if not isinstance(read, bytes):
                        break
                    body = read
        except TimeoutError:
            pass
        finally:
            stream.cancel()
        return body

    def _make(self, name: str, identity: str) -> tuple[str, bytes]:
        """A message for an rpc, and of what kind it is."""
        rng, maker = self.rng, self.maker
        chance = rng.random()
        if chance < 0.05:
            return "noise", maker.noise()
        message = maker.valid(name, identity)
        if chance < 0.30:
            return "valid", message.SerializeToString()
        if chance < 0.70:
            maker.bend(message)
            return "bent", message.SerializeToString()
        if chance < 0.80:
            maker.bend(message)
        return "garbled", maker.garble(message.SerializeToString())

    def _who(self, name: str) -> str:
        if self.rng.random() < 0.04:
            return self.rng.choice(("nobody", "stranger", "twice", "bob"))
        return "root" if name in ADMIN else self.rng.choice(("alice", "alice", "bob", "root"))

    async def one(self) -> None:
        """One message to some unary rpc (or Watch)."""
        rng = self.rng
        name = rng.choice(tuple(COORDINATOR)) if rng.random() < 0.7 else rng.choice(tuple(ADMIN))
        who = self._who(name)
        kind, raw = self._make(name, who)
        self.result.kinds[kind] += 1
        _, answer = await self.call(name, raw, who, f"{name} ({kind} from {who}) {raw.hex()[:400]}")
        self._learn(name, kind, raw, who, answer)

    def _learn(self, name: str, kind: str, raw: bytes, who: str, answer: Message | None) -> None:
        """Keep what can be misused later."""
        if isinstance(answer, pb.ReserveResponse) and answer.WhichOneof("result") == "grant":
            number = pb.ReserveRequest.FromString(raw).reservation_id
            self.maker.grants.append(
                Grant(who, number, answer.grant.context, tuple(answer.grant.child_reservation_ids))
            )
        token = getattr(answer, "next_page_token", "") or getattr(answer, "resume_token", "")
        if token:
            self.maker.tokens.append(token)

    # -- sessions ---------------------------------------------------------------------------------------------------

    async def session(self) -> int:
        """One session of some kind; how many messages or items it took."""
        kind = self.rng.random()
        if kind < 0.55:
            return await self._mixed_session()
        if kind < 0.85:
            return await self._garbled_session()
        return await self._rude_session()

    def _open(self, who: str, seconds: float = CALL_SECONDS) -> Any:
        method: Any = self._channel.stream_stream("/paceline.v1.CoordinatorService/Session")
        return method(metadata=self._metadata(who), timeout=seconds)

    def _hello(self) -> pb.SessionRequest:
        return pb.SessionRequest(hello=pb.Hello(client_version="fuzz", instance_id=f"fuzz-{self.rng.randrange(50)}"))

    async def _mixed_session(self) -> int:
        """Good items beside bad ones: each is answered once, and the good ones as if they were alone."""
        who = self.rng.choice(("alice", "bob", "root"))
        stream = self._open(who)
        where = f"Session of {who}"
        sent = 0
        try:
            await stream.write(self._hello().SerializeToString())
            await self._read(stream, where)
            number = 1_000
            for _ in range(self.rng.randint(1, 4)):
                batch = pb.SessionRequest()
                batch.batch.SetInParent()
                good: dict[int, Callable[[pb.ResponseItem], bool]] = {}
                expected: Counter[int] = Counter()
                described: dict[int, str] = {}
                for _ in range(self.rng.randint(1, 24)):
                    number += 1
                    item = batch.batch.items.add(number=number)
                    if self.rng.random() < 0.4:
                        good[number] = self._good_item(item)
                    else:
                        self._bad_item(item, who, number)
                    expected[item.number] += 1
                    described[item.number] = item.SerializeToString().hex()[:400]
                sent += len(batch.batch.items)
                await stream.write(batch.SerializeToString())
                while expected.total():
                    response = await self._read(stream, where)
                    if response is None:
                        self.result.fault(
                            f"{where}: ended without answers to {dict(expected)}: {list(described.values())[:3]}"
                        )
                        return sent
                    for answer in response.batch.items:
                        self._item_answered(answer, expected, good, described, who, where)
            await stream.done_writing()
            while await self._read(stream, where) is not None:
                pass
        except grpc.aio.AioRpcError as error:
            code = self._refused(where, "CoordinatorService", error)
            self.result.fault(f"{where}: a session of well-encoded messages ended with {code.name} {error.details()!r}")
        finally:
            stream.cancel()
        return sent

    def _good_item(self, item: pb.RequestItem) -> Callable[[pb.ResponseItem], bool]:
        """An item with a known answer, under an id that nobody else uses."""
        number = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        self.result.kinds["good item"] += 1
        match self.rng.randrange(4):
            case 0:
                item.reserve.CopyFrom(self.maker.reserve())
                item.reserve.reservation_id = number
                item.reserve.ClearField("count")
                return lambda answer: (
                    answer.WhichOneof("result") == "reserve" and bool(answer.reserve.WhichOneof("result"))
                )
            case 1:
                item.release.reservation_id = number
                return lambda answer: answer.release.tombstone
            case 2:
                item.observe.observation_id = number
                item.observe.target.CopyFrom(self.maker.target())
                item.observe.outcome.disposition = pb.DISPOSITION_SUCCEEDED
                item.observe.outcome.usage.input_tokens = 5
                return lambda answer: bool(answer.observe.settlements) and not answer.observe.duplicate
            case _:
                item.cancel = 1
                return lambda answer: answer.WhichOneof("result") == "cancel" and not answer.cancel.cancelled

    def _bad_item(self, item: pb.RequestItem, who: str, number: int) -> None:
        rng = self.rng
        self.result.kinds["bad item"] += 1
        name = rng.choice((*COORDINATOR, "Cancel", "Nothing"))
        if name == "Cancel":
            item.cancel = rng.choice((0, 2, number, (1 << 64) - 1))
        elif name != "Nothing":
            message = self.maker.valid(name, who)
            if rng.random() < 0.8:
                self.maker.bend(message)
            getattr(item, name.lower()).CopyFrom(message)
        if rng.random() < 0.05:
            item.number = 0
        if rng.random() < 0.1:
            item.traceparent = rng.choice(("x" * 3_000, "00-zz-zz-01", "\0"))

    def _item_answered(
        self,
        answer: pb.ResponseItem,
        expected: Counter[int],
        good: dict[int, Callable[[pb.ResponseItem], bool]],
        described: dict[int, str],
        who: str,
        where: str,
    ) -> None:
        where = f"{where}, item {described.get(answer.number)}"
        if not expected[answer.number]:
            self.result.fault(f"{where}: an answer too many for item {answer.number}")
            return
        expected[answer.number] -= 1
        what = answer.WhichOneof("result") or "nothing"
        if what == "error":
            code = _BY_NUMBER.get(answer.error.code, Code.UNKNOWN)
            self.result.counts["Session item", code.name] += 1
            if code not in REFUSALS | {Code.CANCELLED}:
                self.result.fault(f"{where}: {code.name} {answer.error.message[:300]!r}")
            else:
                self._status(where, code, answer.error.message, answer.error.details)
        else:
            self.result.counts["Session item", "OK"] += 1
            self._note(what.capitalize(), getattr(answer, what, None))
        check = good.get(answer.number)
        if check is not None:
            if check(answer):
                self.result.neighbours += 1
            else:
                self.result.fault(f"{where}: a good item beside bad ones got {str(answer)[:300]!r}")

    async def _read(self, stream: Any, where: str) -> pb.SessionResponse | None:
        read = await stream.read()
        if not isinstance(read, bytes):
            return None
        try:
            return pb.SessionResponse.FromString(read)
        except DecodeError:
            self.result.fault(f"{where}: the answer cannot be decoded")
            return pb.SessionResponse()

    async def _to_the_end(self, who: str, messages: Sequence[bytes], where: str) -> Code:
        """Send, half-close, and read until the stream ends; how it ends.

        With gRPC's blocking client: a write of the other one to a stream that has just ended hides how it did.
        """
        answers, error = await asyncio.to_thread(self._exchange, who, messages)
        for raw in answers:
            try:
                response = pb.SessionResponse.FromString(raw)
            except DecodeError:
                self.result.fault(f"{where}: the answer cannot be decoded")
                continue
            for answer in response.batch.items:
                if answer.WhichOneof("result") == "error":
                    code = _BY_NUMBER.get(answer.error.code, Code.UNKNOWN)
                    if code not in REFUSALS | {Code.CANCELLED}:
                        self.result.fault(f"{where}: item error {code.name} {answer.error.message[:300]!r}")
                    else:
                        self._status(where, code, answer.error.message, answer.error.details)
        code = Code.OK if error is None else self._refused(where, "CoordinatorService", error)
        self.result.counts["Session", code.name] += 1
        return code

    def _exchange(self, who: str, messages: Sequence[bytes]) -> tuple[list[bytes], Any]:
        """All answers of a stream, and the error that it ends with."""
        method: Any = self._blocking.stream_stream("/paceline.v1.CoordinatorService/Session")
        answers: list[bytes] = []
        try:
            answers.extend(method(iter(messages), metadata=self._metadata(who), timeout=CALL_SECONDS))
        except grpc.RpcError as error:
            return answers, error
        return answers, None

    async def _garbled_session(self) -> int:
        """Messages whose encoding is broken."""
        rng, maker = self.rng, self.maker
        who = rng.choice(("alice", "bob"))
        messages = [self._hello().SerializeToString()]
        for _ in range(rng.randint(1, 3)):
            batch = pb.SessionRequest()
            for place in range(rng.randint(1, 6)):
                item = batch.batch.items.add(number=place + 1)
                name = rng.choice(tuple(COORDINATOR))
                getattr(item, name.lower()).CopyFrom(maker.valid(name, who))
            messages.append(maker.noise() if rng.random() < 0.1 else maker.garble(batch.SerializeToString()))
            self.result.kinds["garbled session message"] += 1
        await self._to_the_end(who, messages, f"garbled session {[raw.hex()[:300] for raw in messages[1:]]}")
        return len(messages) - 1

    async def _rude_session(self) -> int:
        """Sessions that break the protocol."""
        rng = self.rng
        hello = self._hello().SerializeToString()
        bent = self._hello()
        self.maker.bend(bent)
        many = pb.SessionRequest()
        for place in range(1_025):
            many.batch.items.add(number=place + 1, cancel=1)
        end = {Code.INVALID_ARGUMENT}
        kind, messages, who, expected = rng.choice(
            (
                ("no hello", [many.SerializeToString()], "alice", end),
                ("an empty first message", [b""], "alice", end),
                ("noise first", [b"\xff" + self.maker.noise()], "alice", end),
                ("two hellos", [hello, hello], "alice", end),
                ("an empty message", [hello, b""], "alice", end),
                ("too many items", [hello, many.SerializeToString()], "alice", {Code.RESOURCE_EXHAUSTED}),
                ("nothing at all", [], "alice", {Code.OK}),
                ("nobody", [hello], "nobody", {Code.UNAUTHENTICATED}),
                ("a stranger", [hello], "stranger", {Code.UNAUTHENTICATED}),
                ("a bent hello", [bent.SerializeToString()], "alice", None),
            )
        )
        self.result.kinds["rude session message"] += max(1, len(messages))
        code = await self._to_the_end(who, messages, f"rude session ({kind})")
        if expected is not None and code not in expected:
            self.result.fault(f"a session with {kind} ended with {code.name}")
        return max(1, len(messages))

    # -- phases -----------------------------------------------------------------------------------------------------

    async def fill(self) -> None:
        """Fill the memories whose bounds are the server's own: targets, shares of tenants, pools, accounts."""
        stream = self._open("alice", seconds=FILL_SECONDS)
        await stream.write(self._hello().SerializeToString())
        await stream.read()
        for start in range(0, 17_000, 1_000):
            batch = pb.SessionRequest()
            for place in range(start, start + 1_000):
                item = batch.batch.items.add(number=place + 1)
                item.reserve.reservation_id = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
                item.reserve.tenant = f"tenant-{place}"
                candidate = item.reserve.candidates.add()
                candidate.target.model = f"model-{place % 4_200}"
                candidate.target.account = f"account-{place % 12}"
                candidate.estimate.input_tokens = 1_000_000_000
            await stream.write(batch.SerializeToString())
            left = 1_000
            while left:
                response = await self._read(stream, "fill")
                if response is None:
                    raise RuntimeError("the server ended the session")
                left -= len(response.batch.items)
        # Tombstones, in every ledger, because no target leads to one: the memories of ended ids.
        for start in range(0, REMEMBERED + 1_000, 1_000):
            batch = pb.SessionRequest()
            for place in range(start, start + 1_000):
                item = batch.batch.items.add(number=100_000 + place)
                item.release.reservation_id = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
            await stream.write(batch.SerializeToString())
            left = 1_000
            while left:
                response = await self._read(stream, "fill")
                if response is None:
                    raise RuntimeError("the server ended the session")
                left -= len(response.batch.items)
        await stream.done_writing()
        while await self._read(stream, "fill") is not None:
            pass

    async def storm(self, messages: int) -> None:
        """So many messages, several at a time."""
        self._left = messages
        repair_at = [messages - REPAIR_EVERY]

        async def work() -> None:
            while self._left > 0:
                if self.rng.random() < SESSION_SHARE / 12:  # a session takes a dozen
                    taken = await self.session()
                    self._left -= taken
                else:
                    self._left -= 1
                    await self.one()
                if self._left < repair_at[-1]:
                    repair_at.append(repair_at[-1] - REPAIR_EVERY)
                    await self._repair()

        await asyncio.gather(*(work() for _ in range(TASKS)))

    async def _repair(self) -> None:
        """Undo what an administrator's messages have done, so that calls are granted again."""
        for name, messages in (
            ("ResumePool", [pb.ResumePoolRequest(name=pool) for pool in POOLS]),
            ("SetMode", [pb.SetModeRequest(ledger=ledger, mode=pb.MODE_ENFORCE) for ledger in ACCOUNTS]),
            (
                "UpdateLimit",
                [
                    pb.UpdateLimitRequest(
                        limit=pb.DimensionRef(pool=pool, dimension=dimension, window=pb.WINDOW_MINUTE), clear=True
                    )
                    for pool in POOLS
                    for dimension in (pb.DIMENSION_REQUESTS, pb.DIMENSION_INPUT_TOKENS, pb.DIMENSION_OUTPUT_TOKENS)
                ],
            ),
        ):
            for message in messages:
                await self.call(name, message.SerializeToString(), "root", f"repair with {name}", counted=False)

    async def orders(self, flows: int) -> None:
        """Right messages in the wrong order, with the answers that the contract promises."""
        for _ in range(flows):
            await self._order()

    async def _order(self) -> None:
        rng, maker, fault = self.rng, self.maker, self.result.fault
        request = maker.reserve()
        request.ClearField("count")
        request.ClearField("max_wait")
        number = request.reservation_id
        del request.candidates[1:]
        request.candidates[0].target.account, request.candidates[0].target.model = "quiet", "claude-sonnet-5"
        outcome = pb.Outcome(disposition=pb.DISPOSITION_SUCCEEDED, usage=pb.Usage(input_tokens=3, output_tokens=4))

        async def ask(name: str, message: Message, who: str = "alice") -> tuple[Code, Any]:
            self.result.kinds["in some order"] += 1
            return await self.call(name, message.SerializeToString(), who, f"{name} in some order")

        def commit(context: bytes = b"") -> pb.CommitRequest:
            return pb.CommitRequest(reservation_id=number, context=context, outcome=outcome)

        def release(context: bytes = b"") -> pb.ReleaseRequest:
            return pb.ReleaseRequest(reservation_id=number, context=context)

        code, _ = await ask("Commit", commit())
        if code is not Code.FAILED_PRECONDITION:
            fault(f"a Commit before the Reserve, without context, got {code.name}")
        if rng.random() < 0.2:
            _, answer = await ask("Release", release())
            if not answer.tombstone:
                fault(f"a Release before the Reserve got {str(answer)!r}")
            _, answer = await ask("Reserve", request)
            if answer.denial.reason != pb.DENIAL_REASON_RELEASED:
                fault(f"a Reserve after its Release got {str(answer)[:200]!r}")
            return
        _, answer = await ask("Reserve", request)
        if answer is None or answer.WhichOneof("result") != "grant":
            fault(f"a Reserve in a pool with room got {str(answer)[:300]!r}")
            return
        context = answer.grant.context
        for forged in (maker.forged(context), context[:-1], context + b"\0", context[1:], b"\x01" * len(context)):
            for name, message in (
                ("Commit", commit(forged)),
                ("Release", release(forged)),
                ("Renew", pb.RenewRequest(reservation_id=number, context=forged)),
            ):
                code, _ = await ask(name, message)
                if code is not Code.INVALID_ARGUMENT:
                    fault(f"{name} with a forged context got {code.name}: {forged.hex()}")
        for name, message in (("Commit", commit(context)), ("Release", release(context))):
            code, _ = await ask(name, message, "bob")
            if code is not Code.INVALID_ARGUMENT:
                fault(f"{name} with a context of another identity got {code.name}")
        other = commit(context)
        other.reservation_id = maker.id()
        code, _ = await ask("Commit", other)
        if code is not Code.INVALID_ARGUMENT:
            fault(f"a Commit with the context of another reservation got {code.name}")
        what = rng.choice(("twice", "released", "late"))
        if what == "late":
            await ask("UpdateReservation", pb.UpdateReservationRequest(reservation_id=number), "root")
            return
        if what == "released":
            _, answer = await ask("Release", release(context))
            if not answer.released:
                fault(f"a Release got {str(answer)!r}")
            _, answer = await ask("Release", release(context))
            if not answer.duplicate or answer.released:
                fault(f"a second Release got {str(answer)!r}")
            return
        _, first = await ask("Commit", commit(rng.choice((context, b""))))
        _, second = await ask("Commit", commit(rng.choice((context, b""))))
        if first.duplicate or first.late or not second.duplicate:
            fault(f"two Commits got {str(first)[:200]!r} and {str(second)[:200]!r}")
        charged = [[(each.dimension, each.charged) for each in answer.settlements] for answer in (first, second)]
        if charged[0] != charged[1] or first.cost != second.cost:
            fault(f"two Commits were told {charged}")
        _, answer = await ask("Renew", pb.RenewRequest(reservation_id=number, context=context))
        if not answer.ended:
            fault(f"a Renew after the Commit got {str(answer)!r}")
        _, answer = await ask("Release", release(context))
        if not answer.duplicate:
            fault(f"a Release after the Commit got {str(answer)!r}")

    async def _sequences(self) -> tuple[dict[str, int], int]:
        """The length of every journal, and how many reservations are open or wait."""
        method: Any = self._channel.unary_unary("/paceline.v1.AdminService/ListLedgers")
        raw = pb.ListLedgersRequest(page_size=1_000).SerializeToString()
        body = await method(raw, metadata=self._metadata("root"), timeout=CALL_SECONDS)
        ledgers = pb.ListLedgersResponse.FromString(body).ledgers
        busy = sum(ledger.open_reservations + ledger.waiting_reservations for ledger in ledgers)
        return {ledger.name: ledger.sequence for ledger in ledgers}, busy

    async def _calm(self) -> dict[str, int]:
        """Wait until nothing is going on; the lengths of the journals then."""
        for _ in range(400):
            sequences, busy = await self._sequences()
            if not busy:
                return sequences
            await asyncio.sleep(0.05)
        raise TimeoutError("reservations stay open although every hold is short")

    async def calm_refusals(self, messages: int) -> None:
        """One message after the other; after each that was refused the journals are as long as before."""
        await asyncio.sleep(1.5)  # what was left behind by callers that are gone is taken back
        before = await self._calm()
        if not any(before.values()):
            self.result.fault("AdminService does not tell the sequence of any ledger: nothing can be compared")
            return
        sent = 0
        while sent < messages:
            name = self.rng.choice(tuple(COORDINATOR)) if self.rng.random() < 0.8 else self.rng.choice(tuple(ADMIN))
            who = self.rng.choice(("alice", "nobody")) if name in COORDINATOR else self.rng.choice(("alice", "root"))
            kind, raw = self._make(name, who)
            if kind == "valid" and who != "nobody":
                continue
            if self.rng.random() < 0.2:
                items, refused = await self._bad_batch()
                sent += items
                after, busy = await self._sequences()
                if not refused:
                    self.result.quiet["batches accepted in part"] += 1
                    before = await self._calm() if busy else after
                    continue
                self.result.quiet["batches refused"] += 1
                if after != before:
                    self.result.fault(
                        f"a batch of {items} items was refused, and the journals grew: {_grown(before, after)}"
                    )
                before = after
                continue
            sent += 1
            self.result.kinds[kind] += 1
            where = f"{name} ({kind} from {who}, alone) {raw.hex()[:600]}"
            code, answer = await self.call(name, raw, who, where)
            after, busy = await self._sequences()
            denied = isinstance(answer, pb.ReserveResponse) and answer.WhichOneof("result") == "denial"
            if code is Code.OK and not denied:
                self.result.quiet["accepted"] += 1
                before = await self._calm() if busy else after
                continue
            self.result.quiet["denied" if denied else "refused"] += 1
            if after != before and not (denied and _first_of_its_pool(before, after)):
                self.result.fault(f"{where}: {code.name}, and the journals grew: {_grown(before, after)}")
            before = after

    async def _bad_batch(self) -> tuple[int, bool]:
        """Bad items in a Session of their own: how many, and whether all were refused."""
        stream = self._open("alice")
        try:
            await stream.write(self._hello().SerializeToString())
            await self._read(stream, "bad batch")
            batch = pb.SessionRequest()
            for number in range(1, self.rng.randint(2, 6)):
                item = batch.batch.items.add(number=number)
                self._bad_item(item, "alice", number)
                item.number = number
            await stream.write(batch.SerializeToString())
            errors = left = len(batch.batch.items)
            while left:
                response = await self._read(stream, "bad batch")
                if response is None:
                    self.result.fault("a session ended in the middle of a batch of bad items")
                    break
                left -= len(response.batch.items)
                for answer in response.batch.items:
                    what = answer.WhichOneof("result")
                    harmless = what == "cancel" and not answer.cancel.cancelled
                    errors -= what == "error" or harmless
            await stream.done_writing()
            return len(batch.batch.items), not errors
        finally:
            stream.cancel()

    async def run(self, messages: int) -> None:
        """Everything."""
        process = psutil.Process(self.server.pid)
        rss = self.result.rss
        with grpc.insecure_channel(self.server.address) as blocking:
            self._blocking = blocking
            await self._run(messages, process)
        self.server.check()
        grown = rss["at the end"] - rss["after three fifths"]
        if grown > GROWTH_BYTES:
            self.result.fault(f"the server grew by {grown / MIB:.1f} MiB over the last {messages * 2 // 5:,} messages")
        log = self.server.log.read_text(errors="replace")
        for line in [line for line in log.splitlines() if _LOGGED.search(line)][:5]:
            self.result.fault(f"the server's log: {line[:400]}")

    async def _run(self, messages: int, process: psutil.Process) -> None:
        rss = self.result.rss
        options = (("grpc.max_receive_message_length", -1),)
        async with grpc.aio.insecure_channel(self.server.address, options=options) as channel:
            self._channel = channel
            rss["at the start"] = process.memory_info().rss
            await self.fill()
            rss["bounded memories filled"] = process.memory_info().rss
            await self.storm(messages // 5)
            rss["after a fifth"] = process.memory_info().rss
            await self.storm(messages * 2 // 5)
            rss["after three fifths"] = process.memory_info().rss
            await self.storm(messages * 2 // 5)
            rss["at the end"] = process.memory_info().rss
            await self._repair()
            await self.orders(max(20, messages // 1_000))
            await self.calm_refusals(max(200, messages // 40))


def _grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """By how many records, by ledger."""
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


def _first_of_its_pool(before: dict[str, int], after: dict[str, int]) -> bool:
    """A denied call to a pool or account that was never named before defines it: one record, and no amounts."""
    grown = _grown(before, after)
    return len(grown) == 1 and all(value <= 2 or name not in before for name, value in grown.items())


def prove(messages: int, seed: int, folder: Path) -> Result:
    """Run it."""
    tokens = {name: secrets.token_hex(20) for name in ("alice", "bob", "root")}
    config = CONFIG.format(
        remembered=REMEMBERED, **{name: hashlib.sha256(token.encode()).hexdigest() for name, token in tokens.items()}
    )
    result = Result(seed)
    server = ServerProcess(folder, config)
    started = time.monotonic()
    try:
        server.start()
        pid = server.pid
        asyncio.run(Fuzz(server, seed, tokens, result).run(messages))
        if server.pid != pid or not server.running:
            result.fault("the server is another process, or none")
    except Exception as error:
        if server.running:
            raise
        result.fault(f"the server died: {error!r}\n{server.tail()}")
    finally:
        server.close()
        result.seconds = time.monotonic() - started
    return result


def report(result: Result) -> str:
    """For people."""
    columns = sorted({code for _, code in result.counts}, key=lambda code: (code != "OK", code))
    lines = [
        f"seed {result.seed}, {result.seconds:.0f} s, {result.messages:,} messages: "
        + ", ".join(f"{count:,} {kind}" for kind, count in sorted(result.kinds.items())),
        "",
        f"{'rpc':<20}" + "".join(f"{code:>20}" for code in columns),
    ]
    for rpc in (*COORDINATOR, "Session item", "Session", *ADMIN):
        lines.append(f"{rpc:<20}" + "".join(f"{result.counts[rpc, code] or '':>20}" for code in columns))
    lines += [
        "",
        f"good items beside bad ones in a Session, all answered properly: {result.neighbours:,}",
        "answers: " + ", ".join(f"{count:,} {what}" for what, count in sorted(result.answers.items())),
        "one by one, with the journals compared: " + ", ".join(f"{n:,} {what}" for what, n in result.quiet.items()),
        "resident memory, MiB: " + ", ".join(f"{size / MIB:.1f} {when}" for when, size in result.rss.items()),
        *(f"FAULT: {fault}" for fault in result.faults),
        f"PASSED: {result.messages:,} messages, the server is up, the books are as they should be"
        if result.passed
        else f"FAILED: {len(result.faults)} faults",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=None, help="a fresh one if absent")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"fuzz: {options.messages:,} messages, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="paceline-fuzz-") as folder:
        result = prove(options.messages, seed, Path(folder))
    print(report(result))
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
