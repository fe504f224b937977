"""A Reserve over several ledgers: which one grants, how long it takes, and that no other keeps anything of it."""

from __future__ import annotations

from random import Random

import pytest

from paceline.engine.answers import Denied, Granted, Reason
from paceline.engine.operations import Release, Reserve
from paceline.frontend.errors import Code, Problem
from paceline.frontend.spread import AGAIN_US, OFFER_US
from paceline.ledger.errors import LedgerUnavailable
from tests.frontend.spread_world import Ask, World

ROUND_US = 2_000
"""There and back."""


def reserves(world: World, name: str) -> int:
    """How often the front end has asked this ledger."""
    return sum(isinstance(each, Reserve) for each in world.fronts[0].router.slots[name].asked)


def test_the_first_that_fits_is_taken_and_no_other_is_asked() -> None:
    world = World({"a": 1, "b": 1})
    one, two = world.ask("x"), world.ask("y")
    world.run(0.1)
    assert (one.granted_by, two.granted_by) == ("a", "b") or (one.granted_by, two.granted_by) == ("b", "a")
    three = world.ask("z")
    world.run(0.1)
    assert isinstance(three.answer, Denied)
    assert three.answer.reason is Reason.LIMIT
    assert three.answer.retry_after_us
    world = World({"a": 5, "b": 5})
    one = world.ask("x")
    world.run(0.1)
    assert one.granted_by == "a"
    assert one.took == ROUND_US
    assert reserves(world, "b") == 0
    assert not world.ledgers["b"].engine.state.ended


def test_the_order_is_the_callers() -> None:
    world = World({"a": 5, "b": 5})
    one = world.ask("x", accounts=("b", "a"))
    world.run(0.1)
    assert one.granted_by == "b"


@pytest.mark.parametrize("first", ["a", "b"])
def test_it_waits_in_all_and_takes_the_first_turn(first: str) -> None:
    world = World({"a": 1, "b": 1})
    world.fill("a")
    world.fill("b")
    one = world.ask("x", wait_s=100)
    world.run(0.1)
    assert [ledger.waiting for ledger in world.ledgers.values()] == [1, 1]
    world.free(first)
    world.run(0.1)
    assert one.granted_by == first
    assert isinstance(one.answer, Granted)
    assert one.answer.waited_us >= 90_000
    assert [ledger.waiting for ledger in world.ledgers.values()] == [0, 0]
    assert world.holders("x") == [first]


def test_of_two_turns_at_once_one_is_kept() -> None:
    world = World({"a": 1, "b": 1})
    world.fill("a")
    world.fill("b")
    one = world.ask("x", wait_s=100)
    world.run(0.1)
    world.free("b")
    world.free("a")
    world.run(0.0005)
    assert sorted(world.holders("x")) == ["a", "b"]
    world.run(0.1)
    assert world.holders("x") == [one.granted_by]


def test_a_wait_that_none_can_meet_is_denied_at_once() -> None:
    world = World({"a": 1, "b": 1})
    world.fill("a")
    world.fill("b")
    one = world.ask("x", wait_s=1)
    world.run(0.1)
    assert isinstance(one.answer, Denied)
    assert one.answer.reason is Reason.LIMIT


def test_a_closed_pool_is_passed_over_and_used_again() -> None:
    world = World({"a": 5, "b": 5})
    world.pause("a")
    one = world.ask("x", wait_s=100)
    world.run(0.1)
    assert one.granted_by == "b"
    assert one.took == 2 * ROUND_US
    world.pause("a", False)
    two = world.ask("y")
    world.run(0.1)
    assert two.granted_by == "a"
    world.pause("a")
    world.pause("b")
    three = world.ask("z", wait_s=100)
    world.run(0.1)
    assert isinstance(three.answer, Denied)
    assert three.answer.reason is Reason.POOL_PAUSED


# -- ledgers that do not answer -----------------------------------------------------------------------------------


def test_an_offer_waits_a_moment_for_a_better_ledger() -> None:
    world = World({"a": 5, "b": 5})
    world.lose("a")
    one = world.ask("x")
    world.run(0.1)
    assert one.answer is None
    world.find("a")
    world.run(0.1)
    assert one.granted_by == "a"
    assert world.holders("x") == ["a"]


