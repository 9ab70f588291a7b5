"""Read safetensors files: headers first, all of them checked; then one tensor at a time, without mapping the file.

Plain reads rather than a memory map, because pages of a map count as this process's memory until the kernel takes them
back, and because the bytes are hashed on the way.
Source: https://github.com/huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES
from headrace_core.errors import CheckpointError
from headrace_core.json_file import UnreadableError, is_there, parse_object, read_object
from headrace_core.scalar import SAFETENSORS

_MAX_HEADER_BYTES = 100_000_000
_MAX_SIDES = 64
"""As many as a torch tensor can have."""
_MAX_NAME = 200
"""Characters of a name or value that a message repeats."""
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
"""Files' endings, as weights are published in, too."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `offset` and `size` in bytes, from the file's start."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def read(self) -> Tensor:
        """Return the tensor as stored, in memory of its own.

        Raises:
            CheckpointError: DAMAGED_FILE if the file has become shorter; UNREADABLE_FILE.
        """
        data = torch.empty(self.size, dtype=torch.uint8)
        view = data.numpy().data if self.size else memoryview(b"")
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                done = 0
                while done < self.size:
                    count = file.readinto(view[done:])
                    if not count:
                        damaged(self.path, f"it ends inside tensor {self.name}")
                    done += count
        except OSError as error:
            raise _unreadable(self.path, error) from None
        return data.view(TORCH_DTYPES[SAFETENSORS[self.dtype]]).view(self.shape)


def damaged(path: Path, problem: str) -> NoReturn:
    """Refuse a file; always raises."""
    raise CheckpointError("DAMAGED_FILE", f"{path}: {problem}; download the checkpoint again")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError("UNREADABLE_FILE", str(UnreadableError(path, error)))


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint, by name, having read headers only.

    They are those of model.safetensors where that is there, as in transformers, else of the files that the index names.
    A tensor that several of these have is taken from the one for which the index names it.

    Raises:
        CheckpointError: DAMAGED_FILE if a file is missing, truncated or not in the format, its tensors overlap or leave
            a hole, or a name occurs twice and the index does not say which; UNREADABLE_FILE; UNSUPPORTED_MODEL if
            there are weights, but in other formats alone.
    """
    single = directory / "model.safetensors"
    if is_there(single):
        return {tensor.name: tensor for tensor in _read_header(single)}
    places = _read_index(directory)
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(set(places.values())):
        for tensor in _read_header(path):
            other = tensors.get(tensor.name)
            if other is None or places.get(tensor.name) == path:
                tensors[tensor.name] = tensor
            elif places.get(tensor.name) != other.path:
                damaged(
                    path, f"tensor {tensor.name} is in {other.path.name} too, and the index does not say which to take"
                )
    return tensors


def _read_index(directory: Path) -> dict[str, Path]:
    """Return where each tensor is, as model.safetensors.index.json says."""
    index = directory / "model.safetensors.index.json"
    if not is_there(index):
        _refuse_without_weights(directory)
    try:
        names = dict(read_object(index)["weight_map"].items())
        files = sorted(set(names.values()))
    except UnreadableError as error:
        raise CheckpointError("UNREADABLE_FILE", str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        damaged(index, f"it is no index of weights ({error!r})")
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not is_there(directory / name):
            damaged(directory, f"the index names {str(name)[:_MAX_NAME]!r}, which is not there")
    return {name: directory / file for name, file in names.items()}


def _refuse_without_weights(directory: Path) -> NoReturn:
    others = [name for name in sorted(os.listdir(directory)) if name.endswith(_OTHER_FORMATS)]
    if others:
        raise CheckpointError(
            "UNSUPPORTED_MODEL",
            f"{directory}: weights are there as {others[0][:_MAX_NAME]} alone; Headrace reads safetensors, as most "
            "models have them beside; transformers' save_pretrained writes them from the others",
        )
    damaged(directory, "neither model.safetensors nor model.safetensors.index.json is there")


def _read_header(path: Path) -> list[StoredTensor]:
    try:
        if not path.is_file():  # from a pipe nothing may ever come
            damaged(path, "it is a link to nothing, or no regular file")
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            header_size = int.from_bytes(file.read(8), "little")
            if file_size < 8 or not 0 < header_size <= min(_MAX_HEADER_BYTES, file_size - 8):
                damaged(path, "its header is cut off or it is no safetensors file")
            header = parse_object(file.read(header_size), "its header")
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        damaged(path, str(error))
    header.pop("__metadata__", None)
    tensors = [_parse_entry(path, name, entry, 8 + header_size) for name, entry in header.items()]
    _check_places(path, tensors, 8 + header_size, file_size)
    return tensors


def _check_places(path: Path, tensors: list[StoredTensor], begin: int, end: int) -> None:
    """Check that the tensors fill the file's bytes from `begin` to `end`, each behind another: none shared, none idle.

    As the format has it; where two overlap, one has the other's numbers.
    """
    place, last = begin, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset != place:
            damaged(path, f"tensor {tensor.name} begins at byte {tensor.offset}; {last} ends at {place}")
        place, last = tensor.offset + tensor.size, f"tensor {tensor.name}"
    if place != end:
        damaged(path, f"it has {end} bytes; {last} ends at {place}")


def _parse_entry(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not isinstance(shape, list) or len(cast("list[object]", shape)) > _MAX_SIDES:
            raise ValueError("its dtype or shape is of no use")
        sides = tuple(map(_count, cast("list[object]", shape)))
        begin, end = _count(begin), _count(end)
        size = math.prod(sides) * SAFETENSORS[dtype].itemsize if dtype in SAFETENSORS else end - begin
        if size < 0 or end - begin != size:
            raise ValueError(f"offsets {begin}..{end} do not fit {dtype} {shape}")
    except (KeyError, TypeError, ValueError) as error:
        damaged(path, f"its entry for tensor {name[:_MAX_NAME]} makes no sense ({error})")
    return StoredTensor(path, name, dtype, sides, base + begin, size)


def _count(value: object) -> int:
    """Return `value` if it is a whole number that a file can have so many of; True and 1.0 are none.

    Raises:
        ValueError: otherwise.
    """
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:_MAX_NAME]} is no size or place in a file")
    return value
