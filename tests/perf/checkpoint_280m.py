"""Write a DeepSeek-V3 checkpoint of 280M random parameters in bfloat16, the one that engines are compared on.

    python -m tests.perf.checkpoint_280m build/checkpoint-280m

Norms are 1, embeddings N(0, 0.02), matrices N(0, 1 / fan_in), correction biases N(0, 0.02) in float32.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import weights
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "n_shared_experts": 1,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 384,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16",
}


def write(directory: Path) -> Path:
    """Write the checkpoint into `directory` unless it is there; return `directory`."""
    path = directory / "model.safetensors"
    if path.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for weight in weights(parse_config(directory)):
        name, shape = weight.name, weight.shape
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        is_small = "embed_tokens" in name or name.endswith("bias")
        scale = 0.02 if is_small else 1 / math.sqrt(shape[-1])
        dtype = torch.float32 if name.endswith("bias") else torch.bfloat16
        tensors[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(path)
    return directory


if __name__ == "__main__":
    write(Path(sys.argv[1]))
