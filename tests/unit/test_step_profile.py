"""What `make profile` shows of a step."""

import io
from dataclasses import replace

import pytest
from headrace_core.roofline.hardware_measure import cpu_hardware
from headrace_core.roofline.model_shape import Dtype
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_core.worker.kernel_speed import faster_of
from rich.console import Console

from tests.perf.step_profile import Profile, Row, show, total

_HARDWARE = cpu_hardware({Dtype.BF16: 1e11}, memory_bytes_per_s=1e10, copy_bytes_per_s=1e10, source="")


@pytest.fixture
def profile(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["v3"])
    return Profile(tmp_path, _HARDWARE, num_pages=40)


@pytest.mark.parametrize("is_decode", [True, False])
def test_operations_add_up_to_the_step_and_have_their_floors(profile, is_decode):
    rows = profile.decode(2, 5, 2) if is_decode else profile.prefill(70, 2)
    whole = total(rows)
    assert whole.ms == pytest.approx(sum(row.ms for row in rows))
    by_op = {row.op: row for row in rows}
    assert by_op["sampling"].floor_ms is None
    assert {row.op for row in rows if row.floor_ms is None} == {"sampling", "other"}
    assert all(row.kernel_ms <= row.ms for row in rows), "kernels run within their operation"


def test_a_table_has_every_operation_and_the_sum():
    rows = [Row("head", 6.0, 3.0, 5.0, 8.0, 1), Row("other", 2.0, None, 0.0, 0.0, 0)]
    shown = io.StringIO()
    show(Console(file=shown, width=120), "a step", rows, threads=2)
    head, step = (next(line for line in shown.getvalue().splitlines() if name in line) for name in ("head", "8.00"))
    assert head.split() == ["head", "6.00", "75%", "████████░░░░░░░", "3.00", "2.0", "83%", "80%", "1"]
    assert step.split()[:3] == ["step", "8.00", "100%"]


def test_the_faster_of_two_measurements_is_the_machine():
    other = replace(_HARDWARE, flops={Dtype.BF16: 2e11}, memory_bytes_per_s=5e9)
    best = faster_of(_HARDWARE, other)
    assert (best.flops[Dtype.BF16], best.memory_bytes_per_s) == (2e11, 1e10)
