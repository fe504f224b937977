"""Explain: why a reservation was decided as it was, and how a call would be decided now. Changes nothing.

What is past comes from the owner's memory of its newest decisions (:mod:`paceline.engine.audit`), what is present from
its books and its queue (:mod:`paceline.engine.explaining`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from uuid import uuid4

import msgspec

from paceline.engine import explaining as ex
from paceline.engine.bucket import EndKind
from paceline.engine.dimensions import Dimension
from paceline.engine.state import Ended, Reservation, State
from paceline.engine.waiting import Pending
from paceline.frontend import audit, view
from paceline.frontend.admin_fleet import NotHere
from paceline.frontend.auth import Caller, Identity
from paceline.frontend.errors import Code, Problem, invalid
from paceline.frontend.explained import merged
from paceline.frontend.places import Destination
from paceline.frontend.replies import REASONS, denial_words
from paceline.frontend.requests import Requests, uuid_of
from paceline.frontend.routing import Slot
from paceline_client.stubs import v1 as pb

Shown = Callable[[Slot, State, str, Pending | Reservation | Ended], pb.Reservation]
"""A reservation as AdminService shows it."""

_UNKNOWN = "reservation_id: no reservation of this id is on the books, or among the newest decisions"


def reservation(
    books: Iterable[tuple[Slot, State]], names: Sequence[str], number: str, shown: Shown
) -> pb.ExplainResponse:
    """What is known of an id that one of ``names`` used. Raises :class:`Problem`."""
    number = uuid_of(number, "reservation_id")
    found: list[pb.ExplainResponse] = []
    for slot, state in books:
        found += _in_ledger(slot, state, {f"{name}/{number}": name for name in names}, shown)
    if not found:
        raise NotHere(Code.NOT_FOUND, _UNKNOWN)
    return merged(found)


# -- one ledger --------------------------------------------------------------------------------------------------------


def _in_ledger(slot: Slot, state: State, keys: dict[str, str], shown: Shown) -> list[pb.ExplainResponse]:
    engine = slot.engine
    if engine is None:
        return []
    records = engine.stats.audit.of(keys.keys())
    waiters = engine.waiters()
    found = []
    for key in keys:
        own = [record for record in records if record.key == key or key in record.keys]
        entry = state.open.get(key) or waiters.get(key) or state.ended.get(key)
        if entry is None and not own:
            continue
        response = audit.history(audit.entry_of(slot.account, state.buckets, record) for record in own)
        response.reservation.reservation_id = key.rpartition("/")[2]
        if entry is not None:
            message = shown(slot, state, key, entry)
            for field in ("tenant", "workspace", "route", "priority", "pool"):
                if not getattr(message, field):
                    setattr(message, field, getattr(response.reservation, field))
            response.reservation.CopyFrom(message)
        if isinstance(entry, Pending):
            response.ClearField("decision")
            _add_waiting(response, slot, state, engine.explainer(slot.owner.now()), entry)
        elif isinstance(entry, Reservation):
            _add_open(response, entry, slot.owner.now())
        elif isinstance(entry, Ended) and not own:
            _add_ended(response, entry)
        found.append(response)
    return found


def _add_waiting(
    response: pb.ExplainResponse, slot: Slot, state: State, explainer: ex.Explainer, waiter: Pending
) -> None:
    now = slot.owner.now()
    for each in explainer.waiting(waiter.key):
        response.steps.append(_step(state, each, each.index, waits=True))
    if waiter.expected_by is not None and waiter.expected_by > now:
        left = waiter.expected_by - now
        words = f"it will have had its turn in {audit.seconds(left)}, if it gets no more than what it is entitled to"
        response.steps.add(message=words).wait.FromMicroseconds(left)
    left = max(0, waiter.deadline - now)
    response.steps.add(message=f"it is denied in {audit.seconds(left)}, if its turn has not come by then")


def _add_open(response: pb.ExplainResponse, found: Reservation, now: int) -> None:
    if not response.HasField("decision"):
        words = "granted; the owner of the ledger has changed since, and does not remember why"
        response.steps.add(message=words, time=view.timestamp(found.granted_at), candidate_index=found.index)
        response.decision.grant.pool, response.decision.grant.candidate_index = found.pool, found.index
    left = max(0, found.expires_at - now)
    response.decision.grant.expires_in.FromMicroseconds(left)
    if found.max_output_tokens is not None:
        response.decision.grant.max_output_tokens = found.max_output_tokens
    response.steps.add(message=f"it is open; its hold ends in {audit.seconds(left)}, unless it is renewed")


_ENDS = {
    EndKind.SETTLED: "settled",
    EndKind.RELEASED: "given back: the call was not made",
    EndKind.EXPIRED: "its hold ended without an outcome",
    EndKind.TOMBSTONE: "released before it was granted: it can never be granted",
    EndKind.TOGETHER: "granted in bulk: ask for one of its calls",
}


def _add_ended(response: pb.ExplainResponse, found: Ended) -> None:
    if found.granted_at is not None:
        words = "granted; the decision is no longer among the newest, and why is not known"
        response.steps.add(message=words, time=view.timestamp(found.granted_at), candidate_index=found.index)
        response.decision.grant.pool, response.decision.grant.candidate_index = found.pool, found.index
    response.steps.add(message=_ENDS[found.kind], time=view.timestamp(found.ended_at))


# -- a call that is not made -------------------------------------------------------------------------------------------


def request(
    slots: dict[str, Slot], requests: Requests, identity: Identity, message: pb.ReserveRequest
) -> pb.ExplainResponse:
    """How a call would be decided now by those of its ledgers that are here. Raises :class:`Problem`."""
    asked = pb.ReserveRequest()
    asked.CopyFrom(message)
    asked.reservation_id = str(uuid4())
    try:
        plan = requests.reserve(asked, Caller(identity))
    except Problem as problem:
        violations = tuple((f"request.{path}", words) for path, words in problem.violations)
        raise Problem(problem.code, f"request.{problem.message}", violations, problem.retry_after_us) from None
    places: dict[str, list[int]] = {}
    for place, (_, destination) in enumerate(plan.choices):
        places.setdefault(destination.account, []).append(place)
    found = []
    for account, mine in places.items():
        slot = slots.get(account)
        if slot is None or slot.is_remote:
            continue
        state, engine = view.books(slot), slot.engine
        if engine is not None:
            operation = msgspec.structs.replace(
                plan.operation, candidates=tuple(plan.operation.candidates[place] for place in mine)
            )
            outlook = engine.explainer(slot.owner.now()).request(operation)
            found.append(_outlook(state, outlook, [plan.choices[place] for place in mine], operation.hold_us))
    if not found:
        raise NotHere(Code.NOT_FOUND, "request.candidates: no ledger of these accounts has decided anything yet")
    return merged(found)


def _outlook(
    state: State, outlook: ex.Outlook, choices: list[tuple[int, Destination]], hold_us: int
) -> pb.ExplainResponse:
    response = pb.ExplainResponse()
    for step in outlook.steps:
        response.steps.append(_step(state, step, choices[step.index][0]))
    if not outlook.known:
        return response
    decision = response.decision
    bound = next((step for step in outlook.steps if step.index == outlook.index and step.bucket is not None), None)
    if bound is None and outlook.binding is not None:
        bound = next((step for step in outlook.steps if step.dimension is outlook.binding), None)
    limit = None if bound is None else _reference(state, bound)
    granted = outlook.index is not None and (outlook.reason is None or outlook.observed)
    if granted and outlook.index is not None:
        index, destination = choices[outlook.index]
        decision.grant.candidate_index, decision.grant.pool = index, destination.pool
        decision.grant.target.CopyFrom(destination.target)
        decision.grant.expires_in.FromMicroseconds(hold_us)
        decision.grant.waited.SetInParent()
    elif outlook.reason is not None and outlook.index is not None:
        denial = decision.denial
        denial.reason, denial.pool = REASONS[outlook.reason], choices[outlook.index][1].pool
        denial.message = denial_words(outlook.reason, outlook.binding)
        if outlook.wait_us is not None:
            denial.retry_after.FromMicroseconds(outlook.wait_us)
    else:
        response.ClearField("decision")
        return response
    if outlook.observed and outlook.reason is not None:
        decision.observed_decision.reason = REASONS[outlook.reason]
    elif outlook.observed:
        decision.observed_decision.wait.FromMicroseconds(outlook.wait_us or 0)
    if limit is not None:
        where = decision.observed_decision if outlook.observed else decision
        where.binding_dimension.CopyFrom(limit)
    return response


# -- the present -------------------------------------------------------------------------------------------------------


def _step(state: State, found: ex.Step, index: int, *, waits: bool = False) -> pb.ExplainStep:
    step = pb.ExplainStep(candidate_index=index, message=_words(state, found, waits=waits))
    limit = _reference(state, found)
    if limit is not None:
        step.limit.CopyFrom(limit)
    if found.needed is not None and found.available is not None:
        step.needed, step.available = found.needed, found.available
    if found.ahead is not None:
        step.position = found.ahead
    if found.wait_us is not None:
        step.wait.FromMicroseconds(found.wait_us)
    return step


def _reference(state: State, found: ex.Step) -> pb.DimensionRef | None:
    if found.bucket is None:
        if found.dimension is None:
            return None
        return pb.DimensionRef(pool=found.pool, dimension=pb.Dimension.ValueType(found.dimension))
    bucket = state.buckets[found.bucket]
    return pb.DimensionRef(
        pool=bucket.pool,
        share=bucket.share,
        dimension=pb.Dimension.ValueType(bucket.dimension),
        window=pb.Window.ValueType(bucket.window),
    )


_FIXED = {
    ex.Finding.NEW: "nothing was decided in this pool yet: its limits are as configured, and nobody waits",
    ex.Finding.FULL: "the ledger has its most open reservations: the next call that ends makes room",
    ex.Finding.GATHERING: "the owner of the ledger is new, and lets all come back that waited before it serves any",
}


def _words(state: State, found: ex.Step, *, waits: bool) -> str:
    return f"{found.pool}: {_FIXED.get(found.finding) or _why(state, found, waits=waits)}"


def _why(state: State, found: ex.Step, *, waits: bool) -> str:
    first = f"; {audit.calls(found.ahead)} {'comes' if found.ahead == 1 else 'come'} first" if found.ahead else ""
    turn = (
        "" if found.wait_us is None else f"; its turn comes in {audit.seconds(found.wait_us)} if nothing is given back"
    )
    if found.finding is ex.Finding.FITS:
        return "it fits, and is served at once" if waits else "it fits, and would be granted at once"
    if found.finding is ex.Finding.NEVER and found.reason is not None:
        return denial_words(found.reason, found.dimension) + _amounts(state, found)
    if found.finding is ex.Finding.TURN:
        return f"there is room{first}{turn}"
    if found.finding is ex.Finding.KEPT:
        return f"what is left is set aside for others{_amounts(state, found)}{first}"
    if found.finding is ex.Finding.BLOCKED:
        in_flight = found.dimension is Dimension.CONCURRENCY
        words = "the upstream lets no more calls in at once" if in_flight else "the upstream asked to be left alone"
        return words + first + turn
    return f"a limit binds{_amounts(state, found)}{first}{turn}"


def _amounts(state: State, found: ex.Step) -> str:
    if found.bucket is None or found.needed is None or found.available is None:
        return ""
    bucket = state.buckets[found.bucket]
    name = bucket.dimension.name.lower()
    whose = f" of share {bucket.share}" if bucket.share else ""
    return f": it needs {audit.quantity(name, found.needed)}{whose}, of which {_left(name, found.available)} is left"


def _left(dimension: str, value: int) -> str:
    if value <= 0:
        return "nothing"
    return audit.quantity(dimension, value) if dimension == "spend" else f"{value:,}"


def subject(message: pb.ExplainRequest) -> str:
    """Which of the two is asked for. Raises :class:`Problem` if none is."""
    found = message.WhichOneof("subject")
    if found is None:
        raise invalid("reservation_id", "or `request` is required")
    return str(found)
