"""How weights are held: as numbers of the compute type, in 8 bits, or as they were published in blocks of FP8.

FP8 (`headrace_kernels.block_fp8`): each weight that is multiplied and that the checkpoint stores so. Layers that are
computed as one, such as the projections into queries and latents, are held so if all of them are stored so. As numbers
stays `LATENT_UP` (kv_b_proj), which prompts and decode rows multiply in different ways: DeepSeek-V3 takes 1.0 GB more
of 673 by that; vLLM and SGLang do the same. With AUTO all is brought to numbers.

INT8 (`headrace_kernels.int8_weights`): the weights of linear layers and experts. As numbers stay the embedding, a head
that is tied to it, the router's weights, and `LATENT_UP`.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from headrace_kernels.block_fp8 import Block, cut_block
from headrace_kernels.experts import empty_experts
from torch import Tensor

from headrace_core.errors import StartupError
from headrace_core.families.config import ModelConfig
from headrace_core.families.table import weights as weight_tree
from headrace_core.families.weights import Part, Place, Weight
from headrace_core.ranks.layout import ExpertsBy
from headrace_core.ranks.sharding import Sharding

_NUMBERS = (Part.EMBEDDING, Part.ROUTER, Part.LATENT_UP, Part.INDEX_HEADS)
_INPUTS = (Part.QUERY, Part.QUERY_DOWN, Part.KEY, Part.VALUE, Part.LATENT, Part.INDEX_KEY)
_DENSE = (Part.GATE, Part.UP)
_SHARED = (Part.SHARED_GATE, Part.SHARED_UP, Part.SHARED_DOWN)
_SCALE_BYTES = 4


class WeightsDtype(Enum):
    """See above; the settings' names."""

    AUTO = "auto"
    INT8 = "int8"
    FP8 = "fp8_e4m3"


@dataclass(frozen=True, slots=True)
class Holding:
    """How a network's weights are held; with FP8, `fp8_names` are those that are in blocks of FP8."""

    dtype: WeightsDtype = WeightsDtype.AUTO
    fp8_names: frozenset[str] = frozenset()

    def num_bytes(self, weight: Weight, config: ModelConfig, dtype: torch.dtype) -> int:
        """Return the bytes that `weight`, of `config` or a part of one, takes in compute type `dtype`."""
        count = math.prod(weight.shape)
        if weight.name in self.fp8_names:
            assert config.fp8_block is not None, "what is stored in FP8 has blocks"
            blocks = (-(-side // width) for side, width in zip(weight.shape, config.fp8_block, strict=True))
            return count + _SCALE_BYTES * math.prod(blocks)
        if self.dtype is WeightsDtype.INT8 and _is_multiplied(weight):
            return count + _SCALE_BYTES * weight.shape[0]
        return count * (4 if weight.is_float32 else dtype.itemsize)


AS_NUMBERS = Holding()


def holding(
    weights_dtype: WeightsDtype,
    config: ModelConfig,
    is_block_fp8: Callable[[str], bool],
    sharding: Sharding,
    like: Callable[[], Tensor],
) -> Holding:
    """Return how a checkpoint's weights are held, of which `is_block_fp8` says by name whether they are stored so.

    `like` makes a tensor of the compute type, on the device.

    Raises:
        StartupError: NO_INT8, NO_FP8_WEIGHTS.
    """
    if weights_dtype is not WeightsDtype.FP8:
        return Holding(weights_dtype)
    tree = weight_tree(config)
    names: set[str] = set()
    for weights in (tree.outside, *(tree.layer(index) for index in range(tree.num_layers))):
        names |= _kept_in_fp8(weights, is_block_fp8)
    problem = _problem(config, names, sharding, like())
    if problem:
        raise StartupError("NO_FP8_WEIGHTS", f"--weights-dtype fp8_e4m3: {problem}; use auto")
    return Holding(weights_dtype, frozenset(names))


def check_int8(device: str) -> None:
    """Refuse what can't be multiplied in 8 bits.

    Raises:
        StartupError: NO_INT8.
    """
    if device != "cpu":
        raise StartupError(
            "NO_INT8", f"--weights-dtype int8: there are no such kernels for --device {device}; use auto"
        )


def fp8_blocks(config: ModelConfig, starts: Iterable[int]) -> tuple[Block, Block]:
    """Return the blocks of gate and up, and of down, of experts that begin at columns `starts` of what is stored."""
    assert config.fp8_block is not None, "what is stored in FP8 has blocks"
    starts = tuple(starts)
    return cut_block(config.fp8_block, 0, *starts), cut_block(config.fp8_block, 1, *starts)


def held_fingerprint(fingerprint: str, weights_dtype: WeightsDtype) -> str:
    """Return the fingerprint of a model whose weights are held so: in 8 bits it may give other tokens."""
    if weights_dtype is WeightsDtype.AUTO:
        return fingerprint
    return hashlib.blake2b(f"{fingerprint} {weights_dtype.value}".encode(), digest_size=16).hexdigest()


def is_experts(weight: Weight) -> bool:
    """Return whether a mixture's experts have it, routed or shared."""
    return weight.place.expert is not None or weight.place.part in _SHARED


def _kept_in_fp8(weights: Iterable[Weight], is_block_fp8: Callable[[str], bool]) -> set[str]:
    """Return the names of a layer's weights that stay in FP8: of those that are computed as one, all or none."""
    as_one: dict[object, list[str]] = defaultdict(list)
    for weight in weights:
        if _is_multiplied(weight):
            as_one[_computed_with(weight)].append(weight.name)
    return {name for names in as_one.values() if all(map(is_block_fp8, names)) for name in names}


def _computed_with(weight: Weight) -> object:
    """Return the same for weights that are one linear layer."""
    place = weight.place
    if place.expert is None:
        return next((parts for parts in (_INPUTS, _DENSE) if place.part in parts), place)
    return place


def _problem(config: ModelConfig, names: set[str], sharding: Sharding, like: Tensor) -> str | None:
    """Return what speaks against holding the weights of these names in FP8."""
    if config.fp8_block is None or not names:
        return "the checkpoint has no weights in blocks of FP8"
    moe, layout = config.moe, sharding.layout
    experts = [weight for weight in weight_tree(config) if is_experts(weight)]
    other = next((weight.name for weight in experts if weight.name not in names), None)
    if other or not experts:
        return other and f"tensor {other} is not stored in FP8, as all experts must be"
    width, first = moe.intermediate_size, 0
    if layout.experts_by is ExpertsBy.COLUMNS:
        width //= layout.size
        first = width * sharding.rank
    starts = [first]
    if moe.num_shared_experts:
        shared = next(weight for weight in experts if weight.place == Place(Part.SHARED_GATE))
        part = sharding.part(shared)
        begin, end = (0, shared.shape[0]) if part is None else (part.start, part.stop)
        starts += range(begin, end, width)
    try:
        empty_experts(0, config.hidden_size, width, like, fp8_blocks=fp8_blocks(config, starts))
    except ValueError as error:
        return f"experts, {width} columns each here: {error}"
    return None


def _is_multiplied(weight: Weight) -> bool:
    """Return whether a linear layer or an expert has it. A tied head is the embedding, and no weight of its own."""
    return len(weight.shape) == 2 and weight.place.part not in _NUMBERS
