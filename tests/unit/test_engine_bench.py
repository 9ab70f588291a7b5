"""The engine's bench: what it makes of samples, and of peers that are not there."""

import sys
from pathlib import Path

import pytest
from headrace_core.roofline.hardware_measure import cpu_hardware
from headrace_core.roofline.model_shape import Dtype, ModelShape

from tests.perf.engine.asked_process import AskedProcess
from tests.perf.engine.llama_cpp import LlamaCpp
from tests.perf.engine.peer import NoPeerError, Task
from tests.perf.engine.summary import LOADED, OURS, floors, summary
from tests.perf.engine.table import table
from tests.perf.engine.vllm_cpu import VllmCpu

_DEMO = Path(__file__).parents[2] / "demo" / "model"
_ROUNDS = {
    OURS: [
        {"decode 1": [0.010, 0.012, 0.011], "prefill 512": [0.2]},
        {"decode 1": [0.013, 0.014], "prefill 512": [0.3]},
    ],
    "one": [{"decode 1": [0.024], "prefill 512": [0.5]}],
    "two": [{"decode 1": [0.030], "prefill 512": [0.125]}],
    LOADED: [{"decode 1": [0.036]}],
}


@pytest.fixture
def least():
    hardware = cpu_hardware({Dtype.BF16: 1e11}, memory_bytes_per_s=1e10, copy_bytes_per_s=1e10, source="")
    return floors(ModelShape.load(_DEMO), hardware, [1], [512])


def test_ratios_are_to_the_fastest_peer_of_each_thing(least):
    report = summary(_ROUNDS, least, {"three": "not there"})
    assert report["engines_ms"][OURS] == {"decode 1": 12.0, "prefill 512": 250.0}
    assert report["best"] == {"decode_b1": "one", "prefill_512": "two"}
    assert report["decode_b1_vs_best"] == 0.5
    assert report["prefill_512_vs_best"] == 0.5, "a ratio of rates"
    assert report["decode_b1_loaded_vs_quiet"] == 3.0
    assert report["decode_b1_vs_floor"] == pytest.approx(0.012 / least["decode 1"].time_s, abs=0.01)
    assert report["engines_ms"]["three"] is None
    assert "not there" in table(report)


def test_without_a_peer_a_ratio_is_null(least):
    report = summary({OURS: _ROUNDS[OURS]}, least, {})
    assert report["decode_b1_vs_best"] is None
    assert report["best"]["prefill_512"] is None
    assert "decode_b1_loaded_vs_quiet" not in report
    assert "prefill 512" in table(report)


@pytest.mark.parametrize("engine", [LlamaCpp, VllmCpu])
def test_a_peer_that_nobody_installed_says_what_is_missing(engine, tmp_path):
    with pytest.raises(NoPeerError, match="is not there"):
        engine(tmp_path, Task(_DEMO, 2, [1], [512], 100))


_ECHO = "import sys\nprint('{}', flush=True)\nfor line in sys.stdin: print(line, end='', flush=True)"


def test_an_asked_process_answers_in_json():
    process = AskedProcess([sys.executable, "-c", _ECHO], {}, start_s=60)
    assert process.ask({"tokens": [1, 2]}, most_s=60) == {"tokens": [1, 2]}
    process.close()


def test_one_that_ends_gives_its_last_words():
    with pytest.raises(NoPeerError, match=r"ended with 1: .*no such instruction"):
        AskedProcess([sys.executable, "-c", "raise SystemExit('no such instruction')"], {}, start_s=60)
