import json

import pytest
from headrace_planner.__main__ import app
from typer.testing import CliRunner

_WIDE, _NARROW = {"COLUMNS": "200"}, {"COLUMNS": "100"}


def _run(*arguments, env=_WIDE):
    return CliRunner().invoke(app, ["roofline", *arguments], env=env)


def _operations(result, phase):
    return json.loads(result.stdout)[phase]["operations"]


@pytest.mark.parametrize("env", [_WIDE, _NARROW], ids=["wide", "narrow"])
def test_shows_both_phases_with_formulas(env):
    result = _run(env=env)
    assert result.exit_code == 0
    assert "2·H·Pp·(nope+R+v)" in result.stdout
    assert "attention_absorbed" in result.stdout
    assert "a step at the roof" in result.stdout


@pytest.mark.parametrize("columns", ["60", "80", "96"])
def test_no_figure_is_cut_short_on_a_narrow_terminal(columns):
    result = _run("--phase", "decode", "--no-formulas", env={"COLUMNS": columns})
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= int(columns)
    assert ("--json has them" in " ".join(result.stdout.split())) == (columns != "96")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tp", "3"], "tp 3 does not divide the 16 heads of deepseek-v2-lite"),
        (["--dp", "3", "--ep", "3"], "ep 3 does not divide the 64 experts of deepseek-v2-lite"),
    ],
)
def test_a_division_that_no_engine_computes_is_refused(arguments, problem):
    result = _run(*arguments)
    assert (result.exit_code, result.stderr) == (2, f"error: {problem}\n")


def test_in_fp32_a_gpu_has_a_peak_of_its_own():
    result = _run("--dtype", "fp32", "--hardware", "h100", "--phase", "decode", "--no-formulas")
    assert "fp32 67 TFLOP/s" in result.stdout


def test_operations_are_sorted_by_intensity():
    lines = _run("--phase", "decode", "--no-formulas").stdout.splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    assert names.index("embedding") < names.index("ffn_norm") < names.index("expert_up") < names.index("head")


def test_json_has_every_operation_with_its_formula():
    result = _run("--json", "--model", "deepseek-v3", "--dtype", "fp8", "--dp", "8", "--ep", "8")
    names = {operation["name"] for operation in _operations(result, "prefill")}
    assert {"kv_up_proj", "attention_naive", "router", "dispatch", "combine", "kv_transfer", "head"} <= names
    assert all(operation["time_s"] > 0 and operation["bytes_formula"] for operation in _operations(result, "decode"))


def test_model_may_be_a_folder_and_hardware_a_file(tmp_path):
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100,
              "intermediate_size": 128}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "hardware.toml").write_text('[slow]\nbase = "h100"\nmemory_bytes_per_s = 1e9\n')
    result = _run("--json", "--model", str(tmp_path), "--hardware", "slow",
                  "--hardware-file", str(tmp_path / "hardware.toml"))  # fmt: skip
    assert result.exit_code == 0
    assert {operation["bound"] for operation in _operations(result, "decode")} == {"memory"}


def test_measured_histogram_is_read(tmp_path):
    path = tmp_path / "histogram.json"
    path.write_text(json.dumps([10.0] + [1.0] * 63))
    arguments = ("--json", "--dp", "8", "--ep", "8", "--phase", "decode")
    even = _operations(_run(*arguments), "decode")
    skewed = _operations(_run(*arguments, "--histogram", str(path)), "decode")
    flops = [next(row["flops"] for row in rows if row["name"] == "expert_up") for rows in (even, skewed)]
    assert flops[1] > flops[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "none"), "neither"),
        (("--hardware", "none"), "no hardware"),
        (("--ep", "3"), "divisor"),
        (("--cached", "5000"), "leaves nothing"),
        (("--histogram", "/none"), "JSON list"),
        (("--build-page", "x.html", "--measured", "/none"), "can't be read"),
    ],
)
def test_mistakes_are_named(arguments, said):
    result = _run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_page_is_built_with_what_was_asked_for(tmp_path):
    points = {"source": "here", "points": [{"phase": "decode", "operation": "head", "seconds": 1e-3}]}
    (tmp_path / "measured.json").write_text(json.dumps(points))
    page = tmp_path / "site" / "roofline.html"
    result = _run("--model", "mixtral-8x7b", "--zipf", "0.8", "--measured", str(tmp_path / "measured.json"),
                  "--build-page", str(page))  # fmt: skip
    assert result.exit_code == 0
    html = page.read_text()
    assert '"model":"mixtral-8x7b"' in html
    assert '"as given"' in html
    assert '"source":"here"' in html
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html
