"""A slow and obvious model of the books: it keeps the whole history and replays it for every question.

Nothing here is shared with the engine but its words (dimensions, windows, profiles). There is no running level: a
bucket is the list of everything that ever happened to it, and its level is what a replay gives in which every call
had been charged, from the start, what is now known of it. That is the counterfactual against which a refund may not
credit the same seconds twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction

from paceline.engine.accounting import Prices, Profile, Sizes
from paceline.engine.dimensions import GAUGES, WINDOW_US, Dimension, Window

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Address = tuple[str, str, Dimension, Window]
"""Pool, share, dimension, window. A spend bucket has no pool, a pool's own limit no share."""


def month_starts(after: int, until: int) -> list[int]:
    """The instants in ``(after, until]`` at which a calendar month begins in UTC."""
    at = datetime.fromtimestamp(after // 1_000_000, UTC)
    year, month = at.year, at.month
    starts: list[int] = []
    while True:
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)
        start = int((datetime(year, month, 1, tzinfo=UTC) - EPOCH).total_seconds()) * 1_000_000
        if start > until:
            return starts
        starts.append(start)


@dataclass
class Piece:
    """A charge that was made at one instant, as far as it has not been refunded since."""

    at: int
    amount: int


@dataclass
class Happening:
    """One line of a bucket's history: a charge, a new limit, or a correction."""

    at: int
    piece: Piece | None = None
    call: Call | None = None
    limit: tuple[int, int, Window] | None = None
    shift: int = 0


@dataclass
class Call:
    """A reservation, or usage that came without one."""

    key: str
    granted_at: int
    profile: Profile
    sizes: Sizes
    prices: Prices
    holds: dict[Address, int]
    expires_at: int
    state: str = "open"
    ended_at: int | None = None
    output_so_far: int | None = None
    foreign: bool = False
    """Known from the context of its grant only."""
    pieces: dict[Address, list[Piece]] = field(default_factory=dict)

    def charge(self, address: Address) -> int:
        return sum(piece.amount for piece in self.pieces.get(address, []))


@dataclass
class ModelBucket:
    """One limit's history."""

    address: Address
    created: int
    start: int
    limit: tuple[int, int, Window]
    """Amount, burst and window at first."""
    history: list[Happening] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    grown: bool = False
    """A hold has grown after its grant: the engine may be more careful with refunds than it need be."""

    @property
    def gauge(self) -> bool:
        return self.address[2] in GAUGES

    @property
    def moves(self) -> int:
        """How often the limit has changed: each may round the level by less than one."""
        return sum(line.limit is not None for line in self.history)

    @property
    def held(self) -> int:
        return sum(call.holds.get(self.address, 0) for call in self.calls if call.state == "open")

    @property
    def charged(self) -> int:
        if self.gauge:
            return self.held
        return sum(call.charge(self.address) for call in self.calls)

    def level(self, now: int) -> tuple[Fraction, bool]:
        """The counterfactual level at ``now``, and whether anything was ever lost at the rim on the way."""
        level, at = Fraction(self.start), self.created
        amount, burst, window = self.limit
        spilled = False

        def advance(until: int) -> None:
            nonlocal level, at, spilled
            if window in WINDOW_US:
                level += Fraction(amount * (until - at), WINDOW_US[window])
            elif window is Window.MONTH:
                for turn in month_starts(at, until):
                    level = Fraction(burst - self._open_at(turn))
            if level > burst:
                level, spilled = Fraction(burst), True
            at = until

        for line in self.history:
            advance(line.at)
            if line.limit is not None:
                amount, burst, window = line.limit
            level += line.shift
            if level > burst:
                level, spilled = Fraction(burst), True
            if line.piece is not None and not self.gauge:
                level -= line.piece.amount
        advance(now)
        if self.gauge:
            level -= self.held
        return level, spilled

    def _open_at(self, instant: int) -> int:
        """What calls in flight at ``instant`` (one may end at it), charged before, are now known to cost."""
        return sum(
            piece.amount
            for call in self.calls
            if call.granted_at < instant and (call.ended_at is None or call.ended_at >= instant)
            for piece in call.pieces.get(self.address, [])
            if piece.at < instant
        )


class Books:
    """All buckets and calls of one ledger."""

    def __init__(self) -> None:
        self.buckets: dict[Address, ModelBucket] = {}
        self.calls: dict[str, Call] = {}

    def create(self, address: Address, now: int, start: int, limit: tuple[int, int, Window]) -> None:
        self.buckets[address] = ModelBucket(address, now, start, limit)

    def change(self, address: Address, now: int, limit: tuple[int, int, Window], shift: int) -> None:
        self.buckets[address].history.append(Happening(now, limit=limit, shift=shift))

    def correct(self, address: Address, now: int, shift: int) -> None:
        self.buckets[address].history.append(Happening(now, shift=shift))

    def add(self, call: Call) -> None:
        """Book a new call; its holds become charges at once."""
        self.calls[call.key] = call
        for address, amount in call.holds.items():
            bucket = self.buckets[address]
            bucket.calls.append(call)
            self._charge(call, address, call.granted_at, amount)

    def end(self, call: Call, now: int, state: str, charges: dict[Address, int]) -> None:
        """The call has ended, or ends differently than was thought: ``charges`` is what it cost in all."""
        if call.ended_at is None:
            call.ended_at = now
        call.state = state
        for address, amount in charges.items():
            if address in call.holds:
                self.settle(call, address, now, amount)

    def settle(self, call: Call, address: Address, now: int, amount: int) -> None:
        """Bring the call's charge to ``amount``: more is charged now, less was never charged, last first."""
        excess = call.charge(address) - amount
        if excess < 0:
            self._charge(call, address, now, -excess)
        for piece in reversed(call.pieces.get(address, [])):
            taken = min(piece.amount, max(excess, 0))
            piece.amount -= taken
            excess -= taken

    def _charge(self, call: Call, address: Address, now: int, amount: int) -> None:
        piece = Piece(now, amount)
        call.pieces.setdefault(address, []).append(piece)
        self.buckets[address].history.append(Happening(now, piece=piece, call=call))