def test_an_offer_waits_no_longer_than_that() -> None:
    world = World({"a": 5, "b": 5})
    world.lose("a")
    one = world.ask("x")
    world.run(0.5)
    assert one.granted_by == "b"
    assert one.took == OFFER_US
    # Once a ledger has been away for so long, nobody waits for it.
    two = world.ask("y")
    world.run(0.1)
    assert two.granted_by == "b"
    assert two.took == ROUND_US
    # What it was asked before comes to nothing when it is back.
    world.find("a")
    world.run(0.5)
    assert not world.ledgers["a"].open
    assert world.holders("x") == ["b"]
    three = world.ask("z")
    world.run(0.1)
    assert three.granted_by == "a"


def test_an_owner_that_is_stopped_holds_up_only_the_first() -> None:
    world = World({"a": 5, "b": 5})
    world.ledgers["a"].mute = True
    one = world.ask("x")
    world.run(0.5)
    assert one.granted_by == "b"
    assert OFFER_US <= one.took <= OFFER_US + 2 * ROUND_US
    two = world.ask("y")
    world.run(0.1)
    assert two.granted_by == "b"
    assert two.took == ROUND_US
    world.ledgers["a"].speak()
    world.run(0.1)
    assert not world.ledgers["a"].open
    three = world.ask("z")
    world.run(0.1)
    assert three.granted_by == "a"


def test_a_slow_ledger_is_asked_before_a_call_is_denied() -> None:
    world = World({"a": 1, "b": 5})
    world.fill("a")
    world.fronts[0].spreads.silent.add("b")
    one = world.ask("x")
    world.run(0.1)
    assert one.granted_by == "b"
    assert one.took == 2 * ROUND_US


def test_a_denial_waits_no_longer_for_a_silent_ledger() -> None:
    world = World({"a": 5, "b": 1})
    world.fill("b")
    world.ledgers["a"].mute = True
    one = world.ask("x")
    world.run(0.5)
    assert isinstance(one.answer, Denied)
    assert one.took <= OFFER_US + 2 * ROUND_US
    world.ledgers["a"].speak()
    world.run(0.1)
    assert not world.ledgers["a"].open


def test_a_turn_is_waited_for_where_a_ledger_comes_back() -> None:
    world = World({"a": 5, "b": 1})
    world.fill("b")
    world.lose("a")
    one = world.ask("x", wait_s=100)
    # For longer than operations are kept for it.
    world.run(20)
    assert one.answer is None
    assert world.ledgers["b"].waiting == 1
    world.find("a")
    world.run(AGAIN_US / 1e6 + 0.1)
    assert one.granted_by == "a"
    assert world.ledgers["b"].waiting == 0


def test_where_all_are_away_it_is_said() -> None:
    world = World({"a": 5, "b": 5})
    world.lose("a")
    world.lose("b")
    asks = [world.ask("x"), world.ask("y", wait_s=100)]
    world.run(6)
    assert all(isinstance(ask.answer, LedgerUnavailable) for ask in asks)
    # Whoever asks again under the same id is served.
    world.find("a")
    world.find("b")
    again = world.ask("x")
    world.run(0.1)
    assert again.granted_by == "a"


def test_a_deadline_is_kept_by_no_answer_too() -> None:
    world = World({"a": 5, "b": 5})
    for ledger in world.ledgers.values():
        ledger.mute = True
    one = world.ask("x", wait_s=3)
    world.run(4)
    assert isinstance(one.answer, LedgerUnavailable)
    assert one.took == 3_000_000 + OFFER_US


def test_what_is_to_be_taken_back_is_not_forgotten() -> None:
    world = World({"a": 5, "b": 5})
    world.lose("a")
    world.ask("x")
    world.run(30)
    withdrawals = world.fronts[0].spreads.withdrawals
    assert len(withdrawals) == 1
    world.find("a")
    world.run(20)
    assert len(withdrawals) == 0
    # Its tombstone stands, so that nothing can come after it.
    assert "x" in world.ledgers["a"].engine.state.ended


def test_what_is_to_be_taken_back_is_bounded() -> None:
    world = World({"a": 50, "b": 50})
    withdrawals = world.fronts[0].spreads.withdrawals
    withdrawals.most = 3
    world.lose("a")
    for number in range(10):
        world.ask(f"x{number}")
    world.run(30)
    assert len(withdrawals) == 3
    assert withdrawals.dropped == 7
    # After the holds that they are about, there is nothing to take back.
    world.run(700)
    assert len(withdrawals) == 0


