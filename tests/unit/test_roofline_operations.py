import dataclasses

import pytest
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.model_shape import DEEPSEEK_V2_LITE, DEEPSEEK_V3, LLAMA_3_8B, MIXTRAL_8X7B, MODELS, Dtype
from headrace_core.roofline.operations import operations, step_operations
from headrace_core.roofline.routing import Routing
from headrace_core.roofline.step_load import StepLoad


def _by_name(found):
    assert len({operation.name for operation in found}) == len(found)
    return {operation.name: operation for operation in found}


def _decode(shape, batch, context, **options):
    return _by_name(operations(shape, phase="decode", batch=batch, context=context, **options))


def _prefill(shape, batch, context, new, **options):
    return _by_name(operations(shape, phase="prefill", batch=batch, context=context, new_tokens=new, **options))


def test_absorbed_decode_of_deepseek_v3_counted_by_hand():
    attention = _decode(DEEPSEEK_V3, 128, 4096)["attention_absorbed"]
    assert attention.flops == 61 * 2 * 128 * 128 * 4096 * (576 + 512)
    assert attention.bytes == 61 * (128 * 4096 * 1152 + 128 * 128 * (576 + 512) * 2)
    # 2 H 1088 / 1152 FLOP/byte of latent, less what queries and outputs move.
    assert 225 < attention.intensity < 242


def test_naive_prefill_counts_the_causal_half_and_both_products():
    attention = _prefill(DEEPSEEK_V2_LITE, 2, 4096, 4096)["attention_naive"]
    assert attention.flops == 27 * 2 * 16 * 320 * 2 * (4096 * 4097 / 2)


def test_cached_prefix_is_expanded_and_attended_but_not_computed():
    found = _prefill(DEEPSEEK_V2_LITE, 1, 4096, 1024)
    assert found["output_proj"].flops == 27 * 2 * 1024 * 2048 * 2048
    assert found["kv_up_proj"].flops == 27 * 2 * 4096 * 512 * 16 * 256
    pairs = 1024 * 3072 + 1024 * 1025 / 2
    assert found["attention_naive"].flops == 27 * 2 * 16 * 320 * pairs
    assert found["kv_transfer"].comm_bytes == 1024 * DEEPSEEK_V2_LITE.kv_bytes_per_token()


def test_absorbed_costs_less_than_naive_below_171_new_tokens_on_a_long_prefix():
    def flops(mla, new):
        found = _prefill(DEEPSEEK_V2_LITE, 1, 1_000_000, new, mla=mla)
        names = {"naive": ("kv_up_proj", "attention_naive"),
                 "absorbed": ("absorb_query", "attention_absorbed", "absorb_value")}[mla]  # fmt: skip
        return sum(found[name].flops for name in names)

    assert flops("absorbed", 160) < flops("naive", 160)
    assert flops("absorbed", 180) > flops("naive", 180)


def test_grouped_attention_reads_each_kv_head_once():
    attention = _decode(LLAMA_3_8B, 4, 1000)["attention_decode"]
    assert attention.flops == 32 * 4 * 32 * 128 * 4000
    assert attention.bytes == 32 * (4000 * 2 * 8 * 128 * 2 + 2 * 4 * 32 * 128 * 2)


def test_experts_read_are_those_expected_to_be_chosen():
    found = _decode(DEEPSEEK_V3, 8, 1024)
    distinct = 256 * (1 - (1 - 8 / 256) ** 8)
    weights = 58 * distinct * 7168 * 2048 * 2
    assert found["expert_down"].bytes == pytest.approx(weights + 58 * 2 * 64 * (2048 + 7168))
    assert found["expert_gate"].flops == found["expert_up"].flops == 58 * 2 * 64 * 7168 * 2048


