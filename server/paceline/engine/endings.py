"""An ordered map that no single step has to walk, copy or rehash whole, however many entries it has.

Entries lie in pages, in the order in which their keys came. Where a key lies, many small dictionaries say, each for a
part of the hashes, so that none grows large enough for its growing to be felt. A frozen view names the pages as they
are; a page that one may still read is copied before it is changed (copy-on-write).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, ValuesView
from itertools import chain
from typing import TypeVar, overload

PAGE_ENTRIES = 1_000
"""At most, in one page: as much is copied at once."""
PARTS = 256
"""Of the index. A power of two."""

V = TypeVar("V")
D = TypeVar("D")


class Endings(MutableMapping[str, V]):
    """A map by id, in the order of insertion: a key that is set again keeps its place."""

    __slots__ = ("_last", "_newest", "_pages", "_parts", "_shared", "_size")

    def __init__(self) -> None:
        self._newest: dict[str, V] = {}
        """The last page, which takes what is new. No frozen view reads it."""
        self._last = 0
        self._pages: dict[int, dict[str, V]] = {0: self._newest}
        """By number, ascending. None is empty but the last."""
        self._parts: list[dict[str, int]] = [{} for _ in range(PARTS)]
        """The page of each key."""
        self._shared: set[int] = set()
        """Pages that a frozen view may read."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: object) -> bool:
        return key in self._parts[hash(key) % PARTS]

    def __getitem__(self, key: str) -> V:
        return self._pages[self._parts[hash(key) % PARTS][key]][key]

    @overload
    def get(self, key: str, /) -> V | None: ...
    @overload
    def get(self, key: str, default: V | D, /) -> V | D: ...
    def get(self, key: str, default: V | D | None = None, /) -> V | D | None:
        number = self._parts[hash(key) % PARTS].get(key)
        return default if number is None else self._pages[number][key]

    def __setitem__(self, key: str, value: V) -> None:
        part = self._parts[hash(key) % PARTS]
        number = part.get(key)
        if number is not None:
            self._own(number)[key] = value
            return
        if len(self._newest) >= PAGE_ENTRIES:
            self._turn_page()
        part[key] = self._last
        self._newest[key] = value
        self._size += 1

    def __delitem__(self, key: str) -> None:
        number = self._parts[hash(key) % PARTS].pop(key)
        self._size -= 1
        page = self._own(number)
        del page[key]
        if not page and number != self._last:
            del self._pages[number]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._pages.values())

    def values(self) -> _Values[V]:
        return _Values(self)

    def pages(self) -> Iterable[dict[str, V]]:
        """The entries in their order, some at a time. Not to be changed, neither they nor the map meanwhile."""
        return self._pages.values()

    def backwards(self) -> Iterator[V]:
        """The values, the newest first."""
        return chain.from_iterable(reversed(page.values()) for page in reversed(self._pages.values()))

    def frozen(self) -> Iterator[tuple[str, V]]:
        """The entries as they are at the call, whatever becomes of the map while they are taken.

        Costs one reference to each page; what it has passed it lets go.
        """
        left = list(reversed(self._pages.values()))
        self._shared = set(self._pages)
        self._turn_page()

        def entries() -> Iterator[tuple[str, V]]:
            while left:
                yield from left.pop().items()

        return entries()

    def dissolve(self) -> Iterator[None]:
        """Let go of everything, a page at a time; the map is not to be used any more."""
        self._newest = {}
        while self._pages:
            self._pages.popitem()
            yield
        while self._parts:
            self._parts.pop()
            yield

    def _turn_page(self) -> None:
        if not self._newest:
            del self._pages[self._last]
        self._last += 1
        self._newest = self._pages[self._last] = {}

    def _own(self, number: int) -> dict[str, V]:
        """A page, to be changed."""
        page = self._pages[number]
        if number in self._shared:
            self._shared.remove(number)
            page = self._pages[number] = dict(page)
        return page


class _Values(ValuesView[V]):
    _mapping: Endings[V]

    def __iter__(self) -> Iterator[V]:
        return chain.from_iterable(page.values() for page in self._mapping.pages())

    def __reversed__(self) -> Iterator[V]:
        return self._mapping.backwards()
