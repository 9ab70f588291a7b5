"""`headrace doctor` on machines that are made up: each line says what is there; what is missing has its command."""

import os
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from headrace_client.cluster import local_cluster
from headrace_client.doctor import machine as machine_module
from headrace_client.doctor.advice import missing
from headrace_client.doctor.machine import Machine, ask, look
from headrace_client.doctor.outlook import Outlook
from headrace_client.doctor.report import machine_rows, worker_rows
from headrace_core.packages import WORKER_PACKAGES

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
CPUINFO = "".join(
    f"processor\t: {index}\nmodel name\t: Xeon 8480\nflags\t\t: fpu avx2 avx512f amx_tile\n\n" for index in range(4)
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine's files, and what its commands answer (`answers`, by the last argument but one, or missing)."""
    monkeypatch.setattr(machine_module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine_module, "available_cores", lambda: 3)
    monkeypatch.setattr(machine_module, "ask", lambda *command: (False, ""))
    monkeypatch.setattr(machine_module, "version_of", lambda name: f"1.{len(name)}")
    monkeypatch.setattr(machine_module.shutil, "disk_usage", lambda path: SimpleNamespace(total=len(str(path)) * GIB))
    write(tmp_path / "proc/cpuinfo", CPUINFO)
    write(tmp_path / "proc/meminfo", f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\n")
    return tmp_path


MACHINE = Machine(
    python="3.12.1", executable="/venv/bin/python", system="Linux 6.1 x86_64", processor="Xeon 8480", cores=3,
    cores_in_all=4, instructions={"AVX2": True, "AMX": False}, memory_bytes=64 * GIB, shm_bytes=8 * GIB,
    nvidia_gpus=(), amd_gpus=(), rdma_devices=(),
    packages={"torch": "2.11", "psutil": "7.0", "triton": "", "nixl": ""},
    docker="27.1", docker_problem="", compose="2.29",
)  # fmt: skip
WORKER = {
    "device": "cpu", "dtype": "auto", "kv_cache_dtype": "auto", "weights_dtype": "auto",
    "kernels": "cpu", "kernels_problem": "",
    "families": {"cpu": 14, "reference": 11}, "threads": 3, "free_bytes": 9 * GIB, "transports": ["shm", "grpc"],
    "transport_problems": {"shm": "", "nixl": "NIXL is not installed", "grpc": ""},
    "torch": {"version": "2.11+cpu", "cuda": "", "rocm": "", "gpus": [], "gpu_kernels_problem": ""},
    "compiled": {
        "problem": "", "isa": "avx2", "dtypes": ["float32", "bfloat16"], "is_built": True, "sets": ["avx2", "avx512"],
        "compiler": "/usr/bin/g++", "no_compiler": "",
    },
}  # fmt: skip


def worker(**changed):
    """Return the worker's answer with other values, by names such as torch__cuda."""
    answer = deepcopy(WORKER)
    for name, value in changed.items():
        group, _, inner = name.partition("__")
        if inner:
            answer[group][inner] = value
        else:
            answer[group] = value
    return answer


# What the machine has.


def test_the_files_of_the_system_are_read(root):
    for index, device in enumerate(("mlx5_0", "mlx5_1")):
        write(root / "sys/class/infiniband" / device / "node_type", "1: CA")
        write(root / f"proc/driver/nvidia/gpus/0000:0{index}:00.0/information", "Model: \t\t NVIDIA H200\nIRQ: 5\n")
    write(root / "sys/class/kfd/kfd/topology/nodes/0/gpu_id", "0\n")
    write(root / "sys/class/kfd/kfd/topology/nodes/1/gpu_id", "51110\n")
    write(root / "sys/class/kfd/kfd/topology/nodes/1/name", "aqua_vanjaram\n")
    found = look(root)
    assert (found.cores, found.cores_in_all, found.processor) == (3, 4, "Xeon 8480")
    assert found.instructions == {"AVX2": True, "AVX-512": True, "AVX512-BF16": False, "AMX": True}
    assert (found.memory_bytes, found.shm_bytes) == (64 * GIB, len(str(root / "dev/shm")) * GIB)
    assert found.nvidia_gpus == ("NVIDIA H200", "NVIDIA H200")
    assert found.amd_gpus == ("aqua_vanjaram",)
    assert found.rdma_devices == ("mlx5_0", "mlx5_1")
    assert found.packages == {"torch": "1.5", "psutil": "1.6", "triton": "1.6", "nixl": "1.4"}
    assert (found.python, found.executable) == (sys.version.split()[0], sys.executable)
    assert found.system == f"{os.uname().sysname} {os.uname().release} x86_64"
    assert (found.docker, found.docker_problem, found.compose) == ("", "", "")


def test_an_arm_machine_has_other_instructions(root, monkeypatch):
    monkeypatch.setattr(machine_module.platform, "machine", lambda: "aarch64")
    write(root / "proc/cpuinfo", "processor : 0\nFeatures : fp asimd\n\nprocessor : 1\nFeatures : fp asimd\n")
    found = look(root)
    assert (found.instructions, found.cores_in_all) == ({"NEON": True}, 2)


def test_a_system_that_says_nothing_is_no_error(root, monkeypatch):
    def fails(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(machine_module.shutil, "disk_usage", fails)
    found = look(root / "nowhere")
    assert (found.processor, found.cores_in_all, found.instructions) == ("", 0, {})
    assert (found.memory_bytes, found.shm_bytes, found.nvidia_gpus, found.amd_gpus) == (0, 0, (), ())
    rows = machine_rows(found)
    assert rows["instructions"] == "unknown"
    assert rows["memory"] == "unknown; /dev/shm unknown"
    assert rows["cores"] == "3 of an unknown number for this process"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"version": (True, "27.1"), "compose": (True, "2.29")}, ("27.1", "", "2.29")),
        ({"version": (True, "27.1"), "compose": (False, "no such command")}, ("27.1", "", "")),
        ({"version": (False, "no daemon"), "compose": (True, "2.29")}, ("", "no daemon", "2.29")),
    ],
)
def test_docker_is_asked(root, monkeypatch, answers, expected):
    monkeypatch.setattr(machine_module, "ask", lambda *command: answers[command[1]])
    found = look(root)
    assert (found.docker, found.docker_problem, found.compose) == expected


