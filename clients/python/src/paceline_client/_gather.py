"""Small items that wait to be merged into one call, and whether merging helps. Without threads, loops or a clock.

Merging saves requests and no tokens. So items are merged while a limit counted in calls is what binds, and go one by
one, at once, while none does or one of tokens binds. What binds is read off the coordinator's answers: a grant that
waited and a denial name the limit; of a grant that did not wait, the limits themselves say which is nearest to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from paceline_client._model import Limit

PER_CALL: Final = frozenset({"requests", "queued_requests", "concurrency"})
"""Dimensions of which a merged call takes no more than each of its items alone."""
PER_TOKEN: Final = frozenset({"input_tokens", "output_tokens", "tokens"})
SCARCE: Final = 0.25
"""Merging begins when less than this part of a full bucket is left."""
PLENTY: Final = 0.5
"""It ends when more than this is left. The distance between the two keeps it from changing with every answer."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far items are merged, and how many may wait."""

    max_items: int
    max_tokens: int
    """Of the items of a call together; one that is larger goes alone. Unit: tokens."""
    max_delay: float
    """How long an item waits for others. Unit: seconds."""
    max_waiting: int

    def __post_init__(self) -> None:
        if self.max_items < 1 or self.max_tokens < 1 or self.max_waiting < 1:
            raise ValueError("max_items, max_tokens and max_waiting must be at least 1")
        if not self.max_delay >= 0:
            raise ValueError("max_delay must not be negative")


@dataclass(slots=True, eq=False)
class Entry:
    """One item."""

    item: Any
    tokens: int
    created: float
    ends: float
    """Nobody waits for it after that. Unit: seconds, as of ``created``."""
    future: Any
    """Of whoever waits. Not shown to anybody here."""
    is_gone: Callable[[], bool]
    """Whether nobody waits for it any more."""


class Gather:
    """What waits, in order of arrival. Every item leaves once: taken, or expired, or gone."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._waiting: deque[Entry] = deque()

    def __len__(self) -> int:
        """With items that are gone, as long as their places are not needed."""
        return len(self._waiting)

    def add(self, entry: Entry) -> bool:
        """Take an item. ``False``: too many wait."""
        if len(self._waiting) >= self._bounds.max_waiting:
            self._waiting = deque(each for each in self._waiting if not each.is_gone())
            if len(self._waiting) >= self._bounds.max_waiting:
                return False
        self._waiting.append(entry)
        return True

    def take(self, now: float, *, merging: bool, flush: bool = False) -> list[Entry]:
        """The items of the next call. Empty: there is none yet. ``flush``: without waiting for more items."""
        waiting, bounds = self._waiting, self._bounds
        self._skip()
        if not waiting:
            return []
        if not merging:
            return [waiting.popleft()]
        chosen: list[Entry] = []
        tokens = passed = 0
        is_full = False
        for entry in waiting:
            if entry.is_gone():
                passed += 1
                continue
            if chosen and tokens + entry.tokens > bounds.max_tokens:
                is_full = True
                break
            chosen.append(entry)
            tokens += entry.tokens
            passed += 1
            if len(chosen) == bounds.max_items or tokens >= bounds.max_tokens:
                is_full = True
                break
        if not is_full and not flush and now < waiting[0].created + bounds.max_delay:
            return []
        for _ in range(passed):
            waiting.popleft()
        return chosen

    def expired(self, now: float) -> list[Entry]:
        """Take out those whose time is over. To be called after :meth:`take`, which may still serve them."""
        found = []
        self._skip()
        while self._waiting and now >= self._waiting[0].ends:
            found.append(self._waiting.popleft())
            self._skip()
        return found

    def due(self, *, merging: bool, free: bool) -> float | None:
        """When to look again, if nothing is added. ``free``: a call could be made now. ``None``: never."""
        self._skip()
        if not self._waiting:
            return None
        first = self._waiting[0]
        if not free:
            return first.ends
        return min(first.created + self._bounds.max_delay, first.ends) if merging else first.created

    def _skip(self) -> None:
        while self._waiting and self._waiting[0].is_gone():
            self._waiting.popleft()


class Sense:
    """Whether merging helps, by the newest answer."""

    def __init__(self) -> None:
        self.merging = False

    def bound(self, dimension: str) -> None:
        """A limit of this dimension made a call wait, or denied it. Empty: not known which."""
        if dimension in PER_CALL:
            self.merging = True
        elif dimension:
            self.merging = False

    def seen(self, limits: Iterable[Limit]) -> None:
        """A call was granted without waiting, and these are the limits that it touches."""
        calls = tokens = 1.0
        for each in limits:
            full = each.burst or each.limit
            if each.level is None or not full:
                continue
            left = each.level / full
            if each.dimension in PER_CALL:
                calls = min(calls, left)
            elif each.dimension in PER_TOKEN:
                tokens = min(tokens, left)
        if self.merging:
            self.merging = calls <= PLENTY and calls <= tokens
        else:
            self.merging = calls < SCARCE and calls <= tokens
