"""The chart's groups of ranks: a pod of several, several pods, what starts them, who serves, who reaches whom."""

import copy

import pytest
from headrace_core.config import DecodeSettings
from headrace_core.worker import run_worker

from tests.unit.helm_parts import (
    RANKS,
    SECURE,
    HelmError,
    container,
    follower,
    helm,
    named,
    needs_helm,
    problems,
    rendered,
    split_arguments,
    workloads,
)
from tests.unit.test_helm_chart import admitted

pytestmark = needs_helm


def environment(workload):
    return {each["name"]: each.get("value") for each in container(workload)["env"]}


def torchrun(workload):
    """Return torchrun's options for a pod."""
    given = container(workload)
    assert given["command"] == ["tini", "--", "python", "-m", "torch.distributed.run"]
    *options, module, name = split_arguments(given)[0]
    assert (module, name) == ("--module", f"headrace_{given['name']}")
    return dict(option.split("=", 1) for option in options)


def test_a_pod_of_several_ranks_is_a_pod_as_any_other():
    prefill = workloads(rendered("ranks"))["prefill"]
    assert prefill["kind"] == "StatefulSet"
    options = torchrun(prefill)
    assert (options["--nnodes"], options["--nproc-per-node"]) == ("1", "2")
    assert options["--master-addr"] == "127.0.0.1"
    assert environment(prefill)["HEADRACE_PREFILL_THREADS"] == "2", "of five cores, half each"
    (shm,) = [each for each in prefill["spec"]["template"]["spec"]["volumes"] if each["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory"}


def test_several_pods_are_a_group_that_begins_and_ends_whole():
    objects = rendered("ranks")
    spec = named(objects, "LeaderWorkerSet", "decode")["spec"]
    template = spec["leaderWorkerTemplate"]
    assert (template["size"], template["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
    assert spec["startupPolicy"] == "LeaderCreated", "a leader is ready when the others have come"
    leader, other = workloads(objects)["decode"], follower(objects, "decode")
    assert container(leader)["args"] == container(other)["args"], "all ranks have the same command line"
    options = torchrun(leader)
    assert options["--nnodes"] == "$(LWS_GROUP_SIZE)"
    assert options["--node-rank"] == "$(LWS_WORKER_INDEX)"
    assert options["--master-addr"] == "$(LWS_LEADER_ADDRESS)"
    assert container(leader)["resources"]["limits"]["nvidia.com/gpu"] == 1, "one for each rank of the pod"


def test_the_leader_alone_serves_and_is_asked():
    objects = rendered("ranks")
    leader, other = workloads(objects)["decode"], follower(objects, "decode")
    assert {"ports", "readinessProbe", "startupProbe", "livenessProbe"} <= container(leader).keys()
    assert not {"ports", "readinessProbe", "startupProbe", "livenessProbe"} & container(other).keys()
    selector = named(objects, "Service", "decode")["spec"]["selector"].items()
    assert selector <= leader["spec"]["template"]["metadata"]["labels"].items()
    assert not selector <= other["spec"]["template"]["metadata"]["labels"].items()


def test_a_group_has_the_time_to_drain():
    for role in ("prefill", "decode"):
        workload = workloads(rendered("ranks"))[role]
        drain_s = DecodeSettings.model_fields["drain_s"].default
        drain_s = {"prefill": 30, "decode": 30}.get(role, drain_s)
        pod_s = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        ranks_s = int(torchrun(workload)["--shutdown-timeout"])
        assert 2 * (drain_s + run_worker._LATER_S) < ranks_s < pod_s


def test_ranks_of_a_group_reach_each_other_and_nobody_else_does():
    objects = rendered("ranks")
    assert admitted(objects, "decode", "decode", 29500)
    assert admitted(objects, "decode", "decode", 40000)
    for caller, called in (("prefill", "decode"), ("router", "decode"), ("decode", "prefill"), ("prefill", "prefill")):
        assert not admitted(objects, caller, called, 29500)


def test_groups_are_scaled_as_wholes():
    target = named(rendered("ranks"), "ScaledObject", "decode")["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "name": "headrace-decode",
    }


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("startupPolicy",), "LeaderFirst"),
        (("leaderWorkerTemplate", "sizes"), 2),
        (("leaderWorkerTemplate", "workerTemplate", "spec", "containers", 0, "argz"), []),
        (("leaderWorkerTemplate", "leaderTemplate", "spec", "terminationGracePeriodSeconds"), "soon"),
    ],
)
def test_faults_in_a_group_are_found(path, value):
    broken = copy.deepcopy(named(rendered("ranks"), "LeaderWorkerSet", "decode"))
    place = broken["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (found,) = problems([broken], "1.37")
    assert found.startswith("LeaderWorkerSet headrace-decode: ")


def test_encryption_between_pods_of_a_group_is_refused_until_it_is_done_without():
    with pytest.raises(HelmError, match=r"decode\.options\.ranks-in-clear: with tls\.enabled, and 2 pods a group"):
        helm(["template", "headrace"], RANKS | SECURE)
    allowed = {**RANKS["decode"], "options": {"ranks-in-clear": True}}
    made = helm(["template", "headrace"], RANKS | SECURE | {"decode": allowed})
    assert '"--ranks-in-clear=true"' in made
    assert DecodeSettings.model_fields["ranks_in_clear"].default is False


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"pods": 0}, "at '/decode/group/pods': minimum: got 0, want 1"),
        ({"ranksPerPod": 1.5}, "at '/decode/group/ranksPerPod': got number, want integer"),
        ({"size": 2}, "additional properties 'size' not allowed"),
    ],
)
def test_a_group_that_can_not_be_is_refused_by_its_name(group, message):
    with pytest.raises(HelmError) as refused:
        helm(["template", "headrace"], {"decode": {"group": group}})
    assert message in str(refused.value)