def test_a_command_that_fails_or_is_not_there_is_no_error():
    assert ask(sys.executable, "-c", "print(' 5 ')") == (True, "5")
    assert ask(sys.executable, "-c", "import sys; sys.exit('first\\nlast')") == (False, "last")
    assert ask("headrace-has-no-such-command") == (False, "")


def test_versions_of_packages_are_those_installed():
    assert machine_module.version_of("numpy").count(".") == 2
    assert machine_module.version_of("headrace_has_no_such_package") == ""


@pytest.mark.parametrize(
    ("changed", "name", "says"),
    [
        ({}, "Python", "3.12.1, /venv/bin/python"),
        ({}, "system", "Linux 6.1 x86_64"),
        ({}, "cores", "3 of 4 for this process; Xeon 8480"),
        ({}, "instructions", "AVX2; not AMX"),
        ({"instructions": {"NEON": True}}, "instructions", "NEON"),
        ({"instructions": {"NEON": False}}, "instructions", "not NEON"),
        ({}, "memory", "64.0 GiB; /dev/shm 8.0 GiB"),
        ({}, "GPUs", "none"),
        ({"nvidia_gpus": ("H200", "H200"), "amd_gpus": ("MI300X",)}, "GPUs", "H200, H200, MI300X"),
        ({}, "RDMA", "none"),
        ({"rdma_devices": ("mlx5_0", "mlx5_1")}, "RDMA", "mlx5_0, mlx5_1"),
        ({}, "packages", "torch 2.11, psutil 7.0; not triton, nixl"),
        ({}, "Docker", "27.1, compose 2.29"),
        ({"compose": ""}, "Docker", "27.1, compose none"),
        ({"docker": ""}, "Docker", "none"),
        ({"docker": "", "docker_problem": "no daemon"}, "Docker", "its engine does not answer: no daemon"),
    ],
)
def test_each_line_of_the_machine(changed, name, says):
    assert machine_rows(replace(MACHINE, **changed))[name] == says


