"""Figures that stand only in an error's message: what was short, of how much, how much was left, how long to wait.

Read from the message as :class:`~paceline.providers.headers.fault.Fault` has it: in lower case, ``_`` as a space. Only
limits per minute are taken; a longer window's would be taken for a minute's.
"""

from __future__ import annotations

import re

import msgspec

from paceline.engine.dimensions import Dimension
from paceline.engine.operations import Reading, Refusal
from paceline.providers.headers.fault import Fault
from paceline.providers.headers.values import MAX_AMOUNT, MAX_RETRY_AFTER_US, duration

_NUMBER = r"(\d[\d,]{0,19})(?:\.\d{1,9})?"
_KIND = r"(input tokens?|output tokens?|prompt tokens?|completion tokens?|tokens?|requests?)"
_RATE = re.compile(rf"\b{_KIND} (?:\([a-z]{{1,8}}\) )?(?:per|each|a|/) ?(second|min|hour|day|month|week)", re.ASCII)
_AMOUNT = re.compile(rf"(?<![\d.,]){_NUMBER} {_KIND} (?:per|each|a) min", re.ASCII)
# OpenAI: "Limit 30000, Used 29937, Requested 385"; once "Limit: 150000.000000 / min. Current: 176000.000000 / min".
_LIMIT = re.compile(rf"\blimit:? {_NUMBER}", re.ASCII)
_USED = re.compile(rf"\b(?:used|current):? {_NUMBER}", re.ASCII)
_WAIT = re.compile(
    r"\b(?:try again|retry|retrying|wait) (?:in|after|for)?:? {0,2}"
    r"((?:\d{1,12}(?:\.\d{1,18})? ?[a-zµ]{1,12} ?){1,4})",
    re.ASCII,
)
_CONCURRENT = re.compile(rf"\blimit of {_NUMBER} concurrent", re.ASCII)
_NO_QUOTA = re.compile(r"\blimit(?: of|:)? 0(?![\d.,]*\d)", re.ASCII)
_ALLOWED = re.compile(
    rf"\b(?:allow(?:ed|s)?|currently|at the moment|current limit)\b[^.;\d]{{0,60}}?{_NUMBER}"
    rf"|{_NUMBER} (?:{_KIND} )?[^.;\d]{{0,40}}?\ballowed\b",
    re.ASCII,
)
# The phrase of the status, and how Azure's messages begin.
_GENERIC = re.compile(r"\btoo many requests\b(?!, please)|\brequests to the\b")
_WORDS = (
    ("input token", Dimension.INPUT_TOKENS),
    ("output token", Dimension.OUTPUT_TOKENS),
    ("token rate limit", Dimension.TOKENS),
    ("too many tokens", Dimension.TOKENS),
    ("reached for tokens", Dimension.TOKENS),
    ("call rate limit", Dimension.REQUESTS),
)


class Told(msgspec.Struct, frozen=True):
    """What an error says in figures. ``wait_us`` is what it asks for; ``zero``: the limit is 0.

    ``complete``: it lists what was short, so a ``refused`` of ``None`` means that no one dimension was.
    """

    refused: Dimension | None = None
    readings: tuple[Reading, ...] = ()
    wait_us: int | None = None
    allowed: int | None = None
    zero: bool = False
    complete: bool = False


def told(fault: Fault, why: Refusal) -> Told:
    """The figures in an error's message, given why the call was refused."""
    if why is Refusal.SPEND:
        return Told()
    text = fault.text
    wait_us = _wait(text)
    if why is Refusal.CONCURRENCY:
        amount = _first(_CONCURRENT, text)
        return Told(None, (Reading(Dimension.CONCURRENCY, amount),) if amount else (), wait_us)
    if why is Refusal.OVERLOAD:
        return Told(wait_us=wait_us)
    refused, minute = _refused(text)
    if why is Refusal.RAMP:
        allowed, named = _allowed(fault)
        refused = named or refused
        if refused is None and allowed is not None:
            # The one provider that states a figure states it for input.
            refused = Dimension.INPUT_TOKENS
        return Told(refused, (), wait_us, allowed)
    zero = _NO_QUOTA.search(text) is not None
    reading = None if refused is None else _reading(text, refused, minute)
    return Told(refused, () if reading is None else (reading,), wait_us, zero=zero)


def dimension_of(kind: str) -> Dimension:
    """The dimension that a quantity's name stands for: of one with neither tokens nor a side, requests."""
    if "token" not in kind:
        return Dimension.REQUESTS
    if "input" in kind or "prompt" in kind:
        return Dimension.INPUT_TOKENS
    return Dimension.OUTPUT_TOKENS if "output" in kind or "completion" in kind else Dimension.TOKENS


def _refused(text: str) -> tuple[Dimension | None, bool]:
    """The dimension that a message names, if one and only one, and whether it is said to be per minute.

    A limit per day is none of a minute's dimensions: nothing passes, whatever its size.
    """
    rates = {(dimension_of(kind), window) for kind, window in _RATE.findall(text)}
    if rates:
        if len({dimension for dimension, _ in rates}) > 1 or any(
            window not in ("second", "min") for _, window in rates
        ):
            return None, False
        return next(iter(rates))[0], all(window == "min" for _, window in rates)
    named = {dimension for words, dimension in _WORDS if words in text}
    # "This request would exceed … input tokens" names no request limit.
    if not named and "requests" in _GENERIC.sub("", text):
        named.add(Dimension.REQUESTS)
    return (named.pop(), False) if len(named) == 1 else (None, False)


def _reading(text: str, refused: Dimension, minute: bool) -> Reading | None:
    for found in _AMOUNT.finditer(text):
        if dimension_of(found[2]) is refused:
            limit = _amount(found[1])
            return None if limit is None else Reading(refused, limit)
    limit = _first(_LIMIT, text) if minute else None
    if limit is None:
        return None
    used = _first(_USED, text)
    return Reading(refused, limit, None if used is None else max(0, limit - used))


def _allowed(fault: Fault) -> tuple[int | None, Dimension | None]:
    """What a ramp lets pass now, and of what: from the details, else from the message."""
    for part in fault.details:
        for key, value in list(part.items())[:32]:
            if "allowed" in key or "current_limit" in key:
                amount = value if isinstance(value, int) and not isinstance(value, bool) else None
                if isinstance(value, str):
                    amount = _amount(value)
                if amount is not None and 0 < amount <= MAX_AMOUNT:
                    named = "token" in key or "request" in key
                    return amount, dimension_of(key) if named else None
    for found in _ALLOWED.finditer(fault.text):
        amount = _amount(found[1] or found[2])
        if amount:
            return amount, None
    # It is below the full limit, which such a message may state as well.
    amounts = [amount for found in _AMOUNT.finditer(fault.text) if (amount := _amount(found[1]))]
    return min(amounts, default=None), None


def _wait(text: str) -> int | None:
    found = _WAIT.search(text)
    span = None if found is None else duration(found[1])
    return span if span is not None and span <= MAX_RETRY_AFTER_US else None


def _first(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return None if found is None else _amount(found[1])


def _amount(digits: str) -> int | None:
    plain = digits.replace(",", "")
    if not plain.isascii() or not plain.isdigit() or len(plain) > 13:
        return None
    amount = int(plain)
    return amount if amount <= MAX_AMOUNT else None
