"""How one view reads a packed tensor, and one product that a kernel is to compute."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.kernels.cuda.layout import (
    DENSE_BYTES,
    PackedDense,
    PackedPlanes,
    tile_bytes,
)
from qspec_llm.weights.planes import Grid, PlaneSpec
from qspec_llm.weights.view import Activation, View

__all__ = [
    "HEAD_DIMS",
    "LANES",
    "PLACED",
    "RANGES",
    "Form",
    "Product",
    "form_of",
    "form_of_weight",
]

RANGES = (
    8  # of the columns of generated rows: a sum is those of the ranges, in order, in every kernel
)
# attention.cuh: head sizes that it knows, lanes of keys, keys that lie side by side in the cache
HEAD_DIMS, LANES, PLACED = (64, 128), 8, 16


@dataclass(frozen=True)
class Form:
    """A tensor as one view reads it: the parameters of tile.cuh, and the bytes of a tile."""

    bits: int
    group: int = 128
    is_signed: bool = True
    has_offset: bool = False
    has_middle: bool = False
    is_half: bool = False
    act: int = 16
    act_group: int = 64
    base_bytes: int = DENSE_BYTES
    rest_bytes: int = 0

    def defines(self) -> dict[str, int]:
        """Macros."""
        return {
            "BITS": self.bits,
            "GROUP": self.group,
            "SIGNED": int(self.is_signed),
            "OFFSET": int(self.has_offset),
            "MIDDLE": int(self.has_middle),
            "SCALE_HALF": int(self.is_half),
            "ACT": self.act,
            "ACT_GROUP": self.act_group,
        }


@functools.cache
def form_of(spec: PlaneSpec | None, view: View) -> Form:
    """How `view` reads a tensor of `spec` (None: a dense one)."""
    if spec is None:
        return Form(bits=0)
    is_wide = view.activation is Activation.A16
    bits = spec.draft_bits if view.is_draft else spec.bits
    base_bytes, rest_bytes = tile_bytes(spec)
    return Form(
        bits=bits,
        group=spec.group,
        is_signed=spec.grid is Grid.SIGNED,
        has_offset=spec.has_offset,
        has_middle=spec.grid is Grid.AFFINE and bits == 4 and spec.bits == 8,
        is_half=spec.scale_dtype is torch.float16,
        act=16 if is_wide else 8,
        act_group=64 if is_wide else view.columns_a_scale(spec.num_cols),
        base_bytes=base_bytes,
        rest_bytes=0 if bits == 4 else rest_bytes,
    )


def form_of_weight(weight: PackedPlanes | PackedDense, view: View) -> Form:
    """How `view` reads a packed tensor."""
    return form_of(weight.spec if isinstance(weight, PackedPlanes) else None, view)


@dataclass(frozen=True)
class Product:
    """out = x times the weights, transposed, plus bias; all checked.

    Attributes:
        form: how the view reads the weights.
        values: [R, K] bf16, or int8 codes as in `Quantized`; contiguous, from an address and with
            rows that are multiples of 16 bytes.
        meta: [groups, pitch, 2] int32 of int8 codes.
        weight: [N, K].
        bias: [N] bf16 or float32.
        out: [R, N] bf16 or float32, contiguous.
        pdl: programmatic dependent launch (compile.Kernel.launch).
    """

    form: Form
    values: Tensor
    meta: Tensor | None
    weight: PackedPlanes | PackedDense
    bias: Tensor | None
    out: Tensor
    pdl: bool = False

    @property
    def rest(self) -> Tensor | None:
        """The planes that the view reads beyond the base."""
        return self.weight.rest if isinstance(self.weight, PackedPlanes) else None

    @property
    def bias_kind(self) -> int:
        """0 for none, 1 for bf16, 2 for float32."""
        return 0 if self.bias is None else 1 if self.bias.dtype is torch.bfloat16 else 2
