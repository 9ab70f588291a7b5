"""The fp8 row of the latent cache: what a token's bytes mean.

Shapes: D latent width (a multiple of 4), R rope width (even). A row is, in this order and little-endian:
    D              float8_e4m3fn   the normalised latent, each 128 columns divided by their scale
    ceil(D / 128)  float32         the scales: max|x| of their columns / 448; of zeros a tiny one, so never 0
    R              bfloat16        the rotated rope columns, not quantised
For D = 512 and R = 64 that is 656 bytes, against 1152 in bfloat16. A cache of such rows is uint8 [.., row_bytes]. Where
128 does not divide D, the last scale is that of the columns that are left.

The latent is quantised as activations are (`act_quant`): nothing exceeds 448, and columns that are not finite
throughout get a scale that is not, so that all of them come back as NaN. Rope columns of which one is not finite, or
is beyond bfloat16, are NaN throughout: an infinite key may have a score of -inf, which is a weight of 0.
`pack_latents` and `unpack_latents` are the specification of every kernel that writes or reads such a cache.
Source: deepseek-ai/FlashMLA README.md, the fp8 KV cache format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.act_quant import act_quant_ref
from headrace_kernels.fp8_groups import FP8, GROUP, num_groups


def row_bytes(kv_lora_rank: int, rope_dim: int) -> int:
    """Return the bytes of one token's row: 656 for a latent of 512 and 64 rope columns.

    Raises:
        ValueError: `kv_lora_rank` is not a positive multiple of 4, or `rope_dim` is negative or odd: scales and rope
            columns would not be aligned.
    """
    if kv_lora_rank <= 0 or kv_lora_rank % 4 or rope_dim < 0 or rope_dim % 2:
        raise ValueError(
            "an fp8 row needs a latent width that is a multiple of 4 and an even rope width, "
            f"not {kv_lora_rank} and {rope_dim}"
        )
    return sum(part_bytes(kv_lora_rank, rope_dim))


def part_bytes(kv_lora_rank: int, rope_dim: int) -> list[int]:
    """Return the bytes of a row's latent, scales and rope columns."""
    return [kv_lora_rank, num_groups(kv_lora_rank) * 4, rope_dim * 2]


def pack_latents(rows: Tensor, kv_lora_rank: int, rope_dim: int) -> Tensor:
    """Return the fp8 rows of `rows`.

    Args:
        rows: [.., D + R], any float dtype: normalised latent, then rotated rope columns.
        kv_lora_rank: D.
        rope_dim: R.

    Returns:
        [.., row_bytes(D, R)] uint8, contiguous.

    Raises:
        ValueError: the widths do not fit each other or the format.
    """
    row_bytes(kv_lora_rank, rope_dim)
    if rows.shape[-1] != kv_lora_rank + rope_dim:
        raise ValueError(f"rows {tuple(rows.shape)} do not fit a width of {kv_lora_rank} + {rope_dim}")
    latents, pe = rows.split([kv_lora_rank, rope_dim], dim=-1)
    values, scales = act_quant_ref(latents.reshape(-1, kv_lora_rank))
    values, scales = values.view(latents.shape), scales.view(*rows.shape[:-1], num_groups(kv_lora_rank))
    pe = pe.to(torch.bfloat16)
    parts = (values, scales, pe.masked_fill(~pe.isfinite().all(dim=-1, keepdim=True), float("nan")))
    # Copied, because the strides of an empty tensor may be ones that no other dtype can be viewed with.
    return torch.cat([part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in parts], dim=-1)


def unpack_latents(packed: Tensor, kv_lora_rank: int, rope_dim: int) -> Tensor:
    """Return what the fp8 rows `packed` stand for.

    Args:
        packed: [.., row_bytes(D, R)] uint8.
        kv_lora_rank: D.
        rope_dim: R.

    Returns:
        [.., D + R] float32: latent, then rope columns.

    Raises:
        ValueError: the dtype or the widths do not fit.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != row_bytes(kv_lora_rank, rope_dim):
        raise ValueError(
            f"{packed.dtype} {tuple(packed.shape)} is no fp8 cache of rows of {row_bytes(kv_lora_rank, rope_dim)} bytes"
        )
    values, scales, pe = (part.contiguous() for part in packed.split(part_bytes(kv_lora_rank, rope_dim), dim=-1))
    scales = scales.view(torch.float32).repeat_interleave(GROUP, dim=-1)[..., :kv_lora_rank]
    return torch.cat((values.view(FP8).float() * scales, pe.view(torch.bfloat16).float()), dim=-1)
