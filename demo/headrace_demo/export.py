"""The checkpoint: the network under the names of DeepSeek-V3, in bfloat16, and its configs.

Routed experts are written one by one, the MTP module as one more layer behind the last, with its
own copies of embedding and head, as DeepSeek ships them. `from_checkpoint` is the way back.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headrace_demo.network import Experts, Layer, Network, Shape
from headrace_demo.tokenizer import BOS, EOS, PAD

MAX_TOKENS = 4096
_BIAS = "gate.e_score_correction_bias"
_MTP_PARTS = {
    "enorm": "enorm",
    "hnorm": "hnorm",
    "eh_proj": "eh_proj",
    "norm": "shared_head.norm",
}


def _expert_tensors(experts: Experts) -> dict[str, Tensor]:
    named = {"gate.weight": experts.gate, _BIAS: experts.bias}
    for index in range(experts.shape.n_routed_experts):
        gate, up = experts.gate_up[index].chunk(2, -1)
        named[f"experts.{index}.gate_proj.weight"] = gate.t()
        named[f"experts.{index}.up_proj.weight"] = up.t()
        named[f"experts.{index}.down_proj.weight"] = experts.down[index].t()
    shared = experts.shared_experts.state_dict()
    return named | {f"shared_experts.{name}": tensor for name, tensor in shared.items()}


def _layer_tensors(layer: Layer) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for part, module in layer.named_children():
        tensors = _expert_tensors(module) if isinstance(module, Experts) else module.state_dict()
        named |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    return named


def to_checkpoint(network: Network) -> dict[str, Tensor]:
    """Name the tensors of `network` as DeepSeek-V3 does.

    Returns:
        Contiguous copies, bfloat16 but for the correction biases, which stay float32.
    """
    named = {
        "model.embed_tokens.weight": network.embed_tokens.weight,
        "model.norm.weight": network.norm.weight,
        "lm_head.weight": network.lm_head.weight,
    }
    mtp, depth = network.mtp, len(network.layers)
    for index, layer in enumerate([*network.layers, mtp.block]):
        assert isinstance(layer, Layer), "the layers of a network are layers"
        tensors = _layer_tensors(layer)
        named |= {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}
    for ours, theirs in _MTP_PARTS.items():
        named[f"model.layers.{depth}.{theirs}.weight"] = mtp.get_parameter(f"{ours}.weight")
    named[f"model.layers.{depth}.embed_tokens.weight"] = network.embed_tokens.weight
    named[f"model.layers.{depth}.shared_head.head.weight"] = network.lm_head.weight
    return {
        name: tensor.detach()
        .to(torch.float32 if name.endswith(_BIAS) else torch.bfloat16)
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in named.items()
    }


def _fill(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    module.load_state_dict(state)


def _fill_experts(experts: Experts, tensors: dict[str, Tensor], prefix: str) -> None:
    count = range(experts.shape.n_routed_experts)
    names = ("gate_proj", "up_proj", "down_proj")
    parts = [[tensors[f"{prefix}experts.{i}.{n}.weight"].t() for n in names] for i in count]
    with torch.no_grad():
        experts.gate.copy_(tensors[f"{prefix}gate.weight"])
        experts.bias.copy_(tensors[prefix + _BIAS])
        experts.gate_up.copy_(torch.stack([torch.cat([gate, up], -1) for gate, up, _ in parts]))
        experts.down.copy_(torch.stack([down for _, _, down in parts]))
    _fill(experts.shared_experts, tensors, f"{prefix}shared_experts.")


def from_checkpoint(folder: Path) -> Network:
    """Rebuild the network of the checkpoint in `folder`, in float32, set to evaluate."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    network = Network(Shape(**{field.name: config[field.name] for field in fields(Shape)}))
    tensors = load_file(folder / "model.safetensors")
    depth = len(network.layers)
    for index, layer in enumerate([*network.layers, network.mtp.block]):
        for part, module in layer.named_children():
            prefix = f"model.layers.{index}.{part}."
            if isinstance(module, Experts):
                _fill_experts(module, tensors, prefix)
            else:
                _fill(module, tensors, prefix)
    for ours, theirs in _MTP_PARTS.items():
        _fill(network.mtp.get_submodule(ours), tensors, f"model.layers.{depth}.{theirs}.")
    _fill(network.embed_tokens, tensors, "model.embed_tokens.")
    _fill(network.norm, tensors, "model.norm.")
    _fill(network.lm_head, tensors, "lm_head.")
    return network.eval()


def model_config(shape: Shape) -> dict[str, object]:
    """Return what stands in `config.json`."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": MAX_TOKENS,
        "num_key_value_heads": shape.num_attention_heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **shape.as_dict(),
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(network: Network, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and `generation_config.json` into `folder`."""
    weights = folder / "model.safetensors"
    save_file(to_checkpoint(network), weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    _write_json(folder / "config.json", model_config(network.shape))
    generation: dict[str, object] = {
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "do_sample": True,
        "temperature": 0.7,
        "max_new_tokens": 320,
    }
    _write_json(folder / "generation_config.json", generation)
