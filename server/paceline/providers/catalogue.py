"""What is known of the providers, and from it: which pool a call belongs to, how it counts, what it costs.

A :class:`Catalogue` is made of catalogue files (:mod:`paceline.providers.schema`) and of what the operator
says of the accounts. It resolves any target: an unknown model or provider is never an error, only cautious.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, lru_cache
from importlib import resources
from typing import NamedTuple
from urllib.parse import quote, unquote

import msgspec
import yaml

from paceline.engine.accounting import WEIGHT_ONE, Prices, Profile, Rule
from paceline.engine.dimensions import Dimension, Limit
from paceline.engine.operations import NO_PRICES, DefinePool
from paceline.providers.headers import FAMILIES
from paceline.providers.patterns import Patterns, bare_model
from paceline.providers.schema import CatalogueSpec, EndpointSpec, GroupSpec, ProviderSpec, TierSpec, merge

LimitsByDimension = Mapping[Dimension, tuple[Limit, ...]]
Path = tuple[str | int, ...]

OTHER = "other"
"""The pool that unknown models share once there are too many of them to have one each."""
UNKNOWN_PROVIDER = "unknown"
"""Stands for the provider in the names of pools, once there are too many unknown ones to name them."""

_MODEL = "model:"
_MAX_COUNTED_ACCOUNTS = 1024
_READABLE = 128


class Target(NamedTuple):
    """Where a call goes. Empty is "not said"."""

    provider: str = ""
    account: str = ""
    region: str = ""
    upstream_workspace: str = ""
    service_tier: str = ""
    endpoint: str = ""
    model: str = ""


class Resolved(msgspec.Struct, frozen=True):
    """What a target comes to. ``account`` is the name of its ledger.

    ``unknown``: the provider or the model is not in the catalogue. ``known_account``: the account is
    configured. ``priced``: ``prices`` are real; without it the call costs nothing in our books.
    """

    account: str
    provider: str
    pool: str
    definition: DefinePool
    prices: Prices
    priced: bool
    header_family: str
    unknown: bool
    known_account: bool


class PoolSetup(msgspec.Struct, frozen=True):
    """What the operator says of a pool: limits of some dimensions, and whether headers may change them."""

    limits: LimitsByDimension = {}
    learn: bool = True


class WorkspaceSetup(msgspec.Struct, frozen=True):
    """Limits that the provider puts on one of its own workspaces: for every pool, and for some."""

    limits: LimitsByDimension = {}
    pools: Mapping[str, PoolSetup] = {}
    cache_reads_count: bool = False


class AccountSetup(msgspec.Struct, frozen=True):
    """What the operator says of an account. ``pools`` is keyed by :func:`pool_key`."""

    provider: str
    tier: str = ""
    pools: Mapping[str, PoolSetup] = {}
    workspaces: Mapping[str, WorkspaceSetup] = {}


class Unknown(NamedTuple):
    """Something that the catalogue does not know. An empty model: there are too many to name."""

    account: str
    provider: str
    model: str
    pool: str


class _Provider:
    """A provider's data, made ready for look-ups."""

    def __init__(self, spec: ProviderSpec) -> None:
        self.spec = spec
        self.prefix = re.compile(spec.model_prefix, re.IGNORECASE) if spec.model_prefix else None
        self.groups = Patterns(
            (model.lower(), (key, group)) for key, group in spec.groups.items() for model in group.models
        )
        self.prices = Patterns((model.lower(), price.prices()) for price in spec.prices for model in price.models)
        self.endpoints: dict[str, EndpointSpec] = {}
        for key, endpoint in spec.endpoints.items():
            for alias in (key, *endpoint.names):
                self.endpoints[alias.lower().strip("/")] = endpoint
        self.pools = {endpoint.pool: endpoint for endpoint in spec.endpoints.values() if endpoint.pool}
        self.tiers = {key: _tier_limits(spec, tier) for key, tier in spec.tiers.items()}
        self.reserved = {*spec.groups, *self.pools, OTHER}

    def group_of(self, base: str) -> str:
        """The group that a pool belongs to, given the first part of its key; empty if to none."""
        if base in self.spec.groups:
            return base
        if base in self.pools or base == OTHER:
            return ""
        found = self.groups.match(unquote(base).removeprefix(_MODEL))
        return "" if found is None else found[0]


