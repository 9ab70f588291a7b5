"""Kimi-K2.5's text part: DeepSeek-V3's network inside a model that sees, which it does not do here.

Source: transformers 5.23 Kimi_K25Config, conversion_mapping.py.
"""

from __future__ import annotations

from dataclasses import replace

from headrace_core.families import deepseek
from headrace_core.families.config import ModelConfig
from headrace_core.families.family import Family
from headrace_core.families.fields import Fields, unsupported
from headrace_core.families.weights import WeightTree

_TEXT = ("deepseek_v3", "kimi_k2")


def _parse(fields: Fields) -> ModelConfig:
    kind = fields.text("model_type", "deepseek_v3")
    if kind not in _TEXT:
        unsupported("text_config.model_type", kind, f"one of {', '.join(_TEXT)}")
    return replace(deepseek.parse_v3(fields), family="kimi_k25")


def _weights(config: ModelConfig) -> WeightTree:
    return deepseek.weights(config, "language_model.")


KIMI_K25 = Family(
    _parse,
    _weights,
    defaults=deepseek.DEEPSEEK_V3.defaults,
    section="text_config",
    other_parts=("vision_tower.", "mm_projector."),
)
