"""How 4-bit codes become bytes, and how stored rows are put together.

Knows nothing of what a code means: that is `planes`. The order of nibbles is part of the format
on disk (docs/format.md) and is held by golden bytes.
"""

import torch
from torch import Tensor

__all__ = ["pack_nibbles", "unpack_nibbles"]


def pack_nibbles(codes: Tensor, group: int) -> Tensor:
    """Pack codes [N, K] uint8 (each 0..15) into bytes [N, K/2] uint8.

    Within each group of `group` codes, byte i holds code i in its low nibble and code
    i + group/2 in its high nibble. For group = 32 this is the order of GGUF's Q4_0 and Q4_1.
    """
    num_rows, num_cols = codes.shape
    halves = codes.view(num_rows, num_cols // group, 2, group // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(num_rows, num_cols // 2)


def unpack_nibbles(packed: Tensor, group: int) -> Tensor:
    """Undo `pack_nibbles`: bytes [N, K/2] uint8 to codes [N, K/group, group] uint8."""
    num_rows, num_bytes = packed.shape
    halves = packed.view(num_rows, num_bytes * 2 // group, group // 2)
    return torch.cat((halves & 15, halves >> 4), dim=-1)
