"""The application's side: who calls, for how long they wait, and what they do when they are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import UUID

from bench.lab.clock import EPOCH, SECOND, Clock
from bench.lab.coordinator import Coordinator
from bench.lab.service import Service, read
from bench.lab.setting import KINDS, MODEL, Setting, Source
from bench.workloads import Modulated, Size, arrivals, seeded
from paceline.engine.accounting import Estimate, UsageKind
from paceline.engine.accounting import Usage as EngineUsage
from paceline.engine.answers import Answer, Denied, Granted
from paceline.engine.operations import Candidate, Commit, Disposition, Observation, Outcome, Release, Renew, Reserve
from paceline.upstream import Accepted, Call, Overloaded

RETRIES = 2
"""As the official SDKs."""
_BACKOFF_S = (0.5, 8.0)
_PAUSE_S = 1.0
"""A worker whose call was lost waits so long before its next one."""


@dataclass(slots=True)
class Task:
    """One call of the application, with all its attempts."""

    source: Source
    size: Size
    begun: int
    deadline: int
    done: Callable[[bool], None]
    """Called at the end, with whether there was an answer in time."""
    attempts: int = 0
    on_the_way: float = 0.0
    """Seconds that its messages have been under way, up to the attempt that was accepted."""
    waited: int | None = None
    """From the application's call to the attempt that was accepted, µs."""
    fate: str = ""


class Attempt:
    """One attempt at the upstream: what the ledger knew of it when it let it go."""

    __slots__ = ("at", "avoidable", "dimension")

    def __init__(self, at: int, dimension: str, avoidable: bool) -> None:
        self.at = at
        self.dimension = dimension
        self.avoidable = avoidable


