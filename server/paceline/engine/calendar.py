"""Calendar months in ledger time (microseconds since 1970-01-01 UTC)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from paceline.engine.dimensions import SECOND_US

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def next_month(at: int) -> int:
    """The instant at which the month after the one of ``at`` begins."""
    moment = datetime.fromtimestamp(at // SECOND_US, UTC)
    turn = datetime(moment.year + moment.month // 12, moment.month % 12 + 1, 1, tzinfo=UTC)
    return (turn - _EPOCH) // _MICROSECOND
