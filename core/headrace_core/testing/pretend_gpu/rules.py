"""What torch on a GPU takes from the host, and what makes the host wait.

Everything else that mixes the two raises. The rules are those of torch's CUDA code; `tests/unit/test_pretend_gpu.py`
has a breach of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}

# Their results' size, or a number for the host, depends on values. An index that is a mask is one, too.
_READS_VALUES = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::allclose",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::multinomial",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::unique_dim_consecutive",
}


class DevicesMixedError(RuntimeError):
    """An operation got tensors of the device and of the host, or was to write one's into the other's."""


def check_devices(name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Refuse `tensors`, all those that operation `name` got, if they are not of one device.

    The device takes from the host tensors without dimensions, as numbers, and indices; the host takes nothing.

    Raises:
        DevicesMixedError: they mix.
    """
    on_gpu = [tensor.is_cuda for tensor in tensors]
    if not any(on_gpu):
        return
    is_first_ours = isinstance(args[0], Tensor) and args[0].is_cuda
    if name in INDEXING:
        is_value_ours = len(args) < 3 or args[2].is_cuda or args[2].dim() == 0
        is_mixed = not is_first_ours or not is_value_ours
    else:
        is_mixed = any(tensor.dim() > 0 and not ours for tensor, ours in zip(tensors, on_gpu, strict=True))
        # In place: what has no dimensions on the host takes no results of the device.
        is_mixed |= isinstance(args[0], Tensor) and name.endswith("_") and not is_first_ours
    if is_mixed:
        places = ", ".join(f"{tensor.device.type} {tuple(tensor.shape)}" for tensor in tensors)
        raise DevicesMixedError(f"{name} got tensors of two devices: {places}")


def check_generator(generator: torch.Generator, *, is_gpu: bool) -> None:
    """Refuse to draw on one device by the generator of the other, with torch's RuntimeError."""
    if (generator.device.type == "cuda") != is_gpu:
        wanted = "cuda" if is_gpu else "cpu"
        raise RuntimeError(f"expected a {wanted!r} device type for generator but found {generator.device.type!r}")


def wait_of(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Return what the host must know to launch `name` on the device; None if nothing."""
    if name in _READS_VALUES or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
        return f"{name} reads values"
    if name in INDEXING and any(_is_mask(index) for index in args[1]) and not _is_masked_fill(args):
        return f"{name} by a mask reads which it selects"
    return None


def copied_to_device(name: str, args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors on the host that `name` copies to the device before it launches: indices, a value."""
    if name not in INDEXING or not args[0].is_cuda:
        return []
    value = [] if len(args) < 3 or _is_masked_fill(args) else [args[2]]
    return [each for each in (*args[1], *value) if each is not None and not each.is_cuda]


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _is_masked_fill(args: Sequence[Any]) -> bool:
    """One number, from the host, put where one mask says: torch fills, and counts nothing."""
    is_number = len(args) >= 3 and args[2].numel() == 1 and not args[2].is_cuda
    indices = [index for index in args[1] if index is not None]
    is_accumulated = len(args) > 3 and args[3]
    return is_number and len(indices) == 1 and _is_mask(indices[0]) and indices[0].is_cuda and not is_accumulated
