"""A tiny closed loop on a virtual clock: callers, one engine, and an upstream that refuses as a test says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random

from paceline.engine import events as ev
from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Answer, Denied, Granted
from paceline.engine.dimensions import SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import (
    Candidate,
    Commit,
    DefinePool,
    Disposition,
    Observation,
    Operation,
    Outcome,
    Refusal,
    Renew,
    Reserve,
)
from paceline.engine.state import State

START = 1_790_000_040 * SECOND_US
"""The turn of a minute."""
PROFILE = Profile(
    "both",
    (
        Rule(Dimension.REQUESTS, hold_requests=1_000, settle_requests=1_000),
        Rule(Dimension.INPUT_TOKENS, hold_input=1_000, settle_input=1_000),
    ),
)
ACCEPTED = Observation()
OVERLOADED = Observation(refusal=Refusal.OVERLOAD)
CROWDED = Observation(refusal=Refusal.CONCURRENCY)

Upstream = Callable[[int, int], Observation]
"""What it answers to a call that arrives at an instant, with so many of ours under way there."""


@dataclass
class Traffic:
    """Calls ``a_second``, evenly spread, each of which takes ``lasts`` seconds; seconds, tokens."""

    a_second: float = 20.0
    lasts: float = 3.0
    answers_in: float = 0.6
    refuses_in: float = 0.2
    tokens: int = 1_000
    patience: float = 30.0
    early: bool = True
    """Callers report headers when they arrive, not with the end."""
    backlog: int = 0
    """Calls that come at the start."""


class Loop:
    """Runs traffic against an upstream. ``attempts``, ``accepted`` and ``refused`` are instants at the upstream."""

    def __init__(self, traffic: Traffic, upstream: Upstream, limits: dict[Dimension, int] | None = None) -> None:
        self.traffic, self.upstream = traffic, upstream
        self.now = START
        self.engine = Engine("loop")
        self.journal: list[ev.Event] = []
        self.random = Random(1)
        self.under_way = 0
        self.attempts: list[int] = []
        self.accepted: list[int] = []
        self.refused: list[int] = []
        self.denied: list[Denied] = []
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = 0
        self._wake: int | None = None
        amounts = {Dimension.REQUESTS: 60_000, Dimension.INPUT_TOKENS: 60_000_000} | (limits or {})
        self.step(DefinePool("p", PROFILE, tuple(Limit(d, Window.MINUTE, amount) for d, amount in amounts.items())))

    @property
    def state(self) -> State:
        return self.engine.state

    def run(self, seconds: float) -> None:
        """Go on for so long, with calls coming all the time."""
        until = self.now + round(seconds * SECOND_US)
        for _ in range(self.traffic.backlog):
            self.at(self.now, self.call)
        self.traffic.backlog = 0
        number, every = 0, SECOND_US / self.traffic.a_second
        while (instant := self.now + round(number * every)) < until:
            self.at(instant, self.call)
            number += 1
        self.idle(until)

    def idle(self, until: int) -> None:
        """Let what is under way go on, with no new calls."""
        while True:
            due = min(
                [at for at in (self._wake, self._queue[0][0] if self._queue else None) if at is not None], default=until
            )
            if due >= until:
                break
            self.now = due
            if self._queue and self._queue[0][0] <= due:
                heappop(self._queue)[2]()
            else:
                self.step()
        self.now = until

    def at(self, instant: int, what: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._queue, (instant, self._serial, what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self.at(self.now + round(seconds * SECOND_US * self.random.uniform(0.8, 1.2)), what)

    def step(self, *operations: Operation) -> list[Answer]:
        self._serial += 1
        step = self.engine.step(self.now, [(self._serial, operation) for operation in operations])
        self.journal += step.events
        self._wake = step.wake_at
        for _, answer in step.answers:
            if isinstance(answer, Granted):
                for key in answer.keys:
                    self._send(key)
            elif isinstance(answer, Denied):
                self.denied.append(answer)
        return [answer for _, answer in step.answers]

    def call(self) -> None:
        self._serial += 1
        tokens = self.traffic.tokens
        candidate = Candidate("p", estimate=Estimate(requests=1, input_tokens=tokens))
        self.step(Reserve(f"call/{self._serial}", (candidate,), max_wait_us=round(self.traffic.patience * SECOND_US)))

    def _send(self, key: str) -> None:
        self.after(0.02, lambda: self._arrives(key))

    def _arrives(self, key: str) -> None:
        self.attempts.append(self.now)
        answer = self.upstream(self.now, self.under_way)
        if answer.refusal is not None:
            self.refused.append(self.now)
            outcome = Outcome(Disposition.REJECTED, observation=answer)
            self.after(self.traffic.refuses_in, lambda: self._commit(key, outcome))
            return
        self.accepted.append(self.now)
        self.under_way += 1
        if self.traffic.early:
            self.after(self.traffic.answers_in, lambda: self._commit_not(key, answer))
        self.after(self.traffic.lasts, lambda: self._ends(key))

    def _ends(self, key: str) -> None:
        self.under_way -= 1
        usage = Usage(1, self.traffic.tokens)
        self._commit(key, Outcome(Disposition.SUCCEEDED, usage, UsageKind.FINAL))

    def _commit(self, key: str, outcome: Outcome) -> None:
        self.step(Commit(key, outcome))

    def _commit_not(self, key: str, observation: Observation) -> None:
        self.step(Renew(key, observation=observation))

    # -- what came of it ----------------------------------------------------------------------------------------

    def rate(self, instants: list[int], since: float, until: float) -> float:
        """How many a second of ``instants``, between so many seconds after the start."""
        first, last = START + since * SECOND_US, START + until * SECOND_US
        return sum(first <= at < last for at in instants) / (until - since)

    def is_replayed(self) -> bool:
        """Whether the journal gives the same books."""
        replayed = State("loop")
        for event in ev.decode(ev.encode(self.journal)):
            replayed.apply(event)
        return replayed.digest() == self.state.digest()
