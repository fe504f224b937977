"""``make prove-outage-fleet``: three servers and their Redis are killed under a saturating fleet, and come back.

As ``bench.outage``, which has one server. The callers, six processes with the official SDK, are spread over the three
servers, want more than twice the limit, and go on by their shares, which three processes have handed out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.outage.__main__ import conclude
from bench.outage.run import CONFIG, FLEET, measure
from tests.proofs.recount import MINUTE, NAMES
from tests.replicas.checks import Recorder, count, to
from tests.replicas.fleet import Fleet
from tests.replicas.redis_server import RedisServer


class Replicas:
    """Three servers over one Redis, which keeps what it was told."""

    def __init__(self, folder: Path, servers: int = 3) -> None:
        self._store = RedisServer(appendonly="yes", appendfsync="everysec")
        self._store.start()
        self._fleet = Fleet(folder, servers, CONFIG, self._store.url)
        self._recorder = Recorder(to(self._store))
        self._recorder.__enter__()
        self.addresses = self._fleet.addresses

    def start(self) -> None:
        if not self._store.running:
            self._store.start()
        self._fleet.start()

    def kill(self) -> None:
        for server in self._fleet.servers:
            server.kill()
        self._store.kill()

    def finish(self) -> tuple[dict[str, int], int]:
        for server in self._fleet.servers:
            server.stop()
        self._recorder.stop()
        recount = count(self._recorder.stored())
        assert not recount.faults, recount.faults
        assert not self._fleet.faults(), self._fleet.faults()
        sums: dict[str, int] = {}
        for bucket in recount.buckets:
            if bucket.pool and not bucket.share and bucket.window == MINUTE:
                name = NAMES[bucket.dimension].replace(" ", "_")
                sums[name] = sums.get(name, 0) + bucket.charged
        return sums, recount.count("open")

    def close(self) -> None:
        self._recorder.stop()
        self._fleet.close()
        self._store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=float, default=25.0, help="seconds before the death (25)")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds without a server (60)")
    parser.add_argument("--after", type=float, default=40.0, help="seconds after the return (40)")
    asked = parser.parse_args()
    conclude(measure(asked.healthy, asked.outage, asked.after, fleet=FLEET, site=Replicas))


if __name__ == "__main__":
    main()
