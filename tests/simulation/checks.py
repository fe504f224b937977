"""What must hold, whatever happens: looked at in every step of every engine, at every write of the store, at the end.

The checks trust two things that no fault reaches: what each primary of the store accepted, and what callers were told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from paceline.engine import events as ev
from paceline.engine.answers import Answer, Committed, Denied, Done, Granted, Invalid, Reason, Released
from paceline.engine.bucket import EndKind
from paceline.engine.dimensions import WINDOW_US
from paceline.engine.engine import Engine, Step
from paceline.engine.operations import Commit, Operation, Release, Reserve
from paceline.engine.state import State
from paceline.frontend.fleet import AWAY_US
from paceline.ledger.fold import decode_payload
from paceline.ledger.journal import Record, genesis
from paceline.ledger.lease import Head
from paceline.ledger.options import OwnerOptions
from tests.simulation.clock import START_WALL
from tests.simulation.network import KEEPALIVE_US, Asked
from tests.simulation.store import Primary

if TYPE_CHECKING:
    from tests.simulation.workload import Call
    from tests.simulation.world import Node, World

SUM_EVERY = 16
"""Open holds are added up in one of so many steps."""
ANSWER_US = KEEPALIVE_US + OwnerOptions().append_timeout_us + AWAY_US + 250_000
"""How much later than its caller's patience an answer may be, if only the ledger had trouble. An owner may be cut off
from its front ends first, and then from the store, and the times add: what was sent arrives before the silent
connection breaks, its append is given up, and the front end keeps it for ``away``. The rest is for looking (timers of
0.1 s) and for messages."""
PLACE_US = 150_000
"""Who came so much later may not be served before, whatever the owner did."""
AHEAD_US = 1_500_000
"""By so much ledger time may be ahead of true time: the store's clocks differ, and what was lost may count twice."""
OLD_US = 1_500_000
"""For so long a primary that is none any more may go on, and what it says be under way."""
DRIFT = 0.002
"""How fast or slow clocks may run."""


class Violation(Exception):
    """Something that must hold does not."""


class Told:
    """What became of one key, as callers heard it."""

    __slots__ = (
        "committed",
        "granted",
        "granted_at",
        "heard_at",
        "queued_at",
        "queued_by",
        "released",
        "served_at",
        "served_by",
        "withdrawn_at",
    )

    def __init__(self) -> None:
        self.granted: Granted | None = None
        self.granted_at = 0
        self.committed: Committed | None = None
        self.released: Released | None = None
        self.queued_at: int | None = None
        """When an engine first let it wait."""
        self.heard_at = 0
        """When its caller was last told something that is in the books."""
        self.queued_by = ""
        self.served_at: int | None = None
        self.served_by = ""
        self.withdrawn_at: int | None = None


class Decided:
    """A grant or its end as an engine decided it: the true time, and ledger time."""

    __slots__ = ("at", "ledger_at", "node", "what")

    def __init__(self, at: int, node: str, ledger_at: int, what: str) -> None:
        self.at = at
        self.node = node
        self.ledger_at = ledger_at
        self.what = what


class Reign(NamedTuple):
    """An acquisition."""

    at: int
    nonce: bytes
    node: str
    process: str
    is_new: bool
    """The primary is another than the one that the owner before wrote to."""


