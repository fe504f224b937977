"""Virtual time: whose turn is next among those that wait.

Start-time fair queueing (P. Goyal, H. Vin, H. Cheng, SIGCOMM 1996) over a tree of priorities, shares and tenants. Every
node has a tag, the service that it had ÷ its weight; of the children of a node the one with the least tag is next. A
node that begins to wait starts no earlier than the one served last: idling saves nothing. Service is counted in each
limit on its own, in seconds of that limit's refill, and a tag is the largest of them: the dominant share (A. Ghodsi et
al., NSDI 2011), so that many small calls and few huge ones get the same.

A node may have a promise: a rate that it gets whenever it wants it. One that has had less goes before all tags (the
real-time criterion of I. Stoica, H. Zhang, T. Ng, SIGCOMM 1997). Time in µs. All of it is soft state.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple

from paceline.engine.dimensions import SECOND_US

LENT_US = SECOND_US
"""What a node had beyond its promise counts against that for so long."""
_SPARE = 64
_LEAST_WEIGHT = 1e-6


class Cost(NamedTuple):
    """What a call takes of one limit."""

    number: int
    """Of the bucket."""
    seconds: float
    """Of the limit's refill."""
    amount: int
    """In the limit's unit."""


Costs = tuple[Cost, ...]


class Promise:
    """A rate that those under one or several nodes get together whenever they want it."""

    __slots__ = ("amounts", "due", "grace_us", "nodes", "part", "parts")

    def __init__(self, amounts: Mapping[int, int], part: float = 0.0, parts: Mapping[int, int] | None = None) -> None:
        """``amounts`` a minute, by bucket, and ``parts`` of limits, in thousandths by bucket; or a ``part`` of all."""
        self.amounts, self.part, self.parts = dict(amounts), part, dict(parts or {})
        self.grace_us = LENT_US if part else 0
        """A part of all limits is no hurry."""
        self.due = 0
        """When they will have had more than was promised, if they get nothing until then."""
        self.nodes: list[Node] = []
        """Those of them that wait."""

    def charge(self, costs: Costs, portion: float, now: int) -> None:
        """They were served."""
        if self.part:
            seconds = max((cost.seconds for cost in costs), default=0.0) / self.part
        else:
            promised = self.amounts
            seconds = max(
                (60 * cost.amount / promised[cost.number] for cost in costs if promised.get(cost.number)), default=0.0
            )
            for number, cost_seconds, _ in costs if self.parts else ():
                if self.parts.get(number):
                    seconds = max(seconds, 1_000 * cost_seconds / self.parts[number])
        served = int(seconds * portion * SECOND_US)
        if self.due <= now:
            self.due = max(self.due, now - LENT_US) + served
        else:
            # It was its turn anyway.
            self.due = max(self.due, min(self.due + served, now + LENT_US))


class Node:
    """A priority, a share or a tenant in the line of one pool."""

    __slots__ = (
        "active",
        "aside",
        "base",
        "children",
        "clock",
        "heap",
        "key",
        "parent",
        "promise",
        "serial",
        "served",
        "stopped",
        "tag",
        "wanted",
        "weight",
    )

    def __init__(self, parent: Node | None, key: Hashable, serial: int, weight: float = 1.0) -> None:
        self.parent: Node = self if parent is None else parent
        """Of the root: itself."""
        self.key, self.serial = key, serial
        self.weight = max(_LEAST_WEIGHT, weight)
        self.promise: Promise | None = None
        self.tag = self.base = 0.0
        self.served: dict[int, float] = {}
        """Seconds of refill by bucket, since ``base``."""
        self.clock = 0.0
        """The tag of the child that was served last."""
        self.children: dict[Hashable, Node] = {}
        self.heap: list[tuple[float, int, Node]] = []
        self.active = 0
        """Children that wait; of a leaf, whether it does."""
        self.aside = False
        self.stopped = False
        """Whether its own cap stopped it when it was looked at last."""
        self.wanted: dict[int, int] = {}
        """What those under it would hold, by bucket."""

    def path(self) -> Iterator[Node]:
        """From here up, without the root."""
        node = self
        while node.parent is not node:
            yield node
            node = node.parent

    def start(self) -> float:
        """The tag that it has, or would begin to wait with."""
        return self.tag if self.active else max(self.tag, self.parent.clock)

    def reweigh(self, weight: float) -> None:
        """A new weight, for what comes, and for what it is ahead: else one of next to no weight would pay for ever."""
        weight = max(_LEAST_WEIGHT, weight)
        if weight != self.weight:
            ahead = max(0.0, self.tag - self.parent.clock)
            self.tag += ahead * (self.weight / weight - 1.0)
            self.base, self.weight = self.tag, weight
            self.served.clear()
            if self.active and not self.aside:
                self.parent.push(self)

    def push(self, child: Node) -> None:
        """A child waits, with the tag that it has now."""
        heappush(self.heap, (child.tag, child.serial, child))
        if len(self.heap) > 2 * self.active + _SPARE:
            self.heap = [
                (each.tag, each.serial, each) for each in self.children.values() if each.active and not each.aside
            ]
            heapify(self.heap)

    def least(self) -> Node | None:
        """The child whose turn is next; none of those set aside."""
        heap = self.heap
        while heap:
            tag, _, child = heap[0]
            if child.active and not child.aside and tag == child.tag:
                return child
            heappop(heap)
        return None


