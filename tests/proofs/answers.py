"""Whether what clients were told is what the journal says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.proofs.recount import MOST_FAULTS, SPEND, Call, Recount

IDENTITY = "anonymous"
PER_PRICE = 1_000_000
REQUESTS, INPUT, OUTPUT, CONCURRENCY = 1, 2, 3, 5


def read_logs(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All answers. Every line is whole: the clients were not killed."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@dataclass
class Told:
    """What was compared."""

    counts: Counter[str] = field(default_factory=Counter)
    settled: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """Charged by ledger, pool and dimension, as clients were told, each call once."""
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(text)


def compare(lines: Iterable[Mapping[str, Any]], ledgers: Mapping[str, Recount]) -> Told:
    """Look every answer up in the journals."""
    told = Told()
    firsts: Counter[str] = Counter()
    amounts: dict[str, tuple[dict[int, int], int]] = {}
    granted_at: dict[str, tuple[str, int]] = {}
    ends: dict[str, set[str]] = {}
    for line in lines:
        kind, number = line["k"], line["id"]
        told.counts[kind] += 1
        if kind == "error":
            told.fault(f"a client had trouble: {number} {line['what']}")
        elif kind == "grant":
            _grant(line, ledgers, told)
            before = granted_at.setdefault(number, (line["ledger"], line["at"]))
            if before != (line["ledger"], line["at"]):
                told.fault(f"{number} was granted at {before} and at {(line['ledger'], line['at'])}")
        elif kind in ("commit", "observe"):
            found = _find(ledgers, number)
            if found is None:
                told.fault(f"{kind} of {number} was acknowledged, and the journal does not know it")
                continue
            _settled(line, *found, told)
            charges = {int(dimension): int(amount) for dimension, amount in line["charges"]}
            if amounts.setdefault(number, (charges, line["cost"])) != (charges, line["cost"]):
                told.fault(f"{number} was settled with {amounts[number]} and with {(charges, line['cost'])}")
            if not line["dup"]:
                firsts[number] += 1
            ends.setdefault(number, set()).add("settled")
        elif kind == "release" and line["released"]:
            found = _find(ledgers, number)
            withdrawn = any(f"{IDENTITY}/{number}" in ledger.tombstones for ledger in ledgers.values())
            together = _together(ledgers, number)
            if found is None and not withdrawn and not together:
                told.fault(f"the release of {number} was acknowledged, and the journal does not know it")
            elif found is not None and any(found[1].charges):
                told.fault(f"{number} was released, and the journal charges {found[1].charges}")
            ends.setdefault(number, set()).add("released")
        elif kind == "abandoned":
            found = _find(ledgers, number)
            if found is None or found[1].state != "expired":
                told.fault(f"{number} was abandoned, but is {'unknown' if found is None else found[1].state}")
    for number, count in firsts.items():
        if count > 1:
            told.fault(f"{number} was settled {count} times for the first time")
    for number, (charges, _) in amounts.items():
        found = _find(ledgers, number)
        if found is not None:
            for dimension, amount in charges.items():
                told.settled[found[0].name, found[1].pool, dimension] += amount
    told.counts["ids granted"] = len(granted_at)
    told.counts["ids settled"] = len(amounts)
    told.counts["ids with both ends"] = sum(len(each) > 1 for each in ends.values())
    if told.counts["ids with both ends"]:
        told.fault(f"{told.counts['ids with both ends']} ids were both settled and released")
    return told


def _find(ledgers: Mapping[str, Recount], number: str) -> tuple[Recount, Call] | None:
    for ledger in ledgers.values():
        call = ledger.calls.get(f"{IDENTITY}/{number}")
        if call is not None:
            return ledger, call
    return None


def _together(ledgers: Mapping[str, Recount], number: str) -> bool:
    return any(f"{IDENTITY}/{number}" in ledger.together for ledger in ledgers.values())


def _grant(line: Mapping[str, Any], ledgers: Mapping[str, Recount], told: Told) -> None:
    number = line["id"]
    ledger = ledgers.get(line["ledger"])
    numbers = line["children"] or [number]
    if ledger is None:
        told.fault(f"{number} was granted by ledger {line['ledger']}, which is not in the store")
        return
    if line["count"] > 1 and ledger.together.get(f"{IDENTITY}/{number}") != tuple(
        f"{IDENTITY}/{child}" for child in numbers
    ):
        told.fault(f"the bulk grant of {number} is not in the journal, or is another one")
    holding = [each.name for each in ledgers.values() if f"{IDENTITY}/{numbers[0]}" in each.calls]
    if len(holding) > 1:
        told.fault(f"{number} is on the books of {holding}")
    for each in numbers:
        call = ledger.calls.get(f"{IDENTITY}/{each}")
        if call is None or call.state == "booked":
            told.fault(f"the grant of {each} was acknowledged, and the journal does not know it")
            continue
        told.counts["granted calls looked up"] += 1
        if call.pool != line["pool"] or call.granted_at != line["at"]:
            told.fault(
                f"{each} was granted in {line['pool']} at {line['at']}; the journal: {call.pool}, {call.granted_at}"
            )
        stated = {int(dimension): int(amount) for dimension, amount in line["holds"]}
        if stated not in (ledger.own(call, call.first), ledger.own(call, call.holds), ledger.own(call, call.charges)):
            told.fault(f"{each} was granted with {stated}; the journal: {ledger.own(call, call.first)}")


def _settled(line: Mapping[str, Any], ledger: Recount, call: Call, told: Told) -> None:
    number = line["id"]
    charges = {int(dimension): int(amount) for dimension, amount in line["charges"]}
    told.counts["settlements looked up"] += 1
    if line.get("stale"):
        told.fault(f"the commit of {number} was stale: nothing here is old enough")
        return
    if ledger.own(call, call.charges) != charges:
        told.fault(f"{number} was settled with {charges}; the journal: {call.state}, {ledger.own(call, call.charges)}")
    if call.state == "expired" and not call.replaced:
        told.fault(f"{number} was settled, but the journal lets it expire")
    if line["cost"] != call.cost or charges.get(SPEND, 0) != call.cost:
        told.fault(f"{number} cost {line['cost']}, charged {charges.get(SPEND)}; the journal: {call.cost}")
    usage = line["usage"]
    if usage is None or line["dup"]:
        return
    # The first commit with a final usage: its charges follow from what the client has sent.
    tokens, read, written, output = usage
    expected = {REQUESTS: 1, INPUT: tokens + written, OUTPUT: output, CONCURRENCY: 0}
    if call.prices:
        prices = call.prices
        total = prices[0] * tokens + prices[1] * read + prices[2] * written + prices[3] * output
        expected[SPEND] = -(-total // PER_PRICE)
    told.counts["charges computed from the usage"] += 1
    for dimension, amount in charges.items():
        if dimension in expected and expected[dimension] != amount:
            told.fault(f"{number} used {usage} and was charged {amount} in dimension {dimension}")
