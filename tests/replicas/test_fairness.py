"""Fair sharing with real processes: a few seconds of a row of ``make prove-fairness``."""

from __future__ import annotations

import pytest

from bench.fairness.real.__main__ import figures_of
from bench.fairness.real.rows import BY_NAME
from bench.fairness.real.run import run
from tests.replicas.redis_server import need_redis

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.xdist_group("replicas-fairness"),
    pytest.mark.timeout(120),
]


def test_three_servers_share_by_the_weights() -> None:
    need_redis()
    row = BY_NAME["weights"]
    told: list[str] = []
    ran = run(row, 1, 0.15, told.append)
    figures = figures_of(row, ran, told.append)
    assert not ran.faults, told
    assert set(figures) >= {bound.figure for bound in row.bounds} | set(row.shown)
    # So short a run beside other tests says little: without weights it were 1.33, and 4 calls in 10 would find room.
    assert figures["off"] < 0.3, figures
    assert figures["used"] > 0.9, figures
    assert figures["granted"] > 100, figures
    tenants = {call.tenant for call in ran.replayed.window.granted()}
    assert tenants == {source.kind.tenant for source in row.sources}
