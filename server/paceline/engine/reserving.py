"""Reserve: grant now, wait for a turn, or deny.

A Reserve goes to the first of its candidates that fits now; else it waits in the queues of all of them and takes the
first turn. One that cannot have its turn in time is denied at once, with the time that it would take.
"""

from __future__ import annotations

from heapq import heappop, heappush

from paceline.engine import admission
from paceline.engine import answers as an
from paceline.engine import events as ev
from paceline.engine import operations as op
from paceline.engine.admission import Verdict
from paceline.engine.answers import Answer, Reason
from paceline.engine.books import Books
from paceline.engine.keys import child_keys
from paceline.engine.operations import Mode
from paceline.engine.queue import FirstComeFirstServed, Option, Waiter
from paceline.engine.state import EndKind
from paceline.engine.stats import Stats
from paceline.engine.teaching import Teacher

NOTHING_TOUCHED = an.Touched(None, ())


class Reserving:
    """Keeps the waiters, and grants. ``answers`` collects (ticket, answer) of the step at hand."""

    def __init__(self, books: Books, teacher: Teacher, stats: Stats) -> None:
        self._books = books
        self._teacher = teacher
        self._stats = stats
        self._queues: dict[str, FirstComeFirstServed] = {}
        self._waiting: dict[str, Waiter] = {}
        self._waiting_of: dict[str, int] = {}
        self._deadlines: list[tuple[int, int, Waiter, int]] = []
        self._serial = 0
        self.answers: list[tuple[int, Answer]] = []
        self.granted: list[tuple[int, str]] = []
        """(expiry, key) of what this step granted."""

    def begin(self, answers: list[tuple[int, Answer]]) -> None:
        """Start a step."""
        self.answers = answers
        self.granted = []

    def waits(self, key: str) -> bool:
        """Whether a Reserve of this key waits."""
        return key in self._waiting

    def waiting(self) -> dict[str, int]:
        """Number of waiters by pool (one that waits for several pools counts in each)."""
        return {pool: len(queue) for pool, queue in self._queues.items()}

    # -- a Reserve ----------------------------------------------------------------------------------------------

    def reserve(self, ticket: int, operation: op.Reserve) -> None:
        """Decide a Reserve, or let it wait."""
        if self._seen_before(ticket, operation):
            return
        books = self._books
        if len(books.state.open) + operation.count > books.caps.open:
            self._refuse(ticket, "reservation_id", f"the ledger has its most open reservations ({books.caps.open})")
            return
        options: list[Option] = []
        for index, candidate in enumerate(operation.candidates):
            pool = books.state.pools.get(candidate.pool)
            if pool is None:
                self._refuse(ticket, f"candidates[{index}].target", "has no pool in this ledger")
                return
            numbers = books.plan(candidate.pool, candidate.shares)
            if numbers is None:
                self._refuse(ticket, "tenant", f"the ledger has its most limits ({books.caps.buckets})")
                return
            sizes = pool.profile.fill(candidate.estimate)
            holds = books.recipe(candidate.pool, numbers).holds(sizes, candidate.prices)
            option = Option(index, candidate.pool, candidate.shares, numbers, holds, sizes)
            if self._fits_now(option, operation):
                would = an.Would() if self._observing(candidate.pool, operation.tenant) else None
                self._grant(operation, option, [ticket], 0, would)
                return
            options.append(option)
        if options:
            self._wait_or_deny(ticket, operation, options)
        else:
            self._refuse(ticket, "candidates", "names no candidate")

    def _wait_or_deny(self, ticket: int, operation: op.Reserve, options: list[Option]) -> None:
        """Nothing fits now."""
        verdicts = [self._judge(option, operation) for option in options]
        option, verdict = min(zip(options, verdicts, strict=True), key=lambda pair: pair[1].severity)
        if self._observing(option.pool, operation.tenant):
            self._grant(operation, option, [ticket], 0, _would(operation, verdict))
        elif verdict.final or operation.max_wait_us <= 0 or verdict.hope_us > operation.max_wait_us:
            self._deny(ticket, verdict.reason, option, verdict)
        elif self._is_full(operation.tenant):
            self._deny(ticket, Reason.QUEUE_FULL, option, verdict)
        else:
            possible = [one for one, found in zip(options, verdicts, strict=True) if not found.final]
            self._enqueue(ticket, operation, tuple(possible))

    def _seen_before(self, ticket: int, operation: op.Reserve) -> bool:
        """Answer a Reserve whose id is known: once granted, always that grant."""
        key, state = operation.key, self._books.state
        ended = state.ended.get(key)
        if key in state.open:
            self.answers.append((ticket, self._granted_before((key,), key, 1)))
        elif ended is not None and ended.kind is EndKind.TOGETHER:
            self.answers.append((ticket, self._granted_before(ended.keys, key, operation.count)))
        elif ended is not None and ended.granted_at is not None and ended.kind is not EndKind.RELEASED:
            self.answers.append((ticket, self._granted_before((key,), key, 1)))
        elif ended is not None:
            self.answers.append((ticket, an.Denied(Reason.RELEASED, ended.pool, None, None, NOTHING_TOUCHED)))
        elif key in self._waiting:
            self._join(ticket, operation, self._waiting[key])
        elif operation.count > 1 and (known := self._known_children(key, operation.count)):
            # The memory of the request itself is bounded; its calls may outlive it.
            self.answers.append((ticket, self._granted_before(known, key, operation.count)))
        else:
            return False
        return True

    def _known_children(self, key: str, count: int) -> tuple[str, ...]:
        state = self._books.state
        return tuple(child for child in child_keys(key, count) if child in state.open or child in state.ended)

    def _granted_before(self, keys: tuple[str, ...], key: str, count: int) -> an.Granted:
        state = self._books.state
        first = keys[0]
        index, most, expires_in = 0, 0, 0
        numbers: tuple[int, ...] = ()
        reservation, ended = state.open.get(first), state.ended.get(first)
        if reservation is not None:
            index, most, numbers = reservation.index, reservation.sizes.max_output_tokens, reservation.buckets
            expires_in = max(0, reservation.expires_at - self._books.now)
        elif ended is not None:
            index, most, numbers = ended.index, ended.max_output_tokens, ended.buckets
        context = self._books.context(key, first, count)
        return an.Granted(keys, index, expires_in, 0, most, context, self._books.touched(numbers))

    # -- does it fit --------------------------------------------------------------------------------------------

    def _fits_now(self, option: Option, operation: op.Reserve) -> bool:
        """Whether it may pass at once: nobody waits for the pool, and every dimension has room."""
        pool = self._books.state.pools[option.pool]
        if pool.paused or pool.blocked_until > self._books.now or option.pool in self._queues:
            return False
        if operation.count == 1:
            return admission.fits(self._books.state.buckets, option.buckets, option.holds, self._books.now)
        return self._count_that_fits(option, operation) > 0

    def _count_that_fits(self, option: Option, operation: op.Reserve) -> int:
        room = admission.room(self._books.state.buckets, option.buckets, option.holds, self._books.now)
        if room is None or room >= operation.count:
            return operation.count
        return room if operation.partial else 0

    def _judge(self, option: Option, operation: op.Reserve) -> Verdict:
        """When would this option have its turn, behind all that wait for its pool?"""
        state, now = self._books.state, self._books.now
        pool = state.pools[option.pool]
        if pool.paused:
            return Verdict(None, 0, Reason.POOL_PAUSED, None, final=True)
        blocked = max(0, pool.blocked_until - now)
        if blocked and pool.closed:
            return Verdict(None, 0, Reason.POOL_CLOSED, None, final=True)
        count = 1 if operation.partial else operation.count
        queue = self._queues.get(option.pool)
        verdicts = [Verdict(blocked, blocked, Reason.BLOCKED, None)]
        for number, hold in zip(option.buckets, option.holds, strict=True):
            self._teacher.lapse(number, now)
            ahead = queue.ahead(number) if queue is not None else 0
            verdicts.append(admission.judge(state.buckets[number], hold, count, ahead, now))
        return admission.worst(verdicts)

    def _observing(self, pool: str, tenant: str) -> bool:
        modes = self._books.state.modes
        if modes:
            for address in ((pool, tenant), ("", tenant), (pool, ""), ("", "")):
                mode = modes.get(address)
                if mode is not None:
                    return mode is Mode.OBSERVE
        return False

    # -- answers ------------------------------------------------------------------------------------------------

    def _grant(
        self, operation: op.Reserve, option: Option, tickets: list[int], waited: int, would: an.Would | None
    ) -> None:
        books = self._books
        keys: tuple[str, ...] = (operation.key,)
        if operation.count > 1:
            # Observing grants all that was asked for, whatever fits.
            count = self._count_that_fits(option, operation) if would is None else operation.count
            keys = child_keys(operation.key, operation.count)[:count]
        prices = operation.candidates[option.index].prices
        overs = books.recipe(option.pool, option.buckets).overs(option.sizes, option.holds)
        expires_at = books.now + operation.hold_us
        for number in option.buckets:
            books.advance(number)
        for key in keys:
            books.emit(
                ev.Granted(
                    key,
                    option.pool,
                    option.shares,
                    operation.tenant,
                    operation.route,
                    operation.priority,
                    option.buckets,
                    option.holds,
                    overs,
                    option.sizes,
                    prices,
                    option.index,
                    expires_at,
                )
            )
            self.granted.append((expires_at, key))
        if operation.count > 1:
            books.emit(ev.GrantedTogether(operation.key, keys))
        self._stats.granted(option.pool, operation.priority, len(keys), waited, would)
        answer = an.Granted(
            keys,
            option.index,
            operation.hold_us,
            waited + operation.waited_us,
            option.sizes.max_output_tokens,
            books.context(operation.key, keys[0], operation.count),
            books.touched(option.buckets),
            would,
        )
        for ticket in tickets:
            self.answers.append((ticket, answer))

    def _deny(self, ticket: int, reason: Reason, option: Option, verdict: Verdict) -> None:
        self._stats.denied(option.pool, reason)
        retry = None if verdict.final else verdict.wait_us
        touched = self._books.touched(option.buckets)
        self.answers.append((ticket, an.Denied(reason, option.pool, verdict.binding, retry, touched)))

    def _refuse(self, ticket: int, field: str, message: str) -> None:
        self.answers.append((ticket, an.Invalid(field, message)))

    # -- waiting ------------------------------------------------------------------------------------------------

    def _is_full(self, tenant: str) -> bool:
        caps = self._books.caps
        return len(self._waiting) >= caps.waiters or self._waiting_of.get(tenant, 0) >= caps.waiters_per_tenant

    def _enqueue(self, ticket: int, operation: op.Reserve, options: tuple[Option, ...]) -> None:
        now = self._books.now
        waiter = Waiter(operation, options, ticket, now)
        self._waiting[operation.key] = waiter
        self._waiting_of[operation.tenant] = self._waiting_of.get(operation.tenant, 0) + 1
        for option in options:
            self._queues.setdefault(option.pool, FirstComeFirstServed()).push(waiter, option)
        self._watch(waiter, ticket, now + operation.max_wait_us)

    def _join(self, ticket: int, operation: op.Reserve, waiter: Waiter) -> None:
        """A waiting Reserve was sent again: both callers get its answer, each within its own wait."""
        waiter.tickets.append(ticket)
        self._watch(waiter, ticket, self._books.now + max(0, operation.max_wait_us))
        if len(waiter.tickets) > self._books.caps.tickets_per_waiter:
            self._refuse(waiter.tickets.pop(0), "reservation_id", "was sent again too often while it waits")

    def _watch(self, waiter: Waiter, ticket: int, deadline: int) -> None:
        self._serial += 1
        heappush(self._deadlines, (deadline, self._serial, waiter, ticket))

    def _leave(self, waiter: Waiter) -> None:
        """Take a waiter out of all its queues."""
        waiter.waiting = False
        del self._waiting[waiter.operation.key]
        tenant = waiter.operation.tenant
        self._waiting_of[tenant] -= 1
        if not self._waiting_of[tenant]:
            del self._waiting_of[tenant]
        for option in waiter.options:
            self._leave_queue(option)

    def _leave_queue(self, option: Option) -> None:
        queue = self._queues[option.pool]
        queue.left(option)
        if not len(queue):
            del self._queues[option.pool]

    def withdraw(self, key: str) -> None:
        """Take back a waiting Reserve; its callers are told."""
        waiter = self._waiting[key]
        option = waiter.options[0]
        self._leave(waiter)
        touched = self._books.touched(option.buckets)
        for ticket in waiter.tickets:
            self.answers.append((ticket, an.Denied(Reason.RELEASED, option.pool, None, None, touched)))

    def serve(self) -> None:
        """Give their turn to all whose time has come, and deny all whose deadline has, until nothing moves."""
        moved = True
        while moved:
            moved = False
            for pool in list(self._queues):
                while (queue := self._queues.get(pool)) is not None and (head := queue.head()) is not None:
                    if not self._serve_head(*head):
                        break
                    moved = True
            moved = self._time_out() or moved

    def _time_out(self) -> bool:
        """Deny callers whose deadline has come; whether a waiter left its queues by that."""
        now, left = self._books.now, False
        deadlines = self._deadlines
        while deadlines and (deadlines[0][0] <= now or not deadlines[0][2].waiting):
            _, _, waiter, ticket = heappop(deadlines)
            if waiter.waiting and ticket in waiter.tickets:
                waiter.tickets.remove(ticket)
                if not waiter.tickets:
                    self._leave(waiter)
                    left = True
                verdict = self._judge(waiter.options[0], waiter.operation)
                self._deny(ticket, Reason.TIMEOUT, waiter.options[0], verdict)
        return left

    def _serve_head(self, waiter: Waiter, option: Option) -> bool:
        """Grant or deny the head of a queue; false: it waits on."""
        state, now, operation = self._books.state, self._books.now, waiter.operation
        pool = state.pools[option.pool]
        if pool.blocked_until > now and not pool.closed and not pool.paused:
            return False
        count = 1 if operation.partial else operation.count
        hopeless = any(
            admission.needed(state.buckets[number], hold, count) > state.buckets[number].burst
            for number, hold in zip(option.buckets, option.holds, strict=True)
        )
        if hopeless or pool.paused or pool.blocked_until > now:
            self._drop(waiter, option)
            return True
        if self._observing(option.pool, operation.tenant):
            self._leave(waiter)
            self._grant(operation, option, waiter.tickets, now - waiter.since, an.Would())
            return True
        if self._count_that_fits(option, operation) == 0:
            return False
        self._leave(waiter)
        self._grant(operation, option, waiter.tickets, now - waiter.since, None)
        return True

    def _drop(self, waiter: Waiter, option: Option) -> None:
        """This option can serve the waiter no more; deny when none is left."""
        verdict = self._judge(option, waiter.operation)
        if len(waiter.options) > 1:
            waiter.options = tuple(other for other in waiter.options if other is not option)
            self._leave_queue(option)
        else:
            self._leave(waiter)
            for ticket in waiter.tickets:
                self._deny(ticket, verdict.reason, option, verdict)

    def wake_at(self) -> int | None:
        """When a deadline comes or the turn of a queue's head, if nothing is given back before."""
        times = []
        while self._deadlines and not self._deadlines[0][2].waiting:
            heappop(self._deadlines)
        if self._deadlines:
            times.append(self._deadlines[0][0])
        for queue in self._queues.values():
            head = queue.head()
            if head is not None:
                turn = self._turn(*head)
                if turn is not None:
                    times.append(turn)
        return min(times, default=None)

    def _turn(self, waiter: Waiter, option: Option) -> int | None:
        state, now = self._books.state, self._books.now
        count = 1 if waiter.operation.partial else waiter.operation.count
        turn = state.pools[option.pool].blocked_until
        for number, hold in zip(option.buckets, option.holds, strict=True):
            bucket = state.buckets[number]
            refilled, carry = bucket.refill(now)
            missing = bucket.level + refilled - admission.needed(bucket, hold, count)
            if hold and missing < 0:
                wait = bucket.wait_us(missing, carry, now)
                if wait is None:
                    return None
                turn = max(turn, now + wait)
        return turn


def _would(operation: op.Reserve, verdict: Verdict) -> an.Would:
    """What enforcing would have done with a call that does not fit now."""
    if verdict.final or operation.max_wait_us <= 0 or verdict.hope_us > operation.max_wait_us:
        return an.Would(verdict.reason)
    return an.Would(None, verdict.wait_us or 0)
