"""What can be asked of a ledger: the inputs of :meth:`paceline.engine.engine.Engine.step`.

Everything here is already validated and resolved: a target has become a pool, a tenant its shares, headers an
:class:`Observation`. Times are durations in microseconds; the instant comes with the batch.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from paceline.engine.accounting import Estimate, Prices, Profile, Sizes, Usage, UsageKind
from paceline.engine.bucket import EndKind
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.terms import Part

NO_PRICES = Prices()


class Priority(IntEnum):
    """The numbers are those of ``paceline.v1.Priority``; smaller goes first."""

    INTERACTIVE = 1
    STANDARD = 2
    BATCH = 3


class Mode(IntEnum):
    """Whether decisions bind (``ENFORCE``) or are only recorded (``OBSERVE``)."""

    ENFORCE = 1
    OBSERVE = 2


class Disposition(IntEnum):
    """How a call ended. The numbers are those of ``paceline.v1.Disposition``."""

    SUCCEEDED = 1
    REJECTED = 2
    FAILED = 3
    ABORTED = 4
    NO_RESPONSE = 5
    NOT_SENT = 6


class Refusal(IntEnum):
    """Why an upstream refused a call."""

    BUDGET = 1
    """A bucket was short (429 with or without ``retry-after``)."""
    OVERLOAD = 2
    """The service was overloaded (529, 503): nothing about budget."""
    SPEND = 3
    """The account's spend cap: nothing will pass until an operator or the month opens it."""
    OTHER = 4
    RAMP = 5
    """Usage grew too fast: the limit of the moment is lower, and climbs."""
    CONCURRENCY = 6
    """Too many calls are in flight."""
    NO_QUOTA = 7
    """The limit is zero: nothing will ever pass until an operator has changed that."""


