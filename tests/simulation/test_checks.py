"""What the checks count as accepted, and as lost as stated."""

from __future__ import annotations

import msgspec

from paceline.engine.accounting import Estimate
from paceline.engine.answers import Denied, Granted, Touched
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import Candidate, DefinePool, Operation, Release, Reserve
from paceline.ledger.errors import LedgerUnavailable
from paceline.ledger.journal import Record, genesis
from paceline.ledger.lease import Head
from tests.simulation.checks import ANSWER_US
from tests.simulation.clock import START_WALL
from tests.simulation.network import Asked
from tests.simulation.workload import PATIENCE_US, PROFILE, Call
from tests.simulation.world import World

NONCE = b"n" * 16


def records(world: World, count: int) -> list[Record]:
    """A chain of sealed records."""
    chain: list[Record] = []
    previous = genesis("acme")
    for seq in range(1, count + 1):
        record = Record.sealed(seq, 1, seq, seq, previous, b"")
        world.store.sealed[record.hash] = record
        chain.append(record)
        previous = record.hash
    return chain


def head_at(record: Record) -> Head:
    origin = genesis("acme")
    return Head(1, NONCE, "node-0", "", record.seq, record.hash, 0, 0, 0, 0, 0, origin, "primary-1", 1)


def test_books_put_back_whole_are_accepted_with_all_that_was_never_written_alone() -> None:
    world = World(1)
    primary = world.store.primary
    chain = records(world, 3)
    primary.accepted.append(("acme", chain[0], 1, NONCE, 5))
    empty = msgspec.structs.replace(head_at(chain[0]), seq=0, hash=genesis("acme"))
    world.checks.wrote(primary, "acme", empty, head_at(chain[2]), None)
    assert [record for _, record, *_ in primary.accepted] == chain
    world.checks.wrote(primary, "acme", empty, head_at(chain[2]), None)
    assert len(primary.accepted) == 3


def test_who_goes_on_after_letting_go_may_lose_nothing() -> None:
    world = World(1)
    primary = world.store.primary
    first, second = records(world, 2)
    released = msgspec.structs.replace(head_at(first), successor="node-1")
    world.checks.wrote(primary, "acme", head_at(first), released, None)
    assert NONCE in world.checks.released
    world.checks.wrote(primary, "acme", released, head_at(second), second)
    assert NONCE not in world.checks.released


def test_what_only_a_primary_without_office_had_is_lost_with_its_owner_alone() -> None:
    world = World(1)
    old = world.store.primary
    (record,) = records(world, 1)
    world.checks.wrote(old, "acme", None, head_at(record), None)
    world.store.fail_over(0, old_for=["node-0"])
    accepted_at = old.superseded_at + 1
    old.ended_at = accepted_at + 1
    assert not world.checks._was_left_alone(old, NONCE, accepted_at)
    assert not world.checks._was_left_alone(old, NONCE, old.superseded_at)
    world.ended[""] = old.ended_at
    assert world.checks._was_left_alone(old, NONCE, accepted_at)


def test_an_answer_is_late_behind_a_silent_line_an_append_and_the_time_away_together() -> None:
    world = World(1)
    call = Call("id/0", "acme", "client-0", 1, 0)
    asked = Asked(world.network, "client-0", "node-1", lambda host, back: None, lambda answer: None)
    error = LedgerUnavailable("nobody decides")
    # 2.5 s, 3 s and 5 s, of which each may come behind the other.
    world.loop.now = 4_000_000 + 10_500_000
    world.checks.heard(call, asked, error, 1_000_000, 3_000_000)
    assert not world.checks.violations
    world.loop.now = 4_000_000 + ANSWER_US + 1
    world.checks.heard(call, asked, error, 1_000_000, 3_000_000)
    assert len(world.checks.violations) == 1
    # A caller that has heard nothing by then takes its node for dead: the bound must come before that.
    assert ANSWER_US < PATIENCE_US


