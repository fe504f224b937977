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
"""Pool, tenant, route. Coarser kinds leave the later parts empty."""

MAX_KINDS = 4_096
"""The one that was idle for longest makes place; about 1 kB each."""
ENOUGH = 20
"""A kind with fewer samples says nothing."""
FADE = 1_024
BINS = 44
"""Half octaves from 1 to 4 million tokens."""
LOOK = 16
"""The histograms are looked at once in so many samples."""
RARE = 250
"""One call in so many may be a greater surprise."""
MOST_SCALE = 20 * WEIGHT_ONE
LEAST_SCALE = WEIGHT_ONE // 100
"""Between what an estimate is scaled, in thousandths."""
_MS = 1_000


class Learned(msgspec.Struct, array_like=True, gc=False):
    """One kind. Tokens as the pool's profile counts them; ``took`` sums are milliseconds and tokens."""

    calls: int = 0
    inputs: int = 0
    """Sum of what was charged for input, by ``calls``."""
    asked: int = 0
    """What the callers' own estimates of input come to, over the calls that had one."""
    answered: int = 0
    """What was charged for the same calls."""
    rated: int = 0
    """How many they are."""
    outputs: int = 0
    histogram: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)
    foretold: int = 0
    """What the callers' own estimates of output come to, over the calls that had one."""
    produced: int = 0
    told: int = 0
    took: int = 0
    took_squared: int = 0
    took_times: int = 0
    """Sums over calls with output: of milliseconds, of tokens squared, of tokens times milliseconds."""
    timed: int = 0
    timed_tokens: int = 0
    surprises: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)
    """By how much the input of a call exceeded what is held for one like it."""
    surprise: int = 0
    """What nearly no call of this kind exceeds its expected input by."""

    def note(self, source: Sample) -> None:
        """One more call."""
        expected = self.expect(source.asked or None)
        if expected is not None:
            self.surprises[bin_of(max(1, source.input - expected))] += 1
        self.calls += 1
        self.inputs += source.input
        if source.asked:
            self.asked += source.asked
            self.answered += source.input
            self.rated += 1
        output = source.output
        if output:
            self.outputs += output
            self.histogram[bin_of(output)] += 1
            self.timed += 1
            self.timed_tokens += output
            self.took += source.took_ms
            self.took_squared += output * output
            self.took_times += output * source.took_ms
            if source.foretold:
                self.foretold += source.foretold
                self.produced += output
                self.told += 1
        if not self.calls % LOOK:
            self.surprise = self._rare()
        if self.calls >= FADE:
            self._fade()

    def copy(self) -> Learned:
        """One that does not change with this one."""
        return msgspec.structs.replace(self, histogram=self.histogram.copy(), surprises=self.surprises.copy())

    def _fade(self) -> None:
        for name in self.__struct_fields__:
            if name not in ("histogram", "surprises", "surprise"):
                setattr(self, name, getattr(self, name) >> 1)
        # A rare size fades later than its count says: rounding up keeps the tail.
        self.histogram = [(count + 1) >> 1 for count in self.histogram]
        self.surprises = [(count + 1) >> 1 for count in self.surprises]

    def expect(self, asked: int | None) -> int | None:
        """The input to hold for a call that its caller estimates at ``asked``; ``None``: too little is known."""
        if self.calls < ENOUGH:
            return None
        if asked is None:
            return -(-self.inputs // self.calls)
        return _scaled(asked, self.answered, self.asked, self.rated) if asked else 0

    def _rare(self) -> int:
        total, rest = sum(self.surprises), 0
        for number in range(BINS - 1, 0, -1):
            rest += self.surprises[number]
            if rest * RARE > total:
                return int(middle_of(number))
        return 0

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
    """What one call was: charges in tokens, the callers' own estimates (zero: none), how long it took."""

    input: int
    asked: int
    output: int
    foretold: int
    took_ms: int


Kinds = dict[Kind, Learned]


def note(kinds: Kinds, kind: Kind, sample: Sample) -> None:
    """Take a settlement into account, for its kind and for those above it."""
    pool, tenant, route = kind
    _note(kinds, (pool, "", ""), sample)
    if tenant:
        _note(kinds, (pool, tenant, ""), sample)
    if route:
        _note(kinds, kind, sample)


def _note(kinds: Kinds, kind: Kind, sample: Sample) -> None:
    learned = kinds.pop(kind, None)
    if learned is None:
        if len(kinds) >= MAX_KINDS:
            del kinds[next(iter(kinds))]
        learned = Learned()
    # The newest is last.
    kinds[kind] = learned
    learned.note(sample)


def finest(kinds: Kinds, kind: Kind) -> Learned | None:
    """What is known of the finest of a kind's kinds of which enough is."""
    pool, tenant, _ = kind
    for found in (kind, (pool, tenant, ""), (pool, "", "")):
        learned = kinds.get(found)
        if learned is not None and learned.calls >= ENOUGH:
            return learned
    return None


def fill(kinds: Kinds, profile: Profile, kind: Kind, estimate: Estimate) -> Sizes:
    """The sizes to hold for a call. An estimate of zero is no gap, and stays zero."""
    learned = finest(kinds, kind)
    if learned is None:
        return profile.fill(estimate)
    coming, output = learned.expect(estimate.input_tokens), estimate.output_tokens
    if output is None:
        output = -(-learned.outputs // learned.timed) if learned.timed else None
    elif output:
        output = _scaled(output, learned.produced, learned.foretold, learned.told)
    if output is not None and estimate.max_output_tokens is not None:
        output = min(output, estimate.max_output_tokens)
    return profile.fill(msgspec.structs.replace(estimate, input_tokens=coming, output_tokens=output))


def surprise(kinds: Kinds, kind: Kind) -> int:
    """By how much the input of a call of this kind may exceed what is held for it, but for rare ones."""
    learned = finest(kinds, kind)
    return 0 if learned is None else learned.surprise


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
