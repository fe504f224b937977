"""Calls that are made at once, while the coordinator is told behind them: observe mode in the client.

The grants of one Reserve share an :class:`Ahead`. Until the Reserve is answered it keeps what is reported of the calls;
then it sends it on, under the ids and the context of the server's grant. If there is none, the outcomes go as those of
calls that were made without a grant. Nothing here waits, and nothing raises for want of a coordinator.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from paceline_client import _wire as wire
from paceline_client._core import Failure, Kind, Operation, Timer
from paceline_client._grant import Grant
from paceline_client._hub import Hub
from paceline_client._model import Candidate, Headers
from paceline_client._outcome import CallOutcome
from paceline_client._plan import Plan
from paceline_client._send import Account, Receipt, Renewals, Submit
from paceline_client.stubs.paceline.v1 import coordinator_pb2 as pb

MAX_EARLY: Final = 4
"""Early reports of one call that are kept until its Reserve is answered."""

_Early = tuple[CallOutcome, Headers, float]
_Outcome = tuple[Grant, CallOutcome, Headers, float | None]


class Ahead(Account):
    """The account of calls whose Reserve is on its way; also what waits for its answer."""

    __slots__ = ("_answered", "_context", "_early", "_ends", "_grants", "_ids", "_lock", "_plan", "_released")

    def __init__(self, hub: Hub, submit: Submit, plan: Plan) -> None:
        super().__init__(hub, submit, plan.tenant, plan.workspace, plan.route)
        self._plan = plan
        self._lock = threading.Lock()
        self._answered = False
        self._context = b""
        self._ids: dict[str, str] = {}
        """The server's id of each grant. Without one, the call was made without a grant."""
        self._grants: Sequence[Grant] = ()
        self._early: dict[str, list[_Early]] = {}
        self._ends: list[_Outcome] = []
        self._released: list[str] = []

    def start(self, grants: Sequence[Grant], operation: Operation) -> None:
        """Tell the coordinator."""
        self._grants = grants
        operation.waiter = self
        self.submit(operation)

    # -- what becomes of the calls ----------------------------------------------------------------------------------

    def report(self, grant: Grant, outcome: CallOutcome, headers: Headers, header_time: float) -> None:
        """Report what the headers say; without a grant of the server it is kept for the outcome."""
        with self._lock:
            number = self._ids.get(grant.reservation_id)
            if number is None:
                early = self._early.setdefault(grant.reservation_id, [])
                if len(early) < MAX_EARLY:
                    early.append((outcome, headers, header_time))
                return
        self._report(number, (outcome, headers, header_time), grant._output, self.submit)

    def commit(
        self, grant: Grant, outcome: CallOutcome, headers: Headers, header_time: float | None, timer: Timer | None
    ) -> None:
        """Commit, when the Reserve is answered."""
        with self._lock:
            if not self._answered:
                self._ends.append((grant, outcome, headers, header_time))
                return
        self._commit((grant, outcome, headers, header_time), timer, self.submit)

    def release(
        self,
        reservation_id: str,
        context: bytes,
        candidates: Sequence[Candidate] = (),
        timer: Timer | None = None,
    ) -> None:
        """The call was not made. What the server never granted needs no release."""
        with self._lock:
            if not self._answered:
                self._released.append(reservation_id)
                return
            number = self._ids.get(reservation_id)
            self._early.pop(reservation_id, None)
        if number is not None:
            super().release(number, self._context, timer=timer)

    # -- the answer ---------------------------------------------------------------------------------------------------

    def deliver(self, operation: Operation) -> None:
        """The Reserve has ended."""
        hub = self.hub
        try:
            granted = self._read(operation)
            with self._lock:
                self._answered = True
                if granted is not None:
                    self._context = granted.context
                    numbers = granted.child_reservation_ids or (_number(operation),)
                    self._ids = dict(zip([grant.reservation_id for grant in self._grants], numbers, strict=False))
                grants, ends, released = self._grants, self._ends, self._released
                self._grants, self._ends, self._released = (), [], []
                ended = {grant.reservation_id for grant, *_ in ends}
                # A server may grant fewer than it was asked for; the others are calls without a grant.
                early = {id: self._early.pop(id) for id in list(self._early) if id in self._ids}
            for each in released:
                self._early.pop(each, None)
                number = self._ids.get(each)
                if number is not None:
                    super().release(number, self._context)
            for grant in grants:
                number = self._ids.get(grant.reservation_id)
                if number is not None:
                    for report in early.get(grant.reservation_id, ()):
                        self._report(number, report, grant._output, hub.submit)
            for end in ends:
                self._commit(end, None, hub.submit)
            held = [
                grant
                for grant in grants
                if not grant.ended and grant.reservation_id in self._ids and grant.reservation_id not in ended
            ]
            if granted is not None and held:
                self._renew(granted, _number(operation), held)
        finally:
            hub.caught_up(operation)

    def _read(self, operation: Operation) -> pb.Grant | None:
        """The server's grant for these calls. One that cannot be used is given back."""
        result, number = operation.result, _number(operation)
        if not isinstance(result, pb.ReserveResponse):
            if isinstance(result, Failure) and not result.unreachable:
                self.hub.warn(
                    f"reserve {result.code}",
                    f"paceline: observe mode: a reserve was not accepted: {result.code}: {result.message}",
                )
            elif operation.sent:
                # It may have been granted, or may yet be.
                super().release(number, b"", () if self._plan.ladder else self._plan.candidates)
            return None
        if not result.HasField("grant"):
            return None
        granted = result.grant
        target = wire.target_of(granted.target)
        known = self._grants[0].target
        asked = target if self._plan.ladder else known
        self.hub.local.learn_pool(asked, granted.pool, self._plan.ladder, granted.candidate_index)
        elsewhere = granted.candidate_index != 0 if not self._plan.ladder else known.model not in ("", target.model)
        if elsewhere:
            super().release(number, granted.context)
            return None
        return granted

    def _renew(self, granted: pb.Grant, number: str, held: Sequence[Grant]) -> None:
        now = self.hub.clock()
        expires_in = wire.seconds(granted.expires_in)
        for grant in held:
            grant.pool = granted.pool
            grant.expires_at = now + expires_in
        if expires_in > 0:
            Renewals(self.hub, number, self._context, held, now).schedule(now + expires_in / 2, held)

    # -- to the coordinator -------------------------------------------------------------------------------------------

    def _report(self, number: str, early: _Early, output: int | None, submit: Submit) -> None:
        outcome, headers, header_time = early
        request = pb.RenewRequest(
            reservation_id=number,
            context=self._context,
            output_tokens=output,
            observation=wire.outcome_message(outcome, headers),
        )
        submit(Operation(Kind.RENEW, request, header_time, Receipt(self), header_time))

    def _commit(self, end: _Outcome, timer: Timer | None, submit: Submit) -> None:
        grant, outcome, headers, header_time = end
        number = self._ids.get(grant.reservation_id)
        early = self._early.pop(grant.reservation_id, [])
        if number is not None:
            request = pb.CommitRequest(
                reservation_id=number, context=self._context, outcome=wire.outcome_message(outcome, headers)
            )
            submit(Operation(Kind.COMMIT, request, self.hub.clock(), Receipt(self, grant), header_time), timer)
            return
        if not headers:
            # They were not sent before, because there was nothing to send them for.
            _, headers, header_time = next((each for each in early if each[1]), (outcome, [], None))
        if grant.target.model:
            self.observe(grant.target, outcome, headers, header_time)


def _number(operation: Operation) -> str:
    request = operation.request
    return request.reservation_id if isinstance(request, pb.ReserveRequest) else ""
