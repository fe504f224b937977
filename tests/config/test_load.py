"""Reading the configuration: files, environment, tokens, catalogue files; and text that is no configuration at all."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from paceline.config import Config, ConfigError, ServerLimits, check, load_config, node_name, peer_address, token_hashes
from paceline.config.document import read
from paceline.config.schema import schema
from paceline.engine.dimensions import SECOND_US

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "config.example.yaml"
SCHEMA = ROOT / "docs" / "config.schema.json"


def written(folder: Path, text: str) -> Path:
    path = folder / "paceline.yaml"
    path.write_text(text, "utf-8")
    return path


def test_an_empty_file_is_a_configuration(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, ""), {}) == Config() == load_config(None, {})
    assert load_config(written(tmp_path, "# nothing yet\n"), {}) == Config()


def test_the_example_is_valid_and_complete() -> None:
    config = load_config(EXAMPLE, {})
    given = set(yaml.safe_load(EXAMPLE.read_text("utf-8")))
    assert given == {field.alias or name for name, field in Config.model_fields.items()}
    assert config.limits == ServerLimits()  # what the example shows as defaults are the defaults
    assert not config.notes


def test_the_published_schema_is_this_versions() -> None:
    assert SCHEMA.read_text("utf-8") == schema(), "run: python -m paceline.config.schema docs/config.schema.json"


def test_the_schema_accepts_the_example_and_refuses_faults() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    example = yaml.safe_load(EXAMPLE.read_text("utf-8"))
    validator.validate(example)
    assert not validator.is_valid({**example, "stoer": "embedded:"})
    assert not validator.is_valid({"accounts": {"main": {"pools": {"sonnet-5": {"requests": -1}}}}})


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, 'listen: 127.0.0.1:1\nstore: "embedded:"\n')
    config = load_config(path, {"PACELINE_LISTEN": "[::1]:2", "PACELINE_LOG_FORMAT": "json", "PACELINE_STORE": ""})
    assert (config.listen, config.log_format, config.store) == ("[::1]:2", "json", "embedded:")


def test_a_fault_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, {"PACELINE_STORE": "mysql://u:hunter2@db/x", "PACELINE_LOG_LEVEL": "inf"})
    assert [line.split(": ")[:2] for line in refused.value.lines] == [
        ["PACELINE_STORE", "store"],
        ["PACELINE_LOG_LEVEL", "log_level"],
    ]
    assert "hunter2" not in str(refused.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert check(missing, {}).errors == (
        f"{missing}:1: file: cannot be read (No such file or directory); check the path",
    )


@pytest.mark.parametrize(
    "url",
    [
        "embedded:",
        "embedded:paceline.db",
        "embedded:/var/lib/p.db?durability=power",
        "embedded:///var/lib/p.db",
        "redis://cache",
        "redis://user:p%40ss@cache:6379/3",
        "rediss://[::1]:6380/0",
        "redis+sentinel://a:26379,b:26379/mymaster",
        "redis+sentinel://a:26379/mymaster/2",
        "rediss+sentinel://user:pw@a:26379,b:26379/mymaster?ca=/etc/ca.pem",
        "redis+cluster://a:6379,b:6379",
        "rediss+cluster://a:6379",
        "valkey://cache/0",
        "valkeys+sentinel://a/mymaster",
        "unix:///run/redis.sock?db=0",
    ],
)
def test_good_store_urls(url: str) -> None:
    assert Config(store=url).store == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        "embedded",
        "embedded://relative.db",
        "embedded:///",
        "redis:cache",
        "redis://",
        "redis://a,b",
        "redis://cache/zero",
        "redis://cache:0",
        "redis://[::1",
        "redis+cluster://a:1,,b:1",
        "redis+cluster://a:1/3",
        "redis+sentinel://a:1/x/y",
        "http://cache",
    ],
)
def test_bad_store_urls(url: str, tmp_path: Path) -> None:
    (line,) = check(written(tmp_path, f"store: {json.dumps(url)}\n"), {}).errors
    assert ":1: store: " in line


def test_the_stores_url_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("redis://:hunter2@cache:6379/0\n")
    path = written(tmp_path, f"store_file: {tmp_path / 'url'}\n")
    assert load_config(path, {}).store == "redis://:hunter2@cache:6379/0"
    assert load_config(path, {"PACELINE_STORE": "embedded:"}).store == "embedded:"
    (tmp_path / "other").write_text("redis://other")
    assert load_config(path, {"PACELINE_STORE_FILE": str(tmp_path / "other")}).store == "redis://other"
    both = written(tmp_path, 'store: "embedded:"\nstore_file: secret\n')
    assert load_config(both, {"PACELINE_STORE_FILE": str(tmp_path / "other")}).store == "redis://other"
    assert check(both, {}).errors == (f"{both}:2: store_file: stands beside store; remove one of the two",)


def test_a_check_reads_no_secrets_and_says_none(tmp_path: Path) -> None:
    path = written(tmp_path, "store_file: /nonexistent/url\n")
    assert check(path, {}).errors == ()
    with pytest.raises(ConfigError) as refused:
        load_config(path, {})
    says = "file /nonexistent/url cannot be read (No such file or directory); mend it"
    assert refused.value.lines == [f"{path}:1: store_file: {says}"]
    (tmp_path / "url").write_text("mysql://:hunter2@db")
    with pytest.raises(ConfigError) as refused:
        load_config(written(tmp_path, f"store_file: {tmp_path / 'url'}\n"), {})
    (line,) = refused.value.lines
    assert line.startswith(f"file {tmp_path / 'url'}: store: is not a store URL")
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("node", "a b", "node: "),
        ("peer_listen", "7134", "peer_listen: "),
        ("peer_advertise", "host:0", "peer_advertise: is no address"),
        ("peer_advertise", "0.0.0.0", "peer_advertise: is no address that others can connect to"),
        ("lease", "500ms", "lease: must be from 1s to 30s"),
        ("lease", "31s", "lease: must be from 1s to 30s"),
        ("replication_lag", "2m", "replication_lag: must be from 0ms to 1m"),
        ("away", "0", "away: must be from"),
    ],
)
def test_bad_fields_of_a_fleet(field: str, value: str, says: str, tmp_path: Path) -> None:
    (line,) = check(written(tmp_path, f"{field}: {value}\n"), {}).errors
    assert f":1: {says}" in line


def test_notes_on_a_fleet(tmp_path: Path) -> None:
    path = written(tmp_path, "store: redis://cache\naway: 3s\n")
    assert [note.split(":")[2].strip() for note in check(path, {}).notes] == ["peer_listen", "away"]
    path = written(tmp_path, "store: redis://cache\npeer_listen: 0.0.0.0:7134\n")
    assert check(path, {}).notes == ()
    # All are on this machine, as the store is.
    for url in ("redis://:p@127.0.0.1:6379/0", "redis+cluster://localhost:1,[::1]:2", "unix:///run/redis.sock"):
        assert check(written(tmp_path, f"store: {url}\n"), {}).notes == ()
    assert check(written(tmp_path, "away: 1s\n"), {}).notes == ()


@pytest.mark.parametrize(
    ("listen", "advertise", "expected"),
    [
        ("127.0.0.1:0", "", "127.0.0.1:4711"),
        ("10.1.2.3:7134", "", "10.1.2.3:4711"),
        ("0.0.0.0:7134", "", f"{socket.gethostname()}:4711"),
        ("[::]:7134", "", f"{socket.gethostname()}:4711"),
        ("0.0.0.0:7134", "10.1.2.3", "10.1.2.3:4711"),
        ("0.0.0.0:7134", "fd00::7", "[fd00::7]:4711"),
        ("0.0.0.0:7134", "[fd00::7]:1", "[fd00::7]:1"),
        ("0.0.0.0:7134", "paceline-0.paceline:1", "paceline-0.paceline:1"),
        ("unix:/run/peer", "", "unix:/run/peer"),
    ],
)
def test_the_address_that_peers_are_told(listen: str, advertise: str, expected: str) -> None:
    assert peer_address(Config(peer_listen=listen, peer_advertise=advertise), 4711) == expected


def test_a_nodes_name_is_its_own() -> None:
    assert node_name(Config(node="paceline-0")) == "paceline-0"
    names = {node_name(Config()) for _ in range(3)}
    assert len(names) == 3
    for name in names:
        Config(node=name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90.0), ("0.5", 0.5), ("500ms", 0.5), ("30s", 30.0), ("1.5m", 90.0)],
)
def test_durations(text: str, expected: float, tmp_path: Path) -> None:
    config = load_config(written(tmp_path, f"limits: {{max_wait: {text}}}\n"), {})
    assert config.limits.max_wait_us == expected * SECOND_US


def test_plain_scalars_that_surprise_elsewhere_stay_text(tmp_path: Path) -> None:
    text = "shares: {a: {tenants: [on, 12:30, 2026-04-01, 0x10, no, 1e5]}}\n"
    config = load_config(written(tmp_path, text), {})
    assert config.shares["a"].tenants == ("on", "12:30", "2026-04-01", "0x10", "no", "1e5")


def test_catalogue_files_are_laid_over_in_order(tmp_path: Path) -> None:
    price = "providers: {{anthropic: {{prices: [{{models: [claude-new], input: {0}, output: {0}}}]}}}}\n"
    (tmp_path / "one.yaml").write_text(price.format(1))
    (tmp_path / "two.yaml").write_text(price.format(2))
    config = load_config(written(tmp_path, "catalogue: {files: [one.yaml, two.yaml]}\n"), {})
    assert config.catalogue_spec.providers["anthropic"].prices[-1].input == 2_000_000_000


def test_tokens_come_from_hashes_variables_and_files(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("third\n")
    path = written(
        tmp_path,
        f"""
