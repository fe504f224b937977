"""What a caller asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypedDict

from paceline_client._config import Options
from paceline_client._model import Candidate, Priority


class Ask(TypedDict, total=False):
    """The arguments of a reservation. Exactly one of ``model``, ``candidates`` and ``ladder`` is required.

    What is left out or ``None`` is learned or filled in by the server, unless the client has a default of its own.
    """

    model: str
    """Model, as named in the API call."""
    input_tokens: int | None
    """Uncached input that the call will probably have. Zero is not unknown. Unit: tokens."""
    cached_input_tokens: int | None
    """Input expected to be read from the cache, in addition. Unit: tokens."""
    output_tokens: int | None
    """Output expected. Unit: tokens."""
    max_output_tokens: int | None
    """The bound for the output that the call will carry. Unit: tokens."""
    min_output_tokens: int | None
    """The smallest such bound that would do. Unit: tokens."""
    requests: int | None
    """Requests, for batch endpoints."""
    provider: str
    account: str
    region: str
    upstream_workspace: str
    service_tier: str
    endpoint: str
    candidates: Sequence[Candidate]
    """Acceptable ways to serve the call, best first."""
    ladder: str
    """Name of such a list on the server."""
    tenant: str
    """Who the call is for."""
    workspace: str
    """The team's share."""
    priority: Priority | None
    route: str
    """A label for calls of this kind, under which sizes are learned."""
    max_wait: float
    """How long the call may wait for its turn. Zero: answer now. Unit: seconds."""
    hold: float | None
    """How long the hold lasts without a sign of life. Unit: seconds."""
    raise_on_denial: bool
    """``False``: a denial comes as a grant that is false, with ``denial``, instead of an exception."""


_KNOWN: Final = frozenset(Ask.__annotations__)


@dataclass(frozen=True, slots=True)
class Plan:
    """One call, or several equal ones, as asked for."""

    candidates: tuple[Candidate, ...]
    """With a ladder: one, which carries the estimate."""
    ladder: str
    tenant: str
    workspace: str
    priority: Priority | None
    route: str
    max_wait: float
    hold: float | None
    count: int | None
    allow_partial: bool
    raise_on_denial: bool


def plan(ask: Ask, given: Options, count: int | None = None, allow_partial: bool = False) -> Plan:
    """Check the arguments, and fill in the defaults of the client."""
    if not _KNOWN.issuperset(ask):
        raise TypeError(f"unknown arguments: {', '.join(sorted(set(ask) - _KNOWN))}")
    model, ladder, candidates = ask.get("model", ""), ask.get("ladder", ""), ask.get("candidates", ())
    max_wait = ask.get("max_wait", 0.0)
    if bool(model) + bool(candidates) + bool(ladder) != 1:
        raise ValueError("give exactly one of model, candidates, ladder")
    if count is not None and count < 1:
        raise ValueError("reserve at least one call")
    if not max_wait >= 0:
        raise ValueError("max_wait must not be negative")
    if not candidates:
        candidates = (
            Candidate(
                model,
                ask.get("provider", ""),
                ask.get("account", ""),
                ask.get("region", ""),
                ask.get("upstream_workspace", ""),
                ask.get("service_tier", ""),
                ask.get("endpoint", ""),
                ask.get("input_tokens"),
                ask.get("cached_input_tokens"),
                ask.get("output_tokens"),
                ask.get("max_output_tokens"),
                ask.get("min_output_tokens"),
                ask.get("requests"),
            ),
        )
    return Plan(
        tuple(candidates),
        ladder,
        ask.get("tenant") or given.tenant,
        ask.get("workspace") or given.workspace,
        ask.get("priority") or given.priority,
        ask.get("route") or given.route,
        max_wait,
        ask.get("hold"),
        count,
        allow_partial,
        ask.get("raise_on_denial", True),
    )
