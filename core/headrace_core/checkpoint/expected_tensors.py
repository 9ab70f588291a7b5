"""Which tensors a checkpoint of a config must hold: names and shapes, and the check that it holds just those."""

from __future__ import annotations

import re
from collections.abc import Iterator

from headrace_core.checkpoint.config import GqaShape, MlaShape, ModelConfig
from headrace_core.checkpoint.safetensors_file import StoredTensor
from headrace_core.errors import CheckpointError

_FLOAT_DTYPES = ("F32", "BF16", "F16")
_SCALE_DTYPES = (*_FLOAT_DTYPES, "F8_E8M0")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Buffers that old checkpoints carry and that follow from the config.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_SHARED = ".mlp.shared_experts."
SCALE_SUFFIX = "_scale_inv"


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor the network needs: its name in the checkpoint, and its shape.

    One at a time, since a config may speak of more than memory holds the names of.
    """
    hidden = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.is_embedding_tied:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, shape in _attention(config):
            yield prefix + "self_attn." + name, shape
        for name, shape in _feed_forward(config, layer):
            yield prefix + name, shape


def _attention(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    shape, hidden, heads = config.attention, config.hidden_size, config.num_heads
    if isinstance(shape, GqaShape):
        yield "q_proj.weight", (heads * shape.head_dim, hidden)
        yield "k_proj.weight", (shape.num_kv_heads * shape.head_dim, hidden)
        yield "v_proj.weight", (shape.num_kv_heads * shape.head_dim, hidden)
        yield "o_proj.weight", (hidden, heads * shape.head_dim)
        return
    yield from _mla(shape, hidden, heads)
    if config.has_attention_bias:
        if shape.q_lora_rank is not None:
            yield "q_a_proj.bias", (shape.q_lora_rank,)
        yield "kv_a_proj_with_mqa.bias", (shape.kv_lora_rank + shape.rope_dim,)
        yield "o_proj.bias", (hidden,)


def _mla(shape: MlaShape, hidden: int, heads: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    query_dim = heads * (shape.nope_dim + shape.rope_dim)
    if shape.q_lora_rank is None:
        yield "q_proj.weight", (query_dim, hidden)
    else:
        yield "q_a_proj.weight", (shape.q_lora_rank, hidden)
        yield "q_a_layernorm.weight", (shape.q_lora_rank,)
        yield "q_b_proj.weight", (query_dim, shape.q_lora_rank)
    yield "kv_a_proj_with_mqa.weight", (shape.kv_lora_rank + shape.rope_dim, hidden)
    yield "kv_a_layernorm.weight", (shape.kv_lora_rank,)
    yield "kv_b_proj.weight", (heads * (shape.nope_dim + shape.value_dim), shape.kv_lora_rank)
    yield "o_proj.weight", (hidden, heads * shape.value_dim)


def _feed_forward(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, moe = config.hidden_size, config.moe
    if not config.is_moe_layer(layer):
        yield from _mlp("mlp.", config.dense_intermediate_size, hidden)
        return
    if config.family == "mixtral":
        yield "block_sparse_moe.gate.weight", (moe.num_experts, hidden)
        for expert in range(moe.num_experts):
            prefix = f"block_sparse_moe.experts.{expert}."
            yield prefix + "w1.weight", (moe.intermediate_size, hidden)
            yield prefix + "w3.weight", (moe.intermediate_size, hidden)
            yield prefix + "w2.weight", (hidden, moe.intermediate_size)
        return
    yield "mlp.gate.weight", (moe.num_experts, hidden)
    if moe.has_correction_bias:
        yield "mlp.gate.e_score_correction_bias", (moe.num_experts,)
    for expert in range(moe.num_experts):
        yield from _mlp(f"mlp.experts.{expert}.", moe.intermediate_size, hidden)
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.intermediate_size
        yield from _mlp("mlp.shared_experts.", width, hidden)


def _mlp(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)


def check_tensors(config: ModelConfig, stored: dict[str, StoredTensor]) -> list[str]:
    """Return the names to load, in a fixed order, after checking that the checkpoint holds what its config says.

    Block-FP8 weights bring their scales: `<name>_scale_inv` follows `<name>`. Tensors of multi-token-prediction layers
    are recognised and left out.

    Raises:
        CheckpointError: MISSING_TENSOR, EXTRA_TENSOR, BAD_TENSOR_SHAPE or UNSUPPORTED_MODEL, naming the tensor.
    """
    names: list[str] = []
    for name, shape in expected_tensors(config):
        _check_tensor(stored.get(name), name, shape)
        names.append(name)
        if stored[name].dtype == "F8_E4M3":
            names.append(_check_scale(config, stored, name, shape))
        else:
            _check_float(name, stored)
    if config.is_embedding_tied and "lm_head.weight" in stored:
        _check_tensor(stored["lm_head.weight"], "lm_head.weight", (config.vocab_size, config.hidden_size))
    known = {*names, "lm_head.weight"} if config.is_embedding_tied else set(names)
    for name in stored:
        if name not in known and not _IGNORED.fullmatch(name) and not _is_mtp(config, name):
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
    if stored[name].dtype not in _FLOAT_DTYPES:
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
    if stored[scale_name].dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            "UNSUPPORTED_MODEL",
            f"tensor {scale_name} is {stored[scale_name].dtype}; "
            f"Headrace reads scales that are {', '.join(_SCALE_DTYPES)}",
        )
    return scale_name


def _is_mtp(config: ModelConfig, name: str) -> bool:
    match = _LAYER.match(name)
    return match is not None and 0 <= int(match[1]) - config.num_layers < config.num_mtp_layers
