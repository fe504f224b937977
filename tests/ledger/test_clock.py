from __future__ import annotations

import asyncio

from paceline.ledger.clock import LedgerTime, ManualClock, SystemClock


def test_calls_are_made_at_their_times_and_in_order() -> None:
    clock = ManualClock(monotonic=0, wall=500)
    calls: list[tuple[str, int]] = []

    def note(name: str) -> None:
        calls.append((name, clock.monotonic()))

    def again() -> None:
        note("again")
        clock.call_at(clock.monotonic() + 5, lambda: note("late"))

    clock.call_at(20, lambda: note("second"))
    clock.call_at(10, again)
    clock.call_at(20, lambda: note("third"))
    clock.call_at(12, lambda: note("never")).cancel()
    assert clock.next_timer() == 10
    clock.advance(30)
    assert calls == [("again", 10), ("late", 15), ("second", 20), ("third", 20)]
    assert (clock.monotonic(), clock.wall(), clock.next_timer()) == (30, 530, None)
    clock.call_at(3, lambda: note("past"))
    clock.advance(0)
    assert calls[-1] == ("past", 30)


async def test_sleepers_wake() -> None:
    clock = ManualClock()
    start = clock.monotonic()
    sleeper = asyncio.create_task(clock.sleep_until(start + 100))
    gone = asyncio.create_task(clock.sleep_until(start + 50))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    assert clock.next_timer() == start + 100
    clock.advance(99)
    await asyncio.sleep(0)
    assert not sleeper.done()
    clock.advance(1)
    await sleeper
    await clock.sleep_until(0)


async def test_the_machines_clock() -> None:
    clock = SystemClock()
    start = clock.monotonic()
    called = asyncio.Event()
    clock.call_at(start + 20_000, called.set)
    clock.call_at(start + 1, called.clear).cancel()
    await clock.sleep_until(start + 10_000)
    assert clock.monotonic() - start >= 9_000
    await asyncio.wait_for(called.wait(), 5)
    assert clock.wall() > 1_700_000_000_000_000


def test_ledger_time_never_runs_backwards() -> None:
    clock = ManualClock(monotonic=1_000, wall=50_000)
    assert LedgerTime(clock, 40_000).now() == 50_000
    time = LedgerTime(clock, 60_000)
    assert time.now() == 60_000
    clock.set_wall(0)
    clock.advance(5)
    assert time.now() == 60_005
    assert time.monotonic(60_010) == clock.monotonic() + 5
    time.at_least(60_000)
    assert time.now() == 60_005
    time.at_least(70_000)
    assert time.now() == 70_000
