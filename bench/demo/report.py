"""The result as a table and as JSON, and whether it may be believed."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import psutil
from rich.table import Table

from bench.demo.figures import Figures, as_json
from bench.demo.settings import MODE_NAMES, Settings
from bench.fleet.plan import Mode

_MOST_UNMATCHED = 0.01
"""Of the attempts: those that a caller gave up in the instant of sending, and that never arrived."""
_FULL_WINDOW_S = 50.0
_LEAST_ACCEPTED = 2_000

Results = Mapping[Mode, Figures]


def faults(settings: Settings, results: Results) -> list[str]:
    """Why the result is not valid; empty if it is."""
    found = []
    for mode, each in results.items():
        if each.busiest_core > settings.most_busy:
            found.append(f"{mode}: a core was {each.busiest_core:.0%} busy, above {settings.most_busy:.0%}")
        attempts = each.accepted + each.refused
        if each.unmatched_attempts > max(1.0, _MOST_UNMATCHED * attempts):
            found.append(f"{mode}: callers and upstream disagree on {each.unmatched_attempts} of {attempts} attempts")
        if settings.window_s >= _FULL_WINDOW_S:
            if each.accepted < _LEAST_ACCEPTED:
                found.append(f"{mode}: {each.accepted} calls accepted, fewer than {_LEAST_ACCEPTED:,}")
            if each.demand_interactive >= 0.5:
                found.append(
                    f"{mode}: the chat services wanted {each.demand_interactive:.0%} of the limit, half or more"
                )
        if each.fates["interactive"].get("cut") or each.fates["batch"].get("cut"):
            found.append(f"{mode}: calls of the window were cut by the end of the run")
    return found


def document(settings: Settings, results: Results) -> dict[str, Any]:
    """All that is known, ready for JSON: a key for each mode, and beside them what they depend on."""
    wrong = faults(settings, results)
    return {
        "valid": not wrong,
        "invalid_because": wrong,
        **{mode: as_json(each) for mode, each in results.items()},
        "seed": settings.seed,
        "settings": msgspec.to_builtins(settings),
        "server_config": settings.server_config(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("paceline", "anthropic", "httpx2", "grpcio", "aiohttp")},
        "machine": {"cores": psutil.cpu_count(), "system": platform.system(), "processor": platform.machine()},
    }


def percent(value: float) -> str:
    """A share as people read it."""
    return f"{value:.1%}"


def seconds(value: float | None) -> str:
    """A wait as people read it."""
    if value is None:
        return "–"
    return f"{value * 1_000:.0f} ms" if value < 1 else f"{value:.1f} s"


_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("limit used", lambda each: percent(each.limit_used)),
    ("calls accepted", lambda each: f"{each.accepted:,}"),
    ("refused (429)", lambda each: f"{each.refused:,}"),
    ("refused per 1,000", lambda each: "–" if each.refused_per_1000 is None else f"{each.refused_per_1000:,.1f}"),
    ("first attempt", lambda each: percent(each.first_attempt)),
    ("chat: first attempt", lambda each: percent(each.first_attempt_interactive)),
    (
        "chat calls lost",
        lambda each: _lost(each.lost_interactive, each.lost_interactive_calls, each.offered_interactive),
    ),
    ("batch calls lost", lambda each: _lost(each.lost_batch, each.lost_batch_calls, each.offered_batch)),
    # Millions of tokens.
    ("batch answered (tokens)", lambda each: f"{each.answered_batch:,} ({each.answered_batch_tokens / 1e6:.2f} M)"),
    ("chat wait, median", lambda each: seconds(each.wait_interactive_p50_s)),
    ("chat wait, p99", lambda each: seconds(each.wait_interactive_p99_s)),
    ("batch wait, median", lambda each: seconds(each.wait_batch_p50_s)),
    ("Jain's index", lambda each: "–" if each.jain is None else f"{each.jain:.3f}"),
    (
        "least served ÷ fair share",
        lambda each: "–" if each.least_served is None else f"{each.least_served:.2f} ({each.least_served_tenant})",
    ),
    ("busiest core", lambda each: percent(each.busiest_core)),
)


def _lost(part: float, lost: int, offered: int) -> str:
    return f"{part:.1%} ({lost:,}/{offered:,})"


def _binding(results: Results) -> str:
    names = {mode: each.binding_dimension.replace("_", " ") for mode, each in results.items()}
    if len(set(names.values())) == 1:
        return f"binding: {next(iter(names.values()))}"
    return "binding: " + ", ".join(f"{name} ({MODE_NAMES[mode]})" for mode, name in names.items())


def table(settings: Settings, results: Results) -> Table:
    """The measures side by side."""
    chats, jobs = settings.chats, settings.jobs
    demand = next(iter(results.values())).demand_interactive
    window, deadline = settings.window_s, settings.deadline_s
    found = Table(
        title=f"{chats} chat services that want {demand:.0%} of the limit, and {jobs} batch jobs that always have work",
        caption=f"{_binding(results)}; window {window:.0f} s, deadline {deadline:.0f} s per call, seed {settings.seed}",
    )
    found.add_column("", no_wrap=True)
    for mode in results:
        found.add_column(MODE_NAMES[mode], justify="right")
    for name, cell in _ROWS:
        found.add_row(name, *(cell(each) for each in results.values()))
    return found
