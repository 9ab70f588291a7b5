"""Build a network of its weights, taken one at a time from wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from headrace_kernels.block_fp8 import BlockFp8, stacked
from headrace_kernels.experts import Experts, empty_experts
from headrace_kernels.linear import Linear
from headrace_kernels.routing_rule import Router, RoutingRule
from torch import Tensor

from headrace_core.families.config import GqaShape, MlaShape, ModelConfig
from headrace_core.families.table import weights as weight_tree
from headrace_core.families.weights import Part, Place, Shard, Weight
from headrace_core.model.attention import Attention
from headrace_core.model.dispatch import Dispatcher
from headrace_core.model.feed_forward import DenseMlp, FeedForward, LayerExperts, MoeMlp
from headrace_core.model.gqa import GqaWeights, GroupedQueryAttentionLayer
from headrace_core.model.group_experts import DispatchedExperts, GatheredExperts, LaneCounts, SummedExperts
from headrace_core.model.group_linear import OntoResidual, SummedLinear
from headrace_core.model.indexer import Indexer, IndexerWeights
from headrace_core.model.layer import Layer
from headrace_core.model.mla import LatentAttentionLayer, MlaWeights
from headrace_core.model.model import ModelWeights
from headrace_core.model.mtp import MtpWeights
from headrace_core.model.rope_angles import softmax_scale
from headrace_core.model.sparse_mla import SparseLatentAttentionLayer
from headrace_core.model.travelling_tokens import RoundedTokens
from headrace_core.model.weights_dtype import AS_NUMBERS, Holding, WeightsDtype, fp8_blocks, is_experts
from headrace_core.process import release_freed_memory
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.ranks.group import ALONE, Ranks
from headrace_core.ranks.layout import ExpertsBy, ParallelLayout
from headrace_core.ranks.sharding import ExpertsForm, Sharding


class WeightSource(Protocol):
    """Where a network's weights come from: a checkpoint (`WeightReader`), or whatever has them by name."""

    def take(self, name: str, dtype: torch.dtype | None = None, shard: Shard | None = None) -> Tensor:
        """Return weight `name`, None: all of it, as `dtype`, None: the compute type, on the device."""
        ...

    def take_block_fp8(self, name: str, shard: Shard | None = None) -> BlockFp8:
        """Return weight `name`, None: all of it, which is stored in blocks of FP8, as it is, on the device."""
        ...

    def empty(self, *shape: int) -> Tensor:
        """Return memory for weights of the compute type, on the device."""
        ...


def build_network(
    config: ModelConfig,
    source: WeightSource,
    holding: Holding = AS_NUMBERS,
    ranks: Ranks = ALONE,
    sharding: Sharding | None = None,
    dispatch_dtype: DispatchDtype = DispatchDtype.AUTO,
) -> ModelWeights:
    """Return the network of `config`; each weight of its tree is taken once, and held only as packed.

    They are held as `holding` says.

    In a group, `ranks`, it is this rank's: `sharding` says which weights are taken, and of which a part. Tokens reach
    routed experts as `dispatch_dtype`.
    """
    with torch.inference_mode():
        sharding = sharding or Sharding(ranks.layout, ranks.rank)
        return _Builder(config, source, holding, ranks, sharding, dispatch_dtype).build()


def num_weight_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    holding: Holding = AS_NUMBERS,
    sharding: Sharding | None = None,
) -> int:
    """Return the bytes that the weights of `config` take in compute type `dtype`; of a rank, what it keeps of them."""
    kept = sharding or Sharding(ParallelLayout(), 0)
    return sum(
        holding.num_bytes(replace(weight, shape=kept.shape(weight)), config, dtype)
        for weight in kept.weights(weight_tree(config))
    )


