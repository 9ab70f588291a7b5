import pytest
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import HARDWARE
from headrace_core.roofline.model_shape import DEEPSEEK_V2_LITE, DEEPSEEK_V3, LLAMA_3_8B, MIXTRAL_8X7B, Dtype
from headrace_core.roofline.roofline import decode_step_s, predict_step, prefill_s, roofline
from headrace_core.roofline.step_load import StepLoad

_H200 = HARDWARE["h200-attainable"]


@pytest.mark.parametrize(
    ("shape", "batch", "floor_ms"),
    [
        (DEEPSEEK_V2_LITE, 1, 1.17), (DEEPSEEK_V2_LITE, 8, 4.40), (DEEPSEEK_V2_LITE, 32, 7.89),
        (DEEPSEEK_V2_LITE, 64, 9.13), (DEEPSEEK_V2_LITE, 128, 11.08), (DEEPSEEK_V2_LITE, 256, 15.15),
        (MIXTRAL_8X7B, 1, 6.05), (MIXTRAL_8X7B, 8, 20.6), (MIXTRAL_8X7B, 32, 25.7), (MIXTRAL_8X7B, 128, 37.6),
    ],
)  # fmt: skip
def test_decode_floors_of_an_h200_computed_elsewhere_are_met(shape, batch, floor_ms):
    """4,096 tokens each, bf16; the other count leaves out some activations."""
    step = roofline(shape, _H200, phase="decode", batch=batch, context=4096)
    assert step.time_s * 1e3 == pytest.approx(floor_ms, rel=0.015)


def test_handoff_of_deepseek_v3_takes_the_time_counted_by_hand():
    step = roofline(DEEPSEEK_V3, HARDWARE["h200"], phase="prefill", batch=1, context=4096)
    assert pytest.approx(275, abs=1) == 4096 * 70_272 / 2**20
    assert step.overlapped_s * 1e3 == pytest.approx(5.8, abs=0.05)
    assert step.time_s == pytest.approx(sum(row.time_s for row in step.operations) - step.overlapped_s)


def test_prefill_is_bound_by_compute_and_decode_by_memory():
    for shape in (DEEPSEEK_V2_LITE, MIXTRAL_8X7B, LLAMA_3_8B):
        prefill = roofline(shape, HARDWARE["h200"], phase="prefill", batch=4, context=4096)
        decode = roofline(shape, HARDWARE["h200"], phase="decode", batch=32, context=4096)
        assert prefill.shares_by_bound()["compute"] > 0.75
        assert decode.shares_by_bound()["memory"] > 0.95


def test_time_is_that_of_the_slowest_resource():
    for row in roofline(DEEPSEEK_V2_LITE, _H200, phase="decode", batch=64, context=4096).operations:
        operation = row.operation
        compute, memory = operation.flops / 790e12, operation.bytes / 4.3e12
        assert row.time_s == pytest.approx(max(compute, memory))
        assert row.bound == ("compute" if compute > memory else "memory")


def test_shares_sum_to_one():
    step = roofline(DEEPSEEK_V3, _H200, phase="prefill", batch=8, context=2048, parallel=Parallelism(1, 8, 8))
    assert sum(row.share for row in step.operations) == pytest.approx(1)
    assert sum(step.shares_by_bound().values()) == pytest.approx(1)


def test_what_leaves_a_node_goes_over_the_network():
    def dispatch(gpus):
        step = roofline(
            DEEPSEEK_V3, _H200, phase="decode", batch=32 * gpus, context=100, parallel=Parallelism(1, gpus, gpus)
        )
        return next(row for row in step.operations if row.name == "dispatch")

    assert dispatch(8).bound == "link"
    across = dispatch(16)
    assert across.bound == "network"
    # Of 16 ranks 8 are in the other node, to which a token goes once, however many of them it chose.
    ranks, nodes = 8 * (1 - (15 / 16) ** 8), 1 - (1 / 2) ** 8
    latency_s = 58 * (6.6e-6 + 2.7e-6)
    assert across.time_s == pytest.approx(across.operation.comm_bytes * 8 / 15 * nodes / ranks / 50e9 + latency_s)