class Catalogue:
    """The providers, profiles and prices, with the accounts as the operator set them up.

    ``resolve`` is on the path of every call: answers are kept for the ``cache_size`` targets used last. Pools
    whose names come from callers (unknown models, regions) are bounded: ``max_open_pools`` for each account,
    after which they share the pool ``other``. ``on_unknown`` hears once of each unknown model.
    ``initial_fill``: how full new pools start, in thousandths.
    """

    def __init__(
        self,
        spec: CatalogueSpec | None = None,
        accounts: Mapping[str, AccountSetup] | None = None,
        *,
        default_provider: str = "anthropic",
        default_account: str = "default",
        initial_fill: int = 1_000,
        max_open_pools: int = 256,
        cache_size: int = 4096,
        on_unknown: Callable[[Unknown], None] | None = None,
    ) -> None:
        self.spec = packaged() if spec is None else spec
        self.accounts: Mapping[str, AccountSetup] = {} if accounts is None else accounts
        self._default_provider = default_provider
        self._default_account = default_account
        self._initial_fill = initial_fill
        self._max_open_pools = max_open_pools
        self._on_unknown = on_unknown
        self._providers = {name: _Provider(spec) for name, spec in self.spec.providers.items()}
        self._unlisted = _Provider(ProviderSpec())
        self._profiles = {name: profile.profile(name) for name, profile in self.spec.profiles.items()}
        cautious = self.spec.cautious_limits
        self._cautious: LimitsByDimension = {} if cautious is None else cautious.limits()
        self._open_pools: dict[str, set[str]] = {}
        self._reported: dict[str, set[str]] = {}
        self.resolve: Callable[[Target], Resolved] = lru_cache(maxsize=cache_size)(self._resolve)
        """The pool, counting and prices of a target. Never fails."""

    def account_of(self, target: Target) -> str:
        """The account of a target: named, else the only configured one of its provider, else the default."""
        return target.account or self._account_for(target.provider.lower() or self._default_provider)

    def pools(self, account: str) -> list[DefinePool]:
        """The pools that the configuration names for an account: those with limits, and its tier's."""
        setup, provider = self._configured(account)
        keys = dict.fromkeys((*setup.pools, *provider.tiers.get(setup.tier, {})))
        places = [(key, "") for key in keys]
        places += [(key, name) for name, workspace in setup.workspaces.items() for key in workspace.pools]
        return [
            self._define(provider, self.pool_name(account, key, name), setup, key, name)
            for key, name in places
            if not _is_each(provider, key)
        ]

    def pool_name(self, account: str, key: str, workspace: str = "") -> str:
        """The full name of a configured account's pool."""
        return _full_name(self.accounts[account].provider, account, key, workspace)

    def profile_of(self, provider: str, base: str) -> Profile | None:
        """The profile under which a pool counts, by the first part of its key; ``None`` if there is none."""
        known = self._providers.get(provider)
        if known is None:
            return None
        group = known.group_of(base)
        return self._profile(known, base, group) if group or base in known.pools or base == OTHER else None

    def spend_cap(self, account: str) -> int | None:
        """The monthly spend cap of the account's tier, in nano-dollars."""
        setup, provider = self._configured(account)
        tier = provider.spec.tiers.get(setup.tier)
        return None if tier is None else tier.monthly_spend_cap

    def knows(self, target: Target) -> bool:
        """Whether the provider and the model of a target are in the catalogue. Changes nothing."""
        provider = self._providers.get(self._provider_name(target))
        return provider is not None and (
            bool(_endpoint(provider, target.endpoint).pool)
            or provider.groups.match(bare_model(target.model, provider.prefix)) is not None
        )

    def _configured(self, account: str) -> tuple[AccountSetup, _Provider]:
        setup = self.accounts.get(account) or AccountSetup(self._default_provider)
        return setup, self._providers.get(setup.provider, self._unlisted)

    def _provider_name(self, target: Target) -> str:
        if target.provider:
            return target.provider.lower()
        setup = self.accounts.get(target.account)
        return self._default_provider if setup is None else setup.provider

    def _account_for(self, provider: str) -> str:
        own = [name for name, setup in self.accounts.items() if setup.provider == provider]
        return own[0] if len(own) == 1 and self._default_account not in own else self._default_account

    def _resolve(self, target: Target) -> Resolved:
        provider_name = self._provider_name(target)
        account = target.account or self._account_for(provider_name)
        setup = self.accounts.get(account)
        mine = setup if setup is not None and setup.provider == provider_name else AccountSetup(provider_name)
        known = self._providers.get(provider_name)
        provider = self._unlisted if known is None else known

        model = bare_model(target.model, provider.prefix)
        endpoint = _endpoint(provider, target.endpoint)
        group = provider.groups.match(model) if model else None
        open_ended = False
        unknown = known is None
        if endpoint.pool:
            base = endpoint.pool
        elif group is not None and not group[1].each:
            base = group[0]
        elif not model:
            base, unknown = OTHER, True
        else:
            base, open_ended, unknown = model, True, unknown or group is None
            if base in provider.reserved:
                base = f"{_MODEL}{base}"

        tier = target.service_tier.lower()
        service = provider.spec.service_tiers.get(tier)
        region = target.region.lower() if provider.spec.separate_regions else ""
        key = pool_key(base, region, tier if service is not None else "")
        workspace = target.upstream_workspace if target.upstream_workspace in mine.workspaces else ""
        pool = _full_name(provider_name, account, key, workspace)
        if (open_ended or region or known is None) and key not in mine.pools:
            shared = not self._admit(account, pool)
            if shared:
                key = OTHER
                pool = _full_name(provider_name if known else UNKNOWN_PROVIDER, account, OTHER, workspace)
            if unknown:
                self._report(Unknown(account, provider_name, "" if shared else model, pool))

        prices = provider.prices.match(model)
        percent = endpoint.price_percent if service is None else service.price_percent
        free = service is None and percent == 0
        return Resolved(
            account=account,
            provider=provider_name,
            pool=pool,
            definition=self._define(provider, pool, mine, key, workspace),
            prices=NO_PRICES if prices is None else _percent(prices, percent),
            priced=free or (prices is not None and percent > 0),
            header_family=(service.header_family if service is not None else None) or provider.spec.header_family,
            unknown=unknown,
            known_account=setup is not None,
        )

    def _admit(self, account: str, pool: str) -> bool:
        """Whether a pool that a caller named may exist by itself. Once it may, it always may."""
        named = self._open_pools.get(account)
        if named is None:
            if len(self._open_pools) >= _MAX_COUNTED_ACCOUNTS:
                return False
            named = self._open_pools[account] = set()
        if pool in named:
            return True
        if len(named) >= self._max_open_pools:
            return False
        named.add(pool)
        return True

    def _report(self, unknown: Unknown) -> None:
        if self._on_unknown is None:
            return
        if unknown.account not in self._reported and len(self._reported) >= _MAX_COUNTED_ACCOUNTS:
            return
        reported = self._reported.setdefault(unknown.account, set())
        what = unknown.pool if unknown.model else ""
        if what not in reported:
            reported.add(what)
            self._on_unknown(unknown)

    def _define(self, provider: _Provider, pool: str, setup: AccountSetup, key: str, workspace: str) -> DefinePool:
        base = key.partition(";")[0]
        group = provider.group_of(base)
        # A service tier's quota is not the one that usage tiers and other overrides speak of.
        apart = ";service_tier=" in key
        names = (key,) if apart else (key, base, group)
        tier = {} if apart else provider.tiers.get(setup.tier, {})
        override = _first(setup.pools, *names)
        upstream = setup.workspaces.get(workspace, WorkspaceSetup())
        own = _first(upstream.pools, *names)
        published = tier.get(base) or tier.get(group) or self._cautious
        overrides = {**override.limits, **upstream.limits, **own.limits}
        limits = {**published, **overrides}
        profile = self._profile(provider, base, group)
        if upstream.cache_reads_count:
            profile = _counting_cache_reads(profile)
        if Dimension.CONCURRENCY in overrides:
            profile = _counting_concurrency(profile)
        counted = {rule.dimension for rule in profile.rules}
        return DefinePool(
            pool=pool,
            profile=profile,
            limits=tuple(limit for dimension in sorted(limits) if dimension in counted for limit in limits[dimension]),
            learn=override.learn and own.learn,
            fill=self._initial_fill,
            guessed=published is self._cautious and not overrides,
        )

    def _profile(self, provider: _Provider, base: str, group: str) -> Profile:
        endpoint = provider.pools.get(base)
        if endpoint is not None:
            return self._profiles[endpoint.profile or provider.spec.profile]
        spec = provider.spec.groups.get(group)
        if spec is None:
            return self._profiles[provider.spec.profile]
        return _with_defaults(self._profiles[spec.profile or provider.spec.profile], spec)


