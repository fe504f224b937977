"""From records and books of one mode to its figures: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import msgspec

from bench.demo.books import Attempt, Mark
from bench.demo.measures import (
    dominant_share,
    endless,
    fair_shares,
    fairness,
    first_attempt,
    least_served,
    lost,
    refused_per_1000,
    used,
    waits,
)
from bench.fleet.plan import Record


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One mode. The first ten are the measures; shares are parts of one, waits in seconds.

    The number of batch calls offered is made by the mode: a batch worker offers its item again until it is answered.
    So ``lost_batch``, and ``first_attempt`` as far as it is of batch, compare how calls fared, not how much work was
    done: that is ``answered_batch`` and ``answered_batch_tokens``.
    """

    limit_used: float
    accepted: int
    refused: int
    refused_per_1000: float | None
    first_attempt: float
    lost_interactive: float
    lost_batch: float
    wait_interactive_p50_s: float | None
    wait_interactive_p99_s: float | None
    jain: float | None

    binding_dimension: str
    offered_interactive: int
    offered_batch: int
    lost_interactive_calls: int
    lost_batch_calls: int
    answered_interactive: int
    answered_batch: int
    answered_batch_tokens: int
    """Input and output of the answered batch calls that were offered in the window."""
    first_attempt_interactive: float
    first_attempt_batch: float
    wait_batch_p50_s: float | None
    wait_batch_p99_s: float | None
    demand_interactive: float
    """What the interactive calls of the window asked for, as a part of the limit in the binding dimension."""
    level_at_start: dict[str, float]
    budget: dict[str, float]
    """Level at the start of the window + rate × window."""
    accepted_amounts: dict[str, float]
    refused_by: dict[str, int]
    """Dimension → refused attempts that were short of it."""
    fates: dict[str, dict[str, int]]
    """Class → fate → calls."""
    tenants: dict[str, dict[str, float]]
    """Tenant → offered, lost, served and fair dominant share."""
    least_served: float | None
    """The least of served ÷ fair share over all tenants, and whose it is."""
    least_served_tenant: str
    sdk_own_s: float
    """Median of the time that the SDK itself takes before it sends, subtracted from each wait."""
    window_s: float
    timeline: dict[str, list[float]]
    """By second of the window: what was accepted of each class, and what interactive calls wanted when they began, in
    the binding dimension; attempts refused."""
    unmatched_attempts: int
    """Difference between the attempts that callers sent and those that the upstream logged, over all calls."""
    busiest_core: float = 0.0
    busy_cores: list[float] = []
    busy_processes: dict[str, float] = {}


