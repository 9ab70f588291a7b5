"""Sparse attention by hand: DeepSeek-V3.2's published sizes, its indexer over all tokens, attention over 2,048."""

from __future__ import annotations

from pathlib import Path

import pytest
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import HARDWARE
from headrace_core.roofline.memory import kv_bytes_per_gpu, parameters
from headrace_core.roofline.model_shape import (
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    Dtype,
    IndexerShape,
    ModelShape,
    ModelShapeError,
)
from headrace_core.roofline.operations import Operation, Phase, operations, step_operations
from headrace_core.roofline.roofline import roofline
from headrace_core.roofline.step_load import StepLoad

# config.json of deepseek-ai/DeepSeek-V3.2-Exp.
LAYERS, HIDDEN, HEADS, QUERY, LATENT, ROPE, NOPE, VALUE = 61, 7168, 128, 1536, 512, 64, 128, 128
INDEX_HEADS, INDEX_DIM, TOP_K = 64, 128, 2048
ABSORBED = 2 * HEADS * (LATENT + ROPE + LATENT)
"""FLOPs of a query and a token it takes: both products, over the latent."""
EXPANDED = 2 * HEADS * (NOPE + ROPE + VALUE)
SCORED = 2 * INDEX_HEADS * INDEX_DIM


def by_name(found: list[Operation]) -> dict[str, Operation]:
    assert len({operation.name for operation in found}) == len(found)
    return {operation.name: operation for operation in found}


def decode(batch: int, context: int, **options: object) -> dict[str, Operation]:
    return by_name(operations(DEEPSEEK_V32, phase="decode", batch=batch, context=context, **options))  # pyright: ignore[reportArgumentType]


def prefill(batch: int, context: int, new: int, **options: object) -> dict[str, Operation]:
    return by_name(operations(DEEPSEEK_V32, phase="prefill", batch=batch, context=context, new_tokens=new, **options))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("context", [1, 1000, TOP_K, TOP_K + 1, 32_768, 163_840])
def test_a_decode_step_scores_all_tokens_and_attends_to_2048(context: int) -> None:
    batch = 64
    found = decode(batch, context)
    assert found["index_scores"].flops == LAYERS * batch * context * SCORED
    assert found["index_scores"].bytes == LAYERS * (
        batch * context * INDEX_DIM * 2 + batch * INDEX_HEADS * INDEX_DIM * 2
    )
    chosen = min(context, TOP_K)
    assert found["attention_absorbed"].flops == LAYERS * batch * chosen * ABSORBED
    rows = batch * chosen * (LATENT + ROPE) * 2
    assert found["attention_absorbed"].bytes == LAYERS * (rows + batch * HEADS * (LATENT + ROPE + LATENT) * 2)


def test_the_indexers_projections_by_hand() -> None:
    batch = 64
    found = decode(batch, 4096)
    for name, inner, outer in (
        ("index_queries", QUERY, INDEX_HEADS * INDEX_DIM),
        ("index_key", HIDDEN, INDEX_DIM),
        ("index_weights", HIDDEN, INDEX_HEADS),
    ):
        assert found[name].flops == LAYERS * 2 * batch * inner * outer
        assert found[name].bytes == LAYERS * 2 * (inner * outer + batch * (inner + outer))
    narrow = decode(batch, 4096, dtype=Dtype.FP8)
    assert narrow["index_queries"].math is narrow["index_key"].math is Dtype.FP8
    assert narrow["index_weights"].math is Dtype.BF16, "it stays as the router does"


@pytest.mark.parametrize(
    ("context", "new"), [(4096, 4096), (2049, 2049), (2049, 1), (8192, 1024), (3000, 1500), (2060, 100), (10_000, 9000)]
)
def test_a_long_prompt_s_pairs_are_those_that_counting_finds(context: int, new: int) -> None:
    batch = 3
    found = prefill(batch, context, new)
    seen = range(context - new + 1, context + 1)
    assert found["attention_absorbed"].flops == LAYERS * batch * ABSORBED * sum(min(one, TOP_K) for one in seen)
    assert found["index_scores"].flops == LAYERS * batch * SCORED * sum(seen)
    assert "attention_naive" not in found
    rows = min(context, new * TOP_K) * (LATENT + ROPE) * 2
    queries = new * HEADS * (LATENT + ROPE + LATENT) * 2
    assert found["attention_absorbed"].bytes == pytest.approx(LAYERS * batch * (rows + queries))
    keys, heads = context * INDEX_DIM * 2, new * INDEX_HEADS * INDEX_DIM * 2
    assert found["index_scores"].bytes == pytest.approx(LAYERS * batch * (keys + heads))


@pytest.mark.parametrize(("context", "new"), [(TOP_K, TOP_K), (500, 500), (TOP_K, 7)])
def test_a_prompt_of_no_more_than_is_chosen_goes_as_in_v3(context: int, new: int) -> None:
    found = prefill(2, context, new)
    before = by_name(operations(DEEPSEEK_V3, phase="prefill", batch=2, context=context, new_tokens=new))
    pairs = sum(range(context - new + 1, context + 1))
    assert found["attention_naive"].flops == before["attention_naive"].flops == LAYERS * 2 * EXPANDED * pairs
    assert found["kv_up_proj"].bytes == before["kv_up_proj"].bytes
    assert not {"index_scores", "attention_absorbed", "absorb_query", "absorb_value"} & set(found)
    assert {"index_key", "index_queries"} <= set(found), "later tokens need the keys"


