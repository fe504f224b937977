"""A few lines of Protocol Buffers' encoding, for the answers on the hot path.

The answers of a batch share most of their content. A generated message would copy it into each; here it is encoded once
and joined. The tests compare every byte with what the generated classes read.
"""

from __future__ import annotations

_SMALL = 1 << 14
_LOW = _SMALL - 1
_UNSIGNED_64 = (1 << 64) - 1


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_TABLE = tuple(_encode(value) for value in range(_SMALL))
_GOES_ON = tuple(bytes((value & 0x7F | 0x80, value >> 7 | 0x80)) for value in range(_SMALL))
"""The lowest 14 bits of a larger number."""


def varint(value: int) -> bytes:
    """A varint. Negative numbers as int32 and int64 fields have them."""
    if 0 <= value < _SMALL:
        return _TABLE[value]
    if 0 <= value < _SMALL * _SMALL:
        return _GOES_ON[value & _LOW] + _TABLE[value >> 14]
    return _encode(value & _UNSIGNED_64)


def key(field: int, wire_type: int) -> bytes:
    """What goes before a field's value. Wire type 0 is a number, 2 has a length."""
    return varint(field << 3 | wire_type)


def number(field: int, value: int) -> bytes:
    """A number or enum, left out if zero."""
    return key(field, 0) + varint(value) if value else b""


def block(field: int, data: bytes) -> bytes:
    """A message, string or bytes, even if empty."""
    return key(field, 2) + varint(len(data)) + data


def text(field: int, value: str) -> bytes:
    """A string, left out if empty."""
    return block(field, value.encode()) if value else b""


def duration(field: int, us: int) -> bytes:
    """A ``google.protobuf.Duration`` of so many microseconds, which are not negative."""
    seconds, rest = divmod(us, 1_000_000)
    return block(field, number(1, seconds) + number(2, rest * 1_000))
