"""The kernels' benchmark as far as it goes without a GPU: floors, the table, parity, refusing."""

import contextlib
import dataclasses
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from tests.perf.in_turn import NO_TIME, Limits, Lost
from tests.perf.kernels import harness, measure, parity, report, tune
from tests.perf.kernels.bench_case import BenchCase
from tests.perf.kernels.ceilings import H200_ASSUMED, Ceilings
from tests.perf.kernels.harness import NoGpuError, families, measure_eager_us, measure_us, require_gpu
from tests.perf.kernels.measure import How, cases_of, in_order
from tests.perf.kernels.parity import Verdict
from tests.perf.kernels.peers import load_adapters, peers_of
from tests.perf.kernels.rows import Row, as_json, fits_l2, floor, table, unmeasured

CEILINGS = Ceilings(
    copy_tb_s=4.0, read_tb_s=5.0, bf16_tflops=800.0, fp32_tflops=50.0, fp8_tflops=None, launch_gap_us=1.0
)


def case(**changes):
    return BenchCase(**{"family": "f", "shape": "B=1", "calls": list, "bytes_moved": 10e6} | changes)


def test_the_floor_is_the_longer_of_bytes_and_flops():
    assert floor(case(), CEILINGS) == (pytest.approx(2.0), "bytes")
    assert floor(case(flops=8e9), CEILINGS) == (pytest.approx(10.0), "bf16")


def test_a_floor_needs_a_bound_and_a_measured_ceiling():
    with pytest.raises(ValueError, match="bytes_moved or flops"):
        floor(case(bytes_moved=0), CEILINGS)
    with pytest.raises(ValueError, match="'fp8'"):
        floor(case(flops=1.0, ceiling="fp8"), CEILINGS)
    assert floor(case(flops=5e9, ceiling="fp32"), CEILINGS) == (pytest.approx(100.0), "fp32")


def test_buffers_that_fit_the_cache_are_told():
    assert fits_l2(case(), num_calls=9, l2_bytes=50_000_000, bound="bytes")
    assert not fits_l2(case(), num_calls=10, l2_bytes=50_000_000, bound="bytes")
    assert not fits_l2(case(), num_calls=1, l2_bytes=50_000_000, bound="bf16")


def test_a_row_without_a_time_says_not_measured():
    row = unmeasured(case(peers={"torch": list}, published_us=3.5, published_source="x"), CEILINGS)
    shown = table([row], CEILINGS, {"GPU": "NVIDIA H200"}).splitlines()
    assert shown[-3] == "| f | B=1 | not measured | 2.0 | bytes | – | torch | 3.5 µs (66%) [1] |"
    assert shown[-1] == "[1] x  "
    assert as_json([row])[0]["fraction"] is None


def test_on_another_gpu_only_shares_of_the_floor_are_compared():
    """Of the published figure's floor on its own GPU: 10 MB at 4.3 TB/s are 2.3 of its 3.5 µs."""
    row = unmeasured(case(published_us=3.5, published_source="x"), CEILINGS)
    shown = table([row], CEILINGS, {"GPU": "NVIDIA H100 80GB HBM3"}).splitlines()
    assert shown[2].endswith("| Published on an H200 (% of floor) |")
    assert shown[-3].endswith("| 66% [1] |")
    assert as_json([row])[0]["published_fraction"] == pytest.approx(10e6 / 4.3e6 / 3.5)


def test_a_measured_row_shows_its_share_of_the_floor():
    rows = [
        Row("f", "B=1", 2.0, "bytes", us=2.5, peers={"torch": 4.0, "other": "fails: no"}),
        Row("f", "B=2", 2.0, "bytes", us=2.0, is_in_l2=True),
        Row("f", "B=3", 2.0, "bytes", error="fails: RuntimeError: a | b"),
    ]
    shown = table(rows, CEILINGS, {"GPU": "G", "torch": "2"}).splitlines()
    assert shown[0].startswith("GPU G; torch 2. Ceilings: copy 4.00 TB/s, read 5.00 TB/s, bf16 800 TFLOP/s, fp8 not")
    assert shown[-3] == "| f | B=1 | 2.5 | 2.0 | bytes | 80% | torch 4.0; other fails: no | – |"
    assert "2.0 (in L2)" in shown[-2]
    assert "| fails: RuntimeError: a / b |" in shown[-1]
    assert as_json(rows)[0]["fraction"] == pytest.approx(0.8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [report, tune])
