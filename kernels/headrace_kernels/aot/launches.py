"""Find the families' cases, record what they launch, and specialise it as a launch on a GPU would."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import headrace_kernels.aot.cases
from headrace_kernels.aot.case import AotCase
from headrace_kernels.backend import use_backend
from headrace_kernels.gpu.launch import Launch, Target, recording

TARGETS: dict[Target, GPUTarget] = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}

_FOLDER = Path(next(iter(headrace_kernels.aot.cases.__path__)))


@dataclass(frozen=True, slots=True)
class Job:
    """One launch, by where it is found: the `launch`-th of the `case`-th of `family`, recorded for `target`."""

    family: str
    case: int
    launch: int
    target: Target


@dataclass(frozen=True, slots=True)
class Specialised:
    """A launch as the compiler takes it. Equal `key` means equal machine code."""

    source: Any
    options: dict[str, Any]
    key: str


class _Pointer:
    """What Triton asks of a tensor argument, answered for a meta tensor as if its storage began at an aligned address.

    A meta tensor itself answers 0 for every address, so that a view at an odd offset would look aligned.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset_bytes = int(tensor.storage_offset()) * tensor.element_size()
        self._storage_bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._offset_bytes

    def ptr_range(self) -> int:
        return self._storage_bytes


def find_families() -> list[str]:
    """Return the names of the families that have AOT cases, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem != "__init__")


@cache
def cases(family: str) -> list[AotCase]:
    """Return the cases of a family; ValueError if there is no such family or it has none."""
    if family not in find_families():
        raise ValueError(f"no kernel family {family!r} with AOT cases; there are: {', '.join(find_families())}")
    return importlib.import_module(f"headrace_kernels.aot.cases.{family}").aot_cases()


@cache
def recorded(family: str, case: int, target: Target) -> list[Launch]:
    """Return what a case launches when it runs for `target`."""
    with use_backend("triton"), recording(target) as launches:
        cases(family)[case].run()
    return launches


def keyed_jobs(families: Sequence[str], targets: Sequence[Target]) -> tuple[dict[Job, str], list[str]]:
    """Return every launch of the families with its key, and a message for each case that cannot be recorded.

    A launch whose arguments do not bind gets a key of its own: compiling it will say why.
    """
    keys: dict[Job, str] = {}
    messages: list[str] = []
    for family in families:
        for index, case in enumerate(cases(family)):
            for target in targets:
                where = f"{family}, case '{case.name}', {target}"
                try:
                    launches = recorded(family, index, target)
                except Exception as error:  # noqa: BLE001 - a case's code is a family's own, the others still count
                    messages.append(f"{where}: the call fails on meta tensors: {type(error).__name__}: {error}")
                    continue
                if not launches:
                    messages.append(f"{where}: the call launches nothing: check that its entry asks for the backend")
                for nth, launch in enumerate(launches):
                    job = Job(family, index, nth, target)
                    keys[job] = _key(launch, target) or repr(job)
    return keys, messages


def _key(launch: Launch, target: Target) -> str | None:
    try:
        return specialise(launch, target).key
    except Exception:  # noqa: BLE001 - whatever Triton says of wrong arguments, compiling says again
        return None


def specialise(launch: Launch, target: Target) -> Specialised:
    """Bind a launch's arguments the way Triton's launcher does, with Triton's own functions.

    So the compiler gets the same types, constants and divisibilities as in a launch on that GPU: an integer 1 and None
    become constants, integers and addresses divisible by 16 are known to be.
    """
    backend = make_backend(TARGETS[target])
    arguments = _with_pointers(launch.args)
    keywords: dict[str, Any] = dict(launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = bind(*arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, extra)
    source = ASTSource(kernel, signature, constants, attributes)
    key = hashlib.sha256(f"{target}-{source.hash()}-{sorted(options.__dict__.items())}".encode()).hexdigest()
    return Specialised(source, options.__dict__, key)


def _with_pointers(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments with a `_Pointer` for each tensor, also in tuples among them."""
    return tuple(
        _Pointer(a) if isinstance(a, Tensor) else _with_pointers(a) if isinstance(a, tuple) else a for a in arguments
    )


def tile_text(launch: Launch) -> str:
    """Return a launch's integer constants and options as text, for messages."""
    sizes = {name: value for name, value in launch.constants.items() if type(value) is int}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return ", ".join(f"{name}={value}" for name, value in (sizes | options).items())


def versions() -> dict[str, str]:
    """Return the versions that the machine code depends on."""
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__}
