"""Servers die, stand still, or go as planned, under load: rows of docs/failures.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replicas.checks import interruptions, percentile, quiet_median, to
from tests.replicas.redis_server import RedisServer, need_redis
from tests.replicas.scene import scene

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.xdist_group("replicas"),
    pytest.mark.timeout(120),
]

TAKE_OVER_SECONDS = 2.5
HAND_OVER_SECONDS = 0.2
NOISE_SECONDS = 1.0
"""What a machine that runs other tests may add."""


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    need_redis()
    with RedisServer() as server:
        yield server


def test_owner_killed(tmp_path: Path, redis_server: RedisServer) -> None:
    with scene(tmp_path, redis_server.url, to(redis_server)) as on:
        owner = on.fleet.wait_owner()
        epoch = on.fleet.epoch()
        on.deed()
        owner.kill()
        on.flowing()
        heir = on.fleet.wait_owner(but=owner)
        assert on.fleet.epoch() > epoch
        # It comes back as one more front end, and takes nothing from anybody.
        owner.start()
        owner.wait_healthy()
        on.flowing(30)
        assert on.fleet.owner() is heir
        judgement = on.finish()
    assert not judgement.faults
    [seen] = interruptions(judgement.entries, on.deeds)
    added = percentile(seen.touched, 99) - quiet_median(judgement.entries, on.deeds)
    assert added < (TAKE_OVER_SECONDS + NOISE_SECONDS) * 1e6
    assert len(judgement.recount.epochs) >= 2


def test_owner_paused_and_resumed(tmp_path: Path, redis_server: RedisServer) -> None:
    with scene(tmp_path, redis_server.url, to(redis_server), patience=1.0) as on:
        owner = on.fleet.wait_owner()
        on.deed()
        owner.pause()
        heir = on.fleet.wait_owner(but=owner)
        on.flowing()
        on.wait(lambda: on.deeds[0] + 10_000_000 < on.deed(), "10 s", 15)
        resumed = on.deed()
        owner.resume()
        on.flowing(120)
        assert on.fleet.owner() is heir
        owner.wait_healthy()
        judgement = on.finish()
    # Records of an earlier epoch behind a later one would be faults, and so would grants that the journal lacks.
    assert not judgement.faults
    assert [entry for entry in judgement.entries if entry.server == owner.number and entry.answered > resumed]
    assert len(judgement.recount.epochs) == 2


def test_owner_told_to_stop(tmp_path: Path, redis_server: RedisServer) -> None:
    with scene(tmp_path, redis_server.url, to(redis_server)) as on:
        owner = on.fleet.wait_owner()
        on.deed()
        owner.terminate()
        assert owner.wait_end(20) == 0
        on.flowing()
        heir = on.fleet.wait_owner(but=owner)
        assert heir is not owner
        judgement = on.finish()
    assert not judgement.faults
    [seen] = interruptions(judgement.entries, on.deeds)
    added = percentile(seen.touched, 99) - quiet_median(judgement.entries, on.deeds)
    assert added < (HAND_OVER_SECONDS + NOISE_SECONDS) * 1e6


def test_handed_over_by_an_administrator(tmp_path: Path, redis_server: RedisServer) -> None:
    with scene(tmp_path, redis_server.url, to(redis_server)) as on:
        owner = on.fleet.wait_owner()
        asked, chosen = on.others(owner)
        on.deed()
        assert asked.hand_over(node=chosen.name) == chosen.name
        on.wait(lambda: on.fleet.owner() is chosen, "it owns the ledger")
        on.flowing()
        judgement = on.finish()
    assert not judgement.faults
    [seen] = interruptions(judgement.entries, on.deeds)
    added = percentile(seen.touched, 99) - quiet_median(judgement.entries, on.deeds)
    assert added < (HAND_OVER_SECONDS + NOISE_SECONDS) * 1e6
    assert not sum(entry.broken + entry.away for entry in judgement.entries), "nobody had to ask again"


def test_a_front_end_killed_that_owns_nothing(tmp_path: Path, redis_server: RedisServer) -> None:
    with scene(tmp_path, redis_server.url, to(redis_server)) as on:
        owner = on.fleet.wait_owner()
        epoch = on.fleet.epoch()
        on.others(owner)[0].kill()
        on.flowing()
        assert on.fleet.owner() is owner
        assert on.fleet.epoch() == epoch
        judgement = on.finish()
    assert not judgement.faults
