"""How weights are held: as numbers of the compute type, in 8 bits, or as they were published in blocks of FP8.

FP8 (`headrace_kernels.block_fp8`): the experts, which are 98 % of DeepSeek-V3; the rest is brought to the compute type
when it is read. With AUTO all is.

INT8 (`headrace_kernels.int8_weights`): the weights of linear layers and experts. As numbers stay the embedding, a head
that is tied to it, the router's weights, and `LATENT_UP`, which prompts and decode rows multiply in different ways.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from enum import Enum

import torch
from headrace_kernels.fp8_experts import empty_fp8_experts
from torch import Tensor

from headrace_core.errors import StartupError
from headrace_core.families.config import ModelConfig
from headrace_core.families.table import weights as weight_tree
from headrace_core.families.weights import Part, Weight

_NUMBERS = (Part.EMBEDDING, Part.ROUTER, Part.LATENT_UP, Part.INDEX_HEADS)
_SHARED = (Part.SHARED_GATE, Part.SHARED_UP, Part.SHARED_DOWN)
_SCALE_BYTES = 4


class WeightsDtype(Enum):
    """See above; the settings' names."""

    AUTO = "auto"
    INT8 = "int8"
    FP8 = "fp8_e4m3"


def check_int8(device: str) -> None:
    """Refuse what can't be multiplied in 8 bits.

    Raises:
        StartupError: NO_INT8.
    """
    if device != "cpu":
        raise StartupError(
            "NO_INT8", f"--weights-dtype int8: there are no such kernels for --device {device}; use auto"
        )


def check_fp8(config: ModelConfig, is_block_fp8: Callable[[str], bool], like: Tensor, num_ranks: int = 1) -> None:
    """Refuse experts that can't be held as blocks of FP8; `like` has the compute type and device.

    Raises:
        StartupError: NO_FP8_WEIGHTS.
    """
    moe, block = config.moe, config.fp8_block
    others = (weight.name for weight in weight_tree(config) if is_experts(weight) and not is_block_fp8(weight.name))
    problem = None
    if num_ranks > 1:
        problem = f"a group of {num_ranks} ranks holds its experts as numbers"
    elif block is None or not moe.num_experts:
        problem = "the checkpoint has no experts in blocks of FP8"
    elif name := next(others, None):
        problem = f"tensor {name} is not stored in FP8"
    elif moe.num_shared_experts > 1 and (moe.intermediate_size % block[0] or moe.intermediate_size % block[1]):
        problem = (
            f"the shared experts, {moe.intermediate_size} wide each, begin within blocks of {block[0]} x {block[1]}"
        )
    else:
        try:
            empty_fp8_experts(0, config.hidden_size, moe.intermediate_size, like, block)
        except ValueError as error:
            problem = str(error)
    if problem:
        raise StartupError("NO_FP8_WEIGHTS", f"--weights-dtype fp8_e4m3: {problem}; use auto")


def num_bytes(weight: Weight, config: ModelConfig, dtype: torch.dtype, weights_dtype: WeightsDtype) -> int:
    """Return the bytes that `weight` of `config` takes in compute type `dtype`."""
    count = math.prod(weight.shape)
    if weights_dtype is WeightsDtype.FP8 and is_experts(weight):
        assert config.fp8_block is not None, "check_fp8 has passed"
        blocks = (-(-side // width) for side, width in zip(weight.shape, config.fp8_block, strict=True))
        return count + _SCALE_BYTES * math.prod(blocks)
    if weights_dtype is WeightsDtype.INT8 and _is_multiplied(weight):
        return count + _SCALE_BYTES * weight.shape[0]
    return count * (4 if weight.is_float32 else dtype.itemsize)


def held_fingerprint(fingerprint: str, weights_dtype: WeightsDtype) -> str:
    """Return the fingerprint of a model whose weights are held so: in 8 bits it may give other tokens."""
    if weights_dtype is WeightsDtype.AUTO:
        return fingerprint
    return hashlib.blake2b(f"{fingerprint} {weights_dtype.value}".encode(), digest_size=16).hexdigest()


def is_experts(weight: Weight) -> bool:
    """Return whether a mixture's experts have it, routed or shared."""
    return weight.place.expert is not None or weight.place.part in _SHARED


def _is_multiplied(weight: Weight) -> bool:
    """Return whether a linear layer or an expert has it. A tied head is the embedding, and no weight of its own."""
    return len(weight.shape) == 2 and weight.place.part not in _NUMBERS
