"""Multi-token prediction in plain torch, float32, one sequence, from the checkpoint's files: nothing of Headrace.

    h'_i = layer(W [norm(embedding(t_i+1)); norm(h_i)])        logits_i = head(norm(h'_i))

h_i is transformers' output at position i, after the final norm. Letters: T tokens, N hidden, H heads, E experts.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), sections 2.1 and 2.2, equations 1 to 16 and 21 to 23.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import rms_norm, silu


class MtpReference:
    """The module of the checkpoint in `directory`, and what of the network it needs."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self._stored = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
        self._prefix = f"model.layers.{self.config['num_hidden_layers']}."

    def logits(self, hidden: Tensor, token_ids: list[int]) -> Tensor:
        """Return [T, V] for the network's outputs `hidden` [T, N] and the T + 1 tokens, the next one among them."""
        embedded = self._stored["model.embed_tokens.weight"][torch.tensor(token_ids[1:])]
        joined = torch.cat((self._norm(embedded, "enorm"), self._norm(hidden, "hnorm")), dim=1)
        x = self._linear(joined, "eh_proj")
        x = x + self._attention(self._norm(x, "input_layernorm"))
        x = x + self._experts(self._norm(x, "post_attention_layernorm"))
        return self._norm(x, "shared_head.norm") @ self._stored["lm_head.weight"].T

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self._stored[f"{self._prefix}{name}.weight"].T

    def _norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        eps = self.config["rms_norm_eps"] if eps is None else eps
        return rms_norm(x, x.shape[-1:], self._stored[f"{self._prefix}{name}.weight"], eps)

    def _attention(self, x: Tensor) -> Tensor:
        config, count = self.config, len(x)
        heads, plain, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        if config["q_lora_rank"] is None:
            query = self._linear(x, "self_attn.q_proj")
        else:
            latent = self._norm(self._linear(x, "self_attn.q_a_proj"), "self_attn.q_a_layernorm", 1e-6)
            query = self._linear(latent, "self_attn.q_b_proj")
        query = query.view(count, heads, plain + rope)
        latent, key_rope = self._linear(x, "self_attn.kv_a_proj_with_mqa").split([config["kv_lora_rank"], rope], dim=1)
        up = self._linear(self._norm(latent, "self_attn.kv_a_layernorm", 1e-6), "self_attn.kv_b_proj")
        key, value = up.view(count, heads, -1).split([plain, config["v_head_dim"]], dim=2)
        query_rope = self._rotated(query[..., plain:])
        key_rope = self._rotated(key_rope[:, None]).expand(count, heads, rope)
        scores = torch.einsum("qhd,khd->hqk", query[..., :plain], key)
        scores = (scores + torch.einsum("qhd,khd->hqk", query_rope, key_rope)) * (plain + rope) ** -0.5
        scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(dim=2), value)
        return self._linear(mixed.reshape(count, -1), "self_attn.o_proj")

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotate neighbouring pairs of `x` [T, H, R] by their position."""
        width = x.shape[2]
        frequencies = self.config["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
        turn = torch.polar(torch.ones(1).double(), torch.arange(len(x))[:, None] * frequencies)[:, None]
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:2], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(2).float()

    def _experts(self, x: Tensor) -> Tensor:
        config, out = self.config, self._mlp(x, "mlp.shared_experts")
        scores = self._linear(x, "mlp.gate").sigmoid()
        for row, (token, its_scores) in enumerate(zip(x, scores, strict=True)):
            chosen = self._chosen(its_scores)
            weights = its_scores[chosen]
            if config["norm_topk_prob"]:
                weights = weights / weights.sum()
            for expert, weight in zip(chosen.tolist(), weights * config["routed_scaling_factor"], strict=True):
                out[row] += weight * self._mlp(token, f"mlp.experts.{expert}")
        return out

    def _chosen(self, scores: Tensor) -> Tensor:
        config = self.config
        biased = scores + self._stored[f"{self._prefix}mlp.gate.e_score_correction_bias"]
        groups = biased.view(config["n_group"], -1)
        best = groups.topk(2, dim=1).values.sum(dim=1).topk(config["topk_group"]).indices
        kept = torch.full_like(groups, -torch.inf)
        kept[best] = groups[best]
        return kept.flatten().topk(config["num_experts_per_tok"]).indices

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        return self._linear(
            silu(self._linear(x, f"{name}.gate_proj")) * self._linear(x, f"{name}.up_proj"), f"{name}.down_proj"
        )
