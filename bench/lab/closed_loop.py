"""One fleet, the real engine and the simulated upstream in a closed loop on a virtual clock.

What flows is what flows in production: a Reserve, the call with its delays, the response's headers through the real
parser as an early Renew, the Commit; and after a refusal the SDK's back-off and a new Reserve. Only the wire is left
out; its delays are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from heapq import heappop, heappush
from uuid import UUID

from bench.workloads import WORKLOADS, Modulated, Size, arrivals, seeded
from paceline.engine.accounting import Estimate, UsageKind
from paceline.engine.accounting import Usage as EngineUsage
from paceline.engine.answers import Answer, Denied, Granted
from paceline.engine.engine import Engine
from paceline.engine.operations import Candidate, Commit, Disposition, Outcome, Priority, Renew, Reserve
from paceline.providers.catalogue import AccountSetup, Catalogue, Target
from paceline.providers.headers import parse
from paceline.upstream import Accepted, Account, Call, Config, Group, Refused, limit_used, mark
from paceline.upstream.headers import limit_headers, retry_headers

SECOND = 1_000_000
EPOCH = 1_790_000_000 * SECOND
_RETRIES = 2


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run. Seconds, tokens, amounts per minute; parts of one."""

    seed: int
    model: str = "claude-fable-5-1"
    tier: str = "scale"
    limits: Mapping[str, int] = field(
        default_factory=lambda: {"requests": 4_000, "input_tokens": 4_000_000, "output_tokens": 800_000}
    )
    burst_seconds: float = 60.0
    initial: float = 0.2
    warmup_s: float = 8.0
    window_s: float = 60.0
    deadline_s: float = 30.0
    first_byte_s: float = 0.4
    tokens_per_second: float = 80.0
    chunk_s: float = 0.25
    delay_s: tuple[float, float] = (0.002, 0.03)
    """Between the coordinator and a caller, and between a caller and the upstream: drawn anew each time."""
    our_error: tuple[float, float] = (0.9, 1.2)
    """The client's estimate ÷ the true input: between these, evenly."""
    their_bias: float = 1.1
    """The upstream's estimate on arrival ÷ the true input."""
    their_spread: float = 0.1
    early_usage: bool = True
    """Streams tell their exact input with the first event."""
    chat: Modulated | None = None
    """Arrivals of interactive calls (streamed); ``None``: 40 % of the input limit in the mean, in bursts above it."""
    chat_workload: str = "conversation"
    batch_workload: str = "code"
    workers: int = 100
    """Batch workers, each with a call under way at all times (not streamed)."""
    max_tokens: int = 1_024

    @property
    def traffic(self) -> Modulated:
        """The arrivals of interactive calls."""
        if self.chat is not None:
            return self.chat
        calls = self.limits["input_tokens"] / 60 / WORKLOADS[self.chat_workload].fresh.mean
        return Modulated(0.20 * calls, 1.20 * calls, 12.0, 3.0)


@dataclass(slots=True)
class _Call:
    """One call of the application."""

    tenant: str
    priority: Priority
    size: Size
    begun: int
    deadline: int
    stream: bool
    done: Callable[[], None]
    attempts: int = 0
    waited: int | None = None
    """From the application's call to the attempt that was accepted."""
    fate: str = ""


@dataclass(slots=True)
class Figures:
    """What came of it, by the upstream's own log; waits in seconds."""

    used: dict[str, float]
    accepted: int
    refused: int
    refused_by: dict[str, int]
    offered: dict[str, int]
    lost: dict[str, int]
    waits: dict[str, list[float]]

    @property
    def refused_per_1000(self) -> float:
        """Refusals for each thousand calls that were accepted."""
        return 1_000 * self.refused / max(1, self.accepted)

    def wait(self, priority: str, part: float) -> float:
        """A quantile of the waits of one priority."""
        waits = sorted(self.waits[priority])
        return waits[min(len(waits) - 1, int(part * len(waits)))] if waits else 0.0


