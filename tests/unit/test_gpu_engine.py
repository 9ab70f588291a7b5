"""The engine's benchmark on a GPU as far as it goes without one: refusing, floors, figures, tables, shards."""

import json
import os

import pytest
import torch
from headrace_core.families import table
from headrace_core.families.config_json import parse_config
from headrace_core.model.build import num_weight_bytes
from headrace_core.model.load import load_model
from headrace_core.roofline.model_shape import DEEPSEEK_V2_LITE
from headrace_core.testing.tiny_checkpoints import write_checkpoint

from tests.perf import report_file
from tests.perf.closed_loop import RequestTimes, cell_figures
from tests.perf.gpu_engine import __main__ as command
from tests.perf.gpu_engine import cluster, step, weights
from tests.perf.gpu_engine.shapes import SHAPES
from tests.perf.gpu_engine.table import tables
from tests.perf.gpu_engine.tokens import CONFIGS, load_oracle, num_equal
from tests.perf.kernels.ceilings import H200_ASSUMED, Ceilings

FULL, TINY = SHAPES["v2-lite"], SHAPES["tiny"]
CEILINGS = Ceilings(
    copy_tb_s=4.0, read_tb_s=5.0, bf16_tflops=800.0, fp32_tflops=50.0, fp8_tflops=None, launch_gap_us=1.0
)


def test_the_full_shape_is_v2_lites(tmp_path):
    shape = FULL.roofline_shape()
    assert shape.attention == DEEPSEEK_V2_LITE.attention
    assert shape.moe == DEEPSEEK_V2_LITE.moe
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (27, 2048, 102_400)
    assert num_weight_bytes(FULL.model_config(tmp_path), torch.bfloat16) == pytest.approx(31.4e9, rel=0.01)


def test_fewer_layers_keep_one_of_each_kind():
    assert FULL.with_layers(2).roofline_shape().num_moe_layers == 1
    with pytest.raises(ValueError, match="--layers 1"):
        FULL.with_layers(1)


def test_it_refuses_where_nothing_can_be_measured():
    assert "sees no GPU" in command.why_not("cuda", "v2-lite", has_gpu=False)
    assert "--shape tiny" in command.why_not("cpu", "v2-lite", has_gpu=True)
    assert not command.why_not("cpu", "tiny", has_gpu=False)
    assert not command.why_not("cuda", "v2-lite", has_gpu=True)


def test_refusing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = command.DOCS.read_text()
    assert command.main(["--json", str(tmp_path / "report.json")]) == 2
    assert not list(tmp_path.iterdir())
    assert command.DOCS.read_text() == before
    assert "TRITON_INTERPRET" not in os.environ


