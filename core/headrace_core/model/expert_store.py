"""A rank's whole experts by slots, and room for one layer more, in which a layer's next ones are made ready.

What a rank keeps of a layer is copied from where it computes, what it newly needs is read from the checkpoint on its
own disk: by the loader's way, with its checks, and no rank has to meet another for it. A tensor that is not the one
that was loaded before is refused. So a rank's steps go on meanwhile, and a switch is an exchange of two references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.experts import Experts, empty_experts
from torch import Tensor

from headrace_core.checkpoint.weight_reader import WeightReader
from headrace_core.errors import StartupError
from headrace_core.expert_moves import Slots
from headrace_core.expert_placement import in_order
from headrace_core.families.config import ModelConfig
from headrace_core.families.table import weights as weight_tree
from headrace_core.families.weights import Part, Place
from headrace_core.model.feed_forward import FeedForward, MoeMlp
from headrace_core.model.group_experts import DispatchedExperts
from headrace_core.model.weights_dtype import Holding, WeightsDtype, fp8_blocks
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.sharding import Owners, Sharding


class Prepared(NamedTuple):
    """What was read for a layer."""

    num_experts: int
    num_bytes: int


class GivenUpError(Exception):
    """Nobody wants the layer any more."""


@dataclass(frozen=True, slots=True)
class ExpertReader:
    """Reads experts of `config` again, which `reader` has read before."""

    reader: WeightReader
    config: ModelConfig
    holding: Holding

    def names(self, layer: int) -> dict[Place, str]:
        """Return the names of the weights of a layer's experts."""
        weights = weight_tree(self.config).layer(layer)
        return {weight.place: weight.name for weight in weights if weight.place.expert is not None}

    def read(self, names: Mapping[Place, str], expert: int) -> Sequence[Tensor | BlockFp8]:
        """Return an expert's gate, up and down, as `Experts.put` takes them.

        Raises:
            CheckpointError: DAMAGED_FILE, NON_FINITE_WEIGHT.
        """
        wanted = [names[Place(part, expert)] for part in (Part.GATE, Part.UP, Part.DOWN)]
        if self.holding.fp8_names.issuperset(wanted):
            return [self.reader.take_block_fp8(name) for name in wanted]
        return [self.reader.take(name) for name in wanted]


class ExpertStore:
    """See the module. `prepare` on any thread, one at a time; all else between two steps.

    `slots` of each layer are mutated by `switch`.
    """

    def __init__(
        self,
        layers: Mapping[int, DispatchedExperts],
        slots: Mapping[int, Slots],
        rank: int,
        spare: Experts,
        reader: ExpertReader,
    ) -> None:
        """Args: `spare` is memory for as many experts as the rank has slots in a layer."""
        self.slots = dict(slots)
        self._layers = layers
        self._rank = rank
        self._spare = spare
        self._reader = reader

    def prepare(self, layer: int, after: Slots, is_wanted: Callable[[], bool]) -> Prepared:
        """Have in the room beside the layers what this rank holds of `layer` where experts are in `after`.

        `is_wanted` is asked before each expert.

        Raises:
            CheckpointError: DAMAGED_FILE, NON_FINITE_WEIGHT; what is computed with is untouched.
            GivenUpError: not wanted any more.
        """
        held, before = self._layers[layer].local, self.slots[layer][self._rank]
        names = self._reader.names(layer)
        count = size = 0
        with torch.inference_mode():
            for slot, expert in enumerate(after[self._rank]):
                if not is_wanted():
                    raise GivenUpError
                if expert in before:
                    self._spare.copy(slot, held, before.index(expert))
                    continue
                weights = self._reader.read(names, expert)
                self._spare.put(slot, *weights)
                count, size = count + 1, size + sum(weight.nbytes for weight in weights)
        return Prepared(count, size)

    def switch(self, layer: int, after: Slots) -> None:
        """Compute with what was prepared; what was computed with is the room beside from now on."""
        experts = self._layers[layer]
        held = experts.local
        experts.switch(self._spare, after)
        self._spare = held
        self.slots[layer] = after


def open_store(reader: ExpertReader, layers: Sequence[FeedForward], sharding: Sharding) -> ExpertStore:
    """Return what moves the experts of a network's `layers`, which `sharding` placed; takes `spare_bytes`."""
    config, moe = reader.config, reader.config.moe
    held = {index: layer.experts for index, layer in enumerate(layers) if isinstance(layer, MoeMlp)}
    dispatched = {index: experts for index, experts in held.items() if isinstance(experts, DispatchedExperts)}
    assert len(dispatched) == len(held), "whole experts are dispatched to"
    slots = {index: sharding.slots_of(index, moe.num_experts) for index in held}
    count = len(slots[min(slots)][sharding.rank])
    with torch.inference_mode():
        like = reader.reader.empty(0)
        spare = empty_experts(
            count,
            config.hidden_size,
            moe.intermediate_size,
            like,
            is_int8=reader.holding.dtype is WeightsDtype.INT8,
            fp8_blocks=fp8_blocks(config, [0]) if reader.holding.fp8_names else None,
        )
    return ExpertStore(dispatched, slots, sharding.rank, spare, reader)


def with_replicas(layout: ParallelLayout, config: ModelConfig, redundant: int) -> dict[int, Owners]:
    """Return by layer which ranks hold its experts before any has moved: in a row, replicas behind them.

    Raises:
        StartupError: BAD_RANKS, there can't be so many replicas.
    """
    if not config.moe.num_experts:
        raise StartupError("BAD_RANKS", "--rebalance: this network has no experts to move")
    try:
        owners = in_order(config.moe.num_experts, layout.size, redundant).owners()
    except ValueError as error:
        raise StartupError("BAD_RANKS", f"--redundant-experts {redundant}: {error}") from error
    return {layer: owners for layer in range(config.num_layers) if config.is_moe_layer(layer)}


def num_slots(layout: ParallelLayout, config: ModelConfig, redundant: int) -> int:
    """Return how many experts of a layer a rank holds."""
    return (config.moe.num_experts + redundant) // layout.size


def spare_bytes(config: ModelConfig, num_experts: int, dtype: torch.dtype, holding: Holding) -> int:
    """Return the bytes of the room beside the layers, for `num_experts` of compute type `dtype`."""
    mixture = next(layer for layer in range(config.num_layers) if config.is_moe_layer(layer))
    weights = (each for each in weight_tree(config).layer(mixture) if each.place.expert == 0)
    return num_experts * sum(holding.num_bytes(weight, config, dtype) for weight in weights)
