"""Activations of linears: what a draft's are quantised to, and the kernel that does it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels.cuda.compile import kernel
from qspec_llm.kernels.cuda.layout import TILE_COLS
from qspec_llm.weights.view import Activation, View

__all__ = [
    "TOP_OF",
    "Quantized",
    "check_rows",
    "group_and_top",
    "padded_rows",
    "quantize",
]

TOP_OF = {Activation.A8: 127, Activation.A4: 7}


def padded_rows(num_rows: int) -> int:
    """Rows that kernels read of the scales for `num_rows`: 8, 16, 32, 64 or a multiple of 128."""
    for size in (8, 16, 32, 64):
        if num_rows <= size:
            return size
    return -(-num_rows // 128) * 128


def group_and_top(num_cols: int, view: View | None) -> tuple[int, int]:
    """Columns that share a scale and the largest code: constants of a kernel, 0 and 0 for none."""
    if view is None:
        return 0, 0
    return view.columns_a_scale(num_cols), TOP_OF[view.activation]


@dataclass(frozen=True)
class Quantized:
    """Activations as integers, as linears of a draft read them.

    Attributes:
        codes: [R, K] int8; within every 16 columns the two halves of 8 are interleaved:
            stored[2 i] = code[i], stored[2 i + 1] = code[8 + i].
        meta: [groups, pitch, 2] int32: the bits of the float32 scale, and the sum of the codes, of
            every group of columns and row. Rows from R on hold anything, groups beyond K zeros.
        view: whose linears read them.
    """

    codes: Tensor
    meta: Tensor
    view: View

    @classmethod
    def empty(cls, num_rows: int, num_cols: int, view: View, device: torch.device) -> "Quantized":
        """Room for R rows of K columns, for a kernel to fill."""
        group = view.columns_a_scale(num_cols)
        num_groups = -(-num_cols // TILE_COLS) * TILE_COLS // group
        make = torch.empty if num_cols % TILE_COLS == 0 else torch.zeros
        codes = torch.empty(num_rows, num_cols, dtype=torch.int8, device=device)
        meta = make(num_groups, padded_rows(num_rows), 2, dtype=torch.int32, device=device)
        return cls(codes, meta, view)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.view.columns_a_scale(self.codes.shape[1])

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""
        return self.codes.shape


def quantize(x: Tensor, view: View, *, pdl: bool = False) -> Quantized:
    """x [R, K] bf16 or float32 as integers: those of `reference.quantize_activations`."""
    check_rows(x, (torch.bfloat16, torch.float32))
    num_rows, num_cols = x.shape
    if num_cols % 32:
        raise QSpecError(f"{num_cols} columns do not divide into groups of 32 activations")
    out = Quantized.empty(num_rows, num_cols, view, x.device)
    if num_rows == 0:
        return out
    num_groups = num_cols // out.group
    function = kernel(
        "activations.cu",
        "quantize",
        TOP=TOP_OF[view.activation],
        ACT_GROUP=out.group,
        X_FLOAT=int(x.dtype is torch.float32),
    )
    args = [x, out.codes, out.meta, num_cols, out.meta.shape[1], num_groups]
    function.launch((-(-num_groups // 8), num_rows), 256, args, pdl=pdl)
    return out


def check_rows(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse rows that are not contiguous, of these types and on a GPU.

    Raises:
        QSpecError: they are not.
    """
    if x.dtype not in dtypes:
        raise QSpecError(f"x is {x.dtype}; the cuda backend computes bfloat16 activations")
    if x.ndim != 2 or not x.is_contiguous() or not x.is_cuda:
        raise QSpecError(
            f"x is on {x.device} with shape {tuple(x.shape)} and strides {x.stride()}; a linear "
            "needs contiguous rows on a GPU"
        )
