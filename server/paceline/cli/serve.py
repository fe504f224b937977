"""``paceline serve``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from paceline.cli.console import FAILED, error_line, leave
from paceline.config import Config, ConfigError, load_config
from paceline.config.model import ENVIRONMENT

_VARIABLES = {field: variable for variable, field in ENVIRONMENT.items()}


def _default(field: str) -> str:
    return f"[env var: {_VARIABLES[field]}; default: {Config.model_fields[field].default}]"


def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="PACELINE_CONFIG", metavar="FILE", help="Configuration in YAML. Without one all is default."
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help=f"HOST:PORT or unix:PATH where callers connect. {_default('listen')}"),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"Where the books are kept: embedded:PATH in a file; embedded: keeps nothing. {_default('store')}",
        ),
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help=f"HOST:PORT where metrics are read, or off. {_default('metrics_listen')}"),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            metavar="N",
            help="Processes that serve the address together. With an embedded store the first one keeps the books. "
            "Worker number i, from 0, offers its metrics on the port of --metrics-listen plus i.",
        ),
    ] = 1,
    log_format: Annotated[
        Literal["text", "json"] | None, typer.Option(help=f"How logs are written. {_default('log_format')}")
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(help=f"The least that is logged. {_default('log_level')}"),
    ] = None,
) -> None:
    """Run a server, until it is told to stop.

    What stands here goes before the environment, that before the file, and that before the defaults.
    """
    given = {
        "listen": listen,
        "store": store,
        "metrics_listen": metrics_listen,
        "log_format": log_format,
        "log_level": log_level,
    }
    flags = {field: value for field, value in given.items() if value is not None}
    environ = dict(os.environ) | {_VARIABLES[field]: value for field, value in flags.items()}
    try:
        found = load_config(config, environ)
    except ConfigError as error:
        for line in error.lines:
            error_line(_named(line, flags))
        leave(FAILED)
    leave(_run(found, workers))


def _named(line: str, flags: dict[str, str]) -> str:
    """The line, with the option in place of the variable that stood for it."""
    for field in flags:
        prefix = f"{_VARIABLES[field]}: {field}: "
        if line.startswith(prefix):
            return f"--{field.replace('_', '-')} {line.removeprefix(prefix)}"
    return line


def _run(config: Config, workers: int) -> int:
    from paceline.frontend.server import StartError, run
    from paceline.frontend.workers import run_workers, worker_of
    from paceline.telemetry import set_up_logging

    set_up_logging(config.log_format, config.log_level)
    import structlog

    try:
        worker = worker_of(os.environ)
    except StartError as error:
        error_line(str(error))
        return FAILED
    if worker is not None and worker.index > 0:
        # The first one has said it.
        return run(config, worker)
    log = structlog.get_logger("paceline")
    for note in config.notes:
        log.warning("configuration", note=note)
    if config.store == "embedded:":
        log.warning("nothing is kept: the books end with this process; --store embedded:PATH keeps them in a file")
    if workers > 1 and worker is None:
        return run_workers(workers, config.listen, sys.argv[1:], config.limits.drain_timeout_us / 1e6)
    return run(config, worker)
