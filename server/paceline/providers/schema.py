"""The form of catalogue files, for those of this package and for an operator's own.

Units in the files are those people use: whole tokens and requests, US dollars, plain factors. Here they
become the engine's integers: thousandths and nano-dollars.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from paceline.engine.accounting import WEIGHT_ONE, Prices, Profile, Rule
from paceline.engine.dimensions import GAUGES, Dimension, Limit, Window

MAX_AMOUNT = 1_000_000_000_000
"""No real limit is larger; sums of such amounts stay far inside 64 bits."""
NANO = 1_000_000_000
MAX_USD = 1_000_000_000
MAX_WEIGHT = 1_000

_NAME = r"^[a-z0-9][a-z0-9._-]*$"


class Strict(BaseModel):
    """Unknown fields are errors; what was read does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _decimal(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number; write it plainly, like 12.5")
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise ValueError("must be a number; write it plainly, like 12.5") from None
    if not number.is_finite():
        raise ValueError("must be a finite number; write it plainly, like 12.5")
    return number


def _scaled(value: object, one: int, most: int) -> int:
    number = _decimal(value)
    if number < 0:
        raise ValueError("must not be negative; give zero or more")
    if number > most:
        raise ValueError(f"must be at most {most:,}; check the unit")
    scaled = number * one
    if scaled != scaled.to_integral_value():
        raise ValueError(f"has too many decimal places; 1/{one:,} is the smallest step")
    return int(scaled)


def usd(value: object) -> int:
    """Nano-dollars, from US dollars."""
    return _scaled(value, NANO, MAX_USD)


def _thousandths(value: object) -> int:
    return _scaled(value, WEIGHT_ONE, MAX_WEIGHT)


def _slack(value: object) -> int:
    if _decimal(value) < 1:
        raise ValueError("must be at least 1; 1 means that estimates are exact")
    return _thousandths(value)


def _several(value: object) -> object:
    items = value if isinstance(value, list | tuple) else [value]
    return [item if isinstance(item, dict | LimitSpec) else {"amount": item} for item in items]


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error}); correct it") from None
    return value


_NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_AMOUNT)]
Usd = Annotated[int, BeforeValidator(usd, json_schema_input_type=_NotNegative | str)]
Weight = Annotated[int, BeforeValidator(_thousandths, json_schema_input_type=_NotNegative)]
Slack = Annotated[int, BeforeValidator(_slack, json_schema_input_type=float)]
Name = Annotated[str, Field(pattern=_NAME, max_length=128)]
Text = Annotated[str, Field(min_length=1, max_length=128)]
Regex = Annotated[str, Field(max_length=256), AfterValidator(_regex)]


class LimitSpec(Strict):
    """One limit of a dimension."""

    amount: Count
    """Requests, tokens, or calls in flight. Zero closes the pool."""
    per: Literal["minute", "day", "month"] | None = None
    """The window; a minute if absent. Concurrency and queued requests have none."""
    burst: Count | None = None
    """The most that can be saved up; a full window's amount if absent."""

    def limit(self, dimension: Dimension) -> Limit:
        """This limit in the engine's words."""
        window = Window.NONE if dimension in GAUGES else Window[(self.per or "minute").upper()]
        return Limit(dimension, window, self.amount, self.burst)


Limited = Annotated[
    tuple[LimitSpec, ...],
    BeforeValidator(_several, json_schema_input_type=Count | LimitSpec | list[Count | LimitSpec]),
]


