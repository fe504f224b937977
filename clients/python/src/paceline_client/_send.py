"""What goes to the coordinator on behalf of a call: made from plain values, and sent in the background."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Final, Protocol

from paceline_client import _wire as wire
from paceline_client._core import Failure, Kind, Operation, Timer, new_id
from paceline_client._grant import Grant
from paceline_client._hub import Hub
from paceline_client._model import Candidate, Headers, Target
from paceline_client._outcome import CallOutcome
from paceline_client.stubs.paceline.v1 import coordinator_pb2 as pb

MAX_RENEWED: Final = 3_600.0
"""A call that has not ended by then is no longer renewed: the ledger forgets it anyway. Unit: seconds."""


class Submit(Protocol):
    """The way to the coordinator: that of a thread, or that of an event loop."""

    def __call__(self, operation: Operation, timer: Timer | None = None, /) -> None: ...


class Account:
    """Who a call is booked on, and the way there."""

    __slots__ = ("hub", "route", "submit", "tenant", "workspace")

    def __init__(self, hub: Hub, submit: Submit, tenant: str, workspace: str, route: str) -> None:
        self.hub = hub
        self.submit = submit
        self.tenant = tenant
        self.workspace = workspace
        self.route = route

    def commit(
        self,
        grant: Grant,
        outcome: CallOutcome,
        headers: Headers,
        header_time: float | None,
        timer: Timer | None,
    ) -> None:
        """Commit a grant, which needs no renewal any more."""
        request = pb.CommitRequest(
            reservation_id=grant.reservation_id,
            context=grant._context,
            outcome=wire.outcome_message(outcome, headers),
        )
        self.submit(Operation(Kind.COMMIT, request, self.hub.clock(), Receipt(self, grant), header_time), timer)

    def release(
        self,
        reservation_id: str,
        context: bytes,
        candidates: Sequence[Candidate] = (),
        timer: Timer | None = None,
    ) -> None:
        """Release a reservation, or withdraw one that may be waiting, which has no ``context``."""
        request = pb.ReleaseRequest(reservation_id=reservation_id, context=context)
        if not context:
            request.targets.extend(wire.target_message(each) for each in candidates)
        self.submit(Operation(Kind.RELEASE, request, self.hub.clock(), Receipt(self)), timer)

    def report(self, grant: Grant, outcome: CallOutcome, headers: Headers, header_time: float) -> None:
        """Report what the headers say, while the call goes on."""
        request = pb.RenewRequest(
            reservation_id=grant.reservation_id,
            context=grant._context,
            output_tokens=grant._output,
            observation=wire.outcome_message(outcome, headers),
        )
        self.submit(Operation(Kind.RENEW, request, header_time, Receipt(self), header_time))

    def observe(self, target: Target, outcome: CallOutcome, headers: Headers, header_time: float | None) -> None:
        """Report a call that was made without a grant."""
        request = pb.ObserveRequest(
            observation_id=new_id(),
            target=wire.target_message(target),
            tenant=self.tenant,
            workspace=self.workspace,
            route=self.route,
            outcome=wire.outcome_message(outcome, headers),
        )
        self.submit(Operation(Kind.OBSERVE, request, self.hub.clock(), Receipt(self), header_time))


class Receipt:
    """Gives what was booked to the grant, and says once what the coordinator does not accept."""

    __slots__ = ("_account", "_grant")

    def __init__(self, account: Account, grant: Grant | None = None) -> None:
        self._account = account
        self._grant = grant

    def deliver(self, operation: Operation) -> None:
        result = operation.result
        if isinstance(result, pb.CommitResponse) and self._grant is not None:
            self._grant.settlement = wire.settlement(result)
        elif isinstance(result, Failure) and not result.unreachable:
            what = operation.kind.value
            self._account.hub.warn(
                f"{what} {result.code}",
                f"paceline: a {what} was not accepted: {result.code}: {result.message}",
            )


class Renewals:
    """Renews the hold of a grant, or of all grants of a batch, at half of its time, while somebody holds them."""

    __slots__ = ("_context", "_grants", "_hub", "_id", "_until")

    def __init__(self, hub: Hub, reservation_id: str, context: bytes, grants: Sequence[Grant], now: float) -> None:
        self._hub = hub
        self._id = reservation_id
        self._context = context
        self._grants = [weakref.ref(grant) for grant in grants]
        self._until = now + MAX_RENEWED

    def due(self, now: float) -> None:
        """Called under the lock of the hub."""
        held = self._held()
        if not held or now > self._until:
            return
        output = held[0]._output if len(self._grants) == 1 else None
        request = pb.RenewRequest(reservation_id=self._id, context=self._context, output_tokens=output)
        self._hub.core.submit(Operation(Kind.RENEW, request, now, self), now)

    def deliver(self, operation: Operation) -> None:
        """The answer to a renewal."""
        held = self._held()
        result = operation.result
        if not held or not isinstance(result, pb.RenewResponse) or not result.HasField("expires_in"):
            return
        left = wire.seconds(result.expires_in)
        now = self._hub.clock()
        for grant in held:
            grant.expires_at = now + left
        self.schedule(now + left / 2, held)

    def schedule(self, due: float, grants: Sequence[Grant]) -> None:
        """Renew then."""
        timer = self._hub.call_at(due, self.due, self._is_held)
        if len(grants) == 1:
            grants[0]._timer = timer

    def _is_held(self) -> bool:
        return bool(self._held())

    def _held(self) -> list[Grant]:
        found = [grant() for grant in self._grants]
        return [grant for grant in found if grant is not None and not grant._ended]
