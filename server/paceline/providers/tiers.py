"""What the catalogue's usage tiers say of a pool, what its models cost there, and how limits in force compare.

A pool is named as :class:`~paceline.providers.catalogue.Catalogue` names it. Tiers whose names are a number behind the
same stem (``classic-1``, ``classic-2``), and those with plain names (``start``, ``build``), belong together as a
family: an account moves within one. Tiers are in the order of the catalogue, in each family from small to large.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote

import msgspec

from paceline.engine.accounting import Prices
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.providers.catalogue import AccountSetup
from paceline.providers.patterns import Patterns
from paceline.providers.schema import CatalogueSpec, ProviderSpec, TierSpec

Amounts = Mapping[tuple[Dimension, Window], int]
"""Limits by dimension and window."""

_KEPT = 2_048
"""Pools; about 5 kB each."""
_NUMBERED = re.compile(r"(.+)-[0-9]+")


class Place(NamedTuple):
    """The parts of a pool's name. ``base`` is the group, the endpoint's pool or the model."""

    provider: str
    account: str
    base: str
    apart: bool
    """It has a quota of its own, of which the usage tiers do not speak."""


class Match(msgspec.Struct, frozen=True):
    """Where limits stand among tiers. ``at_least``: the largest tier of which no limit is above them; ``at_most``: the
    smallest of which none is below; both empty if some are ``equal``."""

    equal: tuple[str, ...] = ()
    at_least: str = ""
    at_most: str = ""


@lru_cache(maxsize=_KEPT)
def place_of(pool: str) -> Place:
    """Take a pool's name apart."""
    provider, _, rest = pool.partition("/")
    account, _, key = rest.partition("/")
    base, *others = key.partition("@")[0].split(";")
    apart = any(other.startswith("service_tier=") for other in others)
    return Place(unquote(provider), unquote(account), unquote(base).removeprefix("model:"), apart)


def family_of(tier: str) -> str:
    """The stem of a tier's name; empty: it has a plain one."""
    found = _NUMBERED.fullmatch(tier)
    return "" if found is None else found[1]


class _Provider:
    def __init__(self, spec: ProviderSpec) -> None:
        self.spec = spec
        self.groups = Patterns((model.lower(), name) for name, group in spec.groups.items() for model in group.models)
        self.prices = Patterns((model.lower(), price.prices()) for price in spec.prices for model in price.models)

    def group_of(self, base: str) -> str:
        """The group of a pool; empty if it has none."""
        return base if base in self.spec.groups else self.groups.match(base) or ""


