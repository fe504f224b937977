"""Helm, and schemas to validate with. A tool that is missing skips a test here, and fails it in CI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import kubernetes_validate
import pytest
import referencing
import yaml

ROOT = Path(__file__).resolve().parents[2]
HELM = ROOT / "build" / "deploy" / "helm"
_SCHEMAS = Path(__file__).parent / "tools" / "schemas.json"

VERSIONS: tuple[str, ...] = tuple(
    sorted(
        {str(version).rpartition(".")[0] for version in kubernetes_validate.utils.all_versions()},
        key=lambda version: int(version.partition(".")[2]),
    )[-6:]
)
"""Minor versions of Kubernetes, the oldest first. The bundled schemas reach further back."""


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}: CI needs it")
    pytest.skip(what)


@lru_cache
def helm() -> str:
    """The path of the pinned Helm, built by ``make deploy-tools``."""
    if not HELM.exists():
        missing("helm is not built; run: make deploy-tools (needs Go)")
    return str(HELM)


@lru_cache
def module_file(kind: str) -> Any:
    """What is in the file that ``schemas.json`` names for a kind; fetched once, and checked against its hash."""
    if shutil.which("go") is None:
        missing("the schemas of other people's resources come as Go modules; go is not installed")
    for module in json.loads(_SCHEMAS.read_text(encoding="utf-8")):
        files = {**module.get("crds", {}), **module.get("schemas", {})}
        if kind in files:
            name = f"{module['module']}@{module['version']}"
            done = subprocess.run(
                ["go", "mod", "download", "-json", name],
                cwd="/",
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            found = json.loads(done.stdout)
            assert found["Sum"] == module["sum"], f"{name} has other contents than those that were pinned"
            return yaml.load((Path(found["Dir"]) / files[kind]).read_text(encoding="utf-8"), yaml.CSafeLoader)
    raise LookupError(f"{kind}: no schema; add one to {_SCHEMAS}")


@lru_cache
def _definitions(version: str) -> referencing.Registry[Any]:
    contents = kubernetes_validate.utils.schema_contents(f"{_folder(version)}/_definitions.json", version)
    return referencing.Resource.from_contents(contents) @ referencing.Registry()


def _folder(version: str) -> str:
    return f"kubernetes-json-schema/v{version}.0-local-strict"


@lru_cache
def _validator(version: str, api_version: str, kind: str) -> jsonschema.protocols.Validator:
    group, slash, number = api_version.rpartition("/")
    if group in ("monitoring.coreos.com", "cert-manager.io"):
        return jsonschema.Draft202012Validator(_strict(_of_crd(kind, number)))
    name = f"{kind.lower()}-{group.partition('.')[0]}{'-' if slash else ''}{number}.json"
    schema = kubernetes_validate.utils.schema_contents(f"{_folder(version)}/{name}", version)
    registry = referencing.Resource.from_contents(schema) @ _definitions(version)
    return jsonschema.Draft202012Validator(schema, registry=registry)


def _of_crd(kind: str, version: str) -> dict[str, Any]:
    (found,) = [each for each in module_file(kind)["spec"]["versions"] if each["name"] == version]
    schema: dict[str, Any] = found["schema"]["openAPIV3Schema"]
    # The server knows what is in there; a CRD says no more than "object".
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {name: {} for name in ("name", "namespace", "labels", "annotations")},
    }
    return schema


def _strict(schema: Any) -> Any:
    """The same, but what is not named is refused, as the server prunes it."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _strict(value) for name, value in schema.items()}
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    return made


def validate(manifest: dict[str, Any], version: str) -> None:
    """Raises :class:`jsonschema.ValidationError` if that version of Kubernetes refuses the object."""
    _validator(version, manifest["apiVersion"], manifest["kind"]).validate(manifest)
