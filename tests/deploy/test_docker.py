"""The container image: its recipe is clean, in step with the code, and its steps work as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.config import Config, load_config

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")
# Instructions in one line each, without comments.
LINES = [
    line for line in re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines() if line
]
STAGES = [number for number, line in enumerate(LINES) if line.startswith("FROM ")]


def argument(instruction: str) -> str:
    (found,) = [line for line in LINES[STAGES[-1] :] if line.startswith(instruction + " ")]
    return found.removeprefix(instruction + " ")


@pytest.mark.skipif(sys.platform == "win32", reason="hadolint is not locked for Windows")
def test_hadolint() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "hadolint"), "--no-color", str(DOCKERFILE)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_it_copies_is_let_in() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = [line.removeprefix("!").rstrip("/") for line in ignore if line.startswith("!")]
    assert "*" in ignore
    for line in LINES:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
                assert any(source == each or source.startswith(each + "/") for each in let_in), source


def test_base_is_pinned_and_of_a_supported_python() -> None:
    (base,) = re.findall(r"^ARG PYTHON=(\S+)$", TEXT, re.MULTILINE)
    match = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-\w+", base)
    assert match is not None
    assert (int(match[1]), int(match[2])) >= (3, 11)


def test_runs_as_nobody_special_in_exec_form() -> None:
    assert argument("USER").split(":")[0].isdigit()
    assert argument("ENTRYPOINT") == '["paceline"]'
    assert argument("CMD") == '["serve"]'
    assert argument("HEALTHCHECK").endswith('CMD ["paceline", "health"]')


def test_environment_is_a_valid_configuration() -> None:
    environ = dict(pair.split("=", 1) for pair in argument("ENV").split())
    config = load_config(None, environ)
    assert config.listen.rpartition(":")[2] == Config().listen.rpartition(":")[2]
    assert argument("EXPOSE").split() == [
        address.rpartition(":")[2] for address in (config.listen, config.metrics_listen)
    ]
    assert config.store.removeprefix("embedded:").startswith(argument("VOLUME").strip('[]"'))


def test_locks_agree() -> None:
    def pins(name: str) -> dict[str, str]:
        text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        return {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}

    developed = pins("dev.txt")
    assert pins("build.txt").items() <= developed.items()
    assert pins("server.txt").items() <= developed.items()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform == "win32", reason="the image is for Linux")
def test_the_steps_of_the_build_work(tmp_path: Path) -> None:
    """All RUN lines of the first stage, on copies of what it copies, with other folders in place of its own."""
    prefix, source = tmp_path / "opt", tmp_path / "src"
    source.mkdir()
    environ = dict(os.environ) | {"PATH": f"{Path(sys.base_prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environ.pop("VIRTUAL_ENV", None)
    for line in LINES[STAGES[0] : STAGES[-1]]:
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for each in sources:
                at = source / target / Path(each).name if target.endswith("/") else source / target
                at.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / each).is_dir():
                    shutil.copytree(
                        ROOT / each, at, ignore=shutil.ignore_patterns("__pycache__", "tests", "*.egg-info")
                    )
                else:
                    shutil.copy(ROOT / each, at)
        elif line.startswith("RUN "):
            command = (
                line.removeprefix("RUN ").replace("/opt/", f"{prefix}/").replace("python -m venv", "python3 -m venv")
            )
            done = subprocess.run(
                ["/bin/sh", "-ec", command],
                cwd=source,
                env=environ,
                capture_output=True,
                text=True,
                timeout=280,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    # What runs in the image is whole: it imports everything, and has nothing that only builds.
    installed = {each.name.lower() for each in (prefix / "paceline").glob("lib/python*/site-packages/*.dist-info")}
    assert not any(name.startswith(("pip-", "hatchling-", "pytest-")) for name in installed)
    paceline = prefix / "paceline" / "bin" / "paceline"
    done = subprocess.run(
        [str(paceline), "config", "check", str(ROOT / "docs" / "config.example.yaml")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