def test_step_bytes_of_v2_lite_weights_are_those_of_the_checkpoint():
    """At a huge batch every weight but the embedding table is read once."""
    found = _decode(DEEPSEEK_V2_LITE, 4096, 1)
    experts = sum(found[name].bytes for name in ("expert_gate", "expert_up", "expert_down"))
    rows = 26 * 4096 * 6 * 2 * 2 * (2048 + 1408)
    assert experts - rows == pytest.approx(26 * 64 * 3 * 2048 * 1408 * 2)


def test_fp8_halves_weights_and_keeps_attention_in_bf16():
    wide, narrow = _decode(DEEPSEEK_V3, 1, 4096), _decode(DEEPSEEK_V3, 1, 4096, dtype=Dtype.FP8)
    assert narrow["output_proj"].bytes < 0.51 * wide["output_proj"].bytes
    assert narrow["output_proj"].math is Dtype.FP8
    assert narrow["attention_absorbed"] == dataclasses.replace(wide["attention_absorbed"])
    assert narrow["head"].bytes == wide["head"].bytes
    cached = _decode(DEEPSEEK_V3, 64, 4096, dtype=Dtype.FP8, kv_dtype=Dtype.FP8)["attention_absorbed"]
    assert cached.bytes == 61 * (64 * 4096 * 656 + 64 * 128 * (576 + 512) * 2)
    handoff = _prefill(DEEPSEEK_V3, 1, 4096, 4096, kv_dtype=Dtype.FP8)["kv_transfer"]
    assert handoff.comm_bytes == 4096 * DEEPSEEK_V3.kv_bytes_per_token(Dtype.FP8)


def test_tensor_parallelism_divides_heads_but_not_the_latent():
    one, eight = _decode(DEEPSEEK_V3, 64, 4096), _decode(DEEPSEEK_V3, 64, 4096, parallel=Parallelism(tp=8))
    assert eight["attention_absorbed"].flops == one["attention_absorbed"].flops / 8
    latent = 61 * 64 * 4096 * 1152
    assert eight["attention_absorbed"].bytes > latent
    data = _decode(DEEPSEEK_V3, 64, 4096, parallel=Parallelism(dp=8))
    assert data["attention_absorbed"].bytes == one["attention_absorbed"].bytes / 8


def test_all_reduce_moves_two_passes_over_the_hidden_states():
    found = _decode(MIXTRAL_8X7B, 32, 100, parallel=Parallelism(tp=4))
    hidden = 32 * 4096 * 2
    assert found["attention_all_reduce"].comm_bytes == 32 * 2 * 3 / 4 * hidden
    assert found["combine"].comm_bytes == pytest.approx(32 * 2 * 3 / 4 * hidden)
    assert "dispatch" not in found


def test_tokens_travel_once_to_each_rank_that_has_one_of_their_experts():
    found = _decode(DEEPSEEK_V3, 1024, 100, parallel=Parallelism(dp=8, ep=8))
    remote = 8 * (1 - (7 / 8) ** 8) * 7 / 8
    assert found["dispatch"].comm_bytes == pytest.approx(58 * 128 * remote * 7168 * 2)
    assert found["combine"].comm_bytes == pytest.approx(found["dispatch"].comm_bytes)


def test_tokens_travel_in_fp8_where_weights_are_and_come_back_in_bf16():
    found = _decode(DEEPSEEK_V3, 1024, 100, parallel=Parallelism(dp=8, ep=8), dtype=Dtype.FP8)
    remote = 8 * (1 - (7 / 8) ** 8) * 7 / 8
    assert found["dispatch"].comm_bytes == pytest.approx(58 * 128 * remote * 7168 * (1 + 4 / 128))
    assert found["combine"].comm_bytes == pytest.approx(58 * 128 * remote * 7168 * 2)


def test_data_parallel_attention_before_sharded_experts_gathers_and_scatters():
    found = _decode(MIXTRAL_8X7B, 64, 100, parallel=Parallelism(dp=4))
    assert found["dispatch"].comm_bytes == found["combine"].comm_bytes == 32 * 3 / 4 * 64 * 4096 * 2


