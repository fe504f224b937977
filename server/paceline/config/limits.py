"""What the server allows of its callers and of itself. The defaults fit one process on a small machine."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from paceline.config.fields import LongDuration, ShortDuration
from paceline.engine.dimensions import MINUTE_US, SECOND_US
from paceline.providers.schema import Strict

KIB = 1024
MIB = 1024 * KIB

Cap = Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)]


class ServerLimits(Strict):
    """The server's own caps. Beyond them a caller gets RESOURCE_EXHAUSTED or INVALID_ARGUMENT."""

    max_message_bytes: Annotated[int, Field(strict=True, ge=4 * KIB, le=64 * MIB)] = 1 * MIB
    """The largest request, or batch of a session."""
    max_label_length: Annotated[int, Field(strict=True, ge=16, le=1024)] = 128
    """Characters in a tenant, workspace, route, model or any other name that a caller sends."""
    max_candidates: Annotated[int, Field(strict=True, ge=1, le=256)] = 16
    """Candidates of one Reserve, or of one ladder."""
    max_bulk: Cap = 1_000
    """Reservations that one Reserve may ask for."""
    max_headers: Annotated[int, Field(strict=True, ge=1, le=1_000)] = 64
    """Response headers in one outcome."""
    max_header_bytes: Annotated[int, Field(strict=True, ge=64, le=64 * KIB)] = 1 * KIB
    """The value of one response header."""
    max_error_message_bytes: Annotated[int, Field(strict=True, ge=64, le=64 * KIB)] = 1 * KIB
    """An upstream error's message; longer ones are cut."""
    max_error_details_bytes: Annotated[int, Field(strict=True, ge=64, le=64 * KIB)] = 4 * KIB
    """An upstream error's details; longer ones are cut."""
    max_wait_us: ShortDuration = Field(default=600 * SECOND_US, alias="max_wait")
    """The longest time that a Reserve may wait its turn."""
    default_hold_us: LongDuration = Field(default=5 * MINUTE_US, alias="default_hold")
    """How long a reservation lives whose caller does not say."""
    max_hold_us: LongDuration = Field(default=60 * MINUTE_US, alias="max_hold")
    """The longest life of a reservation between renewals."""
    max_queue: Cap = 10_000
    """Calls that may wait in one pool."""
    max_queue_per_tenant: Cap = 2_000
    """Calls that may wait in one pool for one tenant."""
    max_pools: Cap = 1_000
    """Pools of one account."""
    max_open_pools: Annotated[int, Field(strict=True, ge=0, le=100_000)] = 256
    """Pools of one account named by callers: unknown models and regions. Further ones share one pool."""
    max_accounts: Cap = 64
    """Accounts that need not be configured to be used."""
    max_open_reservations: Cap = 200_000
    """Open reservations of one account."""
    max_remembered: Cap = 1_000_000
    """Ended reservations of one account that are remembered, for retries."""
    remember_us: LongDuration = Field(default=60 * MINUTE_US, alias="remember")
    """How long ended reservations are remembered."""
    max_routes: Cap = 10_000
    """Routes of one account whose sizes are learned; the least used are forgotten first."""
    max_sessions: Cap = 1_000
    """Open sessions of one process."""
    max_session_in_flight: Cap = 4_096
    """Items of one session that have no answer yet."""
    target_cache: Cap = 4_096
    """Targets whose pool is kept at hand."""
    drain_timeout_us: ShortDuration = Field(default=30 * SECOND_US, alias="drain_timeout")
    """How long a stopping server lets its callers finish."""
