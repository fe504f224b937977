"""What client processes saw, as they write it down and as it is read again. Times: µs of the monotonic clock, which all
processes of a machine share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

_encode = msgspec.msgpack.Encoder().encode
FLUSH_BYTES = 1 << 18


class Answered(msgspec.Struct, array_like=True, gc=False):
    """One request, with its answer."""

    kind: str
    """``grant`` or ``denial`` (of a Reserve), ``commit``, ``release``, ``renew``, or ``failed``."""
    id: str
    asked: int
    """When it was first sent."""
    answered: int
    sent: int
    """How often, in all."""
    server: int
    """The number of the server that answered."""
    broken: int = 0
    """How often a connection broke under it."""
    away: int = 0
    """How often a living server said that it could not answer now."""
    context: bytes = b""
    """Of a grant: what its caller was told, signed."""
    charges: tuple[tuple[int, int], ...] = ()
    cost: int = 0
    duplicate: bool = False
    late: bool = False
    stale: bool = False
    released: bool = False
    """Of a Release."""
    usage: tuple[int, int, int, int] | None = None
    reason: int = 0
    """Of a denial."""
    what: str = ""
    """Of a failure: the operation and the last error."""
    waited: int = 0
    """Of a grant: µs, by the server's count."""


_decode = msgspec.msgpack.Decoder(Answered).decode


class Writer:
    """Appends to a file, in large pieces; what a killed process had not written yet is lost."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._buffer = bytearray()

    def write(self, entry: Answered) -> None:
        data = _encode(entry)
        self._buffer += len(data).to_bytes(4, "big")
        self._buffer += data
        if len(self._buffer) > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._buffer:
            os.write(self._file, self._buffer)
            self._buffer.clear()

    def close(self) -> None:
        self.flush()
        os.close(self._file)


def read(paths: Iterable[Path]) -> Iterator[Answered]:
    """Every whole entry."""
    for path in paths:
        data = path.read_bytes() if path.exists() else b""
        start = 0
        while start + 4 <= len(data):
            end = start + 4 + int.from_bytes(data[start : start + 4], "big")
            if end > len(data):
                break
            yield _decode(data[start + 4 : end])
            start = end


def as_line(entry: Answered) -> dict[str, Any] | None:
    """The entry in the form that :func:`tests.proofs.answers.compare` takes; ``None``: it has nothing to compare."""
    if entry.kind == "grant":
        ledger, key, pool, _, _, _, granted_at, charges, *_ = told(entry.context)
        return {
            "k": "grant",
            "id": entry.id,
            "key": key,
            "count": 1,
            "children": [],
            "ledger": ledger,
            "pool": pool,
            "at": granted_at,
            "holds": charges,
        }
    if entry.kind == "commit":
        return {
            "k": "commit",
            "id": entry.id,
            "dup": entry.duplicate,
            "late": entry.late,
            "stale": entry.stale,
            "charges": entry.charges,
            "cost": entry.cost,
            "usage": entry.usage,
        }
    if entry.kind == "release":
        return {"k": "release", "id": entry.id, "released": entry.released}
    return None


def told(context: bytes) -> Any:
    """What a grant's context says, without its signature: ledger, key, pool, …, granted at (6), charges (7)."""
    return msgspec.msgpack.decode(context[1:-16])
