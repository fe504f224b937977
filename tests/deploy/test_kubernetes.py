"""The plain manifests: valid for several versions of Kubernetes, safe, and in step with the code's defaults."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from paceline import __version__
from paceline.config import Config
from tests.deploy.tooling import ROOT, VERSIONS, validate

FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
Objects = list[dict[str, Any]]


def read(name: str) -> Objects:
    return list(yaml.load_all((FOLDER / name).read_text(encoding="utf-8"), yaml.CSafeLoader))


def kind(objects: Objects, name: str) -> dict[str, Any]:
    return next(each for each in objects if each["kind"] == name)


def test_what_there_is() -> None:
    assert FILES == ["paceline.yaml", "single.yaml"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES)
def test_is_valid(file: str, version: str) -> None:
    for manifest in read(file):
        validate(manifest, version)


def test_the_validator_notices() -> None:
    service = kind(read("single.yaml"), "Service")
    wrong = {**service, "spec": {**service["spec"], "ports": [{"prot": 1}]}}
    with pytest.raises(jsonschema.ValidationError):
        validate(wrong, VERSIONS[-1])


@pytest.mark.parametrize("file", FILES)
def test_is_in_step_with_the_code(file: str) -> None:
    (container,) = kind(read(file), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"].endswith(f":{__version__}")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["grpc"] == int(Config().listen.rpartition(":")[2])
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert f"EXPOSE {ports['grpc']} {ports['metrics']}\n" in dockerfile


def test_nothing_of_helm_is_left() -> None:
    for file in FILES:
        for each in read(file):
            labels = each["metadata"]["labels"]
            assert not [name for name in labels if "helm" in name or name.endswith("managed-by")]
