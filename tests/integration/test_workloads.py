"""The four workloads, served by processes and asked over HTTP by `headrace bench`, as `make bench-workloads` does."""

from headrace_planner.sim_workloads import WORKLOADS

from tests.perf.workloads import served
from tests.perf.workloads.table import latency_row, rate_row


def test_each_workload_is_served_without_an_error_and_has_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(served, "SCALE", 64)
    monkeypatch.setattr(served, "_NUM_REQUESTS", dict.fromkeys(WORKLOADS, 9))
    monkeypatch.setattr(served, "_FOLDER", tmp_path)
    cells = served.serve(served.Family("small", tmp_path / "checkpoint"))
    assert [cell["workload"] for cell in cells] == list(WORKLOADS)
    for cell in cells:
        figures = cell["figures"]
        assert (figures["completed"], figures["failed"], figures["short"]) == (9, 0, 0)
        assert figures["request_goodput"] is not None
        assert (tmp_path / f"checkpoint-{cell['workload']}.json").is_file(), "every request is kept"
        assert "| 9 |" in rate_row(cell)
        assert latency_row(cell).count(" / ") == 8
