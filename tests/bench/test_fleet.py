"""The fleet: what a caller process offers, and what it says became of its calls, against the real simulator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import anthropic
import msgspec
import pytest

from bench.demo.settings import MODES, Settings
from bench.fleet import caller as caller_module
from bench.fleet.application import Application, application, own_time
from bench.fleet.caller import Caller
from bench.fleet.plan import SHIPPED_RETRIES, Plan, Record, Report, Settled, Start, retries
from bench.workloads import Size, Span
from paceline.upstream.http.server import Upstream
from paceline.upstream.settings import Scenario

SIZE = Size(700, 0, 40)
FAST = Scenario(first_byte_ms=5, tokens_per_second=0)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream.start(scenario=FAST) as running:
        yield running


def plan(upstream: str = "", stream: bool = True, deadline: float = 10.0, **rest: object) -> Plan:
    fields: dict[str, object] = {
        "tenant": "chat-1",
        "priority": "interactive",
        "mode": "alone",
        "upstream": upstream,
        "model": "claude-sonnet-5",
        "workload": "conversation",
        "seed": 1,
        "deadline_s": deadline,
        "stream": stream,
        **rest,
    }
    return msgspec.convert(fields, Plan)


def test_modes_differ_in_nothing_but_the_client() -> None:
    settings = Settings(seed=5)
    fleets = [
        [msgspec.structs.replace(each, mode="alone") for each in settings.plans(mode, "u", None)] for mode in MODES
    ]
    assert fleets[0] == fleets[1] == fleets[2]
    assert SHIPPED_RETRIES == anthropic.DEFAULT_MAX_RETRIES
    assert [retries(mode) for mode in MODES] == [2, 1_000_000, 2]


def test_the_fleet_is_the_one_that_is_told_of() -> None:
    plans = Settings(seed=5).plans("paceline", "u", "c")
    assert sorted({(each.tenant[:-2], each.priority, each.stream) for each in plans}) == [
        ("batch", "batch", False),
        ("chat", "interactive", True),
    ]
    assert sum(each.workers for each in plans) >= 80
    assert sum(each.part for each in plans if each.spans) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(10))
def test_chat_wants_two_fifths_of_the_limit_with_bursts_above_it(seed: int) -> None:
    settings = Settings(seed=seed)
    spans = settings.spans()
    calls = settings.limits["input_tokens"] / 60 / 1_149
    inside = [
        each for each in spans if each.end > settings.warmup_s and each.start < settings.warmup_s + settings.window_s
    ]
    wanted = sum(
        (min(each.end, settings.warmup_s + settings.window_s) - max(each.start, settings.warmup_s)) * each.rate
        for each in inside
    )
    assert wanted / settings.window_s / calls == pytest.approx(0.4, abs=0.03)
    assert max(each.rate for each in inside) > 1.1 * calls


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answered_call(upstream: Upstream, stream: bool) -> None:
    async with application(plan(upstream.url, stream)) as app:
        record = await app.call(SIZE, 0.5)
    assert (record.fate, record.attempts) == ("answered", 1)
    assert record.sent is not None
    assert record.begun <= record.sent <= record.ended
    (seen,) = upstream.account.calls
    # Sizes are what the upstream counts, to the token.
    assert (seen.input, seen.produced, seen.stream) == (SIZE.input, SIZE.output, stream)
    assert (seen.id, seen.tenant) == (record.call, "chat-1")


async def test_a_refused_attempt_is_one_of_the_calls_attempts(upstream: Upstream) -> None:
    upstream.change(refuse_next=1)
    async with application(plan(upstream.url)) as app:
        record = await app.call(SIZE, 0.0)
    assert (record.fate, record.attempts) == ("answered", 2)
    assert record.sent is not None
    assert record.sent - record.begun >= 0.9, "the wait runs until the attempt that was accepted"
    assert {call.id for call in upstream.account.calls} == {record.call}


async def test_shipped_retries_give_up_and_patient_ones_meet_the_deadline(upstream: Upstream) -> None:
    upstream.change(refuse_next=1_000)
    async with (
        application(plan(upstream.url)) as app,
        application(plan(upstream.url, deadline=4.5, mode="alone_patient")) as patient,
    ):
        one, other = await asyncio.gather(app.call(SIZE, 0.0), patient.call(SIZE, 0.0))
    assert (one.fate, one.attempts) == ("RateLimitError", 3)
    assert other.fate == "deadline"
    assert other.attempts >= 4
    assert other.ended - other.begun == pytest.approx(4.5, abs=1.0)


async def test_a_slow_answer_is_lost_at_the_deadline(upstream: Upstream) -> None:
    upstream.change(first_byte_ms=0, tokens_per_second=10.0)
    async with application(plan(upstream.url, deadline=0.4)) as app:
        record = await app.call(SIZE, 0.0)
    assert (record.fate, record.attempts) == ("deadline", 1)


async def test_a_cut_stream_is_lost(upstream: Upstream) -> None:
    upstream.change(stream_error_next=1)
    async with application(plan(upstream.url)) as app:
        record = await app.call(SIZE, 0.0)
    assert not record.answered
    assert record.attempts == 1


async def test_the_sdks_own_time_is_small(upstream: Upstream) -> None:
    taken = await own_time(plan(upstream.url), 5)
    assert len(taken) == 5
    assert 0 < min(taken) < 0.5


class Recorder(Application):
    """Instead of calling: remembers what it was asked. Of every ``of`` calls, only the last one is answered."""

    def __init__(self, plan: Plan, seconds: float = 0.01, of: int = 1) -> None:
        super().__init__(plan, anthropic.AsyncAnthropic(api_key="none"), {})
        self.asked: list[Size] = []
        self.items: list[tuple[Size, float]] = []
        self.seconds = seconds
        self.of = of

    async def call(self, size: Size, start: float) -> Record:
        self.asked.append(size)
        self.items.append((size, start))
        begun = time.monotonic()
        fate = "RateLimitError" if len(self.asked) % self.of else "answered"
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            fate = "cut"
        return Record(
            call=str(len(self.asked)),
            tenant="t",
            begun=begun,
            sent=begun,
            ended=time.monotonic(),
            attempts=1,
            fate=fate,
            input_tokens=size.input,
            output_tokens=size.output,
        )


async def offered(given: Plan, seconds: float = 0.01) -> tuple[Recorder, Caller, list[Report]]:
    """Run a plan for half a second, with a window in the middle of it."""
    told: list[Report] = []
    app = Recorder(given, seconds)
    at = time.monotonic() + 0.05
    caller = Caller(given, app, Start(at=at, window_start=at + 0.1, window_end=at + 0.4, end=at + 0.5), told.append)
    await caller.run()
    return app, caller, told


async def test_the_same_plan_asks_for_the_same_calls() -> None:
    spans = [Span(0.0, 0.45, 80.0)]
    (one, _, _), (other, _, _) = await asyncio.gather(
        offered(plan(spans=spans)), offered(plan(spans=spans, mode="paceline", upstream="x"), 0.001)
    )
    assert one.asked == other.asked != []
    (third, _, _) = await offered(plan(spans=spans, seed=2))
    assert third.asked != one.asked


async def worked(of: int, seconds: float) -> tuple[Recorder, list[Report]]:
    """What one batch worker does in so many seconds; the window holds all of them."""
    given = plan(workers=1, stream=False, workload="code")
    told: list[Report] = []
    app = Recorder(given, 0.002, of)
    now = time.monotonic()
    # The start is long past, so that the worker does not wait for its place in the first second.
    start = Start(at=now - 5.0, window_start=now, window_end=now + seconds + 1, end=now + seconds)
    await Caller(given, app, start, told.append).run()
    return app, told


async def test_a_batch_worker_keeps_its_item_until_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller_module, "_PAUSE_S", (0.001, 0.003))
    (quick, _), (hard, told) = await asyncio.gather(worked(1, 0.4), worked(3, 0.4))
    # The same size and the same text, three times; then the next: the ones that everybody has, in the same order.
    kept = hard.items[::3]
    assert len(kept) > 5
    assert hard.items == [item for item in kept for _ in range(3)][: len(hard.items)]
    assert kept == quick.items[: len(kept)]
    assert len(set(kept)) == len(kept)
    # Each time is an offered call of its own.
    fates = [each.fate for each in told if isinstance(each, Record)]
    assert len(fates) == len(hard.items)
    assert fates.count("RateLimitError") >= 2 * fates.count("answered") > 0


async def test_a_batch_worker_whose_call_fails_at_once_does_not_spin() -> None:
    app, _ = await worked(1_000, 1.2)
    gone = len(app.items)
    assert 1.2 / 0.5 - 1 <= gone <= 1.2 / 0.1 + 1
    assert len(set(app.items)) == 1


async def test_every_call_of_the_window_is_told_of_once_and_then_it_is_settled() -> None:
    for given in (plan(spans=[Span(0.0, 0.5, 200.0)]), plan(workers=5, stream=False)):
        app, caller, told = await offered(given, 0.03)
        records = [each for each in told if isinstance(each, Record)]
        assert len(records) == caller.offered > 0
        assert len(app.asked) > caller.offered, "calls outside of the window are offered as well"
        assert told.count(Settled()) == 1
        assert isinstance(told[-1], Settled)


async def test_what_is_under_way_at_the_end_is_cut_and_told() -> None:
    for given in (plan(workers=40), plan(spans=[Span(0.0, 0.5, 100.0)])):
        _, caller, told = await offered(given, 60.0)
        records = [each for each in told if isinstance(each, Record)]
        assert {each.fate for each in records} == {"cut"}
        assert len(records) == caller.offered > 0
