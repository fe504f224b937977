"""Workloads: what is drawn has the published figures, and depends on the seed alone."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workloads import CACHED, WORKLOADS, LogNormal, Modulated, Span, arrivals, seeded

# Mean input (without what is cached) and mean output, as published.
PUBLISHED = {
    "conversation": (1_155, 211),
    "code": (2_048, 28),
    "long-conversation": (12_035, 343),
    "mixed": (973, 160),
    "reasoning": (1_596, 1_690),
    "coding-agent": (6_400, 523),
}
BURSTS = Modulated(quiet_rate=2.0, burst_rate=12.0, quiet_mean=14.0, burst_mean=4.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_means_are_the_published_ones(name: str) -> None:
    workload = WORKLOADS[name]
    fresh, output = PUBLISHED[name]
    assert workload.fresh.mean == pytest.approx(fresh, rel=0.10)
    assert workload.output.mean == pytest.approx(output, rel=0.20)


def test_every_workload_is_held_to_its_trace() -> None:
    assert WORKLOADS.keys() == PUBLISHED.keys()


def test_coding_agents_read_most_of_their_input_from_the_cache() -> None:
    sizes = list(itertools.islice(WORKLOADS["coding-agent"].sizes(random.Random(1)), 5_000))
    total, cached = sum(size.input for size in sizes), sum(size.cached for size in sizes)
    assert cached / total == pytest.approx(0.958, abs=0.01)
    assert total / len(sizes) == pytest.approx(153_700, rel=0.05)


@pytest.mark.parametrize(("name", "part"), [("cached-80", 0.80), ("cached-96", 0.96)])
def test_prefixes_are_the_part_of_the_input_that_their_name_says(name: str, part: float) -> None:
    sizes = list(itertools.islice(CACHED[name].sizes(random.Random(1)), 20_000))
    assert sum(size.cached for size in sizes) / sum(size.input for size in sizes) == pytest.approx(part, abs=0.01)


@given(st.floats(1, 9), st.floats(0.1, 2), st.integers(10, 100_000), st.integers())
def test_sizes_stay_within_their_bound(mu: float, sigma: float, most: int, seed: int) -> None:
    size = LogNormal(mu, sigma, most).draw(random.Random(seed))
    assert 1 <= size <= most


def test_the_mean_is_that_of_what_is_drawn() -> None:
    sizes, chance = LogNormal(6.63, 0.99, 3_000), random.Random(7)
    assert statistics.fmean(sizes.draw(chance) for _ in range(20_000)) == pytest.approx(sizes.mean, rel=0.02)


@given(st.integers(), st.floats(1, 200))
def test_spans_follow_one_another_and_take_turns(seed: int, seconds: float) -> None:
    spans = BURSTS.spans(seconds, random.Random(seed))
    assert spans[0].start == 0
    assert spans[-1].end == seconds
    assert all(a.end == b.start and a.rate != b.rate for a, b in itertools.pairwise(spans))
    for span in spans:
        mean = BURSTS.burst_mean if span.rate == BURSTS.burst_rate else BURSTS.quiet_mean
        assert span.end - span.start <= 2 * mean + 1e-9


@given(st.integers(), st.floats(0.1, 1))
def test_arrivals_are_in_order_and_inside(seed: int, part: float) -> None:
    spans = BURSTS.spans(30.0, random.Random(seed))
    times = arrivals(spans, part, random.Random(seed))
    assert times == sorted(times)
    assert all(0 <= at < 30.0 for at in times)


def test_several_callers_together_have_the_full_rate() -> None:
    spans = [Span(0.0, 500.0, 4.0), Span(500.0, 1_000.0, 0.0), Span(1_000.0, 1_500.0, 12.0)]
    times = [at for caller in range(4) for at in arrivals(spans, 0.25, seeded("rate", caller))]
    counts = [sum(span.start <= at < span.end for at in times) for span in spans]
    assert counts[0] == pytest.approx(2_000, rel=0.1)
    assert counts[1] == 0
    assert counts[2] == pytest.approx(6_000, rel=0.1)


def test_the_mean_rate_over_a_long_time() -> None:
    spans = BURSTS.spans(100_000.0, random.Random(3))
    offered = sum((span.end - span.start) * span.rate for span in spans)
    assert offered / 100_000 == pytest.approx(BURSTS.mean_rate, rel=0.1)


def test_seeds_say_everything() -> None:
    assert seeded(1, "a").random() == seeded(1, "a").random() != seeded(1, "b").random()
    # Across versions and processes: a figure, not only an equality.
    assert seeded(42, "chat-1", "sizes").randrange(10**6) == 924_022
