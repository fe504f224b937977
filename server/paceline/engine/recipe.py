"""How a call is charged in each of the buckets that it touches: a profile laid out over a plan, once for many calls.

This is on the path of every call, so weights are laid out as tuples and summed in one expression per list.
"""

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
    """Charges of one pool's profile in the buckets ``numbers``. A dimension that the profile does not count is free.

    Buckets of money come last (see :meth:`paceline.engine.books.Books.plan`).
    """

    __slots__ = ("_counted", "_holds", "_kept", "_larger", "_overs", "_settles", "_spends", "numbers", "own", "spend")

    def __init__(self, profile: Profile, numbers: tuple[int, ...], buckets: Sequence[Bucket]) -> None:
        rules = {rule.dimension: rule for rule in profile.rules}
        dimensions = [buckets[number].dimension for number in numbers]
        counted = [dimension for dimension in dimensions if dimension is not Dimension.SPEND]
        if dimensions[: len(counted)] != counted:
            raise ValueError("buckets of money must come last")
        laid_out = [(_kind(dimension), rules.get(dimension, Rule(dimension))) for dimension in counted]
        slack = profile.estimate_slack - WEIGHT_ONE
        self.numbers = numbers
        self._counted = len(counted)
        self._spends = len(dimensions) - len(counted)
        self._holds = tuple(
            (rule.hold_requests, rule.hold_input, rule.hold_cached, rule.hold_output, rule.hold_max_output)
            for _, rule in laid_out
        )
        self._larger = tuple((place, rule) for place, (_, rule) in enumerate(laid_out) if rule.hold_larger)
        """Places whose hold is no sum."""
        self._settles = tuple(
            (
                rule.settle_requests,
                rule.settle_input,
                rule.settle_cache_read,
                rule.settle_cache_write,
                rule.settle_output,
            )
            for _, rule in laid_out
        )
        self._kept = tuple(
            (place, kind is Kind.GAUGE)
            for place, (kind, rule) in enumerate(laid_out)
            if kind is Kind.GAUGE or rule.settle_as_held
        )
        """Places whose charge is not a matter of usage: nothing for gauges, else the hold."""
        self._overs = tuple(
            (slack if kind is Kind.ESTIMATED else 0, rule.settle_output if kind is Kind.OUTPUT else 0)
            for kind, rule in laid_out
        )
        """For each place: slack of estimates, weight of output that may yet come."""
        places: dict[Dimension, int] = {}
        for place, (number, dimension) in enumerate(zip(numbers, dimensions, strict=True)):
            if not buckets[number].share:
                places.setdefault(dimension, place)
        self.own = tuple((place, dimension) for dimension, place in places.items())
        """One place for each dimension of the pool and for the account's spend, without those of shares."""
        self.spend = places.get(Dimension.SPEND, -1)
        """Place of the account's spend."""

    def follows_usage(self, place: int) -> bool:
        """Whether what is charged there in the end is a matter of usage."""
        return all(place != kept for kept, _ in self._kept)

    def by_dimension(self, amounts: tuple[int, ...]) -> tuple[tuple[Dimension, int], ...]:
        """The amounts in the pool's own limits and the account's spend."""
        return tuple([(dimension, amounts[place]) for place, dimension in self.own])

    def holds(self, sizes: Sizes, prices: Prices) -> tuple[int, ...]:
        """What a call of these sizes holds."""
        requests, uncached, cached = sizes.requests, sizes.input_tokens, sizes.cached_input_tokens
        output, most = sizes.output_tokens, sizes.max_output_tokens
        holds = [
            -(-(a * requests + b * uncached + c * cached + d * output + e * most) // WEIGHT_ONE)
            for a, b, c, d, e in self._holds
        ]
        for place, rule in self._larger:
            holds[place] = rule.hold(sizes)
        holds += [prices.expected_cost(sizes)] * self._spends
        return tuple(holds)

    def overs(self, sizes: Sizes, holds: tuple[int, ...]) -> tuple[int, ...]:
        """By how much upstream's count may exceed each hold while the call is open."""
        more = sizes.max_output_tokens - sizes.output_tokens
        overs = [
            -(-(hold * slack + more * output) // WEIGHT_ONE)
            for hold, (slack, output) in zip(holds, self._overs)  # noqa: B905 -- money has no place there
        ]
        overs += [0] * self._spends
        return tuple(overs)

    def charges(
        self, usage: Usage | None, prices: Prices, holds: tuple[int, ...], most_output: int | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands when the call has ended, and by how much upstream's count may have exceeded it at some time.

        Without usage what was held stands, but for gauges. ``most_output`` is what the call may have produced (tokens),
        ``None`` if its usage is final.
        """
        if usage is None:
            charges = list(holds[: self._counted])
            costs = list(holds[self._counted :])
        else:
            requests, uncached, read = usage.requests, usage.input_tokens, usage.cache_read_tokens
            written, output = usage.cache_write_tokens, usage.output_tokens
            charges = [
                -(-(a * requests + b * uncached + c * read + d * written + e * output) // WEIGHT_ONE)
                for a, b, c, d, e in self._settles
            ]
            costs = [prices.cost(usage)] * self._spends
        for place, is_gauge in self._kept:
            charges[place] = 0 if is_gauge else holds[place]
        overs = [-(-charge * slack // WEIGHT_ONE) for charge, (slack, _) in zip(charges, self._overs, strict=True)]
        if most_output is not None:
            for place, (_, weight) in enumerate(self._overs):
                if weight:
                    overs[place] = max(0, -(-weight * most_output // WEIGHT_ONE) - charges[place])
        overs += [0] * self._spends
        return tuple(charges + costs), tuple(overs)
