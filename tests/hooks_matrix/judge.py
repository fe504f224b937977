"""One cell of the matrix: the call without the hook, the call with it, and what must hold between the two."""

from __future__ import annotations

from collections.abc import Callable

from paceline.engine.operations import Commit, Release, Reserve
from paceline_client import Denied, Unavailable
from tests.hooks_matrix.application import Mode, Sdk, Statistics, make
from tests.hooks_matrix.checks import books, reported
from tests.hooks_matrix.seen import Seen
from tests.hooks_matrix.situations import Form, Situation
from tests.hooks_matrix.world import POOLS, TINY, Background, Record, World, until, world


def judge(background: Background, sdk: Sdk, mode: Mode, form: Form, situation: Situation) -> tuple[Seen, Record]:
    """Raises :class:`AssertionError` where the hook does not keep its word."""
    with world(background, situation.scenario, None, sdk.api) as bare_world:
        bare, _ = make(sdk, mode, form, situation, bare_world, hooked=False)
        bare.attempts = len(bare_world.calls)
    assert (bare.error is not None) == (situation.fails and situation.coordinator == "there"), bare.error
    pools = TINY if situation.coordinator == "denies" else POOLS
    with world(background, situation.scenario, pools, sdk.api) as found:
        seen, statistics = make(sdk, mode, form, situation, found, hooked=True)
        if situation.coordinator == "there":
            until(lambda: all(call.ended or call.status != "accepted" for call in found.calls), "the upstream's end")
        seen.attempts = len(found.calls)
        _JUDGES[situation.coordinator](found, sdk, form, situation, bare, seen, statistics)
        return seen, found.record


def _there(
    world: World, sdk: Sdk, form: Form, situation: Situation, bare: Seen, seen: Seen, statistics: Statistics
) -> None:
    if situation.is_rough and form == "stream":
        assert seen.rough == bare.rough
    else:
        assert seen.whole == bare.whole
    books(world, situation.marks[form], seen, statistics, sdk.api)


def _denies(
    world: World, sdk: Sdk, form: Form, situation: Situation, bare: Seen, seen: Seen, statistics: Statistics
) -> None:
    error = seen.error
    assert isinstance(error, Denied)
    assert isinstance(error, sdk.refusal)
    assert getattr(error, "status_code", None) == 429
    assert error.reason
    assert error.reason in str(error)
    assert not seen.attempts
    # The SDK did not try again.
    assert len(world.record.of(Reserve)) == 1
    assert not world.record.of(Commit)
    assert not world.record.of(Release)
    reported(world, statistics)


def _away(
    world: World, sdk: Sdk, form: Form, situation: Situation, bare: Seen, seen: Seen, statistics: Statistics
) -> None:
    """Nobody is there: as without the hook."""
    first = situation.coordinator == "stops"
    assert seen.attempts == bare.attempts + first
    if first:
        # The numbers of the answers are those of the second call.
        seen.other[0], seen.attempts = bare.other[0], bare.attempts
    assert seen.whole == bare.whole
    assert len(world.record.of(Reserve)) == int(first)
    assert int(statistics["unreachable"] or 0) > 0


def _goes(
    world: World, sdk: Sdk, form: Form, situation: Situation, bare: Seen, seen: Seen, statistics: Statistics
) -> None:
    """The call does not notice. Nobody is there to report to: its hold will expire, and a late report replaces it."""
    assert (seen.rough if form == "stream" else seen.whole) == (bare.rough if form == "stream" else bare.whole)
    assert seen.attempts == len(world.record.of(Reserve)) == 1
    assert statistics["refused_reports"] == statistics["dropped_reports"] == 0
    if not world.record.of(Commit):
        assert int(statistics["unacknowledged_reports"] or 0) > 0


def _closed(
    world: World, sdk: Sdk, form: Form, situation: Situation, bare: Seen, seen: Seen, statistics: Statistics
) -> None:
    error = seen.error
    assert isinstance(error, Unavailable)
    assert {"APIConnectionError", "APIStatusError"} <= {each.__name__ for each in type(error).__mro__}
    assert not seen.attempts
    # The SDK did not try again.
    assert statistics["unreachable"] == 1


_JUDGES: dict[str, Callable[[World, Sdk, Form, Situation, Seen, Seen, Statistics], None]] = {
    "there": _there,
    "denies": _denies,
    "open": _away,
    "stops": _away,
    "goes": _goes,
    "closed": _closed,
}
