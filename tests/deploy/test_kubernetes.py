"""The plain manifest: valid for several versions of Kubernetes, safe, and in step with the code's defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from paceline import __version__
from paceline.config import Config, load_config

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "kubernetes" / "paceline.yaml").read_text(encoding="utf-8")
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all(TEXT))
# The bundled schemas reach further back, but nobody runs those any more.
VERSIONS = sorted(
    {str(version).rpartition(".")[0] for version in kubernetes_validate.utils.all_versions()},
    key=lambda version: int(version.partition(".")[2]),
)[-6:]


def kind(name: str) -> dict[str, Any]:
    (found,) = [each for each in OBJECTS if each["kind"] == name]
    return found


POD: dict[str, Any] = kind("Deployment")["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]
ARGUMENTS = dict(argument.removeprefix("--").split("=", 1) for argument in CONTAINER["args"][1:])


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda manifest: str(manifest["kind"]))
def test_is_valid(manifest: dict[str, Any], version: str) -> None:
    assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_the_validator_notices() -> None:
    wrong = {**kind("Service"), "spec": {**kind("Service")["spec"], "ports": [{"prot": 1}]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_one_pod_at_a_time_owns_the_file() -> None:
    spec = kind("Deployment")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}
    path = ARGUMENTS["store"].removeprefix("embedded:")
    (mount,) = [each for each in CONTAINER["volumeMounts"] if path.startswith(each["mountPath"] + "/")]
    (volume,) = [each for each in POD["volumes"] if each["name"] == mount["name"]]
    assert volume["persistentVolumeClaim"]["claimName"] == kind("PersistentVolumeClaim")["metadata"]["name"]


def test_ports_agree() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports["grpc"] == port_of(ARGUMENTS["listen"]) == port_of(Config().listen)
    assert ports["metrics"] == port_of(ARGUMENTS["metrics-listen"])
    for port in kind("Service")["spec"]["ports"]:
        assert port["port"] == ports[port["targetPort"]]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert CONTAINER[name]["grpc"]["port"] == ports["grpc"]
    annotations = kind("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert int(annotations["prometheus.io/port"]) == ports["metrics"]


def test_names_agree() -> None:
    labels = kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert kind("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert kind("Service")["spec"]["selector"] == labels
    assert kind("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    names = {volume["configMap"]["name"] for volume in POD["volumes"] if "configMap" in volume}
    assert names == {kind("ConfigMap")["metadata"]["name"]}
    assert CONTAINER["image"].endswith(f":{__version__}")


def test_runs_with_few_rights() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["automountServiceAccountToken"] is False
    rights = CONTAINER["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert f"USER {POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}" in dockerfile


def test_arguments_and_configuration_are_accepted(tmp_path: Path) -> None:
    (name,) = kind("ConfigMap")["data"]
    (mount,) = [each for each in CONTAINER["volumeMounts"] if ARGUMENTS["config"] == f"{each['mountPath']}/{name}"]
    assert mount["readOnly"] is True
    file = tmp_path / name
    file.write_text(kind("ConfigMap")["data"][name], encoding="utf-8")
    environ = {
        f"PACELINE_{option.replace('-', '_').upper()}": value
        for option, value in ARGUMENTS.items()
        if option != "config"
    }
    config = load_config(file, environ)
    assert config.store == ARGUMENTS["store"]
    assert config.limits.drain_timeout_us / 1e6 + 5 < POD["terminationGracePeriodSeconds"]


def test_options_exist() -> None:
    assert CONTAINER["args"][0] == "serve"
    options = set(re.findall(r'"(\w+)": \w+,', (ROOT / "server/paceline/cli/serve.py").read_text(encoding="utf-8")))
    assert {option.replace("-", "_") for option in ARGUMENTS} <= options | {"config"}
