"""silu(gate) * up, with the quantisation of its result after it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qspec_llm.kernels.cuda.activations import Quantized, group_and_top
from qspec_llm.kernels.triton.launch import next_power, options, start
from qspec_llm.kernels.triton.quantize import quantize_columns
from qspec_llm.weights.view import View

__all__ = ["silu_mul"]

BLOCK_COLS = 1024  # columns of one program


@triton.jit
def _silu_mul_kernel(
    gate_up, out, codes, meta, pitch, num_cols,
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
            rounded.to(tl.float32), codes, meta, pitch, row, first, num_cols, GROUP, TOP, BLOCK
        )  # fmt: skip
    else:
        tl.store(out + row * num_cols + col, rounded, is_in)


def silu_mul(gate_up: Tensor, view: View | None = None) -> Tensor | Quantized:
    """silu(gate) * up for gate_up [R, 2 I]: [R, I], quantised where `view` says how."""
    num_rows, num_cols = gate_up.shape[0], gate_up.shape[1] // 2
    block = min(BLOCK_COLS, next_power(num_cols, 64))
    group, top = group_and_top(num_cols, view)
    out: Tensor | Quantized
    if view is None:
        out = torch.empty((num_rows, num_cols), dtype=gate_up.dtype, device=gate_up.device)
        targets = (out, out, out, 0)
    else:
        out = Quantized.empty(num_rows, num_cols, view, gate_up.device)
        targets = (gate_up, out.codes, out.meta, out.meta.shape[1])
    _silu_mul_kernel[(-(-num_cols // block), num_rows)](
        gate_up, *targets, num_cols, GROUP=group, TOP=top, BLOCK=block, **options(4)
    )
    return out
