"""Activations as the draft's linears read them: integers, and a scale for each row and group.

`quantize_columns` is called by the kernels that produce a row; `quantize` stands alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from qspec_llm.kernels.cuda.activations import Quantized, group_and_top
from qspec_llm.kernels.triton.launch import next_power, options, start
from qspec_llm.weights.view import View

__all__ = ["codes_of", "quantize", "quantize_columns"]


@triton.jit
def codes_of(grouped, TOP: tl.constexpr, GROUP_AXIS: tl.constexpr):
    """Codes (int32) and scales of values whose last axis, number GROUP_AXIS, is a group."""
    scale = tl.div_rn(tl.max(tl.abs(grouped), GROUP_AXIS, keep_dims=True), TOP * 1.0)
    # a group of zeros has scale 0; its codes are 0 whatever it is divided by
    ratio = tl.div_rn(grouped, tl.maximum(scale, 1.1754943508222875e-38))
    rounded = (ratio + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
    return tl.minimum(tl.maximum(rounded, -TOP * 1.0), TOP * 1.0).to(tl.int32), scale


@triton.jit
def quantize_columns(
    wide, codes, meta, pitch, row, first, num_cols,
    GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantise columns first .. first + BLOCK of one row: wide [BLOCK] float32, 0 past the end.

    The layout of codes and meta is `kernels.cuda.quantized.Quantized`'s.
    """
    code, scale = codes_of(tl.reshape(wide, (BLOCK // GROUP, GROUP)), TOP, 1)
    halves = tl.permute(tl.reshape(code, (BLOCK // 16, 2, 8)), (0, 2, 1))
    col = first + tl.arange(0, BLOCK)
    at = codes + row * num_cols + col
    tl.store(at, tl.reshape(halves, (BLOCK,)).to(tl.int8), col < num_cols)
    group = first // GROUP + tl.arange(0, BLOCK // GROUP)
    is_in = group < num_cols // GROUP
    at = meta + (group * pitch + row) * 2
    bits = tl.reshape(scale, (BLOCK // GROUP,)).to(tl.int32, bitcast=True)
    tl.store(at, bits, is_in)
    tl.store(at + 1, tl.sum(code, 1), is_in)


@triton.jit
def _quantize_kernel(
    x, codes, meta, pitch, num_cols, stride,
    GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    start(OVERLAP)
    wide = tl.load(x + row * stride + col, col < num_cols, other=0).to(tl.float32)
    quantize_columns(wide, codes, meta, pitch, row, 0, num_cols, GROUP, TOP, BLOCK)


def quantize(x: Tensor, view: View) -> Quantized:
    """Quantise rows x [R, K]."""
    num_rows, num_cols = x.shape
    out = Quantized.empty(num_rows, num_cols, view, x.device)
    group, top = group_and_top(num_cols, view)
    block = next_power(num_cols, 64)
    _quantize_kernel[(num_rows,)](
        x, out.codes, out.meta, out.meta.shape[1], num_cols, x.stride(0),
        GROUP=group, TOP=top, BLOCK=block, **options(min(16, max(1, block // 256))),
    )  # fmt: skip
    return out
