"""The tree of turns keeps what start-time fair queueing promises: service by weight, within one call of each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.dimensions import SECOND_US
from paceline.engine.fair import Cost, Costs, Node, Promise, Tree

WEIGHTS = st.sampled_from([1, 2, 3, 8, 64])


def cost(seconds: float, number: int = 0) -> Costs:
    return (Cost(number, seconds, int(seconds * 1_000)),)


def tree_of(weights: list[int]) -> tuple[Tree, list[Node]]:
    tree = Tree()
    return tree, [tree.child(tree.root, number, weight) for number, weight in enumerate(weights)]


@given(
    st.lists(st.tuples(WEIGHTS, st.integers(1, 300)), min_size=2, max_size=8),
    st.integers(20, 300),
)
def test_those_that_always_wait_are_served_by_weight(flows: list[tuple[int, int]], rounds: int) -> None:
    # The bound of Goyal, Vin and Cheng, 1996, theorem 1: one call of each is all that lies between any two.
    tree, leaves = tree_of([weight for weight, _ in flows])
    served = [0.0] * len(flows)
    for leaf in leaves:
        tree.enter(leaf, 0)
    for _ in range(rounds):
        first = tree.first(0)
        assert first is not None
        number = leaves.index(first)
        tree.charge(first, cost(flows[number][1]), 1.0, 0)
        served[number] += flows[number][1]
    normal = [done / weight for done, (weight, _) in zip(served, flows, strict=True)]
    slack = [size / weight for weight, size in flows]
    for one in range(len(flows)):
        for other in range(one):
            assert abs(normal[one] - normal[other]) <= slack[one] + slack[other] + 1e-6


@given(st.integers(1, 50), st.integers(1, 50))
def test_who_did_not_wait_saved_nothing(alone: int, together: int) -> None:
    tree, (one, other) = tree_of([1, 1])
    tree.enter(one, 0)
    for _ in range(alone):
        tree.charge(one, cost(1.0), 1.0, 0)
    tree.enter(other, 0)
    turns = []
    for _ in range(2 * together):
        leaf = tree.first(0)
        assert leaf is not None
        turns.append(leaf)
        tree.charge(leaf, cost(1.0), 1.0, 0)
    assert abs(turns.count(one) - turns.count(other)) <= 1


def test_many_small_and_few_huge_calls_have_the_same_dominant_share() -> None:
    tree, (small, huge) = tree_of([1, 1])
    tree.enter(small, 0)
    tree.enter(huge, 0)
    had = {small: 0.0, huge: 0.0}
    # Requests are what the small ones use most of, tokens the huge ones.
    small_costs, huge_costs = (Cost(0, 0.02, 1), Cost(1, 0.001, 100)), (Cost(0, 0.02, 1), Cost(1, 1.0, 100_000))
    for _ in range(5_000):
        leaf = tree.first(0)
        assert leaf is not None
        costs = small_costs if leaf is small else huge_costs
        tree.charge(leaf, costs, 1.0, 0)
        had[leaf] += max(each.seconds for each in costs)
    assert abs(had[small] - had[huge]) <= 1.02


def test_a_promise_goes_before_weight() -> None:
    tree, (heavy, light) = tree_of([1_000, 1])
    light.promise = tree.promises["light"] = Promise({0: 600})
    tree.enter(heavy, 0)
    tree.enter(light, 0)
    served = {heavy: 0.0, light: 0.0}
    for now in range(0, 60 * SECOND_US, SECOND_US // 100):
        leaf = tree.first(now)
        assert leaf is not None
        # A hundred units a second, six thousand a minute; six hundred a minute are promised.
        tree.charge(leaf, (Cost(0, 0.01, 1),), 1.0, now)
        served[leaf] += 1
    assert 600 <= served[light] <= 620


def test_what_is_corrected_comes_off_the_next_turns() -> None:
    tree, (one, other) = tree_of([1, 1])
    tree.enter(one, 0)
    tree.enter(other, 0)
    tree.charge(one, cost(1.0), 1.0, 0)
    tree.charge(other, cost(1.0), 1.0, 0)
    tree.correct(one, cost(3.0))
    turns = []
    for _ in range(4):
        leaf = tree.first(0)
        assert leaf is not None
        turns.append(leaf)
        tree.charge(leaf, cost(1.0), 1.0, 0)
    assert turns[:3] == [other] * 3


def test_one_set_aside_keeps_its_place() -> None:
    tree, (one, other) = tree_of([1, 1])
    tree.enter(one, 0)
    tree.enter(other, 0)
    first = tree.first(0)
    assert first is one
    tree.set_aside(first)
    for _ in range(3):
        assert tree.first(0) is other
        tree.charge(other, cost(1.0), 1.0, 0)
    tree.take_back()
    assert tree.first(0) is one
