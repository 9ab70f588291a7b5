"""Run an operation on the data of GPU tensors: now, or at every replay of the graph that is being captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace_core.testing.pretend_gpu import graph, journal
from headrace_core.testing.pretend_gpu.memory import poison
from headrace_core.testing.pretend_gpu.tensor import GpuTensor
from headrace_core.testing.pretend_gpu.trees import map_tensors, tensors_of

_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


def launch(func: Any, args: Any, kwargs: dict[str, Any], *, is_to_gpu: bool) -> Any:
    """Return what `func` gives, on the GPU if `is_to_gpu`; tensors that it wrote to are those that were given."""
    given = {id(each.on_host): each for each in tensors_of((args, kwargs)) if isinstance(each, GpuTensor)}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if is_to_gpu and kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    if graph.is_capturing():
        # Numbers of the host are the same in every replay.
        args, kwargs = map_tensors(lambda each: each if isinstance(each, GpuTensor) else each.clone(), (args, kwargs))
    args, kwargs = on_host((args, kwargs))
    name: str = func._schema.name
    if name in _ALLOCATIONS:
        result = func(*args, **kwargs)
        result = poison(result) if is_to_gpu else result
    elif func.is_view:
        result = func(*args, **kwargs)
    elif graph.is_capturing():
        result = _kept(func, args, kwargs)
    else:
        if name != "aten::_local_scalar_dense":
            journal.note_launch(name)
        result = func(*args, **kwargs)
    return map_tensors(lambda each: _on_gpu(each, given), result) if is_to_gpu else result


def on_host(tree: Any) -> Any:
    """Return `tree` with their data in place of GPU tensors."""
    return map_tensors(lambda tensor: tensor.on_host if isinstance(tensor, GpuTensor) else tensor, tree)


def _on_gpu(tensor: Tensor, given: dict[int, GpuTensor]) -> GpuTensor:
    known = given.get(id(tensor))
    if known is None:
        return GpuTensor(tensor)
    if known.shape != tensor.shape or known.stride() != tensor.stride():
        raise NotImplementedError("the pretended GPU knows no operation that gives a tensor another shape in place")
    return known


def _kept(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Keep `func` for the replays; return what it writes to, or memory for what it gives."""
    written = _written(func, args, kwargs)
    if written:
        graph.keep(lambda: func(*args, **kwargs))
        num_results = len(func._schema.returns)
        return written[0] if num_results == 1 else tuple(written) if num_results else None
    # Of zeros, which are indices of everything, the results have the same shapes.
    results = func(*map_tensors(_zeros, args), **map_tensors(_zeros, kwargs))
    map_tensors(poison, results)

    def run() -> None:
        for kept, found in zip(tensors_of(results), tensors_of(func(*args, **kwargs)), strict=True):
            kept.copy_(found)

    graph.keep(run)
    return results


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that `func` writes to, in the schema's order."""
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_of(args[place] if place < len(args) else kwargs[argument.name])
    return found


def _zeros(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).zero_()
