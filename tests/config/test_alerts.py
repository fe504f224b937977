"""Thresholds and the webhook in the configuration: what is read, what deserves a word, and what never shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.config import Config, ConfigError, WebhookTarget, check, load_config, webhook_target


def written(folder: Path, text: str) -> Path:
    path = folder / "paceline.yaml"
    path.write_text(text, "utf-8")
    return path


def test_the_default_is_eighty_percent_and_no_webhook() -> None:
    assert Config().alerts.thresholds == (800,)
    assert Config().alerts.webhook is None
    assert webhook_target(Config().alerts, {}) is None


@pytest.mark.parametrize(
    ("text", "thresholds"),
    [("[]", ()), ("[0.8, 0.95]", (800, 950)), ("[1, 0.1]", (100, 1_000)), ("[0.8754]", (875,))],
)
def test_thresholds(text: str, thresholds: tuple[int, ...], tmp_path: Path) -> None:
    assert load_config(written(tmp_path, f"alerts: {{thresholds: {text}}}\n"), {}).alerts.thresholds == thresholds


@pytest.mark.parametrize("text", ["0.8", "[0.09]", "[1.01]", "[true]", "[80%]", "[.nan]", "[null]", "[0.80001, 0.8]"])
def test_bad_thresholds(text: str, tmp_path: Path) -> None:
    (line,) = check(written(tmp_path, f"alerts: {{thresholds: {text}}}\n"), {}).errors
    assert ":1: alerts.thresholds" in line


@pytest.mark.parametrize(
    "url", ["https://h", "https://h:8443/a?b=c", "http://[::1]:80/x", "https://hooks.example.com/a/b"]
)
def test_good_urls(url: str) -> None:
    spec = Config.model_validate({"alerts": {"webhook": {"url": url, "secret_env": "S", "timeout": "1s"}}}).alerts
    assert webhook_target(spec, {"S": " s3cret\n"}) == WebhookTarget(url, b"s3cret", 1_000_000)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com/hunter2",
        "ftp://h/hunter2",
        "https:///hunter2",
        "https://h:0/hunter2",
        "https://h:99999/hunter2",
        "https://[::1/hunter2",
        "https://u:hunter2@h/",
        "https://h/hunter2#x",
        "https://h/hunter2 x",
        "https://h/hunter2\\r\\nX: y",
        "https://h/hünter2",
    ],
)
def test_bad_urls_are_named_and_not_shown(url: str, tmp_path: Path) -> None:
    path = written(tmp_path, f'alerts:\n  webhook:\n    url: "{url}"\n')
    (line,) = check(path, {}).errors
    assert ":3: alerts.webhook.url: " in line
    assert not any(part in line for part in ("hunter2", "hünter2"))
    with pytest.raises(ConfigError) as refused:
        webhook_target(
            Config.model_validate({"alerts": {"webhook": {"url_env": "HOOK"}}}).alerts,
            {"HOOK": url.replace("\\r\\n", "\r\n")},
        )
    assert refused.value.lines[0].startswith("alerts.webhook.url_env: environment variable HOOK ")
    assert not any(part in str(refused.value) for part in ("hunter2", "hünter2"))


def test_what_deserves_a_word(tmp_path: Path) -> None:
    plain = check(written(tmp_path, "alerts:\n  webhook:\n    url: http://hooks.example.com/hunter2\n"), {})
    assert not plain.errors
    assert [note.partition(".yaml:")[2] for note in plain.notes] == [
        "2: alerts.webhook: is not signed: whoever knows the address can post there; give secret_env",
        "3: alerts.webhook.url: is not encrypted on its way; use https",
    ]
    local = "alerts: {webhook: {url: 'http://127.0.0.1:8080/', secret_env: S}}\n"
    assert check(written(tmp_path, local), {}) == ((), ())


def test_the_url_is_not_in_the_text_of_a_configuration() -> None:
    config = Config.model_validate({"alerts": {"webhook": {"url": "https://h/hunter2"}}})
    assert "hunter2" not in repr(config)
