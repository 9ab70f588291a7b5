"""Load a Hugging Face checkpoint: check everything that headers and config tell, then build layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from headrace_kernels import backend
from headrace_kernels.experts import Experts, empty_experts
from headrace_kernels.linear import Linear
from headrace_kernels.routing_rule import Router, RoutingRule
from torch import Tensor

from headrace_core.checkpoint.check_tensors import check_tensors
from headrace_core.checkpoint.memory import WORKING_BYTES, available_bytes, check_fits
from headrace_core.checkpoint.safetensors_file import StoredTensor, read_headers
from headrace_core.checkpoint.weight_reader import WeightReader
from headrace_core.errors import CheckpointError, StartupError
from headrace_core.families.config import GqaShape, MlaShape, ModelConfig
from headrace_core.families.config_json import parse_config
from headrace_core.families.expected_tensors import expected_tensors
from headrace_core.kv.layout import CacheDtype, KvLayout
from headrace_core.model.attention import Attention
from headrace_core.model.feed_forward import DenseMlp, FeedForward, MoeMlp
from headrace_core.model.gqa import GqaWeights, GroupedQueryAttentionLayer
from headrace_core.model.mla import LatentAttentionLayer, MlaWeights
from headrace_core.model.model import Layer, Model, ModelIdentity, ModelWeights
from headrace_core.model.numerics import Numerics, check_exact, exact_fingerprint
from headrace_core.model.rope_angles import check_angles, softmax_scale
from headrace_core.model.working_memory import StepLimits, gpu_working_bytes
from headrace_core.process import release_freed_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    directory: Path,
    *,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    device: str = "cpu",
    numerics: Numerics = Numerics.FAST,
    kv_pool_bytes: int = 0,
    step_limits: StepLimits | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load the checkpoint in `directory`.

    Args:
        directory: holds config.json and model.safetensors or its shards with their index.
        dtype: type of weights and compute: "float32", "bfloat16", "float16", or "auto", the checkpoint's.
        kv_cache_dtype: how latents are kept: "fp8_e4m3", or "auto", as values of `dtype`.
        device: torch's name of where to compute.
        numerics: how far a token's bits are promised.
        kv_pool_bytes: memory that pages will take; counted when the model is checked against what is available.
        step_limits: of the steps that will run, None: the settings' defaults; counted likewise on a GPU.
        on_progress: called with (bytes read, bytes to read) after every tensor.

    Raises:
        CheckpointError: before anything large is allocated: BAD_CONFIG, UNSUPPORTED_MODEL, MISSING_TENSOR,
            EXTRA_TENSOR, BAD_TENSOR_SHAPE, DAMAGED_FILE, MODEL_TOO_LARGE; while weights are read: NON_FINITE_WEIGHT.
        StartupError: NO_EXACT, NO_FP8_CACHE, before anything is read but config.json.
    """
    config = parse_config(directory)
    check_angles(config)
    dtype = config.checkpoint_dtype if dtype == "auto" else dtype
    cache_dtype = CacheDtype(dtype if kv_cache_dtype == "auto" else kv_cache_dtype)
    if numerics is Numerics.EXACT:
        check_exact(backend(torch.empty(0, device=device)), _DTYPES[dtype], cache_dtype)
    layout = _layout_of_a_token(config, cache_dtype)
    stored = read_headers(directory)
    names = check_tensors(config, stored)
    compute_dtype = _DTYPES[dtype]
    weight_bytes = num_weight_bytes(config, compute_dtype)
    working_bytes = WORKING_BYTES
    if device == "cuda":
        limits = step_limits or StepLimits()
        working_bytes = gpu_working_bytes(config, layout, limits, kv_pool_bytes, itemsize=compute_dtype.itemsize)
    check_fits(weight_bytes, kv_pool_bytes, available_bytes(device), working_bytes)
    progress = _Progress(sum(stored[name].size for name in names), on_progress)
    reader = WeightReader(stored, config, dtype=compute_dtype, device=device, on_progress=progress.add)
    weights = build_network(config, reader)
    _check_tied_head(config, stored, reader)
    release_freed_memory()
    fingerprint = reader.fingerprint() if numerics is Numerics.FAST else exact_fingerprint(reader.fingerprint())
    identity = ModelIdentity(fingerprint, compute_dtype, weight_bytes, cache_dtype, numerics)
    return Model(config, identity, weights)


