"""What the chart starts, started: its arguments and environment, with this machine's addresses for a cluster's."""

import os
import signal
import socket
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace_client import Client
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S

from tests.load.prometheus import Prometheus, needs_prometheus
from tests.load.queries import assert_numbers
from tests.unit.helm_parts import NAMESPACE, ROLES, container, named, needs_helm, rendered, workloads

pytestmark = needs_helm

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


class Pod:
    """A pod's container as a process here. `places` says what is called what on this machine."""

    def __init__(self, role, workload, places, folder):
        given = container(workload)
        self.grpc_port = given["readinessProbe"]["grpc"]["port"]
        environment = {each["name"]: each.get("value") or self._from(each["valueFrom"]) for each in given["env"]}
        self.address = f"127.0.0.1:{places[f':{self.grpc_port}'][1:]}"
        arguments = [self._here(argument, {**places, **self._metrics(role, places)}) for argument in given["args"]]
        self.metrics_address = arguments[2].removeprefix("--metrics-listen=")
        with (folder / f"{role}.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"headrace_{role}", *arguments],
                env={"PATH": os.environ["PATH"], **environment, "HOME": str(folder)},
                cwd=folder, stdout=log, stderr=log,
            )  # fmt: skip

    def wait_serving(self):
        """Return when the health service says what the probes want to hear."""
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S, wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    @staticmethod
    def _from(source):
        return "1" if "resourceFieldRef" in source else "127.0.0.1"

    @staticmethod
    def _metrics(role, places):
        return {":9100": places[f"{role} :9100"]}

    @staticmethod
    def _here(argument, places):
        for there, here in places.items():
            argument = argument.replace(there, here)
        return argument


@pytest.fixture(scope="module")
def pods(model_dir, tmp_path_factory):
    found = workloads(rendered("defaults"))
    ports = [f"{role} :9100" for role in ROLES] + [":50050", ":50051", ":50052"]
    with_ports = dict(zip(ports, free_ports(len(ports)), strict=True))
    names = {f"headrace-{role}.{NAMESPACE}.svc": "127.0.0.1" for role in ROLES}
    places = {"/models/demo": str(model_dir), "$(POD_IP)": "127.0.0.1", "0.0.0.0": "127.0.0.1", **names, **with_ports}
    folder = tmp_path_factory.mktemp("pods")
    started = {role: Pod(role, found[role], places, folder) for role in ROLES}
    try:
        for pod in started.values():
            pod.wait_serving()
        yield started
    finally:
        for pod in started.values():
            pod.process.kill()
            pod.process.wait()


def free_ports(count):
    """Return `:port` of ports that nobody listens on, each another."""
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [f":{each.getsockname()[1]}" for each in taken]
    for each in taken:
        each.close()
    return found


def answers(pods, count=1):
    with Client(pods["router"].address) as client:
        return [client.generate("Once upon a time there was a little fox. " * 4, PARAMS) for _ in range(count)]


def test_the_processes_find_each_other_and_answer(pods):
    (answer,) = answers(pods)
    assert len(answer.token_ids) == 24
    with Client(pods["router"].address) as client:
        workers = client.server_info().workers
    assert {(each.role, each.address, each.state) for each in workers} == {
        (role, pods[role].address, "ready") for role in ("prefill", "decode")
    }


@needs_prometheus
def test_what_scaling_asks_is_answered(pods, tmp_path):
    service = named(rendered("gpu"), "Service", "router-metrics")["metadata"]["name"]
    router = (pods["router"].metrics_address, {"namespace": NAMESPACE, "service": service})
    prometheus = Prometheus(tmp_path, [router])
    queries = {
        role: named(rendered("gpu"), "ScaledObject", role)["spec"]["triggers"][0]["metadata"]["query"]
        for role in ("prefill", "decode")
    }
    try:
        prometheus.wait_scraped()
        assert prometheus.query(queries["decode"]) == []
        answers(pods, 4)
        for query in queries.values():
            assert_numbers(query, prometheus.wait_for(query))
    finally:
        prometheus.close()


def test_each_ends_well_when_its_pod_is_asked_to(pods):
    answers(pods)
    for role in ("decode", "prefill", "router"):
        pods[role].process.send_signal(signal.SIGTERM)
        assert pods[role].process.wait(WAIT_S) == 0, role
