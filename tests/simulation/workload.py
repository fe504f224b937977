"""A small fleet of callers: they reserve, call, settle, renew, cancel, crash, and ask again under the same ids.

Everything is a callback on the loop, without tasks: a run makes hundreds of calls. What callers were told goes to the
:class:`~tests.simulation.checks.Checks`, the only memory that no fault reaches.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.answers import Answer, Committed, Denied, Granted, Reason, Released, Renewed
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.operations import (
    Candidate,
    Commit,
    Context,
    DefinePool,
    Disposition,
    Operation,
    Outcome,
    Priority,
    Release,
    Renew,
    Reserve,
)
from paceline.ledger.errors import LedgerError
from tests.simulation.network import NOBODY, Asked, Caller, Host

if TYPE_CHECKING:
    from tests.simulation.world import World

PROFILE = Profile(
    "simulated",
    (
        Rule(Dimension.REQUESTS, hold_requests=1_000, settle_requests=1_000),
        Rule(Dimension.INPUT_TOKENS, hold_input=1_000, settle_input=1_000),
        Rule(Dimension.CONCURRENCY, hold_requests=1_000),
    ),
)
SIZES = (1_000, 6_000)
TOO_LARGE = 100_000_000
"""More input tokens than ever fit: denied at once, and nothing is written."""
QUIET_FROM_US = 3_000_000
HOLD_US = 12_000_000
SETTLE_FOR_US = 30_000_000
"""For how long a caller tries to settle."""
MOST_CALLS = 270
"""Of one run: a caller that was denied tries again with another call, up to so many in all."""
PATIENCE_US = 12_000_000
"""How much later than promised an answer may be before a caller takes its node for dead."""


class Plan:
    """What a run's fleet does, drawn from its seed."""

    def __init__(self, rng: random.Random, calls: int, span_us: int) -> None:
        per_second = calls * 1e6 / span_us
        # Around the offered load: some runs always wait, others hardly.
        self.requests = max(60, int(60 * per_second * rng.uniform(0.7, 1.6)))
        self.tokens = int(self.requests * rng.uniform(1_800, 4_500))
        self.concurrency = rng.choice((6, 12, 40))
        self.calls = calls
        self.pool = DefinePool(
            "pool",
            PROFILE,
            (
                Limit(
                    Dimension.REQUESTS, Window.MINUTE, self.requests, max(4, self.requests // rng.choice((6, 12, 30)))
                ),
                Limit(
                    Dimension.INPUT_TOKENS, Window.MINUTE, self.tokens, max(14_000, self.tokens // rng.choice((6, 12)))
                ),
                Limit(Dimension.CONCURRENCY, Window.NONE, self.concurrency),
            ),
        )


class Call:
    """One call of one caller, from its Reserve to its end."""

    __slots__ = (
        "asked",
        "born_at",
        "client",
        "context",
        "crashed",
        "fate",
        "first",
        "granted",
        "key",
        "ledger",
        "max_wait_us",
        "node",
        "outcome",
        "priority",
        "since",
        "size",
        "state",
        "tries",
        "trouble",
        "until",
    )

    def __init__(self, key: str, ledger: str, client: str, node: int, born_at: int) -> None:
        self.key = key
        self.ledger = ledger
        self.client = client
        self.node = self.first = node
        self.born_at = born_at
        self.state = "reserving"
        self.size = 0
        self.priority = Priority.STANDARD
        self.max_wait_us = 0
        self.fate = ""
        self.tries = 0
        self.until = 0
        self.since = born_at
        """When the question that is under way was asked."""
        self.asked: Asked | None = None
        self.granted: Granted | None = None
        self.context: Context | None = None
        self.outcome: Outcome | None = None
        self.trouble: list[int] = []
        """When it heard of trouble, or saw it."""
        self.crashed = False


class Fleet:
    """All callers of a run."""

    def __init__(self, world: World, rng: random.Random, plan: Plan) -> None:
        self.world = world
        self.rng = rng
        self.plan = plan
        self.calls: dict[str, Call] = {}
        self.open = 0
        """Calls that have not ended."""
        self.operations = 0
        self.until = 0
        self.begun = 0
        self.clients = [Caller(world.network, f"client-{number}") for number in range(4)]

    def start(self, span_us: int) -> None:
        """Spread the calls over a span of time, a part of them in bursts."""
        rng, loop = self.rng, self.world.loop
        self.until = loop.now + span_us
        self.begun = self.plan.calls
        first = loop.now
        bursts = [rng.uniform(0.05, 0.95) for _ in range(4)]
        for number in range(self.plan.calls):
            place = rng.random() if rng.random() < 0.75 else rng.choice(bursts) + rng.random() * 0.01
            loop.at(first + int(span_us * place), self._begin, number, context=NOBODY)
        self.open = self.plan.calls

    def more(self, count: int) -> None:
        """Some more calls, now."""
        for _ in range(count):
            self.begun += 1
            self.open += 1
            self._begin(self.begun - 1)

    def _begin(self, number: int) -> None:
        rng, world = self.rng, self.world
        client = number % len(self.clients)
        ledger = world.ledgers[0] if len(world.ledgers) == 1 or rng.random() < 0.8 else world.ledgers[1]
        call = Call(f"id/{number}", ledger, self.clients[client].name, rng.randrange(len(world.nodes)), world.loop.now)
        self.calls[call.key] = call
        call.size = SIZES[rng.random() < 0.25]
        call.priority = rng.choice((Priority.INTERACTIVE, Priority.STANDARD, Priority.STANDARD, Priority.BATCH))
        call.max_wait_us = rng.choice((0, 1_000_000, 4_000_000, 10_000_000, 20_000_000))
        if ledger != world.ledgers[0] and world.is_quiet and world.loop.now > QUIET_FROM_US:
            call.size = TOO_LARGE
        draw = rng.random()
        call.fate = (
            "commit"
            if draw < 0.72
            else "release"
            if draw < 0.80
            else "renew"
            if draw < 0.88
            else "cancel"
            if draw < 0.92
            else "twice"
            if draw < 0.97
            else "crash"
        )
        world.checks.began(call)
        self._reserve(call)
        if call.fate == "twice":
            self._repeat(call)
        elif call.fate == "cancel":
            world.loop.at(world.loop.now + int(rng.random() * 4e6), self._cancel, call, context=NOBODY)

    # -- asking ----------------------------------------------------------------------------------------------------

    def _ask(self, call: Call, operation: Operation, heard: Callable[[Any], object], node: int | None = None) -> Asked:
        self.operations += 1
        place = call.node if node is None else node
        target = self.world.nodes[place % len(self.world.nodes)]
        ledger, caller = call.ledger, self.clients[int(call.client[7:])]

        def deliver(host: Host, back: Callable[[Any], None]) -> None:
            self.world.submit(target, ledger, operation, back)

        return caller.ask(target.name, deliver, heard)

    def _elsewhere(self, call: Call) -> None:
        call.node += 1
        call.tries += 1
        call.trouble.append(self.world.loop.now)

    def _reserve(self, call: Call) -> None:
        if call.state != "reserving":
            return
        loop = self.world.loop
        waited = loop.now - call.born_at
        left = call.max_wait_us - waited
        if waited and left <= 0:
            self._withdraw(call)
            return
        operation = Reserve(
            call.key,
            (Candidate("pool", (), Estimate(1, call.size, 0, 0, 0)),),
            priority=call.priority,
            max_wait_us=max(0, left),
            hold_us=HOLD_US,
            waited_us=waited,
        )
        call.since = loop.now
        asked = call.asked = self._ask(call, operation, lambda answer: self._reserved(call, asked, answer))
        limit = loop.now + max(0, left) + PATIENCE_US
        loop.at(limit, self._impatient, call, asked, context=NOBODY)

    def _impatient(self, call: Call, asked: Asked) -> None:
        """No word for far too long: a caller's own deadline."""
        if asked.done or call.crashed:
            return
        asked.done = True
        self.world.checks.unanswered(call, asked)
        self._again(call, asked, None)

    def _again(self, call: Call, asked: Asked | None, error: LedgerError | None) -> None:
        self._elsewhere(call)
        loop = self.world.loop
        pause = 20_000 + int(self.rng.random() * 200_000)
        if error is not None and error.retry_after_us:
            pause = max(pause, min(error.retry_after_us, 1_000_000))
        if call.state == "reserving":
            loop.at(loop.now + pause, self._reserve, call, context=NOBODY)
        elif call.state in ("settling", "withdrawing"):
            if loop.now > call.until:
                self._end(call)
            else:
                loop.at(loop.now + min(2_000_000, pause * (1 + call.tries)), self._settle, call, context=NOBODY)

    def _reserved(self, call: Call, asked: Asked, answer: Any) -> None:
        if call.crashed:
            return
        self.world.checks.heard(call, asked, answer, call.since, max(0, call.born_at + call.max_wait_us - call.since))
        if call.state != "reserving":
            if isinstance(answer, Granted):
                self.world.checks.granted(call, answer)
            return
        if isinstance(answer, Granted):
            self.world.checks.granted(call, answer)
            self._go(call, answer)
        elif isinstance(answer, Denied):
            self.world.checks.denied(call, answer)
            self._end(call)
            if self.world.loop.now < self.until and self.begun < MOST_CALLS:
                # Its caller comes back with another call.
                self.begun += 1
                self.open += 1
                pause = 300_000 + int(self.rng.random() * 2e6)
                self.world.loop.at(self.world.loop.now + pause, self._begin, self.begun - 1, context=NOBODY)
        elif isinstance(answer, LedgerError) or not isinstance(answer, Answer):
            self._again(call, asked, answer if isinstance(answer, LedgerError) else None)
        else:
            self.world.checks.strange(call, answer)
            self._end(call)

    def _repeat(self, call: Call) -> None:
        """The same Reserve by another node, at about the same time."""
        rng, loop = self.rng, self.world.loop

        def again() -> None:
            if call.state != "reserving" or call.crashed:
                return
            left = call.born_at + call.max_wait_us - loop.now
            operation = Reserve(
                call.key,
                (Candidate("pool", (), Estimate(1, call.size, 0, 0, 0)),),
                priority=call.priority,
                max_wait_us=max(0, left),
                hold_us=HOLD_US,
                waited_us=loop.now - call.born_at,
            )
            self._ask(call, operation, lambda answer: self._second(call, answer), call.node + 1)

        loop.at(loop.now + int(rng.random() * 500_000), again, context=NOBODY)

    def _second(self, call: Call, answer: Any) -> None:
        if isinstance(answer, Granted) and not call.crashed:
            self.world.checks.granted(call, answer)
            if call.state == "reserving":
                self._go(call, answer)

    # -- after the grant -------------------------------------------------------------------------------------------

    def _go(self, call: Call, granted: Granted) -> None:
        rng, loop = self.rng, self.world.loop
        call.state = "calling"
        call.granted, call.context = granted, granted.context
        took = int(rng.expovariate(1 / 900_000)) + 20_000
        if call.fate == "crash":
            call.crashed = True
            self._end(call)
        elif call.fate == "renew":
            loop.at(loop.now + took // 2, self._renew, call, context=NOBODY)
            loop.at(loop.now + took, self._finish, call, context=NOBODY)
        else:
            loop.at(loop.now + took, self._finish, call, context=NOBODY)

    def _renew(self, call: Call) -> None:
        operation = Renew(call.key, call.context, hold_us=HOLD_US)
        self._ask(call, operation, lambda answer: self.world.checks.renewed(call, answer))

    def _finish(self, call: Call) -> None:
        if call.state != "calling":
            return
        used = call.size if self.rng.random() < 0.5 else int(call.size * self.rng.uniform(0.2, 1.1))
        call.outcome = Outcome(Disposition.SUCCEEDED, Usage(1, used, 0, 0, 0), UsageKind.FINAL)
        self._begin_to_settle(call, "settling")

    def _begin_to_settle(self, call: Call, state: str) -> None:
        call.state = state
        call.tries = 0
        call.until = self.world.loop.now + SETTLE_FOR_US
        self._settle(call)

    def _withdraw(self, call: Call) -> None:
        """Nobody waits for the answer any more."""
        self._begin_to_settle(call, "withdrawing")

    def _cancel(self, call: Call) -> None:
        if call.state == "reserving":
            self._withdraw(call)

    def _settle(self, call: Call) -> None:
        if call.state not in ("settling", "withdrawing"):
            return
        operation: Operation
        if call.state == "settling" and call.fate != "release" and call.outcome is not None:
            operation = Commit(call.key, call.outcome, call.context)
        else:
            operation = Release(call.key, call.context)
        call.since = self.world.loop.now
        asked = call.asked = self._ask(call, operation, lambda answer: self._settled(call, asked, answer))
        self.world.loop.at(self.world.loop.now + PATIENCE_US, self._impatient, call, asked, context=NOBODY)

    def _settled(self, call: Call, asked: Asked, answer: Any) -> None:
        if call.crashed:
            return
        self.world.checks.heard(call, asked, answer, call.since, 0)
        if isinstance(answer, Committed | Released):
            self.world.checks.settled(call, answer)
            self._end(call)
        elif isinstance(answer, LedgerError) or not isinstance(answer, Answer):
            self._again(call, asked, answer if isinstance(answer, LedgerError) else None)
        else:
            self.world.checks.strange(call, answer)
            self._end(call)

    def _end(self, call: Call) -> None:
        if call.state != "over":
            call.state = "over"
            self.open -= 1


__all__ = ["Call", "Denied", "Fleet", "Plan", "Reason", "Renewed"]
