"""Turns: those that wait are served in the order of their line, as levels rise and calls give back."""

from __future__ import annotations

from typing import Protocol

from paceline.engine import admission
from paceline.engine import answers as an
from paceline.engine import operations as op
from paceline.engine import pressure as pr
from paceline.engine.books import Books
from paceline.engine.dimensions import SECOND_US, WINDOW_US
from paceline.engine.fair import Cost, Node
from paceline.engine.outside import HALVES_US
from paceline.engine.queue import (
    CALLS,
    LINGER_US,
    NOTHING,
    PIECE_SECONDS,
    Ahead,
    Leaf,
    Line,
    Option,
    Waiter,
    costs_of,
    leaf_key,
)
from paceline.engine.state import Reservation
from paceline.engine.teaching import Teacher
from paceline.engine.urgent import Urgent
from paceline.engine.waiting import Waiting

SLACK = 1.1
"""By which a promised time is longer than what a leaf is entitled to would take."""
SLACK_US = SECOND_US // 4


class Desk(Protocol):
    """Who grants and denies."""

    def grant(self, waiter: Waiter, option: Option, would: an.Would | None) -> None:
        """Its turn has come."""

    def drop(self, waiter: Waiter, option: Option) -> None:
        """This option can serve the waiter no more."""

    def time_out(self, waiter: Waiter, ticket: int) -> None:
        """Its time is over."""

    def observing(self, pool: str, tenant: str) -> bool:
        """Whether nothing is enforced."""

    def count_that_fits(self, option: Option, operation: op.Reserve) -> int:
        """How many of its calls may pass now, if nobody came before it."""

    def pressed(self, pool: str, operation: op.Reserve) -> bool:
        """Whether the upstream lets no more in, whatever is left of the limits."""


