"""Proof: nothing that was acknowledged is lost or counted twice, however often the server is killed.

A real server over a SQLite file is killed with SIGKILL at random moments, also while it starts, while it drains after
SIGTERM, and while it snapshots, during a run of Reserve and Commit pairs from several client processes, half of them as
unary calls and half in Sessions. After each kill the journal is read from a copy of what is on the disk and counted
again by :mod:`tests.proofs.recount`; at the end every answer that a client has logged is looked up in it.

    python -m tests.proofs.kill9 --kills 30 --pairs 20000 [--seed N]
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from paceline_client.stubs import v1 as pb
from tests.proofs.answers import Told, compare, read_logs
from tests.proofs.process import ServerProcess
from tests.proofs.recount import MOST_FAULTS, Recount, Stored, read_store

KEEPING = "tests.proofs.keeping"
"""``paceline``, which keeps what it trims."""
CLIENTS = 2
TASKS = 32
"""Flows of one client at the same time."""
EXPIRE_SECONDS = 3.0
"""The longest hold that is abandoned, and a little."""

CONFIG = """
# A limit of everything, so that every column moves: waits for calls in progress, caps of shares, caps on money.
log_level: warning
defaults: {provider: anthropic, account: main}
accounts:
  main:
    monthly_spend_cap: 1_000_000
    pools:
      sonnet-5: {requests: 60_000, input_tokens: 300_000_000, output_tokens: 60_000_000, concurrency: 24}
      haiku-5-5:
        requests: {amount: 30_000, burst: 300}
        input_tokens: 300_000_000
        output_tokens: {amount: 30_000_000, burst: 200_000}
      opus-5-5: {requests: 20_000, input_tokens: 60_000_000, output_tokens: 20_000_000, learn: false}
  spare:
    monthly_spend_cap: 1_000_000
    pools:
      sonnet-5: {requests: 60_000, input_tokens: 60_000_000, output_tokens: 20_000_000}
shares:
  product:
    cap: {requests: 50_000}
    shares:
      chat: {cap: {input_tokens: 200_000_000}, tenants: [chat, "chat-*"]}
      search: {cap: {requests: {amount: 10_000, burst: 100}}, tenants: [search]}
  research: {cap: {output_tokens: {amount: 20_000_000, burst: 50_000}}, tenants: ["research-*"]}
  poor: {monthly_spend_cap: 1.5, tenants: [poor]}
