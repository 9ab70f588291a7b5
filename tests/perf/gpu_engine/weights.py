"""Random weights of a network: made where they are needed, or written as a checkpoint in shards."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES
from headrace_core.families.config import ModelConfig
from headrace_core.families.table import weights
from headrace_core.families.weights import Shard
from headrace_core.model.build import build_network, num_weight_bytes
from headrace_core.model.model import Model, ModelIdentity
from headrace_core.scalar import Scalar
from headrace_core.testing.tiny_checkpoints import random_tensor
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 << 30
_SPARE_BYTES = 1 << 30
_ADDED_TO_RESIDUAL = ("o_proj.weight", "down_proj.weight")

OnBytes = Callable[[int, int], None]
"""Told of progress: bytes done, bytes in all."""


class NotPossibleError(RuntimeError):
    """This machine lacks what a measurement needs; the message says what."""


class _Draw:
    """Draws a network's weights one after another, the same ones for the same device.

    What a layer adds to the residual stream is small, as in trained networks: with additions as large as the stream
    itself 27 layers multiply bf16's rounding, and no two correct ways of computing agree.
    """

    def __init__(self, config: ModelConfig, device: str) -> None:
        self.shapes = {weight.name: weight.shape for weight in weights(config)}
        self._generator = torch.Generator(device).manual_seed(0)
        self._scale = 1 / math.sqrt(2 * config.num_layers)

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = random_tensor(name, self.shapes[name], self._generator, dtype)
        return tensor.mul_(self._scale) if name.endswith(_ADDED_TO_RESIDUAL) else tensor


class RandomWeights:
    """`WeightSource` that draws each weight on `device` when it is asked for."""

    def __init__(self, config: ModelConfig, *, device: str, on_bytes: OnBytes) -> None:
        self._draw = _Draw(config, device)
        self._dtype = TORCH_DTYPES[Scalar(config.checkpoint_dtype)]
        self._device = device
        self._on_bytes = on_bytes
        self._done, self._total = 0, num_weight_bytes(config, self._dtype)

    def take(self, name: str, dtype: torch.dtype | None = None, shard: Shard | None = None) -> Tensor:
        """Return random values for weight `name`, of which nobody has a part."""
        assert shard is None
        tensor = self._draw(name, dtype or self._dtype)
        self._done += tensor.nbytes
        self._on_bytes(self._done, self._total)
        return tensor

    def empty(self, *shape: int) -> Tensor:
        """Return memory for weights."""
        return torch.empty(shape, dtype=self._dtype, device=self._device)


def random_model(config: ModelConfig, *, device: str, on_bytes: OnBytes) -> Model:
    """Return a network of random weights that never were on a disk."""
    source = RandomWeights(config, device=device, on_bytes=on_bytes)
    dtype = TORCH_DTYPES[Scalar(config.checkpoint_dtype)]
    identity = ModelIdentity("random", dtype, num_weight_bytes(config, dtype))
    return Model(config, identity, build_network(config, source))


def write_random_checkpoint(
    folder: Path, config: ModelConfig, *, device: str, on_bytes: OnBytes, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write random weights, drawn on `device`, beside the config.json in `folder`; a shard at a time is held.

    Raises:
        NotPossibleError: the disk has too little room.
    """
    dtype = TORCH_DTYPES[Scalar(config.checkpoint_dtype)]
    total = num_weight_bytes(config, dtype)
    check_disk(folder, total)
    draw = _Draw(config, device)
    shards = list(shards_of(draw.shapes, dtype.itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    done = 0
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: draw(name, dtype).cpu() for name in names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file_name))
        done += sum(tensor.nbytes for tensor in tensors.values())
        on_bytes(done, total)
    index = {"metadata": {"total_size": done}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shards_of(shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> Iterator[list[str]]:
    """Yield the names of each shard, in order; a tensor larger than `shard_bytes` has one of its own."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if names and size + num_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    if names:
        yield names


def check_disk(folder: Path, num_bytes: int) -> None:
    """Check that `folder` has room for `num_bytes` and some more.

    Raises:
        NotPossibleError: it has not, with the figures.
    """
    free = shutil.disk_usage(folder).free
    needed = num_bytes + _SPARE_BYTES
    if needed > free:
        raise NotPossibleError(
            f"{folder} has {free / 1e9:.1f} GB free; a checkpoint of {num_bytes / 1e9:.1f} GB and 1 GB to spare lack "
            f"{(needed - free) / 1e9:.1f} GB: name another --folder, or shrink it with --layers"
        )