class Loop:
    """One run."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.now = EPOCH
        self.random = seeded(setting.seed, "loop")
        group = Group(name="models", models=("claude-*",), limits=dict(setting.limits))  # type: ignore[arg-type]
        config = Config(
            groups=(group,),
            burst_seconds=setting.burst_seconds,
            initial=setting.initial,
            estimate_spread=setting.their_spread,
            seed=setting.seed,
        )
        self.account = Account(self.now, config, random.Random(setting.seed))
        catalogue = Catalogue(accounts={"default": AccountSetup("anthropic", tier=setting.tier)})
        self.resolved = catalogue.resolve(Target(model=setting.model))
        self.engine = Engine("default")
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = 0
        self._answers: dict[int, Callable[[Answer], None]] = {}
        self._wake: int | None = None
        self._keys = 0
        self.calls: list[_Call] = []
        self._step(self.resolved.definition)

    # -- the clock ----------------------------------------------------------------------------------------------

    def _at(self, instant: int, what: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._events, (instant, self._serial, what))

    def _after(self, seconds: float, what: Callable[[], None]) -> None:
        self._at(self.now + int(seconds * SECOND), what)

    def _delay(self) -> float:
        return self.random.uniform(*self.setting.delay_s)

    def run(self) -> Figures:
        """Run to the end of the window, and on until every call offered in it has its fate."""
        setting = self.setting
        start = EPOCH + int(setting.warmup_s * SECOND)
        end = start + int(setting.window_s * SECOND)
        total = setting.warmup_s + setting.window_s
        spans = setting.traffic.spans(total, seeded(setting.seed, "spans"))
        sizes = WORKLOADS[setting.chat_workload].sizes(seeded(setting.seed, "chat"))
        for at in arrivals(spans, 1.0, seeded(setting.seed, "arrivals")):
            self._at(EPOCH + int(at * SECOND), lambda: self._offer("chat", Priority.INTERACTIVE, next(sizes), True))
        for worker in range(setting.workers):
            self._after(self.random.random() * 0.2, self._worker(worker, end))
        self._until(start)
        first = mark(self.account, self.now)
        self._until(end)
        last = mark(self.account, self.now)
        counts = [call for call in self.account.calls if first.logged < call.number <= last.logged]
        self._until(end + int((setting.deadline_s + 1) * SECOND))
        used = limit_used(self.account, first, last)["models"]
        offered = [call for call in self.calls if start <= call.begun < end]
        by: dict[str, int] = {}
        for call in counts:
            if call.status == "refused":
                by[call.dimension] = by.get(call.dimension, 0) + 1
        return Figures(
            {dimension: each.part for dimension, each in used.items()},
            sum(call.status == "accepted" for call in counts),
            sum(by.values()),
            by,
            {name: sum(call.tenant == name for call in offered) for name in ("chat", "batch")},
            {name: sum(call.tenant == name and call.fate != "ok" for call in offered) for name in ("chat", "batch")},
            {
                name: [call.waited / SECOND for call in offered if call.tenant == name and call.waited is not None]
                for name in ("chat", "batch")
            },
        )

    def _until(self, instant: int) -> None:
        while True:
            event = self._events[0][0] if self._events else instant + 1
            wake = self._wake if self._wake is not None else instant + 1
            due = min(event, wake)
            if due > instant:
                break
            self.now = max(self.now, due)
            if wake <= event:
                self._step()
            else:
                heappop(self._events)[2]()
        self.now = instant
        self.account.advance(instant)

    # -- the coordinator ----------------------------------------------------------------------------------------

    def _step(self, *operations: object, answer: Callable[[Answer], None] | None = None) -> None:
        tickets = []
        for operation in operations:
            self._serial += 1
            tickets.append((self._serial, operation))
            if answer is not None:
                self._answers[self._serial] = answer
        step = self.engine.step(self.now, tickets)  # type: ignore[arg-type]
        self._wake = step.wake_at
        for ticket, given in step.answers:
            waiting = self._answers.pop(ticket, None)
            if waiting is not None:
                self._after(self._delay(), lambda waiting=waiting, given=given: waiting(given))  # type: ignore[misc]

    # -- the fleet ------------------------------------------------------------------------------------------------

    def _worker(self, worker: int, end: int) -> Callable[[], None]:
        sizes = WORKLOADS[self.setting.batch_workload].sizes(seeded(self.setting.seed, "batch", worker))

        def next_call() -> None:
            if self.now < end:
                self._offer("batch", Priority.BATCH, next(sizes), False, lambda: self._after(0.001, next_call))

        return next_call

    def _offer(
        self, tenant: str, priority: Priority, size: Size, stream: bool, done: Callable[[], None] = lambda: None
    ) -> None:
        deadline = self.now + int(self.setting.deadline_s * SECOND)
        call = _Call(tenant, priority, size, self.now, deadline, stream, done)
        self.calls.append(call)
        self._reserve(call)

    def _end(self, call: _Call, fate: str) -> None:
        if not call.fate:
            call.fate = fate if self.now <= call.deadline else "late"
            call.done()

    def _reserve(self, call: _Call) -> None:
        left = call.deadline - self.now
        if left <= 0:
            self._end(call, "deadline")
            return
        self._keys += 1
        key = f"me/{UUID(int=self._keys)}"
        estimate = Estimate(
            input_tokens=max(1, round(call.size.input * self.random.uniform(*self.setting.our_error))),
            max_output_tokens=self.setting.max_tokens,
        )
        candidate = Candidate(self.resolved.pool, (), estimate, self.resolved.prices)
        operation = Reserve(
            key, (candidate,), tenant=call.tenant, priority=call.priority, max_wait_us=left, hold_us=120 * SECOND
        )

        def answered(answer: Answer) -> None:
            if isinstance(answer, Granted):
                self._after(self._delay(), lambda: self._arrive(call, key))
            else:
                assert isinstance(answer, Denied), answer
                self._end(call, "denied")

        self._after(self._delay(), lambda: self._step(operation, answer=answered))

    # -- the upstream ---------------------------------------------------------------------------------------------

    def _arrive(self, call: _Call, key: str) -> None:
        setting, size = self.setting, call.size
        call.attempts += 1
        attempt = Call(
            id=key,
            model=setting.model,
            estimate=max(1, round(size.input * setting.their_bias)),
            input=size.input,
            output=min(size.output, setting.max_tokens),
            tenant=call.tenant,
            stream=call.stream,
        )
        outcome = self.account.arrive(self.now, attempt)
        if isinstance(outcome, Accepted):
            call.waited = self.now - call.begun
            first = max(setting.first_byte_s, 0.0)
            self._after(first, lambda: self._started(call, key, attempt))
        else:
            assert isinstance(outcome, Refused)
            headers = {**self._headers(), **retry_headers(outcome, "anthropic")}
            message = f"This request would exceed the limit of {outcome.dimension.replace('_', ' ')} per minute"
            self._after(0.005 + self._delay(), lambda: self._refused(call, key, headers, message, outcome))

    def _headers(self) -> dict[str, str]:
        return limit_headers(self.account, self.account.groups["models"], self.now, 0)

    def _read(self, headers: dict[str, str], status: int, sent: int, message: str = "") -> object:
        pairs = [(name, value.encode()) for name, value in headers.items()]
        pairs.append(("date", _http_date(sent)))
        kind = "rate_limit_error" if status == 429 else ""
        return parse(self.resolved.header_family, pairs, status, kind, message, None, self.now - sent)

    def _started(self, call: _Call, key: str, attempt: Call) -> None:
        self.account.started(self.now, attempt)
        if call.stream:
            headers, sent = self._headers(), self.now
            usage = EngineUsage(input_tokens=call.size.input) if self.setting.early_usage else None

            def report() -> None:
                observation = self._read(headers, 200, sent)
                self._step(Renew(key, observation=observation, usage=usage))  # type: ignore[arg-type]

            self._after(2 * self._delay(), report)
        self._produce(call, key, attempt, float(attempt.output))

    def _produce(self, call: _Call, key: str, attempt: Call, left: float) -> None:
        setting = self.setting
        piece = setting.tokens_per_second * setting.chunk_s
        if left > piece:
            self._after(setting.chunk_s, lambda: self._produced(call, key, attempt, left, piece))
        else:
            self._after(left / setting.tokens_per_second, lambda: self._produced(call, key, attempt, left, left))

    def _produced(self, call: _Call, key: str, attempt: Call, left: float, piece: float) -> None:
        if self.now > call.deadline and not call.fate:
            self.account.ended(self.now, attempt, "gone")
            self._end(call, "late")
            outcome = Outcome(Disposition.ABORTED, None, UsageKind.MISSING)
            self._after(self._delay(), lambda: self._step(Commit(key, outcome)))
            return
        left -= piece
        before = attempt.output - int(left + piece)
        self.account.produced(self.now, attempt, attempt.output - int(left) - before)
        if left > 0:
            self._produce(call, key, attempt, left)
            return
        self.account.ended(self.now, attempt, "finished")
        headers, sent = self._headers(), self.now
        self._end(call, "ok")

        def commit() -> None:
            observation = None if call.stream else self._read(headers, 200, sent)
            usage = EngineUsage(input_tokens=call.size.input, output_tokens=attempt.produced)
            outcome = Outcome(Disposition.SUCCEEDED, usage, UsageKind.FINAL, observation)  # type: ignore[arg-type]
            self._step(Commit(key, outcome))

        self._after(2 * self._delay(), commit)

    def _refused(self, call: _Call, key: str, headers: dict[str, str], message: str, refused: Refused) -> None:
        observation = self._read(headers, 429, self.now - 5_000, message)
        outcome = Outcome(Disposition.REJECTED, None, UsageKind.MISSING, observation)  # type: ignore[arg-type]
        self._after(self._delay(), lambda: self._step(Commit(key, outcome)))
        if call.attempts > _RETRIES:
            self._end(call, "refused")
        else:
            self._after(float(refused.retry_after or 1), lambda: self._reserve(call))


def _http_date(at: int) -> bytes:
    return formatdate(at // SECOND, usegmt=True).encode()


def run(setting: Setting) -> Figures:
    """Run one setting."""
    return Loop(setting).run()
