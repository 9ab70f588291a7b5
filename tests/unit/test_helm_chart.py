"""The chart: Helm takes it, Kubernetes would, and what it starts is what the processes and the documents say."""

import copy
import itertools
import json
import re

import pytest
import yaml
from headrace_core import process
from headrace_core.command_line import parse
from headrace_core.config import DecodeSettings, PrefillSettings, RouterSettings

from tests.unit.helm_parts import (
    CASES,
    CHART,
    NAMESPACE,
    ROLES,
    ROOT,
    HelmError,
    container,
    every_case,
    helm,
    named,
    needs_helm,
    problems,
    rendered,
    split_arguments,
    workloads,
)

pytestmark = needs_helm

SETTINGS = {"router": RouterSettings, "prefill": PrefillSettings, "decode": DecodeSettings}


def settings(role, workload):
    """Return what a process reads from a container's arguments."""
    arguments = [argument.replace("$(POD_IP)", "10.0.0.1") for argument in split_arguments(container(workload))[1]]
    return parse(SETTINGS[role], arguments)


def port(address):
    return int(address.rpartition(":")[2])


@every_case
def test_helm_finds_no_fault(case):
    assert "1 chart(s) linted, 0 chart(s) failed" in helm(["lint", "--strict"], CASES[case])


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@every_case
def test_kubernetes_would_take_every_object(case, version):
    assert problems(rendered(case), version) == []


def test_faults_in_objects_are_found():
    faults = [
        ("StatefulSet", "decode", ("spec", "replicas"), "two"),
        ("StatefulSet", "prefill", ("spec", "template", "spec", "containers", 0, "livenessProbe", "grpc"), {"prot": 1}),
        ("NetworkPolicy", "decode", ("spec", "ingress", 0, "fromm"), []),
        ("ServiceMonitor", "", ("spec", "endpoints", 0, "intervall"), "1s"),
        ("PrometheusRule", "", ("spec", "groups", 0, "rules", 0, "expr"), None),
        ("ScaledObject", "decode", ("spec", "triggers", 0, "metricType"), 3),
    ]
    broken = []
    for kind, name, path, value in faults:
        place = copy.deepcopy(named(rendered("gpu"), kind, name))
        broken.append(place)
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
    found = problems(broken, "1.37")
    assert [line.partition(" ")[0] for line in found] == [kind for kind, *_ in faults]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "additional properties 'modle' not allowed"),
        ({"decode": {"replicas": -1}}, "at '/decode/replicas': minimum: got -1, want 0"),
        (
            {"decode": {"options": {"kv-pool-mib": "1GiB"}}},
            "at '/decode/options/kv-pool-mib': got string, want integer",
        ),
        ({"decode": {"options": {"kv_pool_mib": 1}}}, "additional properties 'kv_pool_mib' not allowed"),
        ({"prefill": {"options": {"role": "both"}}}, "additional properties 'role' not allowed"),
        ({"router": {"options": {"keys-file": "keys.toml"}}}, "additional properties 'keys-file' not allowed"),
        ({"decode": {"options": {"device": "tpu"}}}, "at '/decode/options/device'"),
        ({"decode": {"accelerator": "gpu"}}, "at '/decode/accelerator'"),
        ({"model": {"path": "models"}}, "at '/model/path'"),
        ({"networkPolicy": {"prometheus": []}}, "at '/networkPolicy/prometheus': minItems: got 0, want 1"),
        ({"decode": {"autoscaling": {"enabled": True}}}, "monitoring.prometheusAddress: autoscaling asks a Prometheus"),
    ],
)
def test_a_value_that_can_not_be_is_refused_by_its_name(values, message):
    with pytest.raises(HelmError) as refused:
        helm(["template", "headrace"], values)
    assert message in str(refused.value)


@every_case
def test_processes_understand_their_arguments_and_listen_where_kubernetes_asks(case):
    objects = rendered(case)
    for role, workload in workloads(objects).items():
        read, given = settings(role, workload), container(workload)
        ports = {each["name"]: each["containerPort"] for each in given["ports"]}
        assert (port(read.listen), port(read.metrics_listen)) == (ports["grpc"], ports["metrics"])
        if role == "router":
            assert port(read.http_listen) == ports["http"]
        else:
            assert port(read.advertise) == ports["grpc"]
            has_certificate = CASES[case].get("tls", {}).get("enabled", False)
            workers = settings("router", workloads(objects)["router"]).workers
            assert read.peers == ("" if has_certificate else workers)
        wanted = CASES[case].get(role, {}).get("options") or {}
        for name, value in wanted.items():
            assert getattr(read, name.replace("-", "_")) == value, name


