"""What this machine has, as its system tells it; nothing here decides anything, and nothing imports torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from headrace_client.cluster.cores import available_cores

PACKAGES = ("torch", "psutil", "triton", "nixl")
"""Those that decide what a worker can do."""

_TIMEOUT_S = 10.0
_INSTRUCTIONS = {
    "x86_64": {"AVX2": "avx2", "AVX-512": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX": "amx_tile"},
    "aarch64": {"NEON": "asimd"},
}
"""Sets of instructions that matter, and their names in /proc/cpuinfo."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. Empty, or 0: there is none, or the system does not say."""

    python: str
    executable: str
    system: str
    processor: str
    cores: int
    """That this process may use."""
    cores_in_all: int
    instructions: dict[str, bool]
    """Of those that matter on this kind of processor, whether it has them."""
    memory_bytes: int
    shm_bytes: int
    """Of /dev/shm."""
    nvidia_gpus: tuple[str, ...]
    amd_gpus: tuple[str, ...]
    rdma_devices: tuple[str, ...]
    packages: dict[str, str]
    """Versions of `PACKAGES`."""
    docker: str
    """Version of the engine that answers."""
    docker_problem: str
    compose: str


def look(root: Path = Path("/")) -> Machine:
    """Return what the machine has whose file systems are mounted at `root`; asks Docker's command, too."""
    processors = _processors(root / "proc/cpuinfo")
    first = processors[0] if processors else {}
    flags = (first.get("flags") or first.get("Features") or "").split()
    known = _INSTRUCTIONS.get(platform.machine().lower(), {}) if flags else {}
    docker, docker_problem = _docker()
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=first.get("model name", ""),
        cores=available_cores(),
        cores_in_all=len(processors),
        instructions={name: flag in flags for name, flag in known.items()},
        memory_bytes=_memory_bytes(root / "proc/meminfo"),
        shm_bytes=_size_bytes(root / "dev/shm"),
        nvidia_gpus=_nvidia_gpus(root / "proc/driver/nvidia/gpus"),
        amd_gpus=_amd_gpus(root / "sys/class/kfd/kfd/topology/nodes"),
        rdma_devices=tuple(path.name for path in _inside(root / "sys/class/infiniband")),
        packages={name: version_of(name) for name in PACKAGES},
        docker=docker,
        docker_problem=docker_problem,
        compose=_compose() if docker or docker_problem else "",
    )


def version_of(package: str) -> str:
    """Return the version of an installed package, without importing it; empty: it is not there."""
    if importlib.util.find_spec(package) is None:
        return ""
    for name in (package, *importlib.metadata.packages_distributions().get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def ask(*command: str) -> tuple[bool, str]:
    """Run a command; return whether it went well, and what it printed, or the last line of its complaint."""
    if shutil.which(command[0]) is None:
        return False, ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, errors="replace")
    except subprocess.TimeoutExpired:
        return False, f"no answer in {_TIMEOUT_S:.0f} s"
    except OSError as error:
        return False, str(error)
    if done.returncode:
        return False, last_line(done.stderr)
    return True, done.stdout.strip()


def last_line(complaint: str) -> str:
    """Return the last line of what a command wrote to standard error."""
    return (complaint.strip().splitlines() or ["it said nothing"])[-1]


def _docker() -> tuple[str, str]:
    went_well, said = ask("docker", "version", "--format", "{{.Server.Version}}")
    return (said, "") if went_well else ("", said)


def _compose() -> str:
    went_well, said = ask("docker", "compose", "version", "--short")
    return said if went_well else ""


def _processors(path: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for block in _text(path).strip().split("\n\n"):
        fields = [line.partition(":") for line in block.splitlines()]
        values = {name.strip(): value.strip() for name, _, value in fields}
        if "processor" in values:
            found.append(values)
    return found


def _memory_bytes(path: Path) -> int:
    for line in _text(path).splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    return 0


def _size_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return 0


def _nvidia_gpus(folder: Path) -> tuple[str, ...]:
    names: list[str] = []
    for gpu in _inside(folder):
        lines = _text(gpu / "information").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")] or [gpu.name]
    return tuple(names)


def _amd_gpus(folder: Path) -> tuple[str, ...]:
    """Return the nodes of AMD's driver that are no processors."""
    gpus = [node for node in _inside(folder) if _text(node / "gpu_id").strip() not in ("", "0")]
    return tuple(_text(node / "name").strip() or f"node {node.name}" for node in gpus)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
