"""The owner over the real engine and a file."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Answer, Committed, Denied, Done, Granted, Released
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Engine, Step
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    Disposition,
    Operation,
    Outcome,
    Release,
    Reserve,
    SetPaused,
)
from paceline.engine.state import State
from paceline.ledger.errors import LedgerError, LedgerFault
from paceline.ledger.machine import EngineMachine
from paceline.ledger.options import OwnerOptions, Phase
from paceline.ledger.owner import Owner
from paceline.ledger.sqlite import SqliteStore

PROFILE = Profile(
    "tokens",
    (
        Rule(Dimension.REQUESTS, hold_requests=1_000, settle_requests=1_000),
        Rule(Dimension.INPUT_TOKENS, hold_input=1_000, settle_input=1_000),
        Rule(Dimension.OUTPUT_TOKENS, hold_output=1_000, settle_output=1_000),
        Rule(Dimension.CONCURRENCY, hold_requests=1_000, settle_requests=0),
    ),
)
POOL = DefinePool(
    "pool",
    PROFILE,
    (
        Limit(Dimension.REQUESTS, Window.MINUTE, 10_000_000),
        Limit(Dimension.INPUT_TOKENS, Window.MINUTE, 10_000_000_000),
        Limit(Dimension.OUTPUT_TOKENS, Window.MINUTE, 1_000_000_000),
    ),
)
CALL = Candidate("pool", (), Estimate(1, 1_000, 0, 200, 400))
USED = Outcome(Disposition.SUCCEEDED, Usage(1, 900, 0, 0, 150), UsageKind.FINAL)


def state_of(owner: Owner) -> State:
    return cast(Engine, owner.engine).state


async def opened(path: Path, options: OwnerOptions | None = None) -> tuple[SqliteStore, Owner]:
    store = SqliteStore(path)
    await store.open()
    owner = Owner("acme", store.journal("acme"), options=options)
    await owner.start()
    return store, owner


async def closed(store: SqliteStore, owner: Owner, drain_timeout: float = 5) -> bytes:
    """The digest of the books as they were at the end."""
    await owner.stop(drain_timeout)
    await store.close()
    return state_of(owner).digest()


async def test_books_are_the_same_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store, owner = await opened(path, OwnerOptions(snapshot_events=2_000, check_events=500))
    assert isinstance(await owner.call(POOL), Done)
    random_ = random.Random(3)
    granted: list[str] = []
    for batch in range(100):
        keys = [f"{batch}-{number}" for number in range(20)]
        answers = await asyncio.gather(*(owner.call(Reserve(key, (CALL,))) for key in keys))
        assert all(isinstance(answer, Granted) for answer in answers)
        granted += keys
        random_.shuffle(granted)
        ended, granted = granted[:15], granted[15:]
        operations: list[Operation] = [Commit(key, USED) if random_.random() < 0.8 else Release(key) for key in ended]
        for answer in await asyncio.gather(*map(owner.call, operations)):
            assert isinstance(answer, Committed | Released)
    assert owner.statistics.snapshots >= 1
    before = await closed(store, owner)
    for clean in (True, False):
        store, owner = await opened(path)
        assert state_of(owner).digest() == before
        # at most once: what is known stays as it was
        assert isinstance(await owner.call(Reserve(granted[0], (CALL,))), Granted)
        assert set(state_of(owner).open) == set(granted)
        assert isinstance(await owner.call(Commit(granted.pop(), USED)), Committed)
        before = await closed(store, owner, 5 if clean else 0)


async def test_a_wait_ends_by_itself_and_by_room(tmp_path: Path) -> None:
    store, owner = await opened(tmp_path / "store.db")
    few = DefinePool("pool", PROFILE, (Limit(Dimension.CONCURRENCY, Window.NONE, 1),))
    await owner.call(few)
    assert isinstance(await owner.call(Reserve("one", (CALL,))), Granted)
    waits = asyncio.create_task(owner.call(Reserve("two", (CALL,), max_wait_us=5_000_000)))
    gives_up = asyncio.create_task(owner.call(Reserve("three", (CALL,), max_wait_us=60_000)))
    await asyncio.sleep(0.2)
    assert not waits.done()
    assert isinstance(await gives_up, Denied)
    await owner.call(Release("one"))
    assert isinstance(await asyncio.wait_for(waits, 1), Granted)
    await closed(store, owner)


async def test_an_operation_that_makes_the_engine_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, owner = await opened(tmp_path / "store.db")
    await owner.call(POOL)

    step = Engine.step

    def fails(self: Engine, now: int, operations: Sequence[tuple[int, Operation]]) -> Step:
        result = step(self, now, operations)
        if any(isinstance(operation, SetPaused) for _, operation in operations):
            raise ZeroDivisionError
        return result

    monkeypatch.setattr(Engine, "step", fails)
    operations: list[Operation] = [Reserve("a", (CALL,)), SetPaused("pool", True), Reserve("b", (CALL,))]
    answers = await asyncio.gather(*map(owner.call, operations), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Granted, LedgerFault, Granted]
    assert not state_of(owner).pools["pool"].paused
    assert owner.phase is Phase.SERVING
    digest = await closed(store, owner, 0)
    store, owner = await opened(tmp_path / "store.db")
    assert state_of(owner).digest() == digest
    await closed(store, owner)


RESERVE_FOR_EVER = """
import asyncio, os, pathlib, sys
from tests.ledger.test_owner_engine import CALL, POOL, USED
from paceline.engine.operations import Commit, Reserve
from paceline.ledger.owner import Owner, OwnerOptions
from paceline.ledger.sqlite import SqliteStore
async def main():
    store = SqliteStore(pathlib.Path(sys.argv[1]))
    await store.open()
    owner = Owner("acme", store.journal("acme"), options=OwnerOptions(snapshot_events=400, check_events=150))
    await owner.start()
    await owner.call(POOL)
    async def one(name):
        number = 0
        while True:
            number += 1
            key = f"{sys.argv[2]}-{name}-{number}"
            await owner.call(Reserve(key, (CALL,)))
            os.write(1, f"open {key}\\n".encode())
            if number % 3:
                await owner.call(Commit(key, USED))
                os.write(1, f"ended {key}\\n".encode())
    await asyncio.gather(*(one(name) for name in range(8)))