limits: {drain_timeout: 500ms}
"""


@dataclass
class Result:
    """What a run did, and what is wrong."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    """By the moment."""
    starts: int = 0
    seconds: float = 0.0
    clients: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    ledgers: dict[str, Recount] = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.faults


class Clients:
    """The client processes, and how far they are."""

    def __init__(self, folder: Path, address: str, pairs: int, seed: int) -> None:
        self.logs = [folder / f"client-{place}.jsonl" for place in range(CLIENTS)]
        self.counts: Counter[str] = Counter()
        self._done = [0] * CLIENTS
        self._processes = []
        self._threads = []
        for place, log in enumerate(self.logs):
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.proofs.traffic"),
                    *("--address", address),
                    *("--log", str(log)),
                    *("--pairs", str(pairs // CLIENTS + (place < pairs % CLIENTS))),
                    *("--tasks", str(TASKS)),
                    *("--seed", str(seed + place)),
                ],
                cwd=Path(__file__).resolve().parents[2],
                stdout=subprocess.PIPE,
                text=True,
            )
            thread = threading.Thread(target=self._read, args=(place, process), daemon=True)
            thread.start()
            self._processes.append(process)
            self._threads.append(thread)

    def _read(self, place: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            number, _, counts = line.partition(" ")
            self._done[place] = int(number)
            if counts:
                self.counts.update(json.loads(counts))

    @property
    def pairs(self) -> int:
        return sum(self._done)

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def join(self) -> list[str]:
        """Faults: clients that did not end well."""
        codes = [process.wait() for process in self._processes]
        for thread in self._threads:
            thread.join(5)
        return [f"client {place} ended with code {code}" for place, code in enumerate(codes) if code]

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for place, process in enumerate(self._processes):
            self._threads[place].join(5)
            if process.stdout is not None:
                process.stdout.close()


def prove(
    kills: int,
    pairs: int,
    seed: int,
    folder: Path,
    *,
    module: str = KEEPING,
    limit_seconds: float = 1_200.0,
    say: bool = False,
) -> Result:
    """Run it, with ``module`` as the server."""
    rng = random.Random(seed)
    result = Result(seed)
    server = ServerProcess(folder, CONFIG, module=module)
    started = time.monotonic()
    clients: Clients | None = None
    try:
        server.start()
        clients = Clients(folder, server.address, pairs, seed)
        try:
            for goal in sorted(rng.uniform(0.01, 0.97) * pairs for _ in range(kills)):
                wait_for(clients, server, goal, started + limit_seconds)
                if not clients.running:
                    result.faults.append("the clients ended before all kills were done")
                    break
                kill(server, rng, result)
                recount(server.store, folder, result)
                server.spawn()
                if say and sum(result.kills.values()) % 5 == 0:
                    print(f"  {sum(result.kills.values())} kills, {clients.pairs} pairs", flush=True)
            wait_for(clients, server, float("inf"), started + limit_seconds)
            result.faults += clients.join()
        except TimeoutError as error:
            result.faults.append(str(error))
            clients.close()
        result.pairs, result.clients = clients.pairs, clients.counts
        time.sleep(EXPIRE_SECONDS)
        server.kill()
        result.kills["at the end"] += 1
        recount(server.store, folder, result)
        judge(clients.logs, result)
        # One more start: the books in memory are those of the count.
        server.start()
        confirm(server.address, result)
    finally:
        if clients is not None:
            clients.close()
        server.close()
        result.starts = server.starts
        result.seconds = time.monotonic() - started
    return result


def wait_for(clients: Clients, server: ServerProcess, goal: float, deadline: float) -> None:
    """Return once so many pairs are done, or all."""
    while clients.pairs < goal and clients.running:
        server.check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{clients.pairs} pairs in the time given; the server's log:\n{server.tail()}")
        time.sleep(0.003)


def kill(server: ServerProcess, rng: random.Random, result: Result) -> None:
    """Kill it, at a moment of one kind or another."""
    moment = rng.choices(("while it works", "while it drains", "while it starts"), (70, 15, 15))[0]
    time.sleep(rng.uniform(0, 0.02))
    if moment == "while it drains":
        server.terminate()
        time.sleep(rng.uniform(0, 1.5))
    elif moment == "while it starts":
        server.kill()
        server.spawn()
        time.sleep(rng.uniform(0, 1.5))
    server.kill()
    result.kills[moment] += 1


def recount(store: Path, scratch: Path, result: Result) -> None:
    """Count on from where the journal was read last."""
    after = {name: each.seq for name, each in result.ledgers.items()}
    recount_stored(read_store(store, scratch, after), result)


def recount_stored(found: list[Stored], result: Result) -> None:
    for stored in found:
        ledger = result.ledgers.setdefault(stored.name, Recount(stored.name))
        ledger.follow(stored)
    for name in result.ledgers.keys() - {stored.name for stored in found}:
        result.faults.append(f"ledger {name} is gone")


def judge(logs: list[Path], result: Result) -> None:
    """Everything that must agree at the end."""
    for ledger in result.ledgers.values():
        ledger.check()
        result.faults += ledger.faults
        if ledger.count("open"):
            result.faults.append(f"ledger {ledger.name}: {ledger.count('open')} holds never end")
    lines = read_logs(logs)
    told = result.told = compare(lines, result.ledgers)
    result.faults += told.faults
    # What the clients were told, what expired, and what became of nobody's answer: together it is what was charged.
    settled_ids = {f"anonymous/{line['id']}" for line in lines if line["k"] in ("commit", "observe")}
    for ledger in result.ledgers.values():
        rest: Counter[tuple[str, int]] = Counter()
        for key, call in ledger.calls.items():
            if key not in settled_ids:
                for dimension, amount in ledger.own(call, call.charges).items():
                    rest[call.pool, dimension] += amount
                if call.state in ("settled", "booked"):
                    result.faults.append(f"{key} is settled in the journal, and no client was told so")
        for bucket in ledger.buckets:
            if bucket.share or not bucket.pool:
                continue
            address = bucket.pool, bucket.dimension
            counted = told.settled[ledger.name, *address] + rest[address]
            if counted != bucket.charged:
                result.faults.append(f"{bucket.name()}: charged {bucket.charged}, the clients' own count is {counted}")
        spend = sum(bucket.charged for bucket in ledger.buckets if (bucket.pool, bucket.share) == ("", ""))
        counted = sum(
            amount for (name, _, dimension), amount in told.settled.items() if (name, dimension) == (ledger.name, 7)
        )
        counted += sum(amount for (_, dimension), amount in rest.items() if dimension == 7)
        if spend != counted:
            result.faults.append(f"ledger {ledger.name}: spent {spend}, the clients' own count is {counted}")


def confirm(address: str, result: Result) -> None:
    """What the server says of its books after a last start, against the count."""
    with grpc.insecure_channel(address) as channel:
        pools = pb.AdminServiceStub(channel).ListPools(pb.ListPoolsRequest(), timeout=20).pools
    seen = 0
    for pool in pools:
        ledger = result.ledgers[pool.ledger]
        for limit in pool.limits:
            state = limit.state
            for bucket in ledger.buckets:
                if (bucket.pool, bucket.share, bucket.dimension, bucket.window) == (
                    pool.name,
                    "",
                    state.dimension,
                    state.window,
                ):
                    seen += 1
                    if state.held != bucket.held or not bucket.level <= state.level <= bucket.burst:
                        result.faults.append(
                            f"{bucket.name()}: the server says level {state.level}, held {state.held}; "
                            f"the journal {bucket.level} and {bucket.held}"
                        )
                    if limit.adjusted != bucket.adjusted:
                        result.faults.append(f"{bucket.name()}: adjusted {limit.adjusted} against {bucket.adjusted}")
    if not seen:
        result.faults.append("AdminService shows none of the limits that are in the journal")
    result.told.counts["limits confirmed by AdminService"] = seen


def report(result: Result) -> str:
    """For people."""
    counts, told = result.clients, result.told.counts
    lines = [
        f"seed {result.seed}, {result.seconds:.0f} s, {CLIENTS} clients with {TASKS} flows each",
        f"kills: {sum(result.kills.values())} (" + ", ".join(f"{n} {what}" for what, n in result.kills.items()) + f"), "
        f"{result.starts} starts",
        f"pairs acknowledged: {result.pairs:,}",
        "clients: " + ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items())),
        "",
        f"{'ledger':<10}{'records':>9}{'events':>10}{'epochs':>8}{'granted':>9}{'settled':>9}{'released':>9}"
        f"{'expired':>9}{'replaced':>9}{'booked':>8}{'open':>6}{'snapshots compared':>20}",
    ]
    for ledger in result.ledgers.values():
        calls = ledger.calls.values()
        replaced = sum(call.replaced for call in calls)
        lines.append(
            f"{ledger.name:<10}{ledger.seq:>9,}{ledger.kinds.total():>10,}{len(ledger.epochs):>8}"
            f"{ledger.kinds['grant']:>9,}{ledger.count('settled'):>9,}{ledger.count('released'):>9,}"
            f"{ledger.count('expired'):>9,}{replaced:>9,}{ledger.count('booked'):>8,}{ledger.count('open'):>6,}"
            f"{ledger.snapshots:>20}"
        )
    lines += ["", f"{'limit':<60}{'refilled':>22}{'charged':>22}{'adjusted':>22}{'level':>22}{'burst':>22}"]
    for ledger in result.ledgers.values():
        for bucket in ledger.buckets:
            if bucket.granted:
                lines.append(
                    f"{ledger.name + ': ' + bucket.name():<60}{_big(bucket.refilled)}{_big(bucket.charged)}"
                    f"{_big(bucket.adjusted)}{_big(bucket.level)}{_big(bucket.burst)}"
                )
    lines += [
        "",
        f"looked up in the journals: {told['granted calls looked up']:,} acknowledged grants, "
        f"{told['settlements looked up']:,} acknowledged settlements "
        f"({told['charges computed from the usage']:,} computed anew from the usage), {told['release']:,} releases",
        *(f"FAULT: {fault}" for fault in result.faults[:MOST_FAULTS]),
    ]
    if result.passed:
        lines.append(f"PASSED: {result.pairs:,} pairs, {sum(result.kills.values())} kills, nothing lost, nothing twice")
    else:
        lines.append(f"FAILED: {len(result.faults)} faults")
    return "\n".join(lines)


def _big(amount: int) -> str:
    return f"{amount:>22,}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=None, help="a fresh one if absent")
    parser.add_argument("--module", default=KEEPING, help="what to run as the server")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"kill -9: {options.kills} kills during {options.pairs:,} pairs, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="paceline-kill9-") as folder:
        result = prove(options.kills, options.pairs, seed, Path(folder), module=options.module, say=True)
    print(report(result))
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
