"""What goes wrong in a run, and when. Every kind is drawn from the run's seed, and noted with the state that it met."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from paceline.ledger.owner import Owner
from tests.simulation.network import KEEPALIVE_US, NOBODY

if TYPE_CHECKING:
    from tests.simulation.world import Node, World

AFTER_US = 4_000_000
"""For so long after its end a fault may still be felt: a lease runs out, connections are made again."""

KINDS = (
    "crash",
    "pause",
    "drain",
    "upgrade",
    "downgrade",
    "rollout",
    "finalize",
    "partition",
    "one-way cut",
    "slow link",
    "connections break",
    "client cut off",
    "clock jump",
    "store cut off",
    "store unheard",
    "store loses requests",
    "store loses answers",
    "store repeats",
    "store reorders",
    "store slow",
    "store down",
    "store hangs",
    "store restarts",
    "store emptied",
    "store full",
    "store read-only",
    "failover",
    "failover, owner dies",
    "two primaries",
)


SILENT = ("pause", "partition", "one-way cut", "slow link", "store cut off", "store unheard")
"""Of a node: it lives on, and others may not know that it decides no more."""


class Faults:
    """Draws and carries out the faults of a run."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self._undo: list[Callable[[], object]] = []
        self.healed = False

    def plan(self, first: int, last: int) -> None:
        """At least five faults between two instants, often close to each other."""
        rng, loop = self.rng, self.world.loop
        count = 5 + int(rng.expovariate(0.7))
        at = 0
        for number in range(count):
            if number and rng.random() < 0.45:
                at = min(last, at + int(rng.expovariate(1 / 700_000)))
            else:
                at = first + rng.randrange(last - first)
            loop.at(at, self._strike, context=NOBODY)

    # -- whom ----------------------------------------------------------------------------------------------------------

    def _node(self) -> Node:
        """Often the owner, whom it hurts most."""
        owner = self._owner()
        if owner is not None and self.rng.random() < 0.55:
            return owner
        return self.rng.choice(self.world.nodes)

    def _owner(self) -> Node | None:
        head = self.world.store.primary.head(self.rng.choice(self.world.ledgers))
        if head is None:
            return None
        return next((node for node in self.world.nodes if node.name == head.node), None)

    def _state(self, node: Node) -> str:
        """What the node is for the first ledger, when it is struck."""
        world = self.world
        if not node.is_running or node.keeper is None:
            return "down"
        if node.process is not None and node.process.stopped:
            return "paused"
        owner: Owner | None = node.owner(world.ledgers[0])
        if owner is not None:
            return f"owner {owner.phase.value}"
        head = world.store.primary.head(world.ledgers[0])
        if head is None:
            return "no journal yet"
        if head.until <= world.store.stamp(world.store.primary):
            return "lease over"
        if head.successor:
            return "handing over"
        return "heir, warm" if world.ledgers[0] in node.keeper.info.warm else "bystander"

    def _strike(self) -> None:
        """Let one kind of fault happen that is possible now."""
        world, rng = self.world, self.rng
        while not self.healed:
            kind = rng.choice(KINDS)
            node = self._node()
            met = self._owner() or node if kind.startswith(("store", "two", "failover")) else node
            state = self._state(met)
            lasts = int(min(12_000_000, 100_000 + rng.expovariate(1 / 2_500_000)))
            place = len(world.trace)
            world.note("fault", kind, node.name, lasts)
            strike = getattr(self, "_" + kind.split(",")[0].replace(" ", "_").replace("-", "_"))
            if strike(node, lasts, kind) is not False:
                if kind in SILENT:
                    world.silences.append((world.loop.now, world.loop.now + lasts + AFTER_US, node.name))
                world.coverage[kind, state] += 1
                world.faults += 1
                return
            del world.trace[place:]

    def _later(self, lasts: int, undo: Callable[[], object]) -> None:
        """Undo it after a while, or when everything is made whole."""
        done = False

        def once() -> None:
            nonlocal done
            if not done:
                done = True
                undo()

        self._undo.append(once)
        self.world.loop.at(self.world.loop.now + lasts, once, context=NOBODY)

    def _trouble(self, lasts: int, *hosts: str) -> None:
        now = self.world.loop.now
        self.world.trouble(now, now + lasts + AFTER_US, *hosts)

    def heal(self) -> None:
        """Everything is made whole."""
        self.healed = True
        world = self.world
        for undo in self._undo:
            undo()
        world.network.heal_all()
        world.store.end_old()
        for node in world.nodes:
            if node.process is not None:
                world.loop.resume_process(node.process)
            if not node.is_running:
                node.start(node.newer)

    # -- processes -----------------------------------------------------------------------------------------------------

    def _crash(self, node: Node, lasts: int, kind: str) -> bool:
        world = self.world
        if not node.is_running:
            return False
        self._trouble(lasts, node.name)
        node.kill()
        self._later(lasts // 2, lambda: None if node.is_running else node.start(node.newer))
        world.note("killed", node.name)
        return True

    def _pause(self, node: Node, lasts: int, kind: str) -> bool:
        world, process = self.world, node.process
        if process is None or process.dead or process.stopped:
            return False
        self._trouble(lasts, node.name)
        world.loop.stop_process(process)
        self._later(lasts, lambda: world.loop.resume_process(process))
        return True

    def _drain(self, node: Node, lasts: int, kind: str) -> bool:
        return self._replace(node, node.newer)

    def _upgrade(self, node: Node, lasts: int, kind: str) -> bool:
        return not node.newer and self._replace(node, 1)

    def _downgrade(self, node: Node, lasts: int, kind: str) -> bool:
        return bool(node.newer) and not self.world.is_final and self._replace(node, 0)

    def _rollout(self, node: Node, lasts: int, kind: str) -> bool:
        """All processes are replaced by those of the next version, one after the other; then it may be finalized."""
        world, rng = self.world, self.rng
        if any(each.newer or not each.is_running for each in world.nodes):
            return False
        pause = rng.randrange(800_000, 4_000_000)
        for place, each in enumerate(world.nodes):
            world.loop.at(world.loop.now + place * pause, self._replace, each, 1, context=NOBODY)
        if rng.random() < 0.7:
            after = len(world.nodes) * pause + rng.randrange(4_000_000)
            world.loop.at(world.loop.now + after, self._finalize, node, lasts, kind, context=NOBODY)
        return True

    def _finalize(self, node: Node, lasts: int, kind: str) -> bool:
        """Every process runs the next version, and an operator says that there is no way back."""
        world = self.world
        if world.is_final or self.healed or any(not each.newer for each in world.nodes):
            return False
        met = self._owner() or node
        if not met.finalize():
            return False
        world.is_final = True
        world.coverage["finalize", self._state(met)] += 1
        return True

    def _replace(self, node: Node, newer: int) -> bool:
        """A planned restart, maybe with another version."""
        world, rng = self.world, self.rng
        if not node.is_running or node.stopping or (node.process is not None and node.process.stopped):
            return False
        away = 200_000 + rng.randrange(2_000_000)
        self._trouble(8_000_000 + away, node.name)

        def again() -> None:
            if not node.is_running:
                node.start(newer)

        node.stop(lambda: world.loop.at(world.loop.now + away, again, context=NOBODY))
        return True

    def _clock_jump(self, node: Node, lasts: int, kind: str) -> None:
        node.clock.jump(int(self.rng.choice((-1, 1)) * self.rng.expovariate(1 / 1.2e9)))

    # -- the network ---------------------------------------------------------------------------------------------------

    def _partition(self, node: Node, lasts: int, kind: str) -> None:
        """A node is cut off from the other nodes, at times from the store as well."""
        world = self.world
        network = world.network
        others = [other.name for other in world.nodes if other is not node]
        self._trouble(lasts + KEEPALIVE_US, node.name)
        for other in others:
            network.cut(node.name, other)
            network.cut(other, node.name)
        if self.rng.random() < 0.4:
            self._store_cut_off(node, lasts, kind)

        def whole() -> None:
            for other in others:
                network.heal(node.name, other)
                network.heal(other, node.name)

        self._later(lasts, whole)

    def _one_way_cut(self, node: Node, lasts: int, kind: str) -> None:
        world = self.world
        other = self.rng.choice([other for other in world.nodes if other is not node])
        self._trouble(lasts + KEEPALIVE_US, node.name, other.name)
        world.network.cut(node.name, other.name)
        self._later(lasts, lambda: world.network.heal(node.name, other.name))

    def _slow_link(self, node: Node, lasts: int, kind: str) -> None:
        network = self.world.network
        extra = self.rng.choice((20_000, 200_000, 1_000_000))
        self._trouble(lasts, node.name)
        links = [(node.name, other.name) for other in self.world.nodes if other is not node]
        links += [(other, this) for this, other in links]
        for link in links:
            network.extra_us[link] = extra
        self._later(lasts, lambda: [network.extra_us.pop(link, None) for link in links])

    def _connections_break(self, node: Node, lasts: int, kind: str) -> None:
        self._trouble(0, node.name)
        self.world.network.break_wires(node.name)
        self.world.store.links.pop(node.name, None)

    def _client_cut_off(self, node: Node, lasts: int, kind: str) -> None:
        network = self.world.network
        client = self.rng.choice(self.world.fleet.clients).name
        self._trouble(lasts + KEEPALIVE_US, client)
        there = self.rng.random() < 0.5
        link = (client, node.name) if there else (node.name, client)
        network.cut(*link)
        self._later(lasts, lambda: network.heal(*link))

    # -- the store -----------------------------------------------------------------------------------------------------

    def _store_cut_off(self, node: Node, lasts: int, kind: str) -> None:
        store = self.world.store
        self._trouble(lasts, node.name)
        store.link(node.name).is_cut = True
        self._later(lasts, lambda: setattr(store.link(node.name), "is_cut", False))

    def _store_unheard(self, node: Node, lasts: int, kind: str) -> None:
        store = self.world.store
        self._trouble(lasts, node.name)
        store.link(node.name).is_deaf = True
        self._later(lasts, lambda: setattr(store.link(node.name), "is_deaf", False))

    def _set_link(self, node: Node, lasts: int, field: str) -> None:
        store = self.world.store
        self._trouble(lasts)
        names = [node.name] if self.rng.random() < 0.4 else [each.name for each in self.world.nodes]
        value = self.rng.choice((0.1, 0.3, 0.6))
        for name in names:
            setattr(store.link(name), field, value)

        def undo() -> None:
            for name in names:
                setattr(store.link(name), field, 0.0)

        self._later(lasts, undo)

    def _store_loses_requests(self, node: Node, lasts: int, kind: str) -> None:
        self._set_link(node, lasts, "lose_requests")

    def _store_loses_answers(self, node: Node, lasts: int, kind: str) -> None:
        self._set_link(node, lasts, "lose_answers")

    def _store_repeats(self, node: Node, lasts: int, kind: str) -> None:
        self._set_link(node, lasts, "repeats")

    def _store_reorders(self, node: Node, lasts: int, kind: str) -> None:
        self._set_link(node, lasts, "lates")

    def _store_slow(self, node: Node, lasts: int, kind: str) -> None:
        store = self.world.store
        store.slow_us = self.rng.choice((20_000, 300_000, 1_400_000))
        self._trouble(lasts)
        self._later(lasts, lambda: setattr(store, "slow_us", 0))

    def _store_down(self, node: Node, lasts: int, kind: str) -> None:
        store = self.world.store
        store.is_down = True
        self._trouble(lasts)
        self._later(lasts, lambda: setattr(store, "is_down", False))

    def _store_hangs(self, node: Node, lasts: int, kind: str) -> None:
        store = self.world.store
        store.hangs = True
        self._trouble(lasts)
        self._later(lasts, lambda: setattr(store, "hangs", False))

    def _store_restarts(self, node: Node, lasts: int, kind: str) -> None:
        self._trouble(0)
        self.world.store.restart(empty=False)

    def _store_emptied(self, node: Node, lasts: int, kind: str) -> None:
        self._trouble(0)
        self.world.store.restart(empty=True)

    def _store_full(self, node: Node, lasts: int, kind: str) -> None:
        self._refuse(lasts, "out of memory")

    def _store_read_only(self, node: Node, lasts: int, kind: str) -> None:
        self._refuse(lasts, "read-only")

    def _refuse(self, lasts: int, why: str) -> None:
        primary = self.world.store.primary
        primary.refuses_writes = why
        self._trouble(lasts)
        self._later(lasts, lambda: setattr(primary, "refuses_writes", ""))

    def _failover(self, node: Node, lasts: int, kind: str) -> None:
        world, rng = self.world, self.rng
        store = world.store
        self._trouble(lasts // 4 + 2_000_000)
        owner = self._owner()
        dies = kind.endswith("dies")
        if dies and owner is not None and rng.random() < 0.5:
            self._crash(owner, lasts, kind)
            owner = None
        lost = int(min(900_000, rng.expovariate(1 / 200_000))) if rng.random() < 0.8 else 0
        writes = store.fail_over(lost, rng.randint(-50_000, 50_000))
        world.note("failover", writes)
        down = rng.random() < 0.6
        if down:
            store.is_down = True
            self._later(lasts // 4, lambda: setattr(store, "is_down", False))
        if dies and owner is not None:
            victim = owner
            world.loop.at(world.loop.now + rng.randrange(1_500_000), self._crash, victim, lasts, kind, context=NOBODY)

    def _two_primaries(self, node: Node, lasts: int, kind: str) -> None:
        """A part of the nodes goes on with the old primary, for no longer than it may."""
        world, rng = self.world, self.rng
        names = [each.name for each in world.nodes]
        rng.shuffle(names)
        old = names[: rng.randrange(1, len(names))]
        lasts = min(lasts, 900_000)
        self._trouble(lasts + 4_000_000)
        lost = int(min(900_000 - lasts, rng.expovariate(1 / 100_000))) if lasts < 900_000 else 0
        world.note("two primaries", world.store.fail_over(max(0, lost), rng.randint(-50_000, 50_000), old), *old)
        self._later(lasts, world.store.end_old)
