"""What can happen to a call, and how each of its attempts must then stand in the coordinator's books."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Form = Literal["json", "stream"]
Mark = Literal["final", "uncounted", "partial", "unknown", "refused", "overloaded", "broken", "not sent"]
"""How an attempt ended, by the reports of the hook:

- ``final``: with the usage that the upstream reported, to the token;
- ``partial``: the input to the token, as the stream began with it; the output from the text that came, because the
  upstream reports it only at the end. No less than three quarters of what the application had been handed, no more
  than five quarters of what the upstream had produced (and 2). Tokens that were produced but were still on their way
  lie between the two: nobody on this side of the network can count those. OpenAI reports the input, too, only at the
  end, so there it is as estimated;
- ``uncounted``: the whole answer came, but the application did not ask OpenAI for the usage: the output from the text,
  within the same bound, and the input as estimated;
- ``broken``: as ``partial``, and the upstream said in the stream that it is overloaded;
- ``unknown``: there was no response, so nobody knows: the estimate stays charged;
- ``refused``, ``overloaded``: nothing is charged, and the coordinator knows which of the two it was; with OpenAI,
  where by the catalogue failed requests count, what was held is charged;
- ``not sent``: everything goes back.
"""
Coordinator = Literal["there", "denies", "open", "stops", "goes", "closed"]
"""``open``, ``closed``: nobody listens, under that policy. ``stops``: gone after it was seen once, policy ``local``.
``goes``: between the grant and the end of the call.
"""

FORMS: Final[tuple[Form, ...]] = ("json", "stream")
SPEED: Final[Mapping[str, Any]] = {"tokens_per_second": 1_000, "chunk_ms": 20}
"""For answers that something happens to."""
LONG: Final = 30_000
"""Tokens of an answer that nobody reads to its end: half a minute."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """One row of the matrix."""

    name: str
    marks: Mapping[Form, tuple[Mark, ...]]
    """One for each attempt. A form that is not here has its reason in ``absent``."""
    absent: Mapping[Form, str] = field(default_factory=dict)
    scenario: Mapping[str, Any] = field(default_factory=dict)
    output: int = 137
    retries: int = 0
    timeout: float = 15.0
    pieces: int = 0
    """The application leaves after so many pieces of text. Zero: it stays."""
    interrupted: bool = False
    """Cancelled in asyncio, and interrupted as by Ctrl-C otherwise: while it waits for JSON, or between events."""
    upstream_is_there: bool = True
    coordinator: Coordinator = "there"
    is_rough: bool = False
    """How much of the text comes depends on the machine."""
    fails: bool = True


def both(*marks: Mark) -> dict[Form, tuple[Mark, ...]]:
    return {"json": marks, "stream": marks}


SITUATIONS: Final = (
    Situation(name="success", marks=both("final"), fails=False),
    Situation(
        name="429 then success",
        marks=both("refused", "final"),
        scenario={"refuse_next": 1, "refuse_retry_after": 1},
        retries=2,
        fails=False,
    ),
    Situation(
        name="429 until given up",
        marks=both("refused", "refused"),
        scenario={"refuse_next": 9, "refuse_retry_after": 1},
        retries=1,
    ),
    Situation(name="529", marks=both("overloaded", "overloaded"), scenario={"overload_probability": 1.0}, retries=1),
    Situation(
        name="mid-stream error",
        marks={"stream": ("broken",)},
        absent={"json": "a JSON answer is one piece: an error comes instead of it, as a status, never within it"},
        scenario={"stream_error_next": 1, "stream_error_after": 40},
    ),
    Situation(
        name="cancelled",
        marks={"json": ("unknown",), "stream": ("partial",)},
        scenario=SPEED,
        output=LONG,
        interrupted=True,
        is_rough=True,
    ),
    Situation(
        name="cut off by the caller",
        marks={"stream": ("partial",)},
        absent={"json": "a JSON answer is read by the SDK before the application has any of it"},
        scenario=SPEED,
        output=LONG,
        pieces=3,
        is_rough=True,
        fails=False,
    ),
    Situation(name="time-out before headers", marks=both("unknown"), scenario={"first_byte_ms": 10_000}, timeout=0.25),
    Situation(name="upstream gone", marks=both("not sent", "not sent"), retries=1, upstream_is_there=False),
    Situation(
        name="connection dropped",
        marks={"json": ("unknown",), "stream": ("partial",)},
        scenario={**SPEED, "drop_next": 1, "drop_after": 80},
        is_rough=True,
    ),
    Situation(name="Paceline denies", marks=both(), coordinator="denies", retries=2),
    Situation(name="Paceline gone, open", marks=both(), coordinator="open", fails=False),
    Situation(name="Paceline gone, local", marks=both(), coordinator="stops", fails=False),
    Situation(
        name="Paceline goes meanwhile",
        marks=both(),
        scenario={**SPEED, "first_byte_ms": 100},
        output=200,
        coordinator="goes",
        is_rough=True,
        fails=False,
    ),
    Situation(name="Paceline gone, closed", marks=both(), coordinator="closed", retries=2),
)


def cells(rows: tuple[Situation, ...] = SITUATIONS) -> list[tuple[Situation, Form]]:
    """The combinations that exist."""
    return [(row, form) for row in rows for form in FORMS if form in row.marks]


def table() -> str:
    """The matrix, to be read."""
    lines = [f"{'':24}{'JSON':36}stream"]
    for row in SITUATIONS:
        texts = []
        for form in FORMS:
            if form not in row.marks:
                texts.append("cannot be (1)" if row.name == "mid-stream error" else "cannot be (2)")
            elif row.coordinator == "there":
                texts.append(", ".join(row.marks[form]))
            else:
                texts.append(
                    {"denies": "denied: Denied and RateLimitError", "closed": "Unavailable"}.get(
                        row.coordinator, "as without Paceline"
                    )
                )
        lines.append(f"{row.name:24}{texts[0]:36}{texts[1]}")
    notes = [reason for row in SITUATIONS for reason in row.absent.values()]
    lines += [f"({number}) {reason}" for number, reason in enumerate(notes, 1)]
    return "\n".join(lines)
