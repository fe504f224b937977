"""The ``paceline`` command: a module for each of its commands.

Exit codes: 0 it worked; 1 (only ``health``) the server does not serve; 2 an error, one line on standard error; 3 the
server denied. ``PACELINE_TRACEBACK=1`` shows where an unexpected error came from.
"""

from __future__ import annotations

import os
import sys

import typer

from paceline.cli.console import FAILED, error_line

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command, and exit."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    from paceline.cli.app import app

    try:
        code = app(arguments, prog_name="paceline", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        error_line(error.format_message())
        return FAILED
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough. Nothing more may be flushed at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("PACELINE_TRACEBACK"):
            raise
        error_line(f"unexpected {type(error).__name__}: {error} (PACELINE_TRACEBACK=1 shows where)")
        return FAILED
