"""Reserve: grant now, wait for a turn, or deny.

A Reserve goes to the first of its candidates that fits now; else it waits in the queues of all of them and takes the
first turn. One that cannot have its turn in time is denied at once, with the time that it would take.
"""

from __future__ import annotations

from paceline.engine import admission
from paceline.engine import answers as an
from paceline.engine import events as ev
from paceline.engine import operations as op
from paceline.engine import pressure as pr
from paceline.engine.accounting import Profile
from paceline.engine.admission import Verdict
from paceline.engine.answers import Answer, Reason
from paceline.engine.audit import Kind
from paceline.engine.books import Books
from paceline.engine.bucket import EndKind
from paceline.engine.dimensions import BUDGETS, Dimension
from paceline.engine.keys import child_keys
from paceline.engine.operations import Mode
from paceline.engine.queue import NOTHING, Ahead, Option, Waiter
from paceline.engine.recipe import Recipe
from paceline.engine.sizes import fill
from paceline.engine.state import Ended
from paceline.engine.stats import Stats
from paceline.engine.teaching import Teacher
from paceline.engine.turns import Turns
from paceline.engine.waiting import Waiting

NOTHING_TOUCHED = an.Touched(None, ())


class Reserving:
    """Keeps the waiters, and grants. ``answers`` collects (ticket, answer) of the step at hand."""

    def __init__(self, books: Books, teacher: Teacher, stats: Stats) -> None:
        self._books = books
        self._teacher = teacher
        self._stats = stats
        self._hindsight = stats.hindsight
        self._audit = stats.audit
        self.waiting = Waiting(books)
        self.turns = Turns(books, teacher, self.waiting, self)
        self.answers: list[tuple[int, Answer]] = []
        self.granted: list[tuple[int, str]] = []
        """(expiry, key) of what this step granted."""

    def gather(self, until: int) -> None:
        """Until then let all wait that are willing to: those that come back have not all come."""
        self.turns.gather_until = until

    def begin(self, answers: list[tuple[int, Answer]]) -> None:
        """Start a step."""
        self.answers = answers
        self.granted = []

    # -- a Reserve ----------------------------------------------------------------------------------------------

    def reserve(self, ticket: int, operation: op.Reserve) -> None:
        """Decide a Reserve, or let it wait."""
        if self._seen_before(ticket, operation):
            return
        books = self._books
        if len(books.state.open) + operation.count > books.caps.open:
            self._refuse(
                ticket, "reservation_id", f"the ledger has its most open reservations ({books.caps.open})", full=True
            )
            return
        options: list[Option] = []
        for index, candidate in enumerate(operation.candidates):
            pool = books.state.pools.get(candidate.pool)
            if pool is None:
                self._refuse(ticket, f"candidates[{index}].target", "has no pool in this ledger")
                return
            numbers = books.plan(candidate.pool, candidate.shares)
            if numbers is None:
                self._refuse(ticket, "tenant", f"the ledger has its most limits ({books.caps.buckets})", full=True)
                return
            option = self.option(operation, index, numbers)
            if self.fits_now(option, operation):
                observed = self.is_observed(candidate.pool, operation)
                if not observed and self._gathers(operation):
                    options.append(option)
                    continue
                if not observed or self._hindsight.shadow.allows(numbers, option.holds):
                    self._grant(operation, option, [ticket], 0, an.Would() if observed else None)
                    self.turns.passed(option, operation)
                    return
            options.append(option)
        if options:
            self._wait_or_deny(ticket, operation, options)
        else:
            self._refuse(ticket, "candidates", "names no candidate")

    def option(self, operation: op.Reserve, index: int, numbers: tuple[int, ...]) -> Option:
        """One candidate of a Reserve, as it would be held in these buckets. Changes nothing."""
        books, candidate = self._books, operation.candidates[index]
        profile = books.state.pools[candidate.pool].profile
        kind = (candidate.pool, operation.tenant, operation.route)
        sizes, margin = fill(books.state.learned, profile, kind, candidate.estimate)
        recipe = books.recipe(candidate.pool, numbers)
        holds = recipe.holds(sizes, candidate.prices)
        if books.state.learned:
            holds = self._possible(holds, numbers, recipe, profile, candidate)
        return Option(
            index,
            candidate.pool,
            candidate.shares,
            numbers,
            holds,
            sizes,
            recipe,
            1 if operation.partial else operation.count,
            kind,
            margin,
            operation.priority,
        )

    def _possible(
        self,
        holds: tuple[int, ...],
        numbers: tuple[int, ...],
        recipe: Recipe,
        profile: Profile,
        candidate: op.Candidate,
    ) -> tuple[int, ...]:
        """What is learned makes no lone call impossible: a hold that only it puts above the burst is the burst."""
        buckets = self._books.state.buckets
        if all(hold <= buckets[number].burst for hold, number in zip(holds, numbers, strict=True)):
            return holds
        before = recipe.holds(profile.fill(candidate.estimate), candidate.prices)
        return tuple(
            max(was, min(hold, buckets[number].burst)) for hold, was, number in zip(holds, before, numbers, strict=True)
        )

    def _gathers(self, operation: op.Reserve) -> bool:
        """Whether this one is not granted now, although it fits: others may have begun to wait before it.

        One that waited elsewhere is served at the end of the step: of those that come with it, any may be before it.
        """
        coming_back = operation.waited_us > 0 or self._books.now < self.turns.gather_until
        return coming_back and operation.max_wait_us > 0 and not self.waiting.is_full(operation.tenant)

    def _wait_or_deny(self, ticket: int, operation: op.Reserve, options: list[Option]) -> None:
        """Nothing fits now."""
        observed = next((one for one in options if self.is_observed(one.pool, operation)), None)
        verdicts = [self._judge(option, operation, hindsight=observed is not None) for option in options]
        option, verdict = min(zip(options, verdicts, strict=True), key=lambda pair: pair[1].severity)
        if observed is not None:
            self._grant(operation, observed, [ticket], 0, _would(operation, verdict))
        elif verdict.final or operation.max_wait_us <= 0 or verdict.hope_us > operation.max_wait_us:
            self._deny(ticket, verdict.reason, option, operation, verdict)
        elif self.waiting.is_full(operation.tenant):
            self._deny(ticket, Reason.QUEUE_FULL, option, operation, verdict)
        else:
            self._audit.turned_down(
                self._books.now,
                Kind.WAITING,
                operation,
                option,
                self._books.state.buckets,
                verdict.wait_us,
                verdict.reason,
                verdict.binding,
            )
            possible = [one for one, found in zip(options, verdicts, strict=True) if not found.final]
            self.turns.expect(self.waiting.add(ticket, operation, tuple(possible)))

    def _seen_before(self, ticket: int, operation: op.Reserve) -> bool:
        """Answer a Reserve whose id is known: once granted, always that grant."""
        key, state = operation.key, self._books.state
        ended = state.ended.get(key)
        if key in state.open:
            self.answers.append((ticket, self._granted_before((key,), key, 1)))
        elif operation.count > 1 and self._calls_seen_before(ticket, operation, ended):
            pass
        elif ended is not None and _was_granted(ended):
            keys = tuple(child for child in ended.keys if child in state.open or child in state.ended) or (key,)
            self.answers.append((ticket, self._granted_before(keys, key, max(1, len(ended.keys)))))
        elif ended is not None:
            self.answers.append((ticket, an.Denied(Reason.RELEASED, ended.pool, None, None, NOTHING_TOUCHED)))
        elif key in self.waiting:
            turned_away = self.waiting.join(ticket, operation, self._books.now)
            if turned_away is not None:
                self._refuse(turned_away, "reservation_id", "was sent again too often while it waits", full=True)
        else:
            return False
        return True

    def _calls_seen_before(self, ticket: int, operation: op.Reserve, ended: Ended | None) -> bool:
        """Answer a bulk Reserve of which calls are known; the memory of the request itself may be shorter."""
        state, key = self._books.state, operation.key
        asked = ended.keys if ended is not None and ended.kind is EndKind.TOGETHER else ()
        known = [
            child for child in asked or child_keys(key, operation.count) if child in state.open or child in state.ended
        ]
        if not known and not asked:
            return False
        usable = tuple(child for child in known if child in state.open or _was_granted(state.ended[child]))
        if usable:
            self.answers.append((ticket, self._granted_before(usable, key, operation.count)))
        else:
            self.answers.append((ticket, an.Denied(Reason.RELEASED, "", None, None, NOTHING_TOUCHED)))
        return True

    def _granted_before(self, keys: tuple[str, ...], key: str, count: int) -> an.Granted:
        state = self._books.state
        first = keys[0]
        index, expires_in = 0, 0
        most: int | None = None
        numbers: tuple[int, ...] = ()
        reservation, ended = state.open.get(first), state.ended.get(first)
        if reservation is not None:
            index, numbers, most = reservation.index, reservation.buckets, reservation.max_output_tokens
            expires_in = max(0, reservation.expires_at - self._books.now)
        elif ended is not None:
            index, numbers, most = ended.index, ended.buckets, ended.max_output_tokens
        context = self._books.context(key, first, count)
        return an.Granted(keys, index, expires_in, 0, most, context, self._books.touched(numbers))

    # -- does it fit --------------------------------------------------------------------------------------------

    def fits_now(self, option: Option, operation: op.Reserve, *, look: bool = False) -> bool:
        """Whether it may pass at once: nobody is before it, and every dimension has room.

        With ``look`` it does not come.
        """
        pool, turns = self._books.state.pools[option.pool], self.turns
        if pool.paused or pool.blocked_until > self._books.now or not turns.may_pass(option, operation, look=look):
            return False
        if pool.pressure is not None and self.pressed(option.pool, operation):
            return False
        if operation.count == 1:
            return admission.fits(self._books, option)
        return self.count_that_fits(option, operation) > 0

    def count_that_fits(self, option: Option, operation: op.Reserve) -> int:
        room = admission.room(self._books, option, operation.count)
        held = self._books.state.pools[option.pool].pressure
        if held is not None:
            most = pr.room(held, len(self._books.state.open_in[option.pool]), self._books.now)
            room = room if most is None else min(room, most)
        return room if operation.partial or room >= operation.count else 0

    def pressed(self, name: str, operation: op.Reserve) -> bool:
        """Whether the upstream is so pressed that the call may not pass, whatever is left of the limits."""
        state = self._books.state
        held = state.pools[name].pressure
        room = None if held is None else pr.room(held, len(state.open_in[name]), self._books.now)
        return room is not None and room < (1 if operation.partial else operation.count)

    def _judge_pressure(self, name: str, count: int) -> Verdict | None:
        """When ``count`` calls may pass a pressed upstream; any call that ends may make room before."""
        state, now = self._books.state, self._books.now
        held, flying = state.pools[name].pressure, len(state.open_in[name])
        room = None if held is None else pr.room(held, flying, now)
        if held is None or room is None or room >= count:
            return None
        wait = pr.room_at(held, flying, now, count) - now
        if not pr.overloaded(held, flying, now, count):
            return Verdict(wait, 0, Reason.LIMIT, Dimension.CONCURRENCY)
        least = 0 if held.overload is None else max(0, held.overload.opens_at - now)
        return Verdict(wait, min(wait, least), Reason.BLOCKED, None)

    def _judge(self, option: Option, operation: op.Reserve, *, hindsight: bool = False) -> Verdict:
        """When would this option have its turn, behind all that wait for its pool?

        With ``hindsight``: had all been denied that enforcing would have denied.
        """
        state, now = self._books.state, self._books.now
        pool = state.pools[option.pool]
        ahead: dict[int, Ahead] = {}
        if not pool.paused and not (pool.closed and pool.blocked_until > now):
            ahead = self.turns.ahead(option, operation)
            for number in option.buckets:
                self._teacher.lapse(number, now)
        return admission.worst([verdict for _, verdict in self.verdicts(option, operation, ahead, hindsight=hindsight)])

    def verdicts(
        self, option: Option, operation: op.Reserve, ahead: dict[int, Ahead], *, hindsight: bool = False
    ) -> list[tuple[int | None, Verdict]]:
        """What each of the things that may stop an option says, with the number of its bucket, behind what is
        ``ahead``. Changes nothing."""
        now, pool = self._books.now, self._books.state.pools[option.pool]
        if pool.paused:
            return [(None, Verdict(None, 0, Reason.POOL_PAUSED, None, final=True))]
        blocked = max(0, pool.blocked_until - now)
        if blocked and pool.closed:
            return [(None, Verdict(None, 0, Reason.POOL_CLOSED, None, final=True))]
        count = 1 if operation.partial else operation.count
        verdicts: list[tuple[int | None, Verdict]] = []
        if blocked:
            verdicts.append((None, Verdict(blocked, blocked, Reason.BLOCKED, None)))
        pressed = None if pool.pressure is None else self._judge_pressure(option.pool, count)
        if pressed is not None:
            verdicts.append((None, pressed))
        for number, hold in zip(option.buckets, option.holds, strict=True):
            before, sure = ahead.get(number, NOTHING)
            if hindsight:
                more = self._hindsight.shadow.more(number)
                before, sure = before - more, sure - more
            verdicts.append((number, admission.judge(self._books, number, option, hold, count, before, sure)))
        return verdicts

    def is_observed(self, pool: str, operation: op.Reserve) -> bool:
        return operation.observed or self.observing(pool, operation.tenant)

    def observing(self, pool: str, tenant: str) -> bool:
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
            count = self.count_that_fits(option, operation) if would is None else operation.count
            keys = child_keys(operation.key, operation.count)[:count]
        asked = operation.candidates[option.index]
        most = asked.estimate.max_output_tokens
        overs = option.recipe.overs(option.sizes, option.holds)
        expires_at = books.now + operation.hold_us
        self._hindsight.shadow.look(option.buckets)
        books.advance_all(option.buckets)
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
                    asked.prices,
                    option.index,
                    expires_at,
                    most,
                    asked.estimate.input_tokens or 0,
                    asked.estimate.output_tokens or 0,
                )
            )
            self.granted.append((expires_at, key))
        if operation.count > 1:
            books.emit(ev.GrantedTogether(operation.key, keys))
        self._stats.granted(option.pool, operation.priority, len(keys), waited, would)
        self._hindsight.granted(option.pool, operation.tenant, keys, option.buckets, option.holds, waited, would)
        self._audit.granted(books.now, operation, option, keys, waited + operation.waited_us, would)
        answer = an.Granted(
            keys,
            option.index,
            operation.hold_us,
            waited + operation.waited_us,
            most,
            op.Context(
                books.state.ledger,
                operation.key,
                option.pool,
                option.shares,
                operation.tenant,
                operation.route,
                books.now,
                option.recipe.by_dimension(option.holds),
                asked.prices,
                operation.count,
            ),
            books.touched(option.buckets),
            would,
        )
        for ticket in tickets:
            self.answers.append((ticket, answer))

    def _deny(self, ticket: int, reason: Reason, option: Option, operation: op.Reserve, verdict: Verdict) -> None:
        self._stats.denied(option.pool, reason)
        self._audit.turned_down(
            self._books.now,
            Kind.DENIED,
            operation,
            option,
            self._books.state.buckets,
            None if verdict.final else verdict.wait_us,
            reason,
            verdict.binding,
        )
        self._hindsight.denied(option.pool, operation.tenant, reason, verdict.binding)
        for number, hold in zip(option.buckets, option.holds, strict=True):
            bucket = self._books.state.buckets[number]
            if bucket.window in BUDGETS and hold > bucket.level + bucket.refill(self._books.now)[0]:
                self._stats.short[number] += 1
        retry = None if verdict.final else verdict.wait_us
        touched = self._books.touched(option.buckets)
        self.answers.append((ticket, an.Denied(reason, option.pool, verdict.binding, retry, touched)))

    def _refuse(self, ticket: int, field: str, message: str, *, full: bool = False) -> None:
        self.answers.append((ticket, an.Invalid(field, message, full)))

    # -- another owner's decisions ----------------------------------------------------------------------------------

    def tell(self, key: str) -> None:
        """What is known of ``key`` came from elsewhere: answer those that wait for it here."""
        if key not in self.waiting:
            return
        waiter = self.waiting[key]
        self.waiting.leave(waiter)
        for ticket in waiter.tickets:
            self._seen_before(ticket, waiter.operation)

    # -- turns --------------------------------------------------------------------------------------------------

    def withdraw(self, key: str) -> None:
        """Take back a waiting Reserve; its callers are told."""
        waiter = self.waiting[key]
        option = waiter.options[0]
        self.waiting.leave(waiter)
        operation = waiter.operation
        self._audit.ended(self._books.now, Kind.RELEASED, key, option.pool, option.shares, operation.tenant)
        touched = self._books.touched(option.buckets)
        for ticket in waiter.tickets:
            self.answers.append((ticket, an.Denied(Reason.RELEASED, option.pool, None, None, touched)))

    # -- what turns ask for -----------------------------------------------------------------------------------------

    def grant(self, waiter: Waiter, option: Option, would: an.Would | None) -> None:
        """Its turn has come."""
        self.waiting.leave(waiter, option)
        self._grant(waiter.operation, option, waiter.tickets, self._books.now - waiter.since, would)

    def drop(self, waiter: Waiter, option: Option) -> None:
        """This option can serve the waiter no more; deny when none is left."""
        verdict = self._judge(option, waiter.operation)
        if not self.waiting.drop(waiter, option):
            self.waiting.leave(waiter)
            for ticket in waiter.tickets:
                self._deny(ticket, verdict.reason, option, waiter.operation, verdict)

    def time_out(self, waiter: Waiter, ticket: int) -> None:
        """A caller's deadline has come."""
        waiter.tickets.remove(ticket)
        if not waiter.tickets:
            self.waiting.leave(waiter)
        verdict = self._judge(waiter.options[0], waiter.operation)
        overloaded = verdict.reason is Reason.BLOCKED and self.pressed(waiter.options[0].pool, waiter.operation)
        reason = Reason.BLOCKED if overloaded else Reason.TIMEOUT
        self._deny(ticket, reason, waiter.options[0], waiter.operation, verdict)


def _would(operation: op.Reserve, verdict: Verdict) -> an.Would:
    """What enforcing would have done with a call that does not fit now.

    Where the turn depends on what others give back, the wait is the longest that it can be.
    """
    wait, most = verdict.wait_us, operation.max_wait_us
    if wait == 0 and not verdict.final:
        return an.Would()
    hope = verdict.hope_us if wait is None else min(verdict.hope_us, wait)
    if verdict.final or most <= 0 or hope > most:
        return an.Would(verdict.reason, 0, verdict.binding)
    return an.Would(None, most if wait is None else min(wait, most), verdict.binding)


def _was_granted(ended: Ended) -> bool:
    """Whether a grant under this id still counts: it was not given back."""
    return ended.granted_at is not None and ended.kind is not EndKind.RELEASED
