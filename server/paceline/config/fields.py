"""Kinds of values in the configuration: how they are written, and what they become."""

from __future__ import annotations

import ipaddress
import re
from functools import partial
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from paceline.engine.dimensions import DAY_US, MINUTE_US, SECOND_US

_UNITS = {"ms": 1_000, "s": SECOND_US, "m": MINUTE_US, "h": 60 * MINUTE_US, "d": DAY_US}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(ms|s|m|h|d)")


def spoken(duration_us: int) -> str:
    """A duration as a person would write it."""
    for unit, length in reversed(_UNITS.items()):
        if duration_us >= length and duration_us % length == 0:
            return f"{duration_us // length}{unit}"
    return f"{duration_us / 1_000:g}ms"


def duration(value: object, least: int, most: int) -> int:
    """Microseconds, from seconds or from text like ``500ms``, ``30s``, ``5m``, ``1h``."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e9:
        found = round(value * SECOND_US)
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())) is not None:
        found = round(float(match[1]) * _UNITS[match[2]])
    else:
        raise ValueError("is not a duration; write seconds, or text like 500ms, 30s, 5m, 1h")
    if not least <= found <= most:
        raise ValueError(f"must be from {spoken(least)} to {spoken(most)}; change it to lie between")
    return found


def _host_port(text: str, name: str) -> None:
    parts = urlsplit(f"//{text}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or parts.path or parts.query or parts.fragment or "@" in text:
        raise ValueError(f"is not a {name}; write HOST:PORT, like 127.0.0.1:7420 or [::1]:7420")
    if port is None:
        raise ValueError("has no valid port; write HOST:PORT with a port from 0 to 65535")


def listen_address(value: str) -> str:
    """``HOST:PORT`` or ``unix:PATH``."""
    if value.startswith("unix:"):
        if len(value) == len("unix:"):
            raise ValueError("names no socket; write unix:PATH")
        return value
    _host_port(value, "listen address")
    return value


def metrics_address(value: str) -> str:
    """``HOST:PORT`` or ``off``."""
    if value != "off":
        _host_port(value, "listen address, nor off")
    return value


def store_url(value: str) -> str:
    """Where journals are kept. The message never repeats the URL: it may hold a password."""
    scheme, colon, rest = value.partition(":")
    scheme = re.sub("^valkey", "redis", scheme)
    if not colon or scheme not in STORE_FORMS:
        raise ValueError(f"is not a store URL; write one of {', '.join(STORE_FORMS.values())}")
    if scheme == "embedded":
        if rest and ((rest.startswith("//") and not rest.startswith("///")) or rest.strip("/") == ""):
            raise ValueError(f"names no file; write {STORE_FORMS[scheme]}")
        return value
    if not rest.startswith("//"):
        raise ValueError(f"lacks the //; write {STORE_FORMS[scheme]}")
    if scheme == "unix":
        return value
    try:
        parts = urlsplit(value)
    except ValueError:
        raise ValueError(f"is not a store URL; write {STORE_FORMS[scheme]}") from None
    hosts = parts.netloc.rpartition("@")[2].split(",")
    if any(not host for host in hosts) or (len(hosts) > 1 and "+" not in scheme):
        raise ValueError(f"names no host, or too many; write {STORE_FORMS[scheme]}")
    for host in hosts:
        one = urlsplit(f"//{host}")
        try:
            valid = bool(one.hostname) and (one.port is None or one.port > 0)
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"has a host or port that is not valid; write {STORE_FORMS[scheme]}")
    path = parts.path.strip("/")
    if scheme.endswith("+sentinel"):
        master, _, path = path.partition("/")
        if not master:
            raise ValueError(f"names no master; write {STORE_FORMS[scheme]}")
    if path and not (path.isascii() and path.isdigit() and len(path) <= 4 and not scheme.endswith("+cluster")):
        raise ValueError(f"has a path that is no database number; write {STORE_FORMS[scheme]}")
    return value


def peer_address(value: str) -> str:
    """``HOST`` or ``HOST:PORT``, or nothing."""
    if not value:
        return value
    try:
        host = str(ipaddress.ip_address(value))
    except ValueError:
        host = ""
    parts = urlsplit(f"//[{host}]" if ":" in host else f"//{value}")
    try:
        valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.path or parts.query or parts.fragment or "@" in value:
        raise ValueError("is no address; write HOST or HOST:PORT, like 10.1.2.3 or paceline-0.paceline:7134")
    if parts.hostname in WILDCARDS:
        raise ValueError("is no address that others can connect to; write this machine's own")
    return value


STORE_FORMS = {
    "embedded": "embedded:PATH (embedded: alone keeps nothing)",
    "redis": "redis://HOST:PORT/DB",
    "rediss": "rediss://HOST:PORT/DB",
    "redis+sentinel": "redis+sentinel://HOST:PORT,HOST:PORT/MASTER",
    "rediss+sentinel": "rediss+sentinel://HOST:PORT,HOST:PORT/MASTER",
    "redis+cluster": "redis+cluster://HOST:PORT,HOST:PORT",
    "rediss+cluster": "rediss+cluster://HOST:PORT,HOST:PORT",
    "unix": "unix:///PATH of a socket of Redis",
}
"""The forms of store URLs by scheme; ``valkey`` may stand for ``redis``. What else stands in them, the store knows."""


WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 -- to tell them, not to listen there
"""Hosts to listen on, and not to connect to."""


def _no_controls(value: str) -> str:
    if not value.isprintable():
        raise ValueError("has characters that cannot be printed; remove them")
    return value


LeaseDuration = Annotated[
    int, BeforeValidator(partial(duration, least=SECOND_US, most=30 * SECOND_US), json_schema_input_type=float | str)
]
"""1 to 30 seconds, in µs."""
LagDuration = Annotated[
    int, BeforeValidator(partial(duration, least=0, most=60 * SECOND_US), json_schema_input_type=float | str)
]
"""0 to 60 seconds, in µs."""
ShortDuration = Annotated[
    int, BeforeValidator(partial(duration, least=1_000, most=600 * SECOND_US), json_schema_input_type=float | str)
]
"""1 ms to 10 minutes, in µs."""
LongDuration = Annotated[
    int, BeforeValidator(partial(duration, least=SECOND_US, most=DAY_US), json_schema_input_type=float | str)
]
"""1 second to a day, in µs."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
"""A name that may stand in paths of shares and names of pools."""
Plain = Annotated[str, Field(max_length=128), AfterValidator(_no_controls)]
"""Text as callers send it."""
ListenAddress = Annotated[str, Field(max_length=512), AfterValidator(listen_address)]
PeerAddress = Annotated[str, Field(max_length=512), AfterValidator(peer_address)]
MetricsAddress = Annotated[str, Field(max_length=512), AfterValidator(metrics_address)]
StoreUrl = Annotated[str, Field(max_length=2048), AfterValidator(store_url)]
