"""From what was seen of a run to its figures: pure. The definitions are the laboratory's (``bench.lab``)."""

from __future__ import annotations

import math
from collections import Counter

from bench.demo.books import Attempt
from bench.lab.special import LATER_S, TOLERANCE
from bench.learning_sdk.rows import Row
from bench.learning_sdk.run import SAMPLE_S, Happened, Seen
from bench.learning_sdk.truth import Sample

AGAIN, AGAIN_S = 0.95, 10.0
"""After a restart the limit is used again when so much of what is there is used, over so many seconds."""


def figures(row: Row, seen: Seen) -> dict[str, float]:
    """Parts of one, seconds, counts; "refused" are per 1,000 accepted calls. NaN: it did not come to that."""
    accepted = sum(each.status == "accepted" for each in seen.attempts)
    refused = sum(each.status == "refused" for each in seen.attempts)
    part = seen.used[row.binding]
    # Output is produced long after its call was accepted: of it counts what was produced within the window.
    counted = part.drawn if row.binding == "output_tokens" else part.accepted
    before = 1_000 * seen.start.refused / max(1, seen.start.accepted)
    found = {
        "used": counted / (part.budget - part.outside),
        "refused": 1_000 * refused / max(1, accepted),
        "accepted": float(accepted),
        "refusals": float(refused),
        "refused_before": before,
        "refused_learning": before,
        "accepted_before": float(seen.start.accepted),
        "refusals_before": float(seen.start.refused),
        "limit_known_s": _limit_known_s(row, seen),
        "alone": float(
            sum(seen.start.now_us <= at - seen.ledger_offset < seen.end.now_us for at in seen.learned.alone)
        ),
        "busiest_core": max(seen.busy.cores, default=0.0),
        "want": max(seen.want.values(), default=math.nan),
    }
    changes = [each for each in seen.happened if each.event.kind == "limits"]
    for name, change in zip(("down", "up"), changes, strict=False):
        found[f"readings_{name}"] = readings(row, seen, change)
    if changes:
        found["avoidable"] = (
            math.nan
            if not seen.learned.whole
            else float(sum(_avoidable(each, changes, seen) for each in seen.attempts))
        )
    for each in seen.happened:
        if each.event.kind != "limits":
            found |= _restarted(row, seen, each)
    return found


def refused_by(seen: Seen) -> dict[str, int]:
    """Dimension → refusals in the window."""
    return dict(Counter(each.dimension for each in seen.attempts if each.status == "refused"))


def fates(seen: Seen) -> dict[str, int]:
    """What became of the calls offered in the window; ``cut``: they were under way at the end of the run."""
    return dict(Counter(each.fate for each in seen.records).most_common())


def readings(row: Row, seen: Seen, change: Happened) -> float:
    """How many readings from after a change of the limits the ledger had when the new limit ruled, with the one that
    made it so. NaN: it never did.

    A reading is of when its headers came to the caller: one that was under way at the change counts as from before it.
    """
    if not seen.learned.whole:
        return math.nan
    changed = change.until + seen.ledger_offset
    wanted = round(change.event.part * row.limits[row.binding])
    for ruled in seen.learned.ruled:
        if ruled.at >= changed and ruled.amount == wanted:
            return 1.0 + sum(each.until > changed for each in seen.learned.kept[: ruled.after])
    return math.nan


def _avoidable(attempt: Attempt, changes: list[Happened], seen: Seen) -> bool:
    """A refusal, unless the upstream changed its rules after the newest observation that the ledger had at the grant.

    When it was granted is not known here, so its arrival stands for that: a little later, hence never too few.
    """
    if attempt.status != "refused":
        return False
    for change in changes:
        changed = change.until + seen.ledger_offset
        known = next((each.at for each in seen.learned.kept if each.until > changed), None)
        if change.since <= attempt.at and (known is None or attempt.at + seen.ledger_offset <= known):
            return False
    return True


def _limit_known_s(row: Row, seen: Seen) -> float:
    """Seconds from the first calls until the limit was first believed within a tenth."""
    wanted = row.limits[row.binding]
    for ruled in seen.learned.ruled:
        if abs(ruled.amount - wanted) <= TOLERANCE * wanted:
            return max(0.0, (ruled.at - seen.ledger_offset - seen.begun) / 1e6)
    return math.nan


def _restarted(row: Row, seen: Seen, restart: Happened) -> dict[str, float]:
    """Refusals from the end of the server to a minute after its return, and how soon after that the limit is used."""
    refused = [each for each in seen.attempts if each.status == "refused"]
    last = restart.until + LATER_S * 1e6
    again, step = math.nan, 0
    while math.isnan(again) and step * SAMPLE_S < LATER_S:
        since = restart.until + step * SAMPLE_S * 1e6
        share = _share([each for each in seen.samples if since <= each.now_us <= since + AGAIN_S * 1e6], row.binding)
        if share >= AGAIN:
            again = step * SAMPLE_S
        step += 1
    return {
        "refused_after": float(sum(restart.since <= each.at <= last for each in refused)),
        "used_again_s": again,
        "ending_s": (restart.gone - restart.since) / 1e6,
        "away_s": (restart.until - restart.gone) / 1e6,
    }


def _share(samples: list[Sample], dimension: str) -> float:
    """Part of a limit that was charged between the first and the last sample, of what was there."""
    if len(samples) < 2:
        return 0.0
    first, last = samples[0].level(dimension), samples[-1].level(dimension)
    there = first.level_exact + last.offered - first.offered
    return (last.charged - first.charged) / there if there > 0 else 0.0
