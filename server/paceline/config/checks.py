"""What single values cannot tell: references that lead nowhere, guarantees above caps, doubles."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

from paceline.config.model import AccountSpec, Config, PoolSpec, ShareSpec
from paceline.config.translate import account_provider, catalogue, expand_ladder
from paceline.config.wording import did_you_mean
from paceline.engine.dimensions import GAUGES, SECOND_US, Dimension, Window
from paceline.providers.catalogue import Catalogue, Path, endpoint_pools, pool_key
from paceline.providers.patterns import bare_model
from paceline.providers.schema import Limits, ProviderSpec

MAX_SHARE_DEPTH = 8
MAX_SHARES = 10_000
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
Problems = Iterator[tuple[Path, str]]

# A token must not be guessable, and this one is in every log of a misconfigured deployment.
_EMPTY_TOKEN = hashlib.sha256(b"").hexdigest()


def problems(config: Config) -> Problems:
    """What is wrong with a configuration whose catalogue is sound: where, and what with its remedy."""
    known = catalogue(config)
    providers = known.spec.providers
    if config.defaults.provider not in providers:
        yield ("defaults", "provider"), _no("provider", config.defaults.provider, providers)
    for name, account in config.accounts.items():
        yield from _under(("accounts", name), _account(account, account_provider(config, account), known))
    yield from _shares(config)
    yield from _ladders(config, known)
    yield from _ladder_rules(config)
    yield from _modes(config, known)
    yield from _identities(config)
    yield from _webhook(config)
    yield from _limits(config)


def notes(config: Config) -> Problems:
    """What is accepted, and yet may not do what its author hopes."""
    known = catalogue(config)
    if not config.store.startswith("embedded:"):
        yield from _fleet(config)
    yield from _webhook_notes(config)
    for name, account in config.accounts.items():
        provider = known.spec.providers[account_provider(config, account)]
        if account.tier is not None and not provider.tiers[account.tier].limits:
            yield ("accounts", name, "tier"), "publishes no limits; cautious ones hold until headers tell"
    for names, shares in config.walk_shares():
        path = share_path(names)
        for limits in shares[-1].guarantee.limits().values():
            if any(limit.window is not Window.MINUTE for limit in limits):
                yield (*path, "guarantee"), "has an effect by the minute only; say what it gets in a minute"
    for name, candidates in config.ladders.items():
        for index, candidate in enumerate(candidates):
            if candidate.ladder is None and not known.knows(candidate.target):
                where: Path = ("ladders", name, index, "model")
                yield where, f"{candidate.model!r} is not in the catalogue; it gets cautious limits, no price"


def _fleet(config: Config) -> Problems:
    if not config.peer_advertise and _is_local(config.peer_listen) and not _is_local(config.store):
        yield ("peer_listen",), "servers on other machines cannot connect to it; listen beyond this machine"
    if config.away_us < config.lease_us + SECOND_US:
        yield ("away",), "is shorter than lease and a second: calls fail when a server dies"


def _webhook(config: Config) -> Problems:
    hook = config.alerts.webhook
    if hook is not None and (hook.url is None) == (hook.url_env is None):
        yield ("alerts", "webhook"), "must have one of url, url_env; keep exactly one"


def _webhook_notes(config: Config) -> Problems:
    hook = config.alerts.webhook
    if hook is None:
        return
    if hook.secret_env is None:
        yield ("alerts", "webhook"), "is not signed: whoever knows the address can post there; give secret_env"
    if hook.url is not None and hook.url.startswith("http:") and urlsplit(hook.url).hostname not in _LOCAL:
        yield ("alerts", "webhook", "url"), "is not encrypted on its way; use https"


def _is_local(address: str) -> bool:
    """Whether only this machine can connect to an address or a store."""
    host = urlsplit(address if "://" in address else f"//{address}").netloc.rpartition("@")[2]
    return address.startswith("unix:") or all(urlsplit(f"//{each}").hostname in _LOCAL for each in host.split(","))


def share_path(names: tuple[str, ...]) -> Path:
    """Where a share stands in the file."""
    return tuple(step for name in names for step in ("shares", name))


def _account(account: AccountSpec, provider: str, known: Catalogue) -> Problems:
    spec = known.spec.providers.get(provider)
    if spec is None:
        yield ("provider",), _no("provider", provider, known.spec.providers)
        return
    if account.tier is not None and account.tier not in spec.tiers:
        remedy = did_you_mean(account.tier, spec.tiers)
        yield ("tier",), f"provider {provider!r} has no tier {account.tier!r}; {remedy}"
    for key, pool in account.pools.items():
        yield from _under(("pools", key), _pool(key, pool, provider, spec, known))
    profiles = (known.profile_of(provider, base) for base in (*spec.groups, *endpoint_pools(spec)))
    counted = {rule.dimension for profile in profiles if profile is not None for rule in profile.rules}
    counted.add(Dimension.CONCURRENCY)
    for name, workspace in account.upstream_workspaces.items():
        here: Path = ("upstream_workspaces", name)
        yield from _under((*here, "limits"), workspace.limits.problems())
        for field, dimension, _ in workspace.limits.items():
            if dimension not in counted:
                yield (*here, "limits", field), f"no pool of provider {provider!r} counts it; remove it"
        for key, pool in workspace.pools.items():
            yield from _under((*here, "pools", key), _pool(key, pool, provider, spec, known))
        if not workspace.pools and not any(True for _ in workspace.limits.items()):
            yield here, "has no limits, so that it means nothing; give limits or remove it"


def _pool(key: str, pool: PoolSpec, provider: str, spec: ProviderSpec, known: Catalogue) -> Problems:
    base = key.partition(";")[0]
    profile = known.profile_of(provider, base)
    if profile is None:
        pools = {*spec.groups, *endpoint_pools(spec)}
        yield (), f"provider {provider!r} has no pool {base!r}; {did_you_mean(base, pools)}"
        return
    fault = _pool_key_fault(key, spec)
    if fault is not None:
        yield (), fault
    yield from pool.problems()
    counted = {Dimension.CONCURRENCY, *(rule.dimension for rule in profile.rules)}
    for name, dimension, _ in pool.items():
        if dimension not in counted:
            fits = ", ".join(sorted(each.name.lower() for each in counted))
            yield (name,), f"is not counted here (profile {profile.name!r}); what counts: {fits}"


def _pool_key_fault(key: str, spec: ProviderSpec) -> str | None:
    base, *rest = key.split(";")
    parts = dict(part.partition("=")[::2] for part in rest)
    region, tier = parts.pop("region", ""), parts.pop("service_tier", "")
    if parts or pool_key(base, region, tier) != key:
        return "is not a pool's name; write NAME, NAME;region=REGION or NAME;service_tier=TIER"
    bare = bare_model(base, None)
    if key != key.lower() or (base not in {*spec.groups, *endpoint_pools(spec)} and bare != base):
        return f"is never matched; write {bare!r}, in lower case and without a version"
    if region and not spec.separate_regions:
        return "regions share one quota with this provider; leave the region out"
    if tier and tier not in spec.service_tiers:
        return f"service tier {tier!r} has no quota of its own; {did_you_mean(tier, spec.service_tiers)}"
    return None


def _shares(config: Config) -> Problems:
    tenants: dict[str, str] = {}
    promised: Counter[str] = Counter()
    for name, top in config.shares.items():
        for field, part in top.guarantee_part.items():
            promised[field] += round(part * 1_000)
            if part and promised[field] > 1_000:
                here = ("shares", name, "guarantee_part", field)
                yield here, f"makes the guarantees of all shares {promised[field] / 1_000:g} of the limit; lower it"
                break
    for count, (names, shares) in enumerate(config.walk_shares()):
        path, share = share_path(names), shares[-1]
        if count >= MAX_SHARES:
            yield path, f"is one share too many; {MAX_SHARES:,} are allowed"
            return
        if len(names) > MAX_SHARE_DEPTH:
            yield path, f"is nested too deeply; {MAX_SHARE_DEPTH} levels are allowed"
        yield from _under((*path, "cap"), share.cap.problems())
        yield from _under((*path, "guarantee"), share.guarantee.problems())
        yield from _guarantees(path, names, shares)
        yield from _parts(path, shares[-1])
        for index, tenant in enumerate(share.tenants):
            first = tenants.setdefault(tenant, "/".join(names))
            if first != "/".join(names) or tenant in share.tenants[:index]:
                yield (*path, "tenants", index), f"{tenant!r} is in share {first!r} already; keep it in one"


def _guarantees(path: Path, names: tuple[str, ...], shares: tuple[ShareSpec, ...]) -> Problems:
    for field, dimension, specs in shares[-1].guarantee.items():
        for spec in specs:
            window = spec.limit(dimension).window
            for name, above in zip(names, shares, strict=True):
                cap = _amount(above.cap, field, window)
                if cap is not None and spec.amount > cap:
                    here = (*path, "guarantee", field)
                    yield here, f"guarantees {spec.amount:,}, above the cap of {cap:,} of {name!r}; lower it"
                    break
    children = shares[-1].shares.values()
    for kind, limits in (("cap", shares[-1].cap), ("guarantee", shares[-1].guarantee)):
        for field, dimension, specs in limits.items():
            for spec in specs:
                window = spec.limit(dimension).window
                promised = sum(_amount(child.guarantee, field, window) or 0 for child in children)
                if promised > spec.amount:
                    here = (*path, kind, field)
                    yield here, f"is {spec.amount:,}, below the {promised:,} guaranteed inside; raise it"


def _parts(path: Path, share: ShareSpec) -> Problems:
    """Guarantees that are parts, within the same share and inside it."""
    for kind, limits, parts in (
        ("cap", share.cap, share.cap_part),
        ("guarantee", share.guarantee, share.guarantee_part),
    ):
        for field, _ in parts.items():
            if _amount(limits, field, _window(field)) is not None:
                yield (*path, f"{kind}_part", field), f"is in {kind} too, as an amount; keep one"
    caps = dict(share.cap_part.items())
    for field, part in share.guarantee_part.items():
        if part > caps.get(field, 1.0):
            yield (
                (*path, "guarantee_part", field),
                f"guarantees {part:g}, above the cap_part of {caps[field]:g}; lower it",
            )
    for kind, mine in (("cap_part", share.cap_part), ("guarantee_part", share.guarantee_part)):
        yield from _sums((*path, kind), dict(mine.items()), share.shares)


def _sums(path: Path, whole: dict[str, float], shares: dict[str, ShareSpec]) -> Problems:
    """Where the guarantees of ``shares``, as parts, sum above ``whole``."""
    for field, most in whole.items():
        promised = sum(
            part for share in shares.values() for name, part in share.guarantee_part.items() if name == field
        )
        if round(promised * 1_000) > round(most * 1_000):
            yield (*path, field), f"is {most:g}, below the {promised:g} guaranteed inside; raise it"


def _window(field: str) -> Window:
    return Window.NONE if Dimension[field.upper()] in GAUGES else Window.MINUTE


def _amount(limits: Limits, field: str, window: object) -> int | None:
    for name, dimension, specs in limits.items():
        if name == field:
            return next((spec.amount for spec in specs if spec.limit(dimension).window == window), None)
    return None


def _ladders(config: Config, known: Catalogue) -> Problems:
    for name, candidates in config.ladders.items():
        if not candidates:
            yield ("ladders", name), "has no candidates; give at least one"
        sound = True
        for index, candidate in enumerate(candidates):
            here: Path = ("ladders", name, index)
            if candidate.ladder is not None:
                if candidate.model_fields_set != {"ladder"}:
                    yield (*here, "ladder"), "stands for all of a candidate; remove what stands beside it"
                if candidate.ladder not in config.ladders:
                    yield (*here, "ladder"), _no("ladder", candidate.ladder, config.ladders)
                    sound = False
                continue
            if not candidate.model:
                yield (*here, "model"), "is missing; name the model"
            if candidate.account and candidate.account not in config.accounts:
                yield (*here, "account"), _no("account", candidate.account, config.accounts)
            if candidate.provider and candidate.provider not in known.spec.providers:
                yield (*here, "provider"), _no("provider", candidate.provider, known.spec.providers)
            account = config.accounts.get(candidate.account)
            if account is not None and candidate.provider not in ("", account_provider(config, account)):
                yield (*here, "provider"), "is not the provider of the account; remove one of the two"
            least, most = candidate.min_output_tokens, candidate.max_output_tokens
            if least is not None and most is not None and least > most:
                yield (*here, "min_output_tokens"), "is above max_output_tokens; lower it"
        if sound:
            try:
                expanded = expand_ladder(config, name)
            except RecursionError:
                yield ("ladders", name), "contains itself, a cycle of ladders; break it"
                continue
            except KeyError:
                continue  # reported where the name stands
            if len(expanded) > config.limits.max_candidates:
                allowed = config.limits.max_candidates
                yield (
                    ("ladders", name),
                    f"has {len(expanded)} candidates, limits.max_candidates is {allowed}; shorten it",
                )


def _ladder_rules(config: Config) -> Problems:
    seen: set[tuple[str, str, str | None]] = set()
    for index, rule in enumerate(config.ladder_rules):
        here: Path = ("ladder_rules", index)
        for field, name in (("ladder", rule.ladder), ("use", rule.use)):
            if name not in config.ladders:
                yield (*here, field), _no("ladder", name, config.ladders)
        if not rule.tenant and rule.priority is None:
            yield here, "names neither tenant nor priority; name one, or change the ladder itself"
        if rule.use == rule.ladder:
            yield (*here, "use"), "is the ladder itself; name another one, or remove the rule"
        address = (rule.ladder, rule.tenant, rule.priority)
        if address in seen:
            yield here, "has the same ladder, tenant and priority as a rule above; keep one"
        seen.add(address)


def _modes(config: Config, known: Catalogue) -> Problems:
    seen: set[tuple[str, str]] = set()
    for index, rule in enumerate(config.modes.rules):
        here: Path = ("modes", "rules", index)
        if not rule.tenant and not rule.pool:
            yield here, "names neither tenant nor pool; name one, or use modes.default"
        if (rule.tenant, rule.pool) in seen:
            yield here, "has the same tenant and pool as a rule above; keep one"
        seen.add((rule.tenant, rule.pool))
        if rule.pool:
            account, slash, key = rule.pool.partition("/")
            if not slash:
                yield (*here, "pool"), "is not a pool; write ACCOUNT/POOL"
            elif account not in config.accounts:
                yield (*here, "pool"), _no("account", account, config.accounts)
            else:
                provider = account_provider(config, config.accounts[account])
                spec = known.spec.providers.get(provider)
                if spec is not None:
                    yield from _under((*here, "pool"), _pool(key, PoolSpec(), provider, spec, known))


def _identities(config: Config) -> Problems:
    shares = {"/".join(names) for names, _ in config.walk_shares()}
    names: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for index, identity in enumerate(config.identities):
        here: Path = ("identities", index)
        if names.setdefault(identity.name, index) != index:
            yield (*here, "name"), f"{identity.name!r} stands twice; rename one of the two"
        given = {"sha256": identity.token_sha256, "env": identity.token_env, "file": identity.token_file}
        stated = [(kind, value) for kind, value in given.items() if value is not None]
        if len(stated) != 1:
            yield here, "must have one of token_sha256, token_env, token_file; keep exactly one"
        for kind, value in stated:
            if tokens.setdefault(f"{kind}:{value}", index) != index:
                other = config.identities[tokens[f"{kind}:{value}"]].name
                yield (*here, f"token_{kind}"), f"is the token of {other!r} as well; give each its own"
        if identity.token_sha256 == _EMPTY_TOKEN:
            yield (*here, "token_sha256"), "is the hash of an empty token; hash a real one"
        for role, times in Counter(identity.roles).items():
            if times > 1:
                yield (*here, "roles"), f"names {role!r} twice; keep one"
        if not identity.roles:
            yield (*here, "roles"), "is empty, so that it may do nothing; give a role or remove the identity"
        elif set(identity.roles) & {"call", "teach"} and not identity.tenants:
            yield (*here, "tenants"), 'is missing, so that it may call for nobody; list tenants, or "*"'
        for position, workspace in enumerate(identity.workspaces):
            if workspace != "*" and workspace not in shares:
                yield (*here, "workspaces", position), _no("share", workspace, shares)


def _limits(config: Config) -> Problems:
    limits = config.limits
    if limits.default_hold_us > limits.max_hold_us:
        yield ("limits", "default_hold"), "is longer than max_hold; shorten it"
    if limits.max_queue_per_tenant > limits.max_queue:
        yield ("limits", "max_queue_per_tenant"), "is above max_queue; lower it"
    if limits.max_open_pools > limits.max_pools:
        yield ("limits", "max_open_pools"), "is above max_pools; lower it"


def _no(kind: str, name: str, known: object) -> str:
    choices = list(known) if isinstance(known, dict | set | list) else []
    return f"no {kind} is called {name!r}; {did_you_mean(name, choices)}"


def _under(path: Path, found: Problems) -> Problems:
    return (((*path, *below), message) for below, message in found)
