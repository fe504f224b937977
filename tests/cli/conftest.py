"""A server process for the commands that talk to one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACELINE = str(Path(sys.executable).parent / "paceline")


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment without what configures a server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")} | extra


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where a server listens that keeps nothing and was given no other option."""
    listen = free_address()
    process = subprocess.Popen(
        [PACELINE, "serve", "--listen", listen],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    try:
        done = subprocess.run(
            [PACELINE, "health", "--address", listen, "--wait", "30"],
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        yield listen
    finally:
        process.terminate()
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out == f"paceline 0.1.0 listens on {listen}\n"
    assert "nothing is kept" in err
