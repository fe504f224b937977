"""The rows of the table: what is run, and the bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.fairness.claims import halves
from bench.fairness.cost import cost
from bench.fairness.lending import lending
from bench.fairness.nesting import bulk, nested
from bench.fairness.promises import promises
from bench.fairness.sharing import demands, dominant, lone, weights
from bench.fairness.spreading import candidates
from bench.fairness.urgency import flooded, pressed
from bench.fairness.window import Figures
from bench.lab.rows import Bound

Run = Callable[[int, float], Figures]
"""From a seed and a part of the usual length (1: all of it)."""

WASTE = (Bound("lost", most=0.001), Bound("parked_s", most=1.0))
CONSERVED = (Bound("used", least=0.99), *WASTE)
"""What the oracle demands of every row in which somebody always asks for more."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; ``shown`` are figures without a bound."""

    name: str
    case: str
    run: Run
    bounds: tuple[Bound, ...]
    shown: tuple[str, ...] = ()


ROWS: tuple[Row, ...] = (
    Row("demands", "8 equal tenants, demands 1:2:4:…:128, overload", demands,
        (Bound("jain", least=0.98), Bound("below", most=0.03), *CONSERVED)),
    Row("dominant", "one tenant of 100 calls/s of 100 tokens, one of 1 call/s of 100,000", dominant,
        (Bound("apart", most=0.05), Bound("below", most=0.05), *CONSERVED)),
    Row("weights", "weights 1:2:4", weights, (Bound("off", most=0.03), *CONSERVED), ("within",)),
    Row("nested", "shares in shares, three levels, one with a cap", nested,
        (Bound("off", most=0.03), Bound("over", most=0.005), *CONSERVED)),
    Row("bulk", "calls one by one, in twenties and in hundreds", bulk,
        (Bound("together", least=1.0), Bound("off", most=0.03), Bound("claim", most=2.0), *CONSERVED), ("served",)),
    Row("batch", "batch floods, interactive at 30 % of the limit", flooded,
        (Bound("wait_p99_ms", most=250), Bound("minimum", least=1.0), *CONSERVED)),
    Row("batch-pressed", "interactive floods, batch asks", pressed,
        (Bound("minimum", least=1.0), *CONSERVED)),
    Row("guarantee", "guarantee unused, then claimed", lending,
        (Bound("lent", least=0.99), Bound("lag_s", most=1.0), *CONSERVED)),
    Row("claims", "half-bucket calls against streams of small ones", halves,
        (Bound("claim", most=2.0), *CONSERVED), ("served",)),
    Row("lone", "lone tenant", lone, (Bound("used", least=0.999), Bound("idle", most=0.001), *WASTE)),
    Row("cost", "10 to 100,000 waiters, 500 tenants", cost,
        (Bound("growth", most=1.0), Bound("exponent", most=0.2)),
        ("us_10", "us_100", "us_1000", "us_10000", "us_100000")),
    Row("candidates", "first model exhausted, two candidates", candidates,
        (Bound("used", least=0.97), Bound("idle", most=0.001), *WASTE)),
    Row("promises", "deadline promises", promises,
        (Bound("kept", least=0.99), Bound("right", least=0.95), *WASTE),
        ("places", "early", "ahead", "denials", "judged")),
)  # fmt: skip
