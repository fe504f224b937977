"""Lists of structured fields (RFC 9651, section 3.1), as far as they name things: strings or tokens with parameters.

A field that is not of this form throughout is no field: parsing gives ``None``. Linear in the length, which is bounded.
"""

from __future__ import annotations

import re

MAX_BYTES = 4_096
MAX_ITEMS = 16
MAX_PARAMETERS = 16

_STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*"'
_BARE = r"[A-Za-z*][-A-Za-z0-9!#$%&'*+.^_`|~:/]*"
_ITEM = re.compile(rf"({_STRING}|{_BARE})")
_PARAMETER = re.compile(
    rf"; *([a-z*][a-z0-9_.*-]*)"
    rf"(?:=({_STRING}|{_BARE}|-?\d{{1,12}}\.\d{{1,3}}|-?\d{{1,15}}|:[A-Za-z0-9+/=]*:|\?[01]))?",
    re.ASCII,
)
_COMMA = re.compile(r"[ \t]*,[ \t]*")
_ESCAPED = re.compile(r"\\(.)")

Named = tuple[str, dict[str, str]]
"""A name, and its parameters as written; those without a value are empty. Of one that repeats, the last counts."""


def named_list(raw: bytes) -> list[Named] | None:
    """The members of a list; ``None`` if it is malformed, empty or has more than 16 of them."""
    if len(raw) > MAX_BYTES or not raw.isascii():
        return None
    text = raw.decode("ascii").strip(" ")
    members: list[Named] = []
    at = 0
    while len(members) < MAX_ITEMS:
        item = _ITEM.match(text, at)
        if item is None:
            return None
        at = item.end()
        parameters: dict[str, str] = {}
        while (found := _PARAMETER.match(text, at)) is not None:
            parameters[found[1]] = unquoted(found[2] or "")
            at = found.end()
            if len(parameters) > MAX_PARAMETERS:
                return None
        members.append((unquoted(item[1]), parameters))
        if at == len(text):
            return members
        comma = _COMMA.match(text, at)
        if comma is None:
            return None
        at = comma.end()
    return None


def unquoted(value: str) -> str:
    """A string without its quotes; anything else as it is."""
    return _ESCAPED.sub(r"\1", value[1:-1]) if value.startswith('"') else value