class Reading(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one response said of one dimension.

    ``remaining`` may be off by half of ``rounding`` (0: exact). ``reset_us`` is the time from the reading to a full
    bucket, off by up to ``reset_error_us``. Any figure may be missing.
    """

    dimension: Dimension
    limit: int | None = None
    remaining: int | None = None
    rounding: int = 0
    reset_us: int | None = None
    reset_error_us: int = 0


class Observation(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one response said of the limits, ``age_us`` after the caller had received its headers.

    ``retry_after_us`` goes with ``refusal``; ``refused`` is the dimension that the refusal names, if it names one.
    ``allowed`` goes with a ramp: what the upstream lets pass at the moment, per minute, in that dimension.
    """

    readings: tuple[Reading, ...] = ()
    age_us: int = 0
    refusal: Refusal | None = None
    refused: Dimension | None = None
    retry_after_us: int | None = None
    allowed: int | None = None


class Outcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of a call. ``usage`` is ``None`` exactly when ``usage_kind`` is ``MISSING``.

    ``unknown`` names fields of ``usage`` that the response did not state: they count as estimated.
    """

    disposition: Disposition
    usage: Usage | None = None
    usage_kind: UsageKind = UsageKind.MISSING
    observation: Observation | None = None
    unknown: tuple[str, ...] = ()


class Candidate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One way to serve a call: a pool, the shares it counts against there (outermost first), and its size."""

    pool: str
    shares: tuple[str, ...] = ()
    estimate: Estimate = Estimate()
    prices: Prices = NO_PRICES


class Context(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a grant said, enough to book its Commit in a ledger that has forgotten it.

    ``charges`` are the frozen holds of one call, by dimension; ``granted_at`` is ledger time in µs. The context of a
    bulk grant carries the key of the request and serves its ``count`` children (:mod:`paceline.engine.keys`).
    """

    ledger: str
    key: str
    pool: str
    shares: tuple[str, ...]
    tenant: str
    route: str
    granted_at: int
    charges: tuple[tuple[Dimension, int], ...]
    prices: Prices
    count: int = 1


class Reserve(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Hold the first candidate that fits, now or within ``max_wait_us``.

    ``count`` > 1 asks for that many reservations at once (``partial``: as many as fit, at least one).
    """

    key: str
    candidates: tuple[Candidate, ...]
    tenant: str = ""
    route: str = ""
    priority: Priority = Priority.STANDARD
    max_wait_us: int = 0
    hold_us: int = 300_000_000
    count: int = 1
    partial: bool = False
    waited_us: int = 0
    observed: bool = False
    """Granted at once whatever the mode: its caller goes ahead anyway."""


class Commit(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Settle a reservation. ``context`` books it if the ledger does not know ``key``."""

    key: str
    outcome: Outcome
    context: Context | None = None


class Release(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The call was never made: give everything back, withdraw a waiting one, or leave a tombstone."""

    key: str
    context: Context | None = None


class Renew(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The call goes on: a new expiry (``None`` keeps it), output so far, an early observation.

    ``usage`` is what the response has said of its input. Its output says nothing of what is to come, and is ignored.
    """

    key: str
    context: Context | None = None
    hold_us: int | None = None
    output_tokens: int | None = None
    observation: Observation | None = None
    usage: Usage | None = None


class Observe(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Book and learn from a call that was made without a grant. A ``key`` is booked once; empty is not remembered."""

    candidate: Candidate
    outcome: Outcome
    tenant: str = ""
    route: str = ""
    key: str = ""
    age_us: int = 0
    """For how long upstream has counted the call, at least."""


class Expire(msgspec.Struct, frozen=True, tag=True, gc=False):
    """An operator gives up on a caller: end its hold as if its time were up. A late Commit replaces its charge."""

    key: str


class Amounts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one reservation held, and what it was charged, in one limit.

    The limit is named, since its number in two lives of a ledger may differ: an empty ``pool`` is that of a spend cap.
    ``over`` is what upstream may have counted beyond the hold, or beyond the charge once there is one.
    """

    pool: str
    share: str
    dimension: Dimension
    window: Window
    hold: int
    over: int = 0
    charge: int = 0


class Adopt(msgspec.Struct, frozen=True, tag=True, gc=False):
    """What another owner of this ledger has told a caller of one reservation, in records that the store has lost.

    ``at`` is when it was first told of, in what was lost; ``kind`` is how it ended there (``None``: it is open). Times
    are ledger time in µs. ``granted_at`` of ``None``: it was never granted. ``keys`` are the reservations of a bulk
    request.
    """

    key: str
    at: int
    kind: EndKind | None = None
    granted_at: int | None = None
    expires_at: int = 0
    pool: str = ""
    shares: tuple[str, ...] = ()
    tenant: str = ""
    route: str = ""
    priority: Priority = Priority.STANDARD
    amounts: tuple[Amounts, ...] = ()
    sizes: Sizes | None = None
    prices: Prices = NO_PRICES
    index: int = 0
    output_tokens: int | None = None
    max_output_tokens: int | None = None
    cost: int = 0
    keys: tuple[str, ...] = ()


class DefinePool(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Create a pool, or bring it to a new definition without touching what it has learned beyond that.

    ``fill`` is how full its limits start, in thousandths: the upstream's level is not known before the first answer.
    ``guessed``: nobody has said these limits, so they make no lone call impossible until an answer confirms them.
    """

    pool: str
    profile: Profile
    limits: tuple[Limit, ...]
    learn: bool = True
    fill: int = 1_000
    guessed: bool = False


class DefineShare(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Create or change a share: caps per dimension in each pool; a ``SPEND`` cap holds over all pools.

    ``weight``: what it gets of what is contended, against its sisters; zero: what none of them wants. ``guarantees``:
    by the minute, in each pool, what it gets whenever it asks, over all priorities; lent while it does not. Parts are
    of whatever the pool's own limit is at the time.

    ``override``: an operator says so. It stays whatever the configuration says, until an operator says what the
    configuration does.
    """

    share: str
    caps: tuple[Limit, ...] = ()
    weight: int = 1
    guarantees: tuple[Limit, ...] = ()
    cap_parts: tuple[Part, ...] = ()
    guarantee_parts: tuple[Part, ...] = ()
    override: bool = False


class Class(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What calls of one priority get of each pool: by ``weight`` of what is contended, and ``minimum`` thousandths of
    every limit whenever they ask."""

    priority: Priority
    weight: int
    minimum: int = 0


CLASSES = (Class(Priority.INTERACTIVE, 64), Class(Priority.STANDARD, 8, 50), Class(Priority.BATCH, 1, 50))
"""Unless the configuration says otherwise."""


class DefineClasses(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Set what each priority gets. One that is left out has its default."""

    classes: tuple[Class, ...] = ()


class DefineSpend(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Set the account's monthly spend cap in nano-dollars; ``None`` only counts."""

    cap: int | None = None


class SetLimit(msgspec.Struct, frozen=True, tag=True, gc=False):
    """An operator's override of one limit of a pool; ``None`` lifts it and lets learning rule again."""

    pool: str
    dimension: Dimension
    limit: Limit | None


class SetMode(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Enforce or observe, for a pool and a tenant. Empty means every; the most specific wins; ``None`` unsets."""

    mode: Mode | None
    pool: str = ""
    tenant: str = ""


class DefineModes(msgspec.Struct, frozen=True, tag=True, gc=False):
    """What the configuration says of modes, as (pool, tenant, mode).

    Where it says the same as last time nothing changes, also if an operator has set another mode since.
    """

    modes: tuple[tuple[str, str, Mode], ...]


class SetPaused(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Pause or resume a pool. A paused pool grants nothing; what is open settles as always."""

    pool: str
    paused: bool


Operation = (
    Reserve
    | Commit
    | Release
    | Renew
    | Observe
    | Expire
    | Adopt
    | DefinePool
    | DefineShare
    | DefineClasses
    | DefineSpend
    | SetLimit
    | SetMode
    | DefineModes
    | SetPaused
)