def test_a_part_that_ended_is_written_before_the_next(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    report_file.merge(path, {"engine": {"tokens": "of before"}, "rows": [1]})

    def is_ended_by_a_limit(*_):
        raise KeyboardInterrupt

    # The command sets it; what was before comes back.
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(command, "_step", lambda *_: {"kernels_check": 1e-6, "batches": {}})
    monkeypatch.setattr(command, "_tokens", is_ended_by_a_limit)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--device", "cpu", "--shape", "tiny", "--json", str(path)])
    assert report_file.read(path)["engine"]["step"]["kernels_check"] == 1e-6
    assert report_file.read(path)["engine"]["tokens"] == "of before"


def test_what_a_part_found_is_written_before_it_ends(tmp_path, monkeypatch):
    path = tmp_path / "report.json"

    def ends_early(error):
        def part(shape, folder, device, listeners):
            listeners.keep({"context": 20, "batches": {"1": {"replay_ms": 1.5, "floor_ms": 1.2, "roofline_ms": 1.3}}})
            raise error

        return part

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(command, "_step", ends_early(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        command.main(["--device", "cpu", "--shape", "tiny", "--part", "step", "--json", str(path)])
    found = report_file.read(path)["engine"]["step"]
    assert (found["batches"]["1"]["replay_ms"], found["unfinished"]) == (1.5, True)
    assert "cut off before its end" in tables({"step": found}, {})

    monkeypatch.setattr(command, "_tables", lambda *_: "")
    monkeypatch.setattr(command, "_step", ends_early(RuntimeError("no memory")))
    assert command.main(["--device", "cpu", "--shape", "tiny", "--part", "step", "--json", str(path)]) == 1
    found = report_file.read(path)["engine"]["step"]
    assert (found["batches"]["1"]["replay_ms"], found["error"]) == (1.5, "RuntimeError: no memory")


def test_the_floor_is_bytes_at_the_measured_bandwidth_with_the_experts_hit():
    chunks = step.decode_chunks(1, 4096, 64, 102_400)
    hardware = step.hardware_of(CEILINGS)
    assert hardware.memory_bytes_per_s == 5e12
    floors = [step.step_floor(FULL.roofline_shape(), hardware, chunks, step.Dtype.BF16, n) for n in (6.0, 12.0)]
    expert_bytes = 3 * 2048 * 1408 * 2
    assert floors[1].bytes - floors[0].bytes == pytest.approx(26 * 6 * expert_bytes)
    figures = step.floor_figures(floors[0], replay_ms=2.0)
    assert figures["floor_ms"] == pytest.approx(floors[0].bytes / 5e12 * 1e3)
    assert figures["fraction"] == figures["floor_ms"] / 2
    assert figures["roofline_ms"] >= figures["floor_ms"]


def test_a_batch_takes_every_page_once():
    chunks = step.decode_chunks(3, 20, 2, 160)
    assert sorted(page for chunk in chunks for page in chunk.page_ids) == list(range(6))
    assert all(chunk.start == 19 for chunk in chunks)


def test_captures_are_kept_by_their_rows():
    kept = step.KeptCapture(lambda run: run, 10)
    runs = [object() for _ in range(5)]
    assert [kept(run) for run in runs] == runs
    assert kept.replays == dict(zip((16, 8, 4, 2, 1), runs, strict=True))


def test_a_layers_launches_lie_between_two_prologues():
    layer = ["norm", "_mla_prologue_kernel_0d1d", "attention", "experts"]
    assert step.launches_per_layer(["embedding", *layer * 3, "head"]) == 4
    assert step.launches_per_layer(["embedding", *layer]) is None


def test_a_profiler_that_fails_costs_its_own_figure_alone(monkeypatch):
    class Model:
        device = "cuda"

        def forward(self, chunks, cache):
            pass

        def take_expert_counts(self):
            return {1: [0, 3, 1]}

    def refuse(**options):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(torch.profiler, "profile", refuse)
    monkeypatch.setattr(step, "_synchronize", lambda device: None)
    monkeypatch.setattr(step, "_median_ms", lambda replay, device, num_rounds: 1.5)
    told = []
    found = step._measure_step(Model(), None, [], lambda: None, 2, told.append)
    assert (found["replay_ms"], found["launches_per_layer"], found["distinct_experts"]) == (1.5, None, 2.0)
    assert "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" in told[0]


def test_distinct_experts_are_counted_by_layer():
    assert step.mean_distinct({1: [0, 3, 1], 2: [2, 0, 0]}) == 1.5


def test_equal_tokens_count_up_to_the_first_that_differs():
    assert num_equal([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]) == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_experts_need_no_grouped_product_in_float32(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Expected mat_a to be BFloat16 matrix")

    write_checkpoint(tmp_path, CONFIGS[name])
    oracle = load_oracle(tmp_path, "cpu")
    for product in ("_grouped_mm", "grouped_mm"):
        for module in (torch, torch.nn.functional):
            monkeypatch.setattr(module, product, refuse, raising=False)
    assert oracle.config._experts_implementation == "eager"
    assert oracle(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_tokens_that_arrive_together_share_their_gap():
    request = RequestTimes([(1.0, 1), (1.5, 2), (1.8, 1)])
    assert request.num_tokens == 4
    assert request.gaps_s() == pytest.approx([0.25, 0.25, 0.3])


def test_a_cell_has_percentiles_of_what_clients_saw():
    times = [RequestTimes([(0.1, 1), (0.2, 1)]), RequestTimes([(0.3, 1), (0.5, 1)])]
    figures = cell_figures((16, 2), 2, times, wall_s=0.5)
    assert figures["ttft_ms"] == pytest.approx({"p25": 150.0, "p50": 200.0, "p99": 298.0})
    assert figures["itl_ms"]["p50"] == pytest.approx(150.0)
    assert figures["request_tokens_per_s"]["p99"] == pytest.approx(9.94)
    assert figures["tokens_per_s"] == pytest.approx(8.0)


def test_the_pool_holds_all_clients_longest_requests(tmp_path):
    layout = FULL.model_config(tmp_path).kv_layout(FULL.page_size, cluster.CacheDtype.BFLOAT16)
    assert cluster.longest(FULL) == 4416
    assert cluster.pool_size_mib(FULL, layout) * 2**20 >= 64 * 4416 * 27 * 576 * 2
    with pytest.raises(weights.NotPossibleError, match=r"80\.0 GB free"):
        cluster.check_gpu_memory(int(80e9), int(31.4e9), int(11e9))
    cluster.check_gpu_memory(int(140e9), int(31.4e9), int(11e9))


def test_a_checkpoint_is_written_in_shards_and_loads(tmp_path):
    config = TINY.model_config(tmp_path)
    seen = []
    weights.write_random_checkpoint(
        tmp_path, config, device="cpu", on_bytes=lambda done, total: seen.append((done, total)), shard_bytes=20_000
    )
    assert len(list(tmp_path.glob("*.safetensors"))) == len(seen) > 2
    assert seen[-1][0] == seen[-1][1]
    model = load_model(tmp_path)
    assert model.config == weights.random_model(config, device="cpu", on_bytes=lambda *_: None).config


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(weights.NotPossibleError, match="--layers"):
        weights.check_disk(tmp_path, 10**18)


def test_no_shard_is_larger_than_it_may_be(tmp_path):
    shapes = {weight.name: weight.shape for weight in table.weights(parse_config(_config(tmp_path)))}
    shards = list(weights.shards_of(shapes, 4, 20_000))
    assert [name for names in shards for name in names] == list(shapes)
    sizes = [sum(4 * torch.Size(shapes[name]).numel() for name in names) for names in shards]
    assert all(size <= 20_000 or len(names) == 1 for size, names in zip(sizes, shards, strict=True))


def _config(folder):
    TINY.model_config(folder)
    return folder


def test_what_was_not_measured_says_so():
    text = tables({}, step.unmeasured_steps(FULL, H200_ASSUMED))
    row = next(line for line in text.splitlines() if line.startswith("| 1 |"))
    assert row.startswith("| 1 | not measured | ")
    assert "| 60% |" in row
    assert text.count("not measured.") == 2


def test_measured_parts_show_their_figures():
    measured = {"replay_ms": 1.5, "floor_ms": 1.2, "fraction": 0.8, "roofline_ms": 1.3, "experts_hit": 6.0}
    engine = {
        "step": {"GPU": "G", "layers": 27, "weight_gb": 31.4, "context": 4096, "kernels_check": 0.01,
                 "batches": {"1": measured | {"launches_per_layer": 8, "host_ms": 0.1, "step_ms": 1.6}}},
        "tokens": {"GPU": "G", "checkpoints": {
            "v3": {"equal": 12, "equal_captured": 11, "num_tokens": 12, "kernels_check": 1e-6}}},
        "cluster": {"error": "NotPossibleError: no room"},
    }  # fmt: skip
    text = tables(engine, {})
    assert "| 1 | 1.500 | 1.200 | 80% | 60% | 1.300 | 6.0 | 8 | 0.100 | 1.600 |" in text
    assert "| v3 | 12 | 11 | 12 | 1.0e-06 |" in text
    assert "failed: NotPossibleError: no room" in text
    assert [command.is_failure(part) for part in engine.values()] == [False, True, True]


def test_reports_of_several_commands_share_a_file(tmp_path):
    path = tmp_path / "bench" / "report.json"
    report_file.merge(path, {"rows": [1], "GPU": "G"})
    report_file.merge(path, {"engine": {"step": 1}})
    report_file.merge(path, {"rows": [2]})
    assert json.loads(path.read_text()) == {"rows": [2], "GPU": "G", "engine": {"step": 1}}
    assert [each.name for each in path.parent.iterdir()] == ["report.json"]