class Turns:
    """Serves the lines of one ledger."""

    def __init__(self, books: Books, teacher: Teacher, waiting: Waiting, desk: Desk) -> None:
        self._books = books
        self._teacher = teacher
        self._waiting = waiting
        self._desk = desk
        self._laid_out = books.generation
        self.gather_until = 0

    # -- a newcomer -------------------------------------------------------------------------------------------------

    def may_pass(self, option: Option, operation: op.Reserve, *, look: bool = False) -> bool:
        """Whether nobody whose turn comes first waits for anything that this option would use.

        With ``look`` it does not come: no place is made for it.
        """
        line = self._waiting.lines.get(option.pool)
        if line is None or not len(line):
            return True
        key, now, tree = leaf_key(operation, option), self._books.now, line.tree
        leaf = line.glimpse(key) if look else line.leaf(key)
        if leaf.size:
            return False
        shares = []
        try:
            while (first := line.first(now)) is not None:
                stopped = self._stopped_by_share(first, *first.head())
                if stopped is None:
                    break
                shares.append(stopped)
                tree.set_aside(stopped)
            # Those behind one that only its share's cap stops keep off that share.
            return not any(node in shares for node in leaf.path()) and tree.comes_first(leaf, now)
        finally:
            tree.take_back()

    def passed(self, option: Option, operation: op.Reserve) -> None:
        """A newcomer was granted at once."""
        line = self._waiting.lines.get(option.pool)
        if line is None:
            return
        costs = option.costs or costs_of(self._books.state.buckets, option)
        line.tree.charge(line.leaf(leaf_key(operation, option)), costs, 1.0, self._books.now)
        if operation.priority is op.Priority.INTERACTIVE:
            self._note_urgent(option)

    def _note_urgent(self, option: Option) -> None:
        urgent, buckets = self._books.urgent, self._books.state.buckets
        for number, hold in zip(option.buckets, option.holds, strict=True):
            bucket = buckets[number]
            if hold and bucket.window in WINDOW_US and bucket.pool and not bucket.share:
                if number not in urgent:
                    urgent[number] = Urgent(bucket.burst)
                urgent[number].note(hold * option.count, self._books.now)

    def settled(self, reservation: Reservation, charges: tuple[int, ...]) -> None:
        """A call turned out to have cost ``charges``: its tenant had so much more, or less, than was thought."""
        line = self._waiting.lines.get(reservation.pool)
        if line is None:
            return
        costs = []
        for number, hold, charge in zip(reservation.buckets, reservation.holds, charges, strict=True):
            bucket = self._books.state.buckets[number]
            window = WINDOW_US.get(bucket.window)
            if hold != charge and window is not None and bucket.pool and not bucket.share and bucket.amount:
                amount = charge - hold
                costs.append(Cost(number, amount * window / bucket.amount / SECOND_US, amount))
        if costs:
            leaf = line.leaf((reservation.priority, reservation.shares, reservation.tenant))
            line.tree.correct(leaf, tuple(costs))

    def ahead(self, option: Option, operation: op.Reserve) -> dict[int, Ahead]:
        """What will be served before a newcomer, by bucket."""
        line = self._waiting.lines.get(option.pool)
        if line is None or not len(line):
            return {}
        option.costs = costs_of(self._books.state.buckets, option)
        found = line.ahead(leaf_key(operation, option), option)
        option.before = found.get(CALLS, NOTHING).amount
        return found

    def expect(self, waiter: Waiter) -> None:
        """Note by when a waiter will have had its turn, if it gets no more than what it is entitled to."""
        now, buckets = self._books.now, self._books.state.buckets
        for option in waiter.options:
            line = self._waiting.lines[option.pool]
            key = leaf_key(waiter.operation, option)
            wanted = line.leaf(key).wanted
            seconds = 0.0
            for number in option.buckets:
                bucket = buckets[number]
                window = WINDOW_US.get(bucket.window)
                if wanted.get(number) and window is not None:
                    rate = max(1, bucket.amount - bucket.outside) / window * SECOND_US
                    debt = max(0, -bucket.level - bucket.refill(now)[0])
                    seconds = max(seconds, (wanted[number] + debt) / rate)
            expected = now + int(line.worst(key, seconds) * SLACK * SECOND_US) + SLACK_US
            waiter.expected_by = expected if waiter.expected_by is None else min(expected, waiter.expected_by)

    # -- service ----------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Give their turn to all whose time has come, and deny all whose deadline has, until nothing moves."""
        if self._laid_out != self._books.generation:
            self._laid_out = self._books.generation
            self._waiting.refit()
        if self._books.now < self.gather_until:
            self._time_out()
            return
        moved = bool(self._waiting.lines)
        while moved:
            moved = False
            for pool in list(self._waiting.lines):
                moved = self._serve_line(pool) or moved
            moved = self._time_out() or moved

    def _time_out(self) -> bool:
        """Deny callers whose deadline has come; whether a waiter left its lines by that."""
        left = False
        for waiter, ticket in self._waiting.due(self._books.now):
            self._desk.time_out(waiter, ticket)
            left = left or not waiter.waiting
        return left

    def _serve_line(self, pool: str) -> bool:
        """Serve all of a line whose turn has come; whether anybody was."""
        line, now, moved = self._waiting.lines[pool], self._books.now, False
        if not len(line) and now - line.empty_since > LINGER_US:
            self._waiting.forget(pool)
            return False
        tree = line.tree
        for node in line.stopped:
            node.stopped = False
        line.stopped.clear()
        while (leaf := line.first(now)) is not None:
            waiter, option = leaf.head()
            found = self._serve_head(line, leaf, waiter, option)
            if isinstance(found, Node):
                tree.set_aside(found)
            elif found:
                moved = True
            else:
                break
        tree.take_back()
        return moved

    def _serve_head(self, line: Line, leaf: Leaf, waiter: Waiter, head: Option) -> bool | Node:
        """Serve the first: whether that changed anything; a node: it and those beside it under that node cannot be."""
        state, now, operation = self._books.state, self._books.now, waiter.operation
        pool = state.pools[head.pool]
        if pool.blocked_until > now and not pool.closed and not pool.paused:
            return False
        count = 1 if operation.partial else operation.count
        options = _beside(waiter, head)
        for option in options:
            hopeless = any(
                hold and admission.is_too_large(self._books, number, state.buckets[number].need(hold, count))
                for number, hold in zip(option.buckets, option.holds, strict=True)
            )
            if hopeless or pool.paused or pool.blocked_until > now:
                self._desk.drop(waiter, option)
                return True
            for number in option.buckets:
                if state.buckets[number].outside:
                    self._teacher.lapse(number, now)
            option.entitled = line.more_urgent_wait(option.priority)
        would = an.Would() if self._desk.observing(head.pool, operation.tenant) else None
        for option in options:
            if would is not None or self._desk.count_that_fits(option, operation):
                if len(state.open) + operation.count > self._books.caps.open:
                    return False
                if operation.priority is op.Priority.INTERACTIVE:
                    self._note_urgent(option)
                self._desk.grant(waiter, option, would)
                return True
        stopped = self._stopped_by_share(leaf, waiter, head)
        if stopped is not None:
            stopped.stopped = True
            line.stopped.append(stopped)
            return stopped
        if self._desk.pressed(head.pool, operation):
            return False
        return self._claim(line, leaf, waiter, head)

    def _stopped_by_share(self, leaf: Leaf, waiter: Waiter, head: Option) -> Node | None:
        """The outermost share whose cap stops the first of a leaf, if all its options here are stopped by caps."""
        count = 1 if waiter.operation.partial else waiter.operation.count
        names: set[str] = set()
        buckets = self._books.state.buckets
        for option in _beside(waiter, head):
            short = {
                buckets[number].share
                for number, hold in zip(option.buckets, option.holds, strict=True)
                if hold and buckets[number].share and admission.missing(self._books, number, option, hold, count) > 0
            }
            if not short:
                return None
            names |= short
        found = None
        for node in leaf.path():
            if node.key in names:
                found = node
        return found or leaf

    def _piece(self, option: Option) -> tuple[float, dict[int, int]] | None:
        """The next piece of a large call: its portion so far with it, and its claim; ``None``: the rest at once."""
        seconds = max((cost.seconds for cost in option.costs), default=0.0)
        portion = option.portion + PIECE_SECONDS / seconds if seconds > 2 * PIECE_SECONDS else 1.0
        if portion >= 1.0:
            return None
        demands = self._books.outlook.demands
        return portion, {cost.number: int(cost.amount * portion) for cost in option.costs if cost.number not in demands}

    def _claim(self, line: Line, leaf: Leaf, waiter: Waiter, option: Option) -> bool | Node:
        """Set the next piece aside for a large call, if it is there."""
        piece = self._piece(option)
        if piece is None:
            return False
        portion, claim = piece
        if self._is_junior(line, option, claim):
            return leaf
        if any(self._short_of(number, option, amount) > 0 for number, amount in claim.items()):
            return False
        line.set_aside(waiter, option, portion, claim, self._books.now)
        return True

    def _short_of(self, number: int, option: Option, amount: int) -> int:
        """What is missing so that an option could claim so much of a bucket."""
        bucket = self._books.state.buckets[number]
        level = bucket.level + bucket.refill(self._books.now)[0]
        return amount - level + admission.kept(self._books, number, option, amount)

    # -- when ---------------------------------------------------------------------------------------------------------

    def wake_at(self) -> int | None:
        """When a deadline comes or somebody's turn, if nothing is given back before."""
        deadline = self._waiting.next_deadline()
        times = [] if deadline is None else [deadline]
        if self._books.now < self.gather_until:
            return min([*times, self.gather_until]) if times else None
        for pool, line in self._waiting.lines.items():
            if len(line):
                times += self._turns(pool, line)
        return min(times, default=None)

    def _turns(self, pool: str, line: Line) -> list[int]:
        """When something may change for the first of a line, and for those whose shares stop them."""
        now, tree, times = self._books.now, line.tree, []
        held = self._books.state.pools[pool].pressure
        if held is not None:
            # The limits that climb will be higher then.
            times += [ramp.next_at for ramp in held.ramps]
        while (leaf := line.first(now)) is not None:
            waiter, head = leaf.head()
            if len(self._books.state.open) + waiter.operation.count > self._books.caps.open:
                # Not a matter of time: the next call that ends brings a step of its own.
                break
            turns = [self.turn(waiter, option) for option in _beside(waiter, head)]
            times += [turn for turn in turns if turn is not None]
            stopped = self._stopped_by_share(leaf, waiter, head)
            piece = self._piece(head)
            if stopped is None and piece is not None and self._is_junior(line, head, piece[1]):
                stopped = leaf
            if stopped is None:
                if piece is not None and not self._desk.pressed(pool, waiter.operation):
                    opens = self._books.state.pools[pool].blocked_until
                    times += [max(at, opens) for at in self._claimable_at(head, piece[1])]
                break
            tree.set_aside(stopped)
        tree.take_back()
        return times

    def _is_junior(self, line: Line, option: Option, claim: dict[int, int]) -> bool:
        """Whether such a claim would leave no place for the whole of the one that claims first.

        Without that rule several could claim parts of a burst of which none is enough.
        """
        senior = next(iter(line.claimants.values()), option)
        if senior is option:
            return False
        buckets = self._books.state.buckets
        claimed: dict[int, int] = {}
        for each in line.claimants.values():
            if each is not senior and each is not option:
                for number, found in each.claim.items():
                    claimed[number] = claimed.get(number, 0) + found.amount
        return any(
            amount + claimed.get(number, 0) + claim.get(number, 0) > buckets[number].burst
            for number, _, amount in senior.costs
        )

    def _claimable_at(self, option: Option, claim: dict[int, int]) -> list[int]:
        """When so much can be set aside; empty: no time can be said."""
        at = now = self._books.now
        for number, amount in claim.items():
            short = self._short_of(number, option, amount)
            if short > 0:
                bucket = self._books.state.buckets[number]
                wait = bucket.wait_us(-short, bucket.refill(now)[1], now)
                if wait is None:
                    return []
                at = max(at, now + (min(wait, HALVES_US) if bucket.outside else wait))
        return [at]

    def turn(self, waiter: Waiter, option: Option) -> int | None:
        """When the levels will have risen enough; ``None``: no time can be said."""
        state, now = self._books.state, self._books.now
        count = 1 if waiter.operation.partial else waiter.operation.count
        pool = state.pools[option.pool]
        turn = pool.blocked_until
        if pool.pressure is not None and self._desk.pressed(option.pool, waiter.operation):
            turn = max(turn, pr.room_at(pool.pressure, len(state.open_in[option.pool]), now, count))
        for number, hold in zip(option.buckets, option.holds, strict=True):
            missing = admission.missing(self._books, number, option, hold, count) if hold else 0
            if missing > 0:
                bucket = state.buckets[number]
                wait = bucket.wait_us(-missing, bucket.refill(now)[1], now)
                if wait is None:
                    return None
                if bucket.outside:
                    # What nothing confirms decays meanwhile.
                    wait = min(wait, HALVES_US)
                turn = max(turn, now + max(wait, self._books.outlook.least_wait_us(number)))
        return turn


def _beside(waiter: Waiter, head: Option) -> list[Option]:
    """The options of the first in a leaf that stand in that leaf: they differ in size only, and share its turn."""
    if len(waiter.options) == 1:
        return [head]
    return [option for option in waiter.options if option.pool == head.pool and option.shares == head.shares]
