"""Block-FP8 checkpoints, as DeepSeek-V3's: the oracle reads the float32 weights that the blocks stand for."""

from __future__ import annotations

import pytest
import torch
from headrace_core.families.config_json import parse_config
from headrace_core.model.load import load_model
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.tiny_checkpoints import (
    TINY_CONFIGS,
    Variation,
    quantise_fp8,
    random_tensors,
    write_config,
    write_tensors,
)


@pytest.mark.parametrize("name", ["v3", "v2", "glm4-moe-lite", "qwen3-moe"])
@pytest.mark.parametrize("block", [(128, 128), (16, 10)], ids=["larger", "partial"])
def test_block_fp8_weights_are_dequantised(name, block, tmp_path, oracle, random_tokens):
    config = TINY_CONFIGS[name]
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": list(block),
        "activation_scheme": "dynamic",
    }
    write_config(tmp_path / "fp8", {**config, "quantization_config": quantisation})
    write_config(tmp_path / "plain", config)
    tensors = random_tensors(parse_config(tmp_path / "plain"), Variation())
    stored, plain = quantise_fp8(tensors, block)
    write_tensors(tmp_path / "fp8", stored, num_shards=2)
    write_tensors(tmp_path / "plain", plain)

    token_ids = random_tokens(30)
    model = load_model(tmp_path / "fp8", dtype="float32")
    sequences = PagedSequences(model, page_size=4, num_pages=16)
    logits = model.all_logits([sequences.chunk(0, token_ids)], sequences.cache)[0]
    expected = oracle(tmp_path / "plain").logits(token_ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert load_model(tmp_path / "fp8", dtype="bfloat16").dtype == torch.bfloat16