class Limits(Strict):
    """Limits by dimension: an amount (per minute), a limit, or several limits with different windows."""

    requests: Limited = ()
    input_tokens: Limited = ()
    output_tokens: Limited = ()
    tokens: Limited = ()
    """Input and output together, where a provider counts so."""
    concurrency: Limited = ()
    queued_requests: Limited = ()
    """Requests in batches that have not ended."""

    def items(self) -> Iterator[tuple[str, Dimension, tuple[LimitSpec, ...]]]:
        """What is limited: field name, dimension, limits."""
        for name in Limits.model_fields:
            specs: tuple[LimitSpec, ...] = getattr(self, name)
            if specs:
                yield name, Dimension[name.upper()], specs

    def limits(self) -> dict[Dimension, tuple[Limit, ...]]:
        """The engine's limits by dimension."""
        return {dimension: tuple(spec.limit(dimension) for spec in specs) for _, dimension, specs in self.items()}

    def problems(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """What the types alone cannot say: windows that make no sense, or stand twice."""
        for name, dimension, specs in self.items():
            seen = set()
            for index, spec in enumerate(specs):
                if dimension in GAUGES and spec.per is not None:
                    yield (name, index, "per"), "counts what is in flight, not per time; remove it"
                limit = spec.limit(dimension)
                if limit.window in seen:
                    yield (name, index), "limits the same window twice; keep one"
                seen.add(limit.window)


class HoldSpec(Strict):
    """Weights of a call's estimated quantities in its charge at the start."""

    requests: Weight = 0
    input: Weight = 0
    """Uncached input tokens, cache writes included."""
    cached: Weight = 0
    """Expected cache reads."""
    output: Weight = 0
    max_output: Weight = 0
    """The cap sent upstream (`max_tokens`)."""
    larger: StrictBool = False
    """Of the input's part and the output's only the larger is charged, not their sum."""


class SettleSpec(Strict):
    """Weights of a call's actual quantities in its final charge."""

    requests: Weight = 0
    input: Weight = 0
    cache_read: Weight = 0
    cache_write: Weight = 0
    output: Weight = 0


class ChargeSpec(Strict):
    """How one dimension is charged."""

    hold: HoldSpec = HoldSpec()
    settle: SettleSpec | Literal["held"] = SettleSpec()
    """`held`: the provider never corrects its first charge."""

    def rule(self, dimension: Dimension) -> Rule:
        """This charge in the engine's words."""
        settle = SettleSpec() if self.settle == "held" else self.settle
        return Rule(
            dimension=dimension,
            hold_requests=self.hold.requests,
            hold_input=self.hold.input,
            hold_cached=self.hold.cached,
            hold_output=self.hold.output,
            hold_max_output=self.hold.max_output,
            settle_requests=settle.requests,
            settle_input=settle.input,
            settle_cache_read=settle.cache_read,
            settle_cache_write=settle.cache_write,
            settle_output=settle.output,
            settle_as_held=self.settle == "held",
            hold_larger=self.hold.larger,
        )


class ChargesSpec(Strict):
    """Charges by dimension. A dimension that is absent is not counted."""

    requests: ChargeSpec | None = None
    input_tokens: ChargeSpec | None = None
    output_tokens: ChargeSpec | None = None
    tokens: ChargeSpec | None = None
    concurrency: ChargeSpec | None = None
    queued_requests: ChargeSpec | None = None


class ProfileSpec(Strict):
    """An accounting profile: one provider's way of counting."""

    charges: ChargesSpec
    default_input_tokens: Count = 1_000
    """Assumed for a call that does not say and of whose kind nothing has been learned yet."""
    default_output_tokens: Count = 1_000
    max_output_tokens: Count = 32_000
    """The output cap assumed for a call that does not say."""
    estimate_slack: Slack = 1_500
    """By what factor an input estimate may differ from the provider's own figure."""

    refused_counts: StrictBool = False
    """A call refused for its budget counts as a request all the same."""

    def profile(self, name: str) -> Profile:
        """This profile in the engine's words."""
        charges = ((Dimension[field.upper()], getattr(self.charges, field)) for field in ChargesSpec.model_fields)
        return Profile(
            name=name,
            rules=tuple(charge.rule(dimension) for dimension, charge in charges if charge is not None),
            default_input_tokens=self.default_input_tokens,
            default_output_tokens=self.default_output_tokens,
            max_output_tokens=self.max_output_tokens,
            estimate_slack=self.estimate_slack,
            refused_counts=self.refused_counts,
        )


class GroupSpec(Strict):
    """Models that share one quota."""

    models: tuple[Text, ...]
    """Names without dates and version suffixes; `*` stands for any characters. The most exact wins."""
    each: StrictBool = False
    """Every model that matches has a quota of its own, under its own name."""
    profile: str | None = None
    """The accounting profile; the provider's if absent."""
    default_input_tokens: Count | None = None
    default_output_tokens: Count | None = None
    max_output_tokens: Count | None = None


class EndpointSpec(Strict):
    """An API endpoint. One without a pool counts against the model's group."""

    names: tuple[Text, ...] = ()
    """What a target may call it, beside its key."""
    pool: Name | None = None
    profile: str | None = None
    price_percent: Annotated[int, Field(strict=True, ge=0, le=1_000)] = 100
    """Prices on this endpoint, in percent of the model's."""


class ServiceTierSpec(Strict):
    """A service tier with a quota of its own. Those not listed share the standard one."""

    header_family: str | None = None
    price_percent: Annotated[int, Field(strict=True, ge=0, le=10_000)] = 0
    """Prices in this service tier, in percent of the model's; 0: not known, so calls have no price."""


class TierLimits(Limits):
    """Limits of some groups (or endpoint pools) in a tier."""

    groups: tuple[str, ...]
    """Names; `*` for every model group that no other entry names."""


class TierSpec(Strict):
    """A usage tier: what an account may use before its headers have said so."""

    monthly_spend_cap: Usd | None = None
    """US dollars."""
    limits: tuple[TierLimits, ...] = ()


class PriceSpec(Strict):
    """Prices of some models, in US dollars per million tokens."""

    models: tuple[Text, ...]
    input: Usd
    output: Usd
    cache_read: Usd | None = None
    """The input price if absent."""
    cache_write: Usd | None = None
    """The input price if absent."""

    def prices(self) -> Prices:
        """These prices in the engine's words."""
        return Prices(
            input_tokens=self.input,
            cache_read_tokens=self.input if self.cache_read is None else self.cache_read,
            cache_write_tokens=self.input if self.cache_write is None else self.cache_write,
            output_tokens=self.output,
        )


class ProviderSpec(Strict):
    """One upstream. What an extension leaves out of a known provider stays as it is."""

    base_urls: tuple[str, ...] = ()
    header_family: str = "retry-after"
    """How its response headers read."""
    profile: str = "generic"
    """How it counts, where a group or an endpoint does not say otherwise."""
    separate_regions: StrictBool = False
    """Each region has quotas of its own."""
    model_prefix: Regex = ""
    """Removed from the front of model names before they are matched (regular expression)."""
    endpoints: dict[Name, EndpointSpec] = {}
    service_tiers: dict[Name, ServiceTierSpec] = {}
    groups: dict[Name, GroupSpec] = {}
    tiers: dict[Name, TierSpec] = {}
    prices: tuple[PriceSpec, ...] = ()


class CatalogueSpec(Strict):
    """A catalogue file, or an operator's extension of the catalogue."""

    profiles: dict[Name, ProfileSpec] = {}
    providers: dict[Name, ProviderSpec] = {}
    cautious_limits: Limits | None = None
    """Per minute, where neither an override nor a tier says anything."""


def merge(base: CatalogueSpec, extra: CatalogueSpec) -> CatalogueSpec:
    """``base`` with ``extra`` laid over it: entries are added, or replaced where they have the same name.

    A provider's scalars are replaced only if given, and of a tier only the limits of the groups named.
    """
    providers = dict(base.providers)
    for name, provider in extra.providers.items():
        known = providers.get(name)
        providers[name] = provider if known is None else _merge_provider(known, provider)
    return CatalogueSpec(
        profiles={**base.profiles, **extra.profiles},
        providers=providers,
        cautious_limits=extra.cautious_limits or base.cautious_limits,
    )


def _merge_provider(base: ProviderSpec, extra: ProviderSpec) -> ProviderSpec:
    update: dict[str, object] = {field: getattr(extra, field) for field in extra.model_fields_set}
    update["endpoints"] = {**base.endpoints, **extra.endpoints}
    update["service_tiers"] = {**base.service_tiers, **extra.service_tiers}
    # Replaced groups move to the end: of two groups that name the same model, the later one has it.
    update["groups"] = {name: group for name, group in base.groups.items() if name not in extra.groups} | extra.groups
    update["prices"] = (*base.prices, *extra.prices)
    tiers = dict(base.tiers)
    for name, tier in extra.tiers.items():
        known = tiers.get(name)
        if known is not None:
            cap = known.monthly_spend_cap if tier.monthly_spend_cap is None else tier.monthly_spend_cap
            tier = TierSpec.model_construct(monthly_spend_cap=cap, limits=(*known.limits, *tier.limits))
        tiers[name] = tier
    update["tiers"] = tiers
    return base.model_copy(update=update)
