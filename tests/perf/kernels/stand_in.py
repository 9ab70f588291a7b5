"""Make a case's inputs elsewhere than on `cuda`: on `meta` to see what it launches, on the CPU to try it.

Nothing that is measured passes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InsteadOfCuda(TorchFunctionMode):
    """While in force, tensors that would be made on or moved to `cuda` are on `device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = torch.device(device)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See torch.overrides.TorchFunctionMode."""
        if func is Tensor.cuda:
            return args[0].to(self._device)
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": self._device}
        return func(*args, **kwargs)
