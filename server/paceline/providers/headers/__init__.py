"""Response headers and error bodies, read into observations of the limits.

Each header family is parsed by a module of this package that has a tuple ``FAMILIES``; adding such a module
is all it takes to add a family. All share ``values`` (single figures), ``fault`` (an error as one whole), ``refusals``
(why a call was refused), ``told`` (figures in messages) and ``observing``, which puts them together.
"""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Sequence
from importlib import import_module

from paceline.engine.operations import Observation
from paceline.providers.headers.family import Family, Response

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
    for family in getattr(import_module(f"{__name__}.{module.name}"), "FAMILIES", ())
}
"""Every header family by name."""

ALLOWED_HEADERS: frozenset[str] = frozenset().union(*(family.wanted for family in FAMILIES.values()))
"""The only header names that are asked for and kept, in lower case. None of them carries a secret."""

IGNORED: Counter[str] = Counter()
"""How often a value was malformed or absurd, by header name (or ``error.retry_after``, ``error.details``)."""


def parse(
    family: str,
    headers: Sequence[tuple[str, bytes]],
    http_status: int = 0,
    error_type: str = "",
    error_message: str = "",
    error_retry_after_us: int | None = None,
    age_us: int = 0,
    *,
    error_code: str = "",
    error_details: bytes = b"",
    ignored: Counter[str] = IGNORED,
) -> Observation | None:
    """What a response said of the limits; ``None`` if nothing. Never raises: nonsense is counted, not used.

    ``headers`` are names in any case with their values; of one that repeats, the first counts. An unknown
    family is read for its refusals only. ``error_details`` is the body of the error, or the part of it with details: of
    more than 4 KiB nothing is read but text. ``ignored`` counts what was not used, by header name.
    """
    known = FAMILIES.get(family, FAMILIES["retry-after"])
    wanted = known.wanted
    first: dict[str, bytes] = {}
    for name, value in headers:
        lower = name if name in wanted else name.lower()
        if lower in wanted and first.setdefault(lower, value) != value:
            ignored[lower] += 1
    response = Response(
        first, http_status, error_type, error_code, error_message, error_retry_after_us, age_us, error_details
    )
    return known.parse(response, ignored)


def origin(headers: Sequence[tuple[str, bytes]]) -> tuple[str, str]:
    """The organisation and upstream workspace that a response names; empty where it does not."""
    found = {"anthropic-organization-id": "", "anthropic-workspace-id": ""}
    for name, value in headers:
        lower = name.lower()
        if lower in found and not found[lower] and len(value) <= 128 and value.isascii():
            found[lower] = value.decode("ascii").strip()
    return found["anthropic-organization-id"], found["anthropic-workspace-id"]
