"""Operations on single rows: the residual add with RMSNorm, and SwiGLU, with quantised results.

rows.cu for bf16 rows in whole vectors; other dtypes and widths go through Triton, which is imported
where it is needed: these kernels do without it.
"""

import torch
from torch import Tensor

from qspec_llm.kernels.cuda.activations import Quantized, group_and_top
from qspec_llm.kernels.cuda.compile import kernel
from qspec_llm.kernels.cuda.device import can_overlap
from qspec_llm.weights.view import View

__all__ = ["add_rms_norm", "rms_norm", "silu_mul", "targets"]

MOST_THREADS = 1024
SILU_THREADS = 128


def _fits(x: Tensor, num_cols: int) -> bool:
    """Whether rows.cu reads rows of x: 16-byte vectors of bf16."""
    is_aligned = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x.is_cuda and x.dtype is torch.bfloat16 and num_cols % 16 == 0 and is_aligned


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of [R, K] or [R, heads, K]."""
    if not _fits(x, x.shape[-1]):
        from qspec_llm.kernels.triton import norms

        return norms.rms_norm(x, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm(x, None, None, weight, eps, out)
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
    if not _fits(x, x.shape[1]):
        from qspec_llm.kernels.triton import norms

        return norms.add_rms_norm(x, delta, weight, eps, view)
    total = x if delta is None else torch.empty_like(x)
    out: Tensor | Quantized = torch.empty_like(x) if view is None else _room(x, view)
    _norm(x, delta, total, weight, eps, out)
    return total, out


def _room(x: Tensor, view: View) -> Quantized:
    return Quantized.empty(x.shape[0], x.shape[1], view, x.device)


def _norm(
    x: Tensor,
    delta: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor | Quantized,
) -> None:
    num_cols = x.shape[-1]
    num_rows = x.numel() // num_cols
    vectors = num_cols // 8
    rounds = -(-vectors // MOST_THREADS)
    threads = -(-vectors // rounds // 32) * 32
    function = kernel(
        "rows.cu",
        "add_rms_norm",
        WIDTH=num_cols,
        THREADS=threads,
        HAS_DELTA=int(delta is not None),
        WEIGHT_FLOAT=int(weight.dtype is torch.float32),
        **_form(out, num_cols),
    )
    heads = num_rows // x.shape[0]
    args = [x, delta, total, weight, *targets(out), x.stride(0), heads, eps]
    function.launch((num_rows,), threads, args, pdl=can_overlap())


def silu_mul(gate_up: Tensor, view: View | None = None) -> Tensor | Quantized:
    """silu(gate) * up for gate_up [R, 2 I]: [R, I], quantised where `view` says how."""
    num_rows, num_cols = gate_up.shape[0], gate_up.shape[1] // 2
    if not _fits(gate_up, num_cols):
        from qspec_llm.kernels.triton import swiglu

        return swiglu.silu_mul(gate_up, view)
    out: Tensor | Quantized
    if view is None:
        out = torch.empty((num_rows, num_cols), dtype=gate_up.dtype, device=gate_up.device)
    else:
        out = Quantized.empty(num_rows, num_cols, view, gate_up.device)
    function = kernel(
        "rows.cu",
        "silu_mul",
        WIDTH=num_cols,
        THREADS=SILU_THREADS,
        HAS_DELTA=0,
        WEIGHT_FLOAT=0,
        **_form(out, num_cols),
    )
    grid = (-(-num_cols // 8 // SILU_THREADS), num_rows)
    function.launch(grid, SILU_THREADS, [gate_up, *targets(out)], pdl=can_overlap())
    return out


def _form(out: Tensor | Quantized, num_cols: int) -> dict[str, int]:
    """Macros that say how the result is quantised."""
    view = out.view if isinstance(out, Quantized) else None
    group, top = group_and_top(num_cols, view)
    return {"QUANT_GROUP": group, "TOP": top}


def targets(out: Tensor | Quantized) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """The kernels' arguments out, codes, meta, pitch."""
    if isinstance(out, Quantized):
        return None, out.codes, out.meta, out.meta.shape[1]
    return out, None, None, 0