class Fleet:
    """All callers."""

    def __init__(self, clock: Clock, setting: Setting, coordinator: Coordinator, service: Service) -> None:
        self._clock = clock
        self._setting = setting
        self._coordinator = coordinator
        self._service = service
        self._chance = seeded(setting.seed, "fleet")
        self.tasks: list[Task] = []
        self.refused: list[Attempt] = []
        """Each 429."""
        self.ends = EPOCH + 10**15
        """Nobody begins a call after that."""
        self.silent_until = 0
        self._keys = 0

    def start(self, seconds: float) -> None:
        """Begin; calls by arrivals are drawn for so long."""
        for source in self._setting.all_sources():
            chance = seeded(self._setting.seed, "sizes", source.name)
            sizes = KINDS[source.workload].sizes(chance)
            if source.arrivals is not None:
                for at in _times(source, seconds, self._setting.seed):
                    self._clock.at(EPOCH + int(at * SECOND), self._arrival(source, sizes))
            for worker in range(source.workers):
                own = KINDS[source.workload].sizes(seeded(self._setting.seed, source.name, worker))
                self._clock.after(self._chance.random() * 0.2, self._worker(source, own))

    def _arrival(self, source: Source, sizes: Iterator[Size]) -> Callable[[], None]:
        def arrive() -> None:
            if self.silent_until <= self._clock.now < self.ends:
                self._begin(source, next(sizes), lambda _: None)

        return arrive

    def _worker(self, source: Source, sizes: Iterator[Size]) -> Callable[[], None]:
        def next_call() -> None:
            now = self._clock.now
            if now < self.silent_until:
                self._clock.at(self.silent_until + int(self._chance.random() * 0.2 * SECOND), next_call)
            elif now < self.ends:
                self._begin(source, next(sizes), done)

        def done(answered: bool) -> None:
            self._clock.after(0.001 if answered else _PAUSE_S, next_call)

        return next_call

    def _begin(self, source: Source, size: Size, done: Callable[[bool], None]) -> None:
        size = size._replace(output=min(size.output, source.max_tokens))
        now = self._clock.now
        task = Task(source, size, now, now + int(source.deadline_s * SECOND), done)
        self.tasks.append(task)
        self._reserve(task)

    def _end(self, task: Task, fate: str) -> None:
        if not task.fate:
            task.fate = fate if self._clock.now <= task.deadline else "late"
            task.done(task.fate == "ok")

    # -- the ledger ---------------------------------------------------------------------------------------------------

    def _estimate(self, source: Source, size: Size) -> Estimate:
        setting = self._setting
        if setting.estimates == "none":
            return Estimate(max_output_tokens=source.max_tokens)
        error = self._chance.uniform(*setting.our_error) * setting.our_factor
        output = None
        if setting.our_factor != 1.0:
            output = max(1, round(KINDS[source.workload].output.mean * setting.our_factor))
        if setting.estimates == "cached":
            return Estimate(
                input_tokens=max(1, round((size.input - size.cached) * error)),
                cached_input_tokens=size.cached,
                output_tokens=output,
                max_output_tokens=source.max_tokens,
            )
        return Estimate(
            input_tokens=max(1, round(size.input * error)), output_tokens=output, max_output_tokens=source.max_tokens
        )

    def _reserve(self, task: Task) -> None:
        clock, source, resolved = self._clock, task.source, self._coordinator.resolved
        left = task.deadline - clock.now
        if left <= 0:
            self._end(task, "deadline")
            return
        self._keys += 1
        key = f"me/{UUID(int=self._keys)}"
        candidate = Candidate(resolved.pool, (), self._estimate(source, task.size), resolved.prices)
        operation = Reserve(
            key,
            (candidate,),
            tenant=source.name,
            route=source.name,
            priority=source.priority,
            max_wait_us=left,
            hold_us=int(self._setting.hold_s * SECOND),
        )
        asked_at = clock.now

        def answered(answer: Answer, known: int) -> None:
            if isinstance(answer, Granted):
                way = self._coordinator.delay()
                waited = answer.waited_us / SECOND
                task.on_the_way += way + max(0.0, (clock.now - asked_at) / SECOND - waited)
                clock.after(way, lambda: self._arrive(task, key, known))
            else:
                assert isinstance(answer, Denied), answer
                self._end(task, "denied")

        self._coordinator.send(operation, answered)

    def _renew_at_half(self, task: Task, key: str, attempt: Call) -> None:
        """As client libraries do: a call that takes long is renewed at half of its hold, with its output so far."""
        hold_s = self._setting.hold_s

        def renew() -> None:
            if attempt.ended or task.fate:
                return
            hold_us = int(hold_s * SECOND)
            self._coordinator.send(Renew(key, hold_us=hold_us, output_tokens=attempt.produced or None))
            self._clock.after(hold_s / 2, renew)

        self._clock.after(hold_s / 2, renew)

    # -- the upstream -------------------------------------------------------------------------------------------------

    def _arrive(self, task: Task, key: str, known: int) -> None:
        size, service, clock = task.size, self._service, self._clock
        if clock.now > task.deadline:
            self._coordinator.send(Release(key))
            self._end(task, "late")
            return
        task.attempts += 1
        fresh = size.input - size.cached
        attempt = Call(
            id=key,
            model=MODEL,
            estimate=max(1, round(fresh * self._setting.their_bias)),
            input=fresh,
            cache_read=size.cached,
            output=size.output,
            max_tokens=task.source.max_tokens,
            tenant=task.source.name,
            stream=task.source.streamed,
        )
        outcome = service.arrive(attempt)
        if isinstance(outcome, Accepted):
            task.waited = clock.now - task.begun
            clock.after(self._setting.first_byte_s, lambda: self._started(task, key, attempt))
            return
        way = 0.005 + self._coordinator.delay()
        if isinstance(outcome, Overloaded):
            clock.after(way, lambda: self._overloaded(task, key))
            return
        avoidable = not known < service.changed_at <= clock.now
        self.refused.append(Attempt(clock.now, outcome.dimension, avoidable))
        headers, message, code = service.refusal(outcome)
        observation, taken = self._read(headers, 429, message, code), clock.now
        clock.after(way, lambda: self._refused(task, key, observation, float(outcome.retry_after or 1), taken))

    def _started(self, task: Task, key: str, attempt: Call) -> None:
        service, clock, source = self._service, self._clock, task.source
        service.account.started(clock.now, attempt)
        if source.streamed:
            headers, taken = service.headers(), clock.now
            usage = self._input_usage(task.size) if self._setting.early_usage else None
            self._renew_at_half(task, key, attempt)
            clock.after(self._coordinator.delay(), lambda: self._report_early(key, headers, taken, usage))

        def goes_on() -> bool:
            if clock.now <= task.deadline or task.fate:
                return True
            service.account.ended(clock.now, attempt, "gone")
            self._end(task, "late")
            self._coordinator.send(Commit(key, Outcome(Disposition.ABORTED, None, UsageKind.MISSING)))
            return False

        service.produce(attempt, goes_on, lambda: self._finished(task, key, attempt))

    def _report_early(self, key: str, headers: dict[str, str], taken: int, usage: EngineUsage | None) -> None:
        late = self._late()
        if not late:
            self._coordinator.send(Renew(key, observation=self._read(headers), usage=usage), taken=taken)
            return
        if usage is not None:
            self._coordinator.send(Renew(key, usage=usage))
        self._send_late(key, headers, taken, late)

    def _finished(self, task: Task, key: str, attempt: Call) -> None:
        headers, taken = self._service.headers(), self._clock.now
        self._end(task, "ok")
        usage = EngineUsage(
            input_tokens=attempt.input, cache_read_tokens=attempt.cache_read, output_tokens=attempt.produced
        )

        def commit() -> None:
            late = self._late()
            if task.source.streamed or late:
                self._coordinator.send(Commit(key, Outcome(Disposition.SUCCEEDED, usage, UsageKind.FINAL)))
                if not task.source.streamed:
                    self._send_late(key, headers, taken, late)
                return
            outcome = Outcome(Disposition.SUCCEEDED, usage, UsageKind.FINAL, self._read(headers))
            self._coordinator.send(Commit(key, outcome), taken=taken)

        self._clock.after(self._coordinator.delay(), commit)

    def _refused(self, task: Task, key: str, observation: Observation | None, after_s: float, taken: int) -> None:
        outcome = Outcome(Disposition.REJECTED, None, UsageKind.MISSING, observation)
        self._coordinator.send(Commit(key, outcome), taken=taken)
        self._retry(task, "refused", after_s)

    def _overloaded(self, task: Task, key: str) -> None:
        observation = self._read({"x-should-retry": "true"}, 529, "Overloaded")
        outcome = Outcome(Disposition.REJECTED, None, UsageKind.MISSING, observation)
        self._coordinator.send(Commit(key, outcome))
        first, most = _BACKOFF_S
        wait = min(first * 2 ** (task.attempts - 1), most)
        self._retry(task, "overloaded", wait * (1 - 0.25 * self._chance.random()))

    def _retry(self, task: Task, fate: str, after_s: float) -> None:
        if task.attempts > RETRIES:
            self._end(task, fate)
        else:
            self._clock.after(after_s, lambda: self._reserve(task))

    # -- headers ------------------------------------------------------------------------------------------------------

    def _read(
        self, headers: dict[str, str], status: int = 200, message: str = "", code: str = "", age_us: int = 0
    ) -> Observation | None:
        return read(self._coordinator.resolved.header_family, headers, status, message, code, age_us)

    def _late(self) -> float:
        late = self._setting.late_s
        return late * self._chance.uniform(2 / 3, 4 / 3) if late else 0.0

    def _send_late(self, key: str, headers: dict[str, str], taken: int, late: float) -> None:
        observation = self._read(headers, age_us=int(late * SECOND))
        self._coordinator.send(Renew(key, observation=observation), taken=taken, late_s=late)

    def _input_usage(self, size: Size) -> EngineUsage:
        return EngineUsage(input_tokens=size.input - size.cached, cache_read_tokens=size.cached)


def _times(source: Source, seconds: float, seed: int) -> list[float]:
    assert source.arrivals is not None
    if isinstance(source.arrivals, Modulated):
        spans = source.arrivals.spans(seconds, seeded(seed, "spans", source.name))
        return arrivals(spans, 1.0, seeded(seed, "arrivals", source.name))
    return source.arrivals.times(seconds, seeded(seed, "arrivals", source.name))
