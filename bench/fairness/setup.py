"""How a ledger of the laboratory is defined: pools of two limits, shares, classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.engine import operations as op
from paceline.engine.accounting import Profile, Rule
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.terms import WHOLE, Part

DIMENSIONS = (Dimension.REQUESTS, Dimension.INPUT_TOKENS)
"""The order of all vectors here."""
PROFILE = Profile(
    "laboratory",
    (
        Rule(Dimension.REQUESTS, hold_requests=1_000, settle_requests=1_000),
        Rule(Dimension.INPUT_TOKENS, hold_input=1_000, settle_input=1_000),
    ),
    estimate_slack=1_000,
)
CLASSES = {op.Priority.INTERACTIVE: (64, 0), op.Priority.STANDARD: (8, 50), op.Priority.BATCH: (1, 50)}
"""Weight, and minimum in thousandths of each limit."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Requests and tokens a minute, and for how many seconds of refill the bucket has room."""

    requests: int
    tokens: int
    burst_s: int = 60

    @property
    def amounts(self) -> tuple[int, int]:
        """What refills in a minute, by dimension."""
        return self.requests, self.tokens

    @property
    def bursts(self) -> tuple[int, int]:
        """The most that can be saved up, by dimension."""
        return self.requests * self.burst_s // 60, self.tokens * self.burst_s // 60

    def rate(self, place: int) -> float:
        """Refill a second in one dimension."""
        return self.amounts[place] / 60


@dataclass(frozen=True, slots=True)
class Share:
    """A share; ``guarantee`` and ``cap`` in parts of each limit. A cap of zero: none."""

    name: str
    weight: int = 1
    guarantee: float = 0.0
    cap: float = 0.0


def define_pool(name: str, limits: PoolLimits, fill: int) -> op.DefinePool:
    """``fill`` in thousandths of the burst."""
    told = zip(DIMENSIONS, limits.amounts, limits.bursts, strict=True)
    return op.DefinePool(
        name, PROFILE, tuple(Limit(dimension, Window.MINUTE, *pair) for dimension, *pair in told), fill=fill
    )


def define_share(share: Share, limits: PoolLimits) -> op.DefineShare:
    """What an engine without weights or guarantees does not know is left out; its rows will show it."""
    known: dict[str, Any] = {}
    if "weight" in op.DefineShare.__struct_fields__:
        known["weight"] = share.weight
    if "guarantees" in op.DefineShare.__struct_fields__ and share.guarantee:
        known["guarantees"] = tuple(
            Limit(dimension, Window.MINUTE, int(amount * share.guarantee))
            for dimension, amount in zip(DIMENSIONS, limits.amounts, strict=True)
        )
    if "cap_parts" in op.DefineShare.__struct_fields__ and share.cap:
        known["cap_parts"] = tuple(Part(each, Window.MINUTE, round(share.cap * WHOLE)) for each in DIMENSIONS)
    return op.DefineShare(share.name, **known)


def define_classes() -> Sequence[op.Operation]:
    """The classes as the table assumes them; nothing where the engine knows none."""
    if not hasattr(op, "DefineClasses"):
        return ()
    return (op.DefineClasses(tuple(op.Class(priority, *told) for priority, told in CLASSES.items())),)
