"""Small checkpoints with random weights, written as Hugging Face writes them, for tests of every kind.

Weights are drawn so that hidden states and router scores spread: a fan-in scale would leave experts and tokens nearly
tied, and a parity test on ties says nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace_core.families.config import ModelConfig
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import weights

Config = dict[str, Any]

_YARN: Config = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_COMMON: Config = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_DEEPSEEK: Config = {
    **_COMMON,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
_V3: Config = {
    **_DEEPSEEK,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 20,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
_V32: Config = {
    **{name: value for name, value in _V3.items() if name not in ("scoring_func", "topk_method", "moe_layer_freq")},
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_n_heads": 16,
    "index_head_dim": 12,
    "index_topk": 9,
}
_V2: Config = {
    **_DEEPSEEK,
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "q_lora_rank": 20,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
_MIXTRAL: Config = {
    **_COMMON,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": None,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
}
_KIMI_K25: Config = {
    "model_type": "kimi_k25",
    "architectures": ["Kimi_K25ForConditionalGeneration"],
    "text_config": {**_V3, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    "vision_config": {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
        "pos_emb_time": 2,
    },
    "projection_hidden_size": 32,
    "torch_dtype": "float32",
}
_QWEN3: Config = {
    **_COMMON,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "rope_theta": 1e6,
    "rope_scaling": None,
}
_GLM: Config = {
    **{name: value for name, value in _V3.items() if name not in ("scoring_func", "moe_layer_freq")},
    "model_type": "glm4_moe_lite",
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "n_group": 1,
    "topk_group": 1,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "v_head_dim": 16,
    "partial_rotary_factor": 1.0,
}
TINY_CONFIGS: dict[str, Config] = {
    "v3": _V3,
    "v3-no-q-lora": {**_V3, "q_lora_rank": None},
    "v3-yarn": {**_V3, "rope_scaling": _YARN},
    "v3-yarn-mscale": {**_V3, "rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.4}},
    "v3-rope-parameters": {
        **{k: v for k, v in _V3.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0,
                            "original_max_position_embeddings": 128},
        "dtype": "float32",
    },
    "v3-one-group": {**_V3, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "v3-tied": {**_V3, "tie_word_embeddings": True},
    "v3-half-rope": {**_V3, "rope_interleave": False},
    "v3-bias": {**_V3, "attention_bias": True},
    "v3-bias-no-q-lora": {**_V3, "attention_bias": True, "q_lora_rank": None},
    "v32": _V32,
    "v32-yarn-bias": {**_V32, "rope_scaling": _YARN, "attention_bias": True, "index_n_heads": 24},
    "v2": _V2,
    "v2-groups": {
        **_V2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
    "v2-lite": {
        **_V2,
        "q_lora_rank": None,
        "eos_token_id": [1, 2],
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "ep_size": 1,
    },
    "glm4-moe-lite": _GLM,
    "glm4-moe-lite-listed": {
        **{name: value for name, value in _GLM.items() if name != "first_k_dense_replace"},
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "n_group": 4,
        "topk_group": 2,
        "rope_interleave": False,
    },
    "kimi-k25": _KIMI_K25,
    "mixtral": _MIXTRAL,
    "mixtral-head-dim": {**_MIXTRAL, "head_dim": 12, "num_key_value_heads": 1},
    "qwen3-moe": _QWEN3,
    "qwen3-moe-dense-layers": {
        **_QWEN3,
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
        "num_key_value_heads": 1,
    },
    "qwen3-moe-yarn": {
        **_QWEN3,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variation:
    """What may differ between checkpoints of one config: weights' type, seed, shards, MTP tensors after the layers."""

    dtype: torch.dtype = torch.float32
    seed: int = 0
    num_shards: int = 1
    num_mtp_layers: int = 0


def write_checkpoint(directory: Path, config: Config, variation: Variation | None = None) -> dict[str, Tensor]:
    """Write config.json and weights into `directory`, making it; return the tensors written."""
    variation = variation or Variation()
    if variation.num_mtp_layers:
        config = {**config, "num_nextn_predict_layers": variation.num_mtp_layers}
    write_config(directory, config)
    tensors = random_tensors(parse_config(directory), variation)
    write_tensors(directory, tensors, variation.num_shards)
    return tensors


def write_config(directory: Path, config: Config) -> None:
    """Write config.json into `directory`, making it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def random_tensors(config: ModelConfig, variation: Variation) -> dict[str, Tensor]:
    """Return random weights for `config`, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(variation.seed)
    tensors: dict[str, Tensor] = {}
    shapes = {weight.name: weight.shape for weight in weights(config)}
    if variation.num_mtp_layers:
        tree = weights(replace(config, num_run_mtp_layers=1))
        for layer in range(config.num_layers, config.num_layers + variation.num_mtp_layers):
            shapes |= {weight.name: weight.shape for weight in tree.layer(layer)}
    for name, shape in shapes.items():
        tensors[name] = random_tensor(name, shape, generator, variation.dtype)
    return tensors


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return a random weight for `name`, on the generator's device; correction biases are float32 always."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("e_score_correction_bias"):
        values, dtype = values * 0.1, torch.float32
    elif name.endswith("norm.weight"):
        values = 1 + 0.2 * values
    elif name.endswith(".bias"):
        values = 0.3 * values
    elif "embed_tokens" not in name:
        values = values * (2.0 if ".gate.weight" in name else 1.2) / math.sqrt(shape[-1])
    return values.to(dtype)


def write_tensors(directory: Path, tensors: dict[str, Tensor], num_shards: int = 1) -> None:
    """Write weights as one file, or as shards with their index."""
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    (directory / "model.safetensors").unlink(missing_ok=True)  # it would be read, and not the shards
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        members = names[shard::num_shards]
        save_file({name: tensors[name] for name in members}, directory / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(members, file_name))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_fp8_checkpoint(
    directory: Path, config: Config, block: tuple[int, int] = (128, 128), variation: Variation | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a checkpoint in blocks of FP8; return what `quantise_fp8` does, of which the first is written."""
    variation = variation or Variation()
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    config = {**config, "quantization_config": quantisation}
    if variation.num_mtp_layers:
        config = {**config, "num_nextn_predict_layers": variation.num_mtp_layers}
    write_config(directory, config)
    stored, plain = quantise_fp8(random_tensors(parse_config(directory), variation), block)
    write_tensors(directory, stored, variation.num_shards)
    return stored, plain


def quantise_fp8(tensors: dict[str, Tensor], block: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (block-FP8 tensors with their scales, the float32 weights they stand for).

    Layer weights with two sides become FP8, as in DeepSeek-V3's own checkpoints; routers, norms and embeddings stay.
    """
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "layers" not in name or name.endswith("gate.weight"):
            stored[name] = plain[name] = tensor
            continue
        rows, columns = tensor.shape
        scale = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
        quantised = torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scale[i, j] = tensor[place].abs().max() / 448
                quantised[place] = (tensor[place] / scale[i, j]).to(torch.float8_e4m3fn)
        full = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        stored[name], stored[name + "_scale_inv"] = quantised, scale
        plain[name] = quantised.float() * full
    return stored, plain
