"""Beginning anew where another process has left off, perhaps some time ago, perhaps with its last writes lost."""

from __future__ import annotations

import msgspec

from paceline.engine import events as ev
from paceline.engine.books import Books
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import UNLIMITED, WINDOW_US


class Absence(msgspec.Struct, frozen=True):
    """What a new decider knows of the time before it. Times in µs.

    ``since`` is the ledger time up to which somebody is known to have decided, if that is later than the newest event:
    the refill before it counts. The refill of the first ``most_us`` after it does not, since callers may have gone on
    by themselves. Of what was decided in the last ``loss_us`` before it, nothing may be left in the journal.
    For the first ``gather_us`` after the beginning nobody is granted anything who is willing to wait: those who waited
    before send their Reserves again, in any order, and keep their places.
    """

    since: int = 0
    most_us: int = 0
    loss_us: int = 0
    gather_us: int = 0


def begin_after(books: Books, absence: Absence) -> None:
    """Leave out the refill that may have been used unseen, and what may have been granted and was lost.

    Callers went on by their shares, which add up to the limits, so all the refill may have been used. What turns out to
    have been used, as the calls are reported, takes the place of the loss; the rest is a level too low by what one
    absence refills at most, until the bucket is full or a reading shows more.

    What was lost is debited from the limits of pools: what refills in that time, and no more than there is, since none
    of it may have been granted. That, too, passes when the bucket is full or a reading shows more.
    """
    state = books.state
    if not state.at:
        return
    since = min(books.now, max(absence.since, state.at))
    until = min(books.now, since + absence.most_us)
    for number, bucket in enumerate(state.buckets):
        window = WINDOW_US.get(bucket.window)
        if window is None or bucket.amount >= UNLIMITED:
            continue
        refilled, carry = bucket.refill(since)
        debit = 0
        if absence.loss_us and bucket.pool and not bucket.share:
            debit = max(0, min(bucket.amount * absence.loss_us // window, bucket.level + refilled))
        if until <= since and not debit:
            continue
        withheld = (bucket.amount - bucket.outside) * (until - since) // window
        books.emit(ev.Withheld(number, since, until, refilled, carry, withheld))
        if debit:
            books.emit(ev.Corrected(number, -debit))
        _doubt_reading(books, number, bucket)


def _doubt_reading(books: Books, number: int, bucket: Bucket) -> None:
    """A reading that stands from before has not seen what was used since: it may not raise the level any more."""
    standing = bucket.constraint
    if standing is not None and standing.low is not None:
        kept = None if standing.high is None else msgspec.structs.replace(standing, low=None)
        books.emit(ev.ReadingKept(number, kept))
