"""The Helm chart: what it renders for a matrix of values, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.helm.document import CHART, MANIFESTS, PLAIN, README, manifest, readme, render, values
from paceline import __version__
from paceline.config import Config, load_config
from paceline.frontend import server
from paceline.telemetry.definitions import METRICS, HistogramMetric
from tests.deploy.matrix import MATRIX, REFUSED
from tests.deploy.tooling import ROOT, VERSIONS, helm, validate

Objects = list[dict[str, Any]]
CASES = pytest.mark.parametrize("case", MATRIX)
RESERVE_S = 5
"""What a server may take beyond its drain: last answers, last alerts, the store."""


@lru_cache
def rendered(case: str) -> Objects:
    return load(render(helm(), MATRIX[case]))


def load(text: str) -> Objects:
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def kinds(objects: Objects, name: str) -> Objects:
    return [each for each in objects if each["kind"] == name]


def kind(objects: Objects, name: str) -> dict[str, Any]:
    (found,) = kinds(objects, name)
    return found


def pod_of(objects: Objects) -> dict[str, Any]:
    spec: dict[str, Any] = kind(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def container_of(objects: Objects) -> dict[str, Any]:
    (found,) = pod_of(objects)["containers"]
    assert isinstance(found, dict)
    return found


def config_of(objects: Objects) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(kind(objects, "ConfigMap")["data"]["config.yaml"])
    return found


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


# -- as a whole ---------------------------------------------------------------------------------------------------


def test_lint(tmp_path: Path) -> None:
    for number, given in enumerate(MATRIX.values()):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(given), encoding="utf-8")
        done = subprocess.run(
            [helm(), "lint", "--strict", "--quiet", "--kube-version", VERSIONS[-1], "--values", str(file), str(CHART)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@CASES
def test_is_valid_in_every_version(case: str) -> None:
    for version in VERSIONS:
        for each in rendered(case):
            validate(each, version)


@pytest.mark.parametrize("version", [VERSIONS[0]])
def test_all_versions_get_the_same(version: str) -> None:
    assert load(render(helm(), {}, "--kube-version", version)) == rendered("default")


def test_older_versions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kubeVersion: >=1\.30"):
        render(helm(), {}, "--kube-version", "1.29")


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str) -> None:
    given, named = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(named)):
        render(helm(), given)


@pytest.mark.parametrize("name", MANIFESTS)
def test_plain_manifests_are_up_to_date(name: str) -> None:
    assert (PLAIN / name).read_text(encoding="utf-8") == manifest(helm(), name), "run: make charts"


def test_readme_is_up_to_date() -> None:
    assert README.read_text(encoding="utf-8") == readme(), "run: make charts"


def leaves(data: dict[str, Any], schema: dict[str, Any], path: str = "") -> set[str]:
    """The paths of what is documented at the latest: values whose schema names no further ones."""
    found = set()
    for name, value in data.items():
        below = schema["properties"][name]
        if "properties" in below and path + name != "tls.certManager.issuerRef" and name != "resources":
            found |= leaves(value, below, f"{path}{name}.")
        else:
            found.add(path + name)
    return found


def test_every_value_is_documented_and_in_the_schema() -> None:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    # The rest of what stands there is explained above a group.
    assert {value.path for value in values(text)} | {"config"} >= leaves(yaml.safe_load(text), schema)


def test_version_is_the_code_s() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == __version__


# -- rights and secrets -------------------------------------------------------------------------------------------


@CASES
def test_pods_have_few_rights(case: str) -> None:
    for each in (*kinds(rendered(case), "Deployment"), *kinds(rendered(case), "StatefulSet")):
        pod = each["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    for account in kinds(rendered(case), "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not [each for each in rendered(case) if "Role" in each["kind"]]


@CASES
def test_secrets_are_named_and_never_made(case: str) -> None:
    assert not kinds(rendered(case), "Secret")
    for variable in container_of(rendered(case))["env"]:
        if variable["name"].endswith(("TOKEN", "SECRET", "URL")):
            assert variable["valueFrom"].keys() == {"secretKeyRef"}


@CASES
def test_runs_as_the_image_does(case: str) -> None:
    context = pod_of(rendered(case))["securityContext"]
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in dockerfile


# -- the configuration --------------------------------------------------------------------------------------------


@CASES
def test_the_configuration_passes_the_server_s_own_check(case: str, tmp_path: Path) -> None:
    if "tls" in config_of(rendered(case)) and "tls" not in Config.model_fields:
        pytest.skip("this server has no TLS")
    file = tmp_path / "config.yaml"
    file.write_text(kind(rendered(case), "ConfigMap")["data"]["config.yaml"], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "paceline", "config", "check", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def image_environment() -> dict[str, str]:
    text = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    return dict(re.findall(r"(PACELINE_\w+)=(\S+)", text))


@CASES
def test_the_file_decides_and_not_the_image(case: str, tmp_path: Path) -> None:
    """With the environment of the image and of the pod, the server gets the store and the ports that are meant."""
    objects = rendered(case)
    data = config_of(objects)
    data.pop("tls", None)
    if "store_file" in data:
        (mount,) = [each for each in container_of(objects)["volumeMounts"] if each["name"] == "store"]
        assert Path(data["store_file"]).parent == Path(mount["mountPath"])
        assert image_environment()["PACELINE_STORE"]
        data["store_file"] = str(tmp_path / "url")
        (tmp_path / "url").write_text("rediss://user:password@redis.example.com:6380/0\n", encoding="utf-8")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    pod = {each["name"]: each.get("value", "10.0.0.1") for each in container_of(objects)["env"]}
    config = load_config(file, image_environment() | pod)
    ports = {each["name"]: each["containerPort"] for each in container_of(objects)["ports"]}
    assert config.listen == f"0.0.0.0:{ports['grpc']}"
    assert config.metrics_listen == f"0.0.0.0:{ports['metrics']}"
    match MATRIX[case].get("store", {}).get("kind", "trial"):
        case "embedded":
            assert config.store.startswith("embedded:/var/lib/paceline/")
        case "external":
            assert config.store.startswith("rediss://user")
        case _:
            (redis,) = [each for each in kinds(objects, "Service") if each["metadata"]["name"].endswith("-redis")]
            assert config.store == f"redis://{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}/0"
    if "peers" in ports:
        assert config.peer_listen == f"0.0.0.0:{ports['peers']}"
        assert config.peer_advertise == "10.0.0.1"


@CASES
def test_what_is_configured_is_in_the_file_as_it_was(case: str) -> None:
    given = MATRIX[case].get("config", {})
    found = config_of(rendered(case))
    assert {name: found[name] for name in given if name != "limits"} == {
        name: value for name, value in given.items() if name != "limits"
    }
    assert found["limits"].items() >= given.get("limits", {}).items()
    assert "accounts" in given or "accounts" not in found


def test_a_changed_configuration_is_rolled_out() -> None:
    def checksum(objects: Objects) -> str:
        return str(kind(objects, "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    assert checksum(rendered("default")) != checksum(rendered("secrets"))
    assert checksum(rendered("default")) == checksum(rendered("trial without a volume"))


# -- how it starts and ends ---------------------------------------------------------------------------------------


@CASES
def test_a_stop_takes_longer_than_the_longest_wait(case: str) -> None:
    limits = config_of(rendered(case))["limits"]
    container = container_of(rendered(case))
    pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    drain = seconds(limits["drain_timeout"])
    assert drain >= seconds(limits["max_wait"]) + 10
    assert pod_of(rendered(case))["terminationGracePeriodSeconds"] >= pause + drain + RESERVE_S
    deadline = kind(rendered(case), "Deployment")["spec"]["progressDeadlineSeconds"]
    assert deadline > pod_of(rendered(case))["terminationGracePeriodSeconds"] + 120


@CASES
def test_a_rollout_never_has_fewer_servers(case: str) -> None:
    spec = kind(rendered(case), "Deployment")["spec"]
    if MATRIX[case].get("store", {}).get("kind") == "embedded":
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
        assert not kinds(rendered(case), "PodDisruptionBudget")
        claim = kind(rendered(case), "PersistentVolumeClaim")["metadata"]["name"]
        volumes = [each.get("persistentVolumeClaim") for each in pod_of(rendered(case))["volumes"]]
        assert {"claimName": claim} in volumes
        return
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert kind(rendered(case), "PodDisruptionBudget")["spec"]["selector"] == spec["selector"]


@CASES
def test_probes_ask_what_the_server_offers(case: str) -> None:
    container = container_of(rendered(case))
    probes = [container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    if "tls" in MATRIX[case]:
        start, live, ready = probes
        assert start["tcpSocket"] == {"port": "grpc"}
        assert live["httpGet"] == {"port": "metrics", "path": "/metrics"}
        assert ready["exec"]["command"][:2] == ["paceline", "health"]
        return
    names = [probe["grpc"].get("service", "") for probe in probes]
    assert names == [server.CONFIG_HEALTH, server.CONFIG_HEALTH, ""]
    assert {probe["grpc"]["port"] for probe in probes} == {ports["grpc"]}
    # As long as the server itself waits for a store that is away.
    assert probes[0]["periodSeconds"] * probes[0]["failureThreshold"] > 2 * server._STORE_SECONDS


@CASES
def test_servers_keep_apart(case: str) -> None:
    if MATRIX[case].get("store", {}).get("kind") == "embedded":
        return
    pod, selector = pod_of(rendered(case)), kind(rendered(case), "Deployment")["spec"]["selector"]
    required = MATRIX[case].get("spread", {}).get("required", False)
    spread = pod["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    for each in spread:
        assert each["labelSelector"] == selector
        assert each["whenUnsatisfiable"] == ("DoNotSchedule" if required else "ScheduleAnyway")
    (term,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["labelSelector"] == selector


# -- what finds what ----------------------------------------------------------------------------------------------


@CASES
def test_selectors_find_the_pods(case: str) -> None:
    objects = rendered(case)
    deployment = kind(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    pods = [labels] + [each["spec"]["template"]["metadata"]["labels"] for each in kinds(objects, "StatefulSet")]
    chosen = [each["spec"]["selector"] for each in kinds(objects, "Service")]
    chosen += [each["spec"]["podSelector"]["matchLabels"] for each in kinds(objects, "NetworkPolicy")]
    for selector in chosen:
        assert len([each for each in pods if selector.items() <= each.items()]) == 1
    names = {volume["configMap"]["name"] for volume in pod_of(objects)["volumes"] if "configMap" in volume}
    assert names == {kind(objects, "ConfigMap")["metadata"]["name"]}
    accounts = {each["metadata"]["name"] for each in kinds(objects, "ServiceAccount")} or {"somebody"}
    assert pod_of(objects)["serviceAccountName"] in accounts


@CASES
def test_mounts_have_their_volumes(case: str) -> None:
    volumes = {each["name"] for each in pod_of(rendered(case))["volumes"]}
    assert {each["name"] for each in container_of(rendered(case))["volumeMounts"]} == volumes


@CASES
def test_a_name_resolves_to_every_server(case: str) -> None:
    (headless,) = [each for each in kinds(rendered(case), "Service") if each["metadata"]["name"].endswith("-headless")]
    assert headless["spec"]["clusterIP"] == "None"
    # Servers that drain are left out.
    assert not headless["spec"].get("publishNotReadyAddresses")
    port = headless["spec"]["ports"][0]
    assert (port["name"], port["targetPort"]) == ("grpc", "grpc")
    assert port["port"] == MATRIX[case].get("service", {}).get("port", 7133)


def test_only_servers_reach_servers_and_their_store() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in kinds(rendered("default"), "NetworkPolicy")}
    selector = kind(rendered("default"), "Deployment")["spec"]["selector"]
    assert policies.keys() == {"paceline", "paceline-redis"}
    for name, port in (("paceline", "peers"), ("paceline-redis", "redis")):
        (rule,) = [each for each in policies[name]["ingress"] if each["ports"] == [{"port": port}]]
        assert rule["from"] == [{"podSelector": selector}]
        assert set(policies[name]["policyTypes"]) == {"Ingress", "Egress"}
    redis = kind(rendered("default"), "StatefulSet")["spec"]["selector"]
    assert policies["paceline"]["podSelector"] == selector
    assert policies["paceline-redis"]["podSelector"] == redis
    assert policies["paceline-redis"]["egress"] == []
    assert {"to": [{"podSelector": redis}], "ports": [{"port": 6379}]} in policies["paceline"]["egress"]
    callers = [
        each["from"]
        for policy in kinds(rendered("secrets"), "NetworkPolicy")
        for each in policy["spec"]["ingress"]
        if each["ports"] == [{"port": "grpc"}]
    ]
    assert callers == [MATRIX["secrets"]["networkPolicy"]["callers"]]


def test_the_autoscaler_alone_decides() -> None:
    assert "replicas" not in kind(rendered("autoscaled"), "Deployment")["spec"]
    spec = kind(rendered("autoscaled"), "HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"]["name"] == kind(rendered("autoscaled"), "Deployment")["metadata"]["name"]
    down = spec["behavior"]["scaleDown"]["policies"]
    grace = pod_of(rendered("autoscaled"))["terminationGracePeriodSeconds"]
    assert down == [{"type": "Pods", "value": 1, "periodSeconds": grace}]
    assert container_of(rendered("autoscaled"))["resources"]["requests"]["cpu"]


def test_the_monitor_finds_the_metrics_once() -> None:
    monitor = kind(rendered("monitored"), "ServiceMonitor")
    found = [
        each
        for each in kinds(rendered("monitored"), "Service")
        if monitor["spec"]["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
    ]
    (service,) = found
    (endpoint,) = monitor["spec"]["endpoints"]
    assert [port["port"] for port in service["spec"]["ports"] if port["name"] == endpoint["port"]] == [9000]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_the_rules_use_metrics_that_there_are() -> None:
    known = set()
    for metric in METRICS:
        ends = ("_bucket", "_count", "_sum") if isinstance(metric, HistogramMetric) else ("",)
        known |= {metric.exported + end for end in ends}
    (group,) = kind(rendered("monitored"), "PrometheusRule")["spec"]["groups"]
    for rule in group["rules"]:
        used = set(re.findall(r"\bpaceline_\w+", rule["expr"]))
        assert used
        assert used <= known, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_certificate_is_good_for_all_names() -> None:
    objects = rendered("cert-manager")
    certificate = kind(objects, "Certificate")["spec"]
    (volume,) = [each for each in pod_of(objects)["volumes"] if each["name"] == "tls"]
    assert volume["secret"]["secretName"] == certificate["secretName"]
    services = [
        each["metadata"]["name"] for each in kinds(objects, "Service") if "redis" not in each["metadata"]["name"]
    ]
    # The readiness probe asks for localhost.
    assert {"localhost", *services, "paceline.example.com"} <= set(certificate["dnsNames"])
    assert certificate["usages"] == ["server auth", "client auth"]
    tls = config_of(objects)["tls"]
    (mount,) = [each for each in container_of(objects)["volumeMounts"] if each["name"] == "tls"]
    for name in ("cert", "key", "client_ca"):
        assert tls[name].startswith(f"{mount['mountPath']}/")
