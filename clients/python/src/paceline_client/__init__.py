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
from paceline_client._errors import CannotFit, Denied, PacelineError, RequestRefused, Unavailable
from paceline_client._estimate import estimate_tokens
from paceline_client._fit import fit_prompt
from paceline_client._grant import Grant, GrantBatch
from paceline_client._model import Candidate, Policy, Priority, Settlement, Target, Usage

__all__ = [
    "AsyncClient",
    "AsyncReservation",
    "AsyncReservations",
    "Candidate",
    "CannotFit",
    "Client",
    "Denied",
    "Grant",
    "GrantBatch",
    "PacelineError",
    "Policy",
    "Priority",
    "RequestRefused",
    "Reservation",
    "Reservations",
    "Settlement",
    "Target",
    "Unavailable",
    "Usage",
    "estimate_tokens",
    "fit_prompt",
]
