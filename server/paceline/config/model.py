"""The configuration file's form. Every field has a default: an empty file is a working server.

Amounts are per minute unless said otherwise, money is in US dollars, durations are seconds or text like
``5m``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, StrictBool

from paceline.config.alerts import AlertsSpec
from paceline.config.audit import AuditSpec
from paceline.config.fields import (
    Label,
    LagDuration,
    LeaseDuration,
    ListenAddress,
    MetricsAddress,
    PeerAddress,
    Plain,
    ShortDuration,
    StoreUrl,
)
from paceline.config.limits import ServerLimits
from paceline.engine.dimensions import GAUGES, SECOND_US, UNLIMITED, Dimension, Window
from paceline.engine.terms import WHOLE
from paceline.engine.terms import Part as EnginePart
from paceline.providers.catalogue import Target, packaged
from paceline.providers.schema import CatalogueSpec, Count, Limits, Strict, Text, Usd, merge, usd

PriorityName = Literal["interactive", "standard", "batch"]
ModeName = Literal["enforce", "observe"]
Role = Literal["call", "teach", "admin"]
Cap = Annotated[
    int,
    BeforeValidator(
        lambda value: UNLIMITED if value == "unlimited" else usd(value), json_schema_input_type=float | str
    ),
]
"""US dollars a month, or ``unlimited``. Nano-dollars inside."""


class Defaults(Strict):
    """What is assumed of a call that does not say."""

    provider: Label = "anthropic"
    account: Label = "default"
    initial_fill: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How full a pool starts that nothing is known of yet, from 0 to 1."""


class PoolSpec(Limits):
    """Limits of a pool that replace its tier's, until response headers say otherwise."""

    learn: StrictBool = True
    """Let response headers change the limits."""


class WorkspaceSpec(Strict):
    """Limits that the provider puts on one of its own workspaces, in place of the account's."""

    limits: Limits = Limits()
    """For every pool."""
    pools: dict[str, PoolSpec] = Field(default_factory=dict)
    """For single pools."""
    cache_reads_count: StrictBool = False
    """The workspace's input token limit counts cache reads."""


class AccountSpec(Strict):
    """An account with a provider: the owner of a ledger."""

    provider: Label | None = None
    """The default provider if absent."""
    tier: str | None = None
    """The usage tier, as the catalogue names it."""
    monthly_spend_cap: Cap | None = None
    """The tier's if absent."""
    pools: dict[str, PoolSpec] = Field(default_factory=dict)
    """Keyed by group, endpoint pool or model; `;region=…` and `;service_tier=…` may follow."""
    upstream_workspaces: dict[Plain, WorkspaceSpec] = Field(default_factory=dict)


Part = Annotated[float, Field(ge=0.0, le=1.0)]


class RateParts(Strict):
    """Parts (0 to 1) of whatever the limits of a pool turn out to be, by the minute."""

    requests: Part | None = None
    input_tokens: Part | None = None
    output_tokens: Part | None = None
    tokens: Part | None = None
    """Input and output together, where a provider counts so."""

    def items(self) -> Iterator[tuple[str, float]]:
        """What is given, by the name of its field."""
        for name in type(self).model_fields:
            part: float | None = getattr(self, name)
            if part is not None:
                yield name, part

    def parts(self) -> tuple[EnginePart, ...]:
        """In the engine's words, in thousandths."""
        return tuple(_part(Dimension[name.upper()], part) for name, part in self.items())


class Parts(RateParts):
    """Parts (0 to 1) of whatever the limits of a pool turn out to be: by the minute, and of what is in flight."""

    concurrency: Part | None = None
    queued_requests: Part | None = None


def _part(dimension: Dimension, part: float) -> EnginePart:
    return EnginePart(dimension, Window.NONE if dimension in GAUGES else Window.MINUTE, round(part * WHOLE))


