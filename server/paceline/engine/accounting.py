"""How a provider counts a call: from estimate or usage to one charge per dimension.

A profile is data (see ``paceline.providers``): for each dimension, what is held when the call starts and what
stands when it ends, as weights over the quantities of a call. Weights are in thousandths, so a burndown factor of
5 is ``5000``; charges round up.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from paceline.engine.dimensions import Dimension

WEIGHT_ONE = 1000
TOKENS_PER_PRICE = 1_000_000


class UsageKind(IntEnum):
    """How much a reported usage can be trusted. The numbers are those of ``paceline.v1.UsageKind``."""

    FINAL = 1
    PARTIAL = 2
    MISSING = 3


class Estimate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a call is expected to cost, in the provider's own counting. ``None`` is unknown; zero is zero.

    ``input_tokens`` is what will be counted as uncached input (cache writes included); ``cached_input_tokens`` are
    expected cache reads, beside it. ``max_output_tokens`` is the cap sent upstream.
    """

    requests: int | None = None
    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    output_tokens: int | None = None
    max_output_tokens: int | None = None


class Sizes(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An estimate with every gap filled. Tokens, except ``requests``."""

    requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    max_output_tokens: int


class Usage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a call did cost, as the provider's response states it. Tokens, except ``requests``."""

    requests: int = 1
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0


class Rule(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How one dimension is charged. Weights in thousandths; absent quantities weigh nothing.

    ``settle_as_held`` says that the upstream never corrects the first charge (OpenAI's token limit), ``hold_larger``
    that it first charges the larger of input and output, not both.
    """

    dimension: Dimension
    hold_requests: int = 0
    hold_input: int = 0
    hold_cached: int = 0
    hold_output: int = 0
    hold_max_output: int = 0
    settle_requests: int = 0
    settle_input: int = 0
    settle_cache_read: int = 0
    settle_cache_write: int = 0
    settle_output: int = 0
    settle_as_held: bool = False
    hold_larger: bool = False

    def hold(self, sizes: Sizes) -> int:
        """The charge when the call starts."""
        coming = self.hold_input * sizes.input_tokens + self.hold_cached * sizes.cached_input_tokens
        going = self.hold_output * sizes.output_tokens + self.hold_max_output * sizes.max_output_tokens
        tokens = max(coming, going) if self.hold_larger else coming + going
        return _thousandths(self.hold_requests * sizes.requests + tokens)

    def settle(self, usage: Usage, held: int) -> int:
        """The charge that stands when the call has ended with ``usage``, having held ``held``."""
        if self.settle_as_held:
            return held
        return _thousandths(
            self.settle_requests * usage.requests
            + self.settle_input * usage.input_tokens
            + self.settle_cache_read * usage.cache_read_tokens
            + self.settle_cache_write * usage.cache_write_tokens
            + self.settle_output * usage.output_tokens
        )


class Prices(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Prices in nano-dollars per million tokens ($3 per million tokens is 3,000,000,000)."""

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0

    def cost(self, usage: Usage) -> int:
        """The cost of a call in nano-dollars, rounded up."""
        total = (
            self.input_tokens * usage.input_tokens
            + self.cache_read_tokens * usage.cache_read_tokens
            + self.cache_write_tokens * usage.cache_write_tokens
            + self.output_tokens * usage.output_tokens
        )
        return -(-total // TOKENS_PER_PRICE)

    def expected_cost(self, sizes: Sizes) -> int:
        """The cost of a call of these sizes in nano-dollars, rounded up."""
        total = (
            self.input_tokens * sizes.input_tokens
            + self.cache_read_tokens * sizes.cached_input_tokens
            + self.output_tokens * sizes.output_tokens
        )
        return -(-total // TOKENS_PER_PRICE)


class Profile(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One provider's counting, with the sizes assumed for what a caller leaves out.

    ``estimate_slack`` bounds, in thousandths, by what factor our estimate of a call's input, the upstream's own, and
    what it really was may differ from each other; readings of the limits are interpreted under it.
    """

    name: str
    rules: tuple[Rule, ...]
    default_input_tokens: int = 1_000
    default_output_tokens: int = 1_000
    max_output_tokens: int = 32_000
    estimate_slack: int = 1_500
    refused_counts: bool = False
    """A call refused for its budget counts as a request all the same (OpenAI)."""

    def fill(self, estimate: Estimate) -> Sizes:
        """Fill the gaps of an estimate with this profile's defaults. Zero is not a gap."""
        requests, uncached, output, cap = (
            estimate.requests,
            estimate.input_tokens,
            estimate.output_tokens,
            estimate.max_output_tokens,
        )
        if cap is None:
            cap = self.max_output_tokens
        if output is None:
            output = min(self.default_output_tokens, cap)
        return Sizes(
            1 if requests is None else requests,
            self.default_input_tokens if uncached is None else uncached,
            estimate.cached_input_tokens or 0,
            output,
            cap if cap > output else output,
        )


def expected_usage(sizes: Sizes) -> Usage:
    """The usage that an estimate stands for, to price it and to book a call whose usage stays unknown."""
    return Usage(
        requests=sizes.requests,
        input_tokens=sizes.input_tokens,
        cache_read_tokens=sizes.cached_input_tokens,
        output_tokens=sizes.output_tokens,
    )


def _thousandths(weighted: int) -> int:
    return -(-weighted // WEIGHT_ONE)
