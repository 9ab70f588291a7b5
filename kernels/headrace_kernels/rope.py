"""Rotary position embedding of query and key heads.

Shapes: T tokens, H heads, R rope width. Pair i of a head turns by the angle whose cosine and sine stand in column i
of the tables. On input the pairs are (x[2i], x[2i+1]) when `is_interleaved`, else (x[i], x[i + R/2]); on output
always (y[i], y[i + R/2]): first halves, then second halves (de-interleaved).
Bytes moved: 2 * T * H * R * itemsize, so the kernel is bound by memory bandwidth.

`rope` is the entry; `rope_ref` is the specification it is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """Return the heads of `x` rotated.

    Args:
        x: [T, H, R], any float dtype and strides.
        cos: [T, R/2] float32, already gathered for the tokens' positions.
        sin: [T, R/2] float32.
        is_interleaved: how pairs lie in `x`.

    Returns:
        [T, H, R], dtype of `x`, contiguous, de-interleaved. The rotation is computed in float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    if cos.shape != sin.shape or cos.shape != (x.shape[0], x.shape[2] // 2) or x.shape[2] % 2:
        raise ValueError(
            f"x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} "
            "do not fit [T, H, R], [T, R/2], [T, R/2]"
        )
    return select("rope", x).rope(x, cos, sin, is_interleaved=is_interleaved)


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """Specification of `rope` in plain torch.

    Source: huggingface/transformers models/deepseek_v3/modeling_deepseek_v3.py, apply_rotary_pos_emb_interleave.
    """
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if is_interleaved else (x[..., :half], x[..., half:])
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
