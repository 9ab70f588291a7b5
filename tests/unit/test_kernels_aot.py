"""The pure parts of ahead-of-time compilation: specialisation, reading resources, limits, verdicts, the table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl
from headrace_kernels.aot import __main__ as program
from headrace_kernels.aot.launches import cases, specialise
from headrace_kernels.aot.other_triton import report_under
from headrace_kernels.aot.report import Row, failures, put_between, report, rows_of, table
from headrace_kernels.aot.resources import (
    Resources,
    amd_excess,
    amdgcn_resources,
    cubin_usage,
    cuda_excess,
    ptx_matrix_units,
    ptxas_serialised,
    ptxas_spilled_bytes,
)
from headrace_kernels.backend import use_backend
from headrace_kernels.causal_attention import causal_attention
from headrace_kernels.decode_linear import norm_linear
from headrace_kernels.gpu.launch import Launch, recording
from headrace_kernels.mla_decode import mla_decode
from triton.runtime.jit import JITFunction


def _kernel(x_ptr, y_ptr, stride, count, scale, flag, absent, BLOCK_N: tl.constexpr, OPERAND: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr + stride + count))


def _tuple_kernel(pointers):
    tl.store(pointers[0], tl.load(pointers[1]))


KERNEL = JITFunction(_kernel)


def specialised(x, stride=32, count=7, target="cuda", block=64, num_warps=4):
    arguments = (x, torch.empty(8, device="meta"), stride, count, 0.5, True, None)
    return specialise(Launch(KERNEL, (1,), arguments, {"BLOCK_N": block, "OPERAND": tl.bfloat16}, num_warps, 2), target)


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_arguments_are_specialised_as_a_launch_would():
    source = specialised(bf16(4, 64)).source
    assert source.signature == {
        "x_ptr": "*bf16",
        "y_ptr": "*fp32",
        "stride": "i32",
        "count": "i32",
        "scale": "fp32",
        "flag": "u1",
        "absent": "constexpr",
        "BLOCK_N": "constexpr",
        "OPERAND": "constexpr",
    }
    assert source.constants == {(6,): None, (7,): 64, (8,): tl.bfloat16}
    divisible = [index for (index,), attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes]
    assert divisible == [0, 1, 2]


def test_an_integer_one_is_a_constant_and_a_wide_one_has_64_bits():
    assert specialised(bf16(64), stride=1).source.constants[(2,)] == 1
    assert specialised(bf16(64), stride=2**40).source.signature["stride"] == "i64"


def test_a_view_at_an_odd_offset_is_not_taken_as_aligned():
    assert [["tt.divisibility", 16]] in specialised(bf16(4, 64)[:, 8:]).source.attrs.values()
    attributes = specialised(bf16(4, 64)[:, 1:]).source.attrs
    assert ["tt.divisibility", 16] not in attributes.get((0,), [])


def test_tensors_in_a_tuple_are_arguments_of_their_own():
    launch = Launch(JITFunction(_tuple_kernel), (1,), ((bf16(64), bf16(64)[1:], 3),), {}, 4, 2)
    source = specialise(launch, "cuda").source
    assert source.signature == {"pointers": ("*bf16", "*bf16", "i32")}
    assert ["tt.divisibility", 16] in source.attrs[(0, 0)]
    assert ["tt.divisibility", 16] not in source.attrs.get((0, 1), [])


def test_amd_knows_which_tensors_32_bit_offsets_reach():
    small, large = (specialised(bf16(n), target="hip").source.attrs[(0,)] for n in (64, 2**31))
    assert ["tt.pointer_range", 32] in small
    assert ["tt.pointer_range", 32] not in large


def test_only_launches_that_compile_alike_share_a_key():
    key = specialised(bf16(4, 64)).key
    assert specialised(bf16(9, 64), count=9).key == key
    others = [
        specialised(bf16(4, 64), count=16),
        specialised(bf16(4, 64), target="hip"),
        specialised(bf16(4, 64), block=128),
        specialised(bf16(4, 64), num_warps=8),
        specialised(torch.empty(4, 64, device="meta")),
    ]
    assert len({key, *(other.key for other in others)}) == 6


def int32(*shape):
    return torch.empty(shape, dtype=torch.int32, device="meta")


def decode_attention(rows, pages):
    mla_decode(bf16(rows, 16, 576), bf16(64, 64, 576), int32(rows, pages), int32(rows), kv_lora_rank=512, scale=0.1)


def prefill_attention(length):
    starts = torch.tensor([0, length], dtype=torch.int32)
    causal_attention(bf16(length, 16, 192), bf16(length, 16, 192), bf16(length, 16, 128), starts, starts, scale=0.1)


@pytest.mark.parametrize(
    ("kernel", "call", "steps"),
    [
        ("_mla_decode_kernel", decode_attention, [(1, 1), (3, 7), (16, 32), (32, 33)]),
        ("_attend_kernel", prefill_attention, [(100,), (300,), (2048,), (8192,)]),
        ("_linear_kernel", lambda rows: norm_linear(bf16(rows, 64), bf16(64), bf16(48, 64), 1e-6), [(1,), (3,), (16,)]),
    ],
)
def test_what_varies_from_step_to_step_does_not_make_another_kernel(kernel, call, steps):
    """Else a worker would compile while it serves, and a row's bits might depend on its batch."""
    launches = []
    for step in steps:
        with use_backend("triton"), recording("cuda") as launched:
            call(*step)
        launches += [launch for launch in launched if launch.kernel.__name__ == kernel]
    assert len(launches) == len(steps)
    assert len({specialise(launch, "cuda").key for launch in launches}) == 1


