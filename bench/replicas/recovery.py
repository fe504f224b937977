"""``make prove-recovery``: a ledger with 100,000 open reservations is taken over, warm and cold.

Warm: the owner is killed, and another server, which has followed the journal, goes on. Cold: all servers are killed
and one is started; it reads the snapshot and the records behind it. Timed is what a caller sees, from the kill, or from
the start of the new process, to the first grant. The books that it then has are compared with a count of the journal
by other means, to the integer.
"""

from __future__ import annotations

import re
import time
import uuid

import grpc

from bench.replicas.site import Site, end, parser, say, site, until
from paceline_client.stubs import v1 as pb
from tests.proofs.process import FAST_RECONNECT
from tests.proofs.recount import Recount
from tests.replicas.checks import count, snapshot
from tests.replicas.fleet import LEDGER, MODEL, Clients, Server

MOST_SECONDS = 5.0


def first_grant(server: Server, began: float) -> float:
    """Seconds from ``began`` until this server has granted something."""
    with grpc.insecure_channel(server.address, options=FAST_RECONNECT) as channel:
        stub = pb.CoordinatorServiceStub(channel)
        request = pb.ReserveRequest(reservation_id=str(uuid.uuid4()), tenant="recovery")
        request.hold.seconds = 3_000
        request.max_wait.seconds = 5
        candidate = request.candidates.add()
        candidate.target.model = MODEL
        candidate.estimate.input_tokens, candidate.estimate.output_tokens = 100, 20
        while True:
            try:
                answer = stub.Reserve(request, timeout=20, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > began + 60:
                    raise
                time.sleep(0.02)
                continue
            assert answer.HasField("grant"), answer
            return time.monotonic() - began


def compare(server: Server, recount: Recount) -> list[str]:
    """What the server says of its books, against the count."""
    faults = []
    with grpc.insecure_channel(server.address, options=FAST_RECONNECT) as channel:
        admin = pb.AdminServiceStub(channel)
        pools = admin.ListPools(pb.ListPoolsRequest(), timeout=20).pools
        ledger = next(
            each for each in admin.ListLedgers(pb.ListLedgersRequest(), timeout=20).ledgers if each.name == LEDGER
        )
    seen = 0
    for pool in pools:
        for limit in pool.limits:
            state = limit.state
            for bucket in recount.buckets:
                names = (bucket.pool, bucket.share, bucket.dimension, bucket.window)
                if names == (pool.name, "", state.dimension, state.window):
                    seen += 1
                    if state.held != bucket.held or limit.adjusted != bucket.adjusted:
                        faults.append(
                            f"{bucket.name()}: held {state.held}, adjusted {limit.adjusted}; "
                            f"the journal: {bucket.held}, {bucket.adjusted}"
                        )
                    if not bucket.level <= state.level <= bucket.burst:
                        faults.append(f"{bucket.name()}: level {state.level}, the journal: {bucket.level}")
    if not seen:
        faults.append("the server shows none of the limits that are in the journal")
    if ledger.open_reservations != recount.count("open"):
        faults.append(f"{ledger.open_reservations} reservations are open, the journal: {recount.count('open')}")
    return faults


def counted(on: Site) -> Recount:
    """The books by the journal, once nothing is written any more."""
    last = -1
    while last != (last := len(on.recorder.records)):
        time.sleep(0.5)
    recount = count(on.recorder.stored())
    client = on.client()
    try:
        kept = snapshot(client)
    finally:
        client.close()
    if kept is not None and kept.seq == recount.seq:
        recount._compare(kept)
    return recount


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--open", type=int, default=100_000)
    options = asked.parse_args()
    say(f"seed {options.seed}, 3 servers, one Redis, {options.open:,} open reservations")
    faults: list[str] = []
    with site(appendonly="yes", appendfsync="everysec") as on:
        with Clients(
            on.folder, on.fleet.addresses, seed=options.seed, mix="abandoned=1", short_hold=3_000, deadline=30
        ) as clients:
            clients.callers(512)
            clients.wait(lambda: clients.counts["grant"] >= options.open, "reservations", 600)
            clients.callers(0)
            clients.stop()
        owner = on.owner()
        other = next(server for server in on.fleet.servers if server is not owner)
        until(lambda: other.healthy(), "the others serve", 20)
        time.sleep(2.0)
        began = time.monotonic()
        owner.kill()
        warm = first_grant(other, began)
        recount = counted(on)
        faults += recount.faults + compare(on.fleet.wait_owner(but=owner), recount)
        held = recount.count("open")
        for server in on.fleet.awake():
            server.kill()
        first = on.fleet.servers[0]
        began = time.monotonic()
        first.spawn()
        first.wait_ready(60)
        accepting = time.monotonic() - began
        cold = first_grant(first, began)
        recount = counted(on)
        faults += recount.faults + compare(first, recount) + on.fleet.faults()
        loads = re.findall(r"(?i)\bload_ms=(\d+)", first.log.read_text(errors="replace"))
        # A planned stop leaves a snapshot of the books at the last record.
        first.stop()
        last = counted(on)
        faults += last.faults
        say(
            f"{held:,} open; warm: first grant {warm:.2f} s after the owner's death; cold: the process accepted "
            f"connections after {accepting:.2f} s, first grant after {cold:.2f} s ({cold - accepting:.2f} s later)"
            + (f"; loaded in {loads[-1]} ms" if loads else "")
        )
        say(
            f"books of {len(recount.buckets)} limits and {len(recount.calls):,} calls equal to the count of "
            f"{recount.seq:,} records ({recount.kinds.total():,} events); snapshots compared with it: {last.snapshots}"
        )
        if held < options.open:
            faults.append(f"only {held:,} were open")
        for what, took in (("warm", warm), ("cold", cold)):
            if took > MOST_SECONDS:
                faults.append(f"{what}: {took:.2f} s, more than {MOST_SECONDS:g} s")
    end(
        faults,
        f"{options.open:,} open reservations, warm {warm:.2f} s, cold {cold:.2f} s, the same books to the integer",
    )


if __name__ == "__main__":
    main()
