"""What would let more calls through a pool, computed from what is recorded of its calls and from the catalogue.

Every figure is of recorded calls (:mod:`paceline.engine.demand`), of limits in force, or of the catalogue. What cannot
be known here, such as how much of the prompts repeats, is said and not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from paceline.engine.accounting import WEIGHT_ONE, Profile, Rule, Usage
from paceline.engine.bucket import Bucket
from paceline.engine.demand import Demand, Held, PoolDemand
from paceline.engine.dimensions import Dimension, Window
from paceline.engine.state import Pool, State
from paceline.frontend.learned import held_back, in_force, own_limits
from paceline.frontend.replies import money
from paceline.frontend.view import level, timestamp
from paceline.providers.tiers import Tiers, place_of
from paceline_client.stubs import v1 as pb

LEAST_CALLS: Final = 100
"""Calls that a record needs before it is judged."""
LEAST_HELD: Final = 10
"""Calls that limits must have held back: fewer are chance."""
HIT_RATES_PERMILLE: Final = (500, 800, 960)
MOST_POOLS: Final = 3
"""Other pools that are named."""
_SIGNIFICANT = 0.1
"""A limit that held back a smaller part of the calls than this gets no advice of its own."""
_IDLE = 0.5
"""An idle pool has more than this part of each burst left."""
_TOKENS = (Dimension.INPUT_TOKENS, Dimension.OUTPUT_TOKENS, Dimension.TOKENS)
_MOST_MERGED = 1_000


class Adviser:
    """Advice on the pools of one ledger at one moment."""

    def __init__(self, ledger: str, state: State, demand: Demand, tiers: Tiers, now: int) -> None:
        self._ledger = ledger
        self._state = state
        self._demand = demand
        self._tiers = tiers
        self._now = now

    def advise(self, pool: Pool) -> pb.PoolAdvice:
        """On one pool."""
        message = pb.PoolAdvice(ledger=self._ledger, pool=pool.name)
        record = self._demand.pools.get(pool.name)
        if record is None:
            message.nothing = f"no calls yet: advice needs {LEAST_CALLS}"
            return message
        message.start_time.CopyFrom(timestamp(record.since))
        message.calls = record.decided
        message.held_back.extend(held_back(record))
        _add_usage(message, record)
        held = sum(each.calls for each in record.held.values())
        if record.decided < LEAST_CALLS:
            message.nothing = f"only {record.decided:,} calls so far: advice needs {LEAST_CALLS}"
        elif held < LEAST_HELD:
            message.nothing = self._loose(pool, record, held)
        else:
            message.advice.extend(self._advice(pool, record, held))
            if not message.advice:
                message.nothing = _helpless(record)
        return message

    def _advice(self, pool: Pool, record: PoolDemand, held: int) -> Iterator[pb.Advice]:
        limits = own_limits(self._state, pool)
        ordered = sorted(record.held.items(), key=lambda each: (-each[1].calls, each[0]))
        significant = [(key, found) for key, found in ordered if found.calls >= held * _SIGNIFICANT]
        for (dimension, share), found in significant:
            part = _part_held(dimension, found, held, record)
            if share:
                yield pb.Advice(
                    kind=pb.ADVICE_KIND_SHARE,
                    dimension=pb.Dimension.ValueType(dimension),
                    message=f"a cap of shares, not the pool: raise it; {part}",
                )
            else:
                yield from self._tier(pool.name, limits, dimension, record, part)
        own = [dimension for (dimension, share), _ in significant if not share]
        for dimension in own:
            yield from _caching(pool.profile, dimension, record)
        if own and own[0] is Dimension.REQUESTS:
            yield from _merging(limits, record)
        if own:
            yield from self._other_pools(pool, record)

    def _loose(self, pool: Pool, record: PoolDemand, held: int) -> str:
        """Nothing binds: how full the fullest limit was, on average over the minutes in which calls ended."""
        found = f"nothing binds: limits held back {held:,} of {record.decided:,} calls"
        parts = []
        for bucket in own_limits(self._state, pool):
            total, calls = record.charged.get(bucket.dimension, (0, 0))
            if calls and bucket.window is Window.MINUTE and bucket.amount:
                parts.append((total / max(1, record.minutes) / bucket.amount, _word(bucket.dimension)))
        if not parts:
            return found
        used, dimension = max(parts)
        return f"{found}; the fullest, {dimension}, was used to {_percent(used)} on average"

    # -- the kinds ----------------------------------------------------------------------------------------------

    def _tier(
        self, pool: str, limits: list[Bucket], dimension: Dimension, record: PoolDemand, part: str
    ) -> Iterator[pb.Advice]:
        actual = in_force(limits)
        window = next((each for bound, each in actual if bound is dimension), None)
        if window is None:
            return
        before = actual[dimension, window]
        found = self._tiers.next_above(pool, actual, (dimension, window))
        if found is None or not before:
            return
        name, amounts = found
        after = amounts[dimension, window]
        advice = pb.Advice(
            kind=pb.ADVICE_KIND_TIER, dimension=pb.Dimension.ValueType(dimension), name=name, limit=after
        )
        per = {Window.MINUTE: " a minute", Window.DAY: " a day", Window.MONTH: " a month"}.get(window, "")
        text = f"tier {name}: {_word(dimension)} {after:,} instead of {before:,}{per} ({after / before:.1f} times)"
        bucket = next(each for each in limits if (each.dimension, each.window) == (dimension, window))
        own = bucket.override or (bucket.learned_at is None and self._tiers.is_set(pool, dimension))
        if own:
            text += ", once the lower limit set here is raised too"
        elif name == self._tiers.configured(pool):
            text += ", which is configured, but the upstream gives less"
        outside = {(bucket.dimension, bucket.window): bucket.outside for bucket in limits}
        rates = [_calls_per_minute(each, outside, record) for each in (actual, {**actual, **amounts})]
        now, then = rates
        if now is not None and then is not None:
            advice.calls_per_minute, advice.calls_per_minute_then = now, then
            text += f", so {then:,} instead of {now:,} calls a minute of the mean size"
        advice.message = f"{text}; {part}"
        yield advice

    def _other_pools(self, pool: Pool, record: PoolDemand) -> Iterator[pb.Advice]:
        own = self._tiers.prices(pool.name)
        if not own or not record.used:
            return
        used = Usage(
            record.used,
            record.input_tokens,
            record.cache_read_tokens,
            record.cache_write_tokens,
            record.output_tokens,
        )
        cost = min(prices.cost(used) for prices in own)
        found = []
        for other in self._state.pools.values():
            prices = self._tiers.prices(other.name) if _is_beside(pool.name, other.name) else ()
            then = max((each.cost(used) for each in prices), default=cost + 1)
            if then <= cost and self._is_idle(other):
                found.append((then, other.name))
        # The nearest in price: the most alike.
        for then, name in sorted(found, key=lambda each: (-each[0], each[1]))[:MOST_POOLS]:
            less = "as much as here" if then == cost else f"{_percent(1 - then / cost)} less than here"
            yield pb.Advice(
                kind=pb.ADVICE_KIND_OTHER_POOL,
                name=name,
                cost=money(cost),
                cost_then=money(then),
                message=f"{name} is idle: the recorded tokens cost {_usd(then)} there, {less} ({_usd(cost)})",
            )

    def _is_idle(self, pool: Pool) -> bool:
        limits = own_limits(self._state, pool)
        if not limits or pool.paused or pool.blocked_until > self._now:
            return False
        record = self._demand.pools.get(pool.name)
        if record is not None and any(any(held.lately(self._now)) for held in record.held.values()):
            return False
        return all(level(bucket, self._now) > bucket.burst * _IDLE for bucket in limits)


def _caching(profile: Profile, dimension: Dimension, record: PoolDemand) -> Iterator[pb.Advice]:
    rule = next((rule for rule in profile.rules if rule.dimension is dimension), None)
    read, total = record.cache_read_tokens, record.input_tokens + record.cache_read_tokens + record.cache_write_tokens
    if rule is None or not total or dimension not in (Dimension.INPUT_TOKENS, Dimension.TOKENS):
        return
    fresh, cached, written = _weights(rule)
    minutes = max(1, record.minutes)
    counted = fresh * record.input_tokens + cached * read + written * record.cache_write_tokens
    advice = pb.Advice(kind=pb.ADVICE_KIND_CACHING, dimension=pb.Dimension.ValueType(dimension))
    for permille in HIT_RATES_PERMILLE:
        then = (fresh * (1_000 - permille) + cached * permille) * total // 1_000
        if then < counted:
            advice.caching.add(hit_permille=permille, freed_per_minute=(counted - then) // WEIGHT_ONE // minutes)
    if not advice.caching:
        return
    rates = " / ".join(f"{effect.hit_permille // 10}" for effect in advice.caching)
    freed = " / ".join(f"{effect.freed_per_minute:,}" for effect in advice.caching)
    counts = "do not count" if not cached else f"count {_percent(cached / fresh)}"
    advice.message = (
        f"caching: {_percent(read / total)} of the input was read from the cache, and reads {counts}; at {rates} % "
        f"{freed} of {counted // WEIGHT_ONE // minutes:,} {_word(dimension)} a minute would be free "
        "(how much of the prompts repeats is not known here)"
    )
    yield advice


def _merging(limits: list[Bucket], record: PoolDemand) -> Iterator[pb.Advice]:
    minute = {bucket.dimension: bucket.amount for bucket in limits if bucket.window is Window.MINUTE}
    requests = minute.get(Dimension.REQUESTS, 0)
    parts = []
    for dimension in _TOKENS:
        mean = _mean(record, dimension)
        if mean and minute.get(dimension):
            parts.append((mean * requests / minute[dimension], dimension))
    if not parts or not requests:
        return
    most = max(parts)[0]
    calls = min(int(1 / most), _MOST_MERGED)
    if calls < 2:
        return
    stand = " and ".join(f"{_word(dimension)} at {_percent(part)}" for part, dimension in parts)
    yield pb.Advice(
        kind=pb.ADVICE_KIND_MERGING,
        dimension=pb.DIMENSION_REQUESTS,
        calls_to_merge=calls,
        message=f"merging: with requests used up, {stand} of the limit: up to {calls:,} calls in one would still fit",
    )


# -- figures ------------------------------------------------------------------------------------------------------


def _add_usage(message: pb.PoolAdvice, record: PoolDemand) -> None:
    if record.used:
        message.usage.calls, message.usage.minutes = record.used, record.minutes
        message.usage.input_tokens, message.usage.output_tokens = record.input_tokens, record.output_tokens
        message.usage.cache_read_tokens = record.cache_read_tokens
        message.usage.cache_write_tokens = record.cache_write_tokens


def _helpless(record: PoolDemand) -> str:
    (dimension, _), found = max(record.held.items(), key=lambda each: (each[1].calls, each[0]))
    return (
        f"{_word(dimension)} held back {found.calls:,} of {record.decided:,} calls, and nothing known here would help: "
        "no higher tier, no caching, no merging, no idle pool that costs no more"
    )


def _part_held(dimension: Dimension, found: Held, held: int, record: PoolDemand) -> str:
    minutes = f"{found.minutes:,} {'minute' if found.minutes == 1 else 'minutes'}"
    return (
        f"{_word(dimension)} held back {found.calls:,} of {record.decided:,} calls in {minutes}, "
        f"{_percent(found.calls / held)} of all that waited or were denied for a limit"
    )


def _mean(record: PoolDemand, dimension: Dimension) -> float | None:
    """The mean charge of a call; ``None``: not known."""
    total, calls = record.charged.get(dimension, (0, 0))
    return total / calls if calls else None


def _calls_per_minute(
    amounts: Mapping[tuple[Dimension, Window], int], outside: Mapping[tuple[Dimension, Window], int], record: PoolDemand
) -> int | None:
    """How many calls of the mean size fit into the limits per minute; ``None``: not known."""
    rates = []
    for (dimension, window), amount in amounts.items():
        total, calls = record.charged.get(dimension, (0, 0))
        if window is Window.MINUTE and total:
            rates.append((amount - outside.get((dimension, window), 0)) * calls // total)
    return min(rates, default=None)


def _weights(rule: Rule) -> tuple[int, int, int]:
    """What uncached input, cache reads and cache writes count, in thousandths."""
    if rule.settle_as_held:
        return rule.hold_input, rule.hold_cached, rule.hold_input
    return rule.settle_input, rule.settle_cache_read, rule.settle_cache_write


def _is_beside(pool: str, other: str) -> bool:
    """Whether another pool is one of the same account and region, of other models."""
    here, there = place_of(pool), place_of(other)
    rest, other_rest = (name.split("/", 2)[-1].partition(";")[2] for name in (pool, other))
    return here[:2] == there[:2] and here.base != there.base and rest == other_rest and "@" not in pool + other


def _word(dimension: Dimension) -> str:
    return dimension.name.lower()


def _percent(part: float) -> str:
    """Rounded, but never to nothing what is something."""
    percent = part * 100
    return f"{percent:.1f} %" if 0 < percent < 1 else f"{percent:.0f} %"


def _usd(nanos: int) -> str:
    return f"${nanos / 1e9:,.2f}"
