"""Packed tensors of this backend: arranged for the kernels, or as stored where no kernel fits.

Tensors that no kernel takes (odd shapes, dense ones of float32) and float32 activations, which tests
use, go through the reference's arithmetic on the GPU: slow, and as independent by rows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import Packed, Rows, reference
from qspec_llm.kernels.cuda.device import gpu
from qspec_llm.kernels.cuda.quantized import Quantized
from qspec_llm.weights.planes import Dense, Planes, Stored
from qspec_llm.weights.view import View

__all__ = ["buffers", "embed", "linear", "pack", "takes_quantized", "unpack"]


def pack(stored: Stored) -> Packed:
    """Arrange a stored tensor on the GPU; the same bits, no copy kept."""
    try:
        return _to_gpu(stored)
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info()
        raise QSpecError(
            f"the model does not fit: a tensor of {stored.nbytes >> 20} MiB is next and the GPU has "
            f"{free >> 20} of {total >> 20} MiB free; choose a smaller model or target"
        ) from None


def _to_gpu(stored: Stored) -> Stored:
    if isinstance(stored, Dense):
        return replace(stored, weight=stored.weight.to(gpu()))
    moved = {name: tensor.to(gpu()) for name, tensor in stored.tensors().items()}
    return Planes(spec=stored.spec, **moved)


def unpack(packed: Packed) -> Stored:
    """Undo `pack` exactly, on the GPU."""
    assert isinstance(packed, Planes | Dense)
    return packed


def buffers(packed: Packed) -> list[Tensor]:
    """The tensors that hold its bytes."""
    return reference.buffers(packed)


def embed(tokens: Tensor, table: Packed, dtype: torch.dtype) -> Tensor:
    """Rows of the embedding: tokens [R] int64 to [R, hidden]."""
    return reference.embed(tokens, table, dtype)


def takes_quantized(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether `linear` takes activations that are quantised already, of rows in `dtype`."""
    return False


def linear(
    x: Tensor | Quantized,
    weight: Packed,
    bias: Tensor | None,
    view: View,
    rows: Rows,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [R, K] times the view's weights [N, K] transposed, plus bias [N]: [R, N]."""
    assert isinstance(x, Tensor)
    return reference.linear(x, weight, bias, view, rows, out_dtype)