identities:
  - {{name: a, token_sha256: {hashlib.sha256(b"first").hexdigest()}, tenants: ["*"]}}
  - {{name: b, token_env: B_TOKEN, tenants: [x]}}
  - {{name: c, token_file: {tmp_path / "token"}, roles: [admin]}}
""",
    )
    found = token_hashes(load_config(path, {}), {"B_TOKEN": "second"})
    names = {digest: identity.name for digest, identity in found.items()}
    expected = {"first": "a", "second": "b", "third": "c"}
    assert names == {hashlib.sha256(token.encode()).digest(): name for token, name in expected.items()}


def test_tokens_that_are_not_there_are_told_by_name_only(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
identities:
  - {name: a, token_env: A_TOKEN, tenants: ["*"]}
  - {name: b, token_file: /nonexistent/token, tenants: ["*"]}
  - {name: c, token_env: C_TOKEN, tenants: ["*"]}
  - {name: d, token_env: D_TOKEN, tenants: ["*"]}
""",
    )
    with pytest.raises(ConfigError) as refused:
        token_hashes(load_config(path, {}), {"A_TOKEN": " ", "C_TOKEN": "hunter2", "D_TOKEN": "hunter2"})
    assert refused.value.lines == [
        "identities: a: environment variable A_TOKEN holds no token; set it",
        "identities: b: file /nonexistent/token cannot be read (No such file or directory); mend it",
        "identities: d: has the same token as 'c'; give each its own",
    ]


