"""Tokens of a text: the simulator's own count, the estimate at arrival, and filler of an exact size.

The count is ``words + characters that are no space ÷ 11 + ⅓ per byte beyond ASCII``: English prose comes to about four
characters per token, code is denser, and half a megabyte takes a few milliseconds. It stands for a tokenizer; nothing
here may be taken for what a real one says.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

PIECE = 11
"""Characters of a word that make one more token."""

IMAGE = 1_500
"""An image, whatever its size."""
PER_MESSAGE = 3
"""What the frame of a message costs."""
FOR_TOOLS = 300
"""What having tools at all costs."""


class Chance(Protocol):
    """The part of ``random.Random`` that is used here: whoever calls brings the randomness."""

    def random(self) -> float: ...
    def lognormvariate(self, mu: float, sigma: float) -> float: ...


def count(text: str) -> int:
    """Tokens of a text: the truth of this simulator."""
    if not text:
        return 0
    solid = len(text) - text.count(" ") - text.count("\n")
    found = len(text.split()) + solid // PIECE
    if not text.isascii():
        found += (len(text.encode("utf-8", "surrogatepass")) - len(text)) // 3
    return found


def estimate(size: int, images: int = 0) -> int:
    """What the upstream assumes on arrival of ``size`` bytes of content, before anything is tokenized."""
    return -(-size // 4) + images * IMAGE


def bent(figure: int, spread: float, chance: Chance) -> int:
    """``figure`` off by up to ``spread`` (0.1: ±10 %)."""
    return max(1, round(figure * (1 + spread * (2 * chance.random() - 1)))) if spread and figure else figure


# Lengths as in prose. None is longer than a piece, so the count rises by one or two with each word.
_WORDS = """
    the of and a to in is was he for it with as his on be at by had not are but from or have an they which one you
    were all her she there would their we him been has when who will no more if out so up said what its about than
    into them can only other time new some could these two may first then do any like my now over such our man me
    even most made after also did many off before must well back through years much where your way down should
    because long each just state those people mister how too little world still nation hand old life tell write
    between another while against without however government different important developed informing experience
    something including following themselves yesterday companies president certainly beginning questions
    organised particular understand situation available community
""".split()  # noqa: SIM905


def _corpus(words: int) -> tuple[str, ...]:
    """A fixed sequence without rhythm (a linear congruential generator)."""
    state, found = 12345, []
    for _ in range(words):
        state = (state * 1103515245 + 12345) % 2**31
        found.append(_WORDS[(state >> 8) % len(_WORDS)])
    return tuple(found)


_PERIOD = 4_096
_CORPUS = _corpus(_PERIOD) * 2
_SIZES = (0, *accumulate(map(len, _CORPUS)))


def text_of(tokens: int, chance: Chance) -> str:
    """Filler whose :func:`count` is exactly ``tokens``."""
    return _filler(tokens, int(chance.random() * _PERIOD))


def _filler(tokens: int, start: int) -> str:
    if tokens <= 0:
        return ""
    base = _SIZES[start]
    period = _SIZES[_PERIOD]

    def solid(words: int) -> int:
        cycles, rest = divmod(words, _PERIOD)
        return cycles * period + _SIZES[start + rest] - base

    # The last size that is not too big is at most one short.
    words = bisect_right(range(tokens + 1), tokens, key=lambda number: number + solid(number) // PIECE) - 1
    cycles, rest = divmod(words, _PERIOD)
    parts = [*(_CORPUS[start : start + _PERIOD] * cycles), *_CORPUS[start : start + rest]]
    if words + solid(words) // PIECE < tokens:
        if parts and solid(words) % PIECE == PIECE - 1:
            parts[-1] += "s"
        else:
            parts.append("a")
    return " ".join(parts)


def sample(tokens: int) -> str:
    """The same filler for the same size: the text of answers."""
    return _kept(tokens) if tokens <= _KEPT else _filler(tokens, tokens % _PERIOD)


_KEPT = 1_000
"""Longer samples are made anew, so that what is kept stays within a few megabytes."""


@lru_cache(maxsize=_KEPT)
def _kept(tokens: int) -> str:
    return _filler(tokens, tokens % _PERIOD)
