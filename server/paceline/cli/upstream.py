"""``paceline upstream``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.console import CommandError, say

_MISSING = "the simulator needs aiohttp: pip install 'paceline[upstream]'"


def upstream(
    host: Annotated[str, typer.Option(metavar="HOST", help="Where to listen. Whoever reaches it can change it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free.")] = 0,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIMENSION=N",
            help="Limit per minute, of every group that has such a limit: requests, input_tokens and output_tokens "
            "(Anthropic), tokens (OpenAI). Repeat it.",
        ),
    ] = None,
    model_group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MODELS:LIMITS",
            help="Models that share limits, such as opus:claude-opus-4-*,claude-opus-5:requests=50,input_tokens=30000,"
            "output_tokens=8000; with a limit of tokens= it is of OpenAI's kind. Repeat it.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings as YAML or JSON: {config: {...}, scenario: {...}}.")
    ] = None,
    burst_seconds: Annotated[
        float | None, typer.Option(help="Burst: the limit of so many seconds. [default: 60]")
    ] = None,
    initial: Annotated[float | None, typer.Option(help="How full the buckets start, 0 to 1. [default: 1]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random. [default: 0]")] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="A field of the scenario, such as first_byte_ms=200 or overload_probability=0.1. Repeat it.",
        ),
    ] = None,
) -> None:
    """Run a simulator of upstream LLM APIs, to try and measure things against.

    It prints its address when it is ready. Anthropic's Messages and OpenAI's Chat Completions are served with the
    limits, headers and errors of the real ones; GET /sim/truth says what really happened.
    """
    from paceline.upstream.settings import SettingsError

    try:
        settings = _settings(config)
        fields = settings["config"]
        fields.update(
            (name, value)
            for name, value in (("burst_seconds", burst_seconds), ("initial", initial), ("seed", seed))
            if value is not None
        )
        if model_group:
            fields["groups"] = [_group(text) for text in model_group]
        for text in limit or ():
            _apply_limit(fields, text)
        for text in scenario or ():
            name, _, value = text.partition("=")
            settings["scenario"][name] = value
        _run(host, port, settings)
    except SettingsError as error:
        raise CommandError(str(error)) from None


def _settings(path: Path | None) -> dict[str, dict[str, Any]]:
    from paceline.upstream.settings import SettingsError

    found: dict[str, dict[str, Any]] = {"config": {}, "scenario": {}}
    if path is None:
        return found
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: a mapping is wanted")
    for name, value in document.items():
        if name not in found or not isinstance(value, dict):
            raise SettingsError(f"{path}: {name}: only config and scenario, each a mapping, are wanted")
        found[name] = value
    return found


def _amount(text: str, where: str) -> tuple[str, int]:
    from paceline.upstream.settings import SettingsError

    dimension, _, amount = text.partition("=")
    if not amount.isascii() or not amount.isdigit():
        raise SettingsError(f"{where} {text}: DIMENSION=N is wanted")
    return dimension.strip(), int(amount)


def _group(text: str) -> dict[str, Any]:
    from paceline.upstream.settings import SettingsError

    parts = text.split(":")
    if len(parts) != 3:
        raise SettingsError(f"--model-group {text}: NAME:MODELS:LIMITS is wanted")
    limits = dict(_amount(one, "--model-group") for one in parts[2].split(","))
    models = [one.strip() for one in parts[1].split(",") if one.strip()]
    return {
        "name": parts[0],
        "models": models,
        "api": "openai" if "tokens" in limits else "anthropic",
        "limits": limits,
    }


def _apply_limit(fields: dict[str, Any], text: str) -> None:
    import msgspec

    from paceline.upstream.settings import SettingsError, config_of

    dimension, amount = _amount(text, "--limit")
    fields["groups"] = msgspec.to_builtins(config_of(fields).groups)
    known = False
    for group in fields["groups"]:
        if dimension in group["limits"]:
            group["limits"] = {**group["limits"], dimension: amount}
            known = True
    if not known:
        raise SettingsError(f"--limit {text}: there is no such dimension")


def _run(host: str, port: int, settings: dict[str, dict[str, Any]]) -> None:
    from paceline.upstream.settings import config_of, scenario_of

    config, scenario = config_of(settings["config"]), scenario_of(settings["scenario"])
    try:
        from paceline.upstream.http.process import run
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise CommandError(_MISSING) from None

    def ready(url: str) -> None:
        say(f"paceline upstream: listening on {url}")

    try:
        run(host, port, config, scenario, ready)
    except OSError as error:
        raise CommandError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
