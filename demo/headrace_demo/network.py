"""The training-side network: DeepSeek-V3 in small, on plain torch.

Multi-head latent attention (MLA), one dense layer, then layers of routed experts with one shared
expert, and one multi-token-prediction (MTP) module. The experts of a layer are held as stacked
tensors, because one batched product is much faster than a loop over experts; `export.py` writes
them out one by one under the names of a DeepSeek checkpoint.

Letters: B sequences, T tokens, H heads, R rope width, N hidden, E experts, K experts per token,
C expert capacity (the largest number of tokens any expert got, rounded up), V vocab.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), sections 2.1 and 2.2.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CAPACITY_STEP = 32
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "mlp.down")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the network; field names are those of a DeepSeek `config.json`."""

    vocab_size: int = 1536
    hidden_size: int = 192
    intermediate_size: int = 512
    moe_intermediate_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    n_group: int = 4
    topk_group: int = 2
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 1.5
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    num_nextn_predict_layers: int = 1

    def as_dict(self) -> dict[str, int | float]:
        """Return the fields as they stand in `config.json`."""
        return asdict(self)


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Make a projection without bias."""
    return nn.Linear(fan_in, fan_out, bias=False)


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), 1e-6)


@dataclass(frozen=True, slots=True)
class Angles:
    """Rotary angles of the positions of one window, and the causal mask that goes with them."""

    cos: Tensor
    """[T, R/2] float32."""
    sin: Tensor
    """[T, R/2] float32."""
    mask: Tensor
    """[T, T] float32; 0 where a token may look, a large negative number where it may not."""


def make_angles(shape: Shape, num_tokens: int) -> Angles:
    """Compute the angles of positions 0 .. `num_tokens` - 1."""
    half = torch.arange(0, shape.qk_rope_head_dim, 2).float() / shape.qk_rope_head_dim
    phase = torch.arange(num_tokens).float()[:, None] / shape.rope_theta**half
    mask = torch.full((num_tokens, num_tokens), -1e4).triu_(1)
    return Angles(phase.cos(), phase.sin(), mask)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate `x` [..., T, R], whose pairs are neighbours (0, 1), (2, 3), ...

    Returns:
        [..., T, R] float32, all rotated evens before all rotated odds. Query and key are
        permuted alike, so their product is that of the interleaved form.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angles.cos - odd * angles.sin, odd * angles.cos + even * angles.sin)
    return torch.cat(turned, -1)


class LatentAttention(nn.Module):
    """MLA in its naive (expanded) form, with a low-rank query."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, heads = shape.hidden_size, shape.num_attention_heads
        self.shape = shape
        self.q_a_proj = linear(hidden, shape.q_lora_rank)
        self.q_a_layernorm = RmsNorm(shape.q_lora_rank)
        self.q_b_proj = linear(shape.q_lora_rank, heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim))
        self.kv_a_proj_with_mqa = linear(hidden, shape.kv_lora_rank + shape.qk_rope_head_dim)
        self.kv_a_layernorm = RmsNorm(shape.kv_lora_rank)
        self.kv_b_proj = linear(shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim))
        self.o_proj = linear(heads * shape.v_head_dim, hidden)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """Attend over `x` [B, T, N], each token to itself and to those before it."""
        s = self.shape
        nope, rope = s.qk_nope_head_dim, s.qk_rope_head_dim
        batch, tokens, _ = x.shape
        heads = (batch, tokens, s.num_attention_heads, -1)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(heads).transpose(1, 2)
        q_nope, q_rope = q.split([nope, rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([s.kv_lora_rank, rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(heads).transpose(1, 2)
        k_nope, v = kv.split([nope, s.v_head_dim], -1)
        q_rope = rotate(q_rope, angles).to(q.dtype)
        k_rope = rotate(k_rope[:, None], angles).to(q.dtype)
        scale = (nope + rope) ** -0.5
        scores = torch.matmul(q_nope * scale, k_nope.transpose(-1, -2))
        scores = scores + torch.matmul(q_rope * scale, k_rope.transpose(-1, -2))
        weights = (scores + angles.mask.to(scores.dtype)).softmax(-1).to(v.dtype)
        mixed = torch.matmul(weights, v).transpose(1, 2).reshape(batch, tokens, -1)
        return self.o_proj(mixed)


class Mlp(nn.Module):
    """A gated feed-forward: the dense layer, and the shared expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., N] to [..., N]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Routed experts with one shared expert.

    A sigmoid scores every expert; the groups with the best two biased scores stay; the K best
    biased experts of those are taken, weighted by their scores without the bias.
    """

    bias: Tensor
    """[E] float32; the score correction, moved by the trainer and never by a gradient."""
    count: Tensor
    """[E] float32; tokens sent to each expert since the trainer last cleared it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        experts, hidden = shape.n_routed_experts, shape.hidden_size
        width = shape.moe_intermediate_size
        self.shape = shape
        self.gate = nn.Parameter(torch.empty(experts, hidden))
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("count", torch.zeros(experts))
        self.gate_up = nn.Parameter(torch.empty(experts, hidden, 2 * width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.shared_experts = Mlp(hidden, width * shape.n_shared_experts)
        self.balance_loss = torch.zeros(())

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the experts of `x` [B*T, N].

        Returns:
            scores [B*T, E] float32, expert ids [B*T, K] int64, weights [B*T, K] float32.
        """
        s = self.shape
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.gate).sigmoid()
        biased = scores.detach() + self.bias
        in_group = s.n_routed_experts // s.n_group
        group_scores = biased.view(-1, s.n_group, in_group).topk(2, -1)[0].sum(-1)
        best = group_scores.topk(s.topk_group, -1)[1]
        kept = torch.zeros_like(group_scores).scatter_(1, best, 1.0)
        biased = biased.masked_fill(kept.repeat_interleave(in_group, 1) == 0, float("-inf"))
        ids = biased.topk(s.num_experts_per_tok, -1)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor
        return scores, ids, weights

    def _note_balance(self, scores: Tensor, ids: Tensor, batch: int) -> None:
        """Set the sequence-wise balance loss (report eq. 17 to 20)."""
        s = self.shape
        slots = ids.numel() // batch
        ones = torch.ones(batch, slots)
        share = torch.zeros(batch, s.n_routed_experts).scatter_add_(1, ids.view(batch, -1), ones)
        share = share * (s.n_routed_experts / slots)
        odds = scores / scores.sum(-1, keepdim=True)
        odds = odds.view(batch, -1, s.n_routed_experts).mean(1)
        self.balance_loss = (share * odds).sum(1).mean()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, T, N] to [B, T, N]; in training also counts the load of each expert."""
        hidden, experts = x.shape[-1], self.shape.n_routed_experts
        flat = x.reshape(-1, hidden)
        scores, ids, weights = self.route(flat)
        counts = torch.bincount(ids.reshape(-1), minlength=experts)
        if self.training:
            self.count += counts
            self._note_balance(scores, ids, x.shape[0])
        order = ids.reshape(-1).argsort(stable=True)
        capacity = -(-int(counts.max()) // _CAPACITY_STEP) * _CAPACITY_STEP
        sorted_ids = ids.reshape(-1)[order]
        rank = torch.arange(order.numel()) - (counts.cumsum(0) - counts)[sorted_ids]
        slot = sorted_ids * capacity + rank
        token = order // self.shape.num_experts_per_tok
        packed = flat.new_zeros(experts * capacity, hidden).index_copy(0, slot, flat[token])
        gate_up = self.gate_up.to(flat.dtype)
        gate, up = torch.bmm(packed.view(experts, capacity, hidden), gate_up).chunk(2, -1)
        made = torch.bmm(F.silu(gate) * up, self.down.to(flat.dtype)).view(-1, hidden)
        made = made[slot] * weights.reshape(-1)[order, None].to(made.dtype)
        routed = torch.zeros_like(flat, dtype=made.dtype).index_add(0, token, made)
        return routed.view_as(x) + self.shared_experts(x)


class Layer(nn.Module):
    """One transformer layer: attention, then the dense feed-forward or the experts."""

    def __init__(self, shape: Shape, *, is_dense: bool) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(hidden), RmsNorm(hidden)
        self.self_attn = LatentAttention(shape)
        self.mlp = Mlp(hidden, shape.intermediate_size) if is_dense else Experts(shape)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """Map `x` [B, T, N] to [B, T, N]."""
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class NextToken(nn.Module):
    """The MTP module: from a token's hidden state and its successor, the token after that."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.enorm, self.hnorm, self.norm = RmsNorm(hidden), RmsNorm(hidden), RmsNorm(hidden)
        self.eh_proj = linear(2 * hidden, hidden)
        self.block = Layer(shape, is_dense=False)

    def forward(self, embedded: Tensor, hidden: Tensor, angles: Angles) -> Tensor:
        """Combine `embedded` (of token i+1) with `hidden` (of token i), both [B, T, N]."""
        joined = torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1)
        return self.norm(self.block(self.eh_proj(joined), angles))


class Network(nn.Module):
    """The whole model: embedding, layers, final norm, head, and the MTP module."""

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        layers = range(shape.num_hidden_layers)
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, is_dense=i < shape.first_k_dense_replace) for i in layers)
        self.norm = RmsNorm(shape.hidden_size)
        self.lm_head = linear(shape.hidden_size, shape.vocab_size)
        self.mtp = NextToken(shape)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        depth = math.sqrt(2 * self.shape.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                scale = 1 / depth if name.endswith(_RESIDUAL_OUTPUTS) else 1
                std = self.shape.initializer_range * scale
                nn.init.normal_(weight, 0.0, std, generator=rng)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the normed hidden states [B, T, N] of `ids` [B, T] int64."""
        angles = make_angles(self.shape, ids.shape[1])
        x = self.embed_tokens(ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.bfloat16)
        for layer in self.layers:
            x = layer(x, angles)
        return self.norm(x)

    def draft(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Run the MTP module on a trunk that it does not train.

        Args:
            hidden: [B, T, N]; what `forward` gave for `ids`; no gradient flows into it.
            ids: [B, T] int64.

        Returns:
            [B, T-1, N]; row i predicts token i+2.
        """
        angles = make_angles(self.shape, ids.shape[1] - 1)
        embedded = self.embed_tokens(ids[:, 1:]).detach().to(hidden.dtype)
        return self.mtp(embedded, hidden[:, :-1].detach(), angles)

    def expert_layers(self) -> list[Experts]:
        """List the expert layers from the bottom up, that of the MTP module last."""
        return [module for module in self.modules() if isinstance(module, Experts)]
