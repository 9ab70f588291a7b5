"""Parse config.json as Hugging Face checkpoints have it, old spellings and new, and refuse what would be misread.

Of generation_config.json only the end-of-sequence ids are read: where it names any (`eos_token_id`: an id, or a list,
which may be empty), they replace config.json's, as in transformers. A file that names none (null, or no such field)
leaves config.json's, where transformers would go on past every end. Its sampling defaults (`temperature`, `top_p`,
`max_new_tokens` ...) are not applied: a request says what it wants.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

from headrace_core.checkpoint.class_defaults import CLASS_DEFAULTS
from headrace_core.checkpoint.config import (
    GqaShape,
    MlaShape,
    ModelConfig,
    MoeShape,
    RopeShape,
    YarnScaling,
)
from headrace_core.errors import CheckpointError
from headrace_core.json_file import UnreadableError, is_there, read_object
from headrace_core.request import MAX_COUNT, MAX_EOS_TOKEN_IDS

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_EOS = "eos_token_id"
_MAX_FLOAT = (2 - 2**-23) * 2.0**127
"""The largest of float32, in which every such number meets the network's."""
_MAX_SHOWN = 200
"""Characters of a value that a message repeats."""
_DTYPES = ("float32", "bfloat16", "float16")
# Kimi-K2 is DeepSeek-V3's architecture under a name of its own.
_FAMILIES = {
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "deepseek_v2": "deepseek_v2",
    "mixtral": "mixtral",
}


def parse_config(directory: Path) -> ModelConfig:
    """Return what `directory`/config.json describes, and which tokens end a text by generation_config.json beside it.

    Raises:
        CheckpointError: BAD_CONFIG if config.json is missing, or either file is unreadable or inconsistent;
            UNSUPPORTED_MODEL if it asks for something that Headrace does not compute. The message names file and field.
    """
    fields = _Fields(_with_defaults(_read(directory / _CONFIG)))
    config = _parse_network(fields)
    path = directory / _GENERATION_CONFIG
    generation = _Fields(_read(path) if is_there(path) else {}, file=_GENERATION_CONFIG)
    return replace(config, eos_token_ids=_parse_eos(generation if _EOS in generation else fields, config.vocab_size))


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json, and of those that are left out what the model's class takes."""
    return {**CLASS_DEFAULTS.get(str(values.get("model_type")), {}), **values}


