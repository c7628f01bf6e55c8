"""Activations as the draft's linears read them: integers, and a scale for each row and group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.weights.view import Activation

__all__ = ["Quantized", "group_of", "padded_rows"]


def group_of(num_cols: int, activation: Activation) -> int:
    """Columns that share a scale: 64 for a8 where 64 divides them, else 32."""
    return 64 if activation is Activation.A8 and num_cols % 64 == 0 else 32


def padded_rows(num_rows: int) -> int:
    """Rows of `Quantized.meta`: the next of 8, 16, 32, 64, or a multiple of 128."""
    small = (size for size in (8, 16, 32, 64) if num_rows <= size)
    return next(small, -(-num_rows // 128) * 128)


@dataclass(frozen=True)
class Quantized:
    """R rows of K activations; each group of columns is about its codes times its scale.

    Attributes:
        codes: [R, K] int8; within every 16 columns the two halves of 8 are interleaved: column
            16 b + 8 h + i is stored at 16 b + 2 i + h.
        meta: [groups, padded rows, 2] int32: bits of the float32 scale, and the sum of the codes.
        activation: a8 or a4.
    """

    codes: Tensor
    meta: Tensor
    activation: Activation

    @classmethod
    def empty(
        cls, num_rows: int, num_cols: int, activation: Activation, device: torch.device
    ) -> "Quantized":
        """Room for quantised rows."""
        num_groups = num_cols // group_of(num_cols, activation)
        return cls(
            torch.empty((num_rows, num_cols), dtype=torch.int8, device=device),
            torch.empty((num_groups, padded_rows(num_rows), 2), dtype=torch.int32, device=device),
            activation,
        )
