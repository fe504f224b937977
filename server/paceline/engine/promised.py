"""Whether the guarantees of shares can be kept together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paceline.engine.dimensions import UNLIMITED, Dimension, Limit, Window
from paceline.engine.state import Share, State
from paceline.engine.terms import WHOLE, Part, Terms

Problem = tuple[str, str]
"""The field of the share, and what is wrong with it."""
_Key = tuple[Dimension, Window]


def over_promised(state: State, name: str, terms: Terms) -> Problem | None:
    """Why the guarantees would not fit if share ``name`` had these ``terms``; ``None``: they fit.

    The guarantees of all shares with one parent may not sum above the parent's guarantee, nor above the cap of any
    share above; those of shares without a parent not above the pool's limit. A guarantee may not be above a cap of its
    own. Of a parent without a guarantee or cap nothing is compared. Pools differ in their limits: amounts are compared
    with limits and with parts of them in the pool in which the limit is largest.
    """
    shares = {**state.shares, name: _share(name, terms)}
    largest = _largest(state)
    above, own = name.rpartition("/")[0], shares[name]
    for key in _keys(own.guarantees, own.guarantee_parts):
        mine = _sum([own], key, largest)
        for holder in _line(shares, name):
            cap = _cap(holder, key, largest)
            if mine is not None and cap is not None and mine > cap:
                return "guarantees", f"of {_word(key)} {mine:,} is above the cap of {cap:,} of {holder.name!r}"
        together = _sum(_children(shares, above), key, largest)
        whole, whose = _whole(shares, above, key, largest)
        if together is not None and whole is not None and together > whole:
            return "guarantees", f"of {_word(key)} would sum to {together:,}, above {whose}: {whole:,}"
    below = _children(shares, name)
    for key in {found for child in below for found in _keys(child.guarantees, child.guarantee_parts)}:
        together = _sum(below, key, largest)
        for field, limit in (("guarantees", _guarantee(own, key, largest)), ("caps", _cap(own, key, largest))):
            if together is not None and limit is not None and together > limit:
                return field, f"of {_word(key)} is {limit:,}, below the {together:,} guaranteed inside"
    return None


def _share(name: str, terms: Terms) -> Share:
    return Share(name, terms.caps, terms.weight, terms.guarantees, terms.cap_parts, terms.guarantee_parts)


def _largest(state: State) -> Mapping[_Key, int]:
    """The largest limit of any pool."""
    found: dict[_Key, int] = {}
    for bucket in state.buckets:
        if bucket.pool and not bucket.share:
            key = (bucket.dimension, bucket.window)
            found[key] = max(found.get(key, 0), bucket.amount)
    return found


def _keys(limits: Iterable[Limit], parts: Iterable[Part]) -> set[_Key]:
    return {(limit.dimension, limit.window) for limit in limits} | {(part.dimension, part.window) for part in parts}


def _line(shares: Mapping[str, Share], name: str) -> list[Share]:
    """A share and those above it."""
    found = []
    while name:
        if name in shares:
            found.append(shares[name])
        name = name.rpartition("/")[0]
    return found


def _children(shares: Mapping[str, Share], parent: str) -> list[Share]:
    return [share for name, share in shares.items() if name.rpartition("/")[0] == parent]


def _whole(shares: Mapping[str, Share], parent: str, key: _Key, largest: Mapping[_Key, int]) -> tuple[int | None, str]:
    """What the guarantees of shares with one parent may sum to."""
    if not parent:
        amount = largest.get(key, UNLIMITED)
        return (None if amount >= UNLIMITED else amount), "the largest limit of any pool"
    holder = shares.get(parent)
    if holder is None:
        return None, ""
    told = _guarantee(holder, key, largest)
    if told is not None:
        return told, f"the guarantee of {parent!r}"
    caps = [found for each in _line(shares, parent) if (found := _cap(each, key, largest)) is not None]
    return min(caps, default=None), "the cap of a share above"


def _sum(shares: Iterable[Share], key: _Key, largest: Mapping[_Key, int]) -> int | None:
    """The guarantees together; ``None``: not known, since no pool says of what they are parts."""
    units, permille = 0, 0
    for share in shares:
        units += sum(each.amount for each in share.guarantees if (each.dimension, each.window) == key)
        permille += sum(each.permille for each in share.guarantee_parts if (each.dimension, each.window) == key)
    if not permille:
        return units
    limit = largest.get(key, UNLIMITED)
    return None if limit >= UNLIMITED else units + limit * permille // WHOLE


def _guarantee(share: Share, key: _Key, largest: Mapping[_Key, int]) -> int | None:
    return _amount(share.guarantees, share.guarantee_parts, key, largest)


def _cap(share: Share, key: _Key, largest: Mapping[_Key, int]) -> int | None:
    return _amount(share.caps, share.cap_parts, key, largest)


def _amount(limits: Iterable[Limit], parts: Iterable[Part], key: _Key, largest: Mapping[_Key, int]) -> int | None:
    for limit in limits:
        if (limit.dimension, limit.window) == key:
            return limit.amount
    for part in parts:
        if (part.dimension, part.window) == key:
            whole = largest.get(key, UNLIMITED)
            return None if whole >= UNLIMITED else part.share_of(whole)
    return None


def _word(key: _Key) -> str:
    return key[0].name.lower()
