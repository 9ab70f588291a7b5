"""What a checkpoint's config.json says about its network, checked, in one vocabulary for all families.

Sizes keep Hugging Face's meaning; names are Headrace's. `config_json` reads it from the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention


@dataclass(frozen=True, slots=True)
class IndexerShape:
    """What chooses the `top_k` tokens that a query attends to: `num_heads` queries of `head_dim`, one key a token."""

    num_heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, slots=True)
class MlaShape:
    """Multi-head latent attention.

    `q_lora_rank` None: queries are projected in one step. `indexer` None: a query attends to all tokens.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    is_rope_interleaved: bool
    indexer: IndexerShape | None = None


@dataclass(frozen=True, slots=True)
class GqaShape:
    """Grouped-query attention. `has_head_norms`: each head's query and key are normalised before they are rotated."""

    num_kv_heads: int
    head_dim: int
    has_head_norms: bool = False


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Context extension by YaRN. `attention_factor` None: derived from the rest."""

    factor: float
    original_max_tokens: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    attention_factor: float | None
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class RopeShape:
    """Rotary embedding of `dim` values of each head. `yarn` None: unscaled."""

    dim: int
    theta: float
    yarn: YarnScaling | None


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Mixture of experts of the layers that have one.

    A layer is dense if its index is below `num_first_dense_layers`, leaves another remainder by `layer_stride` than
    `layer_remainder`, or is one of `dense_layers`. The rest is `headrace_kernels.routing_rule.RoutingRule`, and whether
    a correction bias joins the choice.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    num_shared_experts: int
    num_first_dense_layers: int
    layer_stride: int
    scoring: Literal["sigmoid", "softmax"]
    num_groups: int
    num_groups_kept: int
    is_group_score_top2: bool
    is_normalised: bool
    scaling_factor: float
    has_correction_bias: bool
    layer_remainder: int = 0
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A network that Headrace can run.

    `family` is the key of `table.FAMILIES` by which its weights are found. `checkpoint_dtype` is torch's name of the
    type that weights are meant to have ("bfloat16"; also for block-FP8 checkpoints, whose block's sides are
    `fp8_block`). `max_context_tokens` counts prompt and output. `num_mtp_layers` modules for multi-token prediction
    are in the checkpoint after the layers; `num_run_mtp_layers` of them, 0 or 1, are run: they guess tokens, and choose
    none. A token of `eos_token_ids` ends a text.
    """

    family: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    dense_intermediate_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str
    rms_norm_eps: float
    is_embedding_tied: bool
    has_attention_bias: bool
    attention: MlaShape | GqaShape
    rope: RopeShape
    moe: MoeShape
    num_mtp_layers: int = 0
    num_run_mtp_layers: int = 0
    fp8_block: tuple[int, int] | None = None

    @property
    def is_attention_sparse(self) -> bool:
        """True if a query attends to tokens that an indexer chooses."""
        return isinstance(self.attention, MlaShape) and self.attention.indexer is not None

    def is_moe_layer(self, layer: int) -> bool:
        """True if the layer has routed experts; dense otherwise."""
        moe = self.moe
        if layer < moe.num_first_dense_layers or layer in moe.dense_layers:
            return False
        return layer % moe.layer_stride == moe.layer_remainder

    def kv_layout(self, page_size: int, dtype: CacheDtype) -> KvLayout:
        """Return what a page of this network's cache holds."""
        shape = self.attention
        attention = (
            LatentAttention(shape.kv_lora_rank, shape.rope_dim, shape.indexer.head_dim if shape.indexer else 0)
            if isinstance(shape, MlaShape)
            else KeyValueAttention(shape.num_kv_heads, shape.head_dim)
        )
        return KvLayout(self.num_layers + self.num_run_mtp_layers, page_size, dtype, attention)
