"""What calls of a kind turned out to be: their input against the estimate, their output, and how fast it came.

A kind is a pool with a tenant and a route; beside it the tenant in the pool and the pool itself are kinds of their own,
for calls of which nothing finer is known. What is learned is a fold of settlements, in whole numbers, so that it comes
back with the books. Old samples fade: when a kind has :data:`FADE` of them, all its sums are halved.

Outputs are kept as a histogram over half octaves, of which a quantile is off by a fifth at most. The time that a call
takes is a line over its output, fitted by least squares: the slope is the time per token, the rest the time until the
first one.
"""

from __future__ import annotations

import msgspec

from paceline.engine.accounting import WEIGHT_ONE, Estimate, Profile, Sizes

Kind = tuple[str, str, str]
"""Pool, tenant, route; in coarser kinds the later parts are :data:`ALL`."""
ALL = "\n"
"""No name has it."""
UNIT = 16
"""One call in a histogram, so that it fades in whole numbers."""
MOST_TOKENS = 1 << 22
MOST_TOOK_MS = 3_600_000
"""More than this of one call is not learned from."""

MAX_KINDS = 4_096
"""The one that was idle for longest makes place; about 1 kB each."""
ENOUGH = 20
"""A kind with fewer samples says nothing."""
FADE = 1_024
BINS = 44
"""Half octaves from 1 to 4 million tokens."""
LOOK = 16
"""The histograms are looked at once in so many samples."""
RARE = 400
"""One call in so many may be a greater surprise."""
MOST_SCALE = 20 * WEIGHT_ONE
LEAST_SCALE = WEIGHT_ONE // 100
"""Between what an estimate is scaled, in thousandths."""
_MS = 1_000


