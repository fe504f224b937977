"""Where a reservation is asked for and decided: everything of it that needs no waiting, for both clients."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Final

from paceline_client import _wire as wire
from paceline_client._ahead import Ahead
from paceline_client._config import Options
from paceline_client._core import Failure, Kind, Operation, new_id
from paceline_client._errors import Denied, RequestRefused, Unavailable
from paceline_client._grant import Grant
from paceline_client._hub import LOOK, Hub
from paceline_client._local import LocalGrant
from paceline_client._model import Candidate, Target
from paceline_client._plan import Plan
from paceline_client._send import Account, Renewals, Submit
from paceline_client.stubs.paceline.v1 import coordinator_pb2 as pb

Decision = list[Grant] | Denied
FOREVER: Final = float("inf")
MAX_OBSERVED: Final = 4_096
"""Kinds of calls that are remembered as observed by the server. Beyond it the oldest is forgotten."""

_remembering = threading.Lock()
"""Held for an instant, so one for all desks will do, which a child of a fork can renew."""


def _renew_lock() -> None:
    global _remembering
    _remembering = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)

_Kind = tuple[Target | str, str, str]
"""Of a call: its target or ladder, tenant and workspace."""


class Desk:
    """The desk of one client."""

    def __init__(self, hub: Hub, options: Options) -> None:
        self.hub = hub
        self._options = options
        self.goes_ahead = options.mode == "observe"
        """Calls are made at once, and the coordinator is told."""
        self._observed: dict[_Kind, bool] = {}
        """Calls that the server observes only; whether their next one waits but shortly for its answer."""

    def ahead(self, plan: Plan, submit: Submit) -> list[Grant]:
        """Grant at once, and tell the coordinator behind it. Neither waits nor raises."""
        candidate = plan.candidates[0]
        if plan.ladder:
            known = self.hub.local.ladder(plan.ladder)
            if known is not None:
                candidate = _at(candidate, known[1])
        operation = self.operation(plan)
        operation.behind = True
        request = operation.request
        number = ""
        if isinstance(request, pb.ReserveRequest):
            request.observe_only = True
            number = request.reservation_id
        account = Ahead(self.hub, submit, plan)
        grants = [
            Grant(
                account,
                reservation_id=new_id() if plan.count else number,
                target=candidate.target,
                max_output_tokens=candidate.max_output_tokens,
            )
            for _ in range(plan.count or 1)
        ]
        account.start(grants, operation)
        return grants

    def operation(self, plan: Plan) -> Operation:
        """Ask for it."""
        now = self.hub.clock()
        hurry = self._observed.get(_kind(plan))
        request = wire.reserve_request(
            new_id(),
            plan.candidates,
            ladder=plan.ladder,
            tenant=plan.tenant,
            workspace=plan.workspace,
            priority=plan.priority,
            route=plan.route,
            hold=plan.hold,
            count=plan.count,
            allow_partial=plan.allow_partial,
        )
        turn_by = now + min(plan.max_wait, wire.MAX_WAIT)
        return Operation(Kind.RESERVE, request, now, turn_by=turn_by, observed=hurry is not None, hurry=hurry is True)

    def withdraw(self, plan: Plan, submit: Submit, operation: Operation) -> None:
        """Nobody wants the answer any more: whatever it is, everything goes back."""
        self.hub.abandon(operation)
        result, request = operation.result, operation.request
        context = b""
        if isinstance(result, pb.ReserveResponse):
            if not result.HasField("grant"):
                return
            context = result.grant.context
        elif not operation.sent:
            return
        if isinstance(request, pb.ReserveRequest):
            candidates = () if plan.ladder else plan.candidates
            self._account(plan, submit).release(request.reservation_id, context, candidates)

    def decide(self, plan: Plan, submit: Submit, operation: Operation) -> Decision | None:
        """The grants or the denial in an answer. ``None``: nobody was there, and the policy decides."""
        result, request = operation.result, operation.request
        if isinstance(result, Failure) and not result.unreachable:
            raise RequestRefused(result.code, result.message)
        if not isinstance(result, pb.ReserveResponse) or not isinstance(request, pb.ReserveRequest):
            if operation.hurry:
                # The server may enforce by now, and let it wait: give the next one the time to learn of that.
                self._remember(plan, hurry=False)
            self.withdraw(plan, submit, operation)
            return None
        self._remember(plan, hurry=True if result.HasField("observed_decision") else None)
        if not result.HasField("grant"):
            return wire.denied(result)
        hub = self.hub
        answer = result.grant
        now = hub.clock()
        expires_in = wire.seconds(answer.expires_in)
        waited = wire.seconds(answer.waited)
        index = answer.candidate_index
        target = wire.target_of(answer.target)
        if plan.ladder:
            hub.local.learn_pool(target, answer.pool, plan.ladder, index)
        elif index < len(plan.candidates):
            hub.local.learn_pool(plan.candidates[index].target, answer.pool, "", index)
        size = plan.candidates[index if index < len(plan.candidates) else 0]
        hub.local.granted(answer.pool, size, len(answer.child_reservation_ids) or 1, now)
        account = self._account(plan, submit)
        grants = [
            Grant(
                account,
                reservation_id=reservation_id,
                candidate_index=index,
                target=target,
                max_output_tokens=answer.max_output_tokens if answer.HasField("max_output_tokens") else None,
                pool=answer.pool,
                expires_at=now + expires_in,
                waited=waited,
                context=answer.context,
                answer=result,
            )
            for reservation_id in (answer.child_reservation_ids or (request.reservation_id,))
        ]
        if expires_in > 0:
            renewals = Renewals(hub, request.reservation_id, answer.context, grants, now)
            renewals.schedule(now + expires_in / 2, grants)
        return grants

    def rest(self, plan: Plan, operation: Operation) -> Plan:
        """What is left to wait for, of a call whose operation came to nothing."""
        return replace(plan, max_wait=max(0.0, plan.max_wait - (self.hub.clock() - operation.created)))

    def without(self, plan: Plan, submit: Submit, started: float) -> Generator[float, None, Decision | None]:
        """Decide by the policy. Yields the seconds to wait before it goes on; closed, it gives back what it took.

        ``None``: the coordinator seems to be back, and the turn had not come. It is to be asked: turns taken here while
        it grants as well would be a burst.
        """
        hub = self.hub
        policy = self._options.policy if _kind(plan) not in self._observed else "open"
        if policy == "closed":
            raise Unavailable("no coordinator could be reached, and the policy is `closed`")
        candidates: Sequence[Candidate] = plan.candidates
        first = 0
        if plan.ladder:
            known = hub.local.ladder(plan.ladder)
            if known is None:
                raise Unavailable(
                    f"no coordinator could be reached, and this process does not know the ladder {plan.ladder!r}"
                )
            first, target = known
            candidates = (_at(plan.candidates[0], target),)
        hub.warn("policy", f"paceline: no coordinator could be reached; the policy is `{policy}`")
        account = self._account(plan, submit)
        count = plan.count or 1
        if policy == "open":
            return [_local(account, candidates[0], first, None, 0.0) for _ in range(count)]
        turns = yield from self._turns(plan, candidates, count, started)
        if turns is None or isinstance(turns, Denied):
            return turns
        waited = max(0.0, hub.clock() - started)
        return [_local(account, candidates[turn.index], first + turn.index, turn, waited) for turn in turns]

    def _turns(
        self, plan: Plan, candidates: Sequence[Candidate], count: int, started: float
    ) -> Generator[float, None, list[LocalGrant] | Denied | None]:
        hub = self.hub
        failed = hub.clock()
        turn_by = max(failed, started + plan.max_wait)
        taken: list[LocalGrant] = []
        complete = False
        try:
            while len(taken) < count:
                now = hub.clock()
                turn = hub.local.reserve(candidates, now, turn_by)
                if isinstance(turn, LocalGrant):
                    taken.append(turn)
                elif now + turn <= turn_by:
                    if hub.may_ask(started, failed):
                        return None
                    yield min(turn, LOOK)
                elif taken and plan.allow_partial:
                    break
                else:
                    return Denied(
                        "limit",
                        retry_after=None if turn == FOREVER else turn,
                        message="what this process may use without a coordinator is used up",
                        local=True,
                    )
            at = max(turn.at for turn in taken)
            while (wait := at - hub.clock()) > 0:
                if hub.may_ask(started, failed):
                    return None
                yield min(wait, LOOK)
            complete = True
            return taken
        finally:
            if not complete:
                for each in taken:
                    hub.local.end(each, None, hub.clock(), sent=False)

    def _remember(self, plan: Plan, *, hurry: bool | None) -> None:
        """Such calls are observed by the server; ``None``: they are not."""
        kind, observed = _kind(plan), self._observed
        if observed.get(kind) is hurry:
            return
        with _remembering:
            observed.pop(kind, None)
            if hurry is not None:
                observed[kind] = hurry
            if len(observed) > MAX_OBSERVED:
                del observed[next(iter(observed))]

    def account(self, submit: Submit, tenant: str, workspace: str, route: str) -> Account:
        """The account of a call without a plan."""
        given = self._options
        return Account(self.hub, submit, tenant or given.tenant, workspace or given.workspace, route or given.route)

    def _account(self, plan: Plan, submit: Submit) -> Account:
        return Account(self.hub, submit, plan.tenant, plan.workspace, plan.route)


def _kind(plan: Plan) -> _Kind:
    return plan.ladder or plan.candidates[0].target, plan.tenant, plan.workspace


def _local(account: Account, candidate: Candidate, index: int, turn: LocalGrant | None, waited: float) -> Grant:
    return Grant(
        account,
        reservation_id=new_id(),
        candidate_index=index,
        target=candidate.target,
        max_output_tokens=candidate.max_output_tokens,
        pool="" if turn is None else turn.pool,
        waited=waited,
        local=True,
        local_grant=turn,
    )


def _at(candidate: Candidate, target: Target) -> Candidate:
    """The sizes of a candidate, for another target."""
    return replace(
        candidate,
        model=target.model,
        provider=target.provider,
        account=target.account,
        region=target.region,
        upstream_workspace=target.upstream_workspace,
        service_tier=target.service_tier,
        endpoint=target.endpoint,
    )
