"""Servers that reach Redis and do not reach each other: rows of docs/failures.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_ports
from tests.replicas.checks import to
from tests.replicas.redis_server import RedisServer, need_redis
from tests.replicas.scene import scene
from tests.replicas.toxiproxy import Toxiproxy, toxiproxy

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.xdist_group("replicas-peers"),
    pytest.mark.timeout(400),
]

SILENT_SECONDS = 12.0


@pytest.fixture(scope="module")
def faults() -> Iterator[Toxiproxy]:
    need_redis()
    with toxiproxy() as process:
        yield process


@pytest.mark.parametrize("fault", ["silent", "refused"])
def test_owner_cut_off_from_the_other_servers(tmp_path: Path, faults: Toxiproxy, fault: str) -> None:
    """Their callers are told to come again, and are answered where they come next: at the owner's own front end."""
    ports = free_ports(3)
    between = [faults.proxy(f"{fault}-{number}", f"127.0.0.1:{port}") for number, port in enumerate(ports)]
    own = [
        f"peer_listen: 127.0.0.1:{port}\npeer_advertise: {proxy.address}"
        for port, proxy in zip(ports, between, strict=True)
    ]
    with (
        RedisServer() as store,
        scene(tmp_path, store.url, to(store), own=own, deadline=60.0, patience=60.0) as on,
    ):
        owner = on.fleet.wait_owner()
        on.deed()
        if fault == "silent":
            between[owner.number].black_hole()
        else:
            between[owner.number].refuse()
        took = on.flowing(400, 40)
        between[owner.number].heal()
        on.deed()
        back = on.flowing(200, 30)
        judgement = on.finish()
    print(f"{fault}: 400 pairs in {took:.1f} s, 200 in {back:.1f} s after it; told to come again {on.away()}")
    assert not judgement.faults
    longest = max(entry.answered - entry.asked for entry in judgement.entries) / 1e6
    print(f"longest wait {longest:.1f} s; epochs {sorted(judgement.recount.epochs)}")
    assert longest < 2 * SILENT_SECONDS
