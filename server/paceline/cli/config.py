"""``paceline config``."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.console import FAILED, leave, say
from paceline.config import check as check_config
from paceline.config.schema import schema as config_schema

app = typer.Typer(help="Look at configurations.")


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The configuration, in YAML.")],
) -> None:
    """Say whether a configuration can be used: a line for each problem, and exit code 2 if there is any.

    The environment is left out: what is checked is the file.
    """
    report = check_config(file, {})
    for line in (*report.errors, *report.notes):
        say(line if line in report.errors else f"note: {line}")
    if report.errors:
        leave(FAILED)
    say(f"{file}: ok")


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    say(config_schema().rstrip("\n"))
