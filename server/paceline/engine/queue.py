"""The line of one pool: who waits there, in what order, and what those who wait for much have been set aside already.

Those of one priority, path of shares and tenant stand behind each other by arrival, in a leaf of the line's tree
(:mod:`~paceline.engine.fair`), which says whose turn it is. A call that takes more than a moment's refill is served by
pieces: each time that its leaf has its turn, as much as a tenth of a second brings is set aside for it, its *claim*, so
that a huge call keeps out nobody for longer than that, and still gets all that its leaf is entitled to.

A line knows nothing of levels: :mod:`~paceline.engine.turns` serves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple, cast

import msgspec

from paceline.engine.accounting import Sizes
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import SECOND_US, UNLIMITED, WINDOW_US, Dimension
from paceline.engine.fair import LENT_US, Cost, Costs, Node, Promise, Tree
from paceline.engine.operations import CLASSES, Class, Priority, Reserve
from paceline.engine.recipe import Recipe
from paceline.engine.sizes import Kind
from paceline.engine.state import Share

PIECE_SECONDS = 0.1
"""Of refill, that a large call is served at a time."""
LINGER_US = 10 * SECOND_US
"""A line is remembered for so long after the last has left: who had how much."""
CALLS = -1
"""Stands for the number of calls where amounts go by the number of the bucket."""
SURE = 0.8
"""Part of what others have before a newcomer that it has to wait for, whoever gives up and whatever comes back."""
MAX_IDLE = 4_096
"""Leaves of which nobody waits, kept for what they have had; about 500 bytes each."""
_SPARE = 256
"""Places of those that left, kept beyond as many as wait, before they are swept."""


class Claim(NamedTuple):
    """What is set aside of a bucket. Those that are more urgent may take it, and leave it to be made up for by refill,
    but for what is ``firm``."""

    amount: int
    firm: int


class Ahead(NamedTuple):
    """What comes before a newcomer, and what of it is certain."""

    amount: int
    sure: int


NOTHING = Ahead(0, 0)


class Option(msgspec.Struct, eq=False):
    """One candidate of a waiter: its place in the request, its pool, and what it would hold in which buckets."""

    index: int
    pool: str
    shares: tuple[str, ...]
    buckets: tuple[int, ...]
    holds: tuple[int, ...]
    sizes: Sizes
    recipe: Recipe
    count: int = 1
    """Calls that must fit together."""
    kind: Kind = ("", "", "")
    """Of what kind the call is, for what is learned of sizes."""
    margin: int = 0
    """What must be left beside the hold where the upstream lets a call in by an estimate of its own."""
    priority: Priority = Priority.STANDARD
    open: bool = True
    """Whether it may still serve its waiter."""
    costs: Costs = ()
    portion: float = 0.0
    """How much of it was served, into its claim."""
    firm: float = 0.0
    """How much of that while more urgent ones waited."""
    entitled: bool = False
    """Whether its turn comes although more urgent ones wait: nothing need be left to others of them."""
    claim: dict[int, Claim] = {}
    """What is set aside for it, by bucket."""
    before: int = 0
    """Calls that come before it, as it was judged last."""


class Claims:
    """All claims of a ledger."""

    __slots__ = ("_of",)

    def __init__(self) -> None:
        self._of: dict[int, dict[int, Option]] = {}
        """Those with a claim, by bucket and ``id``; few."""

    def __bool__(self) -> bool:
        return bool(self._of)

    def keep(self, option: Option) -> None:
        """Take an option's claim into account."""
        for number in option.claim:
            self._of.setdefault(number, {})[id(option)] = option

    def drop(self, option: Option) -> None:
        """It has none any more."""
        for number in option.claim:
            of = self._of[number]
            del of[id(option)]
            if not of:
                del self._of[number]

    def others(self, number: int, option: Option) -> int:
        """What claims keep an option off."""
        return sum(
            claim.firm if option.priority < each.priority else claim.amount
            for each in self._of.get(number, {}).values()
            if each is not option and (claim := each.claim[number])
        )


class Waiter:
    """A Reserve that waits in the lines of all its options; ``tickets`` are all callers that sent it.

    ``deadline`` is the latest that any of them has given. ``arrival`` is when the wait began, elsewhere maybe: what it
    was there before ``since`` counts. ``expected_by``: it will have had its turn by then.
    """

    __slots__ = (
        "arrival",
        "deadline",
        "expected_by",
        "operation",
        "options",
        "serial",
        "since",
        "tickets",
        "waiting",
    )

    def __init__(self, operation: Reserve, options: tuple[Option, ...], ticket: int, since: int, serial: int) -> None:
        self.operation = operation
        self.options = options
        self.tickets = [ticket]
        self.since = self.deadline = since
        self.expected_by: int | None = None
        self.arrival = since - operation.waited_us
        self.serial = serial
        self.waiting = True


