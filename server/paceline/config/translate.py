"""From the configuration to what the other parts work with: catalogue, operations, paths of shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Final

from paceline.config.model import AccountSpec, CandidateSpec, Config, ModeName, PoolSpec, PriorityName
from paceline.engine.dimensions import UNLIMITED, Dimension, Limit, Window
from paceline.engine.operations import (
    CLASSES,
    Class,
    DefineClasses,
    DefineModes,
    DefineShare,
    DefineSpend,
    Mode,
    Operation,
    Priority,
)
from paceline.providers.catalogue import AccountSetup, Catalogue, PoolSetup, Unknown, WorkspaceSetup
from paceline.providers.patterns import Patterns

PRIORITIES: Final[Mapping[Priority, PriorityName]] = {
    Priority.INTERACTIVE: "interactive",
    Priority.STANDARD: "standard",
    Priority.BATCH: "batch",
}
MODES: Mapping[ModeName, Mode] = {"enforce": Mode.ENFORCE, "observe": Mode.OBSERVE}


def account_provider(config: Config, account: AccountSpec) -> str:
    """The provider of an account."""
    return account.provider or config.defaults.provider


def catalogue(config: Config, on_unknown: Callable[[Unknown], None] | None = None) -> Catalogue:
    """The catalogue under a configuration: its extensions, accounts, defaults and caps."""
    return Catalogue(
        config.catalogue_spec,
        {name: _account(config, account) for name, account in config.accounts.items()},
        default_provider=config.defaults.provider,
        default_account=config.defaults.account,
        initial_fill=round(config.defaults.initial_fill * 1_000),
        max_open_pools=config.limits.max_open_pools,
        cache_size=config.limits.target_cache,
        on_unknown=on_unknown,
    )


def definitions(config: Config, known: Catalogue, account: str) -> list[Operation]:
    """What the configuration defines in an account's ledger, in the order in which to apply it.

    Pools that are not configured come with the first call to them (``Resolved.definition``).
    """
    operations: list[Operation] = [DefineSpend(_spend_cap(config, known, account))]
    operations += known.pools(account)
    for names, shares in config.walk_shares():
        limits = shares[-1].cap.limits()
        caps = [limit for dimension in sorted(limits) for limit in limits[dimension]]
        if shares[-1].monthly_spend_cap is not None:
            caps.append(Limit(Dimension.SPEND, Window.MONTH, shares[-1].monthly_spend_cap))
        promised = shares[-1].guarantee.limits()
        guarantees = [each for dimension in sorted(promised) for each in promised[dimension]]
        by_minute = tuple(each for each in guarantees if each.window is Window.MINUTE)
        parts = shares[-1].cap_part.parts(), shares[-1].guarantee_part.parts()
        operations.append(DefineShare("/".join(names), tuple(caps), shares[-1].weight, by_minute, *parts))
    operations.append(DefineClasses(tuple(_classes(config))))
    operations.append(DefineModes(tuple(_modes(config, known, account))))
    return operations


def _classes(config: Config) -> Iterator[Class]:
    for usual in CLASSES:
        spec = config.priorities.get(PRIORITIES[usual.priority])
        if spec is not None:
            weight = usual.weight if spec.weight is None else spec.weight
            minimum = usual.minimum if spec.minimum is None else round(spec.minimum * 1_000)
            yield Class(usual.priority, weight, minimum)


def _modes(config: Config, known: Catalogue, account: str) -> Iterator[tuple[str, str, Mode]]:
    if MODES[config.modes.default] is not Mode.ENFORCE:
        yield "", "", MODES[config.modes.default]
    for rule in config.modes.rules:
        owner, _, key = rule.pool.partition("/")
        if not rule.pool:
            yield "", rule.tenant, MODES[rule.mode]
        elif owner == account:
            yield known.pool_name(owner, key), rule.tenant, MODES[rule.mode]


def expand_ladder(config: Config, name: str) -> tuple[CandidateSpec, ...]:
    """The candidates of a ladder, best first, with those of the ladders it includes.

    Raises ``KeyError`` for a name that is not defined, ``RecursionError`` for ladders that include each
    other; neither happens in a configuration that was checked.
    """
    return _expand(config, name, ())


def _expand(config: Config, name: str, above: tuple[str, ...]) -> tuple[CandidateSpec, ...]:
    if name in above:
        raise RecursionError(f"ladder {name!r} includes itself")
    found: list[CandidateSpec] = []
    for candidate in config.ladders[name]:
        if candidate.ladder is None:
            found.append(candidate)
        else:
            found += _expand(config, candidate.ladder, (*above, name))
        if len(found) > _MOST_CANDIDATES:
            break
    return tuple(found)


_MOST_CANDIDATES = 10_000


class Shares:
    """Where the calls of a tenant count. Answers are kept for the ``cache_size`` callers seen last."""

    def __init__(self, config: Config, cache_size: int = 4096) -> None:
        walked = list(config.walk_shares())
        self._paths = {"/".join(names): _path(names) for names, _ in walked}
        self._tenants = Patterns((tenant, _path(names)) for names, shares in walked for tenant in shares[-1].tenants)
        cached = lru_cache(maxsize=cache_size)(self._shares_of)
        self.shares_of: Callable[[str, str], tuple[str, ...]] = cached
        """The shares of a call by (tenant, workspace), outermost first; empty if it belongs to none.

        The share that lists the tenant decides; of a tenant that no share lists, the workspace is a share's
        path.
        """

    def _shares_of(self, tenant: str, workspace: str) -> tuple[str, ...]:
        found = self._tenants.match(tenant) if tenant else None
        return found or self._paths.get(workspace, ())


def _path(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("/".join(names[: depth + 1]) for depth in range(len(names)))


def _spend_cap(config: Config, known: Catalogue, account: str) -> int | None:
    spec = config.accounts.get(account)
    if spec is None or spec.monthly_spend_cap is None:
        return known.spend_cap(account)
    return None if spec.monthly_spend_cap >= UNLIMITED else spec.monthly_spend_cap


def _account(config: Config, spec: AccountSpec) -> AccountSetup:
    return AccountSetup(
        provider=account_provider(config, spec),
        tier=spec.tier or "",
        pools=_pools(spec.pools),
        workspaces={
            name: WorkspaceSetup(workspace.limits.limits(), _pools(workspace.pools), workspace.cache_reads_count)
            for name, workspace in spec.upstream_workspaces.items()
        },
    )


def _pools(specs: Mapping[str, PoolSpec]) -> dict[str, PoolSetup]:
    return {key: PoolSetup(spec.limits(), spec.learn) for key, spec in specs.items()}
