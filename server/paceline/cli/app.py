"""All commands together."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli import config, ledgers, shares
from paceline.cli.advise import advise
from paceline.cli.console import say
from paceline.cli.explain import explain
from paceline.cli.health import health
from paceline.cli.limits import limits
from paceline.cli.pools import pools
from paceline.cli.report import report
from paceline.cli.reserve import reserve
from paceline.cli.serve import serve
from paceline.cli.upstream import upstream
from paceline.cli.version import version

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.add_typer(config.app, name="config")
app.command()(reserve)
app.command()(pools)
app.command()(limits)
app.command()(advise)
app.add_typer(ledgers.app, name="ledgers")
app.add_typer(shares.app, name="shares")
app.command()(report)
app.command()(explain)
app.command()(health)
app.command()(upstream)
app.command()(version)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Coordinates the rate limits of LLM APIs for a fleet."""
    if show_version:
        version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help())
