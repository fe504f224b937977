"""Throughput of the Session: Reserve + Commit pairs a second on one core, journal on.

The server has one core, the load another. The load keeps a few messages of 64 operations in flight; every pair is a
Reserve and, after its grant, a Commit with that grant's context. Counted are pairs of which both answers came back
(each leaves after its journal append). Prints the median of the rounds with the spread, the server's CPU time per
pair, and how busy the cores were; run it on an idle machine::

    python -m bench.session [--rounds 5] [--seconds 4] [--items 64] [--windows 4]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import uuid
from pathlib import Path

import grpc

from bench.server_process import Running, server
from paceline_client.stubs import v1 as pb

CONFIG = """
accounts:
  default:
    provider: anthropic
    pools:
      sonnet-5:
        requests: 100000000
        input_tokens: 1000000000000
        output_tokens: 100000000000
defaults: {initial_fill: 1.0}
"""

OUTCOME = pb.Outcome(
    disposition=pb.DISPOSITION_SUCCEEDED,
    http_status=200,
    usage=pb.Usage(input_tokens=1010, output_tokens=240),
    usage_kind=pb.USAGE_KIND_FINAL,
)
CANDIDATE = pb.Candidate(
    target=pb.Target(model="claude-sonnet-5"),
    estimate=pb.Estimate(input_tokens=1000, output_tokens=250, max_output_tokens=1024),
)


class Load:
    """One Session, ``windows`` messages of ``items`` operations in flight."""

    def __init__(self, address: str, items: int) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._call = pb.CoordinatorServiceStub(self._channel).Session()
        self._items = items
        self._number = 0
        self.pairs = 0
        self.denied = 0

    async def run(self, seconds: float, windows: int) -> None:
        await self._call.write(pb.SessionRequest(hello=pb.Hello(protocol_version=1, language="bench")))
        welcome = await self._read()
        assert welcome.HasField("welcome"), welcome
        ids: dict[int, str] = {}
        for _ in range(windows):
            await self._call.write(self._reserves(ids))
        end = time.monotonic() + seconds
        open_items = windows * self._items
        pending: list[pb.RequestItem] = []
        while open_items:
            answer = await self._read()
            for item in answer.batch.items:
                result = item.WhichOneof("result")
                open_items -= 1
                if result == "reserve":
                    reservation = ids.pop(item.number)
                    if not item.reserve.HasField("grant"):
                        self.denied += 1
                        continue
                    self._number += 1
                    pending.append(
                        pb.RequestItem(
                            number=self._number,
                            commit=pb.CommitRequest(
                                reservation_id=reservation, context=item.reserve.grant.context, outcome=OUTCOME
                            ),
                        )
                    )
                elif result == "commit":
                    self.pairs += 1
                else:
                    raise RuntimeError(str(item))
            going = time.monotonic() < end
            while len(pending) >= self._items or (pending and not going):
                batch, pending = pending[: self._items], pending[self._items :]
                await self._call.write(pb.SessionRequest(batch=pb.RequestBatch(items=batch)))
                open_items += len(batch)
            while going and open_items + len(pending) + self._items <= windows * self._items:
                await self._call.write(self._reserves(ids))
                open_items += self._items
        await self._call.done_writing()
        await self._channel.close()

    async def _read(self) -> pb.SessionResponse:
        message = await self._call.read()
        assert isinstance(message, pb.SessionResponse), "the server ended the session"
        return message

    def _reserves(self, ids: dict[int, str]) -> pb.SessionRequest:
        items = []
        for _ in range(self._items):
            self._number += 1
            ids[self._number] = reservation = str(uuid.uuid4())
            items.append(
                pb.RequestItem(
                    number=self._number,
                    reserve=pb.ReserveRequest(
                        reservation_id=reservation, candidates=[CANDIDATE], tenant="bench", route="bench"
                    ),
                )
            )
        return pb.SessionRequest(batch=pb.RequestBatch(items=items))


def _round(running: Running, seconds: float, items: int, windows: int) -> tuple[float, float, float]:
    """Pairs a second, the server's CPU µs a pair, and the server's share of its core."""

    async def main() -> tuple[float, float, float]:
        load = Load(running.address, items)
        cpu, began = running.cpu_seconds(), time.monotonic()
        await load.run(seconds, windows)
        took, used = time.monotonic() - began, running.cpu_seconds() - cpu
        if load.denied:
            raise RuntimeError(f"{load.denied} reserves were denied")
        return load.pairs / took, used / load.pairs * 1e6, used / took

    return asyncio.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[-1]})
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "bench.yaml"
        config.write_text(CONFIG)
        with server(f"embedded:{folder}/bench.db", config, cores[0]) as running:
            _round(running, 1.0, arguments.items, arguments.windows)
            rounds = []
            for number in range(arguments.rounds):
                rounds.append(_round(running, arguments.seconds, arguments.items, arguments.windows))
                print(
                    f"round {number + 1}: {rounds[-1][0]:,.0f} pairs/s, {rounds[-1][1]:.1f} µs of server CPU a pair, "
                    f"server core {rounds[-1][2]:.0%} busy",
                    flush=True,
                )
    rates = [rate for rate, _, _ in rounds]
    cpu = [cost for _, cost, _ in rounds]
    print(
        f"median {statistics.median(rates):,.0f} pairs/s ({min(rates):,.0f} to {max(rates):,.0f}); "
        f"{statistics.median(cpu):.1f} µs of server CPU a pair, {1e6 / statistics.median(cpu):,.0f} pairs a CPU-second"
    )


if __name__ == "__main__":
    main()