def _layout_of_a_token(config: ModelConfig, cache_dtype: CacheDtype) -> KvLayout:
    try:
        return config.kv_layout(1, cache_dtype)
    except ValueError as error:
        raise StartupError("NO_FP8_CACHE", f"--kv-cache-dtype {cache_dtype.value}: {error}; use auto") from error


class WeightSource(Protocol):
    """Where a network's weights come from: a checkpoint (`WeightReader`), or whatever has them by name."""

    def take(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return weight `name` as `dtype`, None: the compute type, on the device."""
        ...

    def empty(self, *shape: int) -> Tensor:
        """Return memory for weights of the compute type, on the device."""
        ...


def build_network(config: ModelConfig, source: WeightSource) -> ModelWeights:
    """Return the network of `config`; each weight in `expected_tensors` is taken once, and held only as packed."""
    with torch.inference_mode():
        return _Builder(config, source).build()


class _Progress:
    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._done = 0
        self._total = total
        self._on_progress = on_progress

    def add(self, count: int) -> None:
        self._done += count
        if self._on_progress is not None:
            self._on_progress(min(self._done, self._total), self._total)


def num_weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes that the weights of `config` take in compute type `dtype`."""
    return sum(
        math.prod(shape) * (4 if is_float32(name) else dtype.itemsize) for name, shape in expected_tensors(config)
    )


def is_float32(name: str) -> bool:
    """True for the weights that are kept in float32 whatever the compute type: routers."""
    return name.endswith((".gate.weight", ".e_score_correction_bias"))


def _check_tied_head(config: ModelConfig, stored: dict[str, StoredTensor], reader: WeightReader) -> None:
    if not config.is_embedding_tied or "lm_head.weight" not in stored:
        return
    if reader.digest("lm_head.weight") != reader.digest("model.embed_tokens.weight"):
        raise CheckpointError(
            "BAD_CONFIG",
            "config.json: tie_word_embeddings is true but lm_head.weight differs from the embedding; "
            "set it to false or remove the tensor",
        )


class _Builder:
    """Builds the network from weights taken one at a time; a plain weight is dropped as soon as it is packed."""

    def __init__(self, config: ModelConfig, source: WeightSource) -> None:
        self._config = config
        self._source = source

    def build(self) -> ModelWeights:
        embedding = self._source.take("model.embed_tokens.weight")
        layers = [self._layer(index) for index in range(self._config.num_layers)]
        norm = self._source.take("model.norm.weight")
        if self._config.is_embedding_tied:
            # Packing would hold the embedding twice.
            return ModelWeights(embedding, layers, norm, Linear(embedding, is_packed=False))
        return ModelWeights(embedding, layers, norm, self._linear("lm_head.weight"))

    def _layer(self, index: int) -> Layer:
        prefix = f"model.layers.{index}."
        # What packing freed lies between what it kept; without this it comes to a quarter of the model.
        release_freed_memory()
        return Layer(
            attention_norm=self._source.take(prefix + "input_layernorm.weight"),
            attention=self._attention(prefix + "self_attn."),
            feed_forward_norm=self._source.take(prefix + "post_attention_layernorm.weight"),
            feed_forward=self._feed_forward(prefix, index),
        )

    def _linear(self, *names: str) -> Linear:
        """Return one linear layer whose outputs are those of the weights named, one after another."""
        weights = [self._source.take(name) for name in names]
        return Linear(weights[0] if len(weights) == 1 else torch.cat(weights))

    def _attention(self, prefix: str) -> Attention:
        config = self._config
        if isinstance(config.attention, GqaShape):
            weights = GqaWeights(
                input_proj=self._linear(prefix + "q_proj.weight", prefix + "k_proj.weight", prefix + "v_proj.weight"),
                output_proj=self._linear(prefix + "o_proj.weight"),
            )
            return GroupedQueryAttentionLayer(config.attention, config.num_heads, weights)
        return self._mla(prefix, config.attention)

    def _mla(self, prefix: str, shape: MlaShape) -> Attention:
        take, num_heads = self._source.take, self._config.num_heads
        has_lora = shape.q_lora_rank is not None
        first = "q_a_proj" if has_lora else "q_proj"
        weight = torch.cat((take(f"{prefix}{first}.weight"), take(prefix + "kv_a_proj_with_mqa.weight")))
        kv_b = take(prefix + "kv_b_proj.weight").view(num_heads, -1, shape.kv_lora_rank)
        weights = MlaWeights(
            input_proj=Linear(weight, self._mla_input_bias(prefix, shape, len(weight))),
            query_norm=take(prefix + "q_a_layernorm.weight") if has_lora else None,
            query_b=self._linear(prefix + "q_b_proj.weight") if has_lora else None,
            kv_norm=take(prefix + "kv_a_layernorm.weight"),
            w_uk=kv_b[:, : shape.nope_dim].contiguous(),
            w_uv=kv_b[:, shape.nope_dim :].contiguous(),
            output_proj=Linear(
                take(prefix + "o_proj.weight"),
                take(prefix + "o_proj.bias") if self._config.has_attention_bias else None,
            ),
        )
        scale = softmax_scale(shape, self._config.rope.yarn)
        return LatentAttentionLayer(shape, num_heads, scale, weights)

    def _mla_input_bias(self, prefix: str, shape: MlaShape, width: int) -> Tensor | None:
        if not self._config.has_attention_bias:
            return None
        kv_bias = self._source.take(prefix + "kv_a_proj_with_mqa.bias")
        if shape.q_lora_rank is None:
            return torch.cat((kv_bias.new_zeros(width - len(kv_bias)), kv_bias))
        return torch.cat((self._source.take(prefix + "q_a_proj.bias"), kv_bias))

    def _feed_forward(self, prefix: str, index: int) -> FeedForward:
        if not self._config.is_moe_layer(index):
            return self._mlp(prefix + "mlp.")
        if self._config.family == "mixtral":
            return self._moe(prefix + "block_sparse_moe.", ("w1", "w3", "w2"))
        return self._moe(prefix + "mlp.", ("gate_proj", "up_proj", "down_proj"))

    def _mlp(self, prefix: str) -> DenseMlp:
        return DenseMlp(
            self._linear(prefix + "gate_proj.weight", prefix + "up_proj.weight"),
            self._linear(prefix + "down_proj.weight"),
        )

    def _moe(self, prefix: str, expert_names: tuple[str, str, str]) -> FeedForward:
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
        router = self._source.take(prefix + "gate.weight", torch.float32)
        bias = None
        if shape.has_correction_bias:
            bias = self._source.take(prefix + "gate.e_score_correction_bias", torch.float32)
        experts = self._experts(prefix, expert_names)
        return MoeMlp(Router(router, bias, rule, shape.num_shared_experts), experts)

    def _experts(self, prefix: str, expert_names: tuple[str, str, str]) -> Experts:
        """Return all experts, shared ones last; one weight at a time is held beside them."""
        take, shape, hidden = self._source.take, self._config.moe, self._config.hidden_size
        count, width = shape.num_experts + shape.num_shared_experts, shape.intermediate_size
        experts = empty_experts(count, hidden, width, self._source.empty(0))
        for expert in range(shape.num_experts):
            gate, up, down = (take(f"{prefix}experts.{expert}.{name}.weight") for name in expert_names)
            experts.put(expert, gate, up, down)
        if shape.num_shared_experts:
            # Columns of a network's hidden layer do not meet before its sum: a wide one is several narrow ones.
            names = (f"{prefix}shared_experts.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj"))
            gates, ups, downs = (take(name) for name in names)
            pieces = zip(gates.split(width), ups.split(width), downs.split(width, dim=1), strict=True)
            for expert, (gate, up, down) in enumerate(pieces, shape.num_experts):
                experts.put(expert, gate, up, down.contiguous())
        return experts
