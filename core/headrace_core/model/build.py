"""Build a network of its weights, taken one at a time from wherever they are."""

from __future__ import annotations

from typing import Protocol

import torch
from headrace_kernels.experts import Experts, empty_experts
from headrace_kernels.linear import Linear
from headrace_kernels.routing_rule import Router, RoutingRule
from torch import Tensor

from headrace_core.families.config import GqaShape, MlaShape, ModelConfig
from headrace_core.families.table import weights as weight_tree
from headrace_core.families.weights import Part, Place, Shard, Weight
from headrace_core.model.attention import Attention
from headrace_core.model.feed_forward import DenseMlp, FeedForward, MoeMlp
from headrace_core.model.gqa import GqaWeights, GroupedQueryAttentionLayer
from headrace_core.model.mla import LatentAttentionLayer, MlaWeights
from headrace_core.model.model import Layer, ModelWeights
from headrace_core.model.rope_angles import softmax_scale
from headrace_core.model.weights_dtype import WeightsDtype, num_bytes
from headrace_core.process import release_freed_memory


class WeightSource(Protocol):
    """Where a network's weights come from: a checkpoint (`WeightReader`), or whatever has them by name."""

    def take(self, name: str, dtype: torch.dtype | None = None, shard: Shard | None = None) -> Tensor:
        """Return weight `name`, None: all of it, as `dtype`, None: the compute type, on the device."""
        ...

    def empty(self, *shape: int) -> Tensor:
        """Return memory for weights of the compute type, on the device."""
        ...


def build_network(
    config: ModelConfig, source: WeightSource, weights_dtype: WeightsDtype = WeightsDtype.AUTO
) -> ModelWeights:
    """Return the network of `config`; each weight of its tree is taken once, and held only as packed."""
    with torch.inference_mode():
        return _Builder(config, source, weights_dtype).build()


def num_weight_bytes(config: ModelConfig, dtype: torch.dtype, weights_dtype: WeightsDtype = WeightsDtype.AUTO) -> int:
    """Return the bytes that the weights of `config` take in compute type `dtype`."""
    return sum(num_bytes(weight, dtype, weights_dtype) for weight in weight_tree(config))


class _Builder:
    """Builds the network from weights taken one at a time; a plain weight is dropped as soon as it is packed."""

    def __init__(self, config: ModelConfig, source: WeightSource, weights_dtype: WeightsDtype) -> None:
        self._config = config
        self._source = source
        self._is_int8 = weights_dtype is WeightsDtype.INT8
        self._tree = weight_tree(config)
        self._places: dict[Place, Weight] = {}
        """Of what is being built: the weights outside of layers, or those of one layer."""

    def build(self) -> ModelWeights:
        self._places = {weight.place: weight for weight in self._tree.outside}
        embedding, norm = self._take(Part.EMBEDDING), self._take(Part.FINAL_NORM)
        # Packing would hold a tied embedding twice.
        is_tied = self._config.is_embedding_tied
        head = Linear(embedding, is_packed=False) if is_tied else self._linear(Part.HEAD)
        return ModelWeights(embedding, [self._layer(index) for index in range(self._tree.num_layers)], norm, head)

    def _take(self, part: Part, expert: int | None = None) -> Tensor:
        weight = self._places[Place(part, expert)]
        return self._source.take(weight.name, torch.float32 if weight.is_float32 else None)

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
            feed_forward=self._moe() if self._config.is_moe_layer(index) else self._mlp(),
        )

    def _linear(self, *parts: Part) -> Linear:
        """Return one linear layer whose outputs are those of the weights named, one after another."""
        weights = [self._take(part) for part in parts]
        return self._packed(weights[0] if len(weights) == 1 else torch.cat(weights))

    def _packed(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return Linear(weight, bias, is_int8=self._is_int8)

    def _attention(self) -> Attention:
        config = self._config
        if isinstance(config.attention, GqaShape):
            weights = GqaWeights(
                input_proj=self._linear(Part.QUERY, Part.KEY, Part.VALUE),
                output_proj=self._linear(Part.OUTPUT),
                query_norm=self._take_if_there(Part.QUERY_NORM),
                key_norm=self._take_if_there(Part.KEY_NORM),
            )
            return GroupedQueryAttentionLayer(config.attention, config.num_heads, weights)
        return self._mla(config.attention)

    def _mla(self, shape: MlaShape) -> Attention:
        num_heads, has_lora = self._config.num_heads, shape.q_lora_rank is not None
        weight = torch.cat((self._take(Part.QUERY_DOWN if has_lora else Part.QUERY), self._take(Part.LATENT)))
        latent_up = self._take(Part.LATENT_UP).view(num_heads, -1, shape.kv_lora_rank)
        weights = MlaWeights(
            input_proj=self._packed(weight, self._mla_input_bias(len(weight))),
            query_norm=self._take_if_there(Part.QUERY_NORM),
            query_b=self._linear(Part.QUERY_UP) if has_lora else None,
            kv_norm=self._take(Part.LATENT_NORM),
            w_uk=latent_up[:, : shape.nope_dim].contiguous(),
            w_uv=latent_up[:, shape.nope_dim :].contiguous(),
            output_proj=self._packed(self._take(Part.OUTPUT), self._take_if_there(Part.OUTPUT_BIAS)),
        )
        scale = softmax_scale(shape, self._config.rope.yarn)
        return LatentAttentionLayer(shape, num_heads, scale, weights)

    def _mla_input_bias(self, width: int) -> Tensor | None:
        latent_bias = self._take_if_there(Part.LATENT_BIAS)
        if latent_bias is None:
            return None
        query_bias = self._take_if_there(Part.QUERY_DOWN_BIAS)
        if query_bias is None:
            query_bias = latent_bias.new_zeros(width - len(latent_bias))
        return torch.cat((query_bias, latent_bias))

    def _mlp(self) -> DenseMlp:
        return DenseMlp(self._linear(Part.GATE, Part.UP), self._linear(Part.DOWN))

    def _moe(self) -> FeedForward:
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
        return MoeMlp(Router(router, bias, rule, shape.num_shared_experts), self._experts())

    def _experts(self) -> Experts:
        """Return all experts, shared ones last; one weight at a time is held beside them."""
        shape, hidden = self._config.moe, self._config.hidden_size
        count, width = shape.num_experts + shape.num_shared_experts, shape.intermediate_size
        experts = empty_experts(count, hidden, width, self._source.empty(0), is_int8=self._is_int8)
        for expert in range(shape.num_experts):
            experts.put(expert, *(self._take(part, expert) for part in (Part.GATE, Part.UP, Part.DOWN)))
        if shape.num_shared_experts:
            # Columns of a network's hidden layer do not meet before its sum: a wide one is several narrow ones.
            gates, ups, downs = map(self._take, (Part.SHARED_GATE, Part.SHARED_UP, Part.SHARED_DOWN))
            pieces = zip(gates.split(width), ups.split(width), downs.split(width, dim=1), strict=True)
            for expert, (gate, up, down) in enumerate(pieces, shape.num_experts):
                experts.put(expert, gate, up, down.contiguous())
        return experts
