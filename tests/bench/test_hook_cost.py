"""The benchmark of the hook runs, and prints its two tables."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.process
def test_it_runs() -> None:
    command = [sys.executable, "-m", "bench.hook_cost", "--rounds", "1", "--calls", "2", "--streams", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for mode in ("sync", "async"):
        # One line for each kind of call, and one for the first event.
        assert len([line for line in lines if line.startswith(f"{mode} ")]) == 4
