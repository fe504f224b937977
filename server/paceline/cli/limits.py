"""``paceline limits``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import typer

from paceline.cli.console import say, show, table
from paceline.cli.listing import pages, show_each
from paceline.cli.pools import NO_POOLS
from paceline.cli.remote import DEFAULT_ADDRESS, Address, AsJson, Seconds, TokenFile, connect
from paceline.cli.words import amount, dimension_word, enum_word, present, source_word, span, window_word
from paceline_client.stubs import v1 as pb

_COLUMNS: Final = (
    "dimension",
    "window",
    "limit",
    "source",
    "burst",
    "level",
    "held",
    "at risk",
    "outside/min",
    "corrected",
    "level by reading",
    "read",
)
_NUMBERS: Final = tuple(column for column in _COLUMNS if column not in ("dimension", "window", "source"))

Pool = Annotated[str, typer.Argument(metavar="[POOL]", help="Name of a pool. Empty: all.", show_default=False)]


def limits(
    pool: Pool = "",
    ledger: Annotated[str, typer.Option(help="Only pools of this ledger. Empty: of all.")] = "",
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Annotated[str | None, typer.Option(envvar="PACELINE_TOKEN", hidden=True)] = None,
    timeout: Seconds = 10.0,
) -> None:
    """Show what is known of the limits, and why: where they come from, what readings say, what binds."""
    with connect(address, token_file, token) as remote:
        method = pb.AdminServiceStub(remote.channel).ListLimits
        request = pb.ListLimitsRequest(ledger=ledger, pool=pool)
        found = [each for page in pages(remote, method, request, timeout) for each in page.pools]
    show_each(found, as_json, NO_POOLS, _show)


def _show(found: pb.PoolLimits) -> None:
    say(f"{found.pool.name} · {_state(found.pool)}")
    content = table(*_COLUMNS, right=_NUMBERS)
    for limit, detail in zip(found.pool.limits, found.details, strict=False):
        content.add_row(*_row(limit, detail))
    show(content)
    for line in _lines(found):
        say(f"  {line}")


def _state(pool: pb.Pool) -> str:
    """Whether it grants; if not, why and until when."""
    text = enum_word(pb.PoolState, "POOL_STATE_", pool.state)
    if pool.state_reason:
        text += f": {pool.state_reason}"
    if pool.HasField("opens_in"):
        text += f", opens in {span(pool.opens_in)}"
    elif pool.state == pb.POOL_STATE_PAUSED:
        text += ", until it is resumed"
    return text


def _row(limit: pb.Limit, detail: pb.LimitDetail) -> Iterator[str]:
    at, dimension = limit.state, limit.state.dimension
    yield dimension_word(dimension)
    yield window_word(at.window)
    yield amount(dimension, present(at, "limit"))
    yield source_word(limit)
    yield amount(dimension, present(at, "burst"))
    yield amount(dimension, present(at, "level"))
    yield amount(dimension, at.held)
    yield amount(dimension, detail.at_risk)
    yield amount(dimension, limit.outside_per_minute if limit.HasField("outside_per_minute") else None)
    yield amount(dimension, limit.adjusted)
    yield _interval(dimension, detail)
    yield span(detail.reading.age) if detail.HasField("reading") else "-"


def _interval(dimension: int, detail: pb.LimitDetail) -> str:
    """Where the level can be by the newest reading."""
    reading = detail.reading
    lower = amount(dimension, reading.lower) if reading.HasField("lower") else ""
    upper = amount(dimension, reading.upper) if reading.HasField("upper") else ""
    if not (lower or upper):
        return "-"
    return f"{lower} … {upper}" if lower and upper else f"≥ {lower}" if lower else f"≤ {upper}"


def _lines(found: pb.PoolLimits) -> Iterator[str]:
    """What the figures mean."""
    if found.HasField("tier"):
        yield _tier(found.tier)
    for limit, detail in zip(found.pool.limits, found.details, strict=False):
        dimension = limit.state.dimension
        if detail.HasField("claimed_limit"):
            claimed = amount(dimension, detail.claimed_limit)
            yield f"{dimension_word(dimension)}: one reading says {claimed}; it rules when a second says so"
        if detail.HasField("lapses_in"):
            configured = amount(dimension, detail.configured_limit if detail.HasField("configured_limit") else None)
            yield (
                f"{dimension_word(dimension)}: restricted by readings (configured: {configured}); "
                f"lapses in {span(detail.lapses_in)} unless one confirms it"
            )
    if found.binding:
        yield f"binds now: {dimension_word(found.binding)} has the least left"
    if found.recently:
        counts = ", ".join(
            f"{dimension_word(each.dimension)}{' of shares' if each.share else ''} {each.waited + each.denied:,} "
            f"({each.waited:,} waited, {each.denied:,} denied)"
            for each in found.recently
        )
        yield f"held calls back in the last {span(found.recent_span)}: {counts}"


def _tier(found: pb.TierMatch) -> str:
    configured = f" (configured: {found.configured})" if found.configured else ""
    if found.equal:
        return f"matches {' and '.join(found.equal)}{configured}"
    if found.at_least and found.at_most:
        return f"between {found.at_least} and {found.at_most}{configured}"
    if found.at_least:
        return f"above {found.at_least}, the largest tier of the catalogue that is not above it{configured}"
    if found.at_most:
        return f"below {found.at_most}, the smallest tier of the catalogue{configured}"
    return f"like no tier of the catalogue{configured}"