class Tiers:
    """Look-ups in one catalogue. What is asked of every pool each time that somebody watches is kept for ``_KEPT``."""

    def __init__(self, spec: CatalogueSpec, accounts: Mapping[str, AccountSetup]) -> None:
        self._providers = {name: _Provider(provider) for name, provider in spec.providers.items()}
        self._accounts = accounts
        self.of: Callable[[str], dict[str, Amounts]] = lru_cache(maxsize=_KEPT)(self._of)
        """What each tier of the provider says of a pool, in the order of the catalogue; none that says nothing."""
        self.configured: Callable[[str], str] = lru_cache(maxsize=_KEPT)(self._configured)
        """The tier that the configuration names for the account of a pool; empty: none."""
        self.prices: Callable[[str], tuple[Prices, ...]] = lru_cache(maxsize=_KEPT)(self._prices)
        """The prices of the models of a pool, each once; empty: not known."""
        self.is_set: Callable[[str, Dimension], bool] = lru_cache(maxsize=4 * _KEPT)(self._is_set)
        """Whether the configuration of the account itself limits this dimension of a pool."""

    def _configured(self, pool: str) -> str:
        place = place_of(pool)
        setup = self._accounts.get(place.account)
        return setup.tier if setup is not None and setup.provider == place.provider else ""

    def _is_set(self, pool: str, dimension: Dimension) -> bool:
        place = place_of(pool)
        setup = self._accounts.get(place.account)
        if setup is None or setup.provider != place.provider:
            return False
        provider = self._providers.get(place.provider)
        key = pool.split("/", 2)[-1].partition("@")[0]
        names = {key, key.partition(";")[0], "" if provider is None else provider.group_of(place.base)}
        if any(dimension in setup.pools[name].limits for name in names & setup.pools.keys()):
            return True
        workspace = setup.workspaces.get(unquote(pool.rpartition("@")[2])) if "@" in pool else None
        return workspace is not None and (
            dimension in workspace.limits
            or any(dimension in workspace.pools[name].limits for name in names & workspace.pools.keys())
        )

    def _of(self, pool: str) -> dict[str, Amounts]:
        place = place_of(pool)
        provider = self._providers.get(place.provider)
        if provider is None or place.apart:
            return {}
        found = {}
        for name, tier in provider.spec.tiers.items():
            amounts = _amounts(tier, place.base, provider.group_of(place.base))
            if amounts:
                found[name] = amounts
        return found

    def spend_cap(self, pool: str, tier: str) -> int | None:
        """The monthly spend cap of a tier, in nano-dollars."""
        provider = self._providers.get(place_of(pool).provider)
        found = None if provider is None else provider.spec.tiers.get(tier)
        return None if found is None else found.monthly_spend_cap

    def _prices(self, pool: str) -> tuple[Prices, ...]:
        place = place_of(pool)
        provider = self._providers.get(place.provider)
        if provider is None or place.apart:
            return ()
        group = provider.spec.groups.get(place.base)
        models = [place.base] if group is None or group.each else [model.lower() for model in group.models]
        found = [provider.prices.match(model) for model in models]
        return () if None in found else tuple(dict.fromkeys(prices for prices in found if prices is not None))

    def match(self, pool: str, actual: Amounts) -> Match:
        """Where the limits in force stand. Of several families, the configured tier's counts, else the newest."""
        tiers = self.of(pool)
        if not actual or not tiers:
            return Match()
        compared = {name: _compare(amounts, actual) for name, amounts in tiers.items()}
        equal = tuple(name for name, found in compared.items() if found == (True, True))
        if equal:
            return Match(equal=equal)
        family = self.family(pool, actual)
        own = [name for name in tiers if family_of(name) == family]
        below = [name for name in own if compared[name][0]]
        above = [name for name in own if compared[name][1]]
        return Match(at_least=below[-1] if below else "", at_most=above[0] if above else "")

    def family(self, pool: str, actual: Amounts) -> str:
        """The family of an account: that of its configured tier, else of an equal one, else the newest."""
        tiers = self.of(pool)
        configured = self.configured(pool)
        if configured:
            return family_of(configured)
        equal = [name for name, amounts in tiers.items() if _compare(amounts, actual) == (True, True)]
        return family_of((equal or list(tiers) or [""])[-1])

    def next_above(self, pool: str, actual: Amounts, key: tuple[Dimension, Window]) -> tuple[str, Amounts] | None:
        """The smallest tier of the family that raises ``key`` and lowers no limit in force."""
        family = self.family(pool, actual)
        for name, amounts in self.of(pool).items():
            raises = key in amounts and amounts[key] > actual.get(key, 0)
            if family_of(name) == family and raises and _compare(amounts, actual)[1]:
                return name, amounts
        return None


def _amounts(tier: TierSpec, base: str, group: str) -> Amounts:
    """The limits of a tier for a pool: those named for it, else those for its group, else those for every group."""
    entries = {name: entry for entry in tier.limits for name in entry.groups}
    entry = entries.get(base) or entries.get(group) or (entries.get("*") if group else None)
    return {} if entry is None else dict(_flat(entry.limits().values()))


def _flat(limits: Iterable[tuple[Limit, ...]]) -> Iterator[tuple[tuple[Dimension, Window], int]]:
    for several in limits:
        for limit in several:
            yield (limit.dimension, limit.window), limit.amount


def _compare(tier: Amounts, actual: Amounts) -> tuple[bool, bool]:
    """Whether no limit of a tier is above those in force, and whether none is below. False for both: not comparable."""
    common = [key for key in tier if key in actual]
    if not common:
        return False, False
    return all(tier[key] <= actual[key] for key in common), all(tier[key] >= actual[key] for key in common)