class _Builder:
    """Builds the network from weights taken one at a time; a plain weight is dropped as soon as it is packed."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        holding: Holding,
        ranks: Ranks,
        sharding: Sharding,
        dispatch_dtype: DispatchDtype,
    ) -> None:
        self._config = config
        self._source = source
        self._fp8_names = holding.fp8_names
        self._is_int8 = holding.dtype is WeightsDtype.INT8
        self._ranks = ranks
        self._sharding = sharding
        self._dispatch_dtype = dispatch_dtype
        self._lanes = LaneCounts(ranks.layout.num_lanes)
        self._tree = weight_tree(config)
        self._places: dict[Place, Weight] = {}
        """Of what is being built: the weights outside of layers, or those of one layer."""

    def build(self) -> ModelWeights:
        self._places = {weight.place: weight for weight in self._tree.outside}
        embedding, norm = self._take(Part.EMBEDDING), self._take(Part.FINAL_NORM)
        # Packing would hold a tied embedding twice.
        is_tied = self._config.is_embedding_tied
        head = Linear(embedding, is_packed=False) if is_tied else self._linear(Part.HEAD)
        layers = [self._layer(index) for index in range(self._config.num_layers)]
        mtp = self._mtp(self._config.num_layers) if self._config.num_run_mtp_layers else None
        return ModelWeights(embedding, layers, norm, head, self._lanes, mtp)

    def _take(self, part: Part, expert: int | None = None) -> Tensor:
        weight = self._places[Place(part, expert)]
        dtype = torch.float32 if weight.is_float32 else None
        return self._source.take(weight.name, dtype, self._sharding.part(weight))

    def _take_if_there(self, part: Part) -> Tensor | None:
        return self._take(part) if Place(part) in self._places else None

    def _layer(self, index: int) -> Layer:
        self._places = {weight.place: weight for weight in self._tree.layer(index)}
        # What packing freed lies between what it kept; without this it comes to a quarter of the model.
        release_freed_memory()
        return Layer(
            attention_norm=self._take(Part.ATTENTION_NORM),
            attention=self._attention(),
            feed_forward_norm=self._take(Part.FEED_FORWARD_NORM),
            feed_forward=self._moe(index) if self._config.is_moe_layer(index) else self._mlp(),
        )

    def _mtp(self, index: int) -> MtpWeights:
        layer = self._layer(index)
        return MtpWeights(
            embedding_norm=self._take(Part.MTP_EMBEDDING_NORM),
            hidden_norm=self._take(Part.MTP_HIDDEN_NORM),
            join=self._linear(Part.MTP_JOIN),
            layer=layer,
            norm=self._take(Part.MTP_NORM),
        )

    def _held(self, part: Part, expert: int | None = None) -> Tensor | BlockFp8:
        """Take a weight that is multiplied: in FP8 if it stays so."""
        weight = self._places[Place(part, expert)]
        if weight.name in self._fp8_names:
            return self._source.take_block_fp8(weight.name, self._sharding.part(weight))
        return self._take(part, expert)

    def _joined(self, *parts: Part) -> Tensor | BlockFp8:
        """Take weights whose rows are computed as one weight's, one after another: all stay in FP8, or none."""
        weights = [self._held(part) for part in parts]
        if len(weights) == 1:
            return weights[0]
        in_fp8 = [weight for weight in weights if isinstance(weight, BlockFp8)]
        return stacked(in_fp8) if in_fp8 else torch.cat([each for each in weights if isinstance(each, Tensor)])

    def _linear(self, *parts: Part) -> Linear:
        """Return one linear layer whose outputs are those of the weights named, one after another."""
        return self._packed(self._joined(*parts))

    def _packed(self, weight: Tensor | BlockFp8, bias: Tensor | None = None) -> Linear:
        return Linear(weight, bias, is_int8=self._is_int8, dtype=self._source.empty(0).dtype)

    def _onto_residual(self, part: Part, bias: Part | None = None) -> OntoResidual:
        """Return a linear layer whose inputs the lane's ranks divide; the first has the bias."""
        lane = self._ranks.lane
        added = self._take_if_there(bias) if bias else None
        linear = self._packed(self._held(part), added if lane.rank == 0 else None)
        return linear if lane.size == 1 else SummedLinear(linear, lane)

    def _attention(self) -> Attention:
        config, layout, rank = self._config, self._ranks.layout, self._ranks.rank
        num_heads = len(layout.heads(rank, config.num_heads))
        if isinstance(config.attention, GqaShape):
            weights = GqaWeights(
                input_proj=self._linear(Part.QUERY, Part.KEY, Part.VALUE),
                output_proj=self._onto_residual(Part.OUTPUT),
                query_norm=self._take_if_there(Part.QUERY_NORM),
                key_norm=self._take_if_there(Part.KEY_NORM),
            )
            num_kv_heads = len(layout.kv_heads(rank, config.attention.num_kv_heads))
            shape = replace(config.attention, num_kv_heads=num_kv_heads)
            return GroupedQueryAttentionLayer(shape, num_heads, weights)
        return self._mla(config.attention, num_heads)

    def _mla(self, shape: MlaShape, num_heads: int) -> Attention:
        has_lora = shape.q_lora_rank is not None
        parts = [Part.QUERY_DOWN if has_lora else Part.QUERY, Part.LATENT]
        weight = self._joined(*parts, *([Part.INDEX_KEY] if shape.indexer else []))
        latent_up = self._take(Part.LATENT_UP).view(num_heads, -1, shape.kv_lora_rank)
        weights = MlaWeights(
            input_proj=self._packed(weight, self._mla_input_bias(weight.shape[0])),
            query_norm=self._take_if_there(Part.QUERY_NORM),
            query_b=self._linear(Part.QUERY_UP) if has_lora else None,
            kv_norm=self._take(Part.LATENT_NORM),
            w_uk=latent_up[:, : shape.nope_dim].contiguous(),
            w_uv=latent_up[:, shape.nope_dim :].contiguous(),
            output_proj=self._onto_residual(Part.OUTPUT, Part.OUTPUT_BIAS),
        )
        scale = softmax_scale(shape, self._config.rope.yarn)
        if shape.indexer is None:
            return LatentAttentionLayer(shape, num_heads, scale, weights)
        indexer = Indexer(shape.indexer, shape.rope_dim, self._indexer())
        return SparseLatentAttentionLayer(shape, num_heads, scale, weights, indexer)

    def _indexer(self) -> IndexerWeights:
        return IndexerWeights(
            query=self._linear(Part.INDEX_QUERY),
            key_norm=self._take(Part.INDEX_KEY_NORM),
            key_norm_bias=self._take(Part.INDEX_KEY_NORM_BIAS),
            head_weights=self._take(Part.INDEX_HEADS),
        )

    def _mla_input_bias(self, width: int) -> Tensor | None:
        latent_bias = self._take_if_there(Part.LATENT_BIAS)
        if latent_bias is None:
            return None
        query_bias = self._take_if_there(Part.QUERY_DOWN_BIAS)
        if query_bias is None:
            query_bias = latent_bias.new_zeros(width - len(latent_bias))
        rest = latent_bias.new_zeros(width - len(query_bias) - len(latent_bias))
        return torch.cat((query_bias, latent_bias, rest))

    def _mlp(self) -> DenseMlp:
        return DenseMlp(self._linear(Part.GATE, Part.UP), self._onto_residual(Part.DOWN))

    def _moe(self, layer: int) -> FeedForward:
        shape = self._config.moe
        rule = RoutingRule(
            shape.num_experts_per_token,
            shape.scoring,
            num_groups=shape.num_groups,
            num_groups_kept=shape.num_groups_kept,
            is_group_score_top2=shape.is_group_score_top2,
            is_normalised=shape.is_normalised,
            scaling_factor=shape.scaling_factor,
        )
        router, bias = self._take(Part.ROUTER), self._take_if_there(Part.ROUTER_BIAS)
        return MoeMlp(Router(router, bias, rule, shape.num_shared_experts), self._experts(layer))

    def _experts(self, layer: int) -> LayerExperts:
        """Return the experts of a layer: here all of them, in a group what its form is."""
        moe, ranks = self._config.moe, self._ranks
        is_rounded, is_alone = self._dispatch_dtype is DispatchDtype.FP8, ranks.layout.size == 1
        if is_alone and not is_rounded:
            return self._stack(range(moe.num_experts), moe.num_shared_experts)
        if ranks.layout.experts_by is ExpertsBy.COLUMNS and not is_alone:
            local = self._stack(range(moe.num_experts), moe.num_shared_experts)
            if self._sharding.experts_form is ExpertsForm.SUMMED:
                return SummedExperts(local, None, None, ranks.world)
            return GatheredExperts(local, self._lanes, ranks)
        held = self._sharding.local_experts(layer, moe.num_experts)
        local = self._stack(held, 0)
        if self._sharding.experts_form is ExpertsForm.SUMMED:
            numbers = torch.full((moe.num_experts + moe.num_shared_experts + 1,), -1)
            numbers[held] = torch.arange(len(held))
            device = self._source.empty(0).device
            given = RoundedTokens(local) if is_rounded else local
            return SummedExperts(given, numbers.to(device), self._shared(1), ranks.world)
        slots = self._sharding.slots_of(layer, moe.num_experts)
        dispatcher = Dispatcher(slots, ranks.world, self._source.empty(0).device, self._dispatch_dtype)
        shared = self._shared(moe.num_shared_experts)
        return DispatchedExperts(local, moe.num_shared_experts, shared, dispatcher, ranks)

    def _stack(self, held: Sequence[int], num_shared: int) -> Experts:
        """Return the routed experts `held` and all shared ones after them; one weight at a time is held beside them."""
        width = self._config.moe.intermediate_size
        if self._ranks.layout.experts_by is ExpertsBy.COLUMNS:
            width //= self._ranks.layout.size
        first = self._first_column(Place(Part.GATE, held[0])) if held else 0
        starts = [first, *(self._shared_starts(width, num_shared) if num_shared else ())]
        experts = self._empty(len(held) + num_shared, width, starts)
        for number, expert in enumerate(held):
            experts.put(number, *(self._held(part, expert) for part in (Part.GATE, Part.UP, Part.DOWN)))
        if num_shared:
            self._put_shared(experts, len(held), num_shared)
        return experts

    def _shared(self, count: int) -> Experts | None:
        """Return what this rank has of the shared experts, as `count` experts; None: there are none."""
        if not self._config.moe.num_shared_experts:
            return None
        part = self._sharding.part(self._places[Place(Part.SHARED_GATE)])
        columns = self._places[Place(Part.SHARED_GATE)].shape[0] if part is None else part.stop - part.start
        experts = self._empty(count, columns // count, self._shared_starts(columns // count, count))
        self._put_shared(experts, 0, count)
        return experts

    def _empty(self, count: int, width: int, starts: Sequence[int]) -> Experts:
        """Return memory for experts that begin at columns `starts` of what is stored."""
        some_expert = next(weight for weight in self._places.values() if is_experts(weight))
        blocks = fp8_blocks(self._config, starts) if some_expert.name in self._fp8_names else None
        like = self._source.empty(0)
        return empty_experts(count, self._config.hidden_size, width, like, is_int8=self._is_int8, fp8_blocks=blocks)

    def _first_column(self, place: Place) -> int:
        part = self._sharding.part(self._places[place])
        return 0 if part is None else part.start

    def _shared_starts(self, width: int, count: int) -> list[int]:
        first = self._first_column(Place(Part.SHARED_GATE))
        return [first + width * number for number in range(count)]

    def _put_shared(self, experts: Experts, first: int, count: int) -> None:
        # Columns of a network's hidden layer do not meet before its sum: a wide one is several narrow ones.
        gates, ups, downs = map(self._held, (Part.SHARED_GATE, Part.SHARED_UP, Part.SHARED_DOWN))
        width = gates.shape[0] // count
        pieces = zip(*(_pieces(each, width, axis) for each, axis in ((gates, 0), (ups, 0), (downs, 1))), strict=True)
        for number, (gate, up, down) in enumerate(pieces, first):
            experts.put(number, gate, up, down)


def _pieces(weight: Tensor | BlockFp8, width: int, axis: int) -> list[Tensor] | list[BlockFp8]:
    """Return the parts of `weight`, `width` wide along `axis`, each by itself."""
    starts = range(0, weight.shape[axis], width)
    if isinstance(weight, BlockFp8):
        return [weight.narrow(axis, start, width) for start in starts]
    return [weight.narrow(axis, start, width).contiguous() for start in starts]
