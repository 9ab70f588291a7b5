"""Tensors that say `cuda` and have their data on the CPU.

A torch built for CPUs has nothing behind device `cuda`, and its C++ would look for it. So C++ is told `meta`, the one
device besides the CPU that every build knows, and Python `cuda:0`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)
_META = torch.device("meta")


class GpuTensor(Tensor):
    """A tensor of the pretended GPU; `on_host` holds its data. What C++ would do wrongly for `meta` is done here."""

    on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def __new__(cls, on_host: Tensor) -> GpuTensor:
        """Return a tensor of the shape of `on_host`, without data of its own."""
        # A view is one of inference mode where what it views is, whatever mode it is made in.
        with torch._C._InferenceMode(on_host.is_inference()):
            return torch.Tensor._make_wrapper_subclass(
                cls,
                on_host.size(),
                strides=on_host.stride(),
                storage_offset=on_host.storage_offset(),
                dtype=on_host.dtype,
                device=_META,
            )

    def __init__(self, on_host: Tensor) -> None:
        self.on_host = on_host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise RuntimeError(f"{func}: a tensor of the pretended GPU was used outside `pretend_gpu`")

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As on a machine with one GPU."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True."""
        return True

    @property
    def is_meta(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """False."""
        return False

    def get_device(self) -> int:
        """Return the GPU's number."""
        return 0

    def data_ptr(self) -> int:
        """Return where the data lie, though on the host."""
        return self.on_host.data_ptr()

    def tolist(self) -> Any:
        """Copy to the host, as a list."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as torch does, unless a copy is asked for."""
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
        return self.cpu().numpy()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        # torch makes a number a tensor of the host, which it copies, or fills with.
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype)
        super().__setitem__(_with_tensors(index), value)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else str(self)

    def __repr__(self, **_options: Any) -> str:
        return f"GpuTensor({self.on_host!r})"


def _with_tensors(index: Any) -> Any:
    """Return an index with tensors of the host in place of lists."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(
        torch.tensor(part, dtype=None if part else torch.int64) if isinstance(part, list) else part for part in parts
    )
