"""OpenAI's headers: limit, remaining and time to full of requests and of tokens, for the organisation and the project.

All are exact. A limit per day comes under the same names as one per minute: only how fast it fills tells them apart,
and a day's is left out.
"""

from __future__ import annotations

from collections import Counter

from paceline.engine.dimensions import MINUTE_US, Dimension
from paceline.engine.operations import Observation, Reading
from paceline.providers.headers.family import COMMON, Family, Response
from paceline.providers.headers.observing import observation
from paceline.providers.headers.values import pair, within

RESET_ERROR_US = 1_000
"""``x-ratelimit-reset-*`` is right to a millisecond."""
LONGEST_MINUTE_US = 10 * MINUTE_US
"""A limit that takes longer to fill, from nothing, is not one per minute, however roughly its reset is rounded."""


def names(kind: str) -> tuple[str, str, str]:
    """The headers of one quantity's limit, remaining and reset."""
    return f"x-ratelimit-limit-{kind}", f"x-ratelimit-remaining-{kind}", f"x-ratelimit-reset-{kind}"


_REQUESTS, _TOKENS, _PROJECT = names("requests"), names("tokens"), names("project-tokens")


def _parse(response: Response, ignored: Counter[str]) -> Observation | None:
    requests = _reading(response, Dimension.REQUESTS, _REQUESTS, ignored)
    tokens = _reading(response, Dimension.TOKENS, _TOKENS, ignored)
    project = _reading(response, Dimension.TOKENS, _PROJECT, ignored)
    found = (requests, _both(tokens, project))
    return observation(response, [reading for reading in found if reading is not None], ignored)


def _reading(
    response: Response, dimension: Dimension, spelled: tuple[str, str, str], ignored: Counter[str]
) -> Reading | None:
    limit_name, remaining_name, reset_name = spelled
    limit, remaining = pair(response.headers, limit_name, remaining_name, ignored)
    reset = within(response.headers, reset_name, ignored)
    if (
        limit
        and remaining is not None
        and reset is not None
        and reset * limit > LONGEST_MINUTE_US * (limit - remaining)
    ):
        if remaining < limit:
            ignored[limit_name] += 1
            return None
        reset = None
    if limit is None and remaining is None and reset is None:
        return None
    return Reading(dimension, limit, remaining, 0, reset, RESET_ERROR_US if reset is not None else 0)


def _both(one: Reading | None, other: Reading | None) -> Reading | None:
    """Two limits on the same tokens: the lower rate, and what is left in both."""
    if one is None or other is None:
        return one or other
    limit = _least(one.limit, other.limit)
    remaining = _least(one.remaining, other.remaining)
    for each in (one, other):
        if (each.limit, each.remaining) == (limit, remaining):
            return each
    # Of two buckets: when either is full says nothing of the other.
    return Reading(one.dimension, limit, remaining)


def _least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


FAMILIES = (Family(name="openai", wanted=COMMON | {*_REQUESTS, *_TOKENS, *_PROJECT}, parse=_parse),)
