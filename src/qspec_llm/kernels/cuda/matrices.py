"""Packed matrices: the linears' kernels, with the reference's arithmetic for what they do not take.

float32 activations, which tests compare with, and Triton's interpreter go through
`reference.linear` on unpacked tensors: slow, and as independent by rows.
"""

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import Packed, Rows, reference
from qspec_llm.kernels.cuda import layout, tables
from qspec_llm.kernels.cuda import linear as kernels
from qspec_llm.kernels.cuda.activations import Quantized
from qspec_llm.kernels.cuda.device import can_overlap, gpu
from qspec_llm.kernels.cuda.layout import PackedPlanes
from qspec_llm.kernels.triton.launch import IS_INTERPRETED
from qspec_llm.weights.planes import Stored
from qspec_llm.weights.view import View

__all__ = ["buffers", "embed", "linear", "pack", "read_memory", "takes_quantized", "unpack"]


def pack(stored: Stored) -> Packed:
    """Arrange a stored tensor on the GPU; the same bits, no copy kept.

    Raises:
        QSpecError: the GPU has no room for it.
    """
    if IS_INTERPRETED:
        return stored
    try:
        return layout.pack(stored, gpu())
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info()
        raise QSpecError(
            f"the model does not fit: a tensor of {stored.nbytes >> 20} MiB is next and the GPU "
            f"has {free >> 20} of {total >> 20} MiB free; choose a smaller model or target"
        ) from None


def unpack(packed: Packed) -> Stored:
    """Undo `pack` exactly; the tensors stay on the GPU."""
    return packed if IS_INTERPRETED else layout.unpack(packed)


def buffers(packed: Packed) -> list[Tensor]:
    """The tensors that hold its bytes."""
    return reference.buffers(packed) if IS_INTERPRETED else kernels.buffers(packed)


def read_memory(memory: Tensor) -> None:
    """Read every byte of a tensor once: [bytes] uint8, a multiple of 16."""
    tables.read_memory(memory)


def embed(tokens: Tensor, table: Packed, dtype: torch.dtype) -> Tensor:
    """Rows of the embedding: tokens [R] int64 to [R, hidden].

    The first kernel of a step. It waits for all earlier ones, so that the others of the step may
    read what those wrote (positions, places, the KV cache) before the kernels between have ended.
    """
    if IS_INTERPRETED:
        return reference.embed(tokens, table, dtype)
    return tables.embed(tokens, table, dtype)


def takes_quantized(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether `linear` takes activations that are quantised already, of rows in `dtype`."""
    return isinstance(packed, PackedPlanes) and dtype is torch.bfloat16


def linear(
    x: Tensor | Quantized,
    weight: Packed,
    bias: Tensor | None,
    view: View,
    rows: Rows,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [R, K] times the view's weights [N, K] transposed, plus bias [N]: [R, N].

    `x` may be quantised where `takes_quantized`.
    """
    if isinstance(x, Tensor) and (IS_INTERPRETED or not kernels.can_run(x)):
        return reference.linear(x, unpack(weight), bias, view, rows, out_dtype)
    return kernels.linear(x, weight, bias, view, rows, out_dtype, pdl=can_overlap())
