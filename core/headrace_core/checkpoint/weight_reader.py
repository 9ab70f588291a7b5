"""Hand out a checkpoint's weights one at a time, in the compute type; hash and check them on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import NoReturn

import torch
import xxhash
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.finite import is_finite
from torch import Tensor

from headrace_core.checkpoint.check_tensors import SCALE_SUFFIX
from headrace_core.checkpoint.safetensors_file import StoredTensor
from headrace_core.errors import CheckpointError
from headrace_core.families.config import ModelConfig
from headrace_core.families.weights import Shard
from headrace_core.scalar import SAFETENSORS, Scalar


class WeightReader:
    """Reads each tensor once, when the network being built asks for it; nothing else is held."""

    def __init__(
        self,
        stored: dict[str, StoredTensor],
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: str,
        on_progress: Callable[[int], None] = lambda _: None,
        expected: Mapping[str, str] | None = None,
    ) -> None:
        """Read what `stored` names. `expected` are the digests of tensors that were read before: they must be the same.

        See `load_model` for the rest.
        """
        self._expected = expected or {}
        self._stored = stored
        self._config = config
        self._dtype = dtype
        self._device = device
        self._on_progress = on_progress
        self.digests: dict[str, str] = {}
        """xxh3-128 of the bytes of each tensor that was read, here or by another rank of a group."""

    def take(self, name: str, dtype: torch.dtype | None = None, shard: Shard | None = None) -> Tensor:
        """Return tensor `name` as `dtype` (default: the compute type), dequantised if it is block-FP8.

        Of a `shard` no more is kept than that; all is read, since a fingerprint is over whole tensors.

        Raises:
            CheckpointError: DAMAGED_FILE, also where it is not what was expected; NON_FINITE_WEIGHT, a value is NaN or
                infinite, as stored or as `dtype`.
        """
        stored = tensor = self._read(name)
        scale: Tensor | None = None
        if tensor.dtype == torch.float8_e4m3fn:
            scale = self._read(name + SCALE_SUFFIX)
            tensor = self._block_fp8(tensor, scale).to(dtype or self._dtype)
        if shard is not None:
            # A copy: a view would hold the whole.
            tensor = tensor.narrow(shard.axis, shard.start, shard.stop - shard.start).clone()
        tensor = tensor.to(device=self._device, dtype=dtype or self._dtype)
        if not is_finite(tensor):
            _refuse(name, stored, scale, tensor)
        return tensor

    def take_block_fp8(self, name: str, shard: Shard | None = None) -> BlockFp8:
        """Return tensor `name`, which is stored in block-FP8, as it is, on the device; of a `shard` no more than that.

        Raises:
            CheckpointError: DAMAGED_FILE; NON_FINITE_WEIGHT.
        """
        stored, scale = self._read(name), self._read(name + SCALE_SUFFIX)
        found = self._block_fp8(stored, scale)
        # A float8 knows no infinity: not finite is one value, NaN, with either sign.
        if not (is_finite(found.scales) and bool((stored.view(torch.uint8) & 0x7F != 0x7F).all())):
            _refuse(name, stored, scale, found.scales)
        if shard is not None:
            found = found.narrow(shard.axis, shard.start, shard.stop - shard.start)
        return found._replace(values=found.values.to(self._device), scales=found.scales.to(self._device))

    def is_block_fp8(self, name: str) -> bool:
        """Return whether tensor `name` is stored in block-FP8."""
        return SAFETENSORS.get(self._stored[name].dtype) is Scalar.FLOAT8_E4M3

    def _block_fp8(self, values: Tensor, scale: Tensor) -> BlockFp8:
        assert self._config.fp8_block is not None, "check_tensors lets FP8 pass only with blocks"
        return BlockFp8(values, scale.float(), self._config.fp8_block)

    def empty(self, *shape: int) -> Tensor:
        """Return memory for weights of the compute type, on the device."""
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def digest(self, name: str) -> str:
        """Return xxh3-128 of the bytes of `name`, reading them if nobody has."""
        if name not in self.digests:
            self._read(name)
        return self.digests[name]

    def fingerprint(self, *, leaving_out: Collection[str] = ()) -> str:
        """Return xxh3-128, in hexadecimal, over config, compute type, and every tensor taken: name, type, shape, bytes.

        How the checkpoint is cut into files does not matter. Neither does what chooses no token: whether MTP is run,
        and the tensors of these names.
        """
        whole = xxhash.xxh3_128()
        config = {name: value for name, value in asdict(self._config).items() if name != "num_run_mtp_layers"}
        whole.update(json.dumps(config, sort_keys=True).encode())
        whole.update(str(self._dtype).encode())
        for name in sorted(self.digests.keys() - set(leaving_out)):
            tensor = self._stored[name]
            whole.update(f"\n{name} {tensor.dtype} {tensor.shape} {self.digests[name]}".encode())
        return whole.hexdigest()

    def _read(self, name: str) -> Tensor:
        tensor = self._stored[name].read()
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        digest = self.digests[name] = xxhash.xxh3_128_hexdigest(data)
        if self._expected.get(name, digest) != digest:
            path = self._stored[name].path
            raise CheckpointError("DAMAGED_FILE", f"{path}: tensor {name} is not what was loaded of it before")
        self._on_progress(self._stored[name].size)
        return tensor


def _refuse(name: str, stored: Tensor, scale: Tensor | None, tensor: Tensor) -> NoReturn:
    """Say which of a weight's values are not finite: those of the file, of its scales, or only what became of them."""
    for place, values in ((name, stored), (name + SCALE_SUFFIX, scale)):
        is_bad = torch.empty(0) if values is None else ~values.float().isfinite()
        count = int(is_bad.count_nonzero())
        if count:
            raise CheckpointError(
                "NON_FINITE_WEIGHT",
                f"tensor {place}: {count} of {is_bad.numel()} values are NaN or infinite, the first at "
                f"{is_bad.nonzero()[0].tolist()}; the file is damaged or its training diverged: compare it with its "
                "source, or download it again",
            )
    count = int((~tensor.isfinite()).count_nonzero())
    raise CheckpointError(
        "NON_FINITE_WEIGHT",
        f"tensor {name}: {count} of {tensor.numel()} values are larger than {tensor.dtype} can hold; "
        "use another --dtype: bfloat16 and float32 reach farther than float16",
    )
