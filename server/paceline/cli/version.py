"""``paceline version``."""

from __future__ import annotations

import platform
from importlib.metadata import version as version_of

from paceline import __version__
from paceline.cli.console import say


def version() -> None:
    """Print the version."""
    say(f"paceline {__version__} (Python {platform.python_version()}, grpcio {version_of('grpcio')})")
