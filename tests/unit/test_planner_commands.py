"""The planner's commands on a narrow terminal, and what they say of files and workers that are no good."""

from __future__ import annotations

from pathlib import Path

import pytest
from headrace_planner import cli_plan, cli_roofline, cli_simulate, plots
from headrace_planner.__main__ import app
from headrace_planner.live import Reading
from headrace_planner.sim_studies import Study
from headrace_planner.tables import print_table
from rich.console import Console
from typer.testing import CliRunner, Result

SIMULATE = ("simulate", "--prefill", "1", "--decode", "1", "--workload", "500,8,4", "--requests", "6")
PLAN = ("plan", "--workload", "2048,64,5", "--no-simulate")


def run(*arguments: str, columns: int = 60) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns), "NO_COLOR": "1"})


@pytest.mark.parametrize(
    "arguments",
    [SIMULATE, PLAN, ("roofline", "--compat", "intensity"), ("roofline", "--no-formulas"), ("roofline",)],
    ids=["simulate", "plan", "compat", "roofline", "formulas"],
)
def test_nothing_is_cut_or_too_wide_at_60_columns(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 60


def test_a_simulation_has_a_line_for_each_latency_with_all_its_percentiles() -> None:
    lines = run(*SIMULATE).stdout.splitlines()
    names = next(line.split() for line in lines if "p25" in line)
    assert names == ["p25", "p50", "p99", "mean"]
    for name in ("TTFT", "ITL", "TPOT", "E2E"):
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) == 1 + 2 * 4, "a number and its unit each"


def test_one_token_has_no_gaps() -> None:
    lines = run("simulate", "--prefill", "1", "--decode", "1", "--workload", "500,1,4", "--requests", "6").stdout
    assert ["ITL", "-", "-", "-", "-"] in [line.split() for line in lines.splitlines()]


def test_a_study_s_rows_are_blocks_where_its_columns_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ["met both objectives at requests/s", *(f"{rate:.1f}" for rate in range(10, 18))]
    rows = [["3 prefill TP8 + 1 decode", *("100%" for _ in columns[1:])], ["4 colocated", *["98%"] * 7, ""]]
    monkeypatch.setattr(cli_simulate, "STUDIES", {"made": lambda _: Study([], columns, rows)})
    wide = run("simulate", "--study", "made", columns=140).stdout.splitlines()
    assert any("3 prefill TP8 + 1 decode" in line and line.count("100%") == 8 for line in wide)
    narrow = run("simulate", "--study", "made").stdout.splitlines()
    assert max(map(len, narrow)) <= 60
    assert narrow[0].strip() == "3 prefill TP8 + 1 decode"
    assert [line.split() for line in narrow[1:9]] == [[name, "100%"] for name in columns[1:]]
    assert len(narrow) == 1 + 8 + 1 + 7, "an empty cell has no line"


def test_a_table_that_just_fits_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["decode", "12"]]
    for width, is_table in ((24, True), (12, False)):
        print_table(Console(width=width), ("what", "how much"), rows)
        assert any("what" in line and "how much" in line for line in capsys.readouterr().out.splitlines()) is is_table


@pytest.mark.parametrize(
    "arguments",
    [(*SIMULATE, "--plot"), (*PLAN, "--plot-dir"), ("roofline", "--build-page")],
    ids=["simulate", "plan", "roofline"],
)
def test_a_file_that_cannot_be_written_is_named(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    result = run(*arguments, str(tmp_path / "taken" / "out.svg"))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert f"{tmp_path}/taken/out.svg can't be written: " in result.stderr


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("taken/out.svg", "can't be written: "),
        ("folder.svg", "can't be written: "),
        ("out.xyz", "end it in .svg or .png"),
    ],
)
@pytest.mark.parametrize("arguments", [SIMULATE, ("simulate", "--study", "made")], ids=["simulate", "study"])
def test_a_plot_that_cannot_be_written_is_found_before_anything_is_simulated(
    arguments: tuple[str, ...], file: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated: list[object] = []
    monkeypatch.setattr(cli_simulate, "simulate", lambda *_: simulated.append(_))
    monkeypatch.setattr(cli_simulate, "STUDIES", {"made": simulated.append})
    (tmp_path / "taken").write_text("a file, not a folder")
    (tmp_path / "folder.svg").mkdir()
    result = run(*arguments, "--plot", str(tmp_path / file))
    assert (result.exit_code, result.stdout, simulated) == (2, "", [])
    assert result.stderr.count("\n") == 1
    assert f"{tmp_path / file}" in result.stderr
    assert why in result.stderr


def test_a_plan_finds_out_first_that_its_plots_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[object] = []
    monkeypatch.setattr(cli_plan, "make_plan", lambda *_, **__: planned.append(_))
    (tmp_path / "taken").write_text("a file, not a folder")
    result = run(*PLAN, "--plot-dir", str(tmp_path / "taken"))
    assert (result.exit_code, planned, result.stderr.count("\n")) == (2, [], 1)


def test_looking_whether_a_plot_can_be_written_leaves_no_file_and_what_is_there(tmp_path: Path) -> None:
    new, old = tmp_path / "folder" / "new.svg", tmp_path / "old.png"
    old.write_text("drawn before")
    plots.check(new)
    plots.check(old)
    assert not new.exists()
    assert old.read_text() == "drawn before"


def test_workers_that_have_measured_nothing_yet_are_no_mistake_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli_roofline, "read_workers", lambda metrics: [Reading(metrics[0], None)])
    result = run("roofline", "--live", "--metrics", "127.0.0.1:9", "--save-measured", str(tmp_path / "points.json"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no prefill or decode step was measured yet; a worker measures one in ")
    assert result.stderr.count("\n") == 1


def test_points_that_cannot_be_written_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise IsADirectoryError(21, "Is a directory", str(tmp_path))

    monkeypatch.setattr(cli_roofline, "read_workers", lambda metrics: [Reading(metrics[0], None)])
    monkeypatch.setattr(cli_roofline, "save_points", refuse)
    result = run("roofline", "--live", "--metrics", "127.0.0.1:9", "--save-measured", str(tmp_path))
    assert (result.exit_code, result.stderr) == (
        2, f"error: {tmp_path} can't be written: Is a directory; name another file\n"
    )  # fmt: skip


@pytest.mark.parametrize(("address", "code"), [("nonsense", 2), ("127.0.0.1:1", 1)])
def test_an_address_that_is_none_and_one_where_nobody_is(address: str, code: int) -> None:
    result = run("roofline", "--live", "--metrics", address)
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1)