# What a worker uses.


@pytest.mark.parametrize(
    ("changed", "name", "says"),
    [
        ({}, "device", "cpu; `headrace up --device` takes cpu or cuda"),
        ({"device": "cuda"}, "device", "cuda; `headrace up --device` takes cpu or cuda"),
        ({}, "torch", "2.11+cpu, for CPUs alone; sees no GPU"),
        (
            {"torch__cuda": "12.8", "torch__gpus": [{"name": "H200", "memory_bytes": 139 * GIB}] * 2},
            "torch",
            "2.11+cpu, for CUDA 12.8; sees H200, 139.0 GiB; H200, 139.0 GiB",
        ),
        ({"torch__rocm": "6.4"}, "torch", "2.11+cpu, for ROCm 6.4; sees no GPU"),
        (
            {},
            "kernels",
            "compiled for avx2, avx512, on avx2 here: 14 of 25 families, the others on the next best",
        ),
        ({"kernels": "reference", "compiled__problem": "no AVX2"}, "kernels", "plain torch; no AVX2"),
        ({"kernels": "reference"}, "kernels", "plain torch; it is asked for"),
        (
            {"kernels": "triton", "families": {"triton": 23, "reference": 2}, "kernels_problem": "no triton"},
            "kernels",
            "triton: 23 of 25 families, the others on the next best; no triton",
        ),
        ({}, "compiler", "/usr/bin/g++ would build them"),
        ({"compiled__compiler": "", "compiled__no_compiler": "no C++ compiler"}, "compiler", "no C++ compiler"),
        ({}, "threads", "3; `headrace up` gives its 2 workers 5 each"),
        ({}, "dtype", "as its checkpoint; compiled kernels take float32, bfloat16"),
        ({"dtype": "float32"}, "dtype", "float32; compiled kernels take float32, bfloat16"),
        ({}, "weights", "dtype of the compute"),
        ({"weights_dtype": "int8"}, "weights", "int8"),
        ({}, "KV cache", "dtype of the compute"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "KV cache", "fp8_e4m3"),
        ({}, "memory", "9.0 GiB free for weights, pages and a margin"),
        ({}, "transport", "shm, then grpc; not nixl: NIXL is not installed"),
    ],
)
def test_each_line_of_what_a_worker_uses(monkeypatch, changed, name, says):
    monkeypatch.setattr(local_cluster, "available_cores", lambda: 10)
    assert worker_rows(worker(**changed))[name] == says


# What is missing.

BUILD = "/venv/bin/python -m headrace_kernels.cpu.build"
NO_LIBRARY = {"compiled__problem": "no library", "compiled__is_built": False}
NO_COMPILER = {**NO_LIBRARY, "compiled__compiler": "", "compiled__no_compiler": "no C++ compiler"}
H200 = {"torch__cuda": "12.8", "torch__gpus": [{"name": "H200", "memory_bytes": 139 * GIB}]}
NO_TRITON = {**H200, "torch__gpu_kernels_problem": "no triton"}


