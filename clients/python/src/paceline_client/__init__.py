"""Client library of Paceline: coordinated rate limits for calls to LLM APIs.

::

    from paceline_client import Client

    paceline = Client()
    with paceline.reserve(model="claude-sonnet-5", input_tokens=1200, max_wait=30) as grant:
        response = anthropic.messages.create(...)
        grant.commit(response)

Keys, prompts and completions never leave the process.
"""

__version__ = "0.1.0"

from paceline_client._client import (
    AsyncClient,
    AsyncReservation,
    AsyncReservations,
    Client,
    Reservation,
    Reservations,
)
from paceline_client._errors import CannotFit, Denied, PacelineError, RequestRefused, Unavailable, UnmappedAccount
from paceline_client._estimate import estimate_tokens
from paceline_client._fit import fit_prompt
from paceline_client._grant import Grant, GrantBatch
from paceline_client._merge import AsyncMerger, Merger
from paceline_client._model import Candidate, Limit, Policy, Priority, Settlement, Target, Usage
from paceline_client._steps import Answer, Local, Step, Turn

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncMerger",
    "AsyncReservation",
    "AsyncReservations",
    "Candidate",
    "CannotFit",
    "Client",
    "Denied",
    "Grant",
    "GrantBatch",
    "Limit",
    "Local",
    "Merger",
    "PacelineError",
    "Policy",
    "Priority",
    "RequestRefused",
    "Reservation",
    "Reservations",
    "Settlement",
    "Step",
    "Target",
    "Turn",
    "Unavailable",
    "UnmappedAccount",
    "Usage",
    "estimate_tokens",
    "fit_prompt",
]
