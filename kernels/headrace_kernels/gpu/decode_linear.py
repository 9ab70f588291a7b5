"""`headrace_kernels.decode_linear` in Triton: weights are the rows of the product and tokens its columns.

So few tokens waste little of a matrix instruction. The fewer outputs a layer has, the fewer a program takes, so that
every multiprocessor reads; with fewer than 64 the matrix instruction is mma instead of wgmma, still faster than memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.block_fp8 import Block
from headrace_kernels.gpu import configs
from headrace_kernels.gpu.configs import Config
from headrace_kernels.gpu.dependent_launch import dependent_launch, prefetch_rows, wait_for_earlier
from headrace_kernels.gpu.launch import launch, num_sms, operand_dtype, target
from headrace_kernels.gpu.rms_norm import inverse_root
from headrace_kernels.reference import decode_linear as reference

# From here on a plain linear layer is bound by its products, and a launch for its norm is little beside it.
MAX_ROWS = 256
# What a program may take to load ahead, of the 227 KiB of a multiprocessor.
_SHARED_BYTES = 144 * 1024


def norm_linear(x: Tensor, norm_weight: Tensor | None, weight: Tensor, eps: float, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.decode_linear.norm_linear`."""
    if len(x) > MAX_ROWS:
        return reference.norm_linear(x, norm_weight, weight, eps, bias)
    return run(x, weight, bias, norm_weight, None, eps, is_normalised=True)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.decode_linear.linear_add`."""
    if len(x) > MAX_ROWS:
        return reference.linear_add(x, weight, residual, bias)
    return run(x, weight, bias, None, residual, 0.0, is_normalised=False)


def key(num_rows: int, weight: Tensor) -> str:
    """Return the name of a layer's configurations: its shape, and the power of two of tokens."""
    out_features, in_features = weight.shape
    return f"{out_features}x{in_features} {weight.dtype} tokens {_bucket(num_rows)}"


def default_config(num_rows: int, weight: Tensor) -> Config:
    """Return the tiles with which the busiest multiprocessor reads least; of equals, those with most outputs."""
    if weight.dtype == torch.float32:
        tokens = min(_bucket(num_rows), 32)
        return {"BLOCK_O": 32, "BLOCK_T": tokens, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2}
    tiles = [(outputs, tokens) for outputs in (128, 64, 32, 16) for tokens in (16, 32, 64, 128)]
    outputs, tokens = min(tiles, key=lambda tile: _most_read(num_rows, weight, *tile))
    inputs = 256 if outputs + tokens <= 64 else 128 if outputs + tokens <= 128 else 64
    num_stages = min(_SHARED_BYTES // (2 * inputs * (outputs + tokens)), 6)
    if target() == "hip":
        inputs, num_stages = min(inputs, 128), 2
    num_warps = 4 if outputs + tokens <= 128 else 8
    return {
        "BLOCK_O": outputs,
        "BLOCK_T": tokens,
        "BLOCK_I": inputs,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _bucket(num_rows: int) -> int:
    return 1 << max((num_rows - 1).bit_length(), 4)


def _most_read(num_rows: int, weight: Tensor, outputs: int, tokens: int) -> int:
    """Return how many rows, of weights and of tokens, the busiest multiprocessor reads."""
    rows = _bucket(num_rows)
    num_programs = -(-len(weight) // outputs) * -(-rows // tokens)
    return -(-num_programs // num_sms(weight)) * (outputs + min(rows, tokens))


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    *,
    is_normalised: bool,
    scales: Tensor | None = None,
    block: Block = (1, 1),
) -> Tensor:
    """Return `norm(x) @ weight.T + bias + residual`, [T, O], dtype of `x`.

    With `scales` the weight is float8_e4m3fn, in such blocks; activations are multiplied as they are. The columns of a
    block must be a multiple of 16, or all columns.
    """
    num_rows, in_features = x.shape
    out_features = len(weight)
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    config = dict(configs.config("decode_linear", key(num_rows, weight), default_config(num_rows, weight), x))
    if scales is not None and block[1] < in_features:
        # What is multiplied at once has one scale for each output.
        config["BLOCK_I"] = math.gcd(config["BLOCK_I"], block[1])
    launch(
        _linear_kernel,
        (triton.cdiv(out_features, config["BLOCK_O"]), triton.cdiv(num_rows, config["BLOCK_T"])),
        *(x, x.stride(0), norm_weight, weight, weight.stride(0), scales, bias),
        *(residual, 0 if residual is None else residual.stride(0), out),
        *(num_rows, in_features, out_features, eps),
        IS_NORMALISED=is_normalised,
        HAS_NORM_WEIGHT=norm_weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        IS_SCALED=scales is not None,
        BLOCK_ROWS=block[0],
        BLOCK_COLUMNS=block[1],
        OPERAND=operand_dtype(x),
        **dependent_launch(x),
        **config,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,
    x_stride,
    norm_weight_ptr,
    weight_ptr,
    weight_stride,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    residual_stride,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    eps,
    IS_NORMALISED: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    if IS_DEPENDENT:
        # 64 KiB a program: together what memory delivers in about two microseconds.
        last = tl.minimum(o, out_features - 1).to(tl.int64)
        prefetch_rows(weight_ptr + last * weight_stride, in_features, max(512 // BLOCK_O, 1))
        wait_for_earlier()
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.arange(0, BLOCK_I)
    is_output, is_token = o < out_features, t < num_rows
    weight_ptrs = weight_ptr + o.to(tl.int64)[:, None] * weight_stride + i[None, :]
    x_ptrs = x_ptr + t.to(tl.int64)[None, :] * x_stride + i[:, None]
    sums = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_I, BLOCK_T], tl.float32)
    for start in range(0, in_features, BLOCK_I):
        is_input = start + i < in_features
        weight = tl.load(weight_ptrs + start, mask=is_output[:, None] & is_input[None, :], other=0.0).to(OPERAND)
        x = tl.load(x_ptrs + start, mask=is_input[:, None] & is_token[None, :], other=0.0).to(OPERAND)
        if IS_NORMALISED:
            wide = x.to(tl.float32)
            squares += wide * wide
            if HAS_NORM_WEIGHT:
                norm_weight = tl.load(norm_weight_ptr + start + i, mask=is_input, other=0.0).to(tl.float32)
                x = (wide * norm_weight[:, None]).to(OPERAND)
        if IS_SCALED:
            scale_row = o // BLOCK_ROWS * tl.cdiv(in_features, BLOCK_COLUMNS)
            scale = tl.load(scale_ptr + scale_row + start // BLOCK_COLUMNS, mask=is_output, other=0.0)
            sums += tl.dot(weight, x, input_precision="ieee") * scale[:, None]
        else:
            sums = tl.dot(weight, x, sums, input_precision="ieee")
    if IS_NORMALISED:
        sums *= inverse_root(tl.sum(squares, axis=0) / in_features, eps)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + o, mask=is_output, other=0.0).to(tl.float32)[:, None]
    is_inside = is_output[:, None] & is_token[None, :]
    rows = t.to(tl.int64)[None, :]
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + rows * residual_stride + o[:, None]
        sums += tl.load(residual_ptrs, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * out_features + o[:, None], sums.to(out_ptr.dtype.element_ty), mask=is_inside)
