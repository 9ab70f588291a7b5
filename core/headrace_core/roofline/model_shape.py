"""The sizes of a network that decide what a step costs, for models that Headrace runs and for others to compare with.

`headrace_core.families` refuses what the engine does not compute; this reads any decoder of the usual kinds
(MLA, GQA, MHA; dense or mixture of experts), because a plan may well be for a model that is not served yet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

from headrace_core.folder_name import folder_name
from headrace_core.scalar import Scalar


class Dtype(Enum):
    """A scalar type that weights, activations or cached values have."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"

    @property
    def itemsize(self) -> int:
        """Bytes a value takes; block scales of FP8 weights (below 4 %) are not counted."""
        return self.scalar.itemsize

    @property
    def scalar(self) -> Scalar:
        """What it is to the engine."""
        return _SCALARS[self]

    @property
    def activation(self) -> Dtype:
        """The type that activations have when weights have this one."""
        return Dtype.BF16 if self is Dtype.FP8 else self


_SCALARS = {
    Dtype.FP32: Scalar.FLOAT32, Dtype.BF16: Scalar.BFLOAT16, Dtype.FP16: Scalar.FLOAT16, Dtype.FP8: Scalar.FLOAT8_E4M3
}  # fmt: skip


class ModelShapeError(ValueError):
    """A config.json does not describe a network this can count."""


@dataclass(frozen=True, slots=True)
class IndexerShape:
    """What chooses the `top_k` tokens that a query attends to: `num_heads` queries of `head_dim`, one key a token."""

    num_heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, slots=True)
