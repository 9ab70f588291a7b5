"""What the command makes of workers' metrics."""

import pytest
from headrace_core.batch.step import StepTiming
from headrace_core.roofline.hardware import HARDWARE
from headrace_core.roofline.model_shape import MODELS, Dtype
from headrace_core.roofline.roofline import predict_step
from headrace_core.roofline.step_load import StepLoad
from headrace_core.worker.op_metrics import OpMetrics, Prediction
from headrace_planner.live import LiveError, live_rows, mean_load, measured_points, parse_reading
from prometheus_client import CollectorRegistry, generate_latest

H200 = HARDWARE["h200"]
SHAPE = MODELS["deepseek-v2-lite"]
DECODE = StepLoad.decode(8, 8 * 900)
OPS = {"q_proj+kv_down_proj": 3e-3, "attention_absorbed": 2e-3, "embedding": 1e-6, "other": 1e-3}


class Worker:
    """Its metrics, without it."""

    def __init__(self, kv_dtype=None):
        self.metrics = OpMetrics(Prediction(SHAPE, Dtype.BF16, lambda: H200, kv_dtype))
        self.registry = CollectorRegistry()
        self.registry.register(self.metrics)

    def read(self, address="w:1", *loads):
        for load in loads:
            self.metrics.add(StepTiming(load, OPS), {})
        self.metrics.drain()
        return parse_reading(address, generate_latest(self.registry).decode())


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.metrics.close()


def test_rows_are_of_a_mean_step_longest_first(worker):
    rows = list(live_rows(worker.read("w:1", DECODE, DECODE)))
    assert [row.op for row in rows] == ["q_proj+kv_down_proj", "attention_absorbed", "other", "embedding"]
    predicted = {row.name: row for row in predict_step(SHAPE, H200, DECODE).operations}
    fused = [predicted["q_proj"], predicted["kv_down_proj"]]
    assert rows[0].measured_us == pytest.approx(3000)
    assert rows[0].predicted_us == pytest.approx(sum(row.time_s for row in fused) * 1e6)
    assert rows[0].num_bytes == pytest.approx(sum(row.operation.bytes for row in fused))
    assert rows[1].ratio == pytest.approx(2e-3 / predicted["attention_absorbed"].time_s)
    assert rows[1].bound == "memory"
    assert (rows[2].predicted_us, rows[2].ratio, rows[2].bound) == (None, None, "")
    assert sum(row.share for row in rows) == pytest.approx(1)


def test_a_later_reading_has_only_what_came_since(worker):
    before = worker.read("w:1", DECODE, DECODE)
    after = worker.read("w:1", StepLoad.prefill(64))
    assert list(after.since(before).loads) == ["prefill"]
    assert {row.phase for row in live_rows(after.since(before))} == {"prefill"}
    assert before.since(after) is before, "a worker that counts from 0 again was restarted"
    assert list(live_rows(after.since(after))) == []


def test_fused_operations_reach_the_same_part_of_the_roof(worker):
    points = {point.operation: point for point in measured_points([worker.read("w:1", DECODE)], SHAPE).points}
    predicted = {row.name: row for row in predict_step(SHAPE, H200, DECODE).operations}
    reached = [predicted[name].time_s / points[name].seconds for name in ("q_proj", "kv_down_proj")]
    assert reached[0] == pytest.approx(reached[1])
    assert points["q_proj"].seconds + points["kv_down_proj"].seconds == pytest.approx(3e-3)
    assert points["q_proj"].flops == pytest.approx(predicted["q_proj"].operation.flops)
    assert points["embedding"].flops is None, "it computes nothing"
    assert "other" not in points


def test_an_fp8_cache_is_predicted_with_its_bytes():
    worker = Worker(Dtype.FP8)
    reading = worker.read("w:1", DECODE)
    assert (reading.machine.dtype, reading.machine.kv_dtype) == (Dtype.BF16, Dtype.FP8)
    rows = {row.op: row for row in live_rows(reading)}
    predicted = {row.name: row for row in predict_step(SHAPE, H200, DECODE, kv_dtype=Dtype.FP8).operations}
    attention = predicted["attention_absorbed"].operation
    assert rows["attention_absorbed"].num_bytes == pytest.approx(attention.bytes)
    assert attention.bytes == 27 * (8 * 900 * 656 + 2 * 8 * 16 * (2 * 512 + 64))
    points = {point.operation: point for point in measured_points([reading], SHAPE).points}
    assert points["attention_absorbed"].bytes == pytest.approx(attention.bytes)
    worker.metrics.close()


def test_a_worker_of_an_earlier_version_names_no_type_of_its_cache(worker):
    worker.read("w:1", DECODE)
    text = generate_latest(worker.registry).decode().replace(',kv_dtype="bf16"', "")
    assert "kv_dtype" not in text
    assert parse_reading("w:1", text).machine.kv_dtype is Dtype.BF16


def test_workers_of_one_phase_are_taken_together(worker):
    one = worker.read("w:1", DECODE)
    two = worker.read("w:2", StepLoad.decode(4, 4 * 900), StepLoad.decode(4, 4 * 900))
    assert mean_load([one, two], "decode") == (6, 900)
    assert mean_load([one, two], "prefill") is None
    assert {point.phase for point in measured_points([one, two], SHAPE).points} == {"decode"}


def test_what_can_not_be_shown_is_named(worker):
    with pytest.raises(LiveError, match="roofline-every-steps 0"):
        parse_reading("r:1", "# TYPE other counter\nother_total 1\n")
    with pytest.raises(LiveError, match="not mixtral"):
        measured_points([worker.read("w:1", DECODE)], MODELS["mixtral-8x7b"])
    with pytest.raises(LiveError, match="no prefill or decode step"):
        measured_points([Worker().read()], SHAPE)
