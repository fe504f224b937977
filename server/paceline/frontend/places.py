"""Where calls go: targets to pools, tenants to shares, pools to the headers that they answer with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from paceline.engine.accounting import Prices
from paceline.engine.operations import DefinePool
from paceline.frontend import wire
from paceline.frontend.auth import Caller
from paceline.frontend.errors import refused
from paceline.frontend.limits import MAX_CACHED_SHARES, MAX_CACHED_TARGETS, MAX_FALLBACK_POOLS
from paceline.providers import Resolved, Target
from paceline_client.stubs import v1 as pb

SharesOf = Callable[[str, str], tuple[str, ...]]
"""The shares of a tenant and a workspace, outermost first."""

_TARGET_FIELD = 2
_POOL_FIELD = 7
"""Of Grant."""


class Resolver(Protocol):
    """What is needed of :class:`paceline.providers.Catalogue`."""

    @property
    def resolve(self) -> Callable[[Target], Resolved]: ...


class Destination:
    """A target, resolved, with what the answers say of it already encoded."""

    __slots__ = (
        "account",
        "alone",
        "definition",
        "grant_pool",
        "grant_target",
        "pool",
        "priced",
        "prices",
        "target",
    )

    def __init__(self, resolved: Resolved, definition: DefinePool, target: pb.Target) -> None:
        filled = pb.Target()
        for name in ("region", "upstream_workspace", "service_tier", "endpoint", "model"):
            setattr(filled, name, getattr(target, name))
        filled.provider, filled.account = resolved.provider, resolved.account
        self.account = resolved.account
        self.pool = resolved.pool
        self.prices: Prices = resolved.prices
        self.priced = resolved.priced
        self.definition = definition
        self.target = filled
        self.alone: tuple[tuple[int, Destination], ...] = ((0, self),)
        """The choices of a Reserve that has only this candidate."""
        self.grant_target = wire.block(_TARGET_FIELD, filled.SerializeToString(deterministic=True))
        self.grant_pool = wire.text(_POOL_FIELD, resolved.pool)


class Places:
    """Look-ups that all requests share. Both caches are emptied when full, so that no caller can fill the memory."""

    def __init__(
        self,
        resolver: Resolver,
        shares_of: SharesOf,
        *,
        default_family: Callable[[str], str] | None = None,
        accept_unknown_accounts: bool = True,
    ) -> None:
        self._resolver = resolver
        self._shares_of = shares_of
        self._default_family = default_family
        self._accept_unknown = accept_unknown_accounts
        self.cached_targets: dict[bytes, Destination] = {}
        """By the encoded target."""
        self.cached_shares: dict[tuple[str, str, str], tuple[str, ...]] = {}
        """By identity, tenant and workspace: permission is part of it."""
        self._families: dict[str, str] = {}
        self._definitions: dict[str, DefinePool] = {}

    def destination(self, raw: bytes, target: pb.Target, path: str) -> Destination:
        """Resolve a target that is not cached. ``raw`` is its encoding. Raises :class:`Problem`."""
        resolved = self._resolver.resolve(
            Target(
                target.provider,
                target.account,
                target.region,
                target.upstream_workspace,
                target.service_tier,
                target.endpoint,
                target.model,
            )
        )
        if not resolved.known_account and not self._accept_unknown:
            raise refused(
                path + ".account", "is not configured here: name an account of this server, or leave it empty"
            )
        if len(self.cached_targets) >= MAX_CACHED_TARGETS:
            self.cached_targets.clear()
        if len(self._families) >= MAX_FALLBACK_POOLS:
            self._families.clear()
            self._definitions.clear()
        # The same object for equal definitions, so that identity tells whether a ledger has it.
        definition = self._definitions.get(resolved.pool)
        if definition is None or definition != resolved.definition:
            definition = self._definitions[resolved.pool] = resolved.definition
        found = self.cached_targets[raw] = Destination(resolved, definition, target)
        self._families[resolved.pool] = resolved.header_family
        return found

    def destinations(self, pool: str) -> Iterator[Destination]:
        """The targets of a pool that were asked for lately."""
        return (destination for destination in list(self.cached_targets.values()) if destination.pool == pool)

    def shares(self, caller: Caller, tenant: str, workspace: str) -> tuple[str, ...]:
        """The shares of a tenant and workspace that are not cached. Raises :class:`Problem`."""
        caller.check_tenant(tenant)
        caller.check_workspace(workspace)
        if len(self.cached_shares) >= MAX_CACHED_SHARES:
            self.cached_shares.clear()
        found = self.cached_shares[caller.identity, tenant, workspace] = self._shares_of(tenant, workspace)
        return found

    def family(self, pool: str) -> str:
        """The header family of a pool's answers."""
        family = self._families.get(pool)
        if family is None:
            family = "" if self._default_family is None else self._default_family(pool)
        return family
