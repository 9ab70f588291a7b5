"""Fields of config.json that families have in common."""

from __future__ import annotations

from typing import Any, cast

from headrace_core.families.config import GqaShape, MoeShape, RopeShape, YarnScaling
from headrace_core.families.fields import Fields, bad, unsupported
from headrace_core.request import MAX_COUNT
from headrace_core.scalar import COMPUTE


def refuse_windows(fields: Fields, layer_type: str = "full_attention") -> None:
    """Refuse attention that sees less than the whole context; every layer's is of one `layer_type`."""
    if "sliding_window" in fields:
        # Also where the network has none: transformers' cache forgets what is behind it.
        unsupported("sliding_window", fields.raw("sliding_window"), "null")
    refuse_layer_types(fields, layer_type)


def refuse_layer_types(fields: Fields, layer_type: str = "full_attention") -> None:
    """Refuse layers with any other kind of attention, which is to the whole context unless said otherwise."""
    kinds: object = fields.raw("layer_types") or []
    if not isinstance(kinds, list) or any(kind != layer_type for kind in cast("list[object]", kinds)):
        unsupported("layer_types", kinds, f"{layer_type} alone")


def parse_common(fields: Fields) -> dict[str, Any]:
    """Return what every family says in the same fields, by `ModelConfig`'s names."""
    fields.only("hidden_act", "silu", default="silu")
    dtype = fields.text("dtype", fields.raw("torch_dtype") or "bfloat16").removeprefix("torch.")
    known = [scalar.value for scalar in COMPUTE]
    if dtype not in known:
        unsupported("dtype", dtype, f"one of {', '.join(known)}")
    return {
        "vocab_size": fields.count("vocab_size"),
        "num_layers": fields.count("num_hidden_layers"),
        "hidden_size": fields.count("hidden_size"),
        "max_context_tokens": fields.count("max_position_embeddings", least=2),  # one of prompt, one of output
        "eos_token_ids": (),  # which file names them is not this one's to say
        "checkpoint_dtype": dtype,
        "is_embedding_tied": fields.flag("tie_word_embeddings", False),
    }


def parse_grouped_query(fields: Fields, *, has_head_norms: bool = False) -> GqaShape:
    """Return attention by keys and values; a head is as wide as said, or its share of the hidden size."""
    num_heads, hidden_size = fields.count("num_attention_heads"), fields.count("hidden_size")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        bad("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads, {num_heads}")
    if "head_dim" not in fields and hidden_size % num_heads:
        bad("hidden_size", hidden_size, f"a multiple of num_attention_heads, {num_heads}, or head_dim given")
    head_dim = fields.count("head_dim", hidden_size // num_heads, least=2)
    return GqaShape(num_kv_heads, head_dim, has_head_norms)


def checked_moe(moe: MoeShape) -> MoeShape:
    """Return `moe` if its groups and choices are possible; refuse it by field otherwise."""
    if moe.num_experts % moe.num_groups:
        bad("n_group", moe.num_groups, f"a divisor of the number of experts, {moe.num_experts}")
    if moe.num_groups_kept > moe.num_groups:
        bad("topk_group", moe.num_groups_kept, f"at most n_group, {moe.num_groups}")
    choice = moe.num_experts // moe.num_groups * moe.num_groups_kept
    if moe.num_experts_per_token > choice:
        bad("num_experts_per_tok", moe.num_experts_per_token, f"at most {choice}, the experts to choose from")
    return moe


def parse_rope(fields: Fields, dim: int, *, default_theta: float) -> RopeShape:
    """Return the rotary embedding of `dim` values of a head, in either spelling."""
    if dim % 2:
        bad("rotary width of a head", dim, "even")
    # transformers, too, lets the legacy spelling win.
    scaling = fields.object("rope_scaling") or fields.object("rope_parameters") or Fields({})
    scaling.only("partial_rotary_factor", 1.0, default=1.0)
    fields.only("partial_rotary_factor", 1.0, default=1.0)
    theta = scaling.positive("rope_theta", fields.positive("rope_theta", default_theta))
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return RopeShape(dim, theta, None)
    if kind != "yarn":
        unsupported("rope_scaling.rope_type", kind, "default or yarn")
    yarn = YarnScaling(
        factor=scaling.positive("factor"),
        original_max_tokens=scaling.count("original_max_position_embeddings", fields.count("max_position_embeddings")),
        beta_fast=scaling.number("beta_fast", 32.0) or 32.0,
        beta_slow=scaling.number("beta_slow", 1.0) or 1.0,
        mscale=scaling.number("mscale", 0.0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0),
        attention_factor=scaling.number("attention_factor") if "attention_factor" in scaling else None,
        is_truncated=scaling.flag("truncate", True),
    )
    return RopeShape(dim, theta, yarn)


def parse_fp8_block(fields: Fields) -> tuple[int, int] | None:
    """Return the sides of a block of FP8 weights, None where weights are plain; refuse other quantisations by name."""
    quantization = fields.object("quantization_config")
    if quantization is None:
        return None
    quantization.only("quant_method", "fp8", default="fp8")
    quantization.only("fmt", "e4m3", default="e4m3")
    block = quantization.raw("weight_block_size")
    is_block = isinstance(block, list) and len(cast("list[object]", block)) == 2
    if not is_block or not all(type(side) is int and 1 <= side <= MAX_COUNT for side in block):
        unsupported("quantization_config.weight_block_size", block, "two sides of a block, such as [128, 128]")
    return (block[0], block[1])
