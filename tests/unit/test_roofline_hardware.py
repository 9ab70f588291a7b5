import itertools
import os
from types import SimpleNamespace

import pytest
from headrace_core.roofline import hardware_measure
from headrace_core.roofline.hardware import HARDWARE, HardwareError, find_hardware, load_hardware
from headrace_core.roofline.hardware_measure import measure_cpu
from headrace_core.roofline.model_shape import Dtype

_COMPLETE = """
[mine]
flops = { bf16 = 1e15, fp8 = 2e15 }
memory_bytes_per_s = 2e12
memory_bytes = 96e9
link_bytes_per_s = 1e11
network_bytes_per_s = 5e10

[cheaper]
base = "h200"
cost_per_hour = 1.25
"""


def test_every_entry_says_where_it_is_from():
    for name, hardware in HARDWARE.items():
        assert hardware.name == name
        assert hardware.source
        assert hardware.memory_bytes_per_s < hardware.flops_per_s(Dtype.BF16)
        assert hardware.network_bytes_per_s < hardware.link_bytes_per_s < hardware.memory_bytes_per_s


def test_asked_for_hardware_is_there():
    assert {"tpu-v5e", "tpu-v5p", "tpu-v6e", "a100", "h100", "h200", "b200", "mi300x", "mi355x"} <= set(HARDWARE)


def test_types_that_a_machine_lacks_run_as_wider_ones():
    assert HARDWARE["a100"].flops_per_s(Dtype.FP8) == HARDWARE["a100"].flops_per_s(Dtype.BF16)


def test_file_extends_the_table(tmp_path):
    path = tmp_path / "hardware.toml"
    path.write_text(_COMPLETE)
    mine = find_hardware("mine", path)
    assert mine.critical_intensity() == 500
    assert mine.source == str(path)
    cheaper = find_hardware("cheaper", path)
    assert cheaper.cost_per_hour == 1.25
    assert cheaper.flops == HARDWARE["h200"].flops
    assert find_hardware("h100", path) is HARDWARE["h100"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[x]\nbase = 'h200'\nspeed = 3", "x.speed"),
        ("[x]\nbase = 'h200'\nmemory_bytes = -1", "x.memory_bytes"),
        ("[x]\nflops = { bf16 = 1e15 }", "lacks"),
        ("[x]\nbase = 'none'", "no hardware 'none'"),
        ("[x", "TOML"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path, text, named):
    path = tmp_path / "hardware.toml"
    path.write_text(text)
    with pytest.raises(HardwareError, match=named):
        load_hardware(path)


def test_json_files_are_read_too(tmp_path):
    path = tmp_path / "hardware.json"
    path.write_text('{"x": {"base": "b200", "memory_bytes": 192e9}}')
    assert load_hardware(path)["x"].memory_bytes == 192e9
    path.write_text("[]")
    with pytest.raises(HardwareError, match="table"):
        load_hardware(path)


def test_this_cpu_is_measured_by_what_was_done_in_the_time_it_took(monkeypatch):
    """A clock that takes a second for each call makes every rate the work itself."""
    ticks = itertools.count()
    monkeypatch.setattr(hardware_measure, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    cpu = measure_cpu(repeats=2, bytes_per_core=1 << 20, matrix_size=64)
    num_bytes = len(os.sched_getaffinity(0)) * (1 << 20)
    assert cpu.name == "cpu"
    assert cpu.memory_bytes_per_s == cpu.link_bytes_per_s == num_bytes
    assert cpu.flops_per_s(Dtype.FP32) == 2 * 64**3
