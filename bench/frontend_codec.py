"""What the front end costs for each operation: from the bytes of a Session's batch to the bytes of its answers.

The engine and the journal are left out: canned answers come back at once. ``python bench/frontend_codec.py``
"""

from __future__ import annotations

import argparse
import asyncio
import time
import uuid
from collections.abc import Callable
from typing import cast

from paceline.config import Config, Shares, catalogue, definitions
from paceline.engine.answers import Answer, Committed, DimensionState, Granted, Touched
from paceline.engine.dimensions import Dimension, Window
from paceline.engine.operations import Commit, Context, DefinePool, Operation, Reserve
from paceline.frontend import shares as fleet_shares
from paceline.frontend.auth import Caller, Identity
from paceline.frontend.context import Signer, new_key
from paceline.frontend.desk import Desk
from paceline.frontend.fallback import Fallback
from paceline.frontend.places import Places
from paceline.frontend.replies import Replies
from paceline.frontend.requests import Requests
from paceline.frontend.routing import Router
from paceline.frontend.session import Context as RpcContext
from paceline.frontend.session import Session, SessionCaps, Tally
from paceline.ledger.errors import LedgerError
from paceline.ledger.memory import MemoryStore
from paceline.ledger.owner import Owner
from paceline.providers.headers import ALLOWED_HEADERS, parse
from paceline_client.stubs import v1 as pb

BATCH = 64
ACCOUNT = "default"
MODEL = "claude-sonnet-4-5"
HEADERS = {
    "date": b"Sun, 22 Nov 2026 12:00:00 GMT",
    "anthropic-ratelimit-requests-limit": b"5000",
    "anthropic-ratelimit-requests-remaining": b"4999",
    "anthropic-ratelimit-requests-reset": b"2026-11-22T12:00:01Z",
    "anthropic-ratelimit-input-tokens-limit": b"5000000",
    "anthropic-ratelimit-input-tokens-remaining": b"4999000",
    "anthropic-ratelimit-input-tokens-reset": b"2026-11-22T12:00:01Z",
    "anthropic-ratelimit-output-tokens-limit": b"1000000",
    "anthropic-ratelimit-output-tokens-remaining": b"999000",
    "anthropic-ratelimit-output-tokens-reset": b"2026-11-22T12:00:01Z",
}

Reply = Callable[[Answer | LedgerError], object]


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1_000


class _Here:
    """Every ledger is in this process."""

    def is_local(self, ledger: str) -> bool:
        return True

    def leads(self, ledger: str) -> bool:
        return True


class CannedOwner(Owner):
    """Takes operations; answers all of them when it is told to, as an owner does after its append."""

    def __init__(self) -> None:
        super().__init__(ACCOUNT, MemoryStore().journal(ACCOUNT))
        self.taken: list[tuple[Operation, Reply]] = []
        pool = "anthropic/default/sonnet-4"
        states = [
            DimensionState(name, "", dimension, window, 5_000_000, 5_000_000, 4_998_800, 1_200)
            for name, dimension, window in (
                (pool, Dimension.REQUESTS, Window.MINUTE),
                (pool, Dimension.INPUT_TOKENS, Window.MINUTE),
                (pool, Dimension.OUTPUT_TOKENS, Window.MINUTE),
                ("", Dimension.SPEND, Window.MONTH),
            )
        ]
        self.states = tuple(states)

    def submit(self, operation: Operation, reply: Reply) -> None:
        if not isinstance(operation, DefinePool):
            self.taken.append((operation, reply))

    def answers(self) -> list[tuple[Reply, Answer]]:
        taken, self.taken = self.taken, []
        touched = Touched(Dimension.REQUESTS, self.states)
        charges = (
            (Dimension.REQUESTS, 1),
            (Dimension.INPUT_TOKENS, 1_200),
            (Dimension.OUTPUT_TOKENS, 800),
            (Dimension.SPEND, 15_600_000),
        )
        found: list[tuple[Reply, Answer]] = []
        for operation, reply in taken:
            if isinstance(operation, Reserve):
                one = operation.candidates[0]
                context = Context(
                    ACCOUNT,
                    operation.key,
                    one.pool,
                    one.shares,
                    operation.tenant,
                    operation.route,
                    1_795_353_610_000_000,
                    charges,
                    one.prices,
                )
                found.append((reply, Granted((operation.key,), 0, 300_000_000, 0, 1_000, context, touched)))
            elif isinstance(operation, Commit):
                found.append((reply, Committed(charges, 15_600_000)))
        return found


