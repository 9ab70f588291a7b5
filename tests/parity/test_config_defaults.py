"""A config.json that leaves fields out means what it means to transformers."""

from __future__ import annotations

import json

import pytest
from headrace_core.errors import CheckpointError
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import FAMILIES
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Glm4MoeLiteConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

CLASSES = {
    "deepseek_v3": DeepseekV3Config,
    "deepseek_v32": DeepseekV32Config,
    "deepseek_v2": DeepseekV2Config,
    "glm4_moe_lite": Glm4MoeLiteConfig,
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
}
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 6}}
"""What even the class needs to be told."""


def test_every_family_is_held_against_its_class():
    theirs = {"kimi_k2", "kimi_k25"}  # classes that are their authors' own code, or hold another's
    assert set(CLASSES) == set(FAMILIES) - theirs


def read(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return parse_config(folder)


@pytest.mark.parametrize("model_type", CLASSES)
def test_what_is_left_out_is_what_the_class_takes(tmp_path, model_type):
    whole = CLASSES[model_type](**NEEDED.get(model_type, {})).to_dict()
    said = {**whole, "dtype": "bfloat16", "attention_bias": False}
    assert read(tmp_path, {"model_type": model_type, **NEEDED.get(model_type, {})}) == read(tmp_path, said)
    for name in whole:
        if name != "model_type" and name not in NEEDED.get(model_type, {}):
            assert read(tmp_path, {key: value for key, value in said.items() if key != name}) == read(tmp_path, said)


@pytest.mark.parametrize("model_type", CLASSES)
def test_null_is_not_left_out(tmp_path, model_type):
    for name in FAMILIES[model_type].defaults:
        if name in (
            "q_lora_rank",
            "n_shared_experts",
            "eos_token_id",
            "num_key_value_heads",
            "num_nextn_predict_layers",
            "rms_norm_eps",
        ):
            continue  # null has a meaning there
        values = {"model_type": model_type, **NEEDED.get(model_type, {}), name: None}
        with pytest.raises(CheckpointError, match=f"{name} is null"):
            read(tmp_path, values)
