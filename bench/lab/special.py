"""Figures that only some rows have. Seconds are from the start of the window unless a figure says otherwise."""

from __future__ import annotations

import math

from bench.lab.clock import SECOND
from bench.lab.closed_loop import quantile
from bench.lab.ideal import waits as ideal_waits
from bench.lab.run import Run, Sample

TOLERANCE = 0.10
"""A rate within this part of the true one is known."""


def learned_after(run: Run, pair: tuple[str, str]) -> float:
    """Seconds from the beginning of the run until a belief was first within 10 % of the truth; NaN: never."""
    begun = run.samples[0].at
    ours, truth = pair
    for one in run.samples:
        if abs(getattr(one, ours) - getattr(one, truth)) <= TOLERANCE * getattr(one, truth):
            return one.at - begun
    return math.nan


def first_minute(run: Run) -> dict[str, float]:
    """Limits unknown at start: when the limit was known."""
    return {"limit_known_s": learned_after(run, ("limit", "true_limit"))}


def before_window(run: Run) -> dict[str, float]:
    """What was refused before the window, per 1,000 accepted, and how long that took."""
    last = _before(run)[-1]
    return {"warmup_s": last.at - run.samples[0].at, "refused_before": 1_000 * last.refused / max(1, last.accepted)}


def short_burst(run: Run) -> dict[str, float]:
    """While the burst is learned: until the window begins."""
    return {"refused_learning": before_window(run)["refused_before"]}


def limit_changes(run: Run) -> dict[str, float]:
    """How many readings it took until each new limit ruled; avoidable refusals."""
    found: dict[str, float] = {}
    for event, name in zip((one for one in run.setting.events if one.kind == "limits"), ("down", "up"), strict=True):
        changed = run.started + int(event.at_s * SECOND)
        wanted = round(event.part * run.setting.limits[run.setting.binding])
        count, ruled = 0, False
        for reading in run.coordinator.readings:
            if reading.taken >= changed and not ruled:
                count += 1
                ruled = reading.ruling == wanted
        found[f"readings_{name}"] = count if ruled else math.nan
    found["avoidable"] = sum(attempt.avoidable for attempt in run.fleet.refused if attempt.at >= run.started)
    return found


def outside_rate(run: Run) -> dict[str, float]:
    """How far the learned rate of others is from the true one, in the mean and at worst, as parts of that."""
    part = run.between(0.0, run.setting.window_s)
    wrong = [abs(one.outside - one.true_outside) / one.true_outside for one in part]
    mean = sum(one.outside for one in part) / len(part)
    return {
        "outside_error": sum(wrong) / len(wrong),
        "outside_worst": max(wrong),
        "outside_mean": mean / part[-1].true_outside,
        "outside_known_s": learned_after(run, ("outside", "true_outside")),
    }


def _before(run: Run) -> list[Sample]:
    return [one for one in run.samples if one.at <= 0.0] or run.samples[:1]


OPEN = 0.90
"""A pool is open when so much of what is there is used, over :data:`OPEN_S`."""
OPEN_S = 10.0
BACK_S = 5.0
"""Over so long, attempts are counted after an episode."""
ON_THE_WAY_US = 60_000
"""What is let go arrives within so long."""
LATER_S = 60.0
"""After an event, what follows from it is looked for so long."""


def overload(run: Run) -> dict[str, float]:
    """Attempts in an episode of 529, as a part of those before, from its sixth second on; how soon they are back after
    it; and what the episode has done to the budget in the ledger, in parts of the burst: nothing, it should be."""
    event = next(one for one in run.setting.events if one.kind == "overload")
    start, end = event.at_s, event.at_s + event.seconds
    usual = run.rate("attempts", start - 30.0, start)
    after = run.between(start - 1.0, end)
    first, last = after[0], after[-1]
    moved = abs(last.level - last.true_level) / last.true_burst
    moved_limits = sum(getattr(first, name) != getattr(last, name) for name in ("limit", "burst"))
    return {
        "attempts": run.rate("attempts", start + 5.0, end) / usual,
        "back_s": run.first(lambda at: run.rate("attempts", at, at + BACK_S) >= OPEN * usual, end, end + LATER_S),
        "budget_gap": moved,
        # What others seem to use fades when nothing is heard; it must not grow.
        "budget_learned": float(moved_limits + (last.outside > first.outside)),
    }


def restart(run: Run) -> dict[str, float]:
    """What is refused in the minute after a restart, and how soon 95 % of the limit are used again, over 10 s."""
    back = run.coordinator.restarted_at
    assert back is not None
    at = (back - run.started) / SECOND
    refused = sum(back <= attempt.at < back + LATER_S * SECOND for attempt in run.fleet.refused)
    return {
        "refused_after": float(refused),
        "used_again_s": run.first(lambda start: run.share(start, start + 10.0) >= 0.95, at, at + LATER_S),
    }


def waiting(run: Run) -> dict[str, float]:
    """The 99th percentile of the added wait, beside an ideal bucket's for the same arrivals."""
    tasks = run.fleet.tasks
    ideal = ideal_waits(tasks, run.setting)
    inside = [
        (max(0.0, task.waited / SECOND - task.on_the_way), best)
        for task, best in zip(tasks, ideal, strict=True)
        if run.begin.at <= task.begun < run.end.at and task.waited is not None
    ]
    ours, best = quantile([one for one, _ in inside], 0.99), quantile([one for _, one in inside], 0.99)
    return {"wait_p99": ours, "ideal_p99": best, "wait_ratio": (ours + _LEAST_S) / (best + _LEAST_S)}


_LEAST_S = 0.05
"""Added to both waits, so that there is a ratio where nobody waits at all."""


def _answered_after(run: Run, since: int) -> float:
    """Seconds from ``since`` until the first answer of a call that was let go since; NaN: none came."""
    heads = [
        call.first_at if call.stream else call.ended_at
        for call in run.service.account.calls
        if call.at >= since + ON_THE_WAY_US and call.status == "accepted"
    ]
    found = [at for at in heads if at is not None]
    return (min(found) - since) / SECOND if found else math.nan


def opened(run: Run) -> dict[str, float]:
    """After silence, or with a wrong restriction in the books: how soon is there evidence, and how soon after that is
    the pool open? Evidence is the first answer of a call that was let go after that. ``shut_s`` counts from the event:
    what lets nobody go gets no evidence."""
    event = next(one for one in run.setting.events if one.kind in ("silence", "plant"))
    at = event.at_s + event.seconds
    evidence = _answered_after(run, run.started + int(at * SECOND))
    end = run.setting.window_s - OPEN_S

    def is_shut(start: float) -> bool:
        part = run.between(start, start + OPEN_S)
        there = part[-1].offered - part[0].offered - (part[-1].outside_taken - part[0].outside_taken)
        return part[-1].charged - part[0].charged < OPEN * there

    # What was saved up may be used even if little more is let in: so until the last time that it was shut.
    instants = [one.at for one in run.samples if at <= one.at <= end]
    last = max((number for number, instant in enumerate(instants) if is_shut(instant)), default=-1)
    shut = instants[last + 1] - at if last + 1 < len(instants) else math.nan
    return {
        "evidence_s": evidence,
        "shut_s": shut,
        "open_s": max(0.0, shut - evidence),
    }
