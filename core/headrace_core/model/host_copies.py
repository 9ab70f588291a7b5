"""Small copies between the host and a model's device, such that the host never waits for the device but once a step.

A copy out of ordinary (pageable) memory waits for everything launched before it. So what goes to a GPU goes from pinned
memory, in stream order, and its copy is left behind at once; what comes back from it comes in one piece. The pinned
memory is torch's: it is given to nobody else before the copies that use it are done.

On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Return `values`, which lie on the host, on `device`; the same tensor if that is the CPU."""
    if torch.device(device).type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def copy_to_device(values: Tensor, target: Tensor) -> None:
    """Set `target`, of the same shape and dtype and contiguous, to `values`, which lie on the host."""
    target.copy_(values if target.device.type == "cpu" else values.pin_memory(), non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors' values on the host, when what was launched so far is done: one copy, one wait.

    Args:
        tensors: at least one, all on one device, the widest dtypes first: each then lies aligned behind the others.

    Returns:
        Tensors of the same shapes and dtypes; on a CPU the same tensors.
    """
    if tensors[0].device.type == "cpu":
        return list(tensors)
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    packed = parts[0] if len(parts) == 1 else torch.cat(parts)
    found = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
    found.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    arrived.synchronize()
    pieces = found.split([len(part) for part in parts])
    return [piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


class HostBuffer:
    """Memory on the host, zero at first, that copies to and from a device begin with and nobody waits for until `wait`.

    Pinned for a GPU, ordinary for a CPU. `values` may be read and written after `wait`, until the next copy begins.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> None:
        is_cuda = torch.device(device).type == "cuda"
        self.values = torch.zeros(tuple(shape), dtype=dtype, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None

    def receive(self, tensor: Tensor) -> None:
        """Begin to copy `tensor`, of the same dtype, to the first rows, behind what was launched so far."""
        self.values[: len(tensor)].copy_(tensor, non_blocking=True)
        self._record()

    def send(self, num_rows: int, device: torch.device) -> Tensor:
        """Return the first rows on `device`, there before what is launched next; on a CPU the same memory."""
        sent = self.values[:num_rows].to(device, non_blocking=True)
        self._record()
        return sent

    def wait(self) -> None:
        """Return when all copies that began are done."""
        if self._copied and not self._copied.query():
            self._copied.synchronize()

    def _record(self) -> None:
        if self._copied:
            self._copied.record()