def test_a_step_of_both_phases_is_their_sum() -> None:
    chunk, rows = StepLoad.prefill(1024, 7168), StepLoad.decode(32, 32 * 9000)
    both = by_name(step_operations(DEEPSEEK_V32, chunk + rows))
    parts = [by_name(step_operations(DEEPSEEK_V32, load)) for load in (chunk, rows)]
    for name in ("attention_absorbed", "absorb_query", "absorb_value"):
        assert both[f"{name}_prefill"].flops == pytest.approx(parts[0][name].flops)
        assert both[f"{name}_decode"].flops == parts[1][name].flops
    for name in ("index_scores", "index_queries", "index_key"):
        assert both[name].flops == pytest.approx(sum(part[name].flops for part in parts))


def test_long_contexts_cost_a_fraction_of_attention_over_all() -> None:
    dense = by_name(operations(DEEPSEEK_V3, phase="decode", batch=64, context=131_072))["attention_absorbed"]
    found = decode(64, 131_072)
    sparse = found["attention_absorbed"].flops + found["index_scores"].flops
    assert dense.flops / sparse == pytest.approx(131_072 * ABSORBED / (2048 * ABSORBED + 131_072 * SCORED))
    assert 13 < dense.flops / sparse < 14


def test_every_gpu_of_a_group_scores_by_all_of_the_indexers_heads() -> None:
    one, eight = decode(64, 32_768), decode(64, 32_768, parallel=Parallelism(tp=8))
    for name in ("index_scores", "index_queries", "index_key", "index_weights"):
        assert eight[name] == one[name]
    assert eight["attention_absorbed"].flops == one["attention_absorbed"].flops / 8
    data = decode(64, 32_768, parallel=Parallelism(dp=8))
    assert data["index_scores"].flops == one["index_scores"].flops / 8


def test_scores_are_computed_in_the_type_in_which_keys_are_cached() -> None:
    assert decode(1, 4096, dtype=Dtype.FP8)["index_scores"].math is Dtype.BF16
    narrow = decode(64, 4096, dtype=Dtype.FP8, kv_dtype=Dtype.FP8)["index_scores"]
    assert narrow.math is Dtype.FP8
    assert narrow.bytes == LAYERS * (64 * 4096 * (INDEX_DIM + 4) + 64 * INDEX_HEADS * INDEX_DIM * 2)


def test_the_indexers_key_is_cached_and_handed_off() -> None:
    layout = KvLayout(LAYERS, 64, CacheDtype.BFLOAT16, LatentAttention(LATENT, ROPE, INDEX_DIM))
    assert DEEPSEEK_V32.kv_bytes_per_token() == layout.token_bytes == LAYERS * 704 * 2 == 85_888
    assert DEEPSEEK_V32.kv_bytes_per_token(Dtype.FP8) == LAYERS * (656 + 128 + 4) == 48_068
    assert kv_bytes_per_gpu(DEEPSEEK_V32, Parallelism(tp=8), 1) == 85_888
    assert prefill(1, 4096, 4096)["kv_transfer"].comm_bytes == 4096 * 85_888


def test_the_indexers_weights_are_counted() -> None:
    each = QUERY * INDEX_HEADS * INDEX_DIM + HIDDEN * INDEX_DIM + HIDDEN * INDEX_HEADS
    assert parameters(DEEPSEEK_V32) - parameters(DEEPSEEK_V3) == LAYERS * each


CONFIG = {
    "model_type": "deepseek_v32", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
    "vocab_size": 129_280, "intermediate_size": 18_432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
}  # fmt: skip


def test_the_published_config_is_the_preset() -> None:
    assert ModelShape.from_config(CONFIG, "deepseek-v3.2") == DEEPSEEK_V32 == ModelShape.load("deepseek-v3.2")
    assert ModelShape.from_config({**CONFIG, "index_topk": None}).attention == DEEPSEEK_V3.attention
    small = ModelShape.from_config({**CONFIG, "index_topk": 7}).attention
    assert getattr(small, "indexer") == IndexerShape(64, 128, 7)  # noqa: B009 - of one of two kinds


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"index_n_heads": None}, "index_n_heads"),
        ({"index_topk": "many"}, "index_topk"),
        ({"q_lora_rank": None}, "q_lora_rank must not be 0 with index_topk"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
    ],
)
def test_what_is_not_counted_is_refused_by_name(change: dict[str, object], field: str) -> None:
    with pytest.raises(ModelShapeError, match=field):
        ModelShape.from_config({**CONFIG, **change})


def test_the_table_of_the_docs_is_what_is_computed_now() -> None:
    text = (Path(__file__).parents[2] / "docs" / "roofline.md").read_text(encoding="utf-8")
    lines = text.split("<!-- sparse: begin -->")[1].split("<!-- sparse: end -->")[0].strip().splitlines()
    cells = [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in lines]
    contexts = [int(cell) for cell in cells[0][1:]]
    assert len(cells) == 2 + 4
    for line, (_, *told) in zip(lines[2:], cells[2:], strict=True):
        phase: Phase = "prefill" if "prefill" in line else "decode"
        shape = DEEPSEEK_V32 if "v3.2" in line else DEEPSEEK_V3
        for context, ms in zip(contexts, told, strict=True):
            step = roofline(
                shape, HARDWARE["h200"], phase=phase, batch=8 if phase == "prefill" else 64, context=context,
                parallel=Parallelism(1, 8, 8), dtype=Dtype.FP8,
            )  # fmt: skip
            assert float(ms) == pytest.approx(1e3 * step.time_s, abs=0.5 if phase == "prefill" else 0.05)
