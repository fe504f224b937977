"""Plain values of the public interface. Nothing here knows of the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Candidate", "HeaderSource", "Headers", "Limit", "Policy", "Priority", "Settlement", "Target", "Usage"]

Priority = Literal["interactive", "standard", "batch"]
Policy = Literal["local", "open", "closed"]
Mode = Literal["enforce", "observe"]

Headers = list[tuple[str, bytes]]
"""Headers as they are kept: lower-case names, values as received."""
HeaderSource = Mapping[Any, Any] | Iterable[tuple[Any, Any]]
"""Headers as callers have them: any mapping, or pairs; text or bytes."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a call goes. Only ``model`` is required; what is empty is the server's default."""

    model: str
    provider: str = ""
    account: str = ""
    region: str = ""
    upstream_workspace: str = ""
    service_tier: str = ""
    endpoint: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One acceptable way to serve a call. ``None`` means: not known, let the server fill it in. Unit: tokens."""

    model: str
    provider: str = ""
    account: str = ""
    region: str = ""
    upstream_workspace: str = ""
    service_tier: str = ""
    endpoint: str = ""
    input_tokens: int | None = None
    """Uncached input, with what is written to the cache."""
    cached_input_tokens: int | None = None
    """Expected to be read from the cache, in addition to ``input_tokens``."""
    output_tokens: int | None = None
    """Expected to be produced."""
    max_output_tokens: int | None = None
    """The bound that the API call will carry."""
    min_output_tokens: int | None = None
    """The smallest such bound that is acceptable."""
    requests: int | None = None
    """Requests, for batch endpoints. ``None``: 1."""

    @property
    def target(self) -> Target:
        """The target, without the sizes."""
        return Target(
            self.model,
            self.provider,
            self.account,
            self.region,
            self.upstream_workspace,
            self.service_tier,
            self.endpoint,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call used, as the provider counted it. The counts do not overlap; ``None`` is not known. Unit: tokens."""

    input_tokens: int | None = None
    """Neither read from nor written to the cache."""
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def known(self) -> bool:
        """Whether any count is known."""
        return (
            self.input_tokens is not None
            or self.output_tokens is not None
            or self.cache_read_tokens is not None
            or self.cache_write_tokens is not None
        )


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit that a call touches, as it was right after the decision. Unit: that of the dimension."""

    pool: str
    share: str
    """Name of the share. Empty: the pool itself."""
    dimension: str
    """For example ``requests`` or ``input_tokens``."""
    window: str
    """``minute``, ``day``, ``month`` or ``none``."""
    limit: int | None
    """Per window. ``None``: not limited, or not known yet."""
    burst: int | None
    """What can be there at most. ``None``: not known yet."""
    level: int | None
    """What is left, net of open holds; below zero it is debt. ``None``: not known."""
    held: int
    """The sum of the open holds."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What the server booked for a call. It comes a moment after the commit."""

    cost: float | None
    """What the call cost. ``None``: no price is known."""
    currency: str
    """ISO 4217 code of the cost. Empty: none."""
    charged: dict[str, int]
    """What was charged to the pool, by dimension."""
    duplicate: bool
    late: bool
    stale: bool
