"""What a compiled kernel takes of the GPU, read from its machine code, and what the GPU has.

Pure: text in, numbers out. Per thread means a lane on AMD, where a wave has 64 of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MatrixUnits = Literal["wgmma", "mma.sync", "mfma", ""]

_CUDA_SHARED_BYTES = 227 * 1024
_CUDA_REGISTERS_PER_THREAD = 255
_CUDA_REGISTERS_PER_SM = 65536
_CUDA_REGISTER_GRANULE = 8
_AMD_LDS_BYTES = 64 * 1024
_AMD_REGISTERS_PER_LANE = 512
_AMD_SIMDS = 4


@dataclass(frozen=True, slots=True)
class Resources:
    """What one launch takes: `shared_bytes` per program; registers and spilled bytes per thread.

    `serialised` says, in the words of ptxas, why it does not let the launch's wgmma overlap; empty if it does.
    On AMD `registers` counts vector registers of both kinds, `accumulators` those among them that only matrix
    instructions use, and `scalar_spills` scalar registers that live in lanes of vector registers: these cost moves
    but no memory, so they are told and not refused.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_units: MatrixUnits
    serialised: str = ""
    accumulators: int = 0
    scalar_spills: int = 0


def cubin_usage(res_usage: str) -> tuple[int, int, int]:
    """Read (registers, stack bytes, static shared bytes) of the one function in `cuobjdump -res-usage`'s output."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", res_usage)
    if found is None:
        raise ValueError(f"no line with REG, STACK and SHARED in cuobjdump's output: {res_usage!r}")
    registers, stack, shared = map(int, found.groups())
    return registers, stack, shared


def ptxas_spilled_bytes(log: str) -> int:
    """Read how many bytes a thread spills from `ptxas -v`'s output, summed over the functions in it."""
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not found:
        raise ValueError(f"no line about spills in ptxas's output: {log!r}")
    return sum(max(int(stores), int(loads)) for stores, loads in found)


def ptxas_serialised(log: str) -> str:
    """Read from `ptxas -v`'s output why wgmma instructions wait for one another, in its words; empty if they do not."""
    found = re.search(
        r"wgmma\.mma_async instructions are serialized *(.*?)(?: in the function '.*')?$", log, re.MULTILINE
    )
    if found is None:
        return ""
    return found.group(1) or "for a reason that ptxas does not give"


def ptx_matrix_units(ptx: str) -> MatrixUnits:
    """Say which matrix instructions PTX has: wgmma, a warp group's, if it has any; else mma.sync, a warp's; or none."""
    if "wgmma.mma_async" in ptx:
        return "wgmma"
    return "mma.sync" if re.search(r"\bmma\.sync\b", ptx) else ""


def amdgcn_resources(amdgcn: str, shared_bytes: int) -> Resources:
    """Read everything from AMD's assembly text; `shared_bytes` is what the compiler says a launch asks for."""
    spilled_vectors = _amd_field(amdgcn, "vgpr_spill_count")
    return Resources(
        registers=_amd_field(amdgcn, "vgpr_count"),
        spilled_bytes=4 * spilled_vectors,
        shared_bytes=max(shared_bytes, _amd_field(amdgcn, "group_segment_fixed_size")),
        matrix_units="mfma" if "v_mfma" in amdgcn else "",
        accumulators=_amd_field(amdgcn, "agpr_count"),
        scalar_spills=_amd_field(amdgcn, "sgpr_spill_count"),
    )


def _amd_field(amdgcn: str, name: str) -> int:
    found = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)\s*$", amdgcn, re.MULTILINE)
    if found is None:
        raise ValueError(f"no .{name} in the assembly's metadata")
    return int(found.group(1))


def cuda_excess(resources: Resources, num_warps: int) -> list[str]:
    """Return what is wrong on sm_90 with a launch of `num_warps` warps of 32 threads, in words."""
    problems = _spills(resources)
    if resources.serialised:
        problems.append(
            f"wgmma instructions are serialised {resources.serialised}: let one loop alone sum into an accumulator, "
            "with tiles that leave registers free"
        )
    if resources.shared_bytes > _CUDA_SHARED_BYTES:
        problems.append(_too_much_shared(resources.shared_bytes, _CUDA_SHARED_BYTES))
    if resources.registers > _CUDA_REGISTERS_PER_THREAD:
        problems.append(f"{resources.registers} registers a thread of {_CUDA_REGISTERS_PER_THREAD}: use smaller tiles")
    granules = -(-resources.registers // _CUDA_REGISTER_GRANULE)
    of_program = granules * _CUDA_REGISTER_GRANULE * 32 * num_warps
    if of_program > _CUDA_REGISTERS_PER_SM:
        problems.append(
            f"{of_program} registers a program of {_CUDA_REGISTERS_PER_SM}: use fewer warps than {num_warps}"
        )
    return problems


def amd_excess(resources: Resources, num_warps: int) -> list[str]:
    """Return what is wrong on gfx942 with a launch of `num_warps` waves of 64 lanes, in words."""
    problems = _spills(resources)
    if resources.shared_bytes > _AMD_LDS_BYTES:
        problems.append(_too_much_shared(resources.shared_bytes, _AMD_LDS_BYTES))
    waves_per_simd = -(-num_warps // _AMD_SIMDS)
    if resources.registers * waves_per_simd > _AMD_REGISTERS_PER_LANE:
        problems.append(
            f"{resources.registers} vector registers a lane x {waves_per_simd} waves a SIMD, of "
            f"{_AMD_REGISTERS_PER_LANE}: use fewer warps than {num_warps}"
        )
    return problems


def _spills(resources: Resources) -> list[str]:
    if resources.spilled_bytes == 0:
        return []
    return [f"spills {resources.spilled_bytes} bytes a thread: use smaller tiles, more warps or fewer stages"]


def _too_much_shared(used: int, limit: int) -> str:
    return f"{used} bytes of shared memory of {limit}: use smaller tiles or fewer stages"
