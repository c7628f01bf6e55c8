"""RMSNorm, with the residual add before it and the quantisation of its result after it.

One program a row. Sums run over the row padded to a power of two, so their order depends on the
width alone. The residual sum is rounded before it is normalised, and the normalised row before it
is quantised, where the operations one by one round them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qspec_llm.kernels.cuda.activations import Quantized, group_and_top
from qspec_llm.kernels.triton.launch import next_power, options, start
from qspec_llm.kernels.triton.quantize import quantize_columns
from qspec_llm.weights.view import View

__all__ = ["add_rms_norm", "rms_norm"]


@triton.jit
def _rms_norm_kernel(
    x, delta, total, weight, out, codes, meta, pitch, num_cols, stride, num_heads, eps,
    HAS_DELTA: tl.constexpr, GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    is_in = col < num_cols
    scale = tl.load(weight + col, is_in, other=0).to(tl.float32)
    start(OVERLAP)
    source = x + row // num_heads * stride + row % num_heads * num_cols
    wide = tl.load(source + col, is_in, other=0).to(tl.float32)
    if HAS_DELTA:
        wide += tl.load(delta + row * num_cols + col, is_in, other=0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + row * num_cols + col, rounded, is_in)
        wide = rounded.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / num_cols
    normed = wide * (1 / tl.sqrt_rn(mean + eps)) * scale
    if GROUP:
        rounded = normed.to(x.dtype.element_ty).to(tl.float32)
        quantize_columns(rounded, codes, meta, pitch, row, 0, num_cols, GROUP, TOP, BLOCK)
    else:
        tl.store(out + row * num_cols + col, normed.to(out.dtype.element_ty), is_in)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [R, K] or [R, heads, K], rows any distance apart.
        weight: [K].
        eps: added to the mean square.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, x, weight, eps, out, None)
    return out


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, view: View | None
) -> tuple[Tensor, Tensor | Quantized]:
    """The residual stream after `delta` is added, and its norm, quantised where it is asked for.

    Args:
        x: [R, K], left as it is.
        delta: [R, K] to add, or None.
        weight: [K].
        eps: added to the mean square.
        view: how to quantise the norm; None leaves it in x's dtype.
    """
    total = x if delta is None else torch.empty_like(x)
    if view is not None:
        quantized = Quantized.empty(x.shape[0], x.shape[1], view, x.device)
        _launch(x, delta, total, weight, eps, None, quantized)
        return total, quantized
    out = torch.empty_like(x)
    _launch(x, delta, total, weight, eps, out, None)
    return total, out


def _launch(
    x: Tensor,
    delta: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantized: Quantized | None,
) -> None:
    num_cols, num_rows = x.shape[-1], x.numel() // x.shape[-1]
    block = next_power(num_cols, 64)
    group, top = group_and_top(num_cols, quantized.view if quantized is not None else None)
    _rms_norm_kernel[(num_rows,)](
        x, x if delta is None else delta, total, weight, x if out is None else out,
        x if quantized is None else quantized.codes,
        x if quantized is None else quantized.meta,
        0 if quantized is None else quantized.meta.shape[1],
        num_cols, x.stride(0), num_rows // x.shape[0], eps,
        HAS_DELTA=delta is not None,
        GROUP=group,
        TOP=top,
        BLOCK=block,
        **options(min(16, max(1, block // 256))),
    )  # fmt: skip