@every_case
def test_what_the_environment_sets_is_a_setting(case):
    for role, workload in workloads(rendered(case)).items():
        for name in [each["name"] for each in container(workload)["env"] if each["name"].startswith("HEADRACE_")]:
            prefix = f"HEADRACE_{role.upper()}_"
            assert name.removeprefix(prefix).lower() in SETTINGS[role].model_fields, name


def test_ports_are_those_of_the_settings_and_of_the_documents():
    found = {role: settings(role, each) for role, each in workloads(rendered("defaults")).items()}
    assert port(found["router"].listen) == port(RouterSettings.model_fields["listen"].default)
    told = (ROOT / "docs" / "operations.md").read_text()
    for role, read in found.items():
        assert f"--listen {read.listen} " in re.search(rf"python -m headrace_{role} .*", told)[0]


@every_case
def test_the_router_looks_up_names_that_stand_for_every_worker(case):
    objects = rendered(case)
    found = workloads(objects)
    for entry, role in zip(settings("router", found["router"]).workers.split(","), ("prefill", "decode"), strict=True):
        host, _, number = entry.partition(":")
        service = named(objects, "Service", role)
        assert host == f"{service['metadata']['name']}.{NAMESPACE}.svc"
        assert int(number) == next(each["port"] for each in service["spec"]["ports"] if each["name"] == "grpc")
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"]
        assert service["spec"]["selector"] == found[role]["spec"]["selector"]["matchLabels"]
        assert found[role]["spec"]["serviceName"] == service["metadata"]["name"]


@every_case
def test_a_pod_has_the_time_to_drain(case):
    for role, workload in workloads(rendered(case)).items():
        given = container(workload)
        before_s = given.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain_s = settings(role, workload).drain_s
        enough_s = before_s + drain_s + drain_s + process._STOP_GRACE_S
        assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= enough_s
        live = given["livenessProbe"]
        assert live["periodSeconds"] * live["failureThreshold"] > drain_s


