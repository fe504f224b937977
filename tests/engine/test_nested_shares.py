"""Shares within shares: weights, caps and guarantees hold at every level, also when they change while calls wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.accounting import Estimate, Profile, Rule
from paceline.engine.answers import Denied, Done, Granted, Invalid
from paceline.engine.dimensions import MINUTE_US, SECOND_US, Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.fair import Cost, Costs, Node, Promise, Tree
from paceline.engine.operations import Candidate, DefinePool, DefineShare, Operation, Reserve, SetLimit
from paceline.engine.state import Share, State
from paceline.engine.terms import Part
from tests.engine.world import LEDGER, START_US

PROFILE = Profile("one", (Rule(Dimension.REQUESTS, hold_requests=1000),))
WEIGHTS = st.sampled_from([1, 2, 3, 8])
LONG_US = 3_600 * SECOND_US


def requests(amount: int, burst: int | None = None) -> Limit:
    return Limit(Dimension.REQUESTS, Window.MINUTE, amount, burst)


def part(permille: int) -> Part:
    return Part(Dimension.REQUESTS, Window.MINUTE, permille)


def cost(seconds: float) -> Costs:
    return (Cost(0, seconds, int(seconds * 1_000)),)


class Books:
    """An engine with one pool of 600 requests a minute, of which at most ten are saved up."""

    def __init__(self, *definitions: Operation, amount: int = 600) -> None:
        self.engine = Engine(LEDGER)
        self.now = START_US
        self.granted: list[tuple[int, str, int]] = []
        """When, to which share, and how many calls."""
        self._asked: dict[int, Reserve] = {}
        self._ticket = 0
        self.define(DefinePool("p", PROFILE, (requests(amount, 10),)), *definitions)

    def define(self, *definitions: Operation) -> None:
        for operation in definitions:
            (answer,) = [answer for ticket, answer in self._step(operation) if ticket == self._ticket]
            assert isinstance(answer, Done), answer

    def refused(self, operation: Operation) -> Invalid:
        (answer,) = [answer for ticket, answer in self._step(operation) if ticket == self._ticket]
        assert isinstance(answer, Invalid)
        return answer

    def ask(self, path: str, calls: int = 1, count: int = 1, max_wait_us: int = LONG_US) -> None:
        names = path.split("/")
        shares = tuple("/".join(names[: depth + 1]) for depth in range(len(names)))
        for _ in range(calls):
            candidate = Candidate("p", shares, Estimate(requests=1))
            self._step(
                Reserve(
                    f"svc/{UUID(int=self._ticket)}",
                    (candidate,),
                    tenant=path,
                    max_wait_us=max_wait_us,
                    hold_us=LONG_US,
                    count=count,
                )
            )

    def until(self, at: int) -> None:
        while (wake := self._wake) is not None and wake <= at:
            self.now = wake
            self._step()
        self.now = at
        self._step()

    def service(self, since: int = 0, depth: int = 8) -> Counter[str]:
        found: Counter[str] = Counter()
        for at, path, calls in self.granted:
            if at > since:
                found["/".join(path.split("/")[:depth])] += calls
        return found

    def _step(self, operation: Operation | None = None) -> Sequence[tuple[int, object]]:
        batch: list[tuple[int, Operation]] = []
        if operation is not None:
            self._ticket += 1
            batch.append((self._ticket, operation))
            if isinstance(operation, Reserve):
                self._asked[self._ticket] = operation
        step = self.engine.step(self.now, batch)
        self._wake = step.wake_at
        for ticket, answer in step.answers:
            if isinstance(answer, Granted):
                self.granted.append((self.now, self._asked[ticket].tenant, len(answer.keys)))
        return step.answers


# -- the tree --------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(WEIGHTS, st.lists(st.tuples(WEIGHTS, st.integers(1, 100)), min_size=1, max_size=4)),
        min_size=2,
        max_size=4,
    ),
    st.integers(50, 300),
)
def test_children_share_what_their_parent_gets_by_weight(
    teams: list[tuple[int, list[tuple[int, int]]]], rounds: int
) -> None:
    # Goyal, Vin and Cheng, 1996, theorem 1, at each node: its children's calls are those of all below them.
    tree = Tree()
    sizes: dict[Node, float] = {}
    served: Counter[Node] = Counter()
    groups: list[list[Node]] = [[]]
    for number, (weight, apps) in enumerate(teams):
        team = tree.child(tree.root, number, weight)
        groups[0].append(team)
        groups.append([tree.child(team, place, own) for place, (own, _) in enumerate(apps)])
        sizes |= {leaf: float(size) for leaf, (_, size) in zip(groups[-1], apps, strict=True)}
        sizes[team] = max(sizes[leaf] for leaf in groups[-1])
        for leaf in groups[-1]:
            tree.enter(leaf, 0)
    for _ in range(rounds):
        first = tree.first(0)
        assert first is not None
        tree.charge(first, cost(sizes[first]), 1.0, 0)
        for node in first.path():
            served[node] += int(sizes[first])
    for group in groups:
        for one in group:
            for other in group:
                slack = sizes[one] / one.weight + sizes[other] / other.weight
                assert abs(served[one] / one.weight - served[other] / other.weight) <= slack + 1e-6


@given(WEIGHTS, WEIGHTS, st.integers(1, 60), st.integers(20, 100))
def test_what_a_child_leaves_goes_to_its_sisters_first(mine: int, theirs: int, before: int, after: int) -> None:
    tree = Tree()
    team, other = tree.child(tree.root, "team", mine), tree.child(tree.root, "other", theirs)
    idle, busy, alone = tree.child(team, "idle", 5), tree.child(team, "busy", 1), tree.child(other, "alone")
    for leaf in (idle, busy, alone):
        tree.enter(leaf, 0)

    def serve(count: int) -> Counter[Node]:
        found: Counter[Node] = Counter()
        for _ in range(count):
            leaf = tree.first(0)
            assert leaf is not None
            tree.charge(leaf, cost(1.0), 1.0, 0)
            found[leaf] += 1
        return found

    serve(before)
    tree.leave(idle)
    found = serve(after)
    assert found[idle] == 0
    assert abs(found[busy] / mine - found[alone] / theirs) <= 2 / mine + 2 / theirs


def test_one_that_had_no_weight_does_not_pay_for_that_when_it_gets_some() -> None:
    tree = Tree()
    light, heavy = tree.child(tree.root, "light", 0), tree.child(tree.root, "heavy", 1)
    tree.enter(light, 0)
    for _ in range(3):
        tree.charge(light, cost(1.0), 1.0, 0)
    tree.enter(heavy, 0)
    turns = []
    for number in range(60):
        if number == 20:
            light.reweigh(1)
        leaf = tree.first(0)
        assert leaf is not None
        tree.charge(leaf, cost(1.0), 1.0, 0)
        turns.append(leaf)
    assert turns[:20].count(light) <= 1
    assert abs(turns[20:].count(light) - 20) <= 2


@given(st.integers(50, 900))
def test_a_promised_part_is_kept_whatever_the_limit_is(permille: int) -> None:
    tree = Tree()
    heavy, light = tree.child(tree.root, "heavy", 1_000), tree.child(tree.root, "light", 1)
    light.promise = tree.promises["light"] = Promise({}, parts={0: permille})
    tree.enter(heavy, 0)
    tree.enter(light, 0)
    served: Counter[Node] = Counter()
    for turn in range(1_000):
        # The limit doubles half way: a call is half the time then.
        seconds = 0.01 if turn < 500 else 0.005
        now = int((min(turn, 500) * 0.01 + max(0, turn - 500) * 0.005) * SECOND_US)
        leaf = tree.first(now)
        assert leaf is not None
        tree.charge(leaf, (Cost(0, seconds, 1),), 1.0, now)
        served[leaf] += 1
    assert permille - 4 <= served[light] <= permille + 20


# -- the engine ------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.integers(60, 540), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans())
def test_the_cap_of_a_parent_binds_its_children_together(cap: int, weights: list[int], as_part: bool) -> None:
    permille = cap * 1_000 // 600
    ruling, burst = (permille * 600 // 1_000, permille * 10 // 1_000) if as_part else (cap, max(1, cap // 60))
    team = DefineShare("team", cap_parts=(part(permille),)) if as_part else DefineShare("team", (requests(cap, burst),))
    children = [DefineShare(f"team/{number}", weight=weight) for number, weight in enumerate(weights)]
    books = Books(team, *children, DefineShare("other"))
    books.ask("other", 250)
    for child in children:
        books.ask(child.share, 110)
    books.until(START_US + 20 * SECOND_US)
    found, capped = books.service(START_US, depth=1), ruling / 3
    assert found["team"] <= capped + burst + 1
    assert found["team"] >= min(capped, 100) - 2
    # What the cap leaves is not lost.
    assert found["team"] + found["other"] >= 199
    shares = books.service(START_US)
    for one, its in zip(children, weights, strict=True):
        for other, theirs in zip(children, weights, strict=True):
            assert abs(shares[one.share] / its - shares[other.share] / theirs) <= 1 / its + 1 / theirs


def test_a_weight_that_changes_counts_for_those_who_wait() -> None:
    books = Books(DefineShare("team"), DefineShare("team/a"), DefineShare("team/b"))
    for path in ("team/a", "team/b"):
        books.ask(path, 300)
    books.until(START_US + 20 * SECOND_US)
    before = books.service(START_US)
    assert abs(before["team/a"] - before["team/b"]) <= 2
    books.define(DefineShare("team/b", weight=3, override=True))
    books.until(books.now + 20 * SECOND_US)
    after = books.service(START_US + 20 * SECOND_US)
    assert abs(after["team/b"] - 3 * after["team/a"]) <= 6
    assert sum(after.values()) >= 199


def test_a_guarantee_inside_counts_for_those_who_wait() -> None:
    books = Books(DefineShare("team"), DefineShare("team/a"), DefineShare("team/b"), DefineShare("big", weight=20))
    for path in ("team/a", "team/b", "big"):
        books.ask(path, 300)
    books.until(START_US + 10 * SECOND_US)
    assert books.service(START_US, depth=1)["team"] <= 6
    books.define(DefineShare("team/a", guarantee_parts=(part(400),), override=True))
    books.until(books.now + 20 * SECOND_US)
    after = books.service(START_US + 10 * SECOND_US)
    assert 78 <= after["team/a"] <= 84
    # What its child is promised is not taken from the parent's weight twice: the other child has had less than that.
    assert after["team/b"] <= 3


def test_a_cap_that_changes_counts_for_those_who_wait() -> None:
    books = Books(DefineShare("team"), DefineShare("team/a"))
    books.ask("team/a", 100)
    books.define(DefineShare("team", caps=(requests(60, 1),), override=True))
    since = books.now
    books.until(since + 10 * SECOND_US)
    assert 9 <= books.service(since)["team/a"] <= 11
    books.define(DefineShare("team", override=True))
    since = books.now
    books.until(since + 4 * SECOND_US)
    assert books.service(since)["team/a"] >= 40


def test_a_part_follows_the_limit() -> None:
    books = Books(DefineShare("team", cap_parts=(part(500),)))
    books.ask("team")
    number = books.engine.state.addresses["p", "team", Dimension.REQUESTS, Window.MINUTE]
    bucket = books.engine.state.buckets[number]
    assert (bucket.amount, bucket.burst) == (300, 5)
    books.define(SetLimit("p", Dimension.REQUESTS, requests(100, 1)))
    assert (bucket.amount, bucket.burst, bucket.level) == (50, 1, 1)
    books.define(SetLimit("p", Dimension.REQUESTS, None))
    assert (bucket.amount, bucket.burst) == (300, 5)
    books.define(DefineShare("team", cap_parts=(part(0),), override=True))
    assert (bucket.amount, bucket.burst) == (0, 0)
    assert b"".join(State.restore(books.engine.state.dump()).dump()) == b"".join(books.engine.state.dump())


def test_what_an_operator_says_stays_until_it_is_what_the_file_says() -> None:
    first, second, third = DefineShare("s", weight=1), DefineShare("s", weight=2), DefineShare("s", weight=3)

    def weight() -> tuple[int, bool]:
        share = books.engine.state.shares["s"]
        return share.weight, share.override

    books = Books(first)
    books.define(DefineShare("s", weight=9, override=True))
    assert weight() == (9, True)
    books.define(first)
    assert weight() == (9, True)
    books.define(second)
    books.engine = Engine(LEDGER, State.restore(books.engine.state.dump()))
    assert weight() == (9, True)
    books.define(DefineShare("s", weight=2, override=True))
    assert weight() == (2, False)
    books.define(third)
    assert weight() == (3, False)
    books.define(DefineShare("t", weight=4, override=True), DefineShare("t", weight=5))
    assert books.engine.state.shares["t"].weight == 4


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "a/x", "a/y", "a/x/1", "a/x/2"]),
            st.integers(0, 700),
            st.booleans(),
            st.booleans(),
        ),
        max_size=25,
    )
)
def test_guarantees_never_sum_above_what_they_are_part_of(changes: list[tuple[str, int, bool, bool]]) -> None:
    books = Books()
    shares = books.engine.state.shares
    for name, amount, as_part, capped in changes:
        cap = (requests(500),) if capped else ()
        if as_part:
            operation = DefineShare(name, cap, guarantee_parts=(part(amount),), override=True)
        else:
            operation = DefineShare(name, cap, guarantees=(requests(amount),), override=True)
        before = dict(shares)
        (answer,) = [answer for _, answer in books._step(operation)]
        assert isinstance(answer, Done | Invalid)
        if isinstance(answer, Invalid):
            assert shares == before
            assert answer.field in ("share.guarantees", "share.caps")
        for parent in ("", "a", "b", "a/x"):
            whole = 600.0 if not parent else promised(shares[parent]) if parent in shares else None
            inside = sum(promised(each) for key, each in shares.items() if key.rpartition("/")[0] == parent)
            if whole is not None:
                assert inside <= whole + 1
            if parent in shares and shares[parent].caps:
                assert inside <= 500


def promised(share: Share) -> float:
    return sum(each.amount for each in share.guarantees) + 0.6 * sum(each.permille for each in share.guarantee_parts)


# -- in bulk ---------------------------------------------------------------------------------------------------------


def test_calls_in_bulk_are_granted_together_within_the_cap_of_a_parent() -> None:
    books = Books(DefineShare("team", caps=(requests(300, 8),)), DefineShare("team/a"), DefineShare("team/b"))
    for path in ("team/a", "team/b"):
        books.ask(path, 100, count=4)
    books.until(START_US + MINUTE_US)
    assert {calls for _, _, calls in books.granted} == {4}
    found = books.service(START_US)
    assert abs(found["team/a"] - found["team/b"]) <= 4
    assert 296 <= sum(found.values()) <= 304
    # More than the cap can ever have is denied at once.
    answers = books._step(
        Reserve(f"svc/{UUID(int=0)}", (Candidate("p", ("team",), Estimate(requests=1)),), max_wait_us=LONG_US, count=9)
    )
    assert isinstance(answers[0][1], Denied)
