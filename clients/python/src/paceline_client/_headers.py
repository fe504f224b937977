"""Which response headers may leave the process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from paceline_client._model import Headers, HeaderSource

DEFAULT_HEADER_NAMES: Final = (
    "anthropic-fast-*",
    "anthropic-organization-id",
    "anthropic-priority-*",
    "anthropic-ratelimit-*",
    "anthropic-workspace-id",
    "openai-organization",
    "ratelimit",
    "ratelimit-policy",
    "retry-after",
    "retry-after-ms",
    "x-ratelimit-*",
    "x-should-retry",
)
"""Until a server has said what it wants."""

_NEVER: Final = frozenset(
    {"api-key", "authorization", "cookie", "proxy-authorization", "set-cookie", "x-api-key", "x-goog-api-key"}
)
"""Not even when a server asks for them."""

MAX_HEADERS: Final = 64
MAX_VALUE_BYTES: Final = 4_096


class HeaderFilter:
    """An allow-list. A name that ends in ``*`` stands for every name that begins so; a ``*`` alone for none."""

    __slots__ = ("_exact", "_prefixes")

    def __init__(self, names: Iterable[str] = DEFAULT_HEADER_NAMES) -> None:
        lower = [name.strip().lower() for name in names]
        self._exact = frozenset(name for name in lower if name and not name.endswith("*")) - _NEVER
        self._prefixes = tuple(name[:-1] for name in lower if len(name) > 1 and name.endswith("*"))

    def select(self, headers: HeaderSource | None) -> Headers:
        """The headers on the list."""
        if headers is None:
            return []
        chosen: Headers = []
        exact, prefixes = self._exact, self._prefixes
        for raw_name, raw_value in _pairs(headers):
            name = raw_name.decode("latin-1") if isinstance(raw_name, bytes) else str(raw_name)
            name = name.lower()
            if name not in exact and (not name.startswith(prefixes) or name in _NEVER):
                continue
            values = raw_value if isinstance(raw_value, (list, tuple)) else (raw_value,)
            for each in values:
                value = each if isinstance(each, bytes) else str(each).encode("utf-8", "replace")
                if len(value) <= MAX_VALUE_BYTES and len(chosen) < MAX_HEADERS:
                    chosen.append((name, value))
        return chosen


def _pairs(headers: HeaderSource) -> Iterable[tuple[Any, Any]]:
    if isinstance(headers, Mapping):
        return headers.items()
    items = getattr(headers, "items", None)
    # Such as the headers of http.client, which are no Mapping.
    return items() if callable(items) else headers