class ShareSpec(Strict):
    """A part of every pool: a team's, a tenant's."""

    weight: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 1
    """How much of what is contended this share gets, against its sisters."""
    cap: Limits = Limits()
    """The most that it may use, in each pool."""
    guarantee: Limits = Limits()
    """What it gets whenever it asks, in each pool."""
    cap_part: Parts = Parts()
    """The most that it may use, as parts (0 to 1) of the pool's own limits, whatever they turn out to be."""
    guarantee_part: RateParts = RateParts()
    """What it gets whenever it asks, as parts (0 to 1) of the pool's own limits."""
    monthly_spend_cap: Usd | None = None
    """US dollars, over all pools."""
    tenants: tuple[Plain, ...] = ()
    """Tenants whose calls count here; `*` stands for any characters."""
    shares: dict[Label, ShareSpec] = Field(default_factory=dict)
    """Shares of this share."""


class PrioritySpec(Strict):
    """What the calls of one priority get of each pool."""

    weight: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None
    """Of what is contended, against the other priorities. Usual: interactive 64, standard 8, batch 1."""
    minimum: Annotated[float, Field(ge=0.0, le=0.5)] | None = None
    """Part of every limit that they get whenever they ask. Usual: standard and batch 0.05."""


class CandidateSpec(Strict):
    """One acceptable way to serve a call, or all those of another ladder."""

    ladder: Label | None = None
    """Take the candidates of this ladder; nothing else may stand beside it."""
    provider: Plain = ""
    account: Plain = ""
    region: Plain = ""
    upstream_workspace: Plain = ""
    service_tier: Plain = ""
    endpoint: Plain = ""
    model: Plain = ""
    min_output_tokens: Count | None = None
    """With less room for output than this, the candidate is no use."""
    max_output_tokens: Count | None = None
    """The most output to ask for."""

    @property
    def target(self) -> Target:
        """Where this candidate goes."""
        return Target(
            self.provider,
            self.account,
            self.region,
            self.upstream_workspace,
            self.service_tier,
            self.endpoint,
            self.model,
        )


class LadderRule(Strict):
    """What a ladder's name means to a tenant, to a priority, or to a tenant's calls of a priority. The most specific
    rule wins, the tenant before the priority."""

    ladder: Label
    """The name that callers give."""
    tenant: Plain = ""
    priority: PriorityName | None = None
    use: Label
    """The ladder that it stands for."""


class ModeRule(Strict):
    """The mode of a tenant, of a pool, or of a tenant in a pool. The most specific rule wins."""

    tenant: Plain = ""
    pool: str = ""
    """`ACCOUNT/POOL`, with the pool as in the account's `pools`."""
    mode: ModeName


class ModesSpec(Strict):
    """Where decisions bind, and where they are only recorded."""

    default: ModeName = "enforce"
    rules: tuple[ModeRule, ...] = ()


