"""``paceline shares``: what each share may and must get, and how to change it while the servers run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated, Final

import typer

from paceline.cli.console import CommandError, say, say_json, show, table
from paceline.cli.listing import pages
from paceline.cli.remote import DEFAULT_ADDRESS, Address, AsJson, Remote, Seconds, TokenFile, as_dict, connect
from paceline.cli.words import amount, dimension_word, present, window_word
from paceline_client.stubs import v1 as pb

app = typer.Typer(help="Look at shares, and change them.")

_COLUMNS: Final = ("share", "ledger", "weight", "cap", "guarantee", "limit", "left", "held")
_NUMBERS: Final = ("weight", "left", "held")
_NANO = 1_000_000_000
_AMOUNT = re.compile(r"(?P<dimension>[a-z_]+)(/(?P<window>[a-z]+))?=(?P<amount>none|[0-9_.,]+%?)")
_REMEDY = "write DIMENSION=AMOUNT, like input_tokens=100000, requests/day=5000, tokens=25% or requests=none"

Token = Annotated[str | None, typer.Option(envvar="PACELINE_TOKEN", hidden=True)]
_Key = tuple[int, int]


@app.callback(invoke_without_command=True)
def shares(
    context: typer.Context,
    ledger: Annotated[str, typer.Option(help="Only shares of this ledger. Empty: of all.")] = "",
    parent: Annotated[str, typer.Option(help="Only parts of this share. Empty: all.")] = "",
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Token = None,
    timeout: Seconds = 10.0,
) -> None:
    """Show the shares: weights, caps, guarantees, and what is left of each cap."""
    if context.invoked_subcommand is not None:
        return
    with connect(address, token_file, token) as remote:
        found = _shares(remote, pb.ListSharesRequest(ledger=ledger, parent=parent), timeout)
    if as_json:
        say_json([as_dict(share) for share in found])
    elif not found:
        say("no shares: the configuration defines them")
    else:
        _show(found)


@app.command("set")
def set_share(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The share, like team/app.", show_default=False)],
    weight: Annotated[int | None, typer.Option(min=0, max=1_000_000, help="Against its sisters.")] = None,
    cap: Annotated[
        list[str] | None,
        typer.Option(metavar="DIMENSION[/WINDOW]=AMOUNT", help="The most that it may use; `none` ends it. Repeatable."),
    ] = None,
    guarantee: Annotated[
        list[str] | None,
        typer.Option(metavar="DIMENSION=AMOUNT", help="What it gets whenever it asks; `none` ends it. Repeatable."),
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Make the share if there is none.")] = False,
    ledger: Annotated[str, typer.Option(help="In this ledger. Empty: in all that have it.")] = "",
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Token = None,
    timeout: Seconds = 10.0,
) -> None:
    """Change a share at once; what is not named stays.

    An amount is absolute, or a percentage of whatever the pool's limit turns out to be. Money is in US dollars. The
    change stays, whatever the configuration says, until the share is set to what the configuration says.
    """
    caps, guarantees = _parse(cap or (), "--cap"), _parse(guarantee or (), "--guarantee")
    if weight is None and not caps and not guarantees and not create:
        raise CommandError("nothing to change: give --weight, --cap or --guarantee")
    with connect(address, token_file, token) as remote:
        stub = pb.AdminServiceStub(remote.channel)
        found = [each for each in _shares(remote, pb.ListSharesRequest(ledger=ledger), timeout) if each.name == path]
        if create:
            there = {each.ledger for each in found}
            found += [pb.Share(ledger=each, name=path) for each in _ledgers(remote, ledger, timeout) - there]
        if not found:
            raise CommandError(f"there is no share {path!r}: `paceline shares` lists them, --create makes one")
        changed = []
        for share in sorted(found, key=lambda each: each.ledger):
            told = pb.Share(
                ledger=share.ledger,
                name=path,
                weight=weight if weight is not None else share.weight if share.HasField("weight") else None,
                caps=_changed(share.caps, caps),
                guarantees=_changed(share.guarantees, guarantees),
                etag=share.etag,
            )
            request = pb.UpdateShareRequest(share=told, allow_missing=create)
            changed.append(stub.UpdateShare(request, timeout=timeout, metadata=remote.metadata).share)
    _show(changed)


def _show(found: Iterable[pb.Share]) -> None:
    """A line for each share, and one for each further limit that it has."""
    content = table(*_COLUMNS, right=_NUMBERS)
    for share in found:
        first = (share.name, share.ledger, str(share.weight), _words(share.caps), _words(share.guarantees))
        limits = [each for each in share.dimensions if each.HasField("limit")] or [pb.DimensionState()]
        for state in limits:
            dimension = state.dimension
            name = dimension_word(dimension) + (f" in {state.pool}" if state.pool else "")
            level, held = amount(dimension, present(state, "level")), amount(dimension, state.held)
            content.add_row(*first, *((name, level, held) if dimension else ("-", "-", "-")))
            first = ("", "", "", "", "")
    show(content)


def _words(amounts: Iterable[pb.ShareAmount]) -> str:
    found = []
    for each in amounts:
        usual = _usual(each.dimension)
        name = dimension_word(each.dimension) + ("" if each.window == usual else f"/{window_word(each.window)}")
        value = f"{each.permille / 10:g}%" if each.HasField("permille") else amount(each.dimension, each.units)
        found.append(f"{name}={value}")
    return " ".join(found) or "-"


def _usual(dimension: int) -> pb.Window.ValueType:
    """The window that goes without saying."""
    if dimension == pb.DIMENSION_SPEND:
        return pb.WINDOW_MONTH
    gauges = (pb.DIMENSION_CONCURRENCY, pb.DIMENSION_QUEUED_REQUESTS)
    return pb.WINDOW_NONE if dimension in gauges else pb.WINDOW_MINUTE


def _parse(texts: Iterable[str], option: str) -> dict[_Key, pb.ShareAmount | None]:
    """By dimension and window; ``None`` ends it."""
    found: dict[_Key, pb.ShareAmount | None] = {}
    for text in texts:
        match = _AMOUNT.fullmatch(text)
        if match is None:
            raise CommandError(f"{option} {text!r} cannot be read: {_REMEDY}")
        dimension = pb.Dimension.DESCRIPTOR.values_by_name.get(f"DIMENSION_{match['dimension'].upper()}")
        if dimension is None or not dimension.number:
            known = ", ".join(dimension_word(each) for each in pb.Dimension.values() if each)
            raise CommandError(f"{option} {text!r}: there is no dimension {match['dimension']!r}; there are: {known}")
        window = _usual(dimension.number)
        if match["window"] is not None:
            given = pb.Window.DESCRIPTOR.values_by_name.get(f"WINDOW_{match['window'].upper()}")
            if given is None or not given.number:
                raise CommandError(
                    f"{option} {text!r}: there is no window {match['window']!r}; use minute, day or month"
                )
            window = pb.Window.ValueType(given.number)
        message = pb.ShareAmount(dimension=pb.Dimension.ValueType(dimension.number), window=window)
        _set_amount(message, match["amount"], f"{option} {text!r}")
        found[dimension.number, window] = None if match["amount"] == "none" else message
    return found


def _set_amount(message: pb.ShareAmount, text: str, option: str) -> None:
    if text == "none":
        return
    plain = text.rstrip("%").replace("_", "").replace(",", "")
    if plain.count(".") > 1 or plain in ("", "."):
        raise CommandError(f"{option} cannot be read: {_REMEDY}")
    money = message.dimension == pb.DIMENSION_SPEND
    value = Decimal(plain) * (10 if text.endswith("%") else _NANO if money else 1)
    if value != int(value) or value >= 1 << 62:
        raise CommandError(f"{option} has too many places: a unit, or a tenth of a percent, is the smallest step")
    if text.endswith("%"):
        if value > 1_000:
            raise CommandError(f"{option} is more than 100%")
        message.permille = int(value)
    else:
        message.units = int(value)


def _changed(amounts: Iterable[pb.ShareAmount], changes: dict[_Key, pb.ShareAmount | None]) -> list[pb.ShareAmount]:
    """What there is, with what is given in its place."""
    kept: dict[_Key, pb.ShareAmount | None] = {(each.dimension, each.window): each for each in amounts}
    return [each for each in (kept | changes).values() if each is not None]


def _shares(remote: Remote, request: pb.ListSharesRequest, timeout: float) -> list[pb.Share]:
    method = pb.AdminServiceStub(remote.channel).ListShares
    return [share for page in pages(remote, method, request, timeout) for share in page.shares]


def _ledgers(remote: Remote, only: str, timeout: float) -> set[str]:
    if only:
        return {only}
    method = pb.AdminServiceStub(remote.channel).ListLedgers
    found = pages(remote, method, pb.ListLedgersRequest(), timeout)
    return {ledger.name for page in found for ledger in page.ledgers}
