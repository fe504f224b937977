"""The URL of a Redis or Valkey store, read and checked. Nothing is connected here.

==========================  ==========================================================================
``redis://`` ``valkey://``    one server: ``redis://user:password@host:6379/0``
``rediss://`` ``valkeys://``  the same with TLS
``unix://``                   one server on a socket: ``unix:///run/redis.sock?db=0``
``redis+sentinel://``         ``redis+sentinel://sentinel1:26379,sentinel2/service/0``
``redis+cluster://``          ``redis+cluster://node1:6379,node2``; any of its nodes
==========================  ==========================================================================

The last two also begin with ``valkey``, and with ``rediss`` or ``valkeys`` for TLS everywhere.
"""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from urllib.parse import parse_qsl, unquote

import msgspec

from paceline.ledger.journal import StoreError, StoreURLError

SCHEMES = frozenset(
    {"unix"}
    | {
        f"{base}{tls}{kind}"
        for base in ("redis", "valkey")
        for tls in ("", "s")
        for kind in ("", "+sentinel", "+cluster")
    }
)
PORT = 6_379
SENTINEL_PORT = 26_379
CONNECT_MS = 1_000
COMMAND_MS = 2_000
MOST_MS = 60_000
MOST_HOSTS = 32

_OPTIONS = (
    "prefix, user, password_file, password_env, connect_timeout_ms, timeout_ms, db; with TLS ca, cert, key; "
    "with Sentinel sentinel_user, sentinel_password_file, sentinel_password_env"
)
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Kind(Enum):
    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Login(msgspec.Struct, frozen=True):
    """A user, and where the password is. Shown without the password."""

    user: str = ""
    password: str = ""
    file: str = ""
    env: str = ""

    def read(self) -> tuple[str | None, str | None]:
        """User and password as they are now. Raises :class:`StoreError` if the password is not where it should be."""
        password = self.password
        if self.file:
            try:
                password = Path(self.file).read_text(encoding="utf-8").strip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not text"
                raise StoreError(f"cannot read the store's password from {self.file}: {reason}") from None
        elif self.env:
            try:
                password = os.environ[self.env]
            except KeyError:
                raise StoreError(
                    f"the store's password is to come from the variable {self.env}, which is not set"
                ) from None
        return self.user or None, password or None

    def __repr__(self) -> str:
        return f"Login(user={self.user!r})"


class Tls(msgspec.Struct, frozen=True):
    """Files in PEM. Without ``ca`` the system's authorities count; the name in the certificate is always checked."""

    ca: str = ""
    cert: str = ""
    key: str = ""


class Settings(msgspec.Struct, frozen=True):
    """Where the store is, and how to speak to it."""

    kind: Kind
    name: str
    """What to call it in messages; no secret in it."""
    hosts: tuple[tuple[str, int], ...] = ()
    """Of the server, the sentinels, or some of the cluster's nodes."""
    path: str = ""
    """Of the socket, for a server without hosts."""
    service: str = ""
    """What the sentinels call the primary."""
    db: int = 0
    login: Login = Login()
    sentinel_login: Login = Login()
    tls: Tls | None = None
    prefix: str = "paceline"
    """In front of every key, so that several fleets can share a server."""
    connect_s: float = CONNECT_MS / 1_000
    command_s: float = COMMAND_MS / 1_000
    """For a command as a whole, with connecting and finding the primary."""


