"""``make prove-trouble``: one trouble after the other, drawn at random, under load, for some minutes.

Servers are killed, stand still, are told to stop, hand over; Redis is slow, killed and started again from its
append-only file, cut off from one server or all, one way or both. A server that has ended is started again, as a
supervisor does. In the end every answer is looked up in the journal, which is recounted from its first record on, and
no call may have failed that had a minute. The pool is full, so that callers wait all the time.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.replicas.site import end, parser, say, until
from tests.proofs.answers import REQUESTS
from tests.replicas.again import forgotten
from tests.replicas.checks import Recorder, conserved, judge, never_over, ran_ahead, to
from tests.replicas.fleet import Clients, Fleet, pool_config
from tests.replicas.redis_server import RedisServer
from tests.replicas.toxiproxy import Proxy, toxiproxy

SERVERS = 3


@dataclass
class World:
    """What troubles can be done to."""

    store: RedisServer
    fleet: Fleet
    proxies: list[Proxy]
    rng: random.Random
    restarted: int = 0
    """Servers that had ended by themselves."""

    def owner_or_any(self) -> int:
        """Mostly the owner."""
        found = self.fleet.owner() if self.rng.random() < 0.7 else None
        return self.rng.randrange(SERVERS) if found is None else found.number

    def killed(self) -> None:
        server = self.fleet.servers[self.owner_or_any()]
        server.kill()
        time.sleep(self.rng.uniform(0.1, 5))
        server.spawn()

    def killed_twice(self) -> None:
        """The heir right after the owner."""
        first = self.fleet.servers[self.owner_or_any()]
        first.kill()
        time.sleep(self.rng.uniform(0.05, 0.8))
        second = self.rng.choice([server for server in self.fleet.servers if server is not first])
        second.kill()
        time.sleep(self.rng.uniform(0.1, 3))
        first.spawn()
        second.spawn()

    def stopped(self) -> None:
        server = self.fleet.servers[self.owner_or_any()]
        server.terminate()
        with contextlib.suppress(Exception):
            server.wait_end(25)
        server.kill()
        server.spawn()

    def paused(self) -> None:
        server = self.fleet.servers[self.owner_or_any()]
        server.pause()
        time.sleep(self.rng.choice((0.3, 1.5, 4.0, 8.0)))
        server.resume()

    def handed_over(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            with contextlib.suppress(Exception):
                self.rng.choice(self.fleet.awake()).hand_over(timeout=3)
            time.sleep(self.rng.uniform(0, 0.5))

    def slow(self) -> None:
        for proxy in self.proxies:
            proxy.slow(self.rng.choice((20, 100, 300)), jitter=20)
        time.sleep(self.rng.uniform(1, 4))
        self.heal()

    def cut(self) -> None:
        between = self.proxies[self.owner_or_any()]
        between.cut(self.rng.choice(("upstream", "downstream")))
        time.sleep(self.rng.uniform(0.5, 6))
        self.heal()

    def reset(self) -> None:
        for proxy in self.rng.sample(self.proxies, self.rng.randint(1, SERVERS)):
            proxy.reset()
        time.sleep(self.rng.uniform(0.1, 3))
        self.heal()

    def black_hole(self) -> None:
        for proxy in self.proxies:
            proxy.black_hole()
        time.sleep(self.rng.uniform(0.5, 7))
        self.heal()

    def redis_killed(self) -> None:
        self.store.kill()
        time.sleep(self.rng.uniform(0, 4))
        self.store.start()

    def redis_paused(self) -> None:
        self.store.pause()
        time.sleep(self.rng.uniform(0.3, 5))
        self.store.resume()

    def redis_full(self) -> None:
        self.store.set(maxmemory="1mb")
        time.sleep(self.rng.uniform(0.3, 6))
        self.store.set(maxmemory=0)

    def supervise(self) -> bool:
        """Start again who has ended. Whether all serve."""
        for server in self.fleet.servers:
            if not server.running:
                self.restarted += 1
                say(f"  {server.name} ended: {server.tail(1)}")
                server.spawn()
        return all(server.healthy() for server in self.fleet.servers)

    def heal(self) -> None:
        for proxy in self.proxies:
            proxy.heal()


TROUBLES: tuple[Callable[[World], None], ...] = (
    World.killed,
    World.killed,
    World.killed_twice,
    World.stopped,
    World.paused,
    World.paused,
    World.handed_over,
    World.slow,
    World.cut,
    World.cut,
    World.reset,
    World.black_hole,
    World.redis_killed,
    World.redis_paused,
    World.redis_full,
)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--minutes", type=float, default=10.0)
    asked.add_argument("--callers", type=int, default=150)
    options = asked.parse_args()
    rng = random.Random(options.seed)
    say(f"seed {options.seed}, {options.minutes:g} minutes, {options.callers} callers")
    amount, burst = 9_000, 100
    limits = {"requests": {"amount": amount, "burst": burst}, "input_tokens": 10**12, "output_tokens": 10**12}
    done: Counter[str] = Counter()
    faults: list[str] = []
    with (
        tempfile.TemporaryDirectory() as name,
        RedisServer(appendonly="yes", appendfsync="always") as store,
        toxiproxy() as control,
    ):
        folder = Path(name)
        proxies = [control.proxy(f"trouble-{number}", f"127.0.0.1:{store.port}") for number in range(SERVERS)]
        urls = [f"redis://{proxy.address}" for proxy in proxies]
        with (
            Fleet(folder, SERVERS, pool_config(limits), urls) as fleet,
            Recorder(to(store)) as recorder,
            Clients(
                folder,
                fleet.addresses,
                seed=options.seed,
                mix="plain=9,doubled=2",
                max_wait=4,
                deadline=60,
                patience=3,
            ) as clients,
        ):
            world = World(store, fleet, proxies, rng)
            clients.callers(options.callers)
            clients.flowing(50)
            stop = time.monotonic() + options.minutes * 60
            while time.monotonic() < stop:
                trouble = rng.choice(TROUBLES)
                trouble(world)
                world.supervise()
                done[trouble.__name__] += 1
                if rng.random() < 0.7:
                    clients.flowing(rng.randint(5, 200))
                if done.total() % 10 == 0:
                    say(f"  {done.total()} troubles, {clients.pairs:,} pairs, epoch {max(recorder.seen)}")
            until(world.supervise, "all serve", 40)
            clients.flowing(200)
            logs = clients.stop()
            recorder.stop()
            judgement = judge(logs, recorder.stored())
            faults += judgement.faults + conserved(judgement) + fleet.faults()
            faults += never_over(judgement, {REQUESTS: (amount, burst)})
            faults += forgotten(fleet.servers[0].address, judgement.entries)
            if recorder.rewritten:
                faults.append(f"{recorder.rewritten} records were written twice, differently")
            say(
                f"{done.total()} troubles ({', '.join(f'{count} {what}' for what, count in sorted(done.items()))}); "
                f"{judgement.counts['grant']:,} grants, {judgement.counts['commit']:,} settlements, "
                f"{judgement.counts['denial']:,} denials, {judgement.counts['failed']} failed; "
                f"{judgement.recount.seq:,} records, {len(judgement.recount.epochs)} epochs; the ledger's time ran "
                f"ahead by at most {ran_ahead(judgement.entries) / 1e3:.0f} ms; {world.restarted} servers ended by "
                "themselves"
            )
            for what, count in sorted(clients.notes.items()):
                say(f"  clients noted {count} x {what}")
            if faults:
                say(fleet.tails(60))
    end(faults, f"{done.total()} troubles, nothing lost, nothing twice, never over-granted, nobody failed")


if __name__ == "__main__":
    main()
