"""Messages of the contract in words: durations, amounts, limits."""

from __future__ import annotations

from typing import Final, Protocol

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.duration_pb2 import Duration

from paceline_client.stubs import v1 as pb
from paceline_client.stubs.google_types import money_pb2

_NANO = 1_000_000_000
_SOURCES: Final[dict[int, str]] = {
    pb.LIMIT_SOURCE_UNSPECIFIED: "-",
    pb.LIMIT_SOURCE_UPSTREAM: "learned",
    pb.LIMIT_SOURCE_DEFAULT: "guessed",
}


class Enum(Protocol):
    """A generated enum."""

    @property
    def DESCRIPTOR(self) -> EnumDescriptor: ...


def enum_word(kind: Enum, prefix: str, value: int) -> str:
    """An enum's value: ``DIMENSION_INPUT_TOKENS`` is ``input_tokens``. A newer one, not known here, is its number."""
    name = kind.DESCRIPTOR.values_by_number.get(value)
    return str(value) if name is None else str(name.name).removeprefix(prefix).lower()


def dimension_word(value: int) -> str:
    """A dimension."""
    return enum_word(pb.Dimension, "DIMENSION_", value)


def window_word(value: int) -> str:
    """A window."""
    return enum_word(pb.Window, "WINDOW_", value)


def span(duration: Duration) -> str:
    """A duration, in three figures or so."""
    seconds = duration.seconds + duration.nanos / _NANO
    if seconds == 0:
        return "0 s"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def amount(dimension: int, value: int | None) -> str:
    """An amount of a dimension; money in US dollars, as in the metrics. ``None``: not known, or not limited."""
    if value is None:
        return "-"
    return f"${value / _NANO:,.2f}" if dimension == pb.DIMENSION_SPEND else f"{value:,}"


def money(value: money_pb2.Money) -> str:
    """An amount of money."""
    return f"{value.units + value.nanos / _NANO:.6f} {value.currency_code}".strip()


def present(state: pb.DimensionState, field: str) -> int | None:
    """An optional amount."""
    return int(getattr(state, field)) if state.HasField(field) else None  # type: ignore[arg-type]  # one of three names


def source_word(limit: pb.Limit) -> str:
    """Where the amount in force comes from."""
    if limit.source == pb.LIMIT_SOURCE_OVERRIDE and not limit.HasField("override_limit"):
        return "configured"
    return _SOURCES.get(limit.source) or enum_word(pb.LimitSource, "LIMIT_SOURCE_", limit.source)


def where(pool: str, share: str) -> str:
    """A limit's owner."""
    return f"{pool} / {share}" if share else pool
