"""The check that a checkpoint holds the tensors of its config, and just those."""

from __future__ import annotations

import re

from headrace_core.checkpoint.safetensors_file import StoredTensor
from headrace_core.errors import CheckpointError
from headrace_core.families.config import ModelConfig
from headrace_core.families.table import FAMILIES, weights
from headrace_core.scalar import COMPUTE, SAFETENSORS, Scalar

_SCALES = (*COMPUTE, Scalar.FLOAT8_E8M0)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Buffers that old checkpoints carry and that follow from the config.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_SHARED = ".mlp.shared_experts."
SCALE_SUFFIX = "_scale_inv"


def check_tensors(config: ModelConfig, stored: dict[str, StoredTensor]) -> list[str]:
    """Return the names to load, in a fixed order, after checking that the checkpoint holds what its config says.

    Block-FP8 weights bring their scales: `<name>_scale_inv` follows `<name>`. Tensors of multi-token-prediction layers
    that are not run are recognised and left out, and so are the copies that they have of embedding and head.

    Raises:
        CheckpointError: MISSING_TENSOR, EXTRA_TENSOR, BAD_TENSOR_SHAPE or UNSUPPORTED_MODEL, naming the tensor.
    """
    names: list[str] = []
    tree, others = weights(config), FAMILIES[config.family].other_parts
    for weight in tree:
        name, shape = weight.name, weight.shape
        _check_tensor(stored.get(name), name, shape)
        names.append(name)
        if SAFETENSORS.get(stored[name].dtype) is Scalar.FLOAT8_E4M3:
            names.append(_check_scale(config, stored, name, shape))
        else:
            _check_float(name, stored)
    head = f"{tree.root}lm_head.weight"
    if config.is_embedding_tied and head in stored:
        _check_tensor(stored[head], head, (config.vocab_size, config.hidden_size))
    known = {*names, head} if config.is_embedding_tied else set(names)
    for name in stored:
        within = name.removeprefix(tree.root)
        if name not in known and not _IGNORED.fullmatch(within) and not _is_mtp(config, within):
            if name.startswith(others):
                continue
            if _SHARED in name and not config.moe.num_shared_experts:
                if 0 in stored[name].shape:
                    continue  # transformers writes experts of no width where n_shared_experts is 0
                raise CheckpointError(
                    "EXTRA_TENSOR",
                    "config.json says that there are no shared experts (n_shared_experts 0 or null), "
                    f"but tensor {name} is there; check that config and weights belong together",
                )
            raise CheckpointError(
                "EXTRA_TENSOR",
                f"tensor {name} has no place in the network that config.json describes; "
                "check that config and weights belong together",
            )
    return names


def _check_tensor(tensor: StoredTensor | None, name: str, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise CheckpointError(
            "MISSING_TENSOR",
            f"tensor {name} {list(shape)} is not in the checkpoint; check that config and weights belong together",
        )
    if tensor.shape != shape:
        raise CheckpointError(
            "BAD_TENSOR_SHAPE",
            f"tensor {name} is {list(tensor.shape)}; config.json asks for {list(shape)}",
        )


def _check_float(name: str, stored: dict[str, StoredTensor]) -> None:
    if SAFETENSORS.get(stored[name].dtype) not in COMPUTE:
        raise CheckpointError(
            "UNSUPPORTED_MODEL",
            f"tensor {name} is {stored[name].dtype}; Headrace reads F32, BF16, F16 and block-scaled F8_E4M3",
        )


def _check_scale(config: ModelConfig, stored: dict[str, StoredTensor], name: str, shape: tuple[int, ...]) -> str:
    if config.fp8_block is None or len(shape) != 2:
        raise CheckpointError(
            "UNSUPPORTED_MODEL",
            f"tensor {name} is F8_E4M3 but config.json's quantization_config describes no blocks for it",
        )
    rows, columns = config.fp8_block
    scale_name = name + SCALE_SUFFIX
    scale = stored.get(scale_name)
    _check_tensor(scale, scale_name, (-(-shape[0] // rows), -(-shape[1] // columns)))
    if SAFETENSORS.get(stored[scale_name].dtype) not in _SCALES:
        raise CheckpointError(
            "UNSUPPORTED_MODEL",
            f"tensor {scale_name} is {stored[scale_name].dtype}; "
            "Headrace reads scales that are F32, BF16, F16 or F8_E8M0",
        )
    return scale_name


def _is_mtp(config: ModelConfig, name: str) -> bool:
    match = _LAYER.match(name)
    return match is not None and 0 <= int(match[1]) - config.num_layers < config.num_mtp_layers
