"""What the proofs of this package have in common: a Redis, a fleet, client processes, and how they end."""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from tests.replicas.checks import Recorder, to
from tests.replicas.fleet import AMPLE, KEEPING, Clients, Fleet, Server, pool_config
from tests.replicas.redis_server import RedisServer

MOST_FAULTS = 20
SERVERS = 3


@dataclass
class Site:
    """All that runs. ``folder`` holds the logs."""

    folder: Path
    store: RedisServer
    fleet: Fleet
    recorder: Recorder

    def owner(self) -> Server:
        return self.fleet.wait_owner()

    def client(self) -> redis.Redis:
        """To the store."""
        found: redis.Redis = to(self.store)()
        return found


@contextlib.contextmanager
def site(
    *,
    servers: int = SERVERS,
    limits: dict[str, Any] | None = None,
    more: str = "",
    module: str = KEEPING,
    **options: Any,
) -> Iterator[Site]:
    """A fleet over a Redis of its own, whose journal is recorded. ``options`` are Redis's settings."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            RedisServer(**options) as store,
            Fleet(folder, servers, pool_config(limits or AMPLE, more), store.url, module=module) as fleet,
            Recorder(to(store)) as recorder,
        ):
            yield Site(folder, store, fleet, recorder)


def most(clients: Clients, callers: int, seconds: float, warm: float = 2.0) -> float:
    """Pairs a second that so many callers get done who always call again."""
    clients.callers(callers)
    clients.flowing(callers)
    time.sleep(warm)
    began, pairs = time.monotonic(), clients.pairs
    time.sleep(seconds)
    rate = (clients.pairs - pairs) / (time.monotonic() - began)
    clients.callers(0)
    return rate


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With what all of them take."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    return found


def end(faults: Sequence[str], passed: str) -> None:
    """Print the verdict, and leave with it."""
    for fault in faults[:MOST_FAULTS]:
        print(f"FAULT: {fault}")
    print(f"FAILED: {len(faults)} faults" if faults else f"PASSED: {passed}")
    sys.exit(1 if faults else 0)


def say(line: str) -> None:
    print(line, flush=True)


def until(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Raises ``AssertionError`` if it takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)
