"""Azure OpenAI's headers: OpenAI's names with other meanings.

Any of them may be missing, or -1 for "not told". ``-reset-`` is the time until a window ends, in plain seconds, so it
says nothing of the burst; where a refusal says nothing else of when to come back, it does.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from paceline.engine.dimensions import DAY_US, Dimension
from paceline.engine.operations import Observation, Reading, Refusal
from paceline.providers.headers.family import COMMON, Family, Response
from paceline.providers.headers.observing import observation
from paceline.providers.headers.openai import names
from paceline.providers.headers.values import pair, seconds

_KINDS = ((Dimension.REQUESTS, names("requests")), (Dimension.TOKENS, names("tokens")))
_RESETS = tuple(
    (dimension, (reset, reset.replace("x-ratelimit", "x-rate-limit"))) for dimension, (_, _, reset) in _KINDS
)


def _parse(response: Response, ignored: Counter[str]) -> Observation | None:
    told = {name: value for name, value in response.headers.items() if value.strip() != b"-1"}
    found = []
    for dimension, (limit_name, remaining_name, _) in _KINDS:
        limit, remaining = pair(told, limit_name, remaining_name, ignored)
        if limit is not None or remaining is not None:
            found.append(Reading(dimension, limit, remaining))
    seen = observation(response, found, ignored)
    if seen is not None and seen.refusal is Refusal.BUDGET and seen.retry_after_us is None:
        spans = [
            seconds(told, name, ignored)
            for dimension, spelled in _RESETS
            if seen.refused in (None, dimension)
            for name in spelled
        ]
        wait_us = max((span for span in spans if span), default=None)
        if wait_us is not None and wait_us <= DAY_US:
            return msgspec.structs.replace(seen, retry_after_us=wait_us)
    return seen


_WANTED = {name for _, triple in _KINDS for name in triple} | {name for _, spelled in _RESETS for name in spelled}
FAMILIES = (Family(name="azure-openai", wanted=COMMON | _WANTED, parse=_parse),)
