"""Who takes a ledger over, and when. Pure.

Every process ranks the living ones in the same way (rendezvous hashing), so that ledgers spread and, as a rule, one
process alone moves; the others follow after a pause each, in case it does not. That is for quiet: if two move, the
store's comparison lets one in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from paceline.ledger.commands import NodeInfo
from paceline.ledger.lease import Head

PATIENCE_US = 400_000
"""For so long each rank waits for the one before it."""
ROLLOUT_US = 300_000_000
"""A process that has started within this time may be one of a rollout that stops others soon."""


def ranking(ledger: str, nodes: Iterable[NodeInfo]) -> list[str]:
    """The ready processes, the one that should own ``ledger`` first (highest random weight)."""
    ready = [node.node for node in nodes if node.ready]
    return sorted(ready, key=lambda node: (_weight(ledger, node), node), reverse=True)


def heirs(ledger: str, nodes: Mapping[str, NodeInfo], owner: str, form: int = 0, now: int = 0) -> list[str]:
    """The processes that may follow ``owner``, in order: those that read ``form``. The first keeps itself warm.

    While a rollout may be under way, the newest process comes first: the same rollout will not stop it again. Who is
    warm comes first when the owner drains: to read a snapshot then would take the processor from those who serve.
    ``now``: the time by which processes state when they started (µs); 0: no start is recent.
    """
    others = [node for node in nodes.values() if node.node != owner and node.ready and node.form >= form]
    order = ranking(ledger, others)
    if not order:
        return order
    by_start = sorted(others, key=lambda node: (node.started_at, node.node), reverse=True)
    there = nodes.get(owner)
    if there is not None and not there.ready:
        order = [node.node for node in by_start]
        order.sort(key=lambda node: ledger not in nodes[node].warm)
    elif now and now - by_start[0].started_at < ROLLOUT_US:
        order.remove(by_start[0].node)
        order.insert(0, by_start[0].node)
    return order


def due(
    head: Head | None,
    now: int,
    me: str,
    rank: int,
    *,
    lineage: str,
    lag_us: int,
    dead_since: int | None,
    vacant_at: int = 0,
    primary_since: int = 0,
) -> tuple[int, int]:
    """From when on (the store's time, µs) this process may take the ledger, and the epoch that it deposes (0: none).

    ``rank`` is its place among the heirs; ``dead_since`` is when the owner's connection was found refused. Without a
    head, the ledger is nobody's from ``vacant_at`` on: an owner that was known may live, and put it back.
    ``primary_since`` is when this process first saw the store's present primary.
    """
    pause = rank * PATIENCE_US
    if head is None:
        return vacant_at + pause, 0
    if head.lineage != lineage:
        # The primary before may go on for the lag, and there an owner writes on although its lease had ended: while
        # nobody takes the ledger, that says nothing. One that lives comes here meanwhile, and has lost nothing.
        return max(head.until, primary_since) + lag_us + pause, 0
    if head.node == me:
        # An owner of this process that is gone: nobody else needs to wait for it, but for whom it has named.
        return (head.until if head.successor not in ("", me) else now), head.epoch
    if head.successor:
        return (now if head.successor == me else head.until + pause), 0
    if dead_since is not None and dead_since + pause < head.until:
        return dead_since + pause, head.epoch
    return head.until + pause, 0


def _weight(ledger: str, node: str) -> bytes:
    return hashlib.blake2b(f"{ledger}\0{node}".encode(), digest_size=8).digest()
