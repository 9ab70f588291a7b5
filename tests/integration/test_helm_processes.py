"""What the chart starts, started: its arguments and environment, with this machine's addresses for a cluster's."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace_client import Client, ConnectionOptions, certificates
from headrace_core.api_keys import ApiKey, new_key, write_entry
from headrace_core.errors import UnauthenticatedError
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S

from tests.load.prometheus import Prometheus, needs_prometheus
from tests.load.queries import assert_numbers
from tests.unit.helm_parts import (
    NAMESPACE,
    ROLES,
    container,
    follower,
    named,
    needs_helm,
    rendered,
    split_arguments,
    workloads,
)

pytestmark = needs_helm

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


class Pod:
    """A pod's container as a process here. `places` says what is called what on this machine."""

    def __init__(self, role, workload, places, folder):
        given = container(workload)
        self.probe = given.get("readinessProbe", {})
        self.grpc_port = {each["name"]: each["containerPort"] for each in given.get("ports", [])}.get("grpc")
        self.places = {**places, ":9100": places[f"{role} :9100"], "/certs": places.get(f"{role} /certs", "")}
        self.places["--master-port=29500"] = f"--master-port={places[f'{role} ranks'][1:]}"
        environment = {each["name"]: self._here(each.get("value") or self._from(each)) for each in given["env"]}
        self.env = {"PATH": os.environ["PATH"], **environment, "HOME": str(folder)}
        self.folder = folder
        self.address = f"127.0.0.1:{places.get(f':{self.grpc_port}', ':0')[1:]}"
        for_torchrun, arguments = ([self._here(each) for each in part] for part in split_arguments(given))
        self.metrics_address = arguments[2].removeprefix("--metrics-listen=")
        program = given.get("command", ["tini", "--", "python", "-m", f"headrace_{role}"])
        assert program[:3] == ["tini", "--", "python"]
        with (folder / f"{role}.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program[3:], *for_torchrun, *arguments],
                env=self.env, cwd=folder, stdout=log, stderr=log,
            )  # fmt: skip

    def wait_serving(self):
        """Return when the probe gets what it wants."""
        if "exec" in self.probe:
            until_s = time.monotonic() + WAIT_S
            while problem := self.ask(self.env):
                assert self.process.poll() is None, (self.folder, problem)
                assert time.monotonic() < until_s, problem
            return
        assert self.probe["grpc"]["port"] == self.grpc_port
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=4 * WAIT_S, wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    def ask(self, env):
        """Run the exec probe as the kubelet does, in an environment; return what it says against the process."""
        python, *arguments = self.probe["exec"]["command"]
        assert python == "python"
        command = [sys.executable, *map(self._here, arguments)]
        asked = subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, check=False)
        assert bool(asked.returncode) == bool(asked.stderr), asked
        return asked.stderr

    def _here(self, text):
        for there, here in self.places.items():
            text = text.replace(there, here)
        return text

    @staticmethod
    def _from(variable):
        return "1" if "resourceFieldRef" in variable["valueFrom"] else "127.0.0.1"


@contextlib.contextmanager
def start(case, folder, mounts):
    """Start what the chart does for a case, and wait for it; `mounts`: what stands for which folder of the pods."""
    found = workloads(rendered(case))
    ports = [f"{role} {what}" for role in ROLES for what in (":9100", "ranks")] + [":50050", ":50051", ":50052"]
    with_ports = dict(zip(ports, free_ports(len(ports)), strict=True))
    names = {f"headrace-{role}.{NAMESPACE}.svc": "127.0.0.1" for role in ROLES}
    places = {**mounts, "$(POD_IP)": "127.0.0.1", "0.0.0.0": "127.0.0.1", **names, **with_ports}
    started = {}
    try:
        for role in ROLES:
            # What a LeaderWorkerSet tells its pods.
            group = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_LEADER_ADDRESS)": "127.0.0.1"}
            if found[role]["kind"] == "LeaderWorkerSet":
                other = {**places, **group, "$(LWS_WORKER_INDEX)": "1"}
                started[f"{role} 1"] = Pod(role, follower(rendered(case), role), other, folder)
            started[role] = Pod(role, found[role], {**places, **group, "$(LWS_WORKER_INDEX)": "0"}, folder)
        for role in ROLES:
            started[role].wait_serving()
        yield started
    finally:
        for pod in started.values():
            pod.process.kill()
            pod.process.wait()


@pytest.fixture(scope="module")
def pods(model_dir, tmp_path_factory):
    with start("defaults", tmp_path_factory.mktemp("pods"), {"/models/demo": str(model_dir)}) as started:
        yield started


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


def test_with_identities_and_keys_probes_and_clients_have_theirs(model_dir, tmp_path):
    folder = tmp_path / "identities"
    certificates.make_set(folder, name="pod", days=1, hosts=())
    key, digest = new_key("alice")
    (tmp_path / "keys.toml").write_text(write_entry(ApiKey("alice", digest)))
    mounts = {"/models/demo": str(model_dir), "/keys/keys.toml": str(tmp_path / "keys.toml")}
    mounts["collector.observability.svc"] = "127.0.0.1"
    mounts |= {f"{role} /certs": str(folder / role) for role in ROLES}
    with start("secure", tmp_path, mounts) as pods:
        for role, pod in pods.items():
            bare = {name: value for name, value in pod.env.items() if name != f"HEADRACE_{role.upper()}_TLS"}
            assert "UNAVAILABLE" in pod.ask(bare), "without a certificate, as the kubelet itself would ask"
        client = folder / "client"
        with Client(pods["router"].address, ConnectionOptions(identity=client, api_key=key)) as known:
            assert len(known.generate("Once upon a time", PARAMS).token_ids) == 24
        with Client(pods["router"].address, ConnectionOptions(identity=client)) as stranger:
            with pytest.raises(UnauthenticatedError) as refused:
                stranger.generate("Once upon a time", PARAMS)
            assert refused.value.reason == "BAD_API_KEY"
