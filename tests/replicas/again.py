"""Everything that was acknowledged is asked again: what a fleet has not lost, it answers as before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import grpc

from paceline_client.stubs import v1 as pb
from tests.proofs.traffic import money
from tests.replicas.logbook import Answered

BATCH = 64
SECONDS = 30.0


def forgotten(address: str, entries: Iterable[Answered]) -> list[str]:
    """Send every acknowledged Commit and Reserve once more; one line for each answer that is not the first one's."""
    found = list(entries)
    commits = {entry.id: entry for entry in found if entry.kind == "commit"}
    contexts = {entry.id: entry.context for entry in found if entry.kind == "grant"}
    answers = asyncio.run(_ask(address, [(commit, contexts.get(id_, b"")) for id_, commit in commits.items()]))
    faults = []
    for id_, answer in answers.items():
        entry = commits[id_]
        charges = tuple((each.dimension, each.charged) for each in answer.settlements)
        if not answer.duplicate and not answer.late:
            faults.append(f"{id_} was settled for the first time, a second time")
        elif not answer.duplicate:
            faults.append(f"{id_} was acknowledged, and is not known any more")
        elif (charges, money(answer.cost)) != (tuple(entry.charges), entry.cost):
            faults.append(f"{id_} was settled with {entry.charges}, and now it is said with {charges}")
    if len(answers) < len(commits):
        faults.append(f"{len(commits) - len(answers)} of {len(commits)} were not answered")
    return faults


async def _ask(address: str, commits: Sequence[tuple[Answered, bytes]]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    async with asyncio.timeout(SECONDS), grpc.aio.insecure_channel(address) as channel:
        stream = pb.CoordinatorServiceStub(channel).Session()
        await stream.write(pb.SessionRequest(hello=pb.Hello(instance_id="again", protocol_version=1)))
        assert isinstance(await stream.read(), pb.SessionResponse)
        for start in range(0, len(commits), BATCH):
            part = commits[start : start + BATCH]
            message = pb.SessionRequest()
            for number, (entry, context) in enumerate(part, start + 1):
                assert entry.usage is not None
                commit = message.batch.items.add(number=number).commit
                commit.reservation_id, commit.context = entry.id, context
                commit.outcome.disposition = pb.DISPOSITION_SUCCEEDED
                commit.outcome.http_status = 200
                commit.outcome.usage_kind = pb.USAGE_KIND_FINAL
                commit.outcome.usage.input_tokens = entry.usage[0]
                commit.outcome.usage.output_tokens = entry.usage[3]
            await stream.write(message)
            left = len(part)
            while left:
                answer = await stream.read()
                assert isinstance(answer, pb.SessionResponse), "the session ended"
                for item in answer.batch.items:
                    left -= 1
                    if item.WhichOneof("result") == "commit":
                        answers[commits[item.number - 1][0].id] = item.commit
        stream.cancel()
    return answers
