"""Releases that have to reach their ledger, though it may be away now. Times in µs. Used from one event loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from paceline.engine.answers import Answer
from paceline.engine.operations import Release
from paceline.frontend.limits import MAX_ORPHANS
from paceline.frontend.routing import Slot
from paceline.ledger.clock import Clock, Timer
from paceline.ledger.errors import LedgerBusy, LedgerError, LedgerStopped, LedgerUnavailable

RETRY_FIRST_US = 500_000
RETRY_MOST_US = 16_000_000
_AT_ONCE = 256


class _Debt:
    """A Release that no ledger has taken yet."""

    __slots__ = ("attempt", "key", "slot", "until")

    def __init__(self, slot: Slot, key: str, until: int) -> None:
        self.slot = slot
        self.key = key
        self.until = until
        self.attempt = 0


class Withdrawals:
    """Has ledgers give up what they may hold of an id.

    A Release that fails is sent again, until the hold that it is about has expired anyway; beyond ``most`` of those
    at a time the expiry does it.
    """

    def __init__(self, clock: Clock, *, most: int = MAX_ORPHANS) -> None:
        self.dropped = 0
        """Reservations left to expire, since the start."""
        self.closed = False
        """The server stops: what fails now is left to expire."""
        self.most = most
        self._clock = clock
        self._debts: deque[_Debt] = deque()
        self._owed = 0
        self._timer: Timer | None = None

    def __len__(self) -> int:
        """Those that failed once, and that no ledger has taken yet."""
        return self._owed

    def submit(self, slot: Slot, key: str, hold_us: int) -> None:
        """Release an id at a ledger, which may hold it for ``hold_us`` at most."""
        self._release(_Debt(slot, key, self._clock.monotonic() + hold_us), self._heard)

    def close(self) -> None:
        """Try no more."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._owed -= len(self._debts)
        self.dropped += len(self._debts)
        self._debts.clear()

    def _release(self, debt: _Debt, heard: Callable[[_Debt, Answer | LedgerError], None]) -> None:
        debt.slot.submit(Release(debt.key), partial(heard, debt))

    def _heard(self, debt: _Debt, answer: Answer | LedgerError) -> None:
        if not isinstance(answer, LedgerUnavailable | LedgerBusy) or isinstance(answer, LedgerStopped):
            return
        if self._owed >= self.most or self.closed:
            self.dropped += 1
            return
        self._owed += 1
        self._debts.append(debt)
        self._watch(RETRY_FIRST_US)

    def _heard_again(self, debt: _Debt, answer: Answer | LedgerError) -> None:
        self._owed -= 1
        self._heard(debt, answer)

    def _watch(self, us: int) -> None:
        if self._timer is None and self._debts:
            self._timer = self._clock.call_at(self._clock.monotonic() + us, self._retry)

    def _retry(self) -> None:
        """Send the oldest again; those that fail come behind the others."""
        self._timer = None
        now = self._clock.monotonic()
        pause = RETRY_FIRST_US
        for _ in range(min(len(self._debts), _AT_ONCE)):
            debt = self._debts.popleft()
            if debt.until <= now:
                self._owed -= 1
                self.dropped += 1
                continue
            debt.attempt += 1
            pause = max(pause, min(RETRY_MOST_US, RETRY_FIRST_US << min(debt.attempt, 8)))
            self._release(debt, self._heard_again)
        self._watch(pause)
