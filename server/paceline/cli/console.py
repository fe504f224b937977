"""What commands say: results on standard output, one line for an error on standard error, and exit codes."""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

DENIED = 3
"""Exit code: the server answered, and the answer is no."""
FAILED = 2
"""Exit code of every error."""
UNHEALTHY = 1

_WIDE = 500
"""Columns where the output is not a terminal, so that nothing is cut."""


class CommandError(typer.TyperException):
    """What went wrong and what to do, in one line."""

    exit_code = FAILED


def error_line(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"error: {' '.join(text.split())}\n")


def say(text: str) -> None:
    """One line on standard output."""
    sys.stdout.write(text + "\n")


def say_json(value: object) -> None:
    """One JSON document on standard output."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def leave(code: int) -> NoReturn:
    """End the command."""
    raise typer.Exit(code)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table without frames. The columns named in ``right`` are aligned to the right."""
    found = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        found.add_column(column, justify="right" if column in right else "left", no_wrap=not sys.stdout.isatty())
    return found


def show(content: Table) -> None:
    """A table on standard output."""
    terminal = sys.stdout.isatty()
    console = Console(
        file=sys.stdout,
        width=None if terminal else _WIDE,
        no_color="NO_COLOR" in os.environ,
        markup=False,
        highlight=False,
        emoji=False,
    )
    console.print(content)
