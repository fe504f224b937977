"""AdminService.UpdateShare: from the message to the engine's operation, and what cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from paceline.engine.dimensions import GAUGES, UNLIMITED, Dimension, Limit, Window
from paceline.engine.operations import DefineShare
from paceline.engine.state import Share, State
from paceline.engine.terms import WHOLE, Part
from paceline.frontend import view
from paceline.frontend.errors import Code, Problem, invalid, missing
from paceline_client.stubs import v1 as pb

MAX_DEPTH = 8
MAX_WEIGHT = 1_000_000
MAX_UNITS = 1_000_000_000_000_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_WINDOWS: Mapping[Dimension, Window] = {**dict.fromkeys(GAUGES, Window.NONE), Dimension.SPEND: Window.MONTH}
"""Dimensions that have one window only."""

_Amounts = tuple[tuple[Limit, ...], tuple[Part, ...]]


def operation(state: State, request: pb.UpdateShareRequest) -> DefineShare:
    """What UpdateShare asks of a ledger.

    Raises :class:`Problem`: INVALID_ARGUMENT, NOT_FOUND, ABORTED; UNIMPLEMENTED for settings in one pool.
    """
    share = request.share
    if share.pool:
        what = "this version does not have settings of a share for one pool; leave it empty and name the ledger"
        raise Problem(Code.UNIMPLEMENTED, f"share.pool: {what}")
    found = _found(state, share, request.allow_missing)
    weight = share.weight if share.HasField("weight") else 1
    if not 0 <= weight <= MAX_WEIGHT:
        raise invalid("share.weight", f"must be from 0 to {MAX_WEIGHT:,}")
    caps, cap_parts = _amounts(share.caps, "share.caps")
    guarantees, guarantee_parts = _amounts(share.guarantees, "share.guarantees")
    for place, amount in enumerate(share.guarantees):
        if Dimension(amount.dimension) in _WINDOWS or amount.window not in (pb.WINDOW_UNSPECIFIED, pb.WINDOW_MINUTE):
            raise invalid(f"share.guarantees[{place}]", "can be of requests and tokens by the minute only")
    if share.etag and share.etag != ("" if found is None else view.share_etag(found)):
        raise Problem(Code.ABORTED, "share.etag: it was changed since: read it again")
    return DefineShare(share.name, caps, weight, guarantees, cap_parts, guarantee_parts, override=True)


def _found(state: State, share: pb.Share, may_be_new: bool) -> Share | None:
    names = share.name.split("/")
    if not all(_NAME.fullmatch(name) for name in names):
        raise invalid("share.name", "must be the path of a share, like team/app")
    if len(names) > MAX_DEPTH:
        raise invalid("share.name", f"is nested too deeply: at most {MAX_DEPTH} levels")
    parent = share.name.rpartition("/")[0]
    if share.parent and share.parent != parent:
        raise invalid("share.parent", f"must be that of the name, {parent!r}, or empty")
    found = state.shares.get(share.name)
    if found is None and not may_be_new:
        raise missing("share.name: the ledger has no share of this name; allow_missing makes it")
    if parent and parent not in state.shares:
        raise missing("share.parent: the ledger has no share of this name")
    return found


def _amounts(amounts: Iterable[pb.ShareAmount], path: str) -> _Amounts:
    limits: list[Limit] = []
    parts: list[Part] = []
    seen: set[tuple[Dimension, Window]] = set()
    for place, amount in enumerate(amounts):
        here = f"{path}[{place}]"
        dimension, window = _key(amount, here)
        if (dimension, window) in seen:
            raise invalid(here, "has the same dimension and window as one before it: keep one")
        seen.add((dimension, window))
        kind = amount.WhichOneof("amount")
        if kind == "units":
            if not 0 <= amount.units <= (UNLIMITED if dimension is Dimension.SPEND else MAX_UNITS):
                raise invalid(f"{here}.units", f"must be from 0 to {MAX_UNITS:,}")
            limits.append(Limit(dimension, window, amount.units))
        elif kind == "permille":
            if not 0 <= amount.permille <= WHOLE:
                raise invalid(f"{here}.permille", f"must be from 0 to {WHOLE:,}")
            if dimension is Dimension.SPEND:
                raise invalid(f"{here}.permille", "does not go with money: pools have no limit of it; use units")
            parts.append(Part(dimension, window, amount.permille))
        else:
            raise invalid(f"{here}.units", "or `permille` is required")
    return tuple(limits), tuple(parts)


def _key(amount: pb.ShareAmount, path: str) -> tuple[Dimension, Window]:
    try:
        dimension = Dimension(amount.dimension)
    except ValueError:
        raise invalid(f"{path}.dimension", "is required: one of the values of Dimension") from None
    only = _WINDOWS.get(dimension)
    if not amount.window:
        return dimension, only or Window.MINUTE
    try:
        window = Window(amount.window)
    except ValueError:
        raise invalid(f"{path}.window", "is not known: use one of the values of Window") from None
    if (only is None and window is Window.NONE) or (only is not None and window is not only):
        raise invalid(f"{path}.window", "does not go with the dimension: leave it empty")
    return dimension, window