asyncio.run(main())
"""


@pytest.mark.process
async def test_killed_while_serving_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    random_ = random.Random(11)
    opened_, ended = set[str](), set[str]()
    for life in range(5):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RESERVE_FOR_EVER, str(path), str(life), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        first = await process.stdout.readline()
        reading = asyncio.create_task(process.stdout.read())
        await asyncio.sleep(random_.uniform(0.1, 0.6))
        process.send_signal(signal.SIGKILL)
        lines = (first + await reading).decode().split("\n")[:-1]
        await process.wait()
        for line in lines:
            kind, key = line.split()
            (opened_ if kind == "open" else ended).add(key)
        store, owner = await opened(path)
        state = state_of(owner)
        assert opened_ <= set(state.open) | set(state.ended)
        assert ended <= set(state.ended)
        for bucket in state.buckets:
            assert bucket.granted == bucket.settled + bucket.released + bucket.expired + bucket.held
        # not stopped in order either: the next life reads what this one journalled
        await closed(store, owner, 0)
    print(f"{len(opened_)} grants and {len(ended)} ends in 5 lives")


@pytest.mark.slow
async def test_how_fast_pairs_go_through(tmp_path: Path) -> None:
    store, owner = await opened(tmp_path / "store.db", OwnerOptions(snapshot_events=10**9, snapshot_bytes=10**12))
    await owner.call(POOL)
    pairs, done = 50_000, 0
    finished = asyncio.Event()

    def reply(answer: Answer | LedgerError) -> None:
        nonlocal done
        assert isinstance(answer, Committed | Granted)
        done += 1
        if done == 2 * pairs:
            finished.set()

    started, used = time.perf_counter(), time.process_time()
    for start in range(0, pairs, 50):
        for number in range(start, start + 50):
            owner.submit(Reserve(str(number), (CALL,)), reply)
        await asyncio.sleep(0)
        for number in range(start, start + 50):
            owner.submit(Commit(str(number), USED), reply)
        while owner.waiting > 4_000:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await finished.wait()
    took, used = time.perf_counter() - started, time.process_time() - used
    statistics = owner.statistics
    print(
        f"{pairs / took:.0f} pairs/s, {used / pairs * 1e6:.1f} µs of CPU a pair; {statistics.appends} appends, "
        f"{statistics.append_us / statistics.appends:.0f} µs each, {statistics.journal_bytes / pairs:.0f} bytes a pair"
    )
    digest = state_of(owner).digest()
    await closed(store, owner, 0)
    started = time.perf_counter()
    store, owner = await opened(tmp_path / "store.db")
    took = time.perf_counter() - started
    assert state_of(owner).digest() == digest
    print(f"{owner.statistics.replayed_events} events replayed in {took:.2f} s")
    started = time.perf_counter()
    await closed(store, owner, 30)
    print(f"stopped with a snapshot in {time.perf_counter() - started:.2f} s")


def test_a_snapshot_of_another_ledger_is_refused() -> None:
    with pytest.raises(ValueError, match="another ledger"):
        EngineMachine().restore("other", State("acme").dump())
