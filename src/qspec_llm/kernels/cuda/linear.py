"""Linears of the cuda backend: x times packed weights.

Two classes of kernels, each row independent in itself (kernels/__init__.py): generated rows go
through direct.cu or, where there are several, on Hopper, through split.cu and wide.cu, which sum in
the same order; prompt rows multiply with decoded weights (prompt.py). Activations are bf16 or a
draft's integers; sums are float32.
"""

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import Rows
from qspec_llm.kernels.cuda import direct, split, wide
from qspec_llm.kernels.cuda.activations import (
    Quantized,
    check_rows,
    quantize,
)
from qspec_llm.kernels.cuda.form import Product, form_of_weight
from qspec_llm.kernels.cuda.layout import PackedDense, PackedMatrix, PackedPlain, PackedPlanes
from qspec_llm.kernels.cuda.prompt import plain, prompt
from qspec_llm.weights.view import Activation, View

__all__ = ["Tuning", "buffers", "can_run", "linear", "wants_integers"]

Tuning = direct.Tuning | split.Tuning | wide.Tuning

OUT_TYPES = (torch.bfloat16, torch.float32)


def buffers(packed: PackedMatrix) -> list[Tensor]:
    """The tensors that hold its bytes."""
    return packed.tensors()


def can_run(x: Tensor) -> bool:
    """Whether `linear` computes activations of this type."""
    return x.dtype is torch.bfloat16


def wants_integers(packed: PackedMatrix, view: View) -> bool:
    """Whether `linear` multiplies quantised activations: a draft's, with nested weights."""
    is_nested = isinstance(packed, PackedPlanes)
    return is_nested and view.is_draft and view.activation is not Activation.A16


def linear(
    x: Tensor | Quantized,
    weight: PackedMatrix,
    bias: Tensor | None,
    view: View,
    rows: Rows,
    out_dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
    chosen: Tuning | None = None,
) -> Tensor:
    """x [R, K] times the view's weights [N, K] transposed, plus bias [N]: [R, N].

    Args:
        x: bf16, or what `quantize` or a fused kernel made of it where `wants_integers`.
        weight: [N, K].
        bias: bf16 or float32.
        view: which precision to read.
        rows: prompt rows use the prompt class; nothing else is looked at.
        out_dtype: bf16 (the default) or float32.
        out: where to write, contiguous [R, N] of `out_dtype`.
        pdl: programmatic dependent launch (compile.Kernel.launch).
        chosen: an instance of direct.cu, split.cu or wide.cu, instead of the measured best.

    Raises:
        QSpecError: x, bias or out have a type, shape or place that no kernel reads.
    """
    num_rows, num_cols = weight.shape
    if x.shape[1] != num_cols:
        raise QSpecError(
            f"x has shape {tuple(x.shape)}; a linear of {num_cols} columns needs rows of that "
            "length"
        )
    out = _room(out, x.shape[0], num_rows, out_dtype or torch.bfloat16, weight)
    if x.shape[0] == 0:
        return out
    if bias is not None and (tuple(bias.shape) != (num_rows,) or bias.dtype not in OUT_TYPES):
        raise QSpecError(
            f"a bias is {bias.dtype} {tuple(bias.shape)}, not bfloat16 or float32 ({num_rows},)"
        )
    if isinstance(weight, PackedPlain):
        if isinstance(x, Quantized):
            raise QSpecError("quantised activations meet only the nested weights of a draft view")
        return plain(x, weight.weight, bias, out)
    if isinstance(x, Quantized):
        if not wants_integers(weight, view):
            raise QSpecError("quantised activations meet only the nested weights of a draft view")
    elif x.device != weight.base.device:
        raise QSpecError(f"x is on {x.device}, its weights on {weight.base.device}")
    else:
        check_rows(x, (torch.bfloat16,))
        if rows.is_prompt and (isinstance(weight, PackedDense) or not view.is_draft):
            return prompt(x, weight, bias, out)
        if wants_integers(weight, view):
            x = quantize(x, view, pdl=pdl)
        elif num_cols % 8:  # the copy engine reads rows from multiples of 16 bytes
            x = torch.nn.functional.pad(x, (0, -num_cols % 8))
    _generated(x, weight, bias, view, out, pdl, chosen)
    return out


def _generated(
    x: Tensor | Quantized,
    weight: PackedPlanes | PackedDense,
    bias: Tensor | None,
    view: View,
    out: Tensor,
    pdl: bool,
    chosen: Tuning | None,
) -> None:
    values = x.codes if isinstance(x, Quantized) else x
    product = Product(
        form=form_of_weight(weight, view),
        values=values.clone() if values.data_ptr() % 16 else values,
        meta=x.meta if isinstance(x, Quantized) else None,
        weight=weight,
        bias=bias,
        out=out,
        pdl=pdl,
    )
    device = weight.base.device.index
    if isinstance(chosen, direct.Tuning):
        direct.multiply(product, chosen)
    elif isinstance(chosen, wide.Tuning):
        wide.multiply(product, chosen)
    elif chosen or split.can_run(product.form, values.shape[0], device):
        split.multiply(product, chosen)
    elif wide.can_run(values.shape[0], device):
        wide.multiply(product)
    else:
        direct.multiply(product)


def _room(
    out: Tensor | None, num_tokens: int, num_rows: int, dtype: torch.dtype, weight: PackedMatrix
) -> Tensor:
    if dtype not in OUT_TYPES:
        raise QSpecError(
            f"a linear's output is {dtype}; the cuda backend writes bfloat16 or float32"
        )
    if out is None:
        return torch.empty(num_tokens, num_rows, dtype=dtype, device=weight.tensors()[0].device)
    if tuple(out.shape) != (num_tokens, num_rows) or out.dtype != dtype or not out.is_contiguous():
        raise QSpecError(
            f"the output is {out.dtype} {tuple(out.shape)}, not contiguous {dtype} "
            f"({num_tokens}, {num_rows})"
        )
    return out