@cache
def packaged() -> CatalogueSpec:
    """The catalogue that comes with this package."""
    spec = CatalogueSpec()
    folder = resources.files("paceline.providers") / "data"
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            spec = merge(spec, CatalogueSpec.model_validate(yaml.safe_load(file.read_text("utf-8"))))
    return spec


def pool_key(base: str, region: str = "", service_tier: str = "") -> str:
    """A pool's name inside its account: group, endpoint pool or model, and what else sets its quota apart."""
    key = _part(base)
    if region:
        key += f";region={_part(region)}"
    if service_tier:
        key += f";service_tier={_part(service_tier)}"
    return key


def endpoint_pools(spec: ProviderSpec) -> set[str]:
    """The pools of a provider that belong to an endpoint and not to a group of models."""
    return {endpoint.pool for endpoint in spec.endpoints.values() if endpoint.pool}


def problems(spec: CatalogueSpec, merged: CatalogueSpec) -> Iterator[tuple[Path, str]]:
    """What is wrong with a catalogue file, given the whole it is merged into: where, and what; remedy."""
    if spec.cautious_limits is not None:
        yield from _under(("cautious_limits",), spec.cautious_limits.problems())
    for name, provider in spec.providers.items():
        yield from _under(("providers", name), _provider_problems(provider, merged.providers[name], merged))


