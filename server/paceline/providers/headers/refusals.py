"""Why an upstream refused a call, from its error.

One vocabulary for all providers: types and codes are distinct enough, and proxies mix them. A text alone decides only
where providers say it nowhere else.
"""

from __future__ import annotations

import re

from paceline.engine.operations import Refusal
from paceline.providers.headers.fault import Fault

_SPEND = frozenset(
    {
        "billing_error",
        "billing_hard_limit_reached",
        "billing_not_active",
        "contract_spend_limit_reached",
        "enforced_spend_limit_reached",
        "insufficient_quota",
    }
)
_SPEND_SUFFIXES = ("_spend_limit_exceeded", "_spend_limit_reached")
# As in the text of a fault: underscores are spaces there.
_SPEND_CODE = re.compile(r"\b(?:enforced|contract) spend limit reached\b|\bspend limit exceeded\b")
_SPEND_WORDS = ("spend limit", "api usage limits", "credit balance is too low")
_RAMP = frozenset({"ramp_limit_exceeded", "slow_down"})
_OVERLOAD = frozenset(
    {
        "engine_overloaded",
        "modelnotreadyexception",
        "overloaded",
        "overloaded_error",
        "server_is_overloaded",
        "serviceunavailable",
        "serviceunavailableexception",
        "service_unavailable",
        "service_unavailable_error",
        "unavailable",
    }
)
_LIMITED = frozenset(
    {
        "rate_limit_error",
        "rate_limit_exceeded",
        "resource_exhausted",
        "servicequotaexceededexception",
        "throttlingexception",
        "too_many_requests",
        "toomanyrequestsexception",
    }
)
_CONCURRENCY = re.compile(r"\bconcurren(?:t|cy)\b|\btoo many (?:open |active )?connections\b")


def refusal(fault: Fault) -> Refusal | None:
    """Why the call was refused; ``None`` if this was no refusal. That a limit is zero shows in figures only."""
    status, names, text = fault.status, fault.names, fault.text
    if _is_spend(status, names, text):
        return Refusal.SPEND
    if not _RAMP.isdisjoint(names) or (status == 429 and "ramp limit exceeded" in text):
        return Refusal.RAMP
    if status in (503, 529) or not _OVERLOAD.isdisjoint(names):
        return Refusal.OVERLOAD
    if status == 429 or not _LIMITED.isdisjoint(names):
        return Refusal.CONCURRENCY if _CONCURRENCY.search(text) else Refusal.BUDGET
    return None


def _is_spend(status: int, names: frozenset[str], text: str) -> bool:
    if status == 402 or not _SPEND.isdisjoint(names) or any(name.endswith(_SPEND_SUFFIXES) for name in names):
        return True
    if status == 400:
        return any(words in text for words in _SPEND_WORDS)
    return status in (403, 429) and _SPEND_CODE.search(text) is not None
