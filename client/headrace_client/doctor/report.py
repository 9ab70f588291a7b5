"""The report in words: rows of a name and what is to be said of it, at any width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace_client.cluster.local_cluster import LocalCluster
from headrace_client.commands.terminal import format_bytes
from headrace_client.doctor.machine import Machine

Rows = dict[str, str]
"""What is said, by what it is said of."""


def machine_rows(machine: Machine) -> Rows:
    """Return what the machine has."""
    has = [name for name, is_there in machine.instructions.items() if is_there]
    lacks = [name for name, is_there in machine.instructions.items() if not is_there]
    packages = [f"{name} {version}" for name, version in machine.packages.items() if version]
    absent = [name for name, version in machine.packages.items() if not version]
    docker = f"{machine.docker}, compose {machine.compose or 'none'}" if machine.docker else "none"
    return {
        "Python": f"{machine.python}, {machine.executable}",
        "system": machine.system,
        "cores": f"{machine.cores} of {machine.cores_in_all or 'an unknown number'} for this process"
        + (f"; {machine.processor}" if machine.processor else ""),
        "instructions": _with_absent(has, lacks),
        "memory": f"{_size(machine.memory_bytes)}; /dev/shm {_size(machine.shm_bytes)}",
        "GPUs": ", ".join((*machine.nvidia_gpus, *machine.amd_gpus)) or "none",
        "RDMA": ", ".join(machine.rdma_devices) or "none",
        "packages": _with_absent(packages, absent),
        "Docker": f"its engine does not answer: {machine.docker_problem}" if machine.docker_problem else docker,
    }


def worker_rows(worker: dict[str, Any]) -> Rows:
    """Return what a worker uses that is given no options."""
    compiled, torch = worker["compiled"], worker["torch"]
    return {
        "device": f"{worker['device']}; `headrace up --device` takes cpu or cuda",
        "torch": _torch(torch),
        "kernels": _kernels(worker),
        "compiler": f"{compiled['compiler']} would build them" if compiled["compiler"] else compiled["no_compiler"],
        "threads": _threads(worker["threads"]),
        "dtype": f"{_auto(worker['dtype'], 'as its checkpoint')}; compiled kernels take {_listed(compiled['dtypes'])}",
        "weights": _auto(worker["weights_dtype"], "dtype of the compute"),
        "KV cache": _auto(worker["kv_cache_dtype"], "dtype of the compute"),
        "memory": f"{format_bytes(worker['free_bytes'])} free for weights, pages and a margin",
        "transport": _transport(worker),
    }


def render(title: str, rows: Rows) -> RenderableType:
    """Return the rows under their title."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in rows.items():
        table.add_row(Text(f"  {name}"), Text(said))
    return Group(Text(title, style="bold"), table)


def _with_absent(has: list[str], lacks: list[str]) -> str:
    if not has and not lacks:
        return "unknown"
    return "; ".join(filter(None, [_listed(has), f"not {_listed(lacks)}" if lacks else ""]))


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def _size(size_bytes: int) -> str:
    return format_bytes(size_bytes) if size_bytes else "unknown"


def _auto(value: str, means: str) -> str:
    return means if value == "auto" else value


def _torch(torch: dict[str, Any]) -> str:
    built = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['rocm']}" if torch["rocm"] else "CPUs alone"
    gpus = [f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}" for gpu in torch["gpus"]]
    return f"{torch['version']}, for {built}; sees {'; '.join(gpus) or 'no GPU'}"


def _kernels(worker: dict[str, Any]) -> str:
    name, families = worker["kernels"], worker["families"]
    if name == "reference":
        return f"plain torch; {worker['compiled']['problem'] or 'it is asked for'}"
    compiled = worker["compiled"]
    what = f"compiled for {_listed(compiled['sets'])}, on {compiled['isa']} here" if name == "cpu" else name
    share = f"{families.get(name, 0)} of {sum(families.values())} families, the others on the next best"
    return "; ".join(filter(None, [f"{what}: {share}", worker["kernels_problem"]]))


def _threads(alone: int) -> str:
    cluster = LocalCluster(Path())
    return f"{alone}; `headrace up` gives its {cluster.num_workers} workers {cluster.threads_each()} each"


def _transport(worker: dict[str, Any]) -> str:
    problems = [f"not {name}: {why}" for name, why in worker["transport_problems"].items() if why]
    return "; ".join([", then ".join(worker["transports"]), *problems])