def test_without_a_gpu_nothing_is_measured_or_written(program, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["program"])
    with pytest.raises(NoGpuError, match="sees no GPU"):
        require_gpu()
    assert program.main() == 2


def lines(**outcomes):
    """What the plugin writes, tests by the file that holds them."""
    path = "tests/parity/kernels/test_{}.py"
    tests = [(f"{path.format(name)}::test_{n}", each) for name, of in outcomes.items() for n, each in enumerate(of)]
    return "".join(json.dumps({"test": test, "outcome": each}) + "\n" for test, of in tests for each in of.split())


def test_parity_is_judged_family_by_family():
    told = lines(
        rope=["began passed"],
        rms_norm=["began passed", "began failed"],
        model=["began failed"],
        mla_decode=["began skipped"],
        moe_sort=["began"],
    )
    verdict = parity.judge(told, ["rope", "rms_norm", "moe_sort", "mla_decode", "sampling"])
    assert verdict.wrong == {"rms_norm", "moe_sort", "mla_decode", "sampling"}, "the last two's tests never ran"
    assert verdict.elsewhere == ("tests/parity/kernels/test_model.py::test_0",)
    assert not verdict.holds
    assert parity.judge(told, ["rope"]).wrong == frozenset()
    assert parity.judge("", ["rope"]).wrong == {"rope"}, "the run ended before it wrote a line"


def test_what_fails_after_it_passed_has_failed():
    assert parity.judge(lines(rope=["began passed failed"]), ["rope"]).wrong == {"rope"}
    assert parity.judge(lines(rope=["began failed passed"]), ["rope"]).wrong == {"rope"}


TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "no"
@pytest.mark.skip
def test_not(): pass
@pytest.fixture
def spoils():
    yield
    raise ValueError("late")
def test_late(spoils): pass
def test_ends_the_process(): os._exit(1)
"""


def test_each_test_has_a_line_as_soon_as_it_ends(tmp_path):
    """With the command's own options, which leave the settings of this repository out."""
    (tmp_path / "test_some.py").write_text(TESTS)
    path = tmp_path / "lines.jsonl"
    command = parity.command([str(tmp_path / "test_some.py")], path)
    subprocess.run(command, cwd=parity.ROOT, check=False, capture_output=True)
    found = {test.rpartition("::test_")[2]: line for test, line in parity.outcomes(path.read_text()).items()}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "good": "passed", "bad": "failed", "not": "skipped", "late": "failed", "ends_the_process": "began",
    }  # fmt: skip
    assert "1 == 2" in found["bad"]["why"]


def test_tests_run_in_several_processes_where_xdist_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: {"xdist": object()}[name])
    assert "-n" in parity.command(["a"], tmp_path / "lines", 4)
    assert "-n" not in parity.command(["a"], tmp_path / "lines", 1)
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    assert "-n" not in parity.command(["a"], tmp_path / "lines", 4)


def measured_by_report(monkeypatch, tmp_path, arguments, verdict):
    """Run the command where everything of a GPU is made up; return its exit code, the rows and who was judged."""
    judged = []
    made = {name: lambda name=name: [case(family=name)] for name in ("rope", "rms_norm")}
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    for module in (report, measure):
        monkeypatch.setattr(module, "families", lambda _: made)
    monkeypatch.setattr(report, "require_gpu", lambda: "G")
    monkeypatch.setattr(report.ceilings_of_gpu, "measure", lambda: CEILINGS)
    monkeypatch.setattr(report.parity, "run", lambda names: judged.extend(names) or verdict)
    monkeypatch.setattr(measure, "row_of", lambda each, *_: Row(each.family, each.shape, 2.0, "bytes", us=2.5))
    monkeypatch.setattr(measure, "in_turn", in_this_process)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(report, "DOCS", tmp_path / "kernels.md")
    report.DOCS.write_text("<!-- kernels-gpu: begin -->\nas it was\n<!-- kernels-gpu: end -->\n")
    code = report.main()
    return code, {row["family"]: row for row in json.loads(report.REPORT.read_text())["rows"]}, judged