class IdentitySpec(Strict):
    """A caller: how it proves who it is, and what it may do. No tokens in this file."""

    name: Label
    token_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the token, in hexadecimal."""
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)] | None = None
    """An environment variable that holds the token."""
    token_file: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """A file that holds the token."""
    roles: tuple[Role, ...] = ("call", "teach")
    """`call`: reserve and commit; `teach`: its response headers are believed; `admin`: administration."""
    tenants: tuple[Text, ...] = ()
    """Tenants that it may call for; `*` stands for any characters, and alone for every tenant."""
    workspaces: tuple[str, ...] = ("*",)
    """Shares that it may name as its workspace; `*` for all."""


class CatalogueExtension(CatalogueSpec):
    """What is added to the catalogue, or replaced in it."""

    files: tuple[str, ...] = ()
    """Catalogue files, relative to this file, laid over one another in order; what stands here comes last."""


class Config(Strict):
    """The configuration of a Paceline server."""

    listen: ListenAddress = "127.0.0.1:7133"
    """Where callers connect: `HOST:PORT` or `unix:PATH`. Environment: `PACELINE_LISTEN`."""
    store: StoreUrl = "embedded:"
    """Where journals are kept: `embedded:PATH`, or `embedded:` to keep nothing; `redis://HOST:PORT/DB` and its kin for
    several servers. Environment: `PACELINE_STORE`."""
    store_file: Annotated[str, Field(max_length=4096)] = ""
    """A file that holds the store's URL, in place of `store`, so that its password stands elsewhere. Environment:
    `PACELINE_STORE_FILE`."""
    metrics_listen: MetricsAddress = "off"
    """Where metrics are read: `HOST:PORT` or `off`. Environment: `PACELINE_METRICS_LISTEN`."""
    node: Label | Literal[""] = ""
    """This server's name among those that share a store; each needs its own. If empty: the machine's, with a random
    part. Environment: `PACELINE_NODE`."""
    peer_listen: ListenAddress = "127.0.0.1:0"
    """Where the other servers of a store connect: `HOST:PORT`. Environment: `PACELINE_PEER_LISTEN`."""
    peer_advertise: PeerAddress = ""
    """The address that they are told: `HOST` or `HOST:PORT`. If empty: that of `peer_listen`, or the machine's name
    where that is a wildcard. Environment: `PACELINE_PEER_ADVERTISE`."""
    lease_us: LeaseDuration = Field(default=3 * SECOND_US, alias="lease")
    """How long a server that has died, or is cut off, keeps its ledgers: 1 to 30 s. All servers of a store need the
    same."""
    away_us: ShortDuration = Field(default=5 * SECOND_US, alias="away")
    """How long calls wait for a ledger whose owner has gone, before they are told that it is away."""
    replication_lag_us: LagDuration = Field(default=1 * SECOND_US, alias="replication_lag")
    """How far a store's replica that becomes the primary may be behind, and how long the primary before it may have
    gone on. So much longer does a new owner wait after the store's failover."""
    log_format: Literal["text", "json"] = "text"
    """Environment: `PACELINE_LOG_FORMAT`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Environment: `PACELINE_LOG_LEVEL`."""
    defaults: Defaults = Defaults()
    accounts: dict[Label, AccountSpec] = Field(default_factory=dict)
    shares: dict[Label, ShareSpec] = Field(default_factory=dict)
    priorities: dict[PriorityName, PrioritySpec] = Field(default_factory=dict)
    ladders: dict[Label, tuple[CandidateSpec, ...]] = Field(default_factory=dict)
    """Named lists of candidates, best first."""
    ladder_rules: tuple[LadderRule, ...] = ()
    """Where the name of a ladder means another one."""
    modes: ModesSpec = ModesSpec()
    identities: tuple[IdentitySpec, ...] = ()
    catalogue: CatalogueExtension = CatalogueExtension()
    alerts: AlertsSpec = AlertsSpec()
    audit: AuditSpec = AuditSpec()
    limits: ServerLimits = ServerLimits()

    _catalogue_files: tuple[CatalogueSpec, ...] = PrivateAttr(default=())
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def catalogue_spec(self) -> CatalogueSpec:
        """The packaged catalogue with this configuration's files and entries laid over it."""
        spec = packaged()
        for extension in (*self._catalogue_files, self.catalogue):
            spec = merge(spec, extension)
        return spec

    @property
    def notes(self) -> tuple[str, ...]:
        """What is accepted but deserves a word, one line each. Filled by `load_config`."""
        return self._notes

    def walk_shares(self) -> Iterator[tuple[tuple[str, ...], tuple[ShareSpec, ...]]]:
        """Every share with its ancestors, outermost first: names and specifications. Parents come first."""
        stack: list[tuple[tuple[str, ...], tuple[ShareSpec, ...]]]
        stack = [((name,), (share,)) for name, share in reversed(self.shares.items())]
        while stack:
            names, shares = stack.pop()
            yield names, shares
            below = reversed(shares[-1].shares.items())
            stack += [((*names, name), (*shares, share)) for name, share in below]


_OVERRIDDEN = (
    "listen",
    "store",
    "store_file",
    "metrics_listen",
    "node",
    "peer_listen",
    "peer_advertise",
    "log_format",
    "log_level",
)
ENVIRONMENT = {f"PACELINE_{field.upper()}": field for field in _OVERRIDDEN}
"""Environment variables that override the file, with the fields they set."""