@every_case
def test_no_pod_may_more_than_it_needs(case):
    for workload in workloads(rendered(case)).values():
        pod, given = workload["spec"]["template"]["spec"], container(workload)
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert given["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        has_ranks = bool(split_arguments(given)[0])
        writes = {each["name"] for each in given["volumeMounts"] if not each.get("readOnly")}
        assert writes == ({"tmp", "shm"} if has_ranks else {"tmp"})


def test_devices_and_models_are_asked_for():
    found = workloads(rendered("gpu"))
    for role in ("prefill", "decode"):
        limits = container(found[role])["resources"]["limits"]
        assert limits == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": 1, "rdma/hca_shared_devices_a": 1}
    for workload in found.values():
        (volume,) = [each for each in workload["spec"]["template"]["spec"]["volumes"] if each["name"] == "model"]
        assert volume["persistentVolumeClaim"]["claimName"] == "models"


def admitted(objects, caller, called, number):
    """Return whether policies let pods of a role call pods of another at a port."""
    labels = {role: each["spec"]["template"]["metadata"]["labels"] for role, each in workloads(objects).items()}
    names = {each["containerPort"]: each["name"] for each in container(workloads(objects)[called])["ports"]}

    def lets(rules, side, role, ports):
        return any(
            (
                side not in rule
                or any(
                    peer.get("podSelector", {}).get("matchLabels", {"no": "such"}).items() <= labels[role].items()
                    for peer in rule[side]
                )
            )
            and ("ports" not in rule or any(each["port"] in ports for each in rule["ports"]))
            for rule in rules
        )

    ingress = named(objects, "NetworkPolicy", called)["spec"]["ingress"]
    egress = named(objects, "NetworkPolicy", caller)["spec"]["egress"]
    ports = (number, names.get(number))
    return lets(ingress, "from", caller, ports) and lets(egress, "to", called, ports)


def test_only_those_reach_a_process_who_need_it():
    objects = rendered("defaults")
    grpc = {"router": 50050, "prefill": 50051, "decode": 50052}
    found = {pair for pair in itertools.product(ROLES, ROLES) if admitted(objects, *pair, grpc[pair[1]])}
    assert found == {
        ("router", "prefill"),
        ("router", "decode"),
        ("prefill", "decode"),
        ("decode", "prefill"),
        ("decode", "decode"),
    }
    for caller, called in itertools.product(ROLES, ROLES):
        assert not admitted(objects, caller, called, 9100), "metrics are for Prometheus"
    for role in ROLES:
        policy = named(objects, "NetworkPolicy", role)["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        (rule,) = [each for each in policy["ingress"] if each.get("ports") == [{"port": "metrics"}]]
        assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def test_with_rdma_workers_reach_each_other_at_any_port():
    objects = rendered("gpu")
    assert admitted(objects, "decode", "prefill", 12345)
    assert not admitted(objects, "router", "prefill", 12345)
    assert not admitted(objects, "prefill", "prefill", 50051)


def test_a_policy_for_clients_is_what_was_said():
    objects = rendered("everything")
    (rule,) = [
        each
        for each in named(objects, "NetworkPolicy", "router")["spec"]["ingress"]
        if each["ports"] == [{"port": "grpc"}, {"port": "http"}]
    ]
    assert rule["from"] == [{"podSelector": {}}]


def test_prometheus_is_given_every_process_by_the_name_that_alerts_ask_for():
    objects = rendered("gpu")
    monitor = named(objects, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    scraped = [
        each for each in objects if each["kind"] == "Service" and wanted.items() <= each["metadata"]["labels"].items()
    ]
    pods = [each["spec"]["template"]["metadata"]["labels"] for each in workloads(objects).values()]
    for labels in pods:
        assert sum(each["spec"]["selector"].items() <= labels.items() for each in scraped) == 1, "scraped once"
    alerts = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
    job = scraped[0]["metadata"]["labels"][monitor["spec"]["jobLabel"]]
    assert re.fullmatch(re.search(r'up\{job=~"([^"]+)"', alerts)[1], job)


def test_rules_and_dashboards_are_the_same_files():
    objects = rendered("gpu")
    assert named(objects, "PrometheusRule")["spec"] == yaml.safe_load(
        (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
    )
    boards = {path.name: path.read_text() for path in (ROOT / "deploy" / "grafana" / "dashboards").iterdir()}
    assert named(objects, "ConfigMap", "dashboards")["data"] == boards


def test_a_packed_chart_has_what_its_links_name(tmp_path):
    helm(["package", "--destination", str(tmp_path)])
    (packed,) = tmp_path.iterdir()
    made = helm(["template", "headrace", "--namespace", NAMESPACE], CASES["gpu"], chart=packed)
    assert [found for found in yaml.safe_load_all(made) if found] == rendered("gpu")


def test_workers_are_added_for_the_queue_and_for_the_gaps():
    objects = rendered("gpu")
    known = (ROOT / "docs" / "metrics.md").read_text()
    for role, metric in {"prefill": "headrace_queued_requests", "decode": "headrace_itl_seconds"}.items():
        scaled = named(objects, "ScaledObject", role)["spec"]
        target = workloads(objects)[role]
        assert scaled["scaleTargetRef"]["name"] == target["metadata"]["name"]
        assert "replicas" not in target["spec"], "KEDA's, and not set back by an upgrade"
        (trigger,) = scaled["triggers"]
        assert trigger["metricType"] == "Value", "a time is no sum over workers"
        assert metric in trigger["metadata"]["query"]
        for name in re.findall(r"headrace_\w+", trigger["metadata"]["query"]):
            assert f"`{re.sub('_(bucket|count|sum)$', '', name)}`" in known
        selected = named(objects, "Service", "router-metrics")["metadata"]["name"]
        assert f'namespace="{NAMESPACE}", service="{selected}"' in trigger["metadata"]["query"]


def test_every_value_is_described():
    schema = json.loads((CHART / "values.schema.json").read_text())

    def described(node, where):
        node = schema["definitions"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        assert node.get("description"), where
        for name, below in node.get("properties", {}).items():
            if where[-1:] != ["resources"]:
                described(below, [*where, name])

    described(schema, [])


def test_images_are_those_that_were_said():
    assert [container(each)["image"] for each in workloads(rendered("gpu")).values()] == [
        "registry.example.com/headrace/router:0.1.0",
        "registry.example.com/headrace/prefill:0.1.0-cuda",
        "registry.example.com/headrace/decode:0.1.0-cuda",
    ]
    assert container(workloads(rendered("everything"))["decode"])["image"] == "registry.example.com/x/headrace/decode:1"
    assert container(workloads(rendered("defaults"))["decode"])["image"] == "headrace/decode:0.1.0"
