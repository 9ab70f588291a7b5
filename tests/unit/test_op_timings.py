"""Measured steps: where their time goes, and what the roofline predicts for the same ones."""

import dataclasses
from itertools import count
from types import SimpleNamespace

import pytest
from headrace_core.batch.step import Chunk, StepTiming, step_load
from headrace_core.config import DecodeSettings
from headrace_core.engine import executor
from headrace_core.engine.executor import Executor
from headrace_core.model import op_timer
from headrace_core.model.load import load_model
from headrace_core.model.op_timer import OTHER, SAMPLING
from headrace_core.request import SamplingParams
from headrace_core.roofline.hardware import HARDWARE
from headrace_core.roofline.model_shape import MODELS, Dtype, ModelShape
from headrace_core.roofline.operations import operation_formulas
from headrace_core.roofline.roofline import predict_step
from headrace_core.roofline.step_load import StepLoad
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.paged_sequences import PagedSequences, greedy_plan
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_core.testing.worker_pair import running
from headrace_core.worker import op_metrics
from headrace_core.worker.op_metrics import OpMetrics, Prediction
from headrace_decode.service import DecodeService
from prometheus_client import CollectorRegistry

H200 = HARDWARE["h200"]
SHAPE = MODELS["deepseek-v2-lite"]
MIXED = StepLoad.prefill(7) + StepLoad.decode(1, 5)
NETWORKS = ["v3", "v3-no-q-lora", "v2", "mixtral", "qwen3-moe"]


@pytest.fixture(params=NETWORKS)
def engine(request, tmp_path):
    """An executor that measures every step, sequences for it, and the network's shape."""
    write_checkpoint(tmp_path, TINY_CONFIGS[request.param])
    model = load_model(tmp_path)
    sequences = PagedSequences(model, page_size=4, num_pages=32)
    return Executor(model, sequences.cache, timing_period=1), sequences, ModelShape.load(tmp_path)


def steps(sequences):
    """Yield a prefill, a decode and a mixed step."""
    yield greedy_plan([sequences.chunk(0, range(10, 19)), sequences.chunk(1, range(20, 23))])
    yield greedy_plan([sequences.chunk(0, [5]), sequences.chunk(1, [6])])
    yield greedy_plan([sequences.chunk(0, [7]), sequences.chunk(2, range(30, 35))])


def test_operations_add_up_to_the_step(engine, monkeypatch):
    run, sequences, _ = engine
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    for module in (op_timer, executor):
        monkeypatch.setattr(module, "time", clock)
    for plan in steps(sequences):
        result = run.step(plan)
        # One tick before the first operation begins and one after the last: nothing in between is lost.
        assert sum(result.timing.op_seconds.values()) == result.duration_s - 2


def test_names_are_the_rooflines(engine):
    run, sequences, shape = engine
    for plan in steps(sequences):
        timing = run.step(plan).timing
        load = timing.load
        marked = [part for op in timing.op_seconds for part in op.split("+")]
        assert len(marked) == len(set(marked))
        formulas = operation_formulas(shape, has_prefill=load.prefill_tokens > 0, has_decode=load.decode_tokens > 0)
        assert set(marked) - {formula.name for formula in formulas} == {OTHER, SAMPLING}
        predicted = [row.name for row in predict_step(shape, H200, load).operations if not row.operation.is_overlapped]
        assert set(predicted) <= set(marked)


