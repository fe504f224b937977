"""What a simulated upstream is (:class:`Config`) and what goes wrong with it (:class:`Scenario`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

Api = Literal["anthropic", "openai"]
Dimension = Literal["requests", "input_tokens", "output_tokens", "tokens"]
DIMENSIONS: dict[str, tuple[Dimension, ...]] = {
    "anthropic": ("requests", "input_tokens", "output_tokens"),
    "openai": ("requests", "tokens"),
}

_Amount = Annotated[int, Meta(ge=1, le=10**12)]
_Count = Annotated[int, Meta(ge=0, le=10**9)]
_Part = Annotated[float, Meta(ge=0, le=1)]
_Seconds = Annotated[float, Meta(ge=0, le=86_400)]
_Name = Annotated[str, Meta(min_length=1, max_length=128)]


class SettingsError(ValueError):
    """A setting that is not possible: the message names the field."""


class Group(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Models that share one set of buckets."""

    name: _Name
    models: Annotated[tuple[_Name, ...], Meta(min_length=1)]
    """Names; one that ends in ``*`` stands for all that begin so."""
    api: Api = "anthropic"
    limits: dict[Dimension, _Amount]
    """Per minute, for every dimension of the API."""
    burst_seconds: Annotated[float, Meta(gt=0, le=3_600)] | None = None
    """A bucket's burst is its limit of so many seconds; not given: as in :class:`Config`."""
    cache_reads_count: bool = False
    """As on the 3.x Haikus: cache reads count as input."""
    max_concurrent: _Amount | None = None


def _default_groups() -> tuple[Group, ...]:
    return (
        Group(
            name="claude",
            models=("claude-*",),
            limits={"requests": 4_000, "input_tokens": 2_000_000, "output_tokens": 400_000},
        ),
        Group(name="gpt", models=("gpt-*", "o*"), api="openai", limits={"requests": 5_000, "tokens": 2_000_000}),
    )


class Config(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One organisation. Changing it means starting anew: see ``POST /sim/reset``."""

    groups: Annotated[tuple[Group, ...], Meta(min_length=1, max_length=1_000)] = msgspec.field(
        default_factory=_default_groups
    )
    burst_seconds: Annotated[float, Meta(gt=0, le=3_600)] = 60.0
    initial: _Part = 1.0
    """How full the buckets start, as a part of their burst."""
    token_rounding: _Amount = 1_000
    """Tokens remaining are rounded to the nearest multiple of this (Anthropic's headers; requests are exact)."""
    tokens_header: Literal["sum", "tightest"] = "sum"
    """What ``anthropic-ratelimit-tokens-*`` shows: input and output together, or the one with the least left."""
    refused_requests_count: Literal["openai", "all", "none"] = "openai"
    """Whose refused calls still take one from the requests."""
    estimate_spread: _Part = 0.0
    """The estimate at arrival is off by up to this part, at random, besides its own crudeness."""
    estimate_includes_cached: bool = False
    """Whether the estimate at arrival contains what will turn out to be read from the cache."""
    correct_after_ms: _Count | None = None
    """When the estimate of the input gives way to the true count: so long after arrival; not given: when the response
    starts."""
    cache_seconds: _Seconds = 300.0
    cache_minimum: _Count = 1_024
    """Shorter prefixes are not cached, tokens."""
    cache_entries: _Amount = 10_000
    log_calls: Annotated[int, Meta(ge=1, le=1_000_000)] = 200_000
    """Calls that are remembered one by one; older ones stay in the totals only. About 0.5 kB each."""
    organization: _Name = "00000000-0000-4000-8000-000000000001"
    seed: int = 0
    output_mu: Annotated[float, Meta(ge=0, le=10)] = 5.02
    output_sigma: Annotated[float, Meta(ge=0, le=3)] = 0.86
    """Log-normal size of answers that nobody asked a size for (defaults: a published trace of conversations)."""


class Ramp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast usage may grow: ``start`` input tokens per minute at once, and ``step`` more at each minute boundary of
    the account's clock.

    It is one more bucket, charged as that of the input, until the limit itself is reached.
    """

    start: _Amount
    step: _Amount


class Scenario(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What may be changed while it runs. Each field alone; what is not named stays."""

    first_byte_ms: _Count = 100
    tokens_per_second: Annotated[float, Meta(ge=0, le=10**9)] = 100.0
    """Speed of one answer. Zero: all at once."""
    chunk_ms: Annotated[int, Meta(ge=1, le=60_000)] = 50
    """Between two pieces of a stream, and between two charges of an answer that is not streamed."""

    overload_probability: _Part = 0.0
    """Part of the calls that are answered 529 (OpenAI: 503), before any bucket is looked at."""
    overload_seconds: _Seconds | None = None
    """The episode ends so long after this change; not given: when it is changed again."""
    stream_error_probability: _Part = 0.0
    stream_error_next: _Count = 0
    """So many of the next streams end in an ``overloaded_error``, whatever the probability."""
    stream_error_after: _Count = 5
    """After so many tokens."""
    drop_probability: _Part = 0.0
    drop_next: _Count = 0
    """So many of the next accepted calls have their connection cut, after ``drop_after`` tokens."""
    drop_after: _Count = 5
    refuse_next: _Count = 0
    """So many of the next calls are answered 429 whatever the buckets hold."""
    refuse_dimension: Dimension | Literal["concurrency"] = "requests"
    refuse_retry_after: Annotated[int, Meta(ge=1, le=86_400)] | None = 1

    outside: dict[str, dict[Dimension, _Count]] = {}
    """Traffic of others on the same key, per minute: group, or ``*`` for all, to dimension to amount."""
    limits: dict[str, dict[Dimension, _Amount]] = {}
    """New limits, at once: group, or ``*``, to dimension to amount per minute."""

    ramps: dict[str, Ramp] = {}
    """Usage may not grow faster from now on: group, or ``*``. A group that is not named has no ramp."""

    headers: bool = True
    """Whether responses carry the headers about limits."""
    spelling: Literal["current", "older"] = "current"
    """``anthropic-ratelimit-requests-limit``, or ``x-ratelimit-limit-requests``."""


_T = TypeVar("_T", Config, Scenario)


def _converted(fields: Mapping[str, Any], kind: type[_T]) -> _T:
    unknown = sorted(str(name) for name in fields if name not in kind.__struct_fields__)
    if unknown:
        raise SettingsError(f"{unknown[0]}: there is no such field")
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at ")
        path = where.rpartition("`$")[2].strip("`.")
        raise SettingsError(f"{path or 'the document'}: {text}") from None


def config_of(fields: Mapping[str, Any]) -> Config:
    """A checked configuration. Raises :class:`SettingsError`, which names the field."""
    found = _converted(fields, Config)
    check(found)
    return found


def check(config: Config) -> None:
    """What types cannot say. Raises :class:`SettingsError`."""
    names: set[str] = set()
    for number, group in enumerate(config.groups):
        where = f"groups[{number}]"
        if group.name in names or group.name == "*":
            raise SettingsError(f"{where}.name: {group.name!r} is taken")
        names.add(group.name)
        wanted = set(DIMENSIONS[group.api])
        if wanted != set(group.limits):
            raise SettingsError(f"{where}.limits: {group.api} has exactly {', '.join(sorted(wanted))}")


def scenario_of(fields: Mapping[str, Any], before: Scenario | None = None) -> Scenario:
    """``before`` with ``fields`` changed. Raises :class:`SettingsError`, which names the field."""
    changed = _converted(fields, Scenario)
    if before is None:
        return changed
    return msgspec.structs.replace(before, **{name: getattr(changed, name) for name in fields})
