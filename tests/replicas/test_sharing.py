"""Many callers on one full pool through several servers: a short run of ``make prove-replicas``."""

from __future__ import annotations

import pytest

from bench.replicas.sharing import one
from tests.replicas.redis_server import need_redis

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.xdist_group("replicas-sharing"),
    pytest.mark.timeout(120),
]


@pytest.mark.parametrize(("seed", "kill"), [(1, False), (2, True)])
def test_never_over_granted(seed: int, kill: bool) -> None:
    need_redis()
    # What part of the limit is used in so short a time beside other tests says nothing.
    faults, line = one(seed, callers=300, seconds=4.0, kill=kill, least_used=0.2)
    assert not faults, line
