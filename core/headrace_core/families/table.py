"""Every `model_type` that Headrace runs."""

from __future__ import annotations

from headrace_core.families.config import ModelConfig
from headrace_core.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from headrace_core.families.deepseek_v32 import DEEPSEEK_V32
from headrace_core.families.family import Family
from headrace_core.families.glm4_moe_lite import GLM4_MOE_LITE
from headrace_core.families.kimi_k25 import KIMI_K25
from headrace_core.families.mixtral import MIXTRAL
from headrace_core.families.qwen3_moe import QWEN3_MOE
from headrace_core.families.weights import WeightTree

FAMILIES: dict[str, Family] = {
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": KIMI_K2,
    "kimi_k25": KIMI_K25,
    "deepseek_v32": DEEPSEEK_V32,
    "deepseek_v2": DEEPSEEK_V2,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}


def weights(config: ModelConfig) -> WeightTree:
    """Return every weight that the network of `config` needs."""
    return FAMILIES[config.family].weights(config)
