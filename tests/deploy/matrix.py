"""Values to render the chart with, by what they are about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kubernetes.md"
_EXTERNAL = {"kind": "external", "external": {"secretName": "paceline-store"}}


def _documented() -> dict[str, Any]:
    (block,) = re.findall(r"^```yaml\n# paceline-values.yaml\n(.*?)^```", _DOCUMENT.read_text("utf-8"), re.M | re.S)
    found: dict[str, Any] = yaml.safe_load(block)
    return found


MATRIX: dict[str, dict[str, Any]] = {
    "documentation": _documented(),
    "default": {},
    "embedded": {"store": {"kind": "embedded", "storageClassName": "fast"}},
    "trial without a volume": {"store": {"trial": {"storage": ""}}, "metrics": {"annotations": False}},
    "external": {"store": _EXTERNAL, "replicas": 5, "spread": {"required": True}},
    "autoscaled": {
        "store": _EXTERNAL,
        "autoscaling": {
            "enabled": True,
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": "paceline_session_items_per_second"},
                        "target": {"type": "AverageValue", "averageValue": "2k"},
                    },
                }
            ],
        },
    },
    "monitored": {
        "metrics": {
            "port": 9000,
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True},
        },
        "service": {"port": 443, "clusterIP": False, "annotations": {"example.com/a": "b"}},
    },
    "tls": {"tls": {"enabled": True, "secretName": "paceline-certificate"}},
    "cert-manager": {
        "tls": {
            "enabled": True,
            "clientAuth": True,
            "certManager": {"enabled": True, "issuerRef": {"name": "internal"}, "dnsNames": ["paceline.example.com"]},
        },
    },
    "secrets": {
        "config": {
            "identities": [
                {"name": "chat", "token_env": "CHAT_TOKEN", "tenants": ["chat"]},
                {"name": "jobs", "token_file": "/run/secrets/paceline/jobs/token", "tenants": ["jobs"]},
            ],
            "alerts": {"webhook": {"url_env": "HOOK_URL", "secret_env": "HOOK_SECRET"}},
        },
        "secretEnv": [
            {"name": "CHAT_TOKEN", "secretName": "paceline-tokens", "key": "chat"},
            {"name": "HOOK_URL", "secretName": "paceline-hook", "key": "url"},
            {"name": "HOOK_SECRET", "secretName": "paceline-hook", "key": "secret"},
        ],
        "secretFiles": [{"name": "jobs", "secretName": "paceline-jobs"}],
        "networkPolicy": {
            "callers": [{"namespaceSelector": {"matchLabels": {"paceline": "caller"}}}],
            "scrapers": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "egress": [{"ports": [{"port": 443}]}],
        },
    },
    "all else": {
        "fullnameOverride": "limits",
        "image": {
            "repository": "registry.example.com/paceline",
            "digest": f"sha256:{'0' * 64}",
            "pullPolicy": "Always",
        },
        "imagePullSecrets": ["registry"],
        "config": {
            "accounts": {"main": {"provider": "anthropic", "pools": {"sonnet-5": {"input_tokens": 4_000_000}}}},
            "limits": {"max_queue": 20_000},
        },
        "logging": {"level": "debug"},
        "drain": {"longestWaitSeconds": 540, "handOverSeconds": 60, "endpointsSeconds": 0},
        "podDisruptionBudget": {"maxUnavailable": "25%"},
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False, "name": "somebody"},
        "podLabels": {"team": "platform"},
        "podAnnotations": {"example.com/a": "b"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
        "priorityClassName": "system-cluster-critical",
    },
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown value": ({"replica": 3}, "replica"),
    "wrong type": ({"replicas": "three"}, "replicas"),
    "unknown store": ({"store": {"kind": "redis"}}, "kind"),
    "external without its secret": ({"store": {"kind": "external"}}, "store.external.secretName"),
    "a file and an autoscaler": (
        {"store": {"kind": "embedded"}, "autoscaling": {"enabled": True}},
        "autoscaling.enabled",
    ),
    "TLS without its secret": ({"tls": {"enabled": True}}, "tls.secretName"),
    "a Certificate without TLS": ({"tls": {"certManager": {"enabled": True}}}, "tls.enabled"),
    "a Certificate without an issuer": (
        {"tls": {"enabled": True, "certManager": {"enabled": True}}},
        "tls.certManager.issuerRef.name",
    ),
    "what the chart decides": ({"config": {"store": "redis://:password@redis/0"}}, "config.store"),
    "times of the drain": ({"config": {"limits": {"drain_timeout": "5s"}}}, "config.limits.drain_timeout"),
    "a drain that is longer than the server allows": ({"drain": {"longestWaitSeconds": 600}}, "longestWaitSeconds"),
    "half a secret": ({"secretEnv": [{"name": "TOKEN", "secretName": "tokens"}]}, "key"),
}
"""Values that the chart does not take, with what its message names."""
