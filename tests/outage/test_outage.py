"""The coordinator dies under load, and comes back: a short run of ``make prove-outage``, with a smaller fleet."""

from __future__ import annotations

import pytest

from bench.outage.__main__ import lines, verdict
from bench.outage.fleet import Part
from bench.outage.run import measure

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(120)]

FLEET = (
    *(Part(f"chat-{number}", "interactive", calls_per_second=1.0, max_wait=3.0, seed=number) for number in range(2)),
    *(Part(f"batch-{number}", "batch", loops=6, max_wait=5.0, seed=10 + number) for number in range(2)),
)


def test_a_fleet_goes_on_and_the_books_are_right_in_the_end() -> None:
    result = measure(6.0, 8.0, 6.0, fleet=FLEET)
    print("\n".join(lines(result)))
    # So short a window is as much a matter of what is in flight at its ends: the proof has the real bounds.
    assert not verdict(result, least_used=0.4, most_used=1.1)
