"""The chart as Helm renders it, for tests: with values of several kinds."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "headrace"
TOOLS = ROOT / "build" / "helm"
ROLES = ("router", "prefill", "decode")
NAMESPACE = "ml"

needs_helm = pytest.mark.skipif(
    not (TOOLS / ".installed").exists(), reason="there is no Helm here; `make helm-tools` brings it"
)

EVERYTHING = {
    "image": {"registry": "registry.example.com/x", "tag": "1", "pullSecrets": [{"name": "pull"}]},
    "model": {"path": "/models/some", "volume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}},
    "router": {
        "replicas": 2,
        "options": {"max-prompt-bytes": 4194304, "slo-ttft-ms": 0.5, "drain-s": 12.5},
        "tlsSecret": "tls",
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "nodeSelector": {"a": "b"},
        "affinity": {"podAntiAffinity": {}},
    },
    "prefill": {"devices": {"rdma/hca": 1}, "tolerations": [{"operator": "Exists"}]},
    "decode": {"replicas": 0, "options": {"role": "both"}, "accelerator": "amd.com/gpu", "runtimeClassName": "rocm"},
    "apiKeys": {"secretName": "keys"},
    "networkPolicy": {"clients": [{"podSelector": {}}], "extraEgress": [{"to": [{"podSelector": {}}]}]},
}
COLLECTOR = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "observability"}}}
SECURE = {
    "tls": {"enabled": True, "secrets": {role: f"headrace-{role}-tls" for role in ROLES}},
    "apiKeys": {"secretName": "headrace-keys"},
    "tracing": {"sampleShare": 0, "endpoint": "http://collector.observability.svc:4317"},
    "networkPolicy": {"collector": [COLLECTOR]},
}
RANKS = {
    "prefill": {"group": {"pods": 1, "ranksPerPod": 2}, "resources": {"limits": {"cpu": "5"}}},
    "decode": {
        "replicas": 3,
        "group": {"pods": 2, "ranksPerPod": 1},
        "options": {"experts": "ep", "rank-start-timeout-s": 300},
        "accelerator": "nvidia.com/gpu",
        "autoscaling": {"enabled": True},
    },
    "monitoring": {"prometheusAddress": "http://prometheus:9090"},
}
CASES = {
    "defaults": {},
    "everything": EVERYTHING,
    "secure": SECURE,
    "open": {"networkPolicy": {"enabled": False}, "decode": {"options": {"drain-s": 0}}},
    "ranks": RANKS,
    "gpu": yaml.safe_load((CHART / "values-gpu.yaml").read_text()),
}
every_case = pytest.mark.parametrize("case", CASES)


class HelmError(Exception):
    """Helm refused; the text is what it said."""


def helm(command, values=None, chart=CHART):
    """Return what a command of Helm's on the chart says; `values`, if given, win over the chart's."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values, file)
        file.flush()
        line = [str(TOOLS / "bin" / "helm"), *command, str(chart)]
        line += ["--values", file.name] if values is not None else []
        result = subprocess.run(line, capture_output=True, text=True, check=False)
    if result.returncode:
        raise HelmError(result.stdout + result.stderr)
    return result.stdout


@functools.cache
def _rendered(case):
    return helm(["template", "headrace", "--namespace", NAMESPACE], CASES[case])


def rendered(case):
    """Return the objects that the chart makes of a case's values."""
    return [found for found in yaml.safe_load_all(_rendered(case)) if found]


def named(objects, kind, name=""):
    """Return the one object of a kind, and of a name after the release's."""
    full = "-".join(filter(None, ("headrace", name)))
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == full]
    return found


def workloads(objects):
    """Return role and object of what has pods; of groups of pods as if all were their leaders."""
    kinds = ("Deployment", "StatefulSet", "LeaderWorkerSet")
    found = {each["metadata"]["name"]: each for each in objects if each["kind"] in kinds}
    return {role: _leaders(found[f"headrace-{role}"]) for role in ROLES}


def _leaders(workload):
    if workload["kind"] != "LeaderWorkerSet":
        return workload
    template = workload["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    # The service of a LeaderWorkerSet's name is that of its pods, whoever made it.
    told = {
        "template": template,
        "serviceName": workload["metadata"]["name"],
        "selector": {"matchLabels": template["metadata"]["labels"]},
    }
    return {**workload, "spec": {**workload["spec"], **told}}


def follower(objects, role):
    """Return, as `workloads` does, the pods that follow the leader of their group."""
    workload = named(objects, "LeaderWorkerSet", role)
    return {**workload, "spec": {"template": workload["spec"]["leaderWorkerTemplate"]["workerTemplate"]}}


def split_arguments(given):
    """Return a container's arguments for torchrun, none if it starts no ranks, and those for the process."""
    arguments = given["args"]
    end = arguments.index("--module") + 2 if "--module" in arguments else 0
    return arguments[:end], arguments[end:]


def container(workload):
    """Return the only container of a Deployment or StatefulSet."""
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    return found


def problems(objects, version):
    """Return what Kubernetes' schemas say against objects, a line each."""
    program = Path(__file__).with_name("helm_validate.py")
    env = os.environ | {"PYTHONPATH": str(TOOLS / "python")}
    result = subprocess.run(
        [sys.executable, str(program), version],
        input=json.dumps(objects), env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