def _provider_problems(spec: ProviderSpec, whole: ProviderSpec, merged: CatalogueSpec) -> Iterator[tuple[Path, str]]:
    profiles: list[tuple[Path, str | None]] = [(("profile",), spec.profile)]
    families: list[tuple[Path, str | None]] = [(("header_family",), spec.header_family)]
    profiles += [(("endpoints", name, "profile"), each.profile) for name, each in spec.endpoints.items()]
    profiles += [(("groups", name, "profile"), each.profile) for name, each in spec.groups.items()]
    families += [
        (("service_tiers", name, "header_family"), each.header_family) for name, each in spec.service_tiers.items()
    ]
    for path, profile in profiles:
        if profile is not None and profile not in merged.profiles:
            yield path, f"no profile is called {profile!r}; known: {', '.join(sorted(merged.profiles))}"
    for path, family in families:
        if family is not None and family not in FAMILIES:
            yield path, f"no header family is called {family!r}; known: {', '.join(sorted(FAMILIES))}"

    pools = endpoint_pools(whole)
    for name, endpoint in spec.endpoints.items():
        if endpoint.pool == OTHER or endpoint.pool in whole.groups:
            where: Path = ("endpoints", name, "pool")
            yield where, f"{endpoint.pool!r} is the name of another pool; choose a different one"
    owners: dict[str, str] = {}
    for name, group in spec.groups.items():
        if name == OTHER or name in pools:
            yield ("groups", name), "is the name of another pool; choose a different one"
        if not group.models:
            yield ("groups", name, "models"), "names no model; give at least one"
        for index, model in enumerate(group.models):
            if owners.setdefault(model.lower(), name) != name:
                other = owners[model.lower()]
                yield (
                    ("groups", name, "models", index),
                    f"{model!r} is in group {other!r} as well; keep it in one",
                )
    for name, tier in spec.tiers.items():
        for index, entry in enumerate(tier.limits):
            here: Path = ("tiers", name, "limits", index)
            yield from _under(here, entry.problems())
            for position, group_name in enumerate(entry.groups):
                if group_name != "*" and group_name not in whole.groups and group_name not in pools:
                    known = ", ".join(sorted({*whole.groups, *pools}))
                    yield (
                        (*here, "groups", position),
                        f"no group or endpoint pool is called {group_name!r}; known: {known}",
                    )