def test_a_collective_takes_its_latency_however_few_bytes_it_moves():
    """NCCL's own model of an all-reduce of 8 GPUs: 6.6 us to start and 14 hops of 0.6 us."""
    step = roofline(MIXTRAL_8X7B, HARDWARE["h100"], phase="decode", batch=1, context=100, parallel=Parallelism(8, 1, 8))
    reduce = next(row for row in step.operations if row.name == "attention_all_reduce")
    assert reduce.bound == "link"
    assert reduce.time_s == pytest.approx(32 * (15e-6 + 2 * 7 / 8 * 4096 * 2 / 450e9))
    alone = roofline(MIXTRAL_8X7B, HARDWARE["h100"], phase="decode", batch=1, context=100)
    assert alone.shares_by_bound()["link"] == 0


def test_the_floor_of_a_published_deployment_lies_above_what_it_reached():
    """SGLang, 5 May 2025: 32 H100 prefill 4,096 tokens with EP32 at 50,302 tokens/s a node; docs/planner.md."""
    step = roofline(
        DEEPSEEK_V3, HARDWARE["h100"], phase="prefill", batch=128, context=4096, parallel=Parallelism(1, 32, 32),
        dtype=Dtype.FP8,
    )  # fmt: skip
    assert 50_302 < 128 * 4096 / step.time_s / 4 < 2 * 50_302


def test_data_parallel_attention_beats_tensor_parallel_at_large_batch_for_latents_only():
    def ratio(shape, batch):
        times = [
            decode_step_s(shape, _H200, parallel, batch=batch, context_tokens_total=batch * 4096, dtype=Dtype.FP8)
            for parallel in (Parallelism(tp=8), Parallelism(dp=8, ep=8))
        ]
        return times[0] / times[1]

    assert ratio(DEEPSEEK_V3, 8) < 1 < ratio(DEEPSEEK_V3, 256)
    assert ratio(DEEPSEEK_V3, 256) > 1.2


def test_decode_and_prefill_seconds_are_those_of_a_step():
    assert (
        decode_step_s(MIXTRAL_8X7B, _H200, Parallelism(tp=2), batch=8, context_tokens_total=8 * 500)
        == roofline(MIXTRAL_8X7B, _H200, phase="decode", batch=8, context=500, parallel=Parallelism(tp=2)).time_s
    )
    assert (
        prefill_s(MIXTRAL_8X7B, _H200, Parallelism(), new_tokens=300, cached_tokens=200)
        == roofline(MIXTRAL_8X7B, _H200, phase="prefill", batch=1, context=500, new_tokens=300).time_s
    )


def test_mixed_step_is_cheaper_than_its_parts_and_dearer_than_each():
    prefill, decode = StepLoad.prefill(512), StepLoad.decode(32, 32 * 1000)
    together = predict_step(DEEPSEEK_V2_LITE, _H200, prefill + decode).time_s
    parts = [predict_step(DEEPSEEK_V2_LITE, _H200, load).time_s for load in (prefill, decode)]
    assert max(parts) < together < sum(parts)


def test_more_work_never_takes_less_time():
    times = [decode_step_s(DEEPSEEK_V3, _H200, Parallelism(1, 8, 8), batch=batch, context_tokens_total=batch * 1000)
             for batch in (1, 2, 4, 8, 64, 512, 4096)]  # fmt: skip
    assert times == sorted(times)


def test_derating_and_overhead_turn_a_floor_into_a_prediction():
    slower = _H200.derated(flops=0.5, memory=0.5, link=0.5)
    floor = roofline(LLAMA_3_8B, _H200, phase="decode", batch=4, context=100)
    half = roofline(LLAMA_3_8B, slower, phase="decode", batch=4, context=100)
    assert half.time_s == pytest.approx(2 * floor.time_s)
    started = roofline(LLAMA_3_8B, _H200.derated(operation_overhead_s=1e-6), phase="decode", batch=4, context=100)
    runs = sum(row.operation.runs for row in floor.operations)
    assert started.time_s == pytest.approx(floor.time_s + runs * 1e-6)
