"""``paceline advise``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from paceline.cli.console import say, say_json
from paceline.cli.limits import Pool
from paceline.cli.remote import DEFAULT_ADDRESS, Address, AsJson, Remote, Seconds, TokenFile, as_dict, connect
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
        found = list(_all(remote, pb.ListAdviceRequest(ledger=ledger, pool=pool), timeout))
    if as_json:
        say_json([as_dict(each) for each in found])
    elif not found:
        say("nothing to advise: no calls yet")
    for place, each in enumerate(() if as_json else found):
        if place:
            say("")
        for line in _lines(each):
            say(line)


def _all(remote: Remote, request: pb.ListAdviceRequest, timeout: float) -> Iterator[pb.PoolAdvice]:
    stub = pb.AdminServiceStub(remote.channel)
    while True:
        page = stub.ListAdvice(request, timeout=timeout, metadata=remote.metadata)
        yield from page.pools
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


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
