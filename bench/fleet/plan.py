"""What a caller process is told, and what it tells: one JSON message a line, on standard input and output."""

from __future__ import annotations

from typing import Literal

import msgspec

from bench.workloads import Span

Mode = Literal["alone", "alone_patient", "paceline"]
Priority = Literal["interactive", "standard", "batch"]

CALL_HEADER = "x-paceline-call"
TENANT_HEADER = "x-paceline-tenant"

PATIENT_RETRIES = 1_000_000
"""More than fit into any deadline."""
SHIPPED_RETRIES = 2
"""``anthropic.DEFAULT_MAX_RETRIES``; a test holds it there."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One caller process.

    With the same plan but for ``mode`` and the addresses, a service offers the same calls at the same instants, and
    each batch worker has the same items in the same order. How often an item is offered depends on the answers.
    """

    tenant: str
    priority: Priority
    mode: Mode
    upstream: str
    """Base URL."""
    coordinator: str | None = None
    """``host:port`` of the Paceline server, in mode ``paceline``."""
    model: str
    workload: str
    seed: int
    deadline_s: float
    """From the application's call to the complete answer."""
    stream: bool
    max_tokens: int = 4_096
    """Of every call: callers give room and use little of it."""
    spans: list[Span] = []
    """An open loop: calls arrive by this process, at ``part`` of its rates, whether or not earlier ones are done."""
    part: float = 1.0
    workers: int = 0
    """A closed loop: so many workers. Each offers one item until it is answered, after a short pause when it was lost,
    and then the next; each time is a call of its own, with its own deadline."""


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Make some calls one after the other, without limits or coordinator: what does the SDK itself take?"""

    calls: int


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Begin at this instant, and stop offering calls at ``end``. Instants of the machine's monotonic clock."""

    at: float
    window_start: float
    window_end: float
    end: float


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Give up what is under way, report it as cut, and exit."""


Order = Measure | Start | Stop


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process has loaded everything and waits for orders."""


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """Seconds from the application's call to the first byte sent, in each call."""

    seconds: list[float]


class Record(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """One call of the application, told when its fate is known. Instants of the machine's monotonic clock.

    An item of a batch worker that was lost and is offered again is a new call, with a record of its own.
    """

    call: str
    tenant: str
    begun: float
    sent: float | None
    """When the last attempt was sent; ``None`` if none was."""
    ended: float
    attempts: int
    """Sent upstream."""
    fate: str
    """``answered``; ``deadline``; ``cut`` by the end of the run; else the class of the SDK's error."""
    input_tokens: int
    output_tokens: int

    @property
    def answered(self) -> bool:
        """The complete answer came within the deadline."""
        return self.fate == "answered"


class Settled(msgspec.Struct, frozen=True, tag="settled"):
    """The window is over, and the fate of every call offered in it is told."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The last message. ``offered`` is the number of calls in the window: as many records must have arrived."""

    offered: int
    cpu_s: float
    """Processor time of this process, from its beginning."""


Report = Ready | Measured | Record | Settled | Done


def retries(mode: Mode) -> int:
    """The SDK's ``max_retries`` in a mode."""
    return PATIENT_RETRIES if mode == "alone_patient" else SHIPPED_RETRIES