def test_notes_tell_what_may_surprise(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "accounts: {main: {tier: custom}}\nladders:\n  a:\n    - {model: claude-new}\n    - {model: claude-opus-5}\n",
    )
    assert check(path, {}).notes == (
        f"{path}:1: accounts.main.tier: publishes no limits; cautious ones hold until headers tell",
        f"{path}:4: ladders.a[0].model: 'claude-new' is not in the catalogue; it gets cautious limits, no price",
    )


# Pieces of YAML and of the configuration's own words, so that examples get past the first check.
PIECES = st.sampled_from([*":-[]{},\"'#|~é \n\x00", "  ", "&a", "*a", "<<", "!!x"]) | st.sampled_from(
    ["accounts", "main", "shares", "ladders", "pools", "sonnet-5", "requests", "tier", "start", "-1", "1e9"]
)


@given(st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=80))
def test_any_text_is_a_configuration_or_a_list_of_faults(text: str) -> None:
    try:
        document = read("f.yaml", text.encode("utf-8", "surrogatepass"))
    except ConfigError as error:
        lines = error.lines
    else:
        assert all(line >= 1 for line in document.lines.values())
        return
    assert lines
    for line in lines:
        assert re.match(r"f\.yaml:\d+: ", line)
        assert "\n" not in line


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(field.alias or name for name, field in Config.model_fields.items())
INNER = ["main", "a", "pools", "sonnet-5", "requests", "amount", "shares", "cap", "tenants", "rules", "providers"]


@given(
    st.dictionaries(
        st.sampled_from(FIELDS),
        JSON | st.dictionaries(st.sampled_from(INNER), JSON | st.dictionaries(st.sampled_from(INNER), JSON)),
    )
)
def test_any_value_is_accepted_or_refused_with_lines(tmp_path_factory: pytest.TempPathFactory, data: object) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    path.write_text(json.dumps(data), "utf-8")
    report = check(path, {})
    for line in report.errors:
        assert re.match(r".*c\.yaml:\d+: ", line)
        assert "\n" not in line
