import pytest
from headrace_planner.__main__ import app
from headrace_planner.compat import compat_critical_intensities, compat_operations
from typer.testing import CliRunner

_PREFILL = [0.75, 1535.44, 1822.67, 1023.75, 7.97, 1635.84, 1635.84, 2015.52]
_SAMPLING = [0.75, 118.15, 0.50, 113.78, 7.50, 31.39, 31.39, 120.36]
_CRITICAL = {"tpu-v5e": 240.24, "tpu-v5p": 166.00, "tpu-v6e": 573.75, "b200": 281.25}


@pytest.mark.parametrize(("phase", "golden"), [("prefill", _PREFILL), ("sampling", _SAMPLING)])
def test_intensities_are_those_of_the_page(phase, golden):
    assert [round(operation.intensity, 2) for operation in compat_operations(phase)] == golden


def test_critical_intensities_are_those_of_the_page():
    assert {name: round(value, 2) for name, value in compat_critical_intensities().items()} == _CRITICAL


def test_command_prints_the_figures():
    result = CliRunner().invoke(app, ["roofline", "--compat", "intensity"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    words = result.stdout.split()
    for figure in (*_PREFILL, *_SAMPLING, *_CRITICAL.values()):
        assert f"{figure:.2f}" in words
