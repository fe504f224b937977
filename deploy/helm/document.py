"""Writes what is made from the chart: its README's table of values, and the plain manifests.

    python deploy/helm/document.py [--helm PATH] [--check]

The table is made of ``values.yaml``: a comment with ``# --`` in front of a value says what it is for. The manifests are
``helm template`` of the values named in :data:`MANIFESTS`; without ``--helm`` they are left alone. With ``--check``
nothing is written, and the exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).resolve().parent
CHART = HERE / "paceline"
README = CHART / "README.md"
PLAIN = HERE.parent / "kubernetes"
NAMESPACE = "paceline"
KUBERNETES = "1.37"
"""The version that is rendered for; from 1.30 on all get the same."""

MANIFESTS: dict[str, dict[str, Any]] = {
    "paceline.yaml": {},
    "single.yaml": {"store": {"kind": "embedded"}},
}
"""Files in ``deploy/kubernetes``, and the values that they are rendered with."""
_HEADS = {
    "paceline.yaml": "Three servers over one Redis for trials.",
    "single.yaml": "One server with its books in a file.",
}
_BEGIN, _END = "<!-- values -->\n", "<!-- end of values -->\n"
_KEY = re.compile(r"( *)([A-Za-z][A-Za-z0-9]*):(?: (.*))?$")


class Value(NamedTuple):
    """A row of the table: the path with dots, the default as JSON, and what it is for."""

    path: str
    default: str
    text: str


def values(text: str) -> Iterator[Value]:
    """Every documented value of ``values.yaml``, in its order. Two spaces indent a level."""
    document = yaml.safe_load(text)
    path: list[str] = []
    about: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("# -- "):
            about = [bare.removeprefix("# -- ")]
        elif bare.startswith("# ") and about:
            about.append(bare.removeprefix("# "))
        elif (match := _KEY.fullmatch(line)) is not None:
            path = [*path[: len(match[1]) // 2], match[2]]
            if about:
                found: Any = document
                for name in path:
                    found = found[name]
                yield Value(".".join(path), json.dumps(found), " ".join(about))
            about = []
        else:
            about = []


def table(text: str) -> str:
    """The values as a table in Markdown."""
    lines = ["| value | default | |", "|---|---|---|"]
    for value in values(text):
        about = value.text.replace("|", "\\|")
        lines.append(f"| `{value.path}` | `{value.default}` | {about} |")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """The README with the table of now. Raises :class:`ValueError` if it has no place for it."""
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{README}: has no place for the values; keep the two comments {_BEGIN!r}, {_END!r}")
    return f"{before}{begin}{table((CHART / 'values.yaml').read_text(encoding='utf-8'))}{end}{after}"


def render(helm: str, given: dict[str, Any], *arguments: str) -> str:
    """What ``helm template`` makes of the chart. Raises :class:`ValueError` with what helm says."""
    # A helm that is built from its module takes itself for one of an old version of Kubernetes.
    version = () if "--kube-version" in arguments else ("--kube-version", KUBERNETES)
    done = subprocess.run(
        [helm, "template", "paceline", str(CHART), "--namespace", NAMESPACE, "--values", "-", *version, *arguments],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout


def manifest(helm: str, name: str) -> str:
    """A plain manifest. What only Helm needs is left out."""
    body = render(helm, MANIFESTS[name])
    body = re.sub(r"^# Source: .*\n", "", body, flags=re.MULTILINE)
    body = re.sub(r"^ *(?:helm\.sh/chart|app\.kubernetes\.io/managed-by): .*\n", "", body, flags=re.MULTILINE)
    head = (
        f"# {_HEADS[name]} Made from deploy/helm/paceline by `make charts`: change that, not this file.\n"
        f"#\n#     kubectl create namespace {NAMESPACE}\n#     kubectl apply -f {name}\n#\n"
        "# The image is that of deploy/docker/Dockerfile, from your own registry. Without `identities` in the\n"
        "# configuration everybody whom the NetworkPolicy lets in may use and administer the service.\n"
    )
    return head + body


def main() -> int:
    """Write, or compare; the exit code."""
    parser = argparse.ArgumentParser(description="Write what is made from the chart.")
    parser.add_argument("--helm", help="the helm to render with; without it the manifests are left alone")
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs")
    arguments = parser.parse_args()
    made = {README: readme()}
    if arguments.helm:
        made |= {PLAIN / name: manifest(arguments.helm, name) for name in MANIFESTS}
    differ = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in differ:
        if arguments.check:
            sys.stderr.write(f"error: {path} is not up to date; run: make charts\n")
        else:
            path.write_text(made[path], encoding="utf-8")
    return 1 if arguments.check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