class Checks:
    """See above. The first violations are kept, with the instant."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.violations: list[str] = []
        self.told: dict[str, Told] = {}
        self.calls: dict[str, Call] = {}
        self.counts: Counter[str] = Counter()
        self.steps = 0
        self.writers: dict[tuple[str, str, int], bytes] = {}
        """The nonce that wrote in an epoch, by lineage and ledger."""
        self.decided: dict[str, list[Decided]] = {}
        self.twice: list[tuple[str, int, int]] = []
        """Keys that were granted a second time, and when: only if the store has lost the first."""
        self.lost_records = 0
        self.since: dict[bytes, int] = {}
        """When owners took over, by nonce."""
        self.reigns: dict[str, list[Reign]] = {}
        """Acquisitions at primaries that were not superseded, by ledger."""
        self.offices: dict[bytes, tuple[str, str]] = {}
        """Node and process of owners, by nonce, wherever they took over."""
        self.denials: dict[str, list[tuple[int, tuple[str, str], Reason]]] = {}
        """When denials were decided at once, by which node and process and why, by key."""
        self.debited: set[bytes] = set()
        self.released: set[bytes] = set()
        """Those that have let go."""
        self.late_most = 0

    def violate(self, what: str) -> None:
        if len(self.violations) < 8:
            self.violations.append(f"at {self.world.loop.now / 1e6:.3f} s: {what}")

    # -- callers -----------------------------------------------------------------------------------------------------

    def began(self, call: Call) -> None:
        self.calls[call.key] = call
        self.told[call.key] = Told()

    def granted(self, call: Call, answer: Granted) -> None:
        told = self.told[call.key]
        told.heard_at = self.world.loop.now
        self.counts["granted"] += 1
        if told.granted is None:
            told.granted, told.granted_at = answer, self.world.loop.now
        elif answer.context.granted_at != told.granted.context.granted_at:
            self.twice.append((call.key, told.granted.context.granted_at, answer.context.granted_at))
            if len(self.world.store.primaries) == 1:
                self._twice(*self.twice[-1])

    def _twice(self, key: str, first: int, second: int) -> None:
        self.violate(f"{key} was granted at {first} and again at {second}")

    def denied(self, call: Call, answer: Denied) -> None:
        self.counts[f"denied {answer.reason.name}"] += 1
        self._check_denial(call, answer.reason)
        if self.told[call.key].granted is not None:
            self.violate(f"{call.key} was denied after it had been granted")

    def _check_denial(self, call: Call, reason: Reason) -> None:
        """Who has denied it was the owner then, as far as the store knows. Of several that denied it, one was.

        An answer leaves once its owner's lease is confirmed: a store that has lost the successor before that confirms
        it, whatever was so when it was decided.
        """
        stale = ""
        for at, office, why in self.denials.get(call.key, ()):
            if why is not reason:
                continue
            known = self.reigns.get(call.ledger, ())
            reigns = [reign for reign in known if reign.at < at]
            if self.world.store.was_split(at) or not reigns or reigns[-1].node == office[0]:
                return
            # Under the very office in which it was decided; one that was taken later confirms nothing of it.
            if any(
                reign.at >= at and self.since[reign.nonce] < at and self.offices[reign.nonce] == office
                for reign in known
            ):
                return
            stale = (
                f"{call.key} was denied by {office[0]} at {at / 1e6:.3f} s, when {reigns[-1].node} had been the owner "
                f"since {reigns[-1].at / 1e6:.3f} s"
            )
        if stale:
            self.violate(stale)

    def renewed(self, call: Call, answer: Any) -> None:
        if isinstance(answer, Answer):
            self.counts["renewed"] += 1

    def settled(self, call: Call, answer: Committed | Released) -> None:
        told = self.told[call.key]
        if not answer.stale:
            told.heard_at = self.world.loop.now
        if isinstance(answer, Committed):
            self.counts["committed"] += 1
            told.committed = answer
        else:
            self.counts["released"] += 1
            told.released = answer

    def adopted(self, answer: Any) -> None:
        """A deposed owner's word was heard by another one."""
        self.counts["adopted" if isinstance(answer, Done) else "not adopted"] += 1

    def strange(self, call: Call, answer: Any) -> None:
        if isinstance(answer, Invalid) and len(self.world.owners_of(call.ledger)) > 1:
            # The owner of a primary that is none any more knows no better.
            self.counts["invalid, beside another owner"] += 1
            return
        self.violate(f"{call.key}: a {call.state} call was answered by {answer!r}")

    def heard(self, call: Call, asked: Asked, answer: Any, since: int, patience: int) -> None:
        """A caller got an answer, an error, or a broken connection."""
        now = self.world.loop.now
        late = now - since - patience
        if late > ANSWER_US and not self.world.was_troubled(asked.target, since, now, (call.client,)):
            self.violate(
                f"{call.key} ({call.state}) heard of {type(answer).__name__} from {asked.target} "
                f"{late / 1e6:.1f} s after its patience of {patience / 1e6:.1f} s"
            )
        self.late_most = max(self.late_most, late)

    def unanswered(self, call: Call, asked: Asked) -> None:
        now = self.world.loop.now
        self.counts["unanswered"] += 1
        if not self.world.was_troubled(asked.target, call.since, now, (call.client,)):
            self.violate(
                f"{call.key} ({call.state}) asked {asked.target} at {call.since / 1e6:.3f} s, and heard nothing"
            )

    # -- engines -----------------------------------------------------------------------------------------------------

    def stepped(self, node: Node, engine: Engine, operations: Sequence[tuple[int, Operation]], step: Step) -> None:
        """After each step of any engine. Nothing of it may have been acknowledged yet."""
        now = self.world.loop.now
        self.steps += 1
        state = engine.state
        for bucket in state.buckets:
            if bucket.level != bucket.refilled - bucket.charged + bucket.adjusted:
                self.violate(f"{node.name}: {bucket.dimension.name} level {bucket.level} is not what was counted")
            if bucket.granted != bucket.settled + bucket.released + bucket.expired + bucket.held:
                self.violate(f"{node.name}: {bucket.dimension.name} grants are not what became of them")
            if bucket.level > bucket.burst:
                self.violate(f"{node.name}: {bucket.dimension.name} level {bucket.level} above {bucket.burst}")
        if self.steps % SUM_EVERY == 0:
            self._sum_holds(node.name, state)
        self._begins(node, engine, step)
        answered: dict[int, Answer] = dict(step.answers)
        told = self.told
        for ticket, operation in operations:
            if isinstance(operation, Reserve):
                answer = answered.get(ticket)
                if answer is None:
                    known = told.get(operation.key)
                    if known is not None and known.queued_at is None:
                        known.queued_at, known.queued_by = now, node.name
                elif isinstance(answer, Denied):
                    office = node.name, node.process_name
                    self.denials.setdefault(operation.key, []).append((now, office, answer.reason))
            elif isinstance(operation, Release):
                known = told.get(operation.key)
                if known is not None and known.withdrawn_at is None:
                    known.withdrawn_at = now
        for event in step.events:
            if isinstance(event, ev.Granted):
                self.decided.setdefault(event.key, []).append(Decided(now, node.name, step.at, "granted"))
            elif isinstance(event, ev.Settled | ev.Released | ev.Expired | ev.Replaced):
                self.decided.setdefault(event.key, []).append(Decided(now, node.name, step.at, type(event).__name__))

    def _sum_charges(self, state: State) -> None:
        """What was charged is the sum over all calls."""
        charged = [0] * len(state.buckets)
        for reservation in state.open.values():
            for number, hold in zip(reservation.buckets, reservation.holds, strict=True):
                charged[number] += hold
        for ended in state.ended.values():
            for number, charge in zip(ended.buckets, ended.charges, strict=True):
                charged[number] += charge
        for number, bucket in enumerate(state.buckets):
            if bucket.charged != charged[number]:
                self.violate(f"{bucket.dimension.name} was charged {bucket.charged}, its calls {charged[number]}")

    def _begins(self, node: Node, engine: Engine, step: Step) -> None:
        """The first step of an engine: after a failover of the store it debits what may be lost."""
        stood = getattr(engine, "stood", None)
        reigns = self.reigns.get(engine.state.ledger, ())
        if stood is None or not reigns or reigns[-1].process != node.process_name or not reigns[-1].is_new:
            return
        if reigns[-1].nonce in self.debited:
            return
        self.debited.add(reigns[-1].nonce)
        debited = {event.bucket for event in step.events if isinstance(event, ev.Corrected) and event.adjusted < 0}
        for number, level in enumerate(stood):
            bucket = engine.state.buckets[number]
            if bucket.pool and WINDOW_US.get(bucket.window) and level > 0 and number not in debited:
                self.violate(
                    f"{node.name} took over from another primary, and debited nothing of {bucket.dimension.name}"
                )

    def _sum_holds(self, name: str, state: State) -> None:
        held = [0] * len(state.buckets)
        for reservation in state.open.values():
            for number, hold in zip(reservation.buckets, reservation.holds, strict=True):
                held[number] += hold
        for number, bucket in enumerate(state.buckets):
            if bucket.held != held[number]:
                self.violate(f"{name}: {bucket.dimension.name} holds {bucket.held}, its reservations {held[number]}")

    # -- the store ---------------------------------------------------------------------------------------------------

    def wrote(self, primary: Primary, ledger: str, before: Head | None, after: Head, record: Record | None) -> None:
        """A primary has a new head."""
        if after.successor:
            self.released.add(after.nonce)
        else:
            # It could not be told of its own letting go, and goes on.
            self.released.discard(after.nonce)
        if record is not None:
            if before is None:
                self.violate(f"{primary.lineage}: record {record.seq} without an owner")
                return
            if record.seq != before.seq + 1 or record.previous != before.hash:
                self.violate(
                    f"{primary.lineage}: record {record.seq} of epoch {record.epoch} was accepted behind {before.seq}"
                )
            if primary is not self.world.store.primary:
                self._check_superseded(primary, ledger, after)
            if record.epoch != after.epoch:
                self.violate(f"{primary.lineage}: a record of epoch {record.epoch} was accepted in epoch {after.epoch}")
            if record.at > START_WALL + self.world.loop.now + AHEAD_US:
                ahead = (record.at - START_WALL - self.world.loop.now) / 1e6
                self.violate(f"{primary.lineage}: ledger time is {ahead:.3f} s ahead of true time")
            if record.at < before.at:
                self.violate(f"{primary.lineage}: ledger time ran back from {before.at} to {record.at}")
            known = self.writers.setdefault((primary.lineage, ledger, after.epoch), after.nonce)
            if known != after.nonce:
                self.violate(f"{primary.lineage}: two owners have written in epoch {after.epoch}")
            self._goes_on(primary, ledger, after)
            return
        if before is None or after.nonce != before.nonce:
            if before is not None and after.hash != before.hash and after.epoch <= before.epoch:
                self.violate(f"{primary.lineage}: epoch {after.epoch} was put in the place of epoch {before.epoch}")
            # An owner may also put back its own acquisition, which the store has lost.
            is_known = after.nonce in self.since
            self.since.setdefault(after.nonce, self.world.loop.now)
            node = next(node for node in self.world.nodes if node.name == after.node)
            self.offices.setdefault(after.nonce, (node.name, node.process_name))
            if primary is self.world.store.primary:
                if before is not None and before.seq > 0:
                    is_new = before.lineage != after.lineage and not is_known
                else:
                    # If there was an owner, the store has lost everything.
                    is_new = bool(self.reigns.get(ledger)) and not is_known
                reign = Reign(self.world.loop.now, after.nonce, node.name, node.process_name, is_new)
                self.reigns.setdefault(ledger, []).append(reign)
        self._goes_on(primary, ledger, after)
        if before is not None:
            if after.epoch < before.epoch:
                self.violate(f"{primary.lineage}: epoch {after.epoch} follows epoch {before.epoch}")
            if after.hash != before.hash:
                self.counts["put back"] += 1
                self.world.replaced[ledger] = self.world.loop.now
                self._accepted_whole(primary, ledger, after)

    def _accepted_whole(self, primary: Primary, ledger: str, head: Head) -> None:
        """Books that are put back whole may hold records that were never written alone: they are accepted with them."""
        known = {record.hash for each in self.world.store.primaries for _, record, *_ in each.accepted}
        hash, found = head.hash, []
        while hash not in known and (record := self.world.store.sealed.get(hash)) is not None:
            found.append(record)
            hash = record.previous
        now = self.world.loop.now
        primary.accepted += [(ledger, record, head.epoch, head.nonce, now) for record in reversed(found)]

    def _goes_on(self, primary: Primary, ledger: str, head: Head) -> None:
        """An owner whose successor's acquisition the store has lost is the owner again."""
        reigns = self.reigns.get(ledger)
        if reigns and primary is self.world.store.primary and reigns[-1].nonce != head.nonce:
            node = next(node for node in self.world.nodes if node.name == head.node)
            reigns.append(Reign(self.world.loop.now, head.nonce, node.name, node.process_name, False))

    def _check_superseded(self, primary: Primary, ledger: str, head: Head) -> None:
        """A primary that is none any more has accepted a record: nobody may own the ledger elsewhere, if this owner was
        there before."""
        reigns = self.reigns.get(ledger, ())
        if self.world.store.was_emptied or not reigns or reigns[-1].nonce == head.nonce:
            return
        if self.since[head.nonce] < primary.superseded_at < reigns[-1].at:
            self.violate(
                f"{primary.lineage} accepted a record of {head.node} when {reigns[-1].node} owned the ledger at "
                f"another primary since {reigns[-1].at / 1e6:.3f} s"
            )

    @property
    def last_superseded(self) -> int:
        """When the store last had another primary."""
        return max((one.superseded_at for one in self.world.store.primaries[:-1]), default=-OLD_US - 1)

    # -- at the end --------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Everything is whole again, and nobody asks any more."""
        for key, told in self.told.items():
            if told.granted is not None:
                at = told.granted.context.granted_at
                told.served_at = told.granted_at
                for decided in self.decided.get(key, ()):
                    if decided.what == "granted" and decided.ledger_at == at:
                        told.served_at, told.served_by = decided.at, decided.node
                        break
        for ledger in self.world.ledgers:
            self._finish(ledger)
        self._check_places()

    def chain(self, head: Head, ledger: str) -> list[Record] | None:
        """The records up to a head, oldest first; ``None``: it does not go back to the beginning."""
        found: list[Record] = []
        hash, first = head.hash, genesis(ledger)
        while hash != first:
            record = self.world.store.sealed.get(hash)
            if record is None:
                return None
            found.append(record)
            hash = record.previous
        found.reverse()
        return found

    def _finish(self, ledger: str) -> None:
        world = self.world
        primary = world.store.primary
        head = primary.head(ledger)
        calls = [call for call in self.calls.values() if call.ledger == ledger]
        if head is None:
            if calls:
                self.violate(f"{ledger}: the store has no journal of it")
            return
        chain = self.chain(head, ledger)
        if chain is None:
            self.violate(f"{ledger}: the journal does not go back to its beginning")
            return
        state = world.machine.empty(ledger)
        for record in chain:
            for payload in decode_payload(record.payload):
                for event in world.machine.decode(payload):
                    state.apply(event)
        self._sum_holds("the journal", state)
        self._sum_charges(state)
        owner = world.owner_of(ledger)
        if owner is None:
            self.violate(f"{ledger} has no owner although nothing has been wrong for long")
        elif dumped(owner[1].state, head.form) != dumped(state, head.form):
            self.violate(f"{ledger}: the books of {owner[0].name} are not those of its journal")
        self._check_kept(ledger, primary, chain, state)
        survives = {record.hash for record in chain}
        lost = self._check_lost(ledger, survives)
        for call in calls:
            self._check_call(call, state, lost)
        for key, first, second in self.twice:
            if self.calls[key].ledger == ledger and key not in lost:
                self._twice(key, first, second)
        self._check_refill(ledger, state, lost)

    def _check_kept(self, ledger: str, primary: Primary, chain: list[Record], whole: State) -> None:
        """What the next owner would read are the last records of the chain, and a snapshot that goes with them."""
        kept = primary.ledgers[ledger]
        head = kept.head
        assert head is not None
        tail = [record for record in kept.records if record.seq > head.snapshot_seq]
        if [record.hash for record in tail] != [record.hash for record in chain if record.seq > head.snapshot_seq]:
            self.violate(f"{ledger}: the records behind the snapshot are not those of the journal")
            return
        if not head.snapshot:
            return
        chunks = kept.chunks.get(head.snapshot, {})
        if len(chunks) != head.snapshot_chunks:
            self.violate(f"{ledger}: the snapshot has {len(chunks)} chunks, not {head.snapshot_chunks}")
            return
        state = self.world.machine.restore(ledger, [chunks[index] for index in sorted(chunks)])
        for record in tail:
            for payload in decode_payload(record.payload):
                for event in self.world.machine.decode(payload):
                    state.apply(event)
        if dumped(state, head.form) != dumped(whole, head.form):
            self.violate(f"{ledger}: snapshot and tail do not give the books of the whole journal")

    def _check_lost(self, ledger: str, survives: set[bytes]) -> dict[str, bool]:
        """Keys of what was accepted and is gone; and whether that is stated: their owner ended, or was cut off.

        An owner that lives puts back what the store has lost, or tells the one that has followed.
        """
        world = self.world
        lost: dict[str, bool] = {}
        final = world.store.primary
        for primary in world.store.primaries:
            for name, record, _, nonce, at in primary.accepted:
                if name != ledger or record.hash in survives:
                    continue
                self.lost_records += 1
                if primary is final and not world.was_replaced(ledger, at):
                    self.violate(
                        f"{primary.lineage} has accepted record {record.seq} of epoch {record.epoch} and lost it"
                    )
                excused = self._was_nobody_left(ledger, at) or self._was_left_alone(primary, nonce, at)
                for payload in decode_payload(record.payload):
                    for event in world.machine.decode(payload):
                        key = getattr(event, "key", None)
                        if isinstance(key, str):
                            lost[key] = lost.get(key, False) or excused
        return lost

    def _was_nobody_left(self, ledger: str, at: int) -> bool:
        """Whether, when a primary ended that had this, nobody could put it back: the owner had let go, or was hurt."""
        for primary in self.world.store.primaries:
            end = max(primary.superseded_at, primary.ended_at)
            if end < at:
                continue
            before = [reign for reign in self.reigns.get(ledger, ()) if reign.at <= end]
            if not before or before[-1].nonce in self.released:
                return True
            if self.world.was_hurt(before[-1].node, before[-1].process, end):
                return True
        return False

    def _was_left_alone(self, primary: Primary, nonce: bytes, at: int) -> bool:
        """Whether only its owner knew of what a primary accepted that was none any more, and it had let go or was hurt
        when that primary ended."""
        if at <= primary.superseded_at:
            return False
        return nonce in self.released or self.world.was_hurt(*self.offices[nonce], primary.ended_at)

    def _check_call(self, call: Call, state: State, lost: dict[str, bool]) -> None:
        told = self.told[call.key]
        ended = state.ended.get(call.key)
        if told.granted is None and told.committed is None and told.released is None:
            return
        if ended is None and call.key not in state.open:
            if told.heard_at > self.last_superseded + OLD_US:
                self.violate(
                    f"{call.key} is not in the journal, and its caller was told at {told.heard_at / 1e6:.3f} s"
                )
            elif lost.get(call.key):
                self.counts["lost, as stated"] += 1
            elif call.key in lost:
                self.violate(f"{call.key} is lost, although the owner lived that has acknowledged it")
            else:
                self.violate(
                    f"{call.key} is not in the journal, and its caller was told {told.granted or told.released}"
                )
            return
        if lost.get(call.key):
            return
        if told.committed is not None and not told.committed.stale:
            if ended is None or ended.kind is not EndKind.SETTLED:
                self.violate(f"{call.key} was settled, and the journal says {ended and ended.kind.name}")
        elif told.released is not None and (ended is None or ended.kind is EndKind.SETTLED):
            self.violate(f"{call.key} was released, and the journal says {ended and ended.kind.name}")

    def _check_refill(self, ledger: str, state: State, lost: dict[str, bool]) -> None:
        """What callers were granted never exceeds what the limits refilled: counted on the true clock.

        Each grant that a caller has heard of counts from when it was decided; what its end gave back, from then. At one
        instant, what was given back of older grants comes first: what the burst has no room for then is lost. Of a call
        that was granted and ended at that instant only what it kept counts, since its refund is of nothing older.
        """
        world = self.world
        for bucket in state.buckets:
            window = WINDOW_US.get(bucket.window)
            if window is None or not bucket.pool:
                continue
            moves: list[tuple[int, int, int, str]] = []
            for key, told in self.told.items():
                if told.granted is None or self.calls[key].ledger != ledger:
                    continue
                if told.granted.context.pool != bucket.pool:
                    continue
                hold = dict(told.granted.context.charges).get(bucket.dimension, 0)
                decided = self.decided.get(key, ())
                granted_at = told.granted_at if told.served_at is None else told.served_at
                if key in lost:
                    continue
                taken = hold
                ended = state.ended.get(key)
                place = -1 if ended is None else self._place(ended.buckets, state.buckets.index(bucket))
                if ended is not None and place >= 0 and ended.charges[place] < hold:
                    ended_at = next((d.at for d in decided if d.what != "granted"), granted_at)
                    if ended_at > granted_at:
                        moves.append((ended_at, 0, ended.charges[place] - hold, key))
                    else:
                        taken = ended.charges[place]
                elif ended is not None and place >= 0 and ended.charges[place] > hold:
                    ended_at = next((d.at for d in reversed(decided) if d.what != "granted"), granted_at)
                    moves.append((max(ended_at, granted_at), 2, ended.charges[place] - hold, key))
                moves.append((granted_at, 1, taken, key))
            moves.sort()
            level, at = float(bucket.burst), 0
            slack = bucket.amount * DRIFT * world.loop.now / window + bucket.amount * 0.05e6 / window + 1
            for when, kind, amount, key in moves:
                level = min(bucket.burst, level + bucket.amount * (when - at) / window)
                at = when
                level -= amount
                if kind == 1 and level < -slack:
                    self.violate(
                        f"{ledger}: at {when / 1e6:.3f} s {key} was granted {-level:.0f} more {bucket.dimension.name} "
                        "than there was"
                    )
                    break

    @staticmethod
    def _place(buckets: tuple[int, ...], number: int) -> int:
        return buckets.index(number) if number in buckets else -1

    def _check_places(self) -> None:
        """Nobody is served before who came clearly earlier, and waits for the same."""
        lanes: dict[tuple[str, int, int], list[tuple[int, str]]] = {}
        for key, told in self.told.items():
            if told.served_at is not None and told.granted is not None:
                call = self.calls[key]
                lanes.setdefault((call.ledger, call.priority, call.size), []).append((told.served_at, key))
        for (ledger, priority, size), served in lanes.items():
            served.sort()
            waited = sorted(
                (told.queued_at, key)
                for key, told in self.told.items()
                if told.queued_at is not None
                and (call := self.calls[key]).ledger == ledger
                and call.priority == priority
                and call.size == size
            )
            for served_at, key in served:
                came = self.calls[key].born_at
                for queued_at, other in waited:
                    if queued_at + PLACE_US >= came:
                        break
                    if other == key or not self._waits(other, served_at, self.told[key].served_by):
                        continue
                    self.violate(
                        f"{key}, which came at {came / 1e6:.3f} s, was served at {served_at / 1e6:.3f} s before "
                        f"{other}, which waits since {queued_at / 1e6:.3f} s"
                    )
                    return

    def _waits(self, key: str, at: int, by: str) -> bool:
        """Whether a caller waited at ``at``, and nothing has come between it and the owner, ``by``."""
        told, call = self.told[key], self.calls[key]
        if told.served_at is not None and told.served_at <= at:
            return False
        if told.withdrawn_at is not None and told.withdrawn_at <= at + PLACE_US:
            return False
        if call.trouble and call.trouble[0] <= at + 1_000_000:
            return False
        if at + PLACE_US > call.born_at + call.max_wait_us or told.queued_at is None:
            return False
        if call.state == "over" and told.granted is None:
            return False
        if self.world.was_silent(told.queued_by, told.queued_at, at):
            # Nobody hears that its owner is none any more.
            return False
        return not self.world.was_troubled(self.world.nodes[call.first].name, told.queued_at, at, (call.client, by))


def dumped(state: State, form: int) -> bytes:
    """The books in the form that all owners may write."""
    return b"".join(state.dump(form))


__all__ = ["Checks", "Commit", "Violation"]