def parse(url: str) -> Settings:
    """Read a URL. Raises :class:`StoreURLError`, which repeats no more of it than scheme, hosts and option names."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in SCHEMES:
        raise StoreURLError(f"a Redis store is named SCHEME://HOST, with SCHEME one of {', '.join(sorted(SCHEMES))}")
    if "#" in rest:
        raise StoreURLError(f"the {scheme} URL has a '#': write %23 for one in a password")
    rest, question, query = rest.partition("?")
    options = _options(scheme, query if question else None)
    base, _, kind_name = scheme.partition("+")
    kind = Kind(kind_name) if kind_name else Kind.SINGLE
    if scheme == "unix":
        return _finish(scheme, options, kind=kind, name=f"unix socket {unquote(rest)}", path=_socket(rest))
    authority, _, tail = rest.partition("/")
    login, _, places = authority.rpartition("@")
    user, _, password = login.partition(":")
    port = SENTINEL_PORT if kind is Kind.SENTINEL else PORT
    hosts = tuple(_host(scheme, place, port) for place in places.split(",")) if places else ()
    if not hosts:
        raise StoreURLError(f"the {scheme} URL names no host: write {scheme}://HOST")
    if len(hosts) > (1 if kind is Kind.SINGLE else MOST_HOSTS):
        raise StoreURLError(
            f"a {scheme} URL names one host: for several use redis+sentinel:// or redis+cluster://"
            if kind is Kind.SINGLE
            else f"the {scheme} URL names more than {MOST_HOSTS} hosts"
        )
    parts = [unquote(part) for part in tail.split("/")] if tail else []
    service = ""
    if kind is Kind.SENTINEL:
        service = parts.pop(0) if parts else ""
        if not service:
            raise StoreURLError(f"the {scheme} URL names no service: write {scheme}://HOSTS/SERVICE")
    if parts and parts != [""]:
        if len(parts) > 1:
            raise StoreURLError(f"the path of the {scheme} URL has too many parts")
        if "db" in options:
            raise StoreURLError("the database's number stands in the path and in the option db: drop one")
        options["db"] = parts[0]
    brand = "valkey" if base.startswith("valkey") else "redis"
    places = ",".join(f"[{host}]:{number}" if ":" in host else f"{host}:{number}" for host, number in hosts)
    name = f"{brand} {places}" if kind is Kind.SINGLE else f"{brand} {kind.value} {places}"
    return _finish(
        scheme,
        options,
        kind=kind,
        name=f"{name} ({service})" if service else name,
        hosts=hosts,
        service=service,
        user=unquote(user),
        password=unquote(password),
        tls=base in ("rediss", "valkeys"),
    )


def _options(scheme: str, query: str | None) -> dict[str, str]:
    if query is None:
        return {}
    if not query:
        raise StoreURLError(f"the {scheme} URL ends in '?': name an option, or drop it")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise StoreURLError("the store's options must be written name=value, joined by '&'") from None
    options = dict(pairs)
    if len(options) < len(pairs):
        raise StoreURLError("a store option is given twice")
    for name, value in options.items():
        if name not in re.split(r"[;, ]+", _OPTIONS):
            # With an '@' this may be the rest of a password with a '?' in it.
            told = "" if "@" in query else f" {name!r}"
            raise StoreURLError(f"unknown store option{told}: there is {_OPTIONS}")
        if not value:
            raise StoreURLError(f"the store option {name} is empty")
    return options


def _socket(rest: str) -> str:
    path = unquote(rest)
    if not path.startswith("/") or "\0" in path or path == "/":
        raise StoreURLError("a unix URL names an absolute path: unix:///run/redis.sock")
    return path


def _host(scheme: str, place: str, default: int) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?", place)
    if match is None:
        raise StoreURLError(
            f"a host of the {scheme} URL is not HOST, HOST:PORT or [IPV6]:PORT "
            "(a password's '/', '?' and '@' are written %2F, %3F, %40)"
        )
    port = int(match[3]) if match[3] else default
    if not 0 < port < 65_536:
        raise StoreURLError(f"a port of the {scheme} URL is not from 1 to 65535")
    return match[1] or match[2], port


def _finish(
    scheme: str,
    options: dict[str, str],
    *,
    kind: Kind,
    name: str,
    hosts: tuple[tuple[str, int], ...] = (),
    path: str = "",
    service: str = "",
    user: str = "",
    password: str = "",
    tls: bool = False,
) -> Settings:
    db = _number(options, "db", 0, 0, 1_000_000)
    if db and kind is Kind.CLUSTER:
        raise StoreURLError("a cluster has database 0 alone: drop the number, use the option prefix")
    if not tls and (extra := sorted({"ca", "cert", "key"} & options.keys())):
        raise StoreURLError(
            f"the store option {extra[0]} needs TLS: a scheme such as rediss, rediss+sentinel, rediss+cluster"
        )
    if ("cert" in options) != ("key" in options):
        raise StoreURLError("the store options cert and key go together")
    if kind is not Kind.SENTINEL and (extra := sorted(name for name in options if name.startswith("sentinel_"))):
        raise StoreURLError(f"the store option {extra[0]} needs Sentinel")
    prefix = options.get("prefix", "paceline")
    if not _PREFIX.fullmatch(prefix):
        raise StoreURLError("the store's prefix has 1 to 64 of letters, digits, '.', '_', '-'")
    if user and "user" in options:
        raise StoreURLError("the store's user is given twice")
    if password and {"password_file", "password_env"} & options.keys():
        raise StoreURLError("the store's password is given twice")
    for front in ("", "sentinel_"):
        if {f"{front}password_file", f"{front}password_env"} <= options.keys():
            raise StoreURLError(f"of the store options {front}password_file and {front}password_env there can be one")
    return Settings(
        kind=kind,
        name=name,
        hosts=hosts,
        path=path,
        service=service,
        db=db,
        login=Login(
            user or options.get("user", ""), password, options.get("password_file", ""), options.get("password_env", "")
        ),
        sentinel_login=Login(
            options.get("sentinel_user", ""),
            "",
            options.get("sentinel_password_file", ""),
            options.get("sentinel_password_env", ""),
        ),
        tls=Tls(options.get("ca", ""), options.get("cert", ""), options.get("key", "")) if tls else None,
        prefix=prefix,
        connect_s=_number(options, "connect_timeout_ms", CONNECT_MS, 10, MOST_MS) / 1_000,
        command_s=_number(options, "timeout_ms", COMMAND_MS, 10, MOST_MS) / 1_000,
    )


def _number(options: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    text = options.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise StoreURLError(f"the store's {name} is a whole number from {least} to {most}")
    return int(text)