def _parse_network(fields: _Fields) -> ModelConfig:
    family = _FAMILIES.get(fields.text("model_type"))
    if family is None:
        unsupported("model_type", fields.text("model_type"), f"one of {', '.join(_FAMILIES)}")
    if "sliding_window" in fields:
        # Also where the network has none: transformers' cache forgets what is behind it.
        unsupported("sliding_window", fields.raw("sliding_window"), "null")
    kinds: object = fields.raw("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in cast("list[object]", kinds)):
        unsupported("layer_types", kinds, "full_attention alone")
    fields.only("hidden_act", "silu", default="silu")
    return _parse_mixtral(fields) if family == "mixtral" else _parse_deepseek(fields, family)


def unsupported(name: str, value: object, supported: str) -> NoReturn:
    """Refuse a config that asks for something that is not implemented."""
    raise CheckpointError("UNSUPPORTED_MODEL", f"{_CONFIG}: {name} is {_shown(value)}; Headrace supports {supported}")


def bad(name: str, value: object, expected: str, *, file: str = _CONFIG) -> NoReturn:
    """Refuse a config that makes no sense."""
    raise CheckpointError("BAD_CONFIG", f"{file}: {name} is {_shown(value)}; it must be {expected}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


class _Fields:
    """Typed access to the fields of a JSON object; a wrong type or range is refused by name."""

    def __init__(self, values: dict[str, Any], prefix: str = "", *, file: str = _CONFIG) -> None:
        self.file = file
        self._values = values
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        return name in self._values and self._values[name] is None

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        return value if isinstance(value, str) else bad(self._prefix + name, value, "a string")

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._value(name, default)
        if type(value) is not int or not least <= value <= MAX_COUNT:
            bad(self._prefix + name, value, f"a whole number, {least} to {MAX_COUNT}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        # Whole numbers are compared as they are: one of 400 digits is no float. NaN is in no range.
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MAX_FLOAT <= value <= _MAX_FLOAT:
            bad(self._prefix + name, value, f"a number in the range of float32, {-_MAX_FLOAT:g} to {_MAX_FLOAT:g}")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        return value if value > 0 else bad(self._prefix + name, value, "greater than 0")

    def flag(self, name: str, default: bool) -> bool:
        """Return a field of true and false; null is false whatever the default, as where Python asks if it is true."""
        if self.is_null(name):
            return False
        value = self._value(name, default)
        return value if isinstance(value, bool) else bad(self._prefix + name, value, "true or false")

    def only(self, name: str, supported: object, default: object) -> None:
        value = self._value(name, default)
        if value != supported:
            unsupported(self._prefix + name, value, repr(supported))

    def object(self, name: str) -> _Fields | None:
        value = self.raw(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            bad(self._prefix + name, value, "an object or null")
        return _Fields(value, f"{self._prefix}{name}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            what = "is null" if name in self._values else "is missing"
            raise CheckpointError("BAD_CONFIG", f"{self.file}: {self._prefix}{name} {what} and has no default")
        return value


def _read(path: Path) -> dict[str, Any]:
    if not is_there(path):
        raise CheckpointError("BAD_CONFIG", f"{path} does not exist; give the folder of a Hugging Face checkpoint")
    try:
        return read_object(path)
    except UnreadableError as error:
        raise CheckpointError("UNREADABLE_FILE", str(error)) from None
    except ValueError as error:
        raise CheckpointError("BAD_CONFIG", str(error)) from None


def _parse_deepseek(fields: _Fields, family: str) -> ModelConfig:
    is_v3 = family == "deepseek_v3"
    fields.only("mlp_bias", False, default=False)
    attention = MlaShape(
        q_lora_rank=fields.count("q_lora_rank") if "q_lora_rank" in fields else None,
        kv_lora_rank=fields.count("kv_lora_rank"),
        nope_dim=fields.count("qk_nope_head_dim"),
        rope_dim=fields.count("qk_rope_head_dim", least=2),
        value_dim=fields.count("v_head_dim"),
        is_rope_interleaved=fields.flag("rope_interleave", True) if is_v3 else True,
    )
    num_heads = fields.count("num_attention_heads")
    if fields.count("num_key_value_heads", num_heads) != num_heads:
        bad("num_key_value_heads", fields.raw("num_key_value_heads"), "num_attention_heads with latent attention")
    if attention.value_dim > attention.nope_dim + attention.rope_dim:
        unsupported("v_head_dim", attention.value_dim, "at most qk_nope_head_dim + qk_rope_head_dim")
    moe = _parse_v3_moe(fields) if is_v3 else _parse_v2_moe(fields)
    return ModelConfig(
        family="deepseek_v3" if is_v3 else "deepseek_v2",
        dense_intermediate_size=fields.count("intermediate_size"),
        has_attention_bias=fields.flag("attention_bias", False),
        attention=attention,
        rope=_parse_rope(fields, attention.rope_dim, default_theta=10_000.0),
        moe=moe,
        num_heads=num_heads,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        num_mtp_layers=fields.count("num_nextn_predict_layers", 0, least=0),
        fp8_block=_parse_fp8_block(fields),
        **_parse_common(fields),
    )


def _parse_mixtral(fields: _Fields) -> ModelConfig:
    if "quantization_config" in fields:
        unsupported("quantization_config", fields.raw("quantization_config"), "null for mixtral")
    num_heads, hidden_size = fields.count("num_attention_heads"), fields.count("hidden_size")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        bad("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads, {num_heads}")
    if "head_dim" not in fields and hidden_size % num_heads:
        bad("hidden_size", hidden_size, f"a multiple of num_attention_heads, {num_heads}, or head_dim given")
    head_dim = fields.count("head_dim", hidden_size // num_heads, least=2)
    moe = MoeShape(
        num_experts=fields.count("num_local_experts"),
        num_experts_per_token=fields.count("num_experts_per_tok", 2),
        intermediate_size=fields.count("intermediate_size"),
        num_shared_experts=0,
        num_first_dense_layers=0,
        layer_stride=1,
        scoring="softmax",
        num_groups=1,
        num_groups_kept=1,
        is_group_score_top2=False,
        is_normalised=True,
        scaling_factor=1.0,
        has_correction_bias=False,
    )
    return ModelConfig(
        family="mixtral",
        dense_intermediate_size=fields.count("intermediate_size"),
        has_attention_bias=False,
        attention=GqaShape(num_kv_heads, head_dim),
        rope=_parse_rope(fields, head_dim, default_theta=1_000_000.0),
        moe=_checked_moe(moe),
        num_heads=num_heads,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-5),
        **_parse_common(fields),
    )


def _parse_common(fields: _Fields) -> dict[str, Any]:
    dtype = fields.text("dtype", fields.raw("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in _DTYPES:
        unsupported("dtype", dtype, f"one of {', '.join(_DTYPES)}")
    return {
        "vocab_size": fields.count("vocab_size"),
        "num_layers": fields.count("num_hidden_layers"),
        "hidden_size": fields.count("hidden_size"),
        "max_context_tokens": fields.count("max_position_embeddings", least=2),  # one of prompt, one of output
        "eos_token_ids": (),  # which file names them is not this one's to say
        "checkpoint_dtype": dtype,
        "is_embedding_tied": fields.flag("tie_word_embeddings", False),
    }


def _parse_eos(fields: _Fields, vocab_size: int) -> tuple[int, ...]:
    value = fields.raw(_EOS)
    token_ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            bad(_EOS, value, f"a token id below vocab_size, {vocab_size}, a list of them, or null", file=fields.file)
    unique = tuple(dict.fromkeys(token_ids))
    if len(unique) > MAX_EOS_TOKEN_IDS:
        bad(_EOS, value, f"at most {MAX_EOS_TOKEN_IDS} token ids", file=fields.file)
    return unique


def _parse_v3_moe(fields: _Fields) -> MoeShape:
    fields.only("topk_method", "noaux_tc", default="noaux_tc")
    fields.only("scoring_func", "sigmoid", default="sigmoid")
    num_experts = fields.count("n_routed_experts")
    num_groups = fields.count("n_group")
    if num_groups > 1 and num_experts // num_groups < 2:
        bad("n_group", num_groups, f"at most half of n_routed_experts, {num_experts}")
    return _checked_moe(
        MoeShape(
            scoring="sigmoid",
            num_groups=num_groups,
            num_groups_kept=fields.count("topk_group"),
            is_group_score_top2=True,
            is_normalised=fields.flag("norm_topk_prob", True),
            scaling_factor=fields.number("routed_scaling_factor"),
            has_correction_bias=True,
            **_parse_deepseek_experts(fields),
        )
    )


def _parse_v2_moe(fields: _Fields) -> MoeShape:
    fields.only("scoring_func", "softmax", default="softmax")
    if fields.flag("norm_topk_prob", False):
        # transformers ignores it here, the model's own code drops the scaling factor with it.
        unsupported("norm_topk_prob", True, "false for deepseek_v2, where implementations disagree")
    method = fields.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        unsupported("topk_method", method, "greedy or group_limited_greedy for deepseek_v2")
    is_grouped = method == "group_limited_greedy"
    return _checked_moe(
        MoeShape(
            scoring="softmax",
            num_groups=fields.count("n_group") if is_grouped else 1,
            num_groups_kept=fields.count("topk_group") if is_grouped else 1,
            is_group_score_top2=False,
            is_normalised=False,
            scaling_factor=fields.number("routed_scaling_factor", 1.0),
            has_correction_bias=False,
            **_parse_deepseek_experts(fields),
        )
    )


def _parse_deepseek_experts(fields: _Fields) -> dict[str, Any]:
    return {
        "num_experts": fields.count("n_routed_experts"),
        "num_experts_per_token": fields.count("num_experts_per_tok"),
        "intermediate_size": fields.count("moe_intermediate_size"),
        "num_shared_experts": 0 if fields.is_null("n_shared_experts") else fields.count("n_shared_experts", least=0),
        "num_first_dense_layers": fields.count("first_k_dense_replace", least=0),
        "layer_stride": fields.count("moe_layer_freq", 1),
    }


def _checked_moe(moe: MoeShape) -> MoeShape:
    if moe.num_experts % moe.num_groups:
        bad("n_group", moe.num_groups, f"a divisor of the number of experts, {moe.num_experts}")
    if moe.num_groups_kept > moe.num_groups:
        bad("topk_group", moe.num_groups_kept, f"at most n_group, {moe.num_groups}")
    choice = moe.num_experts // moe.num_groups * moe.num_groups_kept
    if moe.num_experts_per_token > choice:
        bad("num_experts_per_tok", moe.num_experts_per_token, f"at most {choice}, the experts to choose from")
    return moe


def _parse_rope(fields: _Fields, dim: int, *, default_theta: float) -> RopeShape:
    if dim % 2:
        bad("rotary width of a head", dim, "even")
    # transformers, too, lets the legacy spelling win.
    scaling = fields.object("rope_scaling") or fields.object("rope_parameters") or _Fields({})
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


def _parse_fp8_block(fields: _Fields) -> tuple[int, int] | None:
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