def in_this_process(count, work, limits, preload=()):
    found = []
    if limits.left_s():
        work(0, found.append)
    yield from found
    yield from [Lost(NO_TIME)] * (count - len(found))


def test_a_family_that_is_wrong_costs_the_others_nothing(monkeypatch, tmp_path):
    code, rows, _ = measured_by_report(monkeypatch, tmp_path, [], Verdict(frozenset({"rope"}), ("test_model::test_c",)))
    assert code == 1
    assert (rows["rope"]["us"], rows["rms_norm"]["us"]) == (None, 2.5)
    assert rows["rope"]["error"] == "not measured: its parity tests fail"


def test_a_failed_test_of_no_family_is_told_by_the_exit_code(monkeypatch, tmp_path):
    code, rows, _ = measured_by_report(monkeypatch, tmp_path, [], Verdict(frozenset(), ("test_model::test_c",)))
    assert (code, rows["rope"]["us"]) == (1, 2.5)


def test_without_parity_nothing_is_judged_and_the_page_stays(monkeypatch, tmp_path):
    code, rows, judged = measured_by_report(monkeypatch, tmp_path, ["--no-parity"], Verdict(frozenset({"rope"})))
    assert (code, judged, rows["rope"]["us"]) == (0, [], 2.5)
    assert "as it was" in report.DOCS.read_text()


def test_without_time_every_row_says_so(monkeypatch, tmp_path):
    code, rows, _ = measured_by_report(monkeypatch, tmp_path, ["--no-parity", "--seconds", "0"], Verdict(frozenset()))
    assert code == 1
    assert {row["error"] for row in rows.values()} == {NO_TIME}


def test_rows_are_kept_as_they_come_and_shown_as_they_are_listed(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "in_order", lambda names: list(reversed(list(names))))
    measured_by_report(monkeypatch, tmp_path, ["--no-parity"], Verdict(frozenset()))
    heading, *kept = map(json.loads, (tmp_path / "report.jsonl").read_text().splitlines())
    assert (heading["GPU"], heading["ceilings"]["copy_tb_s"]) == ("G", 4.0)
    assert [row["family"] for row in kept] == ["rms_norm", "rope"]
    assert [row["family"] for row in json.loads(report.REPORT.read_text())["rows"]] == ["rope", "rms_norm"]


def test_a_process_that_a_failure_left_unusable_measures_nothing_more(monkeypatch):
    cases = [case(shape=f"B={number}") for number in range(4)]
    errors = {"B=1": "fails: no", "B=2": "fails: no"}
    usable = iter((True, False))

    def row_of(each, *_):
        return Row(
            "f", each.shape, 2.0, "bytes", us=None if each.shape in errors else 2.5, error=errors.get(each.shape, "")
        )

    monkeypatch.setattr(measure, "families", lambda _: {"f": lambda: cases})
    monkeypatch.setattr(measure, "row_of", row_of)
    monkeypatch.setattr(measure, "is_usable", lambda: next(usable))
    rows = []
    measure._measure_from("f", CEILINGS, How(), 0, rows.append)
    assert [row.shape for row in rows] == ["B=0", "B=1", "B=2"], "after the second failure another process goes on"


def test_a_case_that_was_cut_off_says_why(monkeypatch):
    cases = [case(shape="B=0"), case(shape="B=1")]
    measured = Row("f", "B=1", 2.0, "bytes", us=2.5)
    monkeypatch.setattr(measure, "families", lambda _: {"f": lambda: cases})
    monkeypatch.setattr(measure, "in_turn", lambda *_: iter([Lost("cut off after 45 s"), measured]))
    rows = list(measure.measure_family("f", CEILINGS, How(), Limits()))
    assert [(row.shape, row.us, row.error) for row in rows] == [("B=0", None, "cut off after 45 s"), ("B=1", 2.5, "")]