def test_an_unknown_family_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"no kernel family 'rms_nrm'.*rms_norm"):
        cases("rms_nrm")


CUOBJDUMP = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function _k:
  REG:38 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PTXAS = """ptxas info    : Function properties for _k
    160 bytes stack frame, 152 bytes spill stores, 200 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
REASON = (
    "due to non wgmma instructions defining accumulator registers of a wgmma "
    "between start and end of the pipeline stage"
)
# As the ptxas of Triton 3.6.0 and of 3.7.1 writes it.
SERIALISED = f"""ptxas info    : (C7515) Potential Performance Loss: \
wgmma.mma_async instructions are serialized {REASON} in the function '_k'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_k' for 'sm_90a'
ptxas info    : Function properties for _k
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
AMDGCN = """
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     16
    .group_segment_fixed_size: 0
    .sgpr_spill_count: 3
    .vgpr_count:     88
    .vgpr_spill_count: 5
"""


def test_resources_of_a_cubin_are_read():
    assert cubin_usage(CUOBJDUMP) == (38, 24, 1024)
    assert ptxas_spilled_bytes(PTXAS) == 200
    with pytest.raises(ValueError, match="cuobjdump"):
        cubin_usage("cuobjdump fatal: no such file")
    with pytest.raises(ValueError, match="ptxas"):
        ptxas_spilled_bytes("")


def test_why_ptxas_serialises_is_read():
    assert ptxas_serialised(SERIALISED) == REASON
    assert ptxas_serialised(PTXAS) == ""
    assert ptxas_serialised("Potential Performance Loss: wgmma.mma_async instructions are serialized") != ""
    assert REASON in cuda_excess(Resources(190, 0, 0, "wgmma", serialised=REASON), num_warps=8)[0]


def test_resources_of_amd_assembly_are_read():
    assert amdgcn_resources(AMDGCN, 4096) == Resources(88, 20, 4096, "mfma", accumulators=16, scalar_spills=3)
    with pytest.raises(ValueError, match="vgpr_spill_count"):
        amdgcn_resources(AMDGCN.replace(".vgpr_spill_count", ".other"), 0)