# -- ids ----------------------------------------------------------------------------------------------------------


def test_once_granted_always_that_grant() -> None:
    world = World({"a": 1, "b": 5}, fronts=2)
    world.fill("a")
    one = world.ask("x")
    world.run(0.1)
    assert one.granted_by == "b"
    world.free("a")
    again, elsewhere = world.ask("x"), world.ask("x", front=1)
    world.run(0.1)
    assert again.granted_by == elsewhere.granted_by == "b"
    assert world.holders("x") == ["b"]
    world.ledgers["b"].decide(Release("x"), lambda _: None)
    late = world.ask("x")
    world.run(0.1)
    assert isinstance(late.answer, Denied)
    assert late.answer.reason is Reason.RELEASED


def test_callers_of_one_id_share_the_answer() -> None:
    world = World({"a": 5, "b": 5})
    asks = [world.ask("x"), world.ask("x")]
    world.run(0.1)
    assert [ask.granted_by for ask in asks] == ["a", "a"]


def test_an_id_that_was_used_elsewhere_is_refused() -> None:
    world = World({"a": 5, "b": 5, "c": 5})
    world.ask("x", accounts=("c", "b"))
    world.run(0.1)
    other = world.ask("x", accounts=("a", "b"))
    assert isinstance(other.answer, Problem)
    assert "another account" in other.answer.message


def test_a_withdrawn_one_leaves_nothing() -> None:
    world = World({"a": 1, "b": 1})
    world.fill("a")
    world.fill("b")
    one = world.ask("x", wait_s=100)
    world.run(0.1)
    assert one.spread is not None
    one.spread.withdraw()
    world.run(0.1)
    assert one.answer is None
    assert [ledger.waiting for ledger in world.ledgers.values()] == [0, 0]
    world.free("a")
    world.run(0.1)
    assert world.holders("x") == []
    assert not world.fronts[0].spreads.running


def test_a_release_while_it_waits_is_the_answer() -> None:
    world = World({"a": 1, "b": 1})
    world.fill("a")
    world.fill("b")
    one = world.ask("x", wait_s=100)
    world.run(0.1)
    world.ledgers["a"].decide(Release("x"), lambda _: None)
    world.run(0.5)
    assert isinstance(one.answer, Denied)
    assert one.answer.reason is Reason.RELEASED
    assert [ledger.waiting for ledger in world.ledgers.values()] == [0, 0]


def test_where_one_ledger_gave_it_up_another_may_have_it() -> None:
    world = World({"a": 5, "b": 5})
    world.ask("x")
    world.run(0.1)
    world.ledgers["b"].decide(Release("x"), lambda _: None)
    world.lose("a")
    again = world.ask("x")
    assert isinstance(again.answer, Problem)
    assert again.answer.code is Code.UNAVAILABLE
    world.find("a")
    again = world.ask("x")
    world.run(0.1)
    assert again.granted_by == "a"


def test_two_grants_of_a_lost_front_end_become_one() -> None:
    world = World({"a": 1, "b": 1}, fronts=2)
    world.fill("a")
    world.fill("b")
    world.ask("x", wait_s=100)
    world.run(0.1)
    world.fronts[0].crashed = True
    world.free("b")
    world.free("a")
    world.run(0.1)
    assert sorted(world.holders("x")) == ["a", "b"]
    again = world.ask("x", wait_s=100, front=1)
    world.run(0.1)
    assert again.granted_by == "a"
    assert world.holders("x") == ["a"]


def test_waiters_of_a_lost_front_end_go_with_the_next_grant() -> None:
    world = World({"a": 1, "b": 1}, fronts=2)
    world.fill("a")
    world.fill("b")
    world.ask("x", wait_s=100)
    world.run(0.1)
    world.fronts[0].crashed = True
    world.free("a")
    world.run(0.1)
    assert world.holders("x") == ["a"]
    again = world.ask("x", wait_s=100, front=1)
    world.run(0.1)
    assert again.granted_by == "a"
    world.free("b")
    world.run(0.1)
    assert world.holders("x") == ["a"]
    assert [ledger.waiting for ledger in world.ledgers.values()] == [0, 0]


