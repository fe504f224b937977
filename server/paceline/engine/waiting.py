"""Those that wait: in the lines of their pools, each until its deadline. Soft state: it dies with its process."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

import msgspec

from paceline.engine.accounting import Sizes
from paceline.engine.books import Books
from paceline.engine.operations import Priority, Reserve
from paceline.engine.queue import Line, Option, Waiter, costs_of

_SPARE = 1_024
"""Deadlines of waiters that left, kept beyond as many as wait, before they are swept."""


class Pending(msgspec.Struct, frozen=True):
    """A waiting Reserve as others see it.

    ``pools`` are those that it still waits for, in the caller's order; ``shares`` and ``sizes`` go with the first.
    ``since`` counts what it had waited before this process; ``deadline`` is the latest that any of its callers gave.
    """

    key: str
    pools: tuple[str, ...]
    shares: tuple[str, ...]
    sizes: Sizes
    tenant: str
    route: str
    priority: Priority
    since: int
    deadline: int
    ordinal: int
    """Grows with every arrival."""
    expected_by: int | None = None
    """When it will have had its turn, if it gets no more than what it is entitled to."""


class Queued(msgspec.Struct, frozen=True):
    """How many wait, and since when the oldest of them does."""

    count: int
    since: int


class Waiting:
    """The waiters of one ledger."""

    def __init__(self, books: Books) -> None:
        self.lines: dict[str, Line] = {}
        """By pool; those that are empty go when they have been so for long."""
        self._books = books
        self._caps = books.caps
        self._waiters: dict[str, Waiter] = {}
        self._of_tenant: dict[str, int] = {}
        self._deadlines: list[tuple[int, int, int, Waiter]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        """Those that wait, in the order in which they came here. They may come and go meanwhile."""
        return (waiter for waiter in list(self._waiters.values()) if waiter.waiting)

    def __contains__(self, key: str) -> bool:
        return key in self._waiters

    def __getitem__(self, key: str) -> Waiter:
        return self._waiters[key]

    def is_full(self, tenant: str) -> bool:
        """Whether nobody more of this tenant may wait."""
        of_tenant = self._of_tenant.get(tenant, 0)
        return len(self._waiters) >= self._caps.waiters or of_tenant >= self._caps.waiters_per_tenant

    def add(self, ticket: int, operation: Reserve, options: tuple[Option, ...]) -> Waiter:
        """Let a Reserve wait, for at most its ``max_wait_us``."""
        now, state = self._books.now, self._books.state
        self._serial += 1
        waiter = Waiter(operation, options, ticket, now, self._serial)
        self._waiters[operation.key] = waiter
        self._of_tenant[operation.tenant] = self._of_tenant.get(operation.tenant, 0) + 1
        for option in options:
            line = self.lines.get(option.pool)
            if line is None:
                line = self.lines[option.pool] = Line(option.pool, self._books.claims)
                line.lay_out(state.buckets, state.shares, state.classes)
            option.costs = costs_of(state.buckets, option)
            line.push(waiter, option, now)
        self._watch(waiter, ticket, now + operation.max_wait_us)
        return waiter

    def join(self, ticket: int, operation: Reserve, now: int) -> int | None:
        """A waiting Reserve was sent again: both callers get its answer, each within its own wait.

        Returns a ticket to turn away if there are too many.
        """
        waiter = self._waiters[operation.key]
        waiter.tickets.append(ticket)
        self._watch(waiter, ticket, now + max(0, operation.max_wait_us))
        return waiter.tickets.pop(0) if len(waiter.tickets) > self._caps.tickets_per_waiter else None

    def leave(self, waiter: Waiter, served: Option | None = None) -> None:
        """Take a waiter out of all its lines; ``served``: this option had its turn."""
        waiter.waiting = False
        del self._waiters[waiter.operation.key]
        tenant = waiter.operation.tenant
        self._of_tenant[tenant] -= 1
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]
        for option in waiter.options:
            self.lines[option.pool].left(waiter, option, self._books.now, served=option is served)

    def drop(self, waiter: Waiter, option: Option) -> bool:
        """Take a waiter out of one of its lines; false if it is its last."""
        if len(waiter.options) == 1:
            return False
        waiter.options = tuple(other for other in waiter.options if other is not option)
        self.lines[option.pool].left(waiter, option, self._books.now)
        return True

    def forget(self, pool: str) -> None:
        """A line that has been empty for long."""
        del self.lines[pool]
        for number in self._books.state.pools[pool].buckets:
            self._books.urgent.pop(number, None)

    def refit(self) -> None:
        """Definitions changed: lay out anew what each waiter would hold."""
        books = self._books
        for line in self.lines.values():
            line.lay_out(books.state.buckets, books.state.shares, books.state.classes)
        for waiter in self._waiters.values():
            for option in waiter.options:
                numbers = books.plan(option.pool, option.shares)
                if numbers is None or numbers == option.buckets:
                    continue
                recipe = books.recipe(option.pool, numbers)
                prices = waiter.operation.candidates[option.index].prices
                holds = recipe.holds(option.sizes, prices)
                self.lines[option.pool].refit(waiter, option, numbers, holds, recipe, books.now)

    def due(self, now: int) -> Iterator[tuple[Waiter, int]]:
        """Waiters and tickets whose deadline has come; each is handed out once."""
        deadlines = self._deadlines
        while deadlines and (deadlines[0][0] <= now or not deadlines[0][3].waiting):
            _, _, ticket, waiter = heappop(deadlines)
            if waiter.waiting and ticket in waiter.tickets:
                yield waiter, ticket

    def next_deadline(self) -> int | None:
        """The next deadline of one that still waits."""
        deadlines = self._deadlines
        while deadlines and not deadlines[0][3].waiting:
            heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def _watch(self, waiter: Waiter, ticket: int, deadline: int) -> None:
        self._serial += 1
        waiter.deadline = max(waiter.deadline, deadline)
        heappush(self._deadlines, (deadline, self._serial, ticket, waiter))
        if len(self._deadlines) > 2 * self._caps.tickets_per_waiter * len(self._waiters) + _SPARE:
            self._deadlines = [entry for entry in self._deadlines if entry[3].waiting]
            heapify(self._deadlines)


class Waiters:
    """Those that wait, to look at: changes nothing, and always shows the present."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Pending]:
        """In the order in which they came here. Whoever leaves before its turn comes up is left out."""
        return map(_pending, self._waiting)

    def get(self, key: str) -> Pending | None:
        """The one of this key."""
        return _pending(self._waiting[key]) if key in self._waiting else None

    def queue(self, pool: str) -> dict[Priority, Queued]:
        """Those of one pool, by priority; nothing for a priority of which none waits."""
        since: dict[Priority, list[int]] = {}
        for waiter in set(self._waiting.lines.get(pool, ())):
            since.setdefault(waiter.operation.priority, []).append(_since(waiter))
        return {priority: Queued(len(since[priority]), min(since[priority])) for priority in sorted(since)}


def _pending(waiter: Waiter) -> Pending:
    operation, first = waiter.operation, waiter.options[0]
    return Pending(
        operation.key,
        tuple(dict.fromkeys(option.pool for option in waiter.options)),
        first.shares,
        first.sizes,
        operation.tenant,
        operation.route,
        operation.priority,
        _since(waiter),
        waiter.deadline,
        waiter.serial,
        waiter.expected_by,
    )


def _since(waiter: Waiter) -> int:
    return max(0, waiter.since - waiter.operation.waited_us)