@pytest.mark.parametrize(
    ("ptx", "units"),
    [
        ("wgmma.mma_async.sync.aligned.m64n64k16", "wgmma"),
        ("mma.sync.aligned.m16n8k16.row.col", "mma.sync"),
        ("wgmma.fence.sync.aligned; fma.rn.f32", ""),
    ],
)
def test_matrix_instructions_are_told_apart(ptx, units):
    assert ptx_matrix_units(ptx) == units


def test_every_limit_of_sm_90_is_checked():
    assert cuda_excess(Resources(255, 0, 227 * 1024, ""), num_warps=8) == []
    assert "spills 8 bytes" in cuda_excess(Resources(255, 8, 0, ""), num_warps=4)[0]
    assert "of 232448" in cuda_excess(Resources(32, 0, 227 * 1024 + 1, ""), num_warps=4)[0]
    # 129 registers are allocated as 136: 16 warps of them are more than 65536.
    assert "use fewer warps than 16" in cuda_excess(Resources(129, 0, 0, ""), num_warps=16)[0]
    assert cuda_excess(Resources(128, 0, 0, ""), num_warps=16) == []


def test_every_limit_of_gfx942_is_checked():
    assert amd_excess(Resources(256, 0, 65536, "", scalar_spills=4), num_warps=8) == []
    assert "spills 4 bytes" in amd_excess(Resources(256, 4, 0, ""), num_warps=8)[0]
    assert "of 65536" in amd_excess(Resources(64, 0, 65537, ""), num_warps=4)[0]
    assert "use fewer warps than 8" in amd_excess(Resources(264, 0, 0, ""), num_warps=8)[0]


def row(kernel="f._k", target="cuda", units="wgmma", spilled=0, key=None, **changes):
    found = Resources(64, spilled, 2048, units)
    fields = {"family": "f", "case": "c", "nth": 0, "tiles": "BLOCK_N=64", "key": key or f"{kernel}{target}"}
    return Row(kernel=kernel, target=target, **{**fields, "resources": found, "needs_matrix_units": True, **changes})


VERSIONS = {"triton": "3.7.1", "torch": "2.13.0"}


def test_all_well_is_reported_as_such():
    rows = [row(), row("f._combine", units=""), row(target="hip", units="mfma"), row("f._combine", "hip", "")]
    result = report(rows, VERSIONS, 12.34)
    wanted = {"kernels": 2, "cuda90_ok": 2, "gfx942_ok": 2, "spills": 0, "uses_matrix_units": True, "failures": []}
    assert wanted.items() <= result.items()


def test_a_spill_fails_with_a_message_that_names_where():
    bad = row("f._combine", target="hip", spilled=8, problems=("spills 8 bytes a thread: use smaller tiles",))
    result = report([row(), row("f._combine"), row(target="hip"), bad, bad], VERSIONS, 1.0)
    assert (result["cuda90_ok"], result["gfx942_ok"], result["spills"]) == (2, 1, 8)
    message = failures([bad])[0]
    assert message.startswith("f, case 'c', hip:gfx942, kernel f._combine: spills 8 bytes")
    assert message.endswith("(BLOCK_N=64)")


def test_a_case_that_lost_its_matrix_units_fails():
    rows = [row(), row(target="hip", units="")]
    assert report(rows, VERSIONS, 1.0)["uses_matrix_units"] is False
    assert failures(rows)[0].startswith("f, case 'c', hip:gfx942: no launch uses matrix instructions")


def test_a_launch_that_does_not_compile_is_one_failure():
    rows = [row(resources=None, problems=("does not compile: CompilationError: no",)), row(target="hip", units="mfma")]
    assert len(failures(rows)) == 1
    assert "does not compile" in table(rows, VERSIONS)


def test_the_table_shows_both_targets_once_for_equal_machine_code():
    rows = [row(case=case, key=key, target=t) for case in ("c", "d") for t, key in (("cuda", "1"), ("hip", "2"))]
    lines = [line for line in table(rows, VERSIONS).splitlines() if "`_k`" in line]
    assert lines == ["| f: c | `_k` | 64 | 2.0 | wgmma | 0 | 64 (0) | 2.0 | wgmma | 0 |"]


