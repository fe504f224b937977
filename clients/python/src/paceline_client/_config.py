"""The options of a client, from arguments and from the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from paceline_client._model import Mode, Policy, Priority

DEFAULT_ADDRESS: Final = "127.0.0.1:7133"
DEFAULT_BUDGET: Final = 0.25
"""For how long a call waits for a coordinator that does not answer, beyond its own ``max_wait``. Unit: seconds."""
DEFAULT_LOCAL_SCALE: Final = 0.8
"""The part of a fallback share that is used: the bursts of several processes may coincide."""

Transport = Literal["session", "unary"]
_TRUE: Final = frozenset({"1", "true", "yes", "on"})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What makes connections differ: processes have one session for each of these."""

    address: str
    """Of one server, or of several, divided by commas."""
    tls: bool
    transport: Transport
    budget: float
    local_scale: float
    token: str = field(default="", repr=False)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @property
    def addresses(self) -> tuple[str, ...]:
        """One at least."""
        return tuple(self.address.split(","))


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that a client was told, with the environment filled in."""

    endpoint: Endpoint
    disabled: bool
    mode: Mode
    policy: Policy
    tenant: str
    workspace: str
    priority: Priority | None
    route: str


def options(
    *,
    address: str | None,
    token: str | None,
    policy: Policy | None,
    disabled: bool | None,
    mode: Mode | None,
    transport: Transport,
    budget: float,
    local_scale: float,
    tenant: str,
    workspace: str,
    priority: Priority | None,
    route: str,
    ca_file: str | None,
    cert_file: str | None,
    key_file: str | None,
) -> Options:
    """Fill in the environment, and check."""
    environ = os.environ
    where = address or environ.get("PACELINE_ADDRESS") or DEFAULT_ADDRESS
    ca_file = ca_file or environ.get("PACELINE_CA_FILE", "")
    cert_file = cert_file or environ.get("PACELINE_CERT_FILE", "")
    key_file = key_file or environ.get("PACELINE_KEY_FILE", "")
    where, secure = _addresses(where)
    tls = bool(ca_file or cert_file or secure)
    if bool(cert_file) != bool(key_file):
        raise ValueError("a client certificate needs both cert_file and key_file")
    wanted = policy or environ.get("PACELINE_POLICY") or "local"
    chosen = next((each for each in get_args(Policy) if each == wanted), None)
    if chosen is None:
        raise ValueError(f"policy (or PACELINE_POLICY) must be one of local, open, closed, not {wanted!r}")
    how = mode or environ.get("PACELINE_MODE") or "enforce"
    chosen_mode = next((each for each in get_args(Mode) if each == how), None)
    if chosen_mode is None:
        raise ValueError(f"mode (or PACELINE_MODE) must be one of enforce, observe, not {how!r}")
    if transport not in get_args(Transport):
        raise ValueError(f"transport must be session or unary, not {transport!r}")
    if budget < 0 or not 0 < local_scale <= 1:
        raise ValueError("budget must not be negative, and local_scale must be above 0 and at most 1")
    if disabled is None:
        disabled = environ.get("PACELINE_DISABLED", "").strip().lower() in _TRUE
    return Options(
        endpoint=Endpoint(
            address=where,
            tls=tls,
            transport=transport,
            budget=budget,
            local_scale=local_scale,
            token=(token if token is not None else environ.get("PACELINE_TOKEN", "")).strip(),
            ca_file=ca_file,
            cert_file=cert_file,
            key_file=key_file,
        ),
        disabled=disabled,
        mode=chosen_mode,
        policy=chosen,
        tenant=tenant,
        workspace=workspace,
        priority=priority,
        route=route,
    )


def _addresses(text: str) -> tuple[str, bool]:
    """The addresses without their schemes, each once, and whether those ask for TLS."""
    found: dict[str, bool] = {}
    for each in text.split(","):
        where = each.strip()
        scheme, mark, rest = where.partition("://")
        secure = False
        if mark and scheme in ("http", "https", "grpc", "grpcs"):
            secure = scheme in ("https", "grpcs")
            where = rest.rstrip("/")
        if not where:
            raise ValueError("the address is empty" if "," not in text else "one of the addresses is empty")
        found[where] = secure
    if len(set(found.values())) > 1:
        raise ValueError("all addresses must have TLS, or none")
    return ",".join(found), any(found.values())
