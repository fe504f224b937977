"""What was decided, or in observe mode would have been, beside what the upstream then did. Not part of the books.

Everything here is soft: it is not journalled, a restart begins at zero, and it is bounded. Nothing that is enforced
depends on it.

How calls are judged that are only observed, :mod:`~paceline.engine.shadow` says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Final

from paceline.engine.answers import Reason, Would
from paceline.engine.bucket import Bucket
from paceline.engine.demand import Demand
from paceline.engine.dimensions import Dimension
from paceline.engine.operations import Disposition, Mode, Outcome, Refusal
from paceline.engine.shadow import Shadow

MAX_DECISIONS: Final = 200_000
"""Calls without an outcome whose decision is remembered; about 100 bytes each. Beyond it the oldest is forgotten."""
MAX_TENANTS: Final = 500
"""Tenants of one pool with rows of their own; the others share one."""
MAX_ROWS: Final = 20_000
"""Rows of all pools; about 1,500 bytes each. Beyond it tenants that are new to a pool share one."""
HINDSIGHT_BOUNDS_US: Final = tuple(
    int(seconds * 1e6)
    for seconds in (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 450, 600)
)
"""Upper bounds of the histogram of waits, in microseconds; one more cell counts what is above."""


class Fate(IntEnum):
    """What a decision was, or would have been."""

    AT_ONCE = 0
    WAITED = 1
    DENIED = 2
    UNKNOWN = 3
    """The call was made without a decision here, or it is no longer remembered."""


class Upstream(IntEnum):
    """What the upstream did with a call."""

    ACCEPTED = 0
    """It answered, at least in part."""
    REFUSED = 1
    """A limit: of its rate, or of what may be spent."""
    OVERLOADED = 2
    FAILED = 3
    UNKNOWN = 4
    """No answer came, or the call was not sent."""


class Row:
    """The counts of one tenant in one pool, under one mode."""

    __slots__ = ("decided", "denials", "observed", "outcomes", "plain", "wait_sum_us", "waits", "worst_wait_us")

    def __init__(self, observed: bool) -> None:
        self.observed = observed
        self.decided = [0] * len(Fate)
        """Calls by fate, when they were decided."""
        self.outcomes = [[0] * len(Upstream) for _ in Fate]
        """Calls whose outcome was reported, by fate and upstream."""
        self.denials: Counter[tuple[Reason, Dimension | None]] = Counter()
        self.waits = [0] * (len(HINDSIGHT_BOUNDS_US) + 1)
        self.wait_sum_us = 0
        self.worst_wait_us = 0
        self.plain = tuple(_Decision(self, fate) for fate in Fate)
        """What is remembered of calls that gave nothing away: one for all."""

    def waited(self, us: int, count: int) -> None:
        """So many calls waited, or would have."""
        self.waits[bisect_left(HINDSIGHT_BOUNDS_US, us)] += count
        self.wait_sum_us += us * count
        self.worst_wait_us = max(self.worst_wait_us, us)


class _Decision:
    """What is remembered of a call until its outcome comes.

    ``amounts`` is what it took from the buckets ``numbers``, if that was given away.
    """

    __slots__ = ("amounts", "fate", "numbers", "row")

    def __init__(self, row: Row, fate: Fate, numbers: tuple[int, ...] = (), amounts: tuple[int, ...] = ()) -> None:
        self.row = row
        self.fate = fate
        self.numbers = numbers
        self.amounts = amounts


class Hindsight:
    """The counts of one ledger, and what it takes to have them."""

    def __init__(self) -> None:
        self.since: int | None = None
        """Ledger time of the first step that counted."""
        self._rows: dict[tuple[str, str | None, Mode | None], Row] = {}
        self._tenants: dict[str, set[str]] = {}
        # Not a dict: the first of one is looked for anew each time, past all that were taken out.
        self._decisions: OrderedDict[str, _Decision] = OrderedDict()
        self.shadow = Shadow()
        self.demand = Demand()

    def begin(self, buckets: Sequence[Bucket], now: int) -> None:
        """Start a step."""
        if self.since is None:
            self.since = now
        self.shadow.begin(buckets, now)
        self.demand.begin(buckets, now)

    def rows(self) -> Iterator[tuple[str, str | None, Mode | None, Row]]:
        """Pool, tenant (``None``: those beyond ``MAX_TENANTS``), mode (``None``: no decision known), counts."""
        for (pool, tenant, mode), row in self._rows.items():
            yield pool, tenant, mode, row

    @property
    def remembered(self) -> int:
        """Calls whose outcome has not come."""
        return len(self._decisions)

    # -- the life of a call -----------------------------------------------------------------------------------------

    def granted(
        self,
        pool: str,
        tenant: str,
        keys: tuple[str, ...],
        numbers: tuple[int, ...],
        holds: tuple[int, ...],
        waited_us: int,
        would: Would | None,
    ) -> None:
        """Calls were granted. ``would`` of ``None``: enforced."""
        self.demand.granted(pool, len(keys), numbers, holds, waited_us, would)
        if would is not None and would.reason is None:
            waited_us = max(waited_us, would.wait_us)
        count = len(keys)
        row = self._row(pool, tenant, Mode.ENFORCE if would is None else Mode.OBSERVE)
        fate = Fate.WAITED if waited_us else Fate.AT_ONCE
        if would is not None and would.reason is not None:
            fate = Fate.DENIED
            row.denials[would.reason, would.binding] += count
        elif waited_us:
            row.waited(waited_us, count)
        row.decided[fate] += count
        for key in keys:
            if fate is Fate.DENIED:
                self._decisions[key] = _Decision(row, fate, numbers, holds)
                self.shadow.denied(numbers, holds)
            else:
                self._decisions[key] = row.plain[fate]
        while len(self._decisions) > MAX_DECISIONS:
            self._decisions.popitem(last=False)

    def denied(self, pool: str, tenant: str, reason: Reason, binding: Dimension | None) -> None:
        """A Reserve was denied in earnest."""
        self.demand.denied(pool, binding)
        row = self._row(pool, tenant, Mode.ENFORCE)
        row.decided[Fate.DENIED] += 1
        row.denials[reason, binding] += 1

    def settled(
        self,
        key: str,
        pool: str,
        tenant: str,
        outcome: Outcome,
        charges: tuple[int, ...] = (),
        forfeits: tuple[int, ...] = (),
        held: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    ) -> None:
        """The outcome of a call came.

        Of one that the books know: its charges and forfeits, in the order of its buckets, and if it was open, the
        numbers of its buckets and its holds.
        """
        self.demand.settled(pool, outcome, held[0], charges)
        decision = self._decisions.pop(key, None)
        if decision is None:
            row = self._row(pool, tenant, None)
            row.decided[Fate.UNKNOWN] += 1
            decision = row.plain[Fate.UNKNOWN]
        upstream = _upstream(outcome)
        row = decision.row
        row.outcomes[decision.fate][upstream] += 1
        if decision.fate is Fate.DENIED:
            if len(decision.numbers) == len(charges):
                self.shadow.unchanged(decision.numbers, decision.amounts, charges, forfeits)
        elif row.observed and upstream is Upstream.REFUSED and held[0]:
            self.shadow.unchanged(*held, charges, forfeits)

    def released(self, key: str, forfeits: tuple[int, ...]) -> None:
        """The call was not made."""
        decision = self._decisions.pop(key, None)
        if decision is not None and decision.numbers:
            self.shadow.unchanged(decision.numbers, decision.amounts, (0,) * len(forfeits), forfeits)

    def expired(self, key: str, charges: tuple[int, ...], forfeits: tuple[int, ...]) -> None:
        """A hold ended without an outcome, which may yet come."""
        decision = self._decisions.get(key)
        if decision is not None and decision.numbers:
            self.shadow.unchanged(decision.numbers, decision.amounts, charges, forfeits)
            decision.amounts = charges

    # -- inside -----------------------------------------------------------------------------------------------------

    def _row(self, pool: str, tenant: str, mode: Mode | None) -> Row:
        row = self._rows.get((pool, tenant, mode))
        if row is not None:
            return row
        tenants = self._tenants.setdefault(pool, set())
        if tenant in tenants or (len(tenants) < MAX_TENANTS and len(self._rows) < MAX_ROWS):
            tenants.add(tenant)
            row = self._rows[pool, tenant, mode] = Row(mode is Mode.OBSERVE)
            return row
        row = self._rows.get((pool, None, mode))
        if row is None:
            row = self._rows[pool, None, mode] = Row(mode is Mode.OBSERVE)
        return row


_REFUSED = frozenset({Refusal.BUDGET, Refusal.SPEND, Refusal.RAMP, Refusal.CONCURRENCY, Refusal.NO_QUOTA})


def _upstream(outcome: Outcome) -> Upstream:
    disposition = outcome.disposition
    refusal = None if outcome.observation is None else outcome.observation.refusal
    if disposition is Disposition.NOT_SENT:
        return Upstream.UNKNOWN
    if refusal in _REFUSED:
        return Upstream.REFUSED
    if refusal is Refusal.OVERLOAD:
        return Upstream.OVERLOADED
    if disposition is Disposition.SUCCEEDED or disposition is Disposition.ABORTED:
        return Upstream.ACCEPTED
    if disposition is Disposition.NO_RESPONSE:
        return Upstream.UNKNOWN
    return Upstream.FAILED