def test_a_grant_of_a_ledger_that_was_away_is_given_back() -> None:
    """The first attempt was granted there, and nobody heard of it."""
    world = World({"a": 5, "b": 5}, fronts=2)
    world.ask("x")
    world.run(0.0015)
    assert world.holders("x") == ["a"]
    world.fronts[0].crashed = True
    world.lose("a")
    world.run(0.3)
    again = world.ask("x", front=1)
    world.run(0.1)
    assert again.granted_by == "b"
    world.find("a")
    world.run(0.1)
    assert world.holders("x") == ["b"]


# -- at random ----------------------------------------------------------------------------------------------------

SEEDS = 150


@pytest.mark.parametrize("seed", range(SEEDS))
def test_one_grant_at_most_whatever_happens(seed: int) -> None:
    """Owners come and go or stop for a while, callers give up, a front end dies and its callers ask the other one."""
    random = Random(seed)
    names = ["a", "b", "c"][: random.randint(2, 3)]
    world = World({name: random.randint(1, 4) for name in names}, fronts=2, seed=seed)
    asks: list[Ask] = []
    given_up: set[str] = set()
    for number in range(random.randint(5, 25)):
        accounts = random.sample(names, random.randint(2, len(names)))
        wait = random.choice([0, 0, 2, 20, 60])
        asks.append(world.ask(f"x{number}", wait, accounts, random.randrange(2)))
        for _ in range(random.randint(0, 3)):
            _disturb(world, random, asks, given_up)
        world.run(random.choice([0, 0.001, 0.01, 0.3, 2]))
    if random.random() < 0.6:
        # Its messages arrive, its callers need a moment to find the other one.
        lost = [ask for ask in asks if ask.front is world.fronts[0] and ask.answer is None and ask.key not in given_up]
        world.fronts[0].crashed = True
        world.run(0.1)
        asks = [ask for ask in asks if ask not in lost]
        asks += [world.ask(ask.key, 20, ask.accounts, 1) for ask in lost]
    for _ in range(random.randint(0, 6)):
        _disturb(world, random, asks, given_up)
        world.run(random.choice([0.01, 0.3, 6]))
    for name, ledger in world.ledgers.items():
        ledger.speak()
        world.find(name)
    world.run(120)
    # After an error a caller may ask again, and finds what is there.
    unheard = [ask for ask in asks if not isinstance(ask.answer, Granted | Denied) and ask.key not in given_up]
    asks = [ask for ask in asks if ask not in unheard]
    asks += [world.ask(ask.key, 20, ask.accounts, 1) for ask in unheard if not ask.front.crashed]
    world.run(120)
    for ask in asks:
        if ask.front.crashed:
            continue
        holders = world.holders(ask.key)
        if ask.key in given_up:
            assert holders == []
            continue
        assert isinstance(ask.answer, Granted | Denied)
        if isinstance(ask.answer, Granted):
            assert holders == [ask.granted_by]
        else:
            assert holders == []
    # What a front end had to take back from a ledger that was away, when it ended, is left to expire.
    world.run(700)
    assert not any(world.holders(ask.key) for ask in asks)
    assert [ledger.waiting for ledger in world.ledgers.values()] == [0] * len(names)
    alive = [front for front in world.fronts if not front.crashed]
    assert not any(front.spreads.running or len(front.spreads.withdrawals) or front.spreads.silent for front in alive)


def _disturb(world: World, random: Random, asks: list[Ask], given_up: set[str]) -> None:
    name = random.choice(list(world.ledgers))
    ledger = world.ledgers[name]
    kind = random.randrange(6)
    if kind == 0:
        world.lose(name)
    elif kind == 1:
        ledger.speak()
        world.find(name)
    elif kind == 2 and ledger.up:
        world.pause(name, random.random() < 0.5)
    elif kind == 3 and ledger.up:
        ledger.mute = True
    elif kind == 4:
        ledger.speak()
    else:
        waiting = [ask for ask in asks if ask.spread is not None and not ask.front.crashed]
        if waiting:
            ask = random.choice(waiting)
            assert ask.spread is not None
            ask.spread.withdraw()
            ask.spread = None
            given_up.add(ask.key)