@pytest.mark.parametrize(
    ("has", "uses", "what", "command"),
    [
        ({}, NO_LIBRARY, "compiled CPU kernels", BUILD),
        ({}, NO_COMPILER, "compiled CPU kernels", f"pip install 'headrace[compiler]' && env -u CXX {BUILD}"),
        ({}, {**NO_COMPILER, "compiled__sets": []}, "compiled CPU kernels", ""),
        ({}, {"compiled__problem": "no AVX2"}, "compiled CPU kernels", ""),
        ({"executable": "/my venv/python"}, NO_LIBRARY, "compiled CPU kernels", BUILD.replace("/venv/bin", "/my venv")),
        ({"nvidia_gpus": ("H200",)}, {}, "torch for CUDA", "pip install --force-reinstall torch"),
        ({"nvidia_gpus": ("H200",)}, {"torch__cuda": "12.8"}, "access to the GPU", "nvidia-smi"),
        ({"amd_gpus": ("MI300X",)}, {}, "torch for ROCm", ""),
        ({"amd_gpus": ("MI300X",)}, {"torch__rocm": "6.4"}, "access to the GPU", "rocminfo"),
        ({"nvidia_gpus": ("H200",)}, NO_TRITON, "kernels for the GPU", "pip install 'triton>=3.6'"),
        ({"rdma_devices": ("mlx5_0",)}, {}, "NIXL", "pip install --no-deps nixl nixl-cu12"),
        ({"docker": ""}, {}, "Docker", "sudo apt-get install docker.io docker-compose-v2"),
        ({"compose": ""}, {}, "Docker's compose", "sudo apt-get install docker.io docker-compose-v2"),
        ({"docker": "", "docker_problem": "no daemon"}, {}, "Docker's engine", "sudo systemctl start docker"),
        (
            {"docker": "", "docker_problem": "permission denied while trying to connect"},
            {},
            "access to Docker's engine",
            'sudo usermod -aG docker "$USER" && newgrp docker',
        ),
    ],
)  # fmt: skip
def test_what_is_missing_has_the_command_that_brings_it(has, uses, what, command):
    (found,) = missing(replace(MACHINE, **has), Outlook(worker(**uses), ""))
    assert found.what == what
    assert found.command.partition("  #")[0] == (command.replace("/my venv/python", "'/my venv/python'"))
    assert found.why
    assert not found.is_needed


def test_what_is_installed_and_can_t_be_used_is_not_to_be_installed_again():
    has = replace(MACHINE, packages=dict.fromkeys(MACHINE.packages, "1.0"), rdma_devices=("mlx5_0",))
    kernels, nixl = missing(has, Outlook(worker(**NO_TRITON), ""))
    assert (kernels.what, kernels.command) == ("kernels for the GPU", "")
    assert (nixl.what, nixl.command) == ("NIXL", "")


def test_why_nothing_compiles_the_kernels_is_said():
    (found,) = missing(MACHINE, Outlook(worker(**NO_COMPILER), ""))
    assert found.why == "plain torch computes, slower: no library; no C++ compiler"


def test_nothing_is_missing_where_all_is_there():
    assert missing(MACHINE, Outlook(worker(), "")) == []
    has_gpu = replace(MACHINE, nvidia_gpus=("H200",), rdma_devices=("mlx5_0",))
    assert missing(has_gpu, Outlook(worker(**H200, transport_problems={"nixl": ""}), "")) == []


@pytest.mark.parametrize(
    ("packages", "found", "command"),
    [
        ({"torch": "", "psutil": "7"}, Outlook(None, "x"), "pip install 'headrace[worker]'"),
        ({"torch": "2", "psutil": ""}, Outlook(None, "x"), "pip install 'headrace[worker]'"),
        ({"torch": "2", "psutil": "7"}, Outlook(None, "x"), "pip install --force-reinstall 'headrace[worker]'"),
        ({"torch": "2", "psutil": "7"}, Outlook(None, "x", is_refused=True), "env | grep HEADRACE_DECODE_"),
        (
            {"torch": "2", "psutil": "7", "triton": ""},
            Outlook(worker(**NO_TRITON, kernels_problem="no triton"), "no triton"),
            "pip install 'triton>=3.6'",
        ),
    ],
)
def test_what_a_worker_can_t_run_without_is_needed(packages, found, command):
    (need,) = missing(replace(MACHINE, packages=packages), found)
    assert (need.command, need.is_needed) == (command, True)


def test_needed_packages_are_those_of_the_extra():
    (line,) = [each for each in (ROOT / "pyproject.toml").read_text().splitlines() if each.startswith("worker = [")]
    assert [part.partition(">=")[0] for part in line.split('"')[1::2]] == list(WORKER_PACKAGES)


def test_packages_are_named_as_the_repository_names_them():
    assert '"triton>=3.6;' in (ROOT / "pyproject.toml").read_text()
    assert "`pip install --no-deps nixl nixl-cu12`" in (ROOT / "docs" / "operations.md").read_text()
