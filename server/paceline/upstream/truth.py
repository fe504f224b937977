"""What really happened: totals, levels at any instant, pages of the log, and how much of a limit was used."""

from __future__ import annotations

from itertools import islice
from typing import Any

import msgspec

from paceline.upstream.account import RAMP, Account, Call
from paceline.upstream.bucket import GRAINS


class Point(msgspec.Struct, frozen=True, gc=False):
    """One bucket at one instant, in grains, with the sums since the account began."""

    level: int
    offered: int
    outside_taken: int
    charged: int


class Mark(msgspec.Struct, frozen=True):
    """All buckets at one instant (µs), by group and dimension."""

    at: int
    logged: int
    """Calls in the log so far."""
    points: dict[str, dict[str, Point]]


class Used(msgspec.Struct, frozen=True):
    """How much of one limit was used in a window, in tokens (or requests)."""

    accepted: int
    """Of the calls that arrived in the window and were accepted, as the upstream counts."""
    budget: float
    """Level at the start + rate × window."""
    outside: float
    """What others on the same key took."""
    drawn: float
    """What was charged within the window, whichever calls it was for."""

    @property
    def part(self) -> float:
        """Limit used, of the whole budget."""
        return self.accepted / self.budget if self.budget > 0 else 0.0

    @property
    def net(self) -> float:
        """Limit used, of what outside traffic left."""
        left = self.budget - self.outside
        return self.accepted / left if left > 0 else 0.0


def mark(account: Account, now: int) -> Mark:
    """The state of all buckets at ``now``."""
    account.advance(now)
    return Mark(
        account.now,
        account.logged,
        {
            name: {
                dimension: Point(bucket.level, bucket.offered, bucket.outside_taken, bucket.charged)
                for dimension, bucket in group.all_buckets.items()
            }
            for name, group in account.groups.items()
        },
    )


def limit_used(account: Account, start: Mark, end: Mark) -> dict[str, dict[str, Used]]:
    """Per group and dimension, for the window between two marks.

    Tokens (or requests) of the calls accepted in the window ÷ (level at its start + rate × window); a limit that
    changed within the window counts at each rate as long as it held, a ramp if it held throughout. Output of calls that
    still run counts as far as it is produced. Raises :class:`LookupError` if the log no longer reaches back to the
    start of the window.
    """
    first = account.calls[0].number if account.calls else account.logged + 1
    if first > start.logged + 1:
        raise LookupError(f"the log begins at call {first}, the window at call {start.logged + 1}")
    sums = {name: dict.fromkeys(group.all_buckets, 0) for name, group in account.groups.items()}
    for call in account.calls:
        if call.number > end.logged:
            break
        if call.number > start.logged and call.status == "accepted":
            sum_of = sums[call.group]
            for dimension, amount in counted(account, call).items():
                sum_of[dimension] += amount
            if RAMP in sum_of:
                sum_of[RAMP] += call.counted_input(account.groups[call.group].config.cache_reads_count)
    found: dict[str, dict[str, Used]] = {}
    for name, points in end.points.items():
        found[name] = {}
        for dimension, last in points.items():
            before = start.points[name].get(dimension)
            if before is None:
                continue
            found[name][dimension] = Used(
                accepted=sums[name][dimension],
                budget=(before.level + last.offered - before.offered) / GRAINS,
                outside=(last.outside_taken - before.outside_taken) / GRAINS,
                drawn=(last.charged - before.charged) / GRAINS,
            )
    return found


def counted(account: Account, call: Call) -> dict[str, int]:
    """What an accepted call counts in each dimension, until now."""
    group = account.groups[call.group]
    if group.api == "openai":
        return {"requests": 1, "tokens": call.estimate}
    return {
        "requests": 1,
        "input_tokens": call.counted_input(group.config.cache_reads_count),
        "output_tokens": call.produced,
    }


def report(account: Account, now: int) -> dict[str, Any]:
    """Totals and levels at ``now``, ready for JSON. Levels in tokens; ``level_exact`` as a fraction."""
    account.advance(now)
    groups = {}
    for name, group in account.groups.items():
        groups[name] = {
            "api": group.api,
            "models": list(group.config.models),
            **group.counts,
            "refused_by": dict(group.refused_by),
            "in_flight": group.in_flight,
            "ended": dict(group.ends),
            "input_tokens": group.input,
            "cache_read_tokens": group.cache_read,
            "cache_write_tokens": group.cache_write,
            "output_tokens": group.output,
            "buckets": {
                dimension: {
                    "limit": bucket.amount,
                    "burst": bucket.burst_tokens,
                    "level": bucket.tokens,
                    "level_exact": bucket.level / GRAINS,
                    "start": bucket.start / GRAINS,
                    "refilled": bucket.refilled / GRAINS,
                    "offered": bucket.offered / GRAINS,
                    "charged": bucket.charged // GRAINS,
                    "outside_rate": bucket.outside,
                    "outside_taken": bucket.outside_taken / GRAINS,
                    "adjusted": bucket.adjusted / GRAINS,
                }
                for dimension, bucket in group.all_buckets.items()
            },
        }
    totals = {
        status: sum(group.counts[status] for group in account.groups.values())
        for status in ("accepted", "refused", "overloaded")
    }
    return {
        "now_us": account.now,
        "began_us": account.began,
        "calls": account.logged,
        **totals,
        "groups": groups,
        "scenario": msgspec.to_builtins(account.scenario),
    }


def page(account: Account, since: int, limit: int) -> dict[str, Any]:
    """Entries of the log after number ``since``, at most ``limit``. ``next`` is what to pass as the next ``since``.

    An entry without ``ended`` is of a call that still runs: its output grows.
    """
    first = account.calls[0].number if account.calls else account.logged + 1
    skip = max(0, since + 1 - first)
    found = list(islice(account.calls, skip, skip + limit))
    return {
        "calls": found,
        "next": found[-1].number if found else min(since, account.logged),
        "logged": account.logged,
        "forgotten": max(0, first - 1 - since),
    }