class Learned(msgspec.Struct, array_like=True, gc=False):
    """One kind, in tokens as responses state them. Histograms are in :data:`UNIT` for each call."""

    calls: int = 0
    inputs: int = 0
    """Sum of the uncached input, by ``calls``."""
    asked: int = 0
    """What the callers' own estimates of input come to, over the calls that had one."""
    answered: int = 0
    """What the same calls did cost."""
    rated: int = 0
    """How many they are."""
    outputs: int = 0
    whole: int = 0
    """Sum of the output over calls that were not cut off at their cap, and how many they are."""
    histogram: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)
    """Outputs of those."""
    cut: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)
    """Outputs of those that were cut off: they would have been longer."""
    foretold: int = 0
    """What the callers' own estimates of output come to, over the calls that had one."""
    produced: int = 0
    told: int = 0
    timed: int = 0
    timed_tokens: int = 0
    took: int = 0
    took_squared: int = 0
    took_times: int = 0
    """Over calls with output: how many, tokens, milliseconds, and the sums of tokens squared and of their products."""
    surprises: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)
    """By how much the input of a call exceeded what is held for one like it."""
    surprise: int = 0
    """What nearly no call of this kind exceeds its expected input by."""
    spread: int = 0
    """The mean square of what calls exceed their expected input by, for each token of input: times what many calls hold
    it is the variance of what they may exceed that by together."""

    def note(self, source: Sample) -> None:
        """One more call."""
        expected = self.expect(source.asked or None)
        if expected is not None:
            self.surprises[bin_of(max(1, source.input - expected))] += UNIT
        self.calls += 1
        self.inputs += source.input
        if source.asked:
            self.asked += source.asked
            self.answered += source.input
            self.rated += 1
        if source.output:
            self._note_output(source)
        if not self.calls % LOOK:
            self._look()
        if self.calls >= FADE:
            self._fade()

    def _note_output(self, source: Sample) -> None:
        output, took = source.output, source.took_ms
        self.timed += 1
        self.timed_tokens += output
        self.took += took
        self.took_squared += output * output
        self.took_times += output * took
        if source.most is not None and output >= source.most:
            self.cut[bin_of(output)] += UNIT
            return
        self.outputs += output
        self.whole += 1
        self.histogram[bin_of(output)] += UNIT
        if source.foretold:
            self.foretold += source.foretold
            self.produced += output
            self.told += 1

    def copy(self) -> Learned:
        """One that does not change with this one."""
        return msgspec.structs.replace(
            self, histogram=self.histogram.copy(), cut=self.cut.copy(), surprises=self.surprises.copy()
        )

    def _fade(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            # A rare size is there for as many fadings as a unit has bits.
            setattr(self, name, [count >> 1 for count in value] if isinstance(value, list) else value >> 1)
        self._look()

    def expect(self, asked: int | None) -> int | None:
        """The input to hold for a call that its caller estimates at ``asked``; ``None``: too little is known."""
        if self.calls < ENOUGH:
            return None
        if asked is None:
            return -(-self.inputs // self.calls)
        return _scaled(asked, self.answered, self.asked, self.rated) if asked else 0

    def _look(self) -> None:
        total, rest, squares = sum(self.surprises), 0, 0
        self.surprise = self.spread = 0
        for number in range(BINS - 1, 0, -1):
            count = self.surprises[number]
            if not count:
                continue
            rest += count
            middle = int(middle_of(number))
            squares += count * middle * middle
            if not self.surprise and rest * RARE > total:
                self.surprise = middle
        if squares and self.inputs:
            self.spread = min(MOST_TOKENS, squares * self.calls // (total * self.inputs))

    @property
    def pace(self) -> tuple[float, float]:
        """Tokens a second, and the seconds until the first."""
        number, tokens, took = self.timed, self.timed_tokens, self.took
        spread = number * self.took_squared - tokens * tokens
        slope = (number * self.took_times - tokens * took) / spread if spread > 0 else 0.0
        if slope <= 0:
            slope = took / max(1, tokens)
        slope = min(max(slope, 0.1), 1_000.0)
        first = max(0.0, (took - slope * tokens) / max(1, number))
        return _MS / slope, first / _MS


class Sample(msgspec.Struct, frozen=True, gc=False):
    """What one call was, in tokens: its usage, the callers' own estimates (zero: none), its cap, how long it took."""

    input: int
    asked: int
    output: int
    foretold: int
    took_ms: int
    most: int | None = None


Kinds = dict[Kind, Learned]


def sample(usage: tuple[int, int], asked: tuple[int, int], took_ms: int, most: int | None) -> Sample:
    """A sample of bounded size, whatever callers state: sums of it fit the journal."""
    (coming, going), (told, foretold) = usage, asked
    return Sample(
        min(coming, MOST_TOKENS),
        min(told, MOST_TOKENS),
        min(going, MOST_TOKENS),
        min(foretold, MOST_TOKENS),
        min(max(0, took_ms), MOST_TOOK_MS),
        most,
    )


def note(kinds: Kinds, kind: Kind, source: Sample) -> None:
    """Take a settlement into account, for its kind and for those above it."""
    for each in _above(kind):
        learned = kinds.pop(each, None)
        if learned is None:
            if len(kinds) >= MAX_KINDS:
                del kinds[next(iter(kinds))]
            learned = Learned()
        # The newest is last.
        kinds[each] = learned
        learned.note(source)


def _above(kind: Kind) -> tuple[Kind, Kind, Kind]:
    """The kind itself, its tenant's, the pool's."""
    pool, tenant, _ = kind
    return kind, (pool, tenant, ALL), (pool, ALL, ALL)


def finest(kinds: Kinds, kind: Kind) -> Learned | None:
    """What is known of the finest of a kind's kinds of which enough is."""
    return _first_of(kinds, _above(kind))


def _first_of(kinds: Kinds, candidates: tuple[Kind, ...]) -> Learned | None:
    for found in candidates:
        learned = kinds.get(found)
        if learned is not None and learned.calls >= ENOUGH:
            return learned
    return None


def spread_of(kinds: Kinds, pool: str) -> int:
    """How far the inputs of a pool's calls spread: see :attr:`Learned.spread`."""
    learned = kinds.get((pool, ALL, ALL))
    return 0 if learned is None else learned.spread


def fill(kinds: Kinds, profile: Profile, kind: Kind, estimate: Estimate) -> tuple[Sizes, int]:
    """The sizes to hold for a call, and by how much its input may exceed them, but for rare calls.

    Gaps are filled from whatever is known; what a caller states is scaled by its own tenant's errors alone. An estimate
    of zero is no gap, and stays zero.
    """
    *theirs, everybody = _above(kind)
    own = _first_of(kinds, tuple(theirs))
    learned = _first_of(kinds, (everybody,)) if own is None else own
    if learned is None:
        return profile.fill(estimate), 0
    coming, output = estimate.input_tokens, estimate.output_tokens
    judge = learned if coming is None else own
    if judge is not None:
        coming = judge.expect(coming)
    if output is None:
        output = -(-learned.outputs // learned.whole) if learned.whole >= ENOUGH else None
    elif output and own is not None:
        output = _scaled(output, own.produced, own.foretold, own.told)
    if output is not None and estimate.max_output_tokens is not None:
        output = min(output, estimate.max_output_tokens)
    sizes = profile.fill(msgspec.structs.replace(estimate, input_tokens=coming, output_tokens=output))
    return sizes, 0 if judge is None else judge.surprise


def _scaled(estimate: int, was: int, told: int, number: int) -> int:
    if number < ENOUGH or not told:
        return estimate
    scale = min(MOST_SCALE, max(LEAST_SCALE, was * WEIGHT_ONE // told))
    return -(-estimate * scale // WEIGHT_ONE)


def bin_of(tokens: int) -> int:
    """The half octave of a number of tokens."""
    bits = tokens.bit_length()
    if bits < 2:
        return 0
    return min(BINS - 1, 2 * (bits - 1) + (tokens >> (bits - 2) & 1))


def middle_of(number: int) -> float:
    """The size that stands for a bin: the mean if all sizes in it are alike likely."""
    octave = 1 << (number >> 1)
    return octave * (1.75 if number & 1 else 1.25) if octave > 1 else octave * (1.5 if number & 1 else 1.0)