def test_only_every_so_many_steps_is_measured(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    model = load_model(tmp_path)
    sequences = PagedSequences(model, page_size=4, num_pages=32)
    for period, expected in ((0, [False] * 6), (3, [False, False, True] * 2)):
        run = Executor(model, sequences.cache, timing_period=period)
        results = [run.step(greedy_plan([sequences.chunk(0, [5])])) for _ in range(6)]
        assert [result.timing is not None for result in results] == expected


def test_load_is_what_the_chunks_ask():
    def chunk(num_tokens, start, is_sampled):
        return Chunk(0, [1] * num_tokens, start, [], is_sampled)

    assert step_load([chunk(1, 40, True), chunk(1, 9, True)]) == StepLoad.decode(2, 51)
    assert step_load([chunk(5, 8, False)]) == dataclasses.replace(StepLoad.prefill(5, 8), num_logits=0)
    mixed = step_load([chunk(1, 40, True), chunk(1, 0, True), chunk(7, 0, True)])
    assert mixed == StepLoad.decode(1, 41) + StepLoad.prefill(1) + StepLoad.prefill(7)


def value(registry, name, op, phase):
    return registry.get_sample_value(f"headrace_op_{name}_total", {"op": op, "phase": phase})


def test_prediction_is_predict_step_of_the_same_loads():
    loads = [StepLoad.decode(8, 900), StepLoad.decode(3, 200), StepLoad.prefill(100, 28), MIXED]
    metrics = OpMetrics(Prediction(SHAPE, Dtype.BF16, lambda: H200))
    registry = CollectorRegistry()
    registry.register(metrics)
    counts = {layer: [1, 0, 2, 0] * 16 for layer in range(1, 27)}
    for load in loads:
        names = [row.name for row in predict_step(SHAPE, H200, load).operations if not row.operation.is_overlapped]
        gate, up = names.index("expert_gate"), names.index("expert_up")
        assert up == gate + 1
        names[gate : up + 1] = ["expert_gate+expert_up"]
        metrics.add(StepTiming(load, dict.fromkeys([*names, OTHER], 0.5)), counts)
    metrics.drain()
    for phase, members in (("decode", loads[:2]), ("prefill", loads[2:3]), ("mixed", loads[3:])):
        predicted = [predict_step(SHAPE, H200, load, experts_read=32.0) for load in members]
        samples = [sample for family in registry.collect() for sample in family.samples]
        total = {
            name: sum(s.value for s in samples if s.name == f"headrace_op_{name}_total" and s.labels["phase"] == phase)
            for name in ("predicted_seconds", "bytes", "flops")
        }
        assert total["predicted_seconds"] == pytest.approx(sum(step.time_s for step in predicted))
        assert total["bytes"] == pytest.approx(sum(step.bytes for step in predicted))
        assert total["flops"] == pytest.approx(sum(step.flops for step in predicted))
        assert registry.get_sample_value("headrace_op_sampled_steps_total", {"phase": phase}) == len(members)
        context = sum(load.prefill_context + load.decode_context for load in members)
        assert registry.get_sample_value("headrace_op_sampled_context_tokens_total", {"phase": phase}) == context
        assert value(registry, "measured_seconds", "expert_gate+expert_up", phase) == 0.5 * len(members)
        assert value(registry, "measured_seconds", OTHER, phase) == 0.5 * len(members)
    assert value(registry, "predicted_seconds", OTHER, "decode") == 0
    assert registry.get_sample_value("headrace_roofline_bytes_per_second") == H200.memory_bytes_per_s
    metrics.close()


def test_experts_that_were_read_count_as_many_bytes():
    load = StepLoad.decode(64, 6400)
    few, all_of_them = (
        sum(row.operation.bytes for row in predict_step(SHAPE, H200, load, experts_read=hit).operations)
        for hit in (16.0, 64.0)
    )
    assert all_of_them - few == pytest.approx(26 * 48 * 3 * 2048 * 1408 * 2)


@pytest.mark.parametrize("every", [0, 4])
@async_test
async def test_worker_exports_what_it_measures_and_nothing_when_off(every: int):
    loaded = dataclasses.replace(loaded_fake_model(), prediction=Prediction(SHAPE, Dtype.BF16, lambda: H200))
    settings = DecodeSettings(model=".", role="both", roofline_every_steps=every)
    worker = DecodeService(settings, loader=lambda _: loaded)

    def sampled() -> float | None:
        return worker.registry.get_sample_value("headrace_op_sampled_steps_total", {"phase": "decode"})

    async with running(worker) as (address,), MiniRouter(decode=address) as router:
        params = SamplingParams(temperature=0.0, seed=1, max_tokens=12, ignore_eos=True)
        await router.generate_colocated("r", [1, 2, 3], params=params)
        if every:
            await eventually(lambda: sampled() == 3, "three of twelve steps are counted")
    names = [family.name for family in worker.registry.collect()]
    assert any(name.startswith(("headrace_op_", "headrace_roofline")) for name in names) == bool(every)


@async_test
async def test_a_machine_that_can_not_be_measured_stops_nobody(caplog):
    def fail():
        raise RuntimeError("no machine")

    metrics = OpMetrics(Prediction(SHAPE, Dtype.BF16, fail))
    metrics.add(StepTiming(StepLoad.decode(1, 9), {"head": 0.5}), {})
    metrics.drain()
    num_lines = len(caplog.records)
    metrics.add(StepTiming(StepLoad.decode(1, 9), {"head": 0.5}), {})
    metrics.drain()
    assert "roofline failed" in caplog.text
    assert len(caplog.records) == num_lines, "said once, not for every step"
    assert [sample for family in metrics.collect() for sample in family.samples] == []
    metrics.close()


def test_phases():
    loads = (StepLoad.prefill(3), StepLoad.decode(1, 9), StepLoad.prefill(3) + StepLoad.decode(1, 9))
    assert [op_metrics.phase_of(load) for load in loads] == ["prefill", "decode", "mixed"]
