"""What torch's operations do on the pretended GPU.

They are seen where C++ hands them to a backend, when composite ones were taken apart: as the CUDA backend gets them.
`Functions` sees before that the few calls which C++ would not hand on as it does for CUDA.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from headrace_core.testing.pretend_gpu import rules, under_way
from headrace_core.testing.pretend_gpu.copies import copy_, to_copy, to_device
from headrace_core.testing.pretend_gpu.launches import launch
from headrace_core.testing.pretend_gpu.memory import is_pinned, pin
from headrace_core.testing.pretend_gpu.streams import current_stream
from headrace_core.testing.pretend_gpu.tensor import DEVICE, GpuTensor
from headrace_core.testing.pretend_gpu.trees import tensors_of

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class Functions(TorchFunctionMode):
    """Brings every way to a copy from the host to `Tensor.to`, and knows who means the device `meta` itself."""

    is_meta_meant = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and _is(device, "cuda"):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.new_tensor:
            like, *rest = args
            return torch.tensor(*rest, **{"dtype": like.dtype, "device": "cpu", **kwargs}).to(device or like.device)
        if func is Tensor.cuda:
            return _cuda(*args, **kwargs)
        if func is Tensor.to:
            # C++ would ask CUDA for the number of a device without one.
            args = tuple(DEVICE if _is(each, "cuda") else each for each in args)
            device = next((each for each in args[1:] if _is(each, "meta")), device)
            if _is(device, "meta") and isinstance(args[0], GpuTensor):
                # To C++ it is one already.
                args = (args[0].on_host, *args[1:])
        if _is(device, "cuda"):
            kwargs = {**kwargs, "device": DEVICE}
        if kwargs.get("generator") is not None:
            is_ours = isinstance(args[0], GpuTensor) if args and isinstance(args[0], Tensor) else _is(device, "cuda")
            rules.check_generator(kwargs["generator"], is_gpu=is_ours)
        self.is_meta_meant = _is(device, "meta")
        try:
            return func(*args, **kwargs)
        finally:
            self.is_meta_meant = False


class Operations(TorchDispatchMode):
    """Runs what any of its operands or its device puts on the GPU there, by the GPU's rules."""

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self._functions = functions

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and to say so to the compiler would import it, which takes seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_composite(func):
            # In inference mode they come as they are. C++ takes them apart; `func.decompose` may be Python's other way.
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        name: str = func._schema.name
        tensors = tensors_of((args, kwargs))
        ours = any(isinstance(tensor, GpuTensor) for tensor in tensors)
        is_to_gpu = ours
        if kwargs.get("device") is not None:
            is_to_gpu = self._is_gpu(torch.device(kwargs["device"]))
            kwargs["device"] = DEVICE if is_to_gpu else kwargs["device"]
        if name == "aten::_to_copy" and ours != is_to_gpu:
            return to_copy(func, args[0], kwargs)
        if name == "aten::copy_" and len({isinstance(tensor, GpuTensor) for tensor in tensors}) > 1:
            return copy_(*args, **kwargs)
        if not ours and not is_to_gpu:
            return _on_host(func, name, args, kwargs)
        rules.check_devices(name, args, tensors)
        for tensor in rules.copied_to_device(name, args):
            to_device(tensor, non_blocking=False)
        reason = rules.wait_of(name, args, kwargs)
        if reason:
            under_way.wait(reason, under_way.behind(current_stream()))
        return launch(func, args, kwargs, is_to_gpu=is_to_gpu)

    def _is_gpu(self, device: torch.device) -> bool:
        # C++ says `meta` of what it puts beside one of our tensors.
        return device.type == "cuda" or (device.type == "meta" and not self._functions.is_meta_meant)


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


def _on_host(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of the host, which a build for CPUs refuses to give pinned memory."""
    if name == "aten::is_pinned":
        return is_pinned(args[0])
    if name == "aten::_pin_memory":
        return pin(args[0].clone())
    is_to_be_pinned = kwargs.pop("pin_memory", None)
    result = func(*args, **kwargs)
    return pin(result) if is_to_be_pinned else result


def _cuda(tensor: Tensor, device: Any = None, non_blocking: bool = False) -> Tensor:
    return tensor.to(DEVICE, non_blocking=non_blocking)


def _is(device: object, kind: str) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == kind