def figures(
    records: Sequence[Record],
    attempts: Sequence[Attempt],
    start: Mark,
    end: Mark,
    interactive: Collection[str],
    own_s: float,
) -> Figures:
    """Figures of the window between two marks. ``attempts`` also holds those after it, of calls offered in it."""
    seconds = (end.now_us - start.now_us) / 1e6
    before = start.buckets
    level = {each: point.level_exact for each, point in before.items()}
    rate = {each: (point.offered - before[each].offered) / seconds for each, point in end.buckets.items()}
    budget = {each: level[each] + rate[each] * seconds for each in rate}

    inside = [each for each in attempts if start.calls < each.number <= end.calls]
    accepted = [each for each in inside if each.status == "accepted"]
    refused = [each for each in inside if each.status == "refused"]
    amounts = _sum(accepted, rate)
    binding, part = used(amounts, level, rate, seconds)

    chats = [each for each in records if each.tenant in interactive]
    jobs = [each for each in records if each.tenant not in interactive]
    chat_wait, job_wait = waits(chats, own_s), waits(jobs, own_s)

    asked = {
        tenant: _asked([each for each in records if each.tenant == tenant], rate)
        for tenant in sorted({each.tenant for each in records})
    }
    demands = {tenant: amount if tenant in interactive else endless(amount, budget) for tenant, amount in asked.items()}
    service = {tenant: _sum([each for each in accepted if each.tenant == tenant], rate) for tenant in asked}
    fair = fair_shares(demands, budget)
    shares = {tenant: dominant_share(amount, budget) for tenant, amount in service.items()}
    least, least_part = least_served(shares, fair) or ("", None)
    return Figures(
        limit_used=part,
        accepted=len(accepted),
        refused=len(refused),
        refused_per_1000=refused_per_1000(len(refused), len(accepted)),
        first_attempt=first_attempt(records),
        lost_interactive=lost(chats),
        lost_batch=lost(jobs),
        wait_interactive_p50_s=chat_wait.p50,
        wait_interactive_p99_s=chat_wait.p99,
        jain=fairness(service, demands, budget),
        binding_dimension=binding,
        offered_interactive=len(chats),
        offered_batch=len(jobs),
        lost_interactive_calls=sum(not each.answered for each in chats),
        lost_batch_calls=sum(not each.answered for each in jobs),
        answered_interactive=sum(each.answered for each in chats),
        answered_batch=sum(each.answered for each in jobs),
        answered_batch_tokens=sum(each.input_tokens + each.output_tokens for each in jobs if each.answered),
        first_attempt_interactive=first_attempt(chats),
        first_attempt_batch=first_attempt(jobs),
        wait_batch_p50_s=job_wait.p50,
        wait_batch_p99_s=job_wait.p99,
        demand_interactive=sum(_asked([each], rate)[binding] for each in chats) / (rate[binding] * seconds),
        level_at_start=level,
        budget=budget,
        accepted_amounts=amounts,
        refused_by=_counted(each.dimension for each in refused),
        fates={
            "interactive": _counted(each.fate for each in chats),
            "batch": _counted(each.fate for each in jobs),
        },
        tenants={
            tenant: {
                "offered": sum(each.tenant == tenant for each in records),
                "lost": sum(each.tenant == tenant and not each.answered for each in records),
                "served_share": shares[tenant],
                "fair_share": fair[tenant],
            }
            for tenant in asked
        },
        least_served=least_part,
        least_served_tenant=least,
        sdk_own_s=own_s,
        window_s=seconds,
        timeline=_timeline(inside, start.now_us, seconds, binding, interactive) | _wanted(chats, seconds, binding),
        unmatched_attempts=_unmatched(records, attempts),
    )


def _sum(attempts: Collection[Attempt], dimensions: Collection[str]) -> dict[str, float]:
    sums = dict.fromkeys(dimensions, 0.0)
    for attempt in attempts:
        for each, amount in attempt.amounts().items():
            if each in sums:
                sums[each] += amount
    return sums


def _asked(records: Collection[Record], dimensions: Collection[str]) -> dict[str, float]:
    sums = {
        "requests": float(len(records)),
        "input_tokens": float(sum(each.input_tokens for each in records)),
        "output_tokens": float(sum(each.output_tokens for each in records)),
    }
    return {each: amount for each, amount in sums.items() if each in dimensions}


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _timeline(
    attempts: Collection[Attempt], begin: int, seconds: float, binding: str, interactive: Collection[str]
) -> dict[str, list[float]]:
    bins = max(1, round(seconds))
    lines: dict[str, list[float]] = {name: [0.0] * bins for name in ("interactive", "batch", "refused")}
    for each in attempts:
        second = min(bins - 1, max(0, int((each.at - begin) / 1e6)))
        if each.status == "accepted":
            lines["interactive" if each.tenant in interactive else "batch"][second] += each.amounts()[binding]
        elif each.status == "refused":
            lines["refused"][second] += 1
    return lines


def _wanted(chats: Collection[Record], seconds: float, binding: str) -> dict[str, list[float]]:
    bins = max(1, round(seconds))
    line = [0.0] * bins
    # The callers' clock; the window begins with the first call in it, or a moment before.
    begin = min((each.begun for each in chats), default=0.0)
    for each in chats:
        line[min(bins - 1, int(each.begun - begin))] += _asked([each], (binding,))[binding]
    return {"interactive_wanted": line}


def _unmatched(records: Collection[Record], attempts: Collection[Attempt]) -> int:
    logged = Counter(each.id for each in attempts)
    return sum(abs(each.attempts - logged[each.call]) for each in records)


def as_json(found: Figures) -> dict[str, Any]:
    """Ready for JSON."""
    built: dict[str, Any] = msgspec.to_builtins(found)
    return built
