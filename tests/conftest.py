"""What every test shares."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Hooks that end a run with what its properties did.
from tests.engine.tally import (
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

__all__ = ["pytest_sessionfinish", "pytest_terminal_summary", "pytest_testnodedown"]

# No deadline: a busy machine is not a failure. A failing example prints the blob that repeats it.
settings.register_profile("paceline", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("paceline")
