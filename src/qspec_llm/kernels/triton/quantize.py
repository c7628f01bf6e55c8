"""Activations as the draft's linears read them: integers, and a scale for each row and group.

`quantize_columns` is called by the kernels that produce a row; `quantize` stands alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qspec_llm.kernels.triton.launch import next_power, options, start

__all__ = ["Quantized", "allocate", "quantize", "quantize_columns"]


@dataclass(frozen=True)
class Quantized:
    """R rows of K activations, each group of `group` columns about codes * scale.

    Attributes:
        codes: [R, K] int8, at most `top` in magnitude.
        scales: [R, K / group] float32.
        sums: [R, K / group] int32, of the codes.
        top: 127 (a8) or 7 (a4).
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor
    top: int

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """codes, scales, sums."""
        return self.codes, self.scales, self.sums


def allocate(num_rows: int, num_cols: int, top: int, device: torch.device) -> Quantized:
    """Room for quantised rows: groups of 64 (a8) or 32 columns, as `reference` has them."""
    group = 64 if top == 127 and num_cols % 64 == 0 else 32
    shape = (num_rows, num_cols // group)
    return Quantized(
        codes=torch.empty((num_rows, num_cols), dtype=torch.int8, device=device),
        scales=torch.empty(shape, dtype=torch.float32, device=device),
        sums=torch.empty(shape, dtype=torch.int32, device=device),
        top=top,
    )


@triton.jit
def quantize_columns(
    wide, codes, scales, sums, row, first, num_rows, num_cols,
    GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantise columns first .. first + BLOCK of one row: wide [BLOCK] float32, 0 past the end."""
    grouped = tl.reshape(wide, (BLOCK // GROUP, GROUP))
    scale = tl.div_rn(tl.max(tl.abs(grouped), 1), TOP * 1.0)
    # a group of zeros has scale 0; its codes are 0 whatever it is divided by
    ratio = tl.div_rn(grouped, tl.maximum(scale, 1.1754943508222875e-38)[:, None])
    rounded = (ratio + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
    rounded = tl.minimum(tl.maximum(rounded, -TOP * 1.0), TOP * 1.0).to(tl.int32)
    group = first // GROUP + tl.arange(0, BLOCK // GROUP)
    col = first + tl.arange(0, BLOCK)
    at = row * (num_cols // GROUP) + group
    tl.store(codes + row * num_cols + col, tl.reshape(rounded, (BLOCK,)).to(tl.int8), col < num_cols)
    tl.store(scales + at, scale, group < num_cols // GROUP)
    tl.store(sums + at, tl.sum(rounded, 1), group < num_cols // GROUP)


@triton.jit
def _quantize_kernel(
    x, codes, scales, sums, num_rows, num_cols, stride,
    GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    start(OVERLAP)
    wide = tl.load(x + row * stride + col, col < num_cols, other=0).to(tl.float32)
    quantize_columns(wide, codes, scales, sums, row, 0, num_rows, num_cols, GROUP, TOP, BLOCK)


def quantize(x: Tensor, top: int) -> Quantized:
    """Quantise rows x [R, K]."""
    out = allocate(x.shape[0], x.shape[1], top, x.device)
    block = next_power(x.shape[1], 32)
    _quantize_kernel[(x.shape[0],)](
        x, *out.tensors(), x.shape[0], x.shape[1], x.stride(0),
        GROUP=out.group, TOP=top, BLOCK=block, **options(min(16, max(1, block // 256))),
    )  # fmt: skip
    return out
