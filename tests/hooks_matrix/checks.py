"""Whether the coordinator's books say what the upstream's log says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from paceline.engine.accounting import UsageKind
from paceline.engine.answers import Answer, Committed, Granted
from paceline.engine.answers import Released as ReleasedAnswer
from paceline.engine.bucket import EndKind
from paceline.engine.dimensions import Dimension
from paceline.engine.operations import Commit, Disposition, Observe, Outcome, Refusal, Release, Renew, Reserve
from paceline.ledger.errors import LedgerError
from paceline.upstream import Call
from paceline.upstream.tokens import count
from tests.hooks_matrix.seen import Seen
from tests.hooks_matrix.situations import Mark
from tests.hooks_matrix.world import World, until

Statistics = Mapping[str, int | float | bool | None]
LEAST, MOST = 0.75, 1.25
"""How far the output of a call that was cut off may be from the text, as parts of it. See ``Mark``."""


def reported(world: World, statistics: Statistics) -> None:
    """Everything was reported, and nothing refused."""
    until(lambda: not world.state.open, "the end of the reservations")
    for name in ("unacknowledged_reports", "refused_reports", "dropped_reports", "waiting", "unreachable"):
        assert statistics.get(name, 0) == 0, name
    assert not world.record.of(Observe)


def books(world: World, marks: Sequence[Mark], seen: Seen, statistics: Statistics, api: str) -> None:
    """One reservation for each attempt, each settled once, as it should be."""
    reported(world, statistics)
    # An attempt that is not sent does not come up in the upstream's log.
    attempts: list[Call | None] = [*world.calls, *[None] * marks.count("not sent")]
    assert len(attempts) == len(marks)
    reserves = world.record.of(Reserve)
    assert len(reserves) == len(marks)
    keys = [operation.key for operation, _ in reserves]
    assert len(set(keys)) == len(keys)
    holds: list[Mapping[Dimension, int]] = []
    for _, granted in reserves:
        assert isinstance(granted, Granted)
        holds.append(dict(granted.context.charges))
    endings: list[tuple[Commit | Release, Answer | LedgerError | None]] = [
        *world.record.of(Commit),
        *world.record.of(Release),
    ]
    assert Counter(operation.key for operation, _ in endings) == Counter(keys)
    by_key = {operation.key: (operation, answer) for operation, answer in endings}
    for key, held, mark, call in zip(keys, holds, marks, attempts, strict=True):
        _ended(world, key, held, mark, call, *by_key[key], seen, api)
    # The catalogue knows no headers of OpenAI's beyond `retry-after`.
    if api == "anthropic" and any(mark in ("final", "partial", "broken") for mark in marks):
        _learned(world)


def _ended(
    world: World,
    key: str,
    held: Mapping[Dimension, int],
    mark: Mark,
    call: Call | None,
    ending: Commit | Release,
    answer: Answer | LedgerError | None,
    seen: Seen,
    api: str,
) -> None:
    if mark == "not sent":
        assert isinstance(ending, Release)
        assert isinstance(answer, ReleasedAnswer)
        assert world.state.ended[key].kind is EndKind.RELEASED
        return
    assert call is not None
    assert isinstance(ending, Commit)
    assert isinstance(answer, Committed)
    assert not any((answer.duplicate, answer.late, answer.stale))
    ended = world.state.ended[key]
    assert ended.kind is EndKind.SETTLED
    charges = dict(answer.charges)
    outcome = ending.outcome
    observation = outcome.observation
    if mark in ("refused", "overloaded"):
        wanted = "refused" if mark == "refused" else "overloaded"
        refusal = Refusal.BUDGET if mark == "refused" else Refusal.OVERLOAD
        assert call.status == wanted
        assert outcome.disposition is Disposition.REJECTED
        assert observation is not None
        assert observation.refusal is refusal
        assert world.stats.refusals[ended.pool, refusal] >= 1
        assert outcome.usage is None
        # By the catalogue failed requests count with OpenAI: what was held stays.
        wanted_charges = {} if api == "anthropic" else held
        for each in (Dimension.REQUESTS, *_TOKENS):
            assert charges.get(each, 0) == wanted_charges.get(each, 0)
        return
    assert call.status == "accepted"
    assert charges[Dimension.REQUESTS] == 1
    if mark == "unknown":
        assert outcome.disposition in (Disposition.ABORTED, Disposition.NO_RESPONSE)
        assert outcome.usage_kind is UsageKind.MISSING
        # What upstream may have counted, as far as anybody knows.
        for dimension in _TOKENS:
            assert charges.get(dimension) == held.get(dimension)
        assert any(charges.get(dimension, 0) > 0 for dimension in _TOKENS)
        return
    if mark == "final":
        _exact(outcome, call, charges, api)
    else:
        _rough(outcome, mark, call, charges, seen, api)
    if call.stream:
        # Not only at the end: as soon as the headers were there.
        early = [operation for operation, _ in world.record.of(Renew) if operation.key == key]
        assert early
        if api == "anthropic":
            assert any(each.observation is not None and each.observation.readings for each in early)


def _exact(outcome: Outcome, call: Call, charges: Mapping[Dimension, int], api: str) -> None:
    """To the token."""
    usage = outcome.usage
    assert usage is not None
    assert outcome.disposition is Disposition.SUCCEEDED
    assert outcome.usage_kind is UsageKind.FINAL
    assert not set(outcome.unknown) - {"cache_write_tokens"}
    assert usage.output_tokens == call.produced
    assert usage.cache_read_tokens == call.cache_read
    if api == "anthropic":
        assert (usage.input_tokens, usage.cache_write_tokens) == (call.input, call.cache_write)
        assert charges[Dimension.INPUT_TOKENS] == call.input + call.cache_write
        assert charges[Dimension.OUTPUT_TOKENS] == call.produced
    else:
        # Writing to its cache costs nothing and is not reported. What it charged at the start it keeps.
        assert usage.input_tokens == call.input + call.cache_write
        assert charges[Dimension.TOKENS] > 0


def _rough(outcome: Outcome, mark: Mark, call: Call, charges: Mapping[Dimension, int], seen: Seen, api: str) -> None:
    """As near as can be."""
    usage = outcome.usage
    assert usage is not None
    assert outcome.disposition is (Disposition.SUCCEEDED if mark == "uncounted" else Disposition.ABORTED)
    assert outcome.usage_kind is UsageKind.PARTIAL
    handed = count("".join(seen.text))
    assert 0 < LEAST * handed <= usage.output_tokens <= MOST * call.produced + 2, (handed, call.produced)
    if mark == "broken" and api == "anthropic":
        # OpenAI's event has a code, and no type that the parsers know.
        assert outcome.observation is not None
        assert outcome.observation.refusal is Refusal.OVERLOAD
    if api == "anthropic":
        truth = (call.input, call.cache_read, call.cache_write)
        assert (usage.input_tokens, usage.cache_read_tokens, usage.cache_write_tokens) == truth
        assert charges[Dimension.INPUT_TOKENS] == call.input + call.cache_write
        assert charges[Dimension.OUTPUT_TOKENS] == usage.output_tokens
    else:
        assert "input_tokens" in outcome.unknown


_TOKENS = (Dimension.INPUT_TOKENS, Dimension.OUTPUT_TOKENS, Dimension.TOKENS)


def _learned(world: World) -> None:
    """The headers were reported: the limits are those of the upstream, and the levels follow its readings."""
    group = world.upstream.account.groups["claude"]
    buckets = {Dimension(bucket.dimension).name.lower(): bucket for bucket in world.buckets()}
    for name, real in group.buckets.items():
        assert buckets[name].amount == real.amount, name
        assert buckets[name].constraint is not None, name
