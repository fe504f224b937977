"""Keys of reservations: ``identity/uuid``, and those of the calls of a bulk grant."""

from __future__ import annotations

from functools import lru_cache
from uuid import UUID, uuid5


@lru_cache(maxsize=64)
def child_keys(key: str, count: int) -> tuple[str, ...]:
    """Keys of the ``count`` calls of the bulk request ``key``: the same on every machine, distinct from each other.

    Each is the name-based UUID (RFC 9562, version 5) of its place under the request's own.
    """
    identity, _, number = key.rpartition("/")
    parent = UUID(number)
    return tuple(f"{identity}/{uuid5(parent, str(place))}" for place in range(count))
