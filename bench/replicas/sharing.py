"""``make prove-replicas``: many callers on one pool through several servers: never over-granted, not by one token.

Each run draws limits and sizes of calls; 1,000 callers ask all three servers at once, half of the runs lose their owner
on the way (SIGKILL). Grants are held against the limits in any window by the clients' own logs and by the journal, and
what was charged is counted again from both.
"""

from __future__ import annotations

import random
import time

from bench.replicas.site import end, parser, say, site
from tests.proofs.answers import INPUT, REQUESTS
from tests.replicas.checks import conserved, judge, never_over, percentile
from tests.replicas.fleet import Clients

MAX_WAIT = 4.0
LEAST_USED = 0.85
"""Of what the limits allow, so that the proof is one of a full pool."""
LEAST_USED_WITH_KILL = 0.4


def one(seed: int, callers: int, seconds: float, kill: bool, least_used: float | None = None) -> tuple[list[str], str]:
    """One run: what is wrong, and a line of figures."""
    if least_used is None:
        least_used = LEAST_USED_WITH_KILL if kill else LEAST_USED
    rng = random.Random(seed)
    tokens = rng.randint(50, 2_000)
    rate = rng.randint(100, 400)
    by_requests = rng.random() < 0.5
    burst = rng.randint(5, 200)
    tight = {"amount": rate * 60, "burst": burst}
    limits = {
        "requests": tight if by_requests else 100_000_000,
        "input_tokens": 10**12
        if by_requests
        else {"amount": rate * 60 * tokens + rng.randint(0, 59), "burst": burst * tokens + rng.randint(0, tokens)},
        "output_tokens": 10**12,
    }
    with (
        site(limits=limits) as on,
        Clients(
            on.folder,
            on.fleet.addresses,
            seed=seed,
            count=2,
            mix="plain=9,doubled=1",
            input=tokens,
            max_wait=MAX_WAIT,
            deadline=15,
        ) as clients,
    ):
        clients.callers(callers)
        clients.flowing(20)
        began = time.monotonic()
        if kill:
            time.sleep(rng.uniform(0.2, 0.5) * seconds)
            on.owner().kill()
            time.sleep(max(0.0, began + seconds - time.monotonic()))
        else:
            time.sleep(seconds)
        logs = clients.stop()
        on.recorder.stop()
        judgement = judge(logs, on.recorder.stored())
        faults = judgement.faults + conserved(judgement) + on.fleet.faults()
        limited = limits["requests" if by_requests else "input_tokens"]
        assert isinstance(limited, dict)
        dimension = REQUESTS if by_requests else INPUT
        faults += never_over(judgement, {dimension: (limited["amount"], limited["burst"])})
        granted = sorted(call.granted_at for call in judgement.recount.calls.values())
        each = 1 if by_requests else tokens
        span = (granted[-1] - granted[0]) / 60e6
        used = len(granted) * each / (limited["burst"] + limited["amount"] * span)
        if used < least_used:
            faults.append(f"only {used:.0%} of the limit was used: the proof is of no pool that is full")
        if kill and len(judgement.recount.epochs) < 2:
            faults.append("nobody took over")
        waits = [entry.answered - entry.asked for entry in judgement.entries if entry.kind == "grant"]
        line = (
            f"seed {seed}: {'requests' if by_requests else 'input tokens'} {limited['amount']:,}/min, burst "
            f"{limited['burst']:,}; {len(granted):,} grants of {each:,}, {used:.1%} of the limit, "
            f"{judgement.counts['denial']:,} denials, wait p50 {percentile(waits, 50) / 1e6:.2f} s"
            + (", owner killed" if kill else "")
        )
        return [f"seed {seed}: {fault}" for fault in faults], line


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--runs", type=int, default=20)
    asked.add_argument("--callers", type=int, default=1_000)
    asked.add_argument("--seconds", type=float, default=6.0)
    options = asked.parse_args()
    say(f"seed {options.seed}, {options.runs} runs, {options.callers:,} callers, 3 servers")
    faults: list[str] = []
    for number in range(options.runs):
        wrong, line = one(options.seed + number, options.callers, options.seconds, kill=number % 2 == 1)
        say(line + ("" if not wrong else f"  {len(wrong)} FAULTS"))
        faults += wrong
    end(
        faults, f"{options.runs} runs, {options.callers:,} concurrent callers, never over-granted, everything conserved"
    )


if __name__ == "__main__":
    main()