def reserves() -> bytes:
    items = []
    for number in range(1, BATCH + 1):
        request = pb.ReserveRequest(
            reservation_id=str(uuid.uuid4()),
            candidates=[
                pb.Candidate(
                    target=pb.Target(provider="anthropic", model=MODEL),
                    estimate=pb.Estimate(input_tokens=1_000 + number, max_output_tokens=1_000),
                )
            ],
            tenant="acme",
            route="chat/answer",
            priority=pb.PRIORITY_INTERACTIVE,
        )
        request.max_wait.seconds = 5
        items.append(pb.RequestItem(number=number, reserve=request))
    return pb.SessionRequest(batch=pb.RequestBatch(items=items)).SerializeToString()


def commits(answers: bytes, asked: bytes, headers: dict[str, bytes]) -> bytes:
    granted = {item.number: item.reserve.grant for item in pb.SessionResponse.FromString(answers).batch.items}
    items = []
    for item in pb.SessionRequest.FromString(asked).batch.items:
        outcome = pb.Outcome(
            disposition=pb.DISPOSITION_SUCCEEDED,
            http_status=200,
            headers=[pb.Header(name=name, value=value) for name, value in headers.items()],
            usage=pb.Usage(input_tokens=1_200, cache_read_tokens=0, output_tokens=345),
        )
        outcome.header_age.nanos = 20_000_000
        request = pb.CommitRequest(
            reservation_id=item.reserve.reservation_id, context=granted[item.number].context, outcome=outcome
        )
        items.append(pb.RequestItem(number=item.number, commit=request))
    return pb.SessionRequest(batch=pb.RequestBatch(items=items)).SerializeToString()


class Rig:
    """A session without a wire."""

    def __init__(self) -> None:
        config = Config.model_validate({"accounts": {ACCOUNT: {"tier": "build"}}})
        known = catalogue(config)
        self.owner = CannedOwner()
        router = Router(lambda *_: self.owner, lambda account: definitions(config, known, account))
        slot = router._make(ACCOUNT)
        slot.started = True
        slot._epoch = self.owner.epoch
        signer = Signer(new_key())
        places = Places(known, Shares(config).shares_of)
        layout = [(state.dimension, state.window) for state in self.owner.states]
        desk = Desk(Requests(places, signer, parse, ALLOWED_HEADERS), Replies(signer, lambda *_: list(layout)), router)
        caller = Caller(Identity("bench"), "bench/1")
        clock = _monotonic_us
        shares = fleet_shares.Shares(clock, Fallback(clock), _Here())
        self.session = Session(desk, caller, SessionCaps(), shares, cast(RpcContext, None), Tally())
        self.desk = desk

    def run(self, raw: bytes) -> tuple[float, float, bytes]:
        """Seconds for the way in and for the way out, and the answers."""
        session = self.session
        started = time.perf_counter()
        session._message(raw)
        inward = time.perf_counter() - started
        answers = self.owner.answers()
        started = time.perf_counter()
        for reply, answer in answers:
            reply(answer)
        outbox, session._outbox, session._size = session._outbox, [], 0
        body = b"".join(outbox)
        for ticket in session._granted:
            self.desk.delivered(ticket.key)
        session._granted = []
        outward = time.perf_counter() - started
        return inward, outward, pb.SessionResponse(batch=pb.ResponseBatch.FromString(body)).SerializeToString()


def measure(rig: Rig, make: Callable[[], bytes], rounds: int) -> tuple[float, float]:
    inward, outward = [], []
    for _ in range(rounds):
        there, back, body = rig.run(make())
        answered = pb.SessionResponse.FromString(body).batch.items
        assert len(answered) == BATCH, len(answered)
        assert not any(item.HasField("error") for item in answered), answered[0]
        inward.append(there)
        outward.append(back)
    return min(inward) / BATCH * 1e6, min(outward) / BATCH * 1e6


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--most", type=float, help="fail if an operation costs more than so many microseconds")
    arguments = parser.parse_args()
    rig = Rig()
    rows: list[tuple[str, float, float]] = [("Reserve", *measure(rig, reserves, arguments.rounds))]

    def committing(headers: dict[str, bytes]) -> bytes:
        asked = reserves()
        return commits(rig.run(asked)[2], asked, headers)

    rows.append(("Commit without headers", *measure(rig, lambda: committing({}), arguments.rounds)))
    rows.append(("Commit with ten headers", *measure(rig, lambda: committing(HEADERS), arguments.rounds)))
    pairs = list(HEADERS.items())
    started = time.perf_counter()
    for _ in range(5_000):
        parse("anthropic", pairs, 200, age_us=20_000)
    parsing = (time.perf_counter() - started) / 5_000 * 1e6
    print(f"{'µs per operation':28} {'in':>6} {'out':>6} {'all':>6}")
    for name, there, back in rows:
        print(f"{name:28} {there:6.1f} {back:6.1f} {there + back:6.1f}")
    print(f"{'of it: reading the headers':28} {parsing:6.1f}")
    if arguments.most is not None and any(there + back > arguments.most for _, there, back in rows[:2]):
        raise SystemExit(f"more than {arguments.most} µs")


if __name__ == "__main__":
    asyncio.run(main())