def test_one_gpu_sends_nothing_to_its_own_worker():
    for shape in MODELS.values():
        found = operations(shape, phase="decode", batch=8, context=100)
        assert not any(operation.comm_bytes for operation in found)


def test_busiest_rank_has_the_sequence_that_is_left_over():
    nine = _decode(DEEPSEEK_V2_LITE, 9, 1000, parallel=Parallelism(dp=8, ep=8))
    sixteen = _decode(DEEPSEEK_V2_LITE, 16, 1000, parallel=Parallelism(dp=8, ep=8))
    assert nine["attention_absorbed"] == sixteen["attention_absorbed"]
    alone = _decode(DEEPSEEK_V2_LITE, 1, 1000, parallel=Parallelism(dp=8, ep=8))
    assert alone["attention_absorbed"].bytes == _decode(DEEPSEEK_V2_LITE, 1, 1000)["attention_absorbed"].bytes


def test_skewed_routing_loads_the_busiest_rank():
    parallel = Parallelism(dp=8, ep=8)
    even = _decode(DEEPSEEK_V3, 4096, 100, parallel=parallel)["expert_up"]
    skewed = _decode(DEEPSEEK_V3, 4096, 100, parallel=parallel, routing=Routing(1.0))["expert_up"]
    assert skewed.flops > 1.3 * even.flops


@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
@pytest.mark.parametrize("parallel", [Parallelism(), Parallelism(4, 2, 4), Parallelism(1, 8, 8)], ids=str)
def test_ranks_together_do_at_least_the_work_of_one(shape, parallel):
    for phase, new in (("prefill", 512), ("decode", 1)):
        one = operations(shape, phase=phase, batch=16, context=512, new_tokens=new)
        many = operations(shape, phase=phase, batch=16, context=512, new_tokens=new, parallel=parallel)
        total = sum(operation.flops for operation in one)
        shared = parallel.num_gpus * sum(operation.flops for operation in many)
        assert total <= shared * (1 + 1e-9)
        assert shared < 2 * total


def test_mixed_step_shares_weights_between_prefill_and_decode():
    prefill, decode = StepLoad.prefill(256), StepLoad.decode(32, 32 * 1000)
    mixed = _by_name(step_operations(DEEPSEEK_V2_LITE, prefill + decode))
    alone = [_by_name(step_operations(DEEPSEEK_V2_LITE, load)) for load in (prefill, decode)]
    assert mixed["attention_naive"] == alone[0]["attention_naive"]
    assert mixed["attention_absorbed"] == alone[1]["attention_absorbed"]
    assert mixed["output_proj"].flops == sum(found["output_proj"].flops for found in alone)
    assert mixed["output_proj"].bytes < sum(found["output_proj"].bytes for found in alone)


def test_mixed_step_that_absorbs_everything_tells_its_parts_apart():
    found = _by_name(step_operations(DEEPSEEK_V2_LITE, StepLoad.prefill(16) + StepLoad.decode(1, 9), mla="absorbed"))
    assert {"attention_absorbed_prefill", "attention_absorbed_decode"} <= set(found)


def test_training_forward_has_logits_of_every_token():
    serving = _by_name(step_operations(LLAMA_3_8B, StepLoad.prefill(100)))
    training = _by_name(step_operations(LLAMA_3_8B, StepLoad.prefill(100, has_all_logits=True)))
    assert training["head"].flops == 100 * serving["head"].flops


@pytest.mark.parametrize(("batch", "context", "new"), [(0, 10, 1), (1, 10, 0), (1, 10, 11)])
def test_impossible_steps_are_refused(batch, context, new):
    with pytest.raises(ValueError, match="batch"):
        operations(LLAMA_3_8B, phase="prefill", batch=batch, context=context, new_tokens=new)


def test_impossible_parallelism_is_refused():
    for degrees in ((0, 1, 1), (2, 2, 3), (1, 1, 2)):
        with pytest.raises(ValueError, match="divisor"):
            Parallelism(*degrees)
