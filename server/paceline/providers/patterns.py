"""Names of models: what does not tell them apart, and which pattern fits best."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

# Dates, "latest", Bedrock's and Vertex's versions, context-window marks: the same model, and the same quota.
_VERSION = re.compile(r"(?:-latest|[-@][0-9]{8}|-[0-9]{4}-[0-9]{2}-[0-9]{2}|@default|-v[0-9]+(?::[0-9]+)?|\[1m\])+$")


def bare_model(name: str, prefix: re.Pattern[str] | None) -> str:
    """A model's name in lower case, without the provider's prefix and without version suffixes."""
    name = name.strip().lower()
    if prefix is not None and (found := prefix.match(name)) is not None and found.end() < len(name):
        name = name[found.end() :]
    bare = _VERSION.sub("", name)
    return bare or name


class Patterns(Generic[T]):
    """Values under name patterns, in which ``*`` stands for any characters.

    The pattern with the most other characters wins; of equal ones, the later.
    """

    def __init__(self, entries: Iterable[tuple[str, T]]) -> None:
        self._exact: dict[str, T] = {}
        globs: list[tuple[int, re.Pattern[str], T]] = []
        for pattern, value in entries:
            if "*" in pattern:
                regex = re.compile(".*".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)
                globs.append((len(pattern) - pattern.count("*"), regex, value))
            else:
                self._exact[pattern] = value
        globs.reverse()
        globs.sort(key=lambda entry: -entry[0])
        self._globs = globs

    def match(self, name: str) -> T | None:
        """The value of the best pattern, or ``None``."""
        found = self._exact.get(name)
        if found is not None:
            return found
        return next((value for _, regex, value in self._globs if regex.fullmatch(name)), None)