def _is_each(provider: _Provider, key: str) -> bool:
    """Whether this names a group whose models have a pool each, so that it is no pool itself."""
    group = provider.spec.groups.get(key.partition(";")[0])
    return group is not None and group.each


def _first(setups: Mapping[str, PoolSetup], *keys: str) -> PoolSetup:
    return next((setups[key] for key in keys if key in setups), PoolSetup())


def _under(path: Path, found: Iterable[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
    return (((*path, *below), message) for below, message in found)


def _tier_limits(spec: ProviderSpec, tier: TierSpec) -> dict[str, LimitsByDimension]:
    named: dict[str, LimitsByDimension] = {}
    everywhere: LimitsByDimension | None = None
    for entry in tier.limits:
        for name in entry.groups:
            if name == "*":
                everywhere = entry.limits()
            else:
                named[name] = entry.limits()
    if everywhere is None:
        return named
    return dict.fromkeys(spec.groups, everywhere) | named


def _endpoint(provider: _Provider, name: str) -> EndpointSpec:
    # An endpoint that is not listed counts against the model's group: rather too much than not at all.
    return provider.endpoints.get(name.lower().strip("/"), _PLAIN_ENDPOINT)


_PLAIN_ENDPOINT = EndpointSpec()


def _full_name(provider: str, account: str, key: str, workspace: str) -> str:
    name = f"{_part(provider)}/{_part(account)}/{key}"
    return f"{name}@{_part(workspace)}" if workspace else name


def _part(text: str) -> str:
    """A part of a pool's name: readable, never taken for several. Very long ones end in a digest."""
    quoted = quote(text, safe=":+~")
    if len(quoted) <= _READABLE:
        return quoted
    return f"{quoted[:_READABLE]}~{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _percent(prices: Prices, percent: int) -> Prices:
    if percent == 100:
        return prices
    return Prices(
        input_tokens=prices.input_tokens * percent // 100,
        cache_read_tokens=prices.cache_read_tokens * percent // 100,
        cache_write_tokens=prices.cache_write_tokens * percent // 100,
        output_tokens=prices.output_tokens * percent // 100,
    )


def _with_defaults(profile: Profile, group: GroupSpec) -> Profile:
    given = {
        "default_input_tokens": group.default_input_tokens,
        "default_output_tokens": group.default_output_tokens,
        "max_output_tokens": group.max_output_tokens,
    }
    given = {field: value for field, value in given.items() if value is not None}
    return msgspec.structs.replace(profile, **given) if given else profile


def _counting_cache_reads(profile: Profile) -> Profile:
    rules = tuple(
        msgspec.structs.replace(rule, hold_cached=rule.hold_input, settle_cache_read=rule.settle_input)
        if rule.dimension is Dimension.INPUT_TOKENS
        else rule
        for rule in profile.rules
    )
    return msgspec.structs.replace(profile, rules=rules)


def _counting_concurrency(profile: Profile) -> Profile:
    if any(rule.dimension is Dimension.CONCURRENCY for rule in profile.rules):
        return profile
    return msgspec.structs.replace(
        profile, rules=(*profile.rules, Rule(Dimension.CONCURRENCY, hold_requests=WEIGHT_ONE))
    )
