"""Published deployments: no floor is below what was reached, and the docs show what is computed now."""

from pathlib import Path

import pytest
from headrace_planner.published import DEPLOYMENTS, table

from tests.perf.planner_figures import too_far

PAGE = (Path(__file__).parents[2] / "docs/planner.md").read_text()


@pytest.mark.parametrize("row", DEPLOYMENTS, ids=lambda row: f"{row.source[:8]} {row.phase}")
def test_a_floor_is_above_what_was_reached(row):
    assert row.reached < row.floor() < 2.5 * row.reached


@pytest.mark.parametrize(("error", "problems"), [(0.15, []), (0.151, ["ttft 15.1% on held-out cells, above 15%"])])
def test_a_report_that_is_too_far_off_fails(error, problems):
    report = {"ttft_median_error": error, "itl_median_error": 0.05, "throughput_median_error": 0.1}
    assert too_far(report) == problems
    assert too_far({**report, "itl_median_error": float("nan")})


def test_the_docs_show_the_table():
    begin, end = "<!-- published: begin -->\n", "<!-- published: end -->"
    assert PAGE.partition(begin)[2].partition(end)[0] == table(), "python -m headrace_planner.published writes it"
