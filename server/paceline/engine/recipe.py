"""How a call is charged in each of the buckets that it touches: a profile laid out over a plan, once for many calls."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from paceline.engine.accounting import WEIGHT_ONE, Prices, Profile, Rule, Sizes, Usage
from paceline.engine.bucket import Bucket
from paceline.engine.dimensions import GAUGES, Dimension


class Kind(IntEnum):
    """How sure our figure is to be the upstream's."""

    EXACT = 1
    """Requests: both count the same."""
    OUTPUT = 2
    """Known when the call has ended; until then upstream counts at most the cap."""
    ESTIMATED = 3
    """Upstream's own estimate differs from ours by the profile's slack at most."""
    GAUGE = 4
    """Given back at the end."""
    SPEND = 5


def _kind(dimension: Dimension) -> Kind:
    if dimension is Dimension.REQUESTS:
        return Kind.EXACT
    if dimension is Dimension.OUTPUT_TOKENS:
        return Kind.OUTPUT
    if dimension is Dimension.SPEND:
        return Kind.SPEND
    return Kind.GAUGE if dimension in GAUGES else Kind.ESTIMATED


class Recipe:
    """Charges of one pool's profile in the buckets ``numbers``. A dimension that the profile does not count is free."""

    __slots__ = ("_kinds", "_rules", "_slack", "numbers", "own", "spend")

    def __init__(self, profile: Profile, numbers: tuple[int, ...], buckets: Sequence[Bucket]) -> None:
        rules = {rule.dimension: rule for rule in profile.rules}
        dimensions = [buckets[number].dimension for number in numbers]
        self.numbers = numbers
        self._slack = profile.estimate_slack - WEIGHT_ONE
        self._kinds = tuple(_kind(dimension) for dimension in dimensions)
        self._rules = tuple(rules.get(dimension, Rule(dimension)) for dimension in dimensions)
        places = {
            dimension: place
            for place, (number, dimension) in enumerate(zip(numbers, dimensions, strict=True))
            if not buckets[number].share
        }
        self.own = tuple((place, dimension) for dimension, place in places.items())
        """One place for each dimension of the pool and for the account's spend, without those of shares."""

        self.spend = next(place for place, dimension in self.own if dimension is Dimension.SPEND)
        """Place of the account's spend."""

    def by_dimension(self, amounts: tuple[int, ...]) -> tuple[tuple[Dimension, int], ...]:
        """The amounts in the pool's own limits and the account's spend."""
        return tuple([(dimension, amounts[place]) for place, dimension in self.own])

    def holds(self, sizes: Sizes, prices: Prices) -> tuple[int, ...]:
        """What a call of these sizes holds."""
        return tuple(
            [
                prices.expected_cost(sizes) if kind is Kind.SPEND else rule.hold(sizes)
                for kind, rule in zip(self._kinds, self._rules, strict=True)
            ]
        )

    def overs(self, sizes: Sizes, holds: tuple[int, ...]) -> tuple[int, ...]:
        """By how much upstream's count may exceed each hold while the call is open."""
        overs = []
        for place, kind in enumerate(self._kinds):
            if kind is Kind.ESTIMATED:
                overs.append(-(-holds[place] * self._slack // WEIGHT_ONE))
            elif kind is Kind.OUTPUT:
                rule = self._rules[place]
                more = sizes.max_output_tokens - sizes.output_tokens
                overs.append(-(-rule.settle_output * more // WEIGHT_ONE) if more > 0 else 0)
            else:
                overs.append(0)
        return tuple(overs)

    def charges(
        self, usage: Usage | None, prices: Prices, holds: tuple[int, ...], most_output: int | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands when the call has ended, and by how much upstream's count may have exceeded it at some time.

        Without usage what was held stands, but for gauges. ``most_output`` is what the call may have produced (tokens),
        ``None`` if its usage is final.
        """
        charges, overs = [], []
        for place, kind in enumerate(self._kinds):
            hold = holds[place]
            over = 0
            if kind is Kind.GAUGE:
                charge = 0
            elif usage is None:
                charge = hold
            elif kind is Kind.SPEND:
                charge = prices.cost(usage)
            else:
                charge = self._rules[place].settle(usage, hold)
            if kind is Kind.ESTIMATED:
                over = -(-charge * self._slack // WEIGHT_ONE)
            elif kind is Kind.OUTPUT and most_output is not None:
                over = max(0, -(-self._rules[place].settle_output * most_output // WEIGHT_ONE) - charge)
            charges.append(charge)
            overs.append(over)
        return tuple(charges), tuple(overs)
