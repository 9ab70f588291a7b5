"""The kernels' benchmark as far as it goes without a GPU: floors, the table, parity, refusing."""

import contextlib
import dataclasses
import functools
import json
import os
from types import SimpleNamespace

import pytest
import torch

from tests.perf.kernels import harness, parity, report, tune
from tests.perf.kernels.bench_case import BenchCase
from tests.perf.kernels.ceilings import Ceilings
from tests.perf.kernels.harness import NoGpuError, families, measure_eager_us, measure_us, require_gpu
from tests.perf.kernels.parity import Verdict
from tests.perf.kernels.peers import load_adapters, peers_of
from tests.perf.kernels.rows import Row, as_json, fits_l2, floor, table, unmeasured

CEILINGS = Ceilings(copy_tb_s=4.0, read_tb_s=5.0, bf16_tflops=800.0, fp8_tflops=None, launch_gap_us=1.0)


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


def test_buffers_that_fit_the_cache_are_told():
    assert fits_l2(case(), num_calls=9, l2_bytes=50_000_000, bound="bytes")
    assert not fits_l2(case(), num_calls=10, l2_bytes=50_000_000, bound="bytes")
    assert not fits_l2(case(), num_calls=1, l2_bytes=50_000_000, bound="bf16")


def test_a_row_without_a_time_says_not_measured():
    row = unmeasured(case(peers={"torch": list}, published_us=3.5, published_source="x"), CEILINGS)
    lines = table([row], CEILINGS, {"GPU": "none"}).splitlines()
    assert lines[-3] == "| f | B=1 | not measured | 2.0 | bytes | – | torch | 3.5 [1] |"
    assert lines[-1] == "[1] x  "
    assert as_json([row])[0]["fraction"] is None


def test_a_measured_row_shows_its_share_of_the_floor():
    rows = [
        Row("f", "B=1", 2.0, "bytes", us=2.5, peers={"torch": 4.0, "other": "fails: no"}),
        Row("f", "B=2", 2.0, "bytes", us=2.0, is_in_l2=True),
        Row("f", "B=3", 2.0, "bytes", error="fails: RuntimeError: a | b"),
    ]
    lines = table(rows, CEILINGS, {"GPU": "G", "torch": "2"}).splitlines()
    assert lines[0].startswith("GPU G; torch 2. Ceilings: copy 4.00 TB/s, read 5.00 TB/s, bf16 800 TFLOP/s, fp8 not")
    assert lines[-3] == "| f | B=1 | 2.5 | 2.0 | bytes | 80% | torch 4.0; other fails: no | – |"
    assert "2.0 (in L2)" in lines[-2]
    assert "| fails: RuntimeError: a / b |" in lines[-1]
    assert as_json(rows)[0]["fraction"] == pytest.approx(0.8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [report, tune])