def test_what_a_decode_step_spends_most_on_is_measured_first():
    assert in_order(["rope", "mla_decode", "act_quant", "moe_experts"]) == [
        "moe_experts",
        "mla_decode",
        "act_quant",
        "rope",
    ]
    assert cases_of("moe_experts", How())[0].shape.startswith("V2-Lite")
    assert [each.shape for each in cases_of("rms_norm", How(is_dry=True))] == [
        "alone V3 query latent T=1 N=1536", "add V2-Lite T=1 N=2048",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("randn", "stream", "usable"),
    [(torch.zeros, "default", True), (torch.zeros, "side", False), (None, "default", False)],
)
def test_a_process_is_usable_if_it_can_draw_on_the_default_stream(randn, stream, usable, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr(torch, "randn", (lambda *_, **__: randn(1)) if randn else fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    assert harness.is_usable() == usable


class FakeGpu:
    """Stands in for torch.cuda: calls advance a clock, a graph repeats them when replayed."""

    def __init__(self):
        self.now_us, self.captured, self.made = 0.0, None, []

    def call(self, name, us):
        def run():
            if self.captured is None:
                self.now_us += us
            else:
                self.captured.append(us)
                self.made.append(name)

        return run

    @contextlib.contextmanager
    def capture(self, graph):
        self.captured = graph.calls
        yield
        self.captured = None


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()

    class Graph:
        def __init__(self):
            self.calls = []

        def replay(self):
            fake.now_us += sum(self.calls)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at_us = fake.now_us

        def elapsed_time(self, end):
            return (end.at_us - self.at_us) / 1e3

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", fake.capture)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: fake.now_us / 1e6)
    return fake


def test_a_time_is_that_of_one_call_with_the_buffers_in_turn(gpu):
    assert measure_us([gpu.call("a", 1000.0), gpu.call("b", 3000.0)]) == pytest.approx(2000.0)
    assert gpu.made == ["a", "b", "a", "b"]


def test_a_peer_that_waits_for_the_host_is_timed_outside_a_graph(gpu, monkeypatch):
    def waits():
        assert gpu.captured is None, "operation not permitted when stream is capturing"
        gpu.now_us += 500.0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50_000_000))
    waiting = case(peers={"torch": lambda: [gpu.call("a", 20.0)]}, eager_peers={"torch, eager": lambda: [waits, waits]})
    row = measure.row_of(dataclasses.replace(waiting, calls=lambda: [gpu.call("b", 10.0)]), CEILINGS, How(), [])
    assert row.us == pytest.approx(10.0)
    assert row.peers == pytest.approx({"torch": 20.0, "torch, eager": 500.0})
    assert unmeasured(waiting, CEILINGS).peers == dict.fromkeys(row.peers, "not measured")


def test_torchs_draw_is_in_no_graph():
    """It looks at its rows on the host, which a capture does not survive."""
    for each in families("cases")["sampling"]():
        assert bool(each.peers) == each.shape.endswith("greedy")
        assert bool(each.eager_peers) != bool(each.peers)


@pytest.mark.parametrize("measure", [measure_us, measure_eager_us])
def test_a_case_without_calls_is_refused(measure):
    with pytest.raises(ValueError, match="no calls"):
        measure([])


def test_every_family_lists_cases_with_a_floor():
    for name, make in families("cases").items():
        for listed in make():
            assert listed.family == name
            assert unmeasured(listed, H200_ASSUMED).floor_us > 0


def test_adapters_of_other_projects_add_peers(tmp_path):
    assert load_adapters(tmp_path / "missing") == []
    (tmp_path / "a.py").write_text("def peers(case):\n    return {'theirs': list} if case.family == 'f' else {}\n")
    adapters = load_adapters(tmp_path)
    assert set(peers_of(case(peers={"torch": list}), adapters)) == {"torch", "theirs"}
    assert set(peers_of(case(family="g"), adapters)) == set()
    (tmp_path / "b.py").write_text("")
    with pytest.raises(ValueError, match=r"b\.py must define peers"):
        load_adapters(tmp_path)