class Tree:
    """All nodes of one pool's line."""

    def __init__(self) -> None:
        self.root = Node(None, None, 0)
        self.promises: dict[Hashable, Promise] = {}
        self._serials = count(1)
        self._aside: list[Node] = []

    def child(self, parent: Node, key: Hashable, weight: float = 1.0, serial: int | None = None) -> Node:
        """The child of this key; made when it is first asked for. Of equal tags the least ``serial`` is first."""
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(parent, key, next(self._serials) if serial is None else serial, weight)
        return node

    def enter(self, leaf: Node, now: int) -> None:
        """Somebody of a leaf waits of which nobody did."""
        for node in leaf.path():
            parent = node.parent
            node.active += 1
            if node.active > 1:
                return
            if node.tag < parent.clock:
                node.tag = node.base = parent.clock
                node.served.clear()
            parent.push(node)
            if node.promise is not None:
                node.promise.due = max(node.promise.due, now + node.promise.grace_us)
                node.promise.nodes.append(node)

    def leave(self, leaf: Node) -> None:
        """Nobody of a leaf waits any more."""
        for node in leaf.path():
            node.active -= 1
            if node.active:
                return
            if node.promise is not None:
                node.promise.nodes.remove(node)

    def charge(self, leaf: Node, costs: Costs, portion: float, now: int) -> None:
        """A ``portion`` of a call was served; a negative one is given back."""
        for node in leaf.path():
            parent = node.parent
            if portion > 0:
                start = node.start()
                if start > node.tag:
                    node.tag = node.base = start
                    node.served.clear()
                parent.clock = max(parent.clock, start)
            served = node.served
            for number, seconds, _ in costs:
                served[number] = served.get(number, 0.0) + seconds * portion
            most = max(served.values(), default=0.0)
            node.tag = node.base + max(0.0, most) / node.weight
            if node.active and not node.aside:
                parent.push(node)
            if node.promise is not None:
                node.promise.charge(costs, portion, now)

    def correct(self, leaf: Node, costs: Costs) -> None:
        """A call that was served took so much more, or less, than it was thought to."""
        for node in leaf.path():
            parent, served = node.parent, node.served
            if node.start() > node.tag:
                # It has nothing left of that time.
                return
            for number, seconds, _ in costs:
                served[number] = served.get(number, 0.0) + seconds
            node.tag = node.base + max(0.0, max(served.values(), default=0.0)) / node.weight
            if node.active and not node.aside:
                parent.push(node)

    def first(self, now: int) -> Node | None:
        """The leaf whose turn is next."""
        while True:
            node = self._promised(now) or self.root
            while node.children:
                child = node.least()
                if child is None:
                    break
                node = child
            if not node.children:
                return None if node is self.root else node
            if node is self.root:
                return None
            # All below it were set aside.
            self.set_aside(node)

    def _promised(self, now: int) -> Node | None:
        found: Promise | None = None
        best: Node | None = None
        for promise in self.promises.values():
            if promise.due <= now and (found is None or promise.due < found.due):
                node = next((each for each in promise.nodes if not any(part.aside for part in each.path())), None)
                if node is not None:
                    found, best = promise, node
        return best

    def set_aside(self, node: Node) -> None:
        """Pass over a node until :meth:`take_back`."""
        node.aside = True
        self._aside.append(node)

    def take_back(self) -> None:
        """Nobody is set aside any more."""
        for node in self._aside:
            node.aside = False
            if node.active:
                node.parent.push(node)
        self._aside.clear()

    def comes_first(self, leaf: Node, now: int) -> bool:
        """Whether one who came to this leaf, of which nobody waits, would be next; of those not set aside."""
        promised = self._promised(now)
        if promised is not None and promised not in leaf.path():
            return False
        for node in reversed(list(leaf.path())):
            least = node.parent.least()
            if least is None:
                return True
            if node.start() > least.tag:
                return False
            if not node.active:
                return True
        return True
