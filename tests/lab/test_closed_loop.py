"""The engine under load against an upstream that counts for itself: it must use what there is, and not be refused.

Bounds stand in pairs, refusals beside the limit used: either alone is easy.
"""

from __future__ import annotations

import pytest

from bench.lab.closed_loop import Figures, Setting, run
from paceline.engine.bucket import Bucket
from paceline.engine.operations import Class, Priority
from paceline.engine.teaching import Teacher
from paceline.engine.urgent import Urgent

SEEDS = range(101, 104)


def short(seed: int, **changed: object) -> Setting:
    return Setting(seed=seed, warmup_s=8, window_s=30, **changed)  # type: ignore[arg-type]


def check(figures: Figures) -> None:
    assert figures.accepted > 800
    assert figures.used["input_tokens"] >= 0.97, figures.used
    assert figures.refused_per_1000 <= 2, figures.refused_by
    assert figures.lost == {"chat": 0, "batch": 0}
    assert figures.wait("chat", 0.99) <= 3
    assert figures.wait("chat", 0.50) < figures.wait("batch", 0.50)


@pytest.mark.parametrize("seed", SEEDS)
def test_uses_the_limit_and_is_not_refused(seed: int) -> None:
    check(run(short(seed)))


def test_neither_when_the_burst_is_a_sixth_of_a_minute() -> None:
    check(run(short(104, burst_seconds=10.0, initial=1.0)))


def test_neither_when_estimates_are_a_third_too_low() -> None:
    figures = run(short(105, our_error=(0.6, 0.75)))
    assert figures.used["input_tokens"] >= 0.97
    assert figures.refused_per_1000 <= 20


def test_the_same_seed_is_the_same_run() -> None:
    setting = Setting(seed=106, warmup_s=2, window_s=4)
    assert run(setting) == run(setting)


# -- what makes the difference ---------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to the urgent is a margin of its own."""
    monkeypatch.setattr(Urgent, "kept", lambda *_: 0)


@pytest.mark.usefixtures("nothing_is_left")
def test_wide_bounds_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Teacher, "_follow", lambda *_: None)
    assert run(short(101)).refused_per_1000 > 50


@pytest.mark.usefixtures("nothing_is_left")
def test_without_a_margin_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bucket, "margin", lambda *_: 0)
    assert run(short(101)).refused_per_1000 > 50


@pytest.mark.usefixtures("nothing_is_left")
def test_with_priorities_upside_down_the_urgent_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.engine.queue.CLASSES", (Class(Priority.INTERACTIVE, 1), Class(Priority.BATCH, 64)))
    figures = run(short(101))
    assert figures.wait("chat", 0.50) > 1
