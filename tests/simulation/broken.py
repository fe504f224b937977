"""Deliberately broken variants of what is simulated: the proof that the checks would see it.

Each replaces a few lines of the product, or of the store's rules, for as long as a run lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import msgspec

from paceline.engine import absence, reserving, settling
from paceline.engine import events as ev
from paceline.engine.answers import Committed
from paceline.engine.bucket import Bucket, EndKind
from paceline.engine.operations import Reserve
from paceline.frontend import fleet
from paceline.ledger import keeper, lease, owner, shared, succession, tenure
from paceline.ledger.clock import LedgerTime
from paceline.ledger.fold import Fold, decode_payload
from paceline.ledger.journal import StoreUnavailable
from paceline.ledger.lease import Head
from tests.simulation import store
from tests.simulation.runs import Outcome, run_many
from tests.simulation.world import is_sessions


class Variant(NamedTuple):
    """One way to be wrong. ``seeds`` are some that find it."""

    name: str
    patches: Callable[[], list[tuple[Any, str, Any]]]
    seeds: tuple[int, ...] = ()


@contextmanager
def broken(variant: Variant) -> Iterator[None]:
    """The product with this fault in it."""
    with ExitStack() as stack:
        for target, name, value in variant.patches():
            before = target.__dict__[name]
            setattr(target, name, value)
            stack.callback(setattr, target, name, before)
        yield


def catch(variant: Variant, seeds: Iterable[int]) -> Outcome | None:
    """The first run that sees it, in which nothing is wrong without it."""
    for seed in seeds:
        if is_sessions(seed):
            continue
        with broken(variant):
            outcome = run_many([seed])[0]
        if outcome.violations and not run_many([seed])[0].violations:
            return outcome
    return None


# -- the store's rules -----------------------------------------------------------------------------------------------

Patches = list[tuple[Any, str, Any]]
replace = msgspec.structs.replace


def _no_fencing() -> Patches:
    def append(
        head: Head | None,
        epoch: int,
        nonce: bytes,
        seq: int,
        previous: bytes,
        hash: bytes,
        at: int,
        lease_us: int,
        now: int,
    ) -> tuple[Head, bool]:
        if head is None:
            raise lease.Fenced(head)
        new = replace(head, seq=seq, hash=hash, at=at, written_at=now, confirmed_at=now, until=now + lease_us)
        return new, head.hash != hash

    return [(store.RULES, "append", append)]


def _resend_appends_again() -> Patches:
    def append(head: Head | None, *rest: Any) -> tuple[Head, bool]:
        return lease.append(head, *rest)[0], True

    return [(store.RULES, "append", append)]


def _epoch_alone() -> Patches:
    """The store compares the epoch, and not what the record follows."""

    def append(head: Head | None, epoch: int, nonce: bytes, seq: int, previous: bytes, *rest: Any) -> tuple[Head, bool]:
        if head is None or head.epoch != epoch or head.nonce != nonce:
            raise lease.Fenced(head)
        hash, at, lease_us, now = rest
        new = replace(head, seq=seq, hash=hash, at=at, written_at=now, confirmed_at=now, until=now + lease_us)
        return new, True

    return [(store.RULES, "append", append)]


def _reassert_without_comparing() -> Patches:
    def reassert(head: Head | None, expected: Head | None, new: Head, now: int) -> Head:
        return replace(new, confirmed_at=now, until=now + (new.until - new.confirmed_at))

    refused = tenure.Tenure.refused

    def never_deposed(self: tenure.Tenure, found: Head | None, flying: Any = None) -> Any:
        verdict = refused(self, found, flying)
        return tenure.Refound(found) if isinstance(verdict, tenure.Deposed) else verdict

    return [(store.RULES, "reassert", reassert), (tenure.Tenure, "refused", never_deposed)]


def _lineage_ignored() -> Patches:
    """At a new primary nobody is waited for."""

    def acquire(head: Head | None, claim: lease.Claim, now: int) -> Head:
        if head is not None and head.lineage != claim.lineage and head.form <= claim.form:
            head = replace(head, until=now, successor="", lineage=claim.lineage)
        return lease.acquire(head, claim, now)

    def due(head: Head | None, now: int, *rest: Any, lineage: str, **more: Any) -> tuple[int, int]:
        if head is not None and head.lineage != lineage:
            return now, 0
        return succession.due(head, now, *rest, lineage=lineage, **more)

    return [(store.RULES, "acquire", acquire), (keeper, "due", due)]


def _trims_one_too_many() -> Patches:
    real: Any = store.SimCommands.keep_snapshot

    async def keep_snapshot(self: store.SimCommands, *of: Any) -> Any:
        *most, keep_after = of
        return await real(self, *most, keep_after + 1)

    return [(store.SimCommands, "keep_snapshot", keep_snapshot)]


# -- the owner -------------------------------------------------------------------------------------------------------


def _answers_before_append() -> Patches:
    real = owner.Owner._append_all

    async def append_all(self: owner.Owner) -> None:
        answer, seal = self._answer, self._seal

        def sealed(batch: Any) -> Any:
            record = seal(batch)
            answers, batch.answers = batch.answers, []
            answer(answers)
            return record

        self._seal = sealed  # type: ignore[method-assign]
        await real(self)

    return [(owner.Owner, "_append_all", append_all)]


def _lease_never_checked() -> Patches:
    return [(shared.SharedJournal, "is_fresh", lambda self: True)]


def _lost_answer_means_not_written() -> Patches:
    """An append whose answer is lost is taken for not written, and its batch is told that it failed, but is kept."""
    real = shared.SharedJournal.append

    async def append(self: shared.SharedJournal, record: Any) -> None:
        try:
            await real(self, record)
        except StoreUnavailable:
            return

    return [(shared.SharedJournal, "append", append)]


def _testimony_dropped() -> Patches:
    return [(owner.Owner, "_testify", lambda self, lost, all_lost=False: [])]


def _wall_clock_at_take_over() -> Patches:
    real = LedgerTime.__init__

    def begin(self: LedgerTime, clock: Any, floor: int, start: int | None = None) -> None:
        real(self, clock, floor, None)

    return [(LedgerTime, "__init__", begin)]


def _time_runs_backwards() -> Patches:
    """A new owner starts at its own wall clock, also where that is behind the journal."""

    def begin(self: LedgerTime, clock: Any, floor: int, start: int | None = None) -> None:
        self._clock = clock
        self._base = clock.wall() - 60_000_000 - clock.monotonic()

    return [(LedgerTime, "__init__", begin)]


def _loss_not_debited() -> Patches:
    real = absence.begin_after

    def begin_after(books: Any, found: Any) -> None:
        real(books, replace(found, loss_us=0))

    from paceline.engine import engine

    return [(engine, "begin_after", begin_after)]


# -- the engine ------------------------------------------------------------------------------------------------------


def _refund_twice() -> Patches:
    real = Bucket.recharge

    def recharge(self: Bucket, since: int, newest: int, old: int, new: int, forfeit: int) -> None:
        real(self, since, newest, old, new, forfeit)
        if new < old:
            twice = min(old - new, self.burst - self.level)
            self.level += twice
            self.charged -= twice

    return [(Bucket, "recharge", recharge)]


def _refund_twice_as_refill() -> Patches:
    """The same, where every sum of the books agrees: only the true clock tells."""
    real = Bucket.recharge

    def recharge(self: Bucket, since: int, newest: int, old: int, new: int, forfeit: int) -> None:
        real(self, since, newest, old, new, forfeit)
        if new < old:
            twice = max(0, min(old - new, self.burst - self.level))
            self.level += twice
            self.refilled += twice

    return [(Bucket, "recharge", recharge)]


def _resend_granted_twice() -> Patches:
    def seen(self: reserving.Reserving, ticket: int, operation: Reserve) -> bool:
        state = self._books.state
        reservation = state.open.get(operation.key)
        if reservation is not None:
            # Forgets the first one, and gives what it held back.
            nothing = (0,) * len(reservation.holds)
            self._books.emit(ev.Released(reservation.key, nothing))
            state.ended.pop(operation.key)
            return False
        return real(self, ticket, operation)

    real = reserving.Reserving._seen_before
    return [(reserving.Reserving, "_seen_before", seen)]


def _commit_booked_twice() -> Patches:
    real = settling.Settling._commit_ended

    def commit_ended(self: settling.Settling, operation: Any, ended: Any) -> Any:
        if ended.kind is EndKind.SETTLED and operation.context is not None:
            return self._commit_forgotten(operation.key, operation.context, operation.outcome)
        return real(self, operation, ended)

    return [(settling.Settling, "_commit_ended", commit_ended)]


def _commit_forgotten_unsaid() -> Patches:
    """A Commit of an id that is not known is answered, and not booked."""
    return [(settling.Settling, "_commit_forgotten", lambda *_: Committed(late=True))]


# -- following and routing -------------------------------------------------------------------------------------------


def _follows_out_of_order() -> Patches:
    real = Fold.follow

    async def follow(self: Fold, records: Iterable[Any]) -> None:
        pending = list(records)
        if len(pending) > 1 and self.events:
            decode = self._machine.decode
            for record in (pending[1], pending[0]):
                for payload in decode_payload(record.payload):
                    for event in decode(payload):
                        try:
                            self.books.apply(event)
                        except Exception:
                            continue
            last = pending[1]
            self.seq, self.hash, self.at = last.seq, last.hash, last.at
            pending = pending[2:]
        await real(self, pending)

    return [(Fold, "follow", follow)]


def _waiters_dropped() -> Patches:
    real = fleet.FleetSlot._begin

    def begin(self: fleet.FleetSlot, epoch: int) -> None:
        for pending in self._pending.values():
            if pending.seat and isinstance(pending.operation, Reserve):
                pending.seat = self._seat
        real(self, epoch)

    return [(fleet.FleetSlot, "_begin", begin)]


def _waited_time_forgotten() -> Patches:
    def aged(operation: Any, elapsed: int) -> Any:
        if isinstance(operation, Reserve):
            return replace(operation, max_wait_us=max(0, operation.max_wait_us - elapsed))
        return operation

    return [(fleet, "aged", aged)]


def _patience_starts_again() -> Patches:
    def aged(operation: Any, elapsed: int) -> Any:
        if isinstance(operation, Reserve):
            return replace(operation, waited_us=operation.waited_us + elapsed, max_wait_us=60_000_000)
        return operation

    return [(fleet, "aged", aged)]


def _never_resent() -> Patches:
    """What was sent to an owner that is gone is not sent to the next one."""
    real = fleet.FleetSlot._begin

    def begin(self: fleet.FleetSlot, epoch: int) -> None:
        for pending in self._pending.values():
            if pending.seat:
                pending.seat = self._seat
        real(self, epoch)

    return [(fleet.FleetSlot, "_begin", begin)]


VARIANTS = (
    Variant(
        "no fencing in the store",
        _no_fencing,
        (
            2,
            7,
        ),
    ),
    Variant("the store compares only the epoch", _epoch_alone, (15,)),
    Variant("a resent record is appended again", _resend_appends_again, (15,)),
    Variant("books put back without comparing", _reassert_without_comparing, (2,)),
    Variant(
        "a new primary is taken at once",
        _lineage_ignored,
        (
            32,
            51,
        ),
    ),
    Variant(
        "a snapshot trims one record too many",
        _trims_one_too_many,
        (178, 276, 298),
    ),
    Variant(
        "answers before the append",
        _answers_before_append,
        (
            2,
            6,
        ),
    ),
    Variant("a lost answer means written", _lost_answer_means_not_written, (2,)),
    Variant(
        "lease never checked for denials",
        _lease_never_checked,
        (
            477,
            488,
            477,
            488,
        ),
    ),
    Variant("a deposed owner says nothing", _testimony_dropped, (701394, 701154)),
    Variant("wall clock at take-over", _wall_clock_at_take_over, (37,)),
    Variant(
        "time runs backwards at take-over",
        _time_runs_backwards,
        (
            3,
            1,
        ),
    ),
    Variant("loss not debited", _loss_not_debited, (8,)),
    Variant("refund twice", _refund_twice, (1,)),
    Variant("refund twice, as refill", _refund_twice_as_refill, (3,)),
    Variant(
        "resend granted twice",
        _resend_granted_twice,
        (
            4,
            3,
        ),
    ),
    Variant("commit booked twice", _commit_booked_twice, (8,)),
    Variant("unknown commit not booked", _commit_forgotten_unsaid, (121,)),
    Variant("follower applies out of order", _follows_out_of_order, (1,)),
    Variant("waiters dropped on owner change", _waiters_dropped, (27,)),
    Variant("operations never resent", _never_resent, (27,)),
    Variant("waited time forgotten", _waited_time_forgotten, (21,)),
    Variant("patience starts again", _patience_starts_again, (102, 277)),
)
