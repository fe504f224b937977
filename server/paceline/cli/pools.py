"""``paceline pools``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from paceline.cli.console import say, say_json, show, table
from paceline.cli.listing import pages
from paceline.cli.remote import DEFAULT_ADDRESS, Address, AsJson, Seconds, TokenFile, as_dict, connect
from paceline.cli.words import amount, dimension_word, enum_word, present, source_word, window_word
from paceline_client.stubs import v1 as pb

_COLUMNS = ("pool", "state", "dimension", "window", "limit", "burst", "level", "held", "source", "waiting")
_NUMBERS = ("limit", "burst", "level", "held", "waiting")
NO_POOLS = "no pools yet: a pool is made when it is configured, or first asked for"


def pools(
    ledger: Annotated[str, typer.Option(help="Only pools of this ledger. Empty: of all.")] = "",
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Annotated[str | None, typer.Option(envvar="PACELINE_TOKEN", hidden=True)] = None,
    timeout: Seconds = 10.0,
) -> None:
    """Show the pools of a server: their limits, and what is left."""
    with connect(address, token_file, token) as remote:
        method = pb.AdminServiceStub(remote.channel).ListPools
        request = pb.ListPoolsRequest(ledger=ledger)
        found = [pool for page in pages(remote, method, request, timeout) for pool in page.pools]
    if as_json:
        say_json([as_dict(pool) for pool in found])
    elif not found:
        say(NO_POOLS)
    else:
        content = table(*_COLUMNS, right=_NUMBERS)
        for row in _rows(found):
            content.add_row(*row)
        show(content)


def _rows(found: list[pb.Pool]) -> Iterator[tuple[str, ...]]:
    """A row for each limit; what belongs to the pool stands in its first."""
    for pool in found:
        name, state = pool.name, enum_word(pb.PoolState, "POOL_STATE_", pool.state)
        waiting = str(sum(queue.waiting for queue in pool.queues))
        for limit in pool.limits or (pb.Limit(),):
            at, dimension = limit.state, limit.state.dimension
            yield (
                name,
                state,
                dimension_word(dimension) if dimension else "-",
                window_word(at.window) if at.window else "-",
                amount(dimension, present(at, "limit")),
                amount(dimension, present(at, "burst")),
                amount(dimension, present(at, "level")),
                amount(dimension, at.held),
                source_word(limit),
                waiting,
            )
            name = state = waiting = ""