def test_without_a_gpu_nothing_is_measured_or_written(program, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["program"])
    with pytest.raises(NoGpuError, match="sees no GPU"):
        require_gpu()
    assert program.main() == 2


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.parity.kernels.test_rope" name="test_a"/>
<testcase classname="tests.parity.kernels.test_rms_norm" name="test_a"/>
<testcase classname="tests.parity.kernels.test_rms_norm" name="test_b"><failure message="no"/></testcase>
<testcase classname="tests.parity.kernels.test_model" name="test_c"><failure message="no"/></testcase>
<testcase classname="tests.parity.kernels.test_mla_decode" name="test_d"><skipped message="no"/></testcase>
<testcase classname="" name="tests.parity.kernels.test_moe_sort"><error message="collection failure"/></testcase>
</testsuite></testsuites>"""


def test_parity_is_judged_family_by_family():
    verdict = parity.judge(JUNIT, ["rope", "rms_norm", "moe_sort", "mla_decode", "sampling"])
    assert verdict.wrong == {"rms_norm", "moe_sort", "mla_decode", "sampling"}, "the last two's tests never ran"
    assert verdict.elsewhere == ("tests.parity.kernels.test_model::test_c",)
    assert not verdict.holds
    assert parity.judge(JUNIT, ["rope"]).wrong == frozenset()
    assert parity.judge("", ["rope"]).wrong == {"rope"}, "the run ended before it wrote a report"


def measured_by_report(monkeypatch, tmp_path, arguments, verdict):
    """Run the command where everything of a GPU is made up; return its exit code, the rows and who was judged."""
    judged = []
    made = {name: lambda name=name: [case(family=name)] for name in ("rope", "rms_norm")}
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    monkeypatch.setattr(report, "families", lambda _: made)
    monkeypatch.setattr(report, "require_gpu", lambda: "G")
    monkeypatch.setattr(report.ceilings_of_gpu, "measure", lambda: CEILINGS)
    monkeypatch.setattr(report.parity, "run", lambda names: judged.extend(names) or verdict)
    monkeypatch.setattr(report, "_row", lambda each, *_: Row(each.family, each.shape, 2.0, "bytes", us=2.5))
    monkeypatch.setattr(report, "_in_process", lambda run: run())
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(report, "DOCS", tmp_path / "kernels.md")
    report.DOCS.write_text("<!-- kernels-gpu: begin -->\nas it was\n<!-- kernels-gpu: end -->\n")
    code = report.main()
    return code, {row["family"]: row for row in json.loads(report.REPORT.read_text())["rows"]}, judged


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


def test_a_failure_costs_its_own_case_alone(monkeypatch, tmp_path):
    """Of five cases one leaves its process unusable, one ends it, and one only fails."""
    cases = [case(shape=f"B={number}") for number in range(5)]
    state = SimpleNamespace(usable=True, processes=0)

    def row(each, *_):
        if each.shape == "B=3":
            raise SystemExit
        assert state.usable, "a process that a failure left unusable measures nothing"
        state.usable = each.shape != "B=1"
        error = "fails: no" if each.shape in ("B=1", "B=2") else ""
        return Row("f", each.shape, 2.0, "bytes", us=None if error else 2.5, error=error)

    def in_process(run):
        state.usable, state.processes = True, state.processes + 1
        try:
            run()
        except SystemExit:
            return -6
        return 0

    monkeypatch.setattr(report, "families", lambda _: {"f": lambda: cases})
    monkeypatch.setattr(report, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(report, "_row", row)
    monkeypatch.setattr(report, "is_usable", lambda: state.usable)
    monkeypatch.setattr(report, "_in_process", in_process)
    rows = report._measure(cases, CEILINGS)
    assert [each.shape for each in rows] == ["B=0", "B=1", "B=2", "B=3", "B=4"]
    assert [each.error for each in rows] == ["", "fails: no", "fails: no", "fails: its process ended with -6", ""]
    # B=0 and B=1; B=2; B=3, which ends its process before it has a row; B=4.
    assert state.processes == 4
    assert report._rows_in(tmp_path / "report.jsonl") == rows


def test_the_exit_code_of_a_process_is_known():
    assert report._in_process(functools.partial(os._exit, 9)) == 9


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
    row = report._row(dataclasses.replace(waiting, calls=lambda: [gpu.call("b", 10.0)]), CEILINGS, [])
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
            assert unmeasured(listed, harness_ceilings()).floor_us > 0


def harness_ceilings():
    return Ceilings(copy_tb_s=4.3, read_tb_s=4.3, bf16_tflops=790.0, fp8_tflops=1480.0, launch_gap_us=1.0)


def test_adapters_of_other_projects_add_peers(tmp_path):
    assert load_adapters(tmp_path / "missing") == []
    (tmp_path / "a.py").write_text("def peers(case):\n    return {'theirs': list} if case.family == 'f' else {}\n")
    adapters = load_adapters(tmp_path)
    assert set(peers_of(case(peers={"torch": list}), adapters)) == {"torch", "theirs"}
    assert set(peers_of(case(family="g"), adapters)) == set()
    (tmp_path / "b.py").write_text("")
    with pytest.raises(ValueError, match=r"b\.py must define peers"):
        load_adapters(tmp_path)
