"""A server as a pod runs it: with the rendered configuration and environment, asked by the probes, and told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2

from deploy.helm.document import render
from tests.deploy.tooling import helm
from tests.ports import free_ports

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def ask(channel: grpc.Channel, probe: dict[str, Any]) -> int:
    """What the kubelet asks, and for as long as it waits."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    request = health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", ""))
    return check(request, timeout=probe["timeoutSeconds"]).status


def watch(channel: grpc.Channel) -> Iterator[health_pb2.HealthCheckResponse]:
    """The health of the server as a whole, now and whenever it changes."""
    told: Iterator[health_pb2.HealthCheckResponse] = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )(health_pb2.HealthCheckRequest(), timeout=30)
    return told


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
def test_starts_answers_the_probes_and_stops_in_time(tmp_path: Path) -> None:
    objects = {
        each["kind"]: each
        for each in yaml.safe_load_all(render(helm(), {"store": {"kind": "embedded"}}))
        if each is not None
    }
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    listen, metrics = free_ports(2)
    # What a container has for itself, this machine has not: addresses, and the folder of the books.
    text = objects["ConfigMap"]["data"]["config.yaml"].replace("/var/lib/paceline", str(tmp_path))
    text = text.replace("0.0.0.0:7133", f"127.0.0.1:{listen}").replace("0.0.0.0:9464", f"127.0.0.1:{metrics}")
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    arguments = [each.replace("/etc/paceline/config.yaml", str(file)) for each in container["args"]]
    environ = os.environ | {each["name"]: each["value"] for each in container["env"]}
    process = subprocess.Popen(
        [sys.executable, "-m", "paceline", *arguments],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with grpc.insecure_channel(f"127.0.0.1:{listen}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert ask(channel, container[name]) == SERVING, name
            told = watch(channel)
            assert next(told).status == SERVING
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            # The endpoints lose it while it drains, and it still lives for the kubelet.
            assert next(told).status == NOT_SERVING
        assert process.wait(pod["terminationGracePeriodSeconds"]) == 0
        # Nobody had anything to finish.
        assert time.monotonic() - begun < 20
    finally:
        process.kill()
        process.wait(5)
    assert (tmp_path / "paceline.db").exists()
