"""``paceline advise``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from paceline.cli.console import say
from paceline.cli.limits import Pool
from paceline.cli.listing import pages, show_each
from paceline.cli.remote import DEFAULT_ADDRESS, Address, AsJson, Seconds, TokenFile, connect
from paceline.cli.words import dimension_word, span
from paceline_client.stubs import v1 as pb


def advise(
    pool: Pool = "",
    ledger: Annotated[str, typer.Option(help="Only pools of this ledger. Empty: of all.")] = "",
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Annotated[str | None, typer.Option(envvar="PACELINE_TOKEN", hidden=True)] = None,
    timeout: Seconds = 10.0,
) -> None:
    """Say what would let more calls through: a higher tier, caching, merging calls, another model."""
    with connect(address, token_file, token) as remote:
        method = pb.AdminServiceStub(remote.channel).ListAdvice
        request = pb.ListAdviceRequest(ledger=ledger, pool=pool)
        found = [each for page in pages(remote, method, request, timeout) for each in page.pools]
    show_each(found, as_json, "nothing to advise: no calls yet", _show)


def _show(found: pb.PoolAdvice) -> None:
    for line in _lines(found):
        say(line)


def _lines(found: pb.PoolAdvice) -> Iterator[str]:
    head = found.pool
    if found.HasField("start_time"):
        head += f" · since {found.start_time.ToDatetime().isoformat(' ', 'seconds')} UTC · {found.calls:,} calls"
    yield head
    held = sum(each.waited + each.denied for each in found.held_back)
    for each in found.held_back:
        yield f"  held back {_held(each, held)}"
    if found.nothing:
        yield f"  nothing to advise: {found.nothing}"
    for advice in found.advice:
        yield f"  → {advice.message}"


def _held(each: pb.HeldBack, held: int) -> str:
    whose = " (cap of shares)" if each.share else ""
    wait = f", {span(each.wait)} in all" if each.HasField("wait") else ""
    calls = each.waited + each.denied
    part = f"{calls:,} ({100 * calls / held:.0f} %)"
    minutes = f"{each.minutes:,} {'minute' if each.minutes == 1 else 'different minutes'}"
    return (
        f"by {dimension_word(each.dimension)}{whose}: {part}, of which {each.waited:,} waited{wait} "
        f"and {each.denied:,} were denied, in {minutes}"
    )
