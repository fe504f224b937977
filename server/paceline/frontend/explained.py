"""What several ledgers, or several processes, say of one reservation or call, as one answer of Explain."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.frontend.errors import refused
from paceline_client.stubs import v1 as pb

_RANKS = {
    pb.RESERVATION_STATE_OPEN: 0,
    pb.RESERVATION_STATE_WAITING: 0,
    pb.RESERVATION_STATE_SETTLED: 1,
    pb.RESERVATION_STATE_EXPIRED: 1,
    pb.RESERVATION_STATE_RELEASED: 2,
    pb.RESERVATION_STATE_UNSPECIFIED: 3,
    pb.RESERVATION_STATE_TOMBSTONE: 4,
}


KNOWN = frozenset(state for state, rank in _RANKS.items() if rank <= 1)
"""States of a reservation of which no other ledger can know more."""


def merged(found: Sequence[pb.ExplainResponse]) -> pb.ExplainResponse:
    """What several ledgers know as one. One may have the reservation while others denied it, or have a tombstone.

    Raises :class:`Problem` if they mean different reservations.
    """
    if len({each.reservation.identity for each in found if each.HasField("reservation")}) > 1:
        raise refused("identity", "several identities use this id: name one")
    if found[0].HasField("reservation"):
        best = min(found, key=lambda each: _RANKS.get(each.reservation.state, 3))
    else:
        best = min(found, key=_preference)
    if len({each.reservation.ledger for each in found}) > 1:
        for each in found:
            for step in each.steps:
                step.message = f"{each.reservation.ledger}: {step.message}"
    steps = [step for each in found for step in each.steps]
    if len(found) > 1:
        past = [step for step in steps if step.HasField("time")]
        present = [step for step in steps if not step.HasField("time")]
        past.sort(key=lambda step: (step.time.seconds, step.time.nanos))
        if not best.HasField("reservation"):
            present.sort(key=lambda step: step.candidate_index)
        steps = past + present
    response = pb.ExplainResponse(steps=steps)
    if best.HasField("reservation"):
        response.reservation.CopyFrom(best.reservation)
    if best.HasField("decision"):
        response.decision.CopyFrom(best.decision)
    return response


def _preference(found: pb.ExplainResponse) -> tuple[int, float]:
    """Granted before waiting before denied."""
    decision = found.decision
    if decision.HasField("grant"):
        return 0, decision.grant.candidate_index
    if not decision.HasField("denial"):
        return 1, 0
    retry = decision.denial.retry_after
    return 2, retry.seconds + retry.nanos / 1e9 if decision.denial.HasField("retry_after") else float("inf")