class MlaShape:
    """Multi-head latent attention. `q_lora_rank` 0: queries are projected in one step. `indexer` None: over all."""

    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    indexer: IndexerShape | None = None

    def cached_bytes_per_token(self, dtype: Dtype) -> int:
        """Return the bytes a token caches per layer, shared by all heads; in FP8 with scales, and rope in BF16."""
        index_dim = self.indexer.head_dim if self.indexer else 0
        if dtype is Dtype.FP8:
            scales = -(-self.kv_lora_rank // 128) + -(-index_dim // 128)
            return self.kv_lora_rank + index_dim + 4 * scales + 2 * self.rope_dim
        return (self.kv_lora_rank + self.rope_dim + index_dim) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class GqaShape:
    """Grouped-query attention; with as many KV heads as query heads, multi-head attention."""

    num_kv_heads: int
    head_dim: int

    def cached_bytes_per_token(self, dtype: Dtype) -> int:
        """Return the bytes a token caches per layer, keys and values of all KV heads."""
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Mixture of experts. The shared experts count as one of `shared_intermediate_size`."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    num_dense_layers: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer with SwiGLU feed-forward networks. `moe` None: every layer is dense."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    dense_intermediate_size: int
    attention: MlaShape | GqaShape
    moe: MoeShape | None = None
    is_embedding_tied: bool = False

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_layers - self.moe.num_dense_layers if self.moe else 0

    @property
    def num_dense_layers(self) -> int:
        """Layers with one feed-forward network."""
        return self.num_layers - self.num_moe_layers

    def kv_bytes_per_token(self, dtype: Dtype = Dtype.BF16) -> int:
        """Return the bytes a token caches over all layers; DeepSeek-V3 in bf16: 70,272."""
        return self.num_layers * self.attention.cached_bytes_per_token(dtype)

    @classmethod
    def from_config(cls, config: dict[str, Any], name: str = "") -> ModelShape:
        """Read the fields of a Hugging Face config.json.

        Raises:
            ModelShapeError: Naming the field that is missing, not a whole number, or of what is not counted.
        """
        if isinstance(text := config.get("text_config"), dict):
            return cls.from_config(cast("dict[str, Any]", text), name)
        hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        if config.get("index_topk") and not config.get("kv_lora_rank"):
            raise ModelShapeError("config.json: index_topk is known here with latents alone: kv_lora_rank is missing")
        attention = _latent_attention(config) if config.get("kv_lora_rank") else _grouped_attention(config)
        moe = _moe(config)
        dense = config.get("intermediate_size") or (moe.intermediate_size if moe else 0)
        if not dense:
            raise ModelShapeError("config.json: intermediate_size is missing")
        return cls(
            name=name or str(config.get("model_type", "model")),
            num_layers=_count(config, "num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            vocab_size=_count(config, "vocab_size"),
            dense_intermediate_size=int(dense),
            attention=attention,
            moe=moe,
            is_embedding_tied=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def load(cls, model: str | Path) -> ModelShape:
        """Return the preset of this name, or read the config.json that `model` is or contains.

        Raises:
            ModelShapeError: There is neither, or config.json can't be used.
        """
        if str(model) in MODELS:
            return MODELS[str(model)]
        path = Path(model)
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelShapeError(
                f"{str(model)!r} is neither one of {', '.join(MODELS)} nor a config.json or a folder that has one"
            ) from None
        except (OSError, ValueError) as error:
            raise ModelShapeError(f"{path} can't be read as JSON: {error}") from None
        if not isinstance(config, dict):
            raise ModelShapeError(f"{path} must hold a JSON object")
        return cls.from_config(config, folder_name(path.parent))


def _count(config: dict[str, Any], *names: str, default: int | None = None) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelShapeError(f"config.json: {names[0]} must be a whole number, it is {value!r}")
    return value


def _latent_attention(config: dict[str, Any]) -> MlaShape:
    return MlaShape(
        q_lora_rank=_count(config, "q_lora_rank", default=0),
        kv_lora_rank=_count(config, "kv_lora_rank"),
        nope_dim=_count(config, "qk_nope_head_dim"),
        rope_dim=_count(config, "qk_rope_head_dim"),
        value_dim=_count(config, "v_head_dim"),
        indexer=_indexer(config),
    )


def _indexer(config: dict[str, Any]) -> IndexerShape | None:
    if not config.get("index_topk"):
        return None
    if not config.get("q_lora_rank"):
        raise ModelShapeError("config.json: q_lora_rank must not be 0 with index_topk: index queries are made of it")
    return IndexerShape(*(_count(config, name) for name in ("index_n_heads", "index_head_dim", "index_topk")))


def _grouped_attention(config: dict[str, Any]) -> GqaShape:
    heads = _count(config, "num_attention_heads")
    head_dim = _count(config, "head_dim", default=_count(config, "hidden_size") // max(1, heads))
    return GqaShape(_count(config, "num_key_value_heads", default=heads), head_dim)


def _moe(config: dict[str, Any]) -> MoeShape | None:
    experts = _count(config, "n_routed_experts", "num_local_experts", "num_experts", default=0)
    if not experts:
        return None
    width = _count(config, "moe_intermediate_size", "intermediate_size")
    shared = _count(config, "shared_expert_intermediate_size", default=0)
    return MoeShape(
        num_experts=experts,
        num_experts_per_token=_count(config, "num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=shared or _count(config, "n_shared_experts", default=0) * width,
        num_dense_layers=_num_dense_layers(config),
    )


_MOST_LAYERS = 1 << 20
"""They are counted one by one."""


def _num_dense_layers(config: dict[str, Any]) -> int:
    """Return how many layers have no experts, by the fields that families have for it."""
    if isinstance(kinds := config.get("mlp_layer_types"), list):
        return cast("list[object]", kinds).count("dense")
    first, every = _count(config, "first_k_dense_replace", default=0), _count(config, "moe_layer_freq", default=1)
    step, named = _count(config, "decoder_sparse_step", default=1), config.get("mlp_only_layers") or ()
    num_layers = _count(config, "num_hidden_layers")
    if num_layers > _MOST_LAYERS:
        raise ModelShapeError(f"config.json: num_hidden_layers must be at most {_MOST_LAYERS}, it is {num_layers}")
    return sum(
        layer < first or layer % max(1, every) != 0 or (layer + 1) % max(1, step) != 0 or layer in named
        for layer in range(num_layers)
    )


DEEPSEEK_V3 = ModelShape(
    "deepseek-v3", 61, 7168, 128, 129_280, 18_432, MlaShape(1536, 512, 128, 64, 128), MoeShape(256, 8, 2048, 2048, 3)
)
DEEPSEEK_V32 = replace(
    DEEPSEEK_V3, name="deepseek-v3.2", attention=MlaShape(1536, 512, 128, 64, 128, IndexerShape(64, 128, 2048))
)
DEEPSEEK_V2 = ModelShape(
    "deepseek-v2", 60, 5120, 128, 102_400, 12_288, MlaShape(1536, 512, 128, 64, 128), MoeShape(160, 6, 1536, 3072, 1)
)
DEEPSEEK_V2_LITE = ModelShape(
    "deepseek-v2-lite", 27, 2048, 16, 102_400, 10_944, MlaShape(0, 512, 128, 64, 128), MoeShape(64, 6, 1408, 2816, 1)
)
MOONLIGHT = ModelShape(
    "moonlight-16b", 27, 2048, 16, 163_840, 11_264, MlaShape(0, 512, 128, 64, 128), MoeShape(64, 6, 1408, 2816, 1)
)
KIMI_K2 = ModelShape(
    "kimi-k2", 61, 7168, 64, 163_840, 18_432, MlaShape(1536, 512, 128, 64, 128), MoeShape(384, 8, 2048, 2048, 1)
)
MIXTRAL_8X7B = ModelShape(
    "mixtral-8x7b", 32, 4096, 32, 32_000, 14_336, GqaShape(8, 128), MoeShape(8, 2, 14_336)
)  # fmt: skip
QWEN3_30B_A3B = ModelShape("qwen3-30b-a3b", 48, 2048, 32, 151_936, 6144, GqaShape(4, 128), MoeShape(128, 8, 768))
LLAMA_3_8B = ModelShape("llama-3-8b", 32, 4096, 32, 128_256, 14_336, GqaShape(8, 128))
LLAMA_3_70B = ModelShape("llama-3-70b", 80, 8192, 64, 128_256, 28_672, GqaShape(8, 128))
LLAMA_3_1_405B = ModelShape("llama-3.1-405b", 126, 16_384, 128, 128_256, 53_248, GqaShape(8, 128))

MODELS = {
    shape.name: shape
    for shape in (
        DEEPSEEK_V3, DEEPSEEK_V32, DEEPSEEK_V2, DEEPSEEK_V2_LITE, MOONLIGHT, KIMI_K2, MIXTRAL_8X7B, QWEN3_30B_A3B,
        LLAMA_3_8B, LLAMA_3_70B, LLAMA_3_1_405B,
    )
}  # fmt: skip
"""Published models by name; sizes from their config.json on Hugging Face."""
