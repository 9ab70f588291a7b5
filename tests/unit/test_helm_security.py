"""The chart's identities, keys and traces: what is mounted and named, how processes are asked, what is refused."""

import json

import pytest
from headrace_core import identity

from tests.unit.helm_parts import (
    CASES,
    CHART,
    COLLECTOR,
    ROLES,
    SECURE,
    HelmError,
    container,
    every_case,
    helm,
    named,
    needs_helm,
    rendered,
    workloads,
)

pytestmark = needs_helm

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def mounted(workload, folder):
    """Return the volume that a pod's container reads at a folder; None if there is nothing."""
    for mount in container(workload)["volumeMounts"]:
        if mount["mountPath"] == folder:
            assert mount["readOnly"]
            volumes = workload["spec"]["template"]["spec"]["volumes"]
            return next(each for each in volumes if each["name"] == mount["name"])
    return None


def environment(workload):
    return {each["name"]: each.get("value") for each in container(workload)["env"]}


def notes(values):
    """Return what the chart tells whoever installs it."""
    return helm(["install", "headrace", "--dry-run=client", "--namespace", "ml"], values).partition("NOTES:")[2]


@every_case
def test_a_process_is_asked_for_its_health_in_the_way_it_can_answer(case):
    has_tls = CASES[case].get("tls", {}).get("enabled", False)
    for role, workload in workloads(rendered(case)).items():
        given = container(workload)
        port = {each["name"]: each["containerPort"] for each in given["ports"]}["grpc"]
        wanted = {"grpc": {"port": port}}
        if role == "router" and CASES[case].get("router", {}).get("tlsSecret"):
            wanted = {"tcpSocket": {"port": "grpc"}}
        elif has_tls:
            wanted = {"exec": {"command": ["python", "-m", "headrace_core.probe", f"127.0.0.1:{port}"]}}
        for probe in PROBES:
            assert wanted.items() <= given[probe].items(), (role, probe)
            assert len(given[probe].keys() & {"grpc", "exec", "tcpSocket"}) == 1
        start = given["startupProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] == 1800, "half an hour to load a model"


@every_case
def test_a_role_reads_its_identity_and_no_other_user_may(case):
    for role, workload in workloads(rendered(case)).items():
        volume = mounted(workload, "/certs")
        assert environment(workload).get(f"HEADRACE_{role.upper()}_TLS") == ("/certs" if volume else None)
        assert bool(volume) == CASES[case].get("tls", {}).get("enabled", False)
        if volume:
            secret = volume["secret"]
            assert secret["secretName"] == f"headrace-{role}-tls"
            assert [each["key"] for each in secret["items"]] == [identity.CERT, identity.KEY, identity.ROOTS]
            assert [each["path"] for each in secret["items"]] == [identity.CERT, identity.KEY, identity.ROOTS]


@every_case
def test_secrets_are_files_that_the_pods_group_may_read(case):
    for workload in workloads(rendered(case)).values():
        pod = workload["spec"]["template"]["spec"]
        for volume in pod["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440
                assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
        assert not any("secretKeyRef" in each.get("valueFrom", {}) for each in container(workload)["env"])


def test_the_router_alone_reads_the_keys():
    found = workloads(rendered("secure"))
    assert environment(found["router"])["HEADRACE_ROUTER_KEYS_FILE"] == "/keys/keys.toml"
    assert mounted(found["router"], "/keys")["secret"] == {
        "secretName": "headrace-keys",
        "defaultMode": 0o440,
        "items": [{"key": "keys.toml", "path": "keys.toml"}],
    }
    for role in ("prefill", "decode"):
        assert mounted(found[role], "/keys") is None
    assert "HEADRACE_ROUTER_KEYS_FILE" not in environment(workloads(rendered("defaults"))["router"])


def test_clients_may_be_served_with_another_certificate():
    router = workloads(rendered("everything"))["router"]
    assert mounted(router, "/tls")["secret"]["secretName"] == "tls"
    assert {"--tls-cert=/tls/tls.crt", "--tls-key=/tls/tls.key"} <= set(container(router)["args"])


@pytest.mark.parametrize(
    ("case", "protocol"), [("defaults", "kubernetes.io/h2c"), ("secure", "https"), ("everything", "https")]
)
def test_the_service_says_whether_it_is_encrypted(case, protocol):
    assert named(rendered(case), "Service", "router")["spec"]["ports"][0]["appProtocol"] == protocol


def test_processes_send_their_spans_to_the_collector_and_may():
    objects = rendered("secure")
    for role, workload in workloads(objects).items():
        given = environment(workload)
        assert given[f"HEADRACE_{role.upper()}_TRACE_SAMPLE"] == "0", "traces of clients alone, and not none"
        assert given["OTEL_EXPORTER_OTLP_ENDPOINT"] == SECURE["tracing"]["endpoint"]
        egress = named(objects, "NetworkPolicy", role)["spec"]["egress"]
        assert {"ports": [{"port": 4317}], "to": [COLLECTOR]} in egress


def test_without_a_share_nothing_is_traced():
    objects = rendered("defaults")
    for role, workload in workloads(objects).items():
        assert not [name for name in environment(workload) if "OTEL" in name or "TRACE" in name]
        egress = named(objects, "NetworkPolicy", role)["spec"]["egress"]
        assert [each for each in egress if "to" not in each] == [
            {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
        ]


def secrets(**changed):
    return {"tls": {"enabled": True, "secrets": {**SECURE["tls"]["secrets"], **changed}}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(
            (secrets(**{role: ""}), f"tls.secrets.{role}: with tls.enabled each role has a Secret with tls.crt")
            for role in ROLES
        ),
        (secrets(router="Router_TLS"), "at '/tls/secrets/router'"),
        (secrets(client="tls"), "additional properties 'client' not allowed"),
        ({"tls": {"enabled": "yes"}}, "at '/tls/enabled': got string, want boolean"),
        ({"apiKeys": {"secretName": "a/b"}}, "at '/apiKeys/secretName'"),
        ({"router": {"tokenSecret": "token"}}, "additional properties 'tokenSecret' not allowed"),
        ({"router": {"options": {"trace-sample": 1}}}, "additional properties 'trace-sample' not allowed"),
        ({"tracing": {"sampleShare": 1.5}}, "at '/tracing/sampleShare': maximum: got 1.5, want 1"),
        ({"tracing": {"sampleShare": 0.1}}, "tracing.endpoint: spans are sent to a collector; say where it is"),
        ({"tracing": {"endpoint": "collector:4317"}}, "at '/tracing/endpoint'"),
        ({"tracing": {"endpoint": "http://collector"}}, "at '/tracing/endpoint'"),
    ],
)
def test_what_can_not_be_is_refused_by_its_name(values, message):
    with pytest.raises(HelmError) as refused:
        helm(["template", "headrace"], values)
    assert message in str(refused.value)


KEYS = {"apiKeys": {"secretName": "keys"}}


@pytest.mark.parametrize(
    ("values", "is_warned"),
    [({}, False), (KEYS, True), (SECURE, False), (KEYS | {"router": {"tlsSecret": "tls"}}, False)],
)
def test_who_sets_keys_without_tls_is_warned(values, is_warned):
    assert ("WARNING: API keys cross the network in clear text" in notes(values)) == is_warned


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, ""),
        (SECURE, " --identity DIR --api-key-file FILE"),
        (SECURE | {"router": {"tlsSecret": "tls"}}, " --tls --api-key-file FILE"),
        ({"router": {"tlsSecret": "tls"}}, " --tls"),
    ],
)
def test_notes_say_how_a_client_shows_who_it_is(values, options):
    told = notes(values)
    assert f"--timings{options}\n" in told
    assert f"headrace status --watch{options}\n" in told


def test_the_schema_warns_of_keys_in_clear_text():
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert "clear text" in schema["properties"]["apiKeys"]["properties"]["secretName"]["description"]
