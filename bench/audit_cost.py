"""What the audit costs each decision: the engine with its memory of decisions, and with one that keeps nothing.

Both run in turns in one process, each on its own engine with the same calls. Of many short rounds the twentieth part
that was fastest counts, since what else the machine does only adds. The cost of rendering a line for the files, which
another thread does, is measured apart.

    python -m bench.audit_cost
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

from paceline.engine.accounting import Estimate, Profile, Rule, Usage, UsageKind
from paceline.engine.audit import Audit
from paceline.engine.dimensions import Dimension, Limit, Window
from paceline.engine.engine import Engine
from paceline.engine.operations import Candidate, Commit, DefinePool, Disposition, Outcome, Reserve
from paceline.frontend import audit as lines

ROUNDS = 500
CALLS = 200
BATCH = 50
START_US = 1_767_225_600_000_000
PROFILE = Profile(
    "bench",
    (
        Rule(Dimension.REQUESTS, hold_requests=1000, settle_requests=1000),
        Rule(Dimension.INPUT_TOKENS, hold_input=1000, settle_input=1000),
        Rule(Dimension.OUTPUT_TOKENS, hold_output=1000, settle_output=1000),
    ),
)
CALL = (Candidate("p", estimate=Estimate(requests=1, input_tokens=1_000, output_tokens=200)),)
DONE = Outcome(Disposition.SUCCEEDED, Usage(requests=1, input_tokens=900, output_tokens=150), UsageKind.FINAL)


class Nothing(Audit):
    """Keeps no record, and makes none."""

    def granted(self, *_: Any) -> None: ...
    def turned_down(self, *_: Any) -> None: ...
    def ended(self, *_: Any) -> None: ...


def engine(amount: int, found: Audit) -> Engine:
    """An engine of one pool with three limits."""
    made = Engine("bench")
    made.stats.audit = made._reserving._audit = made._settling._audit = found
    dimensions = (Dimension.REQUESTS, Dimension.INPUT_TOKENS, Dimension.OUTPUT_TOKENS)
    limits = tuple(Limit(dimension, Window.MINUTE, amount) for dimension in dimensions)
    made.step(START_US, [(0, DefinePool("p", PROFILE, limits))])
    return made


class Granting:
    """Reserve and Commit of calls that all fit: two decisions a call."""

    decisions = 2 * CALLS

    def __init__(self, found: Audit) -> None:
        self.engine = engine(10**12, found)
        self.number = 0

    def __call__(self) -> None:
        step, now = self.engine.step, self.engine.state.at
        for _ in range(CALLS // BATCH):
            keys = [f"svc/{number}" for number in range(self.number, self.number + BATCH)]
            self.number += BATCH
            now += 100
            step(now, [(place, Reserve(key, CALL)) for place, key in enumerate(keys)])
            step(now, [(place, Commit(key, DONE)) for place, key in enumerate(keys)])


class Denying:
    """Reserve of calls of which none fits."""

    decisions = CALLS

    def __init__(self, found: Audit) -> None:
        self.engine = engine(1_001, found)
        self.engine.step(START_US, [(0, Reserve("svc/first", CALL))])

    def __call__(self) -> None:
        now = self.engine.state.at
        for first in range(0, CALLS, BATCH):
            self.engine.step(now, [(place, Reserve(f"svc/{first + place}", CALL)) for place in range(BATCH)])


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def compare(name: str, kind: type[Granting] | type[Denying]) -> None:
    """Print µs per decision with and without."""
    with_audit, without = kind(Audit()), kind(Nothing())
    # Twice around: the memory is full, and its records are replaced.
    for work in (with_audit, without):
        for _ in range(110):
            work()
    pairs = [(timed(with_audit), timed(without)) for _ in range(ROUNDS)]
    us = [sorted(each)[ROUNDS // 20] / kind.decisions * 1e6 for each in zip(*pairs, strict=True)]
    print(f"{name:<18} with {us[0]:6.2f} µs   without {us[1]:6.2f} µs   ratio {us[0] / us[1]:.3f}")


def render() -> None:
    """Print µs per line of the files."""
    granting = Granting(Audit())
    granting()
    state = granting.engine.state
    _, records = granting.engine.stats.audit.since(0, 2 * CALLS)
    seconds = min(
        timed(lambda: [lines.encode(lines.entry_of("bench", state.buckets, each)) for each in records])
        for _ in range(20)
    )
    print(f"{'a line, elsewhere':<18} {seconds / len(records) * 1e6:6.2f} µs")


if __name__ == "__main__":
    gc.disable()
    compare("reserve + commit", Granting)
    compare("denial", Denying)
    render()
