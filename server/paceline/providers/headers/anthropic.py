"""Anthropic's headers: limit, remaining and reset of requests, input tokens and output tokens.

``anthropic-ratelimit-tokens-*`` is the most restrictive of the others or their sum, never a quota of its own,
so it is not read. Proxies and older articles spell the names ``X-RateLimit-Limit-Requests``; both are taken.

Fast mode and the priority tier add figures of their own, which rule nothing but their own pools: a family each. A call
of the priority tier counts against the standard limits as well, so its requests read like any other's.
"""

from __future__ import annotations

from collections import Counter

from paceline.engine.dimensions import SECOND_US, Dimension
from paceline.engine.operations import Observation, Reading
from paceline.providers.headers.family import COMMON, Family, Response
from paceline.providers.headers.observing import observation
from paceline.providers.headers.values import pair, until

TOKEN_ROUNDING = 1_000
"""Token ``-remaining`` is rounded to the nearest thousand; requests are exact."""
RESET_ERROR_US = SECOND_US
"""``-reset`` and ``date`` are whole seconds."""

_COMMON = COMMON | {"anthropic-organization-id", "anthropic-workspace-id"}
_Names = tuple[str, str, str]
"""The headers of one dimension's limit, remaining and reset."""
_Spellings = tuple[tuple[Dimension, int, tuple[_Names, ...]], ...]


def _names(stem: str) -> _Names:
    return f"{stem}-limit", f"{stem}-remaining", f"{stem}-reset"


def _older(kind: str) -> _Names:
    return f"x-ratelimit-limit-{kind}", f"x-ratelimit-remaining-{kind}", f"x-ratelimit-reset-{kind}"


def _standard(kind: str) -> tuple[_Names, ...]:
    return _names(f"anthropic-ratelimit-{kind}"), _older(kind)


def _tokens(stem: str) -> _Spellings:
    return (
        (Dimension.INPUT_TOKENS, TOKEN_ROUNDING, (_names(f"{stem}-input-tokens"),)),
        (Dimension.OUTPUT_TOKENS, TOKEN_ROUNDING, (_names(f"{stem}-output-tokens"),)),
    )


_REQUESTS: _Spellings = ((Dimension.REQUESTS, 0, _standard("requests")),)
_STANDARD: _Spellings = (
    *_REQUESTS,
    (Dimension.INPUT_TOKENS, TOKEN_ROUNDING, _standard("input-tokens")),
    (Dimension.OUTPUT_TOKENS, TOKEN_ROUNDING, _standard("output-tokens")),
)


def _family(name: str, spellings: _Spellings) -> Family:
    def parse(response: Response, ignored: Counter[str]) -> Observation | None:
        found = [_reading(response, dimension, rounding, names, ignored) for dimension, rounding, names in spellings]
        return observation(response, [reading for reading in found if reading is not None], ignored)

    names = {header for _, _, spelled in spellings for triple in spelled for header in triple}
    return Family(name=name, wanted=_COMMON | names, parse=parse)


def _reading(
    response: Response,
    dimension: Dimension,
    rounding: int,
    spelled: tuple[_Names, ...],
    ignored: Counter[str],
) -> Reading | None:
    headers = response.headers
    for limit_name, remaining_name, reset_name in spelled:
        limit, remaining = pair(headers, limit_name, remaining_name, ignored)
        reset = until(headers, reset_name, ignored)
        if limit is not None or remaining is not None or reset is not None:
            return Reading(
                dimension=dimension,
                limit=limit,
                remaining=remaining,
                rounding=rounding if remaining is not None else 0,
                reset_us=reset,
                reset_error_us=RESET_ERROR_US if reset is not None else 0,
            )
    return None


FAMILIES = (
    _family("anthropic", _STANDARD),
    _family("anthropic-fast", _tokens("anthropic-fast")),
    _family("anthropic-priority", (*_REQUESTS, *_tokens("anthropic-priority"))),
)
