"""A device apart from the CPU where there is none: plain torch on it raises where a GPU's tensors and the host's mix.

Tensors "on" it say `meta`, the one device besides the CPU that every build of torch knows, and hold their data on the
CPU, so that code that reads values goes on. What a GPU takes from the host is taken: numbers, copies, tensors without
dimensions, and indices. Nothing else is like a GPU: no kernel runs on it, and nothing is asynchronous. Judge devices by
it, not values: torch fills an index that is a list without asking us, and so with nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = "meta"
_COPIES = {"aten::copy_", "aten::_to_copy"}
_TAKES_BOTH = _COPIES | {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class DevicesMixedError(RuntimeError):
    """An operation got tensors of the device and of the host, or was to write one's into the other's."""


@contextmanager
def pretend_device() -> Generator[None]:
    """Let `device=DEVICE` mean the pretended device on this thread."""
    with _Constructors(), _Operations():
        yield


class _OnDevice(torch.Tensor):
    """A tensor on the pretended device; `on_host` holds its data."""

    on_host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device=DEVICE,
        )

    def __init__(self, on_host):
        self.on_host = on_host

    def __repr__(self):
        return f"_OnDevice({self.on_host!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})

    # torch's own would read memory that this tensor does not have.
    def tolist(self):
        return self.on_host.tolist()


class _Constructors(TorchFunctionMode):
    """`torch.tensor` fills its memory itself, unseen by a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; the result is on the device that is asked for, else on the arguments'."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, _OnDevice)]
    is_mixed = bool(ours) and any(tensor.dim() > 0 and not isinstance(tensor, _OnDevice) for tensor in tensors)
    # A tensor on the host takes nothing but copies from the device: no result, no index.
    is_first_ours = bool(args) and isinstance(args[0], _OnDevice)
    if is_mixed and (name not in _TAKES_BOTH or (name not in _COPIES and not is_first_ours)):
        places = ", ".join(f"{tensor.device.type} {tuple(tensor.shape)}" for tensor in tensors)
        raise DevicesMixedError(f"{name} got tensors of two devices: {places}")
    is_result_ours = is_first_ours if name in _COPIES else bool(ours)
    if kwargs.get("device") is not None:
        is_result_ours = torch.device(kwargs["device"]).type == DEVICE
        kwargs = {**kwargs, "device": "cpu"}
    on_host_args, on_host_kwargs = tree_map_only(_OnDevice, lambda tensor: tensor.on_host, (args, kwargs))
    result = func(*on_host_args, **on_host_kwargs)
    if not is_result_ours:
        return result
    known = {id(tensor.on_host): tensor for tensor in ours}
    return tree_map_only(torch.Tensor, lambda each: known[id(each)] if id(each) in known else _OnDevice(each), result)
