"""Who calls, and what they may do: static bearer tokens, each of one identity.

Only SHA-256 digests of tokens are kept, and they are compared in constant time. Nothing here is ever logged.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import msgspec

from paceline.engine.operations import Priority
from paceline.frontend.errors import Code, Problem, forbidden

ANONYMOUS = "anonymous"
_UNAUTHENTICATED = (
    "no valid token: send the metadata `authorization: Bearer TOKEN`, with a token of an identity that this server has"
)

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]


class Identity(msgspec.Struct, frozen=True):
    """A configured caller. ``digests`` are those of its tokens.

    ``tenants`` and ``workspaces`` are patterns of what it may name, in which ``*`` stands for any characters; ``None``
    is all, and without a pattern it may name none. A call that names none is that of ``tenant`` and ``workspace``.
    """

    name: str
    digests: tuple[bytes, ...] = ()
    tenants: tuple[str, ...] | None = None
    workspaces: tuple[str, ...] | None = None
    calls: bool = True
    teaches: bool = True
    admin: bool = False
    tenant: str = ""
    workspace: str = ""
    priority: Priority = Priority.STANDARD


class Caller:
    """An authenticated identity, with the defaults of what it says. ``instance`` names one client process."""

    __slots__ = (
        "admin",
        "calls",
        "identity",
        "instance",
        "prefix",
        "priority",
        "teaches",
        "tenant",
        "tenants",
        "workspace",
        "workspaces",
    )

    def __init__(self, identity: Identity, instance: str = "", tenant: str = "", workspace: str = "") -> None:
        self.identity = identity.name
        self.prefix = identity.name + "/"
        """Before a reservation's id in the ledger: ids are unique per identity."""
        self.calls = identity.calls
        self.teaches = identity.teaches
        self.admin = identity.admin
        self.tenants = identity.tenants
        self.workspaces = identity.workspaces
        self.tenant = tenant or identity.tenant
        self.workspace = workspace or identity.workspace
        self.priority = identity.priority
        self.instance = instance

    def check_calls(self) -> None:
        """Raises :class:`Problem` if this caller may not reserve and commit."""
        if not self.calls:
            raise forbidden("this identity has not the role `call`")

    def check_tenant(self, tenant: str) -> None:
        """Raises :class:`Problem` if this caller may not use ``tenant``."""
        if not _allows(self.tenants, tenant):
            raise forbidden("tenant: not one that this identity may use; name one that it may")

    def check_workspace(self, workspace: str) -> None:
        """Raises :class:`Problem` if this caller may not use ``workspace``."""
        if not _allows(self.workspaces, workspace):
            raise forbidden("workspace: not one that this identity may use; name one that it may")


def _allows(patterns: tuple[str, ...] | None, name: str) -> bool:
    if patterns is None or not (name or patterns):
        return True
    return any(fnmatchcase(name, _LITERAL.sub(r"[\g<0>]", pattern)) for pattern in patterns)


_LITERAL = re.compile(r"[\[?]")
"""Characters that :mod:`fnmatch` would take for more than themselves."""


class Authenticator:
    """Finds the identity of a token. Without any identity everybody is ``anonymous`` and may do everything."""

    def __init__(self, identities: Sequence[Identity] = ()) -> None:
        self._identities = tuple(identities)
        self._anonymous = Identity(ANONYMOUS, admin=True)

    @property
    def open(self) -> bool:
        """Nobody needs a token."""
        return not self._identities

    def names(self) -> list[str]:
        """The identities that there can be."""
        return [*dict.fromkeys(identity.name for identity in self._identities), ANONYMOUS]

    def named(self, name: str) -> Identity | None:
        """An identity by its name; ``None``: there is none of this name."""
        if name == ANONYMOUS and self.open:
            return self._anonymous
        return next((identity for identity in self._identities if identity.name == name), None)

    def identify(self, metadata: Metadata | None) -> Identity:
        """The identity of a request. Raises :class:`Problem`."""
        if not self._identities:
            return self._anonymous
        values = [value for name, value in metadata or () if name == "authorization"]
        if len(values) != 1:
            raise Problem(Code.UNAUTHENTICATED, _UNAUTHENTICATED)
        value = values[0] if isinstance(values[0], str) else values[0].decode("latin-1")
        scheme, _, token = value.partition(" ")
        digest = digest_of(token.strip())
        found: Identity | None = None
        # All are compared, whichever fits: the time says nothing.
        for identity in self._identities:
            for each in identity.digests:
                if hmac.compare_digest(each, digest):
                    found = identity
        if found is None or scheme.lower() != "bearer":
            raise Problem(Code.UNAUTHENTICATED, _UNAUTHENTICATED)
        return found

    def caller(self, metadata: Metadata | None, instance: str = "") -> Caller:
        """Somebody who may reserve and commit. Raises :class:`Problem`."""
        caller = Caller(self.identify(metadata), instance)
        caller.check_calls()
        return caller

    def administrator(self, metadata: Metadata | None) -> Identity:
        """Somebody who may use AdminService. Raises :class:`Problem`."""
        identity = self.identify(metadata)
        if not identity.admin:
            raise forbidden("this identity has not the role `admin`")
        return identity


def digest_of(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).digest()
