"""``paceline ledgers``: who owns them, and what operators do with that."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.console import say, say_json, show, table
from paceline.cli.listing import pages
from paceline.cli.remote import DEFAULT_ADDRESS, Address, AsJson, Remote, Seconds, TokenFile, as_dict, connect
from paceline.cli.words import enum_word
from paceline_client.stubs import v1 as pb

app = typer.Typer(help="Look at ledgers and their owners, and change them.")

_COLUMNS = ("ledger", "state", "owner", "epoch", "form", "sequence", "open", "waiting", "reason")
_NUMBERS = ("epoch", "form", "sequence", "open", "waiting")

Token = Annotated[str | None, typer.Option(envvar="PACELINE_TOKEN", hidden=True)]


@app.callback(invoke_without_command=True)
def ledgers(
    context: typer.Context,
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Token = None,
    timeout: Seconds = 10.0,
) -> None:
    """Show the ledgers: state, owner, epoch, and the form of their journals."""
    if context.invoked_subcommand is not None:
        return
    with connect(address, token_file, token) as remote:
        found = _ledgers(remote, timeout)
    if as_json:
        say_json([as_dict(ledger) for ledger in found])
    elif not found:
        say("no ledgers yet: one is made when its account is configured, or first asked for")
    else:
        content = table(*_COLUMNS, right=_NUMBERS)
        for ledger in found:
            content.add_row(
                ledger.name,
                enum_word(pb.LedgerState, "LEDGER_STATE_", ledger.state),
                ledger.owner or "-",
                str(ledger.epoch or "-"),
                _form(ledger),
                str(ledger.sequence),
                str(ledger.open_reservations),
                str(ledger.waiting_reservations),
                " ".join(ledger.state_reason.split()) or "-",
            )
        show(content)


@app.command()
def finalize(
    ledger: Annotated[str, typer.Argument(metavar="LEDGER", help="The ledger. Without one: all.")] = "",
    form: Annotated[int, typer.Option(min=0, help="The form to write. 0: the newest of this version.")] = 0,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Token = None,
    timeout: Seconds = 10.0,
) -> None:
    """Finish an upgrade: journals may be written in the newer form from now on.

    To be run once all servers run the new version. There is no way back: servers of the version before can own these
    ledgers no more.
    """
    with connect(address, token_file, token) as remote:
        stub = pb.AdminServiceStub(remote.channel)
        names = [ledger] if ledger else [each.name for each in _ledgers(remote, timeout)]
        for name in names:
            request = pb.FinalizeUpgradeRequest(ledger=name, form=form)
            answer = stub.FinalizeUpgrade(request, timeout=timeout, metadata=remote.metadata)
            say(f"{name}: form {answer.ledger.form}")
        if not names:
            say("no ledgers yet")


@app.command("hand-over")
def hand_over(
    ledger: Annotated[str, typer.Argument(metavar="LEDGER", help="The ledger.")],
    to: Annotated[
        str, typer.Option(metavar="NODE", help="Name of the server that shall own it. Empty: the next in line.")
    ] = "",
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    token: Token = None,
    timeout: Seconds = 10.0,
) -> None:
    """Have the owner of a ledger hand it over to another server. Calls wait for a moment; none fails."""
    with connect(address, token_file, token) as remote:
        stub = pb.AdminServiceStub(remote.channel)
        request = pb.HandOverLedgerRequest(ledger=ledger, node=to)
        answer = stub.HandOverLedger(request, timeout=timeout, metadata=remote.metadata)
    say(f"{ledger}: now with {answer.node}")


def _form(ledger: pb.Ledger) -> str:
    if not ledger.form:
        return "-"
    if ledger.newest_form > ledger.form:
        return f"{ledger.form} (of {ledger.newest_form}: not finalized)"
    return str(ledger.form)


def _ledgers(remote: Remote, timeout: float) -> list[pb.Ledger]:
    method = pb.AdminServiceStub(remote.channel).ListLedgers
    found = pages(remote, method, pb.ListLedgersRequest(), timeout)
    return [ledger for page in found for ledger in page.ledgers]
