"""Why a call waits, and how one would be decided now. Looks only: nothing here changes the books or who is next."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from paceline.engine import admission
from paceline.engine import operations as op
from paceline.engine.admission import Verdict
from paceline.engine.answers import Reason
from paceline.engine.books import Books
from paceline.engine.dimensions import Dimension
from paceline.engine.queue import CALLS, NOTHING, Ahead, Option, Waiter, costs_of, leaf_key
from paceline.engine.reserving import Reserving


class Finding(IntEnum):
    """What stands in the way of a candidate."""

    FITS = 1
    """Nothing."""
    LIMIT = 2
    """A limit has too little left, for it and for those before it."""
    TURN = 3
    """Others come first."""
    KEPT = 4
    """What is left is set aside for others."""
    NEVER = 5
    """Waiting cannot help."""
    BLOCKED = 6
    """The upstream wants to be left alone, or lets no more calls in."""
    GATHERING = 7
    """The owner of the ledger is new: nobody is served until all that waited have come back."""
    NEW = 8
    """Nothing was decided in this pool yet."""
    FULL = 9
    """The ledger has its most open reservations."""


class Step(msgspec.Struct, frozen=True):
    """What stands in the way of one candidate. Amounts are in the limit's unit."""

    finding: Finding
    index: int
    pool: str
    reason: Reason | None = None
    """With which it would be denied, if it did not wait."""
    dimension: Dimension | None = None
    """What binds."""
    bucket: int | None = None
    """The number of the limit."""
    needed: int | None = None
    available: int | None = None
    ahead: int | None = None
    """Calls that come before it. Of those of other tenants, an estimate from weights and what each has had."""
    wait_us: int | None = None
    """Until its turn, if nothing is given back. ``None``: no time can be said."""


class Outlook(msgspec.Struct, frozen=True):
    """How a call would be decided now: granted (``index``), denied (``reason``), or neither: it would wait.

    ``observed``: it would be granted whatever the rest says.
    """

    steps: tuple[Step, ...]
    index: int | None = None
    reason: Reason | None = None
    binding: Dimension | None = None
    wait_us: int | None = None
    observed: bool = False
    known: bool = True
    """Nothing was decided in the pool that comes first: nothing can be said."""


