"""silu(gate) * up, with the quantisation of its result after it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qspec_llm.kernels.triton.launch import next_power, options, start
from qspec_llm.kernels.triton.quantize import Quantized, allocate, quantize_columns

__all__ = ["silu_mul"]

BLOCK_COLS = 1024  # columns of one program


@triton.jit
def _silu_mul_kernel(
    gate_up, out, codes, scales, sums, num_rows, num_cols,
    GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    col = first + tl.arange(0, BLOCK)
    is_in = col < num_cols
    start(OVERLAP)
    gate = tl.load(gate_up + row * 2 * num_cols + col, is_in, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * num_cols + num_cols + col, is_in, other=0).to(tl.float32)
    product = tl.div_rn(gate, 1 + tl.exp(-gate)) * up
    rounded = product.to(gate_up.dtype.element_ty)
    if GROUP:
        quantize_columns(
            rounded.to(tl.float32), codes, scales, sums, row, first, num_rows, num_cols,
            GROUP, TOP, BLOCK,
        )  # fmt: skip
    else:
        tl.store(out + row * num_cols + col, rounded, is_in)


def silu_mul(gate_up: Tensor, top: int = 0) -> Tensor | Quantized:
    """silu(gate) * up for gate_up [R, 2 I]: [R, I], quantised where `top` (127 or 7) is not 0."""
    num_rows, num_cols = gate_up.shape[0], gate_up.shape[1] // 2
    quantized = allocate(num_rows, num_cols, top, gate_up.device) if top else None
    shape = (num_rows, num_cols)
    out = gate_up if top else torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    block = min(BLOCK_COLS, next_power(num_cols, 64))
    _silu_mul_kernel[(-(-num_cols // block), num_rows)](
        gate_up, out, *((out, out, out) if quantized is None else quantized.tensors()),
        num_rows, num_cols,
        GROUP=0 if quantized is None else quantized.group,
        TOP=top, BLOCK=block, **options(4),
    )  # fmt: skip
    return out if quantized is None else quantized