def decide(world: World, engine: Engine, at: int, *operations: Operation) -> None:
    """One step at ``at`` µs, of which the checks hear, and callers of what they were granted."""
    world.loop.now = at
    batch = list(enumerate(operations))
    step = engine.step(START_WALL + at, batch)
    calls = {one.key: Call(one.key, "acme", "client-0", 0, at) for one in operations if isinstance(one, Reserve)}
    for call in calls.values():
        world.checks.began(call)
    world.checks.stepped(world.nodes[0], engine, batch, step)
    for _, answer in step.answers:
        if isinstance(answer, Granted):
            world.checks.granted(calls[answer.keys[0]], answer)


def test_what_is_granted_and_given_back_at_one_instant_is_not_missing() -> None:
    def reserve(key: str) -> Reserve:
        return Reserve(key, (Candidate("pool", (), Estimate(1)),), hold_us=60_000_000)

    world = World(1)
    checks, engine = world.checks, Engine("acme")
    decide(world, engine, 0, DefinePool("pool", PROFILE, (Limit(Dimension.REQUESTS, Window.MINUTE, 60, 6),)))
    decide(world, engine, 1, reserve("older"))
    # Full again: of the six in it three are taken twice. That the older one is given back adds nothing.
    mine = [f"mine/{number}" for number in range(3)]
    others = [reserve(f"other/{number}") for number in range(6)]
    given_back = [Release(key) for key in (*mine, "older")]
    decide(world, engine, 5_000_000, *(reserve(key) for key in mine), *given_back, *others, reserve("too many"))
    told = {key for key, one in checks.told.items() if one.granted is not None}
    assert told == {"older", *mine, *(one.key for one in others)}
    for one in checks.told.values():
        one.served_at = one.granted_at if one.granted is not None else None
    checks._check_refill("acme", engine.state, {})
    assert not checks.violations
    # Had there been room for four, two of the six were not there.
    bucket = next(bucket for bucket in engine.state.buckets if bucket.pool)
    bucket.burst -= 2
    checks._check_refill("acme", engine.state, {})
    (violation,) = checks.violations
    assert "was granted 2 more REQUESTS than there was" in violation


def test_a_denial_is_of_the_owner_that_a_store_without_its_successor_confirms_again() -> None:
    world = World(1)
    checks, engine, origin = world.checks, Engine("acme"), genesis("acme")
    first = Head(1, NONCE, "node-0", "", 0, origin, 0, 0, 0, 0, 0, origin, "primary-1", 1)
    second = msgspec.structs.replace(first, epoch=2, nonce=b"2" * 16, node="node-1")
    checks.wrote(world.store.primary, "acme", None, first, None)
    limit = Limit(Dimension.REQUESTS, Window.MINUTE, 60, 6)
    decide(world, engine, 1, DefinePool("pool", PROFILE, (limit,)))
    world.loop.now = 4_000_000
    checks.wrote(world.store.primary, "acme", first, second, None)
    # It has not heard of its successor: the answer waits until its lease is confirmed.
    decide(world, engine, 5_000_000, Reserve("late", (Candidate("pool", (), Estimate(7)),), hold_us=60_000_000))
    ((_, _, reason),) = checks.denials["late"]
    call, denied = checks.calls["late"], Denied(reason, "pool", Dimension.REQUESTS, None, Touched())
    checks.denied(call, denied)
    assert len(checks.violations) == 1
    # The store is emptied meanwhile. An office that node-0 has taken since says nothing of what it decided before.
    world.loop.now = 5_100_000
    world.store.restart(empty=True)
    checks.wrote(world.store.primary, "acme", None, msgspec.structs.replace(first, nonce=b"3" * 16), None)
    checks.denied(call, denied)
    assert len(checks.violations) == 2
    world.loop.now = 5_200_000
    checks.wrote(world.store.primary, "acme", None, first, None)
    checks.denied(call, denied)
    assert len(checks.violations) == 2
