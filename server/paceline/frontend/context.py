"""The context of a grant: opaque signed bytes, with which a Commit finds its ledger and is booked even if forgotten.

One version byte, the :class:`~paceline.engine.operations.Context` in MessagePack, and the first 16 bytes of its
HMAC-SHA256. The signature covers the version byte too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

import msgspec

from paceline.engine.keys import child_keys
from paceline.engine.operations import Context
from paceline.frontend.errors import Problem, invalid
from paceline.frontend.limits import MAX_CONTEXT_BYTES

VERSION = b"\x01"
TAG_BYTES = 16
KEY_BYTES = 32
MAX_KNOWN = 32_768
"""Contexts in each of two generations; about 500 bytes each."""
_BLOCK = 64
META_KEY = "frontend.context-key"
"""Where the key is kept in the store, so that contexts outlive the process."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Context).decode


def new_key() -> bytes:
    """A fresh signing key."""
    return secrets.token_bytes(KEY_BYTES)


class _Hmac:
    """HMAC-SHA256 under one key, its two padded blocks hashed once. ``hmac.digest`` takes three times as long."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        block = (key if len(key) <= _BLOCK else hashlib.sha256(key).digest()).ljust(_BLOCK, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def tag(self, body: bytes) -> bytes:
        inner = self._inner.copy()
        inner.update(body)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()[:TAG_BYTES]


class Signer:
    """Seals and opens contexts. The first key seals; the others, older ones, only open.

    What this process has sealed lately it knows again by its bytes, which is cheaper than checking the signature; at
    most twice :data:`MAX_KNOWN` contexts.
    """

    def __init__(self, key: bytes, *older: bytes) -> None:
        if any(len(each) < KEY_BYTES for each in (key, *older)):
            raise ValueError(f"a signing key has at least {KEY_BYTES} bytes")
        self._tag = _Hmac(key).tag
        self._older = tuple(_Hmac(each) for each in older)
        self._young: dict[bytes, Context] = {}
        self._old: dict[bytes, Context] = {}

    def seal(self, context: Context) -> bytes:
        """A context as the grant carries it."""
        body = VERSION + _encode(context)
        sealed = body + self._tag(body)
        self._young[sealed] = context
        if len(self._young) >= MAX_KNOWN:
            self._old, self._young = self._young, {}
        return sealed

    def open(self, sealed: bytes, key: str) -> Context:
        """The context of reservation ``key``. Raises :class:`Problem` if it is not ours or another's."""
        context = self._young.get(sealed) or self._old.get(sealed) or self._checked(sealed)
        if context.key != key and (context.count == 1 or key not in child_keys(context.key, context.count)):
            raise invalid("context", "is that of another reservation: send the one of this reservation's grant")
        return context

    def _checked(self, sealed: bytes) -> Context:
        if not TAG_BYTES + 1 < len(sealed) <= MAX_CONTEXT_BYTES:
            raise _bad()
        body = sealed[:-TAG_BYTES]
        tag = sealed[-TAG_BYTES:]
        same = hmac.compare_digest
        if not same(self._tag(body), tag) and not any(same(each.tag(body), tag) for each in self._older):
            raise _bad()
        if body[0] != VERSION[0]:
            raise _bad()
        try:
            return _decode(body[1:])
        except msgspec.DecodeError:
            raise _bad() from None


def _bad() -> Problem:
    return invalid("context", "is not valid: send the context of the grant unchanged, or leave it empty")
