"""What others use of a limit: the estimate that integrates what readings correct.

A correction closes the gap of the moment, and with it all trace of who made it. What others take goes on, so the gap
opens anew; the corrections of a while, divided by its length, are the rate at which it does. Together with the rate
that was already taken off the refill in that while they are one sample of what others use. The estimate is the median
of the newest samples: one correction that has another cause (an estimate that was far off, a limit that moved) moves it
not at all, and a step in the traffic moves it within three samples. Every sample is of the whole rate, not of the
remainder, so nothing winds up and the loop cannot ring.

Inside the width of what a reading leaves open nothing is corrected. The estimate is therefore a hundredth part higher
than the samples: the level drifts to the lower end of that width, where it refuses nothing that would have passed for
long, instead of the upper, where it would let in what is refused.

The samples are soft state; the estimate itself is in the books. It decays by itself when no sample confirms it.
"""

from __future__ import annotations

from collections import deque

from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import MINUTE_US, SECOND_US

SAMPLE_US = 2 * SECOND_US
"""Of so much time, at least, is one sample."""
LONGEST_SAMPLE_US = MINUTE_US
"""A gap that opened over more time than this is no sample."""
SAMPLES = 5
HALVES_US = 30 * SECOND_US
"""An estimate that no sample confirms halves every so often."""
CONFIRM_US = 10 * SECOND_US
"""One that does not move is confirmed this often."""
MOST = 950
"""Of a limit, in thousandths, others may seem to use at most: the rest finds out."""
LEAST = 5
"""Less than so many thousandths of a limit is nobody."""
_THOUSAND = 1_000
_LEAN = 1_010
"""The estimate is so many thousandths of the samples."""


class Sampler:
    """The samples of one limit. Rates are per minute."""

    __slots__ = ("_corrected", "_samples", "_since")

    def __init__(self) -> None:
        self._since: int | None = None
        self._corrected = 0
        self._samples: deque[int] = deque(maxlen=SAMPLES)

    def correct(self, amount: int) -> None:
        """A reading moved the level by ``amount``."""
        self._corrected += amount

    def forget(self) -> None:
        """What comes next has other causes: a limit moved."""
        self._since = None
        self._corrected = 0
        self._samples.clear()

    def read(self, bucket: Bucket, now: int) -> int | None:
        """A reading was taken in at ``now``: the estimate, if it moves or is to be confirmed; else ``None``."""
        since = self._since
        if since is None or now - since > LONGEST_SAMPLE_US:
            self._since, self._corrected = now, 0
            return None
        if now - since < SAMPLE_US:
            return None
        self._samples.append(bucket.outside - self._corrected * MINUTE_US // (now - since))
        self._since, self._corrected = now, 0
        return self._estimate(bucket, now)

    def _estimate(self, bucket: Bucket, now: int) -> int | None:
        if len(self._samples) < SAMPLES:
            return None
        median = sorted(self._samples)[SAMPLES // 2]
        least, most = bucket.amount * LEAST // _THOUSAND, bucket.amount * MOST // _THOUSAND
        rate = min(median * _LEAN // _THOUSAND, most)
        if rate < least:
            rate = 0
        moved = abs(rate - bucket.outside) >= max(1, least) or (rate == 0) != (bucket.outside == 0)
        return rate if moved or (rate and now - bucket.outside_at >= CONFIRM_US) else None


def decayed(rate: int, age_us: int) -> int:
    """What is left of an estimate that was last confirmed ``age_us`` ago."""
    halvings = max(0, age_us) // HALVES_US
    return rate >> min(halvings, 63)
