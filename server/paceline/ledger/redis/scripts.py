"""The scripts that run inside the store: files of ``lua/``, each with a header that names its KEYS, ARGV and answer."""

from __future__ import annotations

import hashlib
from importlib.resources import files

import msgspec

_LUA = files(__package__).joinpath("lua")
_WITH_HEAD = frozenset(
    {"acquire", "append", "finalize", "head", "keep_check", "keep_snapshot", "reassert", "release", "renew"}
)


class Script(msgspec.Struct, frozen=True):
    """A script's text, and the SHA-1 by which the store knows it once it has seen it."""

    name: str
    text: bytes
    sha: str


def _read(name: str) -> Script:
    text = _LUA.joinpath(f"{name}.lua").read_bytes()
    if name in _WITH_HEAD:
        text = _LUA.joinpath("_head.lua").read_bytes() + b"\n" + text
    return Script(name, text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


ACQUIRE = _read("acquire")
ANNOUNCE = _read("announce")
APPEND = _read("append")
FINALIZE = _read("finalize")
HEAD = _read("head")
KEEP_CHECK = _read("keep_check")
KEEP_SNAPSHOT = _read("keep_snapshot")
PUT_CHUNK = _read("put_chunk")
PUT_META = _read("put_meta")
READ = _read("read")
REASSERT = _read("reassert")
RELEASE = _read("release")
RENEW = _read("renew")
