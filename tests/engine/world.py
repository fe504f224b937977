"""Drives an engine, tells the model what it answered, and checks the invariants of the books after every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import msgspec

from paceline.engine import events as ev
from paceline.engine.accounting import Profile, Sizes, Usage, expected_usage
from paceline.engine.answers import (
    Answer,
    Committed,
    Denied,
    Done,
    Granted,
    Invalid,
    Reason,
    Released,
    Renewed,
)
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import WINDOW_US, Dimension, Window
from paceline.engine.engine import Caps, Engine, Step
from paceline.engine.keys import child_keys
from paceline.engine.operations import (
    Candidate,
    Commit,
    Context,
    DefinePool,
    Disposition,
    Mode,
    Observe,
    Operation,
    Outcome,
    Priority,
    Refusal,
    Release,
    Renew,
    Reserve,
    SetMode,
    SetPaused,
)
from paceline.engine.sizes import spread_of
from paceline.engine.state import State
from paceline.engine.urgent import LEAVE_PART
from tests.engine import tally
from tests.engine.model import Address, Books, Call

LEDGER = "acme"
HOUR_US = 3_600_000_000
START_US = 1_767_225_600_000_000 + 11 * 86_400_000_000
"""A day in January 2026."""

BOOK_COLUMNS = (
    "held",
    "charged",
    "adjusted",
    "foreseen",
    "granted",
    "settled",
    "released",
    "expired",
    "burst",
    "amount",
)


Lane = tuple[str, tuple[str, ...], Priority]
"""A pool, the shares by which a call counts there, and how urgent it is."""


@dataclass
class Waiting:
    """A ticket that has no answer yet."""

    op: Reserve
    order: int
    since: int
    deadline: int
    options: frozenset[int]
    """The candidates whose turn can come: one that was impossible, or whose pool was paused, is out for good."""

    @property
    def lanes(self) -> set[Lane]:
        return {lane_of(self.op, index) for index in self.options}

    @property
    def rank(self) -> tuple[Priority, int]:
        """Who has the smaller one comes first."""
        return self.op.priority, self.order


@dataclass
class Ticketed:
    """What is remembered of a grant: it must always be the same."""

    op: Reserve
    answer: Granted
    ticket: int


@dataclass
class Seen:
    """What random drivers want to know of the past."""

    contexts: dict[str, Context] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.outcomes[what] = self.outcomes.get(what, 0) + 1


def lane_of(op: Reserve, index: int) -> Lane:
    candidate = op.candidates[index]
    return candidate.pool, candidate.shares, op.priority


def address_of(bucket: Bucket) -> Address:
    return bucket.pool, bucket.share, bucket.dimension, bucket.window


def fields(state: State) -> dict[str, object]:
    """Every public part of a state, comparable."""
    return {name: value for name, value in vars(state).items() if not name.startswith("_")}


class World:
    """An engine under test, beside its model. ``comes_back``: check that denials say truly when to come back."""

    comes_back = True

    def __init__(self, caps: Caps | None = None, *, now: int = START_US) -> None:
        self.caps = Caps() if caps is None else caps
        self.bounded = caps is not None
        """Memory may be forgotten before its hour."""
        self.engine = Engine(LEDGER, State(LEDGER), self.caps)
        self.shadow = State(LEDGER)
        """What another machine makes of the events."""
        self.books = Books()
        self.now = now
        self.wake_at: int | None = None
        self.tickets = 0
        self.waiting: dict[int, Waiting] = {}
        self.taught = False
        """Headers were reported: levels may be corrected."""
        self.failed = False
        """A check has failed: what follows proves nothing."""
        self.releasing: set[str] = set()
        self.served: dict[int, int] = {}
        """Who was answered in this step after having waited, and since which ticket they had."""
        self.grants: dict[str, Ticketed] = {}
        self.parents: dict[str, str] = {}
        self.tombstones: dict[str, int] = {}
        self.commits: dict[str, Committed] = {}
        self.profiles: dict[str, Profile] = {}
        self.modes: dict[tuple[str, str], Mode] = {}
        self.paused: set[str] = set()
        self.refused = False
        """An upstream has refused: a pool may be blocked."""
        self.seen = Seen()

    @property
    def state(self) -> State:
        return self.engine.state

    # -- driving ------------------------------------------------------------------------------------------------

    def do(self, *ops: Operation) -> list[Answer | None]:
        """One step with these operations, at the present."""
        assert not self.failed
        self.failed = True
        before = {address_of(b): {c: getattr(b, c) for c in BOOK_COLUMNS} for b in self.state.buckets}
        levels = {address_of(b): self.level(b) for b in self.state.buckets}
        tickets: list[tuple[int, Operation]] = []
        for op in ops:
            self.tickets += 1
            tickets.append((self.tickets, op))
        step = self.engine.step(self.now, tickets)
        tally.step()
        self.wake_at = step.wake_at
        self._fold(step)
        assert step.at >= self.state.at >= 0
        answers = self._follow(step, dict(tickets), before, levels)
        self._check(step, dict(tickets), before)
        self.failed = False
        return [answers.get(ticket) for ticket, _ in tickets]

    def advance(self, us: int) -> None:
        """Let time pass, waking the engine whenever it asked to be woken."""
        until = self.now + us
        wakes = 0
        while self.wake_at is not None and self.wake_at <= until:
            assert self.wake_at > self.now, "asked to be woken in the past"
            self.now = self.wake_at
            self.do()
            wakes += 1
            assert wakes < 5_000, "keeps waking without an end"
        self.now = until
        self.do()

    def doze(self, us: int) -> None:
        """Let time pass with nobody to wake the engine: a machine that was paused."""
        self.now += us
        self.do()

    def restart(self, *, resend: bool) -> None:
        """Another process takes over from a snapshot. Waiters are soft: they come back only if resent."""
        self.engine = Engine(LEDGER, State.restore(list(self.state.dump())), self.caps)
        lost, self.waiting = self.waiting, {}
        self.do()
        if resend:
            for waiting in sorted(lost.values(), key=lambda w: w.order):
                waited = waiting.op.waited_us + self.now - waiting.since
                if waiting.deadline <= self.now:
                    continue
                self.do(
                    Reserve(
                        key=waiting.op.key,
                        candidates=waiting.op.candidates,
                        tenant=waiting.op.tenant,
                        route=waiting.op.route,
                        priority=waiting.op.priority,
                        max_wait_us=waiting.deadline - self.now,
                        hold_us=waiting.op.hold_us,
                        count=waiting.op.count,
                        partial=waiting.op.partial,
                        waited_us=waited,
                    )
                )

    def drain(self) -> None:
        """Nothing leaks: once every hold has run out and every waiter was answered, nothing is held anywhere."""
        for _ in range(50):
            if not self.state.open and not self.waiting:
                break
            ends = [call.expires_at for call in self.state.open.values()]
            ends += [waiting.deadline for waiting in self.waiting.values()]
            self.advance(max(1, max(ends) - self.now))
        assert not self.state.open
        assert not self.waiting
        for bucket in self.state.buckets:
            assert bucket.held == 0, f"{address_of(bucket)} leaks {bucket.held}"
            assert bucket.granted == bucket.settled + bucket.released + bucket.expired

    # -- levels -------------------------------------------------------------------------------------------------

    def level(self, bucket: Bucket) -> Fraction:
        """The engine's level now, with what it carries, come to the present if it had not been needed yet."""
        window = WINDOW_US.get(bucket.window)
        if window is None:
            if bucket.window is Window.MONTH and bucket.turns_at <= self.now:
                return Fraction(bucket.burst - bucket.held)
            return Fraction(bucket.level)
        level = bucket.level + Fraction(bucket.carry + bucket.amount * (self.now - bucket.at), window)
        return min(level, Fraction(max(bucket.burst, bucket.level)))

    # -- what the answers mean -------------------------------------------------------------------------------------

    def _follow(
        self,
        step: Step,
        ops: dict[int, Operation],
        before: dict[Address, dict[str, int]],
        levels: dict[Address, Fraction],
    ) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        self.served = {}
        for ticket, answer in step.answers:
            assert ticket not in answers, "a ticket was answered twice"
            assert ticket in ops or ticket in self.waiting, "an answer to nobody"
            answers[ticket] = answer
        self._notice_limits(before)
        self._expire()
        self.releasing = {op.key for op in ops.values() if isinstance(op, Release)}
        for ticket, op in ops.items():
            if ticket not in answers:
                self._waits(ticket, op)
        for ticket, answer in step.answers:
            if ticket in ops:
                self._one(ticket, ops[ticket], answer, alone=len(ops) == 1, levels=levels)
            else:
                waiting = self.waiting.pop(ticket)
                self.served[ticket] = waiting.order
                self.seen.count(f"waited: {type(answer).__name__}")
                self._reserved(ticket, waiting.op, answer, since=waiting.since)
        self._notice_corrections(before)
        return answers

    def _notice_limits(self, before: dict[Address, dict[str, int]]) -> None:
        """New buckets and new limits, with the level that the engine gave them."""
        for bucket in self.state.buckets:
            address, limit = address_of(bucket), (bucket.amount, bucket.burst, bucket.window)
            if address not in before:
                assert bucket.adjusted == 0
                # Those of shares begin full, though their sums need not say so: a hold that grows and ends forfeits.
                start = bucket.burst if bucket.share else bucket.level + bucket.charged
                assert 0 <= start <= bucket.burst
                self.books.create(address, self.now, start, limit)
                continue
            old = self.books.buckets[address]
            current = next((line.limit for line in reversed(old.history) if line.limit), old.limit)
            if current != limit:
                shift = bucket.adjusted - before[address]["adjusted"]
                grown = bucket.burst - current[1]
                seen = shift + bucket.foreseen - before[address]["foreseen"]
                if not self.refused:
                    assert min(0, grown) <= seen <= max(0, grown), f"{address}: limit moved the level by {seen}"
                self.books.change(address, self.now, limit, shift)
                before[address]["adjusted"], before[address]["foreseen"] = bucket.adjusted, bucket.foreseen

    def _notice_corrections(self, before: dict[Address, dict[str, int]]) -> None:
        for bucket in self.state.buckets:
            address = address_of(bucket)
            old = before.get(address, {"adjusted": 0, "foreseen": 0})
            shift = bucket.adjusted - old["adjusted"]
            corrected = shift + bucket.foreseen - old["foreseen"]
            assert not corrected or self.taught, (
                f"{address}: corrected by {corrected}, though no response said anything"
            )
            if shift:
                self.books.correct(address, self.now, shift)

    def _expire(self) -> None:
        for call in self.books.calls.values():
            if call.state == "open" and call.expires_at <= self.now:
                self.books.end(call, self.now, "expired", self._final(call, None))
                self.seen.count("expired")

    def _unknown(self, call: Call, outcome: Outcome | None) -> Usage | None:
        """What a call used that told nothing of it; ``None``: what is booked stands."""
        refusal = None if outcome is None or outcome.observation is None else outcome.observation.refusal
        if outcome is not None and outcome.disposition is Disposition.REJECTED:
            counted = refusal in (None, Refusal.OTHER) or call.profile.refused_counts
            return Usage(call.sizes.requests if counted else 0)
        if refusal is Refusal.OVERLOAD:
            return Usage(call.sizes.requests)
        if call.foreign:
            return None
        if call.output_so_far is not None:
            return expected_usage(msgspec.structs.replace(call.sizes, output_tokens=call.output_so_far))
        if outcome is not None and outcome.disposition is Disposition.FAILED:
            return expected_usage(msgspec.structs.replace(call.sizes, output_tokens=0))
        return None

    def _final(self, call: Call, outcome: Outcome | None) -> dict[Address, int]:
        """What stands when the call has ended so; no outcome is an expiry."""
        if outcome is not None and outcome.disposition is Disposition.NOT_SENT:
            return dict.fromkeys(call.holds, 0)
        usage = None if outcome is None else outcome.usage
        if usage is None:
            usage = self._unknown(call, outcome)
        if usage is None:
            return {a: 0 if self.books.buckets[a].gauge else held for a, held in call.holds.items()}
        return self._used(call, usage)

    def _used(self, call: Call, usage: Usage) -> dict[Address, int]:
        charges: dict[Address, int] = {}
        for address, held in call.holds.items():
            if address[2] is Dimension.SPEND:
                charges[address] = call.prices.cost(usage)
            elif self.books.buckets[address].gauge:
                charges[address] = 0
            else:
                rule = next(rule for rule in call.profile.rules if rule.dimension is address[2])
                charges[address] = rule.settle(usage, held)
        return charges

    def _holds(self, candidate: Candidate) -> tuple[Sizes, dict[Address, int]]:
        """What a call of this size holds, in each bucket that it touches."""
        profile = self.profiles[candidate.pool]
        sizes = profile.fill(candidate.estimate)
        rules = {rule.dimension: rule for rule in profile.rules}
        holds: dict[Address, int] = {}
        for address in self.books.buckets:
            pool, share, dimension, _ = address
            if share and share not in candidate.shares:
                continue
            if dimension is Dimension.SPEND:
                holds[address] = candidate.prices.cost(expected_usage(sizes))
            elif pool == candidate.pool and dimension in rules:
                holds[address] = rules[dimension].hold(sizes)
        return sizes, holds

    def _waits(self, ticket: int, op: Operation) -> None:
        assert isinstance(op, Reserve), f"{type(op).__name__} got no answer"
        assert op.max_wait_us > 0, "a caller who would not wait was kept waiting"
        deadline = self.now + op.max_wait_us
        first = next((w for w in self.waiting.values() if w.op.key == op.key), None)
        if first is None:
            self.waiting[ticket] = Waiting(op, ticket, self.now, deadline, self._possible(op))
        else:
            self.waiting[ticket] = Waiting(first.op, first.order, first.since, deadline, first.options)
        self.seen.count("waits")

    def _one(self, ticket: int, op: Operation, answer: Answer, *, alone: bool, levels: dict[Address, Fraction]) -> None:
        if isinstance(op, Reserve):
            if alone and isinstance(answer, Denied):
                self._denied(op, answer, levels)
            self._reserved(ticket, op, answer, since=self.now)
            return
        match op:
            case Commit():
                self._committed(op, answer)
            case Release():
                self._released(op, answer)
            case Renew():
                self._renewed(op, answer)
            case Observe():
                if isinstance(answer, Committed):
                    self._observed(op, answer)
            case DefinePool():
                if isinstance(answer, Done):
                    self.profiles[op.pool] = op.profile
            case SetMode():
                if isinstance(answer, Done) and op.mode is not None:
                    self.modes[op.pool, op.tenant] = op.mode
            case SetPaused():
                if isinstance(answer, Done):
                    (self.paused.add if op.paused else self.paused.discard)(op.pool)
            case _:
                assert isinstance(answer, Done | Invalid)

    def _possible(self, op: Reserve) -> frozenset[int]:
        bursts = {address_of(b): b.burst for b in self.state.buckets}
        count = 1 if op.partial else op.count
        return frozenset(
            index
            for index, candidate in enumerate(op.candidates)
            if candidate.pool not in self.paused
            and all(amount * count <= bursts[a] for a, amount in self._holds(candidate)[1].items())
        )

    def observing(self, pool: str, tenant: str) -> bool:
        for scope in ((pool, tenant), ("", tenant), (pool, ""), ("", "")):
            if scope in self.modes:
                return self.modes[scope] is Mode.OBSERVE
        return False

    # -- Reserve --------------------------------------------------------------------------------------------------

    def _might_fit(self, op: Reserve, candidate: Candidate) -> bool:
        """Whether the bursts have always been large enough for a candidate."""
        profile = self.state.pools[candidate.pool].profile
        sizes = profile.fill(candidate.estimate)
        holds = {rule.dimension: rule.hold(sizes) for rule in profile.rules}
        count = 1 if op.partial else op.count
        for (pool, share, dimension, _), bucket in self.books.buckets.items():
            if pool != candidate.pool or (share and share not in candidate.shares):
                continue
            limits = [bucket.limit, *(line.limit for line in bucket.history if line.limit is not None)]
            if holds.get(dimension, 0) * count > min(limit[1] for limit in limits):
                return False
        return True

    def _reserved(self, ticket: int, op: Reserve, answer: Answer, *, since: int) -> None:
        self.seen.count(f"Reserve: {type(answer).__name__}")
        if isinstance(answer, Denied):
            self.seen.count(f"Denied: {answer.reason.name}")
            if answer.reason is Reason.RELEASED:
                keys = [op.key, *(child_keys(op.key, op.count) if op.count > 1 else ())]
                assert any(key in self.tombstones or key in self.releasing for key in keys)
            elif answer.reason is Reason.POOL_PAUSED:
                open_pools = [c.pool for c in op.candidates if c.pool not in self.paused and self._might_fit(op, c)]
                assert since == self.now or not open_pools, "denied for one paused pool, though another may serve"
            elif not self.bounded:
                known = self.grants.get(op.key)
                assert known is None or not self._remembered(op.key), "granted once, denied later"
                ended = self.tombstones.get(op.key)
                assert ended is None or self.now - ended >= HOUR_US, "a tombstone was ignored"
            return
        if isinstance(answer, Invalid):
            return
        assert isinstance(answer, Granted)
        known = self.grants.get(op.key)
        if known is not None and not self._remembered(op.key) and self._is_new(answer):
            # After a bulk grant's, its own key too: a Commit of another ledger's call may have been booked under it.
            self._archive(tuple({*known.answer.keys, *({op.key} & self.books.calls.keys())}))
        elif known is not None:
            same = known.answer
            if self._partly_forgotten(same.keys):
                # Its own key among them: a Commit under a context of another ledger was booked for it meanwhile.
                assert set(answer.keys) <= {*same.keys, op.key}
                return
            standing = [key for key in same.keys if key not in self.tombstones]
            assert set(standing) <= set(answer.keys) <= set(same.keys), "another grant than the first"
            assert answer.candidate_index == same.candidate_index
            assert answer.max_output_tokens == same.max_output_tokens
            assert answer.context.granted_at == same.context.granted_at
            assert answer.context.key == op.key
            calls = [self.books.calls[key] for key in answer.keys]
            if all(call.state != "open" for call in calls):
                assert answer.expires_in_us == 0
            elif len(calls) == 1:
                assert answer.expires_in_us == calls[0].expires_at - self.now
            self.seen.count("same grant")
            return
        booked = self.books.calls.get(op.key)
        if known is None and booked is not None:
            if answer.expires_in_us == 0:
                # Another life of this ledger had granted it: the Commit said so.
                assert booked.foreign
                return
            assert self.bounded or self.now - (booked.ended_at or 0) >= HOUR_US, "granted after its Commit"
            self._archive((op.key,))
        ended = self.tombstones.get(op.key)
        assert ended is None or self.now - ended >= HOUR_US or self.bounded, "a tombstone was ignored"
        candidate = op.candidates[answer.candidate_index]
        sizes, holds = self._holds(candidate)
        if op.partial:
            assert 1 <= len(answer.keys) <= op.count
        else:
            assert len(answer.keys) == op.count
        assert len(set(answer.keys)) == len(answer.keys)
        assert op.count > 1 or answer.keys == (op.key,)
        assert answer.expires_in_us == op.hold_us
        assert answer.max_output_tokens == candidate.estimate.max_output_tokens
        assert answer.waited_us == self.now - since + op.waited_us
        expected = {d: amount for (pool, share, d, _), amount in holds.items() if pool and not share}
        context = answer.context
        assert context.key == op.key
        assert context.count == op.count
        assert context.ledger == LEDGER
        assert context.pool == candidate.pool
        assert context.shares == candidate.shares
        assert context.granted_at == self.now
        charges = dict(context.charges)
        for dimension, amount in expected.items():
            assert charges.get(dimension, 0) == amount
        for key in answer.keys:
            assert key not in self.books.calls, "a reservation was granted twice"
            self.seen.contexts[key] = context
            if op.count > 1:
                self.parents[key] = op.key
            profile = self.profiles[candidate.pool]
            self.books.add(Call(key, self.now, profile, sizes, candidate.prices, dict(holds), self.now + op.hold_us))
        self.grants[op.key] = Ticketed(op, answer, ticket)
        self.seen.count("granted")

    def _is_new(self, answer: Granted) -> bool:
        return answer.context.granted_at == self.now and answer.expires_in_us > 0

    def _partly_forgotten(self, keys: tuple[str, ...]) -> bool:
        """Whether the first calls of a bulk grant may be forgotten, though not the last."""
        ends = [self.books.calls[key].ended_at for key in keys]
        return any(end is not None and (self.bounded or self.now - end >= HOUR_US) for end in ends)

    def _archive(self, keys: tuple[str, ...]) -> None:
        """These ids were forgotten, and are granted anew: what they were stays in the books under another name."""
        for key in keys:
            call = self.books.calls.pop(key)
            assert call.state != "open", "an open reservation was granted anew"
            self.books.calls[f"{key}@{call.granted_at}"] = call
            self.commits.pop(key, None)

    def grants_at(self, key: str) -> int:
        return self.grants[key].answer.context.granted_at

    def _remembered(self, key: str) -> bool:
        """Whether a granted id must still be known."""
        known = self.grants.get(key)
        if known is None:
            return False
        calls = [self.books.calls[child] for child in known.answer.keys]
        if any(call.state == "open" for call in calls):
            return True
        last = max(call.ended_at or 0 for call in calls)
        return not self.bounded and self.now - last < HOUR_US

    def _denied(self, op: Reserve, answer: Denied, levels: dict[Address, Fraction]) -> None:
        """A denial needs a reason that can be seen in the books."""
        if answer.reason in (Reason.RELEASED, Reason.QUEUE_FULL, Reason.BLOCKED, Reason.POOL_CLOSED):
            return
        if any(waiting.op.key == op.key for waiting in self.waiting.values()):
            return
        if answer.reason is Reason.POOL_PAUSED:
            assert any(candidate.pool in self.paused for candidate in op.candidates)
            return
        # Also the less urgent have a minimum that others leave to them.
        queued = {lane[0] for waiting in self.waiting.values() for lane in waiting.lanes}
        count = 1 if op.partial else op.count
        too_large = False
        for candidate in op.candidates:
            if candidate.pool in self.paused:
                continue
            assert not self.observing(candidate.pool, op.tenant), "observe mode denied"
            _, holds = self._holds(candidate)
            holds = {address: amount * count for address, amount in holds.items()}
            bursts = {address_of(b): b.burst for b in self.state.buckets}
            large = any(amount > bursts[address] for address, amount in holds.items())
            short = any(
                amount and levels.get(address, bursts[address]) < self._need(address, amount)
                for address, amount in holds.items()
            )
            too_large = too_large or large
            if answer.reason is not Reason.TOO_LARGE:
                looked_at = any(self.is_looked_at(address) for address, amount in holds.items() if amount)
                waits = candidate.pool in queued or self.refused or looked_at
                assert large or short or waits, "denied though it fits"

        assert answer.reason is not Reason.TOO_LARGE or too_large, "not too large at all"
        if self.comes_back and answer.retry_after_us is not None and not self.waiting:
            self._come_back(op, answer.retry_after_us)

    def _come_back(self, op: Reserve, after: int) -> None:
        """Who comes back when it was told to, and nobody else has come, is served."""
        assert after > 0
        later = Engine(LEDGER, State.restore(list(self.state.dump())), self.caps)
        step = later.step(self.now, [])
        while step.wake_at is not None and step.wake_at < self.now + after:
            step = later.step(step.wake_at, [])
        again = msgspec.structs.replace(op, key=child_keys(op.key, 1)[0], max_wait_us=0)
        ((_, found),) = later.step(self.now + after, [(1, again)]).answers
        assert isinstance(found, Granted), f"came back after {after} µs, as told: {found}"

    # -- the other operations ----------------------------------------------------------------------------------------

    def _committed(self, op: Commit, answer: Answer) -> None:
        call = self.books.calls.get(op.key)
        self.seen.count(f"Commit: {'unknown' if call is None else call.state}")
        if isinstance(answer, Invalid):
            bulk = op.key in self.grants and self.grants[op.key].op.count > 1
            waits = (call is None or call.state != "open") and answer.field == "reservation_id"
            assert op.context is None or bulk or waits or op.context.pool not in self.profiles
            if call is not None and not self.bounded:
                assert call.state != "open"
                assert self.now - (call.ended_at or 0) >= HOUR_US, "forgotten within the hour"
            return
        assert isinstance(answer, Committed)
        if answer.stale:
            assert op.context is not None
            assert not answer.duplicate
            assert call is None or call.state != "open"
            if not self.bounded:
                assert self.now - op.context.granted_at >= HOUR_US, "stale within the hour"
            self.seen.count("Committed: stale")
            return
        if call is None:
            self._book_unknown(op, answer)
            return
        if call.state in ("settled", "late"):
            assert answer.duplicate, "settled twice"
            first = self.commits[op.key]
            assert (answer.charges, answer.cost) == (first.charges, first.cost)
            self.seen.count("Committed: duplicate")
            return
        late = call.state != "open"
        assert not answer.duplicate
        assert answer.late == late, f"late: {answer.late}"
        outcome = op.outcome
        charges = self._final(call, outcome)
        state = "settled"
        if late:
            state = "late"
        self.books.end(call, self.now, state, charges)
        told = dict(answer.charges)
        for address, amount in charges.items():
            pool, share, dimension, _ = address
            if pool and not share and not self.books.buckets[address].gauge:
                assert told.get(dimension, 0) == amount, f"{dimension.name} settled as {told}, not {amount}"
        self.commits[op.key] = answer
        self.seen.count(f"Committed: {'late' if late else outcome.disposition.name}")

    def _book_unknown(self, op: Commit, answer: Committed) -> None:
        context = op.context
        assert context is not None, "booked a call that nobody knows"
        assert not answer.duplicate
        assert answer.late
        assert self.now - context.granted_at <= HOUR_US, "booked a call that may have been settled before"
        profile = self.profiles[context.pool]
        frozen = dict(context.charges)
        holds: dict[Address, int] = {}
        rules = {rule.dimension: rule for rule in profile.rules}
        for address in self.books.buckets:
            pool, share, dimension, _ = address
            if share and share not in context.shares:
                continue
            if dimension is Dimension.SPEND or (pool == context.pool and dimension in rules):
                holds[address] = frozen.get(dimension, 0)
        call = Call(
            op.key,
            self.now,
            profile,
            Sizes(1, 0, 0, 0, 0),
            context.prices,
            dict.fromkeys(holds, 0),
            self.now,
            "open",
        )
        call.holds = dict.fromkeys(holds, 0)
        self.books.add(call)
        call.holds = holds
        usage = op.outcome.usage
        call.state, call.foreign = "unknown", True
        if usage is None and op.outcome.disposition is not Disposition.NOT_SENT:
            usage = self._unknown(call, op.outcome)
        if op.outcome.disposition is Disposition.NOT_SENT:
            charges = dict.fromkeys(holds, 0)
        elif usage is None:
            charges = {a: 0 if self.books.buckets[a].gauge else amount for a, amount in holds.items()}
        else:
            charges = self._used(call, usage)
        self.books.end(call, self.now, "booked", charges)
        call.state = "late"
        self.commits[op.key] = answer
        self.seen.count("Committed: booked")

    def _released(self, op: Release, answer: Answer) -> None:
        assert isinstance(answer, Released), f"{answer}"
        if answer.stale:
            assert op.context is not None
            assert self.bounded or self.now - op.context.granted_at >= HOUR_US, "stale within the hour"
            return
        call = self.books.calls.get(op.key)
        children = [] if call is not None or op.key not in self.grants else self.grants[op.key].answer.keys
        if call is None and not children:
            assert answer.tombstone or answer.released or op.key in self.tombstones
            self.tombstones.setdefault(op.key, self.now)
            self.seen.count("Released: withdrawn" if answer.released else "Released: unknown")
            return
        if answer.tombstone:
            old = bool(children) and self.now - self.grants_at(op.key) >= HOUR_US
            assert self.bounded or old or not self._remembered(op.key), "forgotten within the hour"
            self.tombstones[op.key] = self.now
            return
        calls = [call] if call is not None else [self.books.calls[key] for key in children]
        for each in calls:
            if each.state == "open" or (each.state == "expired" and answer.late):
                self.seen.count(f"Released: {each.state}")
                self.books.end(each, self.now, "released", dict.fromkeys(each.holds, 0))
                self.tombstones.setdefault(each.key, each.ended_at or self.now)
        self.tombstones.setdefault(op.key, max(each.ended_at or self.now for each in calls))

    def _renewed(self, op: Renew, answer: Answer) -> None:
        known = self.grants.get(op.key)
        keys = known.answer.keys if known is not None else (op.key,)
        calls = [self.books.calls[key] for key in keys if key in self.books.calls]
        calls = [call for call in calls if call.state == "open"]
        if not calls:
            assert isinstance(answer, Renewed | Invalid)
            if isinstance(answer, Renewed):
                assert answer.ended or answer.late or answer.stale
                assert answer.expires_in_us == 0
            return
        assert isinstance(answer, Renewed)
        assert not answer.ended
        ends = [max(call.expires_at, self.now + (op.hold_us or 0)) for call in calls]
        assert self.now + answer.expires_in_us in ends, "not the expiry that was asked for"
        if known is not None and known.op.count > 1 and op.key == known.op.key:
            # What one response has counted is not that of each call of a bulk grant.
            op = msgspec.structs.replace(op, usage=None)
        for call, end in zip(calls, ends, strict=True):
            call.expires_at = end
            if op.output_tokens is not None:
                call.output_so_far = max(op.output_tokens, call.output_so_far or 0)
            if op.usage is not None:
                call.sizes = msgspec.structs.replace(
                    call.sizes,
                    input_tokens=op.usage.input_tokens + op.usage.cache_write_tokens,
                    cached_input_tokens=op.usage.cache_read_tokens,
                )
            output = max(call.output_so_far or 0, call.sizes.output_tokens)
            self._resize(call, msgspec.structs.replace(call.sizes, output_tokens=output), exact=op.usage is not None)
        self.seen.count("Renewed")

    def _resize(self, call: Call, sizes: Sizes, *, exact: bool) -> None:
        """A call that has produced more than was expected holds that much more; one whose input is known holds that."""
        rules = {rule.dimension: rule for rule in call.profile.rules}
        for address, held in call.holds.items():
            if address[2] is Dimension.SPEND:
                amount = call.prices.cost(expected_usage(sizes))
            else:
                amount = rules[address[2]].hold(sizes)
            kept = self.books.buckets[address].gauge or (address[2] in rules and rules[address[2]].settle_as_held)
            if amount > held or (amount < held and exact and not kept):
                call.holds[address] = amount
                if amount > held:
                    self.books.buckets[address].grown = True
                self.books.settle(call, address, self.now, amount)

    def _observed(self, op: Observe, answer: Committed) -> None:
        key = op.key or f"observed-{self.tickets}"
        known = self.books.calls.get(key)
        if known is not None and (answer.duplicate or not self.bounded):
            forgotten = self.now - known.granted_at > HOUR_US
            assert answer.duplicate or forgotten, "an observation was booked twice"
        if answer.duplicate:
            assert known is not None
            return
        if known is not None:
            self._archive((key,))
        sizes, holds = self._holds(op.candidate)
        prices = op.candidate.prices
        call = Call(key, self.now, self.profiles[op.candidate.pool], sizes, prices, holds, self.now, "unknown")
        usage = op.outcome.usage
        if usage is None and op.outcome.disposition is not Disposition.NOT_SENT:
            usage = self._unknown(call, op.outcome)
        if op.outcome.disposition is Disposition.NOT_SENT:
            charges = dict.fromkeys(holds, 0)
        elif usage is None:
            charges = {a: 0 if self.books.buckets[a].gauge else amount for a, amount in holds.items()}
        else:
            charges = self._used(call, usage)
        call.holds = dict.fromkeys(holds, 0)
        self.books.add(call)
        self.books.end(call, self.now, "late", charges)
        self.seen.count("Observed")

    # -- invariants -----------------------------------------------------------------------------------------------

    def _fold(self, step: Step) -> None:
        """The state is the fold of the events, also when they have been through the journal."""
        for event in ev.decode(ev.encode(list(step.events))):
            self.shadow.apply(event)
        assert fields(self.shadow) == fields(self.state)
        assert self.shadow.digest() == self.state.digest()

    def refold(self) -> None:
        """Go on with a state that has been through a snapshot."""
        self.shadow = State.restore(list(self.shadow.dump()))
        assert fields(self.shadow) == fields(self.state)
        assert self.shadow.digest() == self.state.digest()

    def _check(self, step: Step, ops: dict[int, Operation], before: dict[Address, dict[str, int]]) -> None:
        assert {address_of(b) for b in self.state.buckets} == set(self.books.buckets)
        for bucket in self.state.buckets:
            self._check_bucket(bucket)
        opened = {call.key for call in self.books.calls.values() if call.state == "open"}
        assert set(self.state.open) == opened
        self._check_denials(step, ops, before)
        self._check_waiters(step, ops)

    def _check_bucket(self, bucket: Bucket) -> None:
        address = address_of(bucket)
        model = self.books.buckets[address]
        assert bucket.level == bucket.refilled - bucket.charged + bucket.adjusted, f"{address}: level"
        ended = bucket.settled + bucket.released + bucket.expired
        assert bucket.granted == ended + bucket.held, f"{address}: granted"
        assert bucket.level <= bucket.burst, f"{address}: {bucket.level} above the burst {bucket.burst}"
        assert bucket.held == model.held, f"{address}: holds {bucket.held}, not {model.held}"
        assert bucket.charged == model.charged, f"{address}: charged {bucket.charged}, not {model.charged}"
        level = self.level(bucket)
        ideal, spilled = model.level(self.now)
        assert level <= ideal, f"{address}: level {level} above the counterfactual {ideal}"
        if not spilled and not model.grown:
            assert level > ideal - 1 - model.moves, f"{address}: level {level} lost against {ideal}"

    def _check_denials(self, step: Step, ops: dict[int, Operation], before: dict[Address, dict[str, int]]) -> None:
        """A step that only denied has changed nothing in the books."""
        if not ops or not all(isinstance(op, Reserve) for op in ops.values()):
            return
        if len(step.answers) < len(ops) or not all(isinstance(a, Denied) for _, a in step.answers):
            return
        if any(call.ended_at == self.now for call in self.books.calls.values()):
            return
        for bucket in self.state.buckets:
            for column, value in before.get(address_of(bucket), {}).items():
                assert getattr(bucket, column) == value, f"a denial changed {column}"

    def _check_waiters(self, step: Step, ops: dict[int, Operation]) -> None:
        for ticket, waiting in self.waiting.items():
            assert waiting.deadline > self.now, f"ticket {ticket} was kept past its time"
            assert self.wake_at is not None, "nobody will wake the engine for its waiters"
            assert self.wake_at <= waiting.deadline, "will wake after a waiter's time is up"
        if self.wake_at is not None:
            assert self.wake_at > self.now
        self._check_turns(step, ops)

    def _check_turns(self, step: Step, ops: dict[int, Operation]) -> None:
        """Nobody is overtaken by those of the same urgency, shares and tenant, and nobody waits if there is place for
        all. Who of several tenants is served when is for the laboratory of fairness."""
        levels = {address_of(b): self.level(b) for b in self.state.buckets}
        for waiting in self.waiting.values():
            waiting.options &= self._possible(waiting.op)
        new = [
            (ticket, answer)
            for ticket, answer in step.answers
            if isinstance(answer, Granted)
            and answer.context.granted_at == self.now
            and (known := self.grants.get(answer.context.key)) is not None
            and known.ticket == ticket
        ]
        observed = any(answer.would is not None for _, answer in new)
        for ticket, answer in new:
            context = answer.context
            if answer.would is not None or self.observing(context.pool, context.tenant):
                continue
            if len(ops) <= 1 and not observed:
                for key in answer.keys:
                    for address, held in self.books.calls[key].holds.items():
                        has = levels[address] >= 0 or self.is_looked_at(address)
                        assert not held or has, f"granted what {address} did not have"
            known = self.grants[context.key]
            rank = (known.op.priority, self.served.get(ticket, ticket))
            lane = (context.pool, context.shares, known.op.priority)
            for waiting in self.waiting.values():
                if waiting.rank > rank or waiting.op.waited_us or known.op.waited_us:
                    continue
                same = waiting.op.tenant == known.op.tenant and lane in waiting.lanes
                assert not same, f"ticket {ticket} overtook {waiting.order} in {lane}"
        if self.refused or self.wake_at == self.now + 1:
            return
        for pool in {lane[0] for waiting in self.waiting.values() for lane in waiting.lanes} - self.paused:
            self._check_place(pool, levels)

    def _check_place(self, pool: str, levels: dict[Address, Fraction]) -> None:
        """Somebody who waits for a pool has no place if all are to have one."""
        wanted: dict[Address, int] = {}
        for waiting in self.waiting.values():
            count = 1 if waiting.op.partial else waiting.op.count
            mine: dict[Address, int] = {}
            for index in waiting.options:
                candidate = waiting.op.candidates[index]
                if candidate.pool == pool:
                    for address, amount in self._holds(candidate)[1].items():
                        needs = amount and self._need(address, amount * count) + self._left_to_urgent(address)
                        mine[address] = max(mine.get(address, 0), needs)
            for address, needs in mine.items():
                wanted[address] = wanted.get(address, 0) + needs
        if any(self.is_looked_at(address) for address in wanted):
            return
        short = [address for address, needs in wanted.items() if needs > levels[address]]
        assert short, f"all who wait in {pool} could be served: {wanted} of {levels}"

    def _left_to_urgent(self, address: Address) -> int:
        """Others leave at most so much of a limit to the urgent."""
        return next(b.burst for b in self.state.buckets if address_of(b) == address) // LEAVE_PART

    def is_looked_at(self, address: Address) -> bool:
        """Whether this limit is admitted to over horizons, by what its open calls will produce: the laboratory of
        learning is what judges that."""
        outlook = self.engine._books.outlook
        return self.state.addresses.get(address) in outlook.demands

    def _need(self, address: Address, amount: int) -> int:
        """The level at which this much may go: under a reading some more, for the upstream's estimate may be larger."""
        bucket = next(b for b in self.state.buckets if address_of(b) == address)
        return max(
            amount, min(bucket.burst, amount + bucket.margin(amount, 0, spread_of(self.state.learned, bucket.pool)))
        )