_Place = tuple[int, int, int, Waiter, Option]
"""Arrival, serial, index of the option: no two are equal."""


class Leaf(Node):
    """Those of one priority, path of shares and tenant: a heap by arrival. Those that left are dropped at the head."""

    __slots__ = ("places", "size")

    def __init__(self, node: Node) -> None:
        super().__init__(node.parent, node.key, node.serial, node.weight)
        self.places: list[_Place] = []
        self.size = 0

    def head(self) -> tuple[Waiter, Option]:
        """The first; somebody waits."""
        places = self.places
        while not places[0][4].open:
            heappop(places)
        return places[0][3], places[0][4]


LeafKey = tuple[Priority, tuple[str, ...], str]
"""A priority, a path of shares and a tenant."""


class Line:
    """The waiters of one pool."""

    def __init__(self, pool: str, claims: Claims) -> None:
        """``claims``: those of all lines."""
        self.tree = Tree()
        self.claims = claims
        self.claimants: dict[int, Option] = {}
        """Those with a claim, by ``id``, the one that began first to claim before the others."""
        self.stopped: list[Node] = []
        """Nodes whose own caps stopped them when the line was served last."""
        self.empty_since = 0
        self._pool = pool
        self._leaves: dict[LeafKey, Leaf] = {}
        self._size = 0
        self._waiting = 0
        """Leaves of which somebody waits."""
        self._laid_out: tuple[Sequence[Bucket], dict[str, Share], tuple[Class, ...]] = ([], {}, ())

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Waiter]:
        """All that wait, in no order; one with several options here comes up once for each."""
        return (place[3] for leaf in self._leaves.values() for place in leaf.places if place[4].open)

    # -- who gets how much ------------------------------------------------------------------------------------------

    def lay_out(self, buckets: Sequence[Bucket], shares: dict[str, Share], classes: tuple[Class, ...]) -> None:
        """Weights and promises as they are defined now; those of nodes that are there change with them."""
        self._laid_out = (buckets, shares, classes)
        self.tree.promises.clear()
        for key, leaf in self._leaves.items():
            self._weigh(key, leaf)

    def _weigh(self, key: LeafKey, leaf: Leaf) -> None:
        _, shares, classes = self._laid_out
        priority, path, _ = key
        node = leaf.parent
        for name in reversed(path):
            share = shares.get(name)
            node.reweigh(1 if share is None else share.weight)
            self._promise(node, name, self._amounts(share), self._parts(share))
            node = node.parent
        found = next(each for each in (*classes, *CLASSES) if each.priority is priority)
        node.reweigh(found.weight)
        self._promise(node, priority, {}, {}, found.minimum / 1_000)

    def _amounts(self, share: Share | None) -> dict[int, int]:
        return self._own({} if share is None else {each.dimension: each.amount for each in share.guarantees})

    def _parts(self, share: Share | None) -> dict[int, int]:
        """In thousandths, by bucket."""
        return self._own({} if share is None else {each.dimension: each.permille for each in share.guarantee_parts})

    def _own(self, promised: dict[Dimension, int]) -> dict[int, int]:
        """What is promised of the pool's own limits, by bucket."""
        return {
            number: promised[bucket.dimension]
            for number, bucket in (enumerate(self._laid_out[0]) if promised else ())
            if bucket.pool == self._pool and not bucket.share and promised.get(bucket.dimension)
        }

    def _promise(
        self, node: Node, key: object, amounts: dict[int, int], parts: dict[int, int], part: float = 0.0
    ) -> None:
        """Priorities and shares have one promise each, wherever in the tree they are."""
        promise = self.tree.promises.get(key)
        if not amounts and not parts and not part:
            found = None
        elif promise is None:
            found = self.tree.promises.setdefault(key, Promise(amounts, part, parts))
        else:
            found = promise
        if node.promise is not found:
            node.promise = found
            if found is not None and node.active:
                found.nodes.append(node)

    def leaf(self, key: LeafKey) -> Leaf:
        """The place of a key; made when it is first asked for."""
        leaf = self._leaves.get(key)
        if leaf is None:
            if len(self._leaves) - self._waiting >= MAX_IDLE:
                self._sweep()
            priority, path, tenant = key
            node = self.tree.child(self.tree.root, priority, serial=-len(Priority) + priority)
            for name in path:
                node = self.tree.child(node, name)
            leaf = Leaf(self.tree.child(node, (tenant,)))
            node.children[leaf.key] = leaf
            self._leaves[key] = leaf
            self._weigh(key, leaf)
        return leaf

    def _sweep(self) -> None:
        """Forget what those had of whom nobody waits."""
        for key, leaf in list(self._leaves.items()):
            if not leaf.size:
                del self._leaves[key]
                for node in list(leaf.path()):
                    if not node.active and not node.children:
                        del node.parent.children[node.key]

    def first(self, now: int) -> Leaf | None:
        """The leaf whose turn is next; of those not set aside."""
        return cast("Leaf | None", self.tree.first(now))

    # -- who waits --------------------------------------------------------------------------------------------------

    def push(self, waiter: Waiter, option: Option, now: int) -> None:
        """Stand behind all of the same leaf that began to wait before."""
        leaf = self.leaf(leaf_key(waiter.operation, option))
        heappush(leaf.places, (waiter.arrival, waiter.serial, option.index, waiter, option))
        leaf.size += 1
        self._size += 1
        if leaf.size == 1:
            self._waiting += 1
            self.tree.enter(leaf, now)
        self.want(leaf, option, 1)

    def left(self, waiter: Waiter, option: Option, now: int, *, served: bool = False) -> None:
        """An option was served, denied or withdrawn."""
        leaf = self.leaf(leaf_key(waiter.operation, option))
        if served:
            self.tree.charge(leaf, option.costs, 1.0 - option.portion, now)
        elif option.portion:
            self.tree.charge(leaf, option.costs, -option.portion, now)
        self._unclaim(option)
        self.want(leaf, option, -1)
        option.open = False
        leaf.size -= 1
        self._size -= 1
        if not leaf.size:
            leaf.places.clear()
            self.tree.leave(leaf)
            self._waiting -= 1
            self.empty_since = now
        elif len(leaf.places) > 2 * leaf.size + _SPARE:
            leaf.places = [place for place in leaf.places if place[4].open]
            heapify(leaf.places)

    def refit(
        self, waiter: Waiter, option: Option, buckets: tuple[int, ...], holds: tuple[int, ...], recipe: Recipe, now: int
    ) -> None:
        """Definitions changed: a waiter would hold something else now."""
        leaf = self.leaf(leaf_key(waiter.operation, option))
        if option.portion:
            self.tree.charge(leaf, option.costs, -option.portion, now)
        self._unclaim(option)
        self.want(leaf, option, -1)
        option.buckets, option.holds, option.recipe = buckets, holds, recipe
        option.costs = costs_of(self._laid_out[0], option)
        self.want(leaf, option, 1)

    def want(self, leaf: Leaf, option: Option, sign: int) -> None:
        """Count what an option would hold: all of its calls, if they come together."""
        for node in leaf.path():
            wanted = node.wanted
            wanted[CALLS] = wanted.get(CALLS, 0) + sign * option.count
            for number, hold in zip(option.buckets, option.holds, strict=True):
                if hold:
                    wanted[number] = wanted.get(number, 0) + sign * hold * option.count

    # -- claims -----------------------------------------------------------------------------------------------------

    def set_aside(self, waiter: Waiter, option: Option, portion: float, amounts: dict[int, int], now: int) -> None:
        """A piece of a large call was served."""
        more = portion - option.portion
        self.tree.charge(self.leaf(leaf_key(waiter.operation, option)), option.costs, more, now)
        if self.more_urgent_wait(option.priority):
            option.firm += more
        self.claims.drop(option)
        option.portion = portion
        option.claim = {
            number: Claim(amount, int(amount * option.firm / portion)) for number, amount in amounts.items()
        }
        self.claimants.setdefault(id(option), option)
        self.claims.keep(option)

    def more_urgent_wait(self, priority: Priority) -> bool:
        """Whether others wait who are more urgent, and not stopped by their own caps."""
        classes = self.tree.root.children.items()
        return any(node.active and not node.stopped for key, node in classes if cast("Priority", key) < priority)

    def _unclaim(self, option: Option) -> None:
        self.claims.drop(option)
        option.claim, option.portion, option.firm = {}, 0.0, 0.0
        self.claimants.pop(id(option), None)

    # -- what comes before ------------------------------------------------------------------------------------------

    def ahead(self, key: LeafKey, option: Option) -> dict[int, Ahead]:
        """What will be served of those that wait now before a newcomer is, by bucket; of :data:`CALLS`: how many.

        From the leaf up: what of each sister comes before the tag that the newcomer's branch will have when it is
        served.
        """
        leaf = self.leaf(key)
        return self._ahead(leaf, option, leaf.wanted)

    def ahead_of(self, waiter: Waiter, option: Option) -> dict[int, Ahead]:
        """The same of one that waits. Takes time with the number of those in its leaf."""
        leaf = self.leaf(leaf_key(waiter.operation, option))
        place = (waiter.arrival, waiter.serial, option.index)
        own: dict[int, int] = {}
        for arrival, serial, index, other, each in leaf.places:
            if each.open and other is not waiter and (arrival, serial, index) < place:
                own[CALLS] = own.get(CALLS, 0) + each.count
                for number, hold in zip(each.buckets, each.holds, strict=True):
                    own[number] = own.get(number, 0) + hold * each.count
        return self._ahead(leaf, option, own)

    def look_ahead(self, key: LeafKey, option: Option) -> dict[int, Ahead]:
        """:meth:`ahead` of one that does not come: no place is made for it."""
        leaf = self.glimpse(key)
        return self._ahead(leaf, option, leaf.wanted)

    def glimpse(self, key: LeafKey) -> Leaf:
        """The place of a key, or one like it that is not kept."""
        found = self._leaves.get(key)
        if found is not None:
            return found
        _, shares, classes = self._laid_out
        priority, path, tenant = key
        weight = float(next(each for each in (*classes, *CLASSES) if each.priority is priority).weight)
        node = self.tree.root.children.get(priority) or Node(self.tree.root, priority, 0, weight)
        for name in path:
            share = shares.get(name)
            node = node.children.get(name) or Node(node, name, 0, 1.0 if share is None else share.weight)
        return Leaf(Node(node, (tenant,), 0))

    def _ahead(self, leaf: Leaf, option: Option, own_leaf: Mapping[int, int]) -> dict[int, Ahead]:
        """``own_leaf``: what comes before it in its own leaf."""
        amounts = {number: float(wanted) for number, wanted in own_leaf.items()}
        costs = {cost.number: cost.seconds / max(1, cost.amount) for cost in option.costs}
        own = {cost.number: float(cost.amount) for cost in option.costs}
        for node in leaf.path():
            parent = node.parent
            work = max((costs[number] * (amounts.get(number, 0.0) + own[number]) for number in costs), default=0.0)
            finish = node.start() + work / node.weight
            for sister in parent.children.values():
                if sister is node or not sister.active or sister.stopped:
                    continue
                backlog = max((costs[number] * sister.wanted.get(number, 0) for number in costs), default=0.0)
                before = (finish - sister.tag) * sister.weight
                if before > 0 and backlog > 0:
                    part = min(1.0, before / backlog)
                    for number, wanted in sister.wanted.items():
                        amounts[number] = amounts.get(number, 0.0) + wanted * part
        return {
            number: Ahead(int(amount), int(amount * SURE + own_leaf.get(number, 0) * (1 - SURE)))
            for number, amount in amounts.items()
        }

    def worst(self, key: LeafKey, seconds: float) -> float:
        """How long a leaf waits at most for so much service, in seconds of refill, if all come back that came lately.

        Each sister may be served until its tag is what the leaf's will be then, and one piece more.
        """
        for node in self.leaf(key).path():
            finish = node.start() + seconds / node.weight
            total = seconds
            for sister in node.parent.children.values():
                if sister is not node:
                    total += max(0.0, finish - sister.start()) * sister.weight + 2 * PIECE_SECONDS
            part = 0.0 if node.promise is None else node.promise.part
            seconds = min(total, seconds / part + LENT_US / SECOND_US) if part else total
        promised = sum(promise.part for promise in self.tree.promises.values())
        return seconds / max(0.1, 1.0 - promised)


def leaf_key(operation: Reserve, option: Option) -> LeafKey:
    """Where one stands for one of its options."""
    return operation.priority, option.shares, operation.tenant


def costs_of(buckets: Sequence[Bucket], option: Option) -> Costs:
    """What serving an option takes of its pool's limits that refill."""
    found = []
    for number, hold in zip(option.buckets, option.holds, strict=True):
        bucket = buckets[number]
        window = WINDOW_US.get(bucket.window)
        if hold and window is not None and bucket.pool and not bucket.share and 0 < bucket.amount < UNLIMITED:
            amount = hold * option.count
            found.append(Cost(number, amount * window / bucket.amount / SECOND_US, amount))
    return tuple(found)