class Explainer:
    """Looks at one ledger, at the present of its books."""

    def __init__(self, books: Books, reserving: Reserving) -> None:
        self._books = books
        self._reserving = reserving

    def waiting(self, key: str) -> tuple[Step, ...]:
        """What stands in the way of each candidate of one that waits; empty: it does not wait."""
        if key not in self._reserving.waiting:
            return ()
        waiter = self._reserving.waiting[key]
        return tuple(self._of_waiter(waiter, option) for option in waiter.options)

    def _of_waiter(self, waiter: Waiter, option: Option) -> Step:
        reserving, now = self._reserving, self._books.now
        ahead = reserving.waiting.lines[option.pool].ahead_of(waiter, option)
        step = self._step(option, ahead, *self._worst(option, waiter.operation, ahead))
        if now < reserving.turns.gather_until:
            wait = max(step.wait_us or 0, reserving.turns.gather_until - now)
            return msgspec.structs.replace(step, finding=Finding.GATHERING, wait_us=wait)
        if len(self._books.state.open) + waiter.operation.count > self._books.caps.open:
            return msgspec.structs.replace(step, finding=Finding.FULL, wait_us=None)
        if step.wait_us is not None:
            turn = reserving.turns.turn(waiter, option)
            step = msgspec.structs.replace(step, wait_us=None if turn is None else max(step.wait_us, turn - now))
        return step

    def request(self, operation: op.Reserve) -> Outlook:
        """How a call would be decided now."""
        books, reserving = self._books, self._reserving
        steps: list[Step] = []
        verdicts: list[tuple[Verdict, bool]] = []
        full = len(books.state.open) + operation.count > books.caps.open
        for index, candidate in enumerate(operation.candidates):
            pool = candidate.pool
            numbers = books.planned(pool, candidate.shares) if pool in books.state.pools else None
            if numbers is None:
                steps.append(Step(Finding.NEW, index, pool))
                return Outlook(tuple(steps), known=False)
            option = reserving.option(operation, index, numbers)
            observed = reserving.is_observed(pool, operation)
            ahead = self._ahead(option, operation)
            bucket, verdict = self._worst(option, operation, ahead)
            fits = not full and reserving.fits_now(option, operation, look=True)
            if fits and books.now >= reserving.turns.gather_until:
                steps.append(Step(Finding.FITS, index, pool, ahead=0, wait_us=0))
                return Outlook(tuple(steps), index, observed=observed)
            step = self._step(option, ahead, bucket, verdict)
            if full:
                step = msgspec.structs.replace(step, finding=Finding.FULL, wait_us=None)
            elif fits:
                wait = reserving.turns.gather_until - books.now
                step = msgspec.structs.replace(step, finding=Finding.GATHERING, wait_us=wait)
            steps.append(step)
            verdicts.append((verdict, observed))
        return self._decide(operation, tuple(steps), verdicts)

    def _decide(self, operation: op.Reserve, steps: tuple[Step, ...], verdicts: list[tuple[Verdict, bool]]) -> Outlook:
        """As :meth:`Reserving.reserve` does when nothing fits."""
        index = min(range(len(verdicts)), key=lambda place: verdicts[place][0].severity)
        verdict = verdicts[index][0]
        retry = None if verdict.final else verdict.wait_us
        denied = verdict.final or operation.max_wait_us <= 0 or verdict.hope_us > operation.max_wait_us
        reason = verdict.reason if denied else None
        if reason is None and self._reserving.waiting.is_full(operation.tenant):
            reason = Reason.QUEUE_FULL
        observing = next((place for place, (_, observed) in enumerate(verdicts) if observed), None)
        return Outlook(
            steps,
            index if observing is None and reason is not None else observing,
            reason,
            verdict.binding,
            retry,
            observing is not None,
        )

    def _ahead(self, option: Option, operation: op.Reserve) -> dict[int, Ahead]:
        line = self._reserving.waiting.lines.get(option.pool)
        if line is None or not len(line):
            return {}
        option.costs = costs_of(self._books.state.buckets, option)
        return line.look_ahead(leaf_key(operation, option), option)

    def _worst(self, option: Option, operation: op.Reserve, ahead: dict[int, Ahead]) -> tuple[int | None, Verdict]:
        """What binds: the number of the bucket, and all verdicts as one."""
        verdicts = self._reserving.verdicts(option, operation, ahead)
        bucket, _ = max(verdicts, key=lambda each: each[1].severity, default=(None, admission.NOW))
        return bucket, admission.worst([verdict for _, verdict in verdicts])

    def _step(self, option: Option, ahead: dict[int, Ahead], number: int | None, verdict: Verdict) -> Step:
        before = ahead.get(CALLS, NOTHING).amount
        bound = verdict.final or verdict.wait_us != 0
        if verdict.final:
            finding = Finding.NEVER
        elif bound:
            finding = Finding.BLOCKED if number is None else Finding.LIMIT
        else:
            number = self._kept(option)
            finding = Finding.KEPT if number is not None else Finding.TURN if before else Finding.FITS
        dimension = verdict.binding
        needed = available = None
        if number is not None:
            bucket = self._books.state.buckets[number]
            hold, count = option.holds[option.buckets.index(number)], option.count
            dimension = bucket.dimension
            needed = admission.need_of(self._books, bucket, option, hold, count)
            available = needed - admission.missing(self._books, number, option, hold, count)
        return Step(
            finding,
            option.index,
            option.pool,
            verdict.reason if bound else None,
            dimension,
            number,
            needed,
            available,
            before,
            verdict.wait_us,
        )

    def _kept(self, option: Option) -> int | None:
        """A limit of which others keep it off, although nothing is wanted by those before it."""
        for number, hold in zip(option.buckets, option.holds, strict=True):
            if hold and admission.missing(self._books, number, option, hold, option.count) > 0:
                return number
        return None