def test_the_table_tells_what_is_serialised():
    serialised = row(resources=Resources(64, 0, 2048, "wgmma", serialised="due to calls"))
    assert "| wgmma, serialised |" in table([serialised], VERSIONS)
    assert report([serialised, row("f._combine")], VERSIONS, 1.0)["serialised"] == 1


def test_the_table_shows_another_tritons_figures_where_they_differ():
    rows = [row(), row(target="hip", units="mfma")]
    there = [row(spilled=40), row(target="hip", units="mfma")]
    also = json.loads(json.dumps(report(there, {"triton": "3.6.0"}, 1.0)))
    assert rows_of(also) == there
    lines = table(rows, VERSIONS, also).splitlines()
    assert lines[0].startswith("Compiled with Triton 3.7.1 and, after a slash where it differs, 3.6.0.")
    assert lines[-1] == "| f: c | `_k` | 64 | 2.0 | wgmma | 0 / 40 | 64 (0) | 2.0 | mfma | 0 |"


def test_a_launch_of_one_target_alone_has_a_line_unless_it_was_shown():
    rows = [row("f._k", key="1"), row("g._sort", "hip", key="2"), row("g._sort", "hip", key="2", case="d")]
    lines = table(rows, VERSIONS).splitlines()
    assert lines[-1] == "| f: c | `_sort` | – | – | – | – | 64 (0) | 2.0 | wgmma | 0 |"
    assert len([line for line in lines if "`_sort`" in line]) == 1


def test_a_table_replaces_only_what_is_between_its_markers():
    text = "a\n<!-- t: begin -->\nold\n<!-- t: end -->\nb\n"
    assert put_between(text, "t", "new") == "a\n<!-- t: begin -->\nnew\n<!-- t: end -->\nb\n"
    with pytest.raises(ValueError, match="t: begin"):
        put_between("no markers", "t", "new")


def test_the_interpreter_is_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "headrace_kernels.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stdout


def test_what_fails_with_the_other_triton_fails(monkeypatch, tmp_path):
    bad = row(spilled=4, problems=("spills 4 bytes a thread: use smaller tiles",))
    for there, status in (([row()], 0), ([bad], 1)):
        monkeypatch.setattr(program, "_compile", lambda *_: ([row()], []))
        monkeypatch.setattr(program, "report_under", lambda *_, rows=there: report(rows, {"triton": "3.6.0"}, 1.0))
        monkeypatch.setattr(sys, "argv", ["aot", "--also-triton", "there", "--json", str(tmp_path / "report.json")])
        assert program.main() == status
        written = json.loads((tmp_path / "report.json").read_text())
        assert written["also"]["versions"] == {"triton": "3.6.0"}
        assert [message[:40] for message in written["failures"]] == status * [
            "Triton 3.6.0: f, case 'c', cuda:90, kern"
        ]


def test_the_other_triton_is_another(monkeypatch, capsys):
    monkeypatch.setattr(program, "report_under", lambda *_: report([row()], program.versions(), 1.0))
    monkeypatch.setattr(sys, "argv", ["aot", "--also-triton", "there"])
    assert program.main() == 2
    assert "which is the installed one" in capsys.readouterr().out


def test_the_other_triton_is_found_first_and_must_report(tmp_path):
    with pytest.raises(ValueError, match="no Triton in"):
        report_under(tmp_path, [])
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise SystemExit(7)")
    with pytest.raises(ValueError, match="exit status 7"):
        report_under(tmp_path, [])


def test_the_other_triton_is_the_oldest_that_is_allowed():
    root = Path(__file__).parents[2]
    (allowed,) = re.findall(r'"triton>=([\d.]+)[;"]', (root / "pyproject.toml").read_text())
    (compiled_with,) = re.findall(r"^OLDEST_TRITON := ([\d.]+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert compiled_with.startswith(f"{allowed}.")
