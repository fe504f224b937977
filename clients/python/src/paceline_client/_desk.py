"""Where a reservation is asked for and decided: everything of it that needs no waiting, for both clients."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Final

from paceline_client import _wire as wire
from paceline_client._config import Options
from paceline_client._core import Failure, Kind, Operation, new_id
from paceline_client._errors import Denied, RequestRefused, Unavailable
from paceline_client._grant import Grant
from paceline_client._hub import Hub
from paceline_client._local import LocalGrant
from paceline_client._model import Candidate, Target
from paceline_client._plan import Plan
from paceline_client._send import Account, Renewals, Submit
from paceline_client.stubs.paceline.v1 import coordinator_pb2 as pb

Decision = list[Grant] | Denied
FOREVER: Final = float("inf")


class Desk:
    """The desk of one client."""

    def __init__(self, hub: Hub, options: Options) -> None:
        self.hub = hub
        self._options = options

    def operation(self, plan: Plan) -> Operation:
        """Ask for it."""
        now = self.hub.clock()
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
        return Operation(Kind.RESERVE, request, now, turn_by=now + min(plan.max_wait, wire.MAX_WAIT))

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
            self.withdraw(plan, submit, operation)
            return None
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
            )
            for reservation_id in (answer.child_reservation_ids or (request.reservation_id,))
        ]
        if expires_in > 0:
            renewals = Renewals(hub, request.reservation_id, answer.context, grants, now)
            renewals.schedule(now + expires_in / 2, grants)
        return grants

    def without(self, plan: Plan, submit: Submit, started: float) -> Generator[float, None, Decision]:
        """Decide by the policy. Yields the seconds to wait before it goes on; closed, it gives back what it took."""
        hub = self.hub
        policy = self._options.policy
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
        if isinstance(turns, Denied):
            return turns
        waited = max(0.0, hub.clock() - started)
        return [_local(account, candidates[turn.index], first + turn.index, turn, waited) for turn in turns]

    def _turns(
        self, plan: Plan, candidates: Sequence[Candidate], count: int, started: float
    ) -> Generator[float, None, list[LocalGrant] | Denied]:
        hub = self.hub
        turn_by = max(hub.clock(), started + plan.max_wait)
        taken: list[LocalGrant] = []
        complete = False
        try:
            while len(taken) < count:
                now = hub.clock()
                turn = hub.local.reserve(candidates, now, turn_by)
                if isinstance(turn, LocalGrant):
                    taken.append(turn)
                elif now + turn <= turn_by:
                    yield turn
                elif taken and plan.allow_partial:
                    break
                else:
                    return Denied(
                        "limit",
                        retry_after=None if turn == FOREVER else turn,
                        message="what this process may use without a coordinator is used up",
                        local=True,
                    )
            wait = max(turn.at for turn in taken) - hub.clock()
            if wait > 0:
                yield wait
            complete = True
            return taken
        finally:
            if not complete:
                for each in taken:
                    hub.local.end(each, None, hub.clock(), sent=False)

    def account(self, submit: Submit, tenant: str, workspace: str, route: str) -> Account:
        """The account of a call without a plan."""
        given = self._options
        return Account(self.hub, submit, tenant or given.tenant, workspace or given.workspace, route or given.route)

    def _account(self, plan: Plan, submit: Submit) -> Account:
        return Account(self.hub, submit, plan.tenant, plan.workspace, plan.route)


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
