"""What is missing, and the command that brings it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from headrace_core.packages import WORKER_PACKAGES

from headrace_client.doctor.machine import Machine
from headrace_client.doctor.outlook import Outlook

INSTALL_WORKER = "pip install 'headrace[worker]'"
REINSTALL_WORKER = "pip install --force-reinstall 'headrace[worker]'"
INSTALL_DOCKER = (
    "sudo apt-get install docker.io docker-compose-v2  # Ubuntu; else https://docs.docker.com/engine/install"
)

JOIN_DOCKER = 'sudo usermod -aG docker "$USER" && newgrp docker'


@dataclass(frozen=True, slots=True)
class Missing:
    """One thing that is not here. `command` brings it, or shows why it is not here; empty: none does."""

    what: str
    why: str
    command: str
    is_needed: bool = False
    """Whether no worker can run without it."""


def missing(machine: Machine, outlook: Outlook) -> list[Missing]:
    """Return what is missing, what workers need first."""
    found = list(_needed(machine, outlook))
    if outlook.worker is not None:
        found += [*_compiled(machine, outlook.worker["compiled"]), *_gpus(machine, outlook.worker)]
        found += _nixl(machine, outlook.worker["transport_problems"]["nixl"])
    return [*found, *_docker(machine)]


def _needed(machine: Machine, outlook: Outlook) -> Iterator[Missing]:
    lacking = [name for name in WORKER_PACKAGES if not machine.packages[name]]
    if lacking:
        yield Missing(", ".join(lacking), "workers compute with it", INSTALL_WORKER, True)
    elif outlook.is_refused:
        yield Missing("settings that a worker can start with", outlook.problem, "env | grep HEADRACE_DECODE_", True)
    elif outlook.worker is None:
        yield Missing("packages that can be used", outlook.problem, REINSTALL_WORKER, True)


def _compiled(machine: Machine, compiled: dict[str, Any]) -> Iterator[Missing]:
    if not compiled["problem"]:
        return
    python = shlex.quote(machine.executable)
    command = f"{python} -m headrace_kernels.cpu.build"
    if compiled["is_built"] or not compiled["sets"]:
        command = ""
    elif not compiled["compiler"]:
        # A CXX that names none would still be asked for.
        command = f"pip install 'headrace[compiler]' && env -u CXX {command}"
    why = compiled["problem"]
    if compiled["no_compiler"]:
        why += f"; {compiled['no_compiler']}"
    yield Missing("compiled CPU kernels", f"plain torch computes, slower: {why}", command)


def _gpus(machine: Machine, worker: dict[str, Any]) -> Iterator[Missing]:
    torch: dict[str, Any] = worker["torch"]
    if torch["gpus"]:
        problem = torch["gpu_kernels_problem"]
        if problem:
            command = "" if machine.packages["triton"] else "pip install 'triton>=3.6'"
            yield Missing("kernels for the GPU", problem, command, worker["kernels_problem"] == problem)
    elif machine.nvidia_gpus:
        yield _torch_for("CUDA", torch["version"], torch["cuda"], "nvidia-smi", "pip install --force-reinstall torch")
    elif machine.amd_gpus:
        yield _torch_for("ROCm", torch["version"], torch["rocm"], "rocminfo", "")


def _torch_for(platform: str, torch: str, built_for: str, looks: str, installs: str) -> Missing:
    """Return what a GPU that torch does not see lacks: access to it, or a build of torch for its platform."""
    if built_for:
        why = f"torch {torch} is built for {platform} {built_for}, and sees none: its driver, or the container's access"
        return Missing("access to the GPU", why, looks)
    why = f"torch {torch} can't compute on the GPU that is here"
    return Missing(f"torch for {platform}", why if installs else f"{why}; pytorch.org has the command", installs)


def _nixl(machine: Machine, problem: str) -> Iterator[Missing]:
    if machine.rdma_devices and problem:
        command = "" if machine.packages["nixl"] else "pip install --no-deps nixl nixl-cu12"
        yield Missing("NIXL", f"pages can't move by RDMA, for which there are devices: {problem}", command)


def _docker(machine: Machine) -> Iterator[Missing]:
    if "permission denied" in machine.docker_problem:
        yield Missing("access to Docker's engine", machine.docker_problem, JOIN_DOCKER)
    elif machine.docker_problem:
        yield Missing("Docker's engine", f"it does not answer: {machine.docker_problem}", "sudo systemctl start docker")
    elif not machine.docker:
        yield Missing("Docker", "deploy/compose.yaml needs it, nothing else", INSTALL_DOCKER)
    if (machine.docker or machine.docker_problem) and not machine.compose:
        yield Missing("Docker's compose", "deploy/compose.yaml needs it, nothing else", INSTALL_DOCKER)
