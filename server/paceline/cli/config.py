"""``paceline config``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from paceline.cli.console import FAILED, leave, say
from paceline.config import check as check_config
from paceline.config import load_config
from paceline.config.schema import schema as config_schema
from paceline.ledger.journal import StoreError
from paceline.ledger.store import open_store

app = typer.Typer(help="Look at configurations.")


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The configuration, in YAML.")],
) -> None:
    """Say whether a configuration can be used: a line for each problem, and exit code 2 if there is any.

    The environment is left out: what is checked is the file.
    """
    report = check_config(file, {})
    errors = [*report.errors, *(() if report.errors else _of_store(file))]
    for line in errors:
        say(line)
    for note in report.notes:
        say(f"note: {note}")
    if errors:
        leave(FAILED)
    say(f"{file}: ok")


def _of_store(file: str) -> Iterator[str]:
    """What is wrong with the store's URL that only the store itself knows. Never the URL."""
    try:
        open_store(load_config(file, {}, secrets=False).store)
    except StoreError as error:
        yield f"{file}: store: {error}"


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    say(config_schema().rstrip("\n"))
