"""Prompt rows, and dense weights of types that no kernel here reads: matrix products of torch.

Both multiply a fixed number of rows at a time: at a fixed shape a library's order of summation is
fixed, so that a row does not depend on how many others there are.
"""

import torch
from torch import Tensor

from qspec_llm.kernels.cuda.layout import TILE_COLS, TILE_ROWS, PackedDense, PackedPlanes
from qspec_llm.kernels.cuda.tables import decoded

__all__ = ["PROMPT_TILE", "plain", "prompt"]

PROMPT_TILE = 256
DECODED_WEIGHTS = 1 << 24  # decoded at a time: 32 MiB, which the L2 keeps
PLAIN_TILE = 8


def prompt(
    x: Tensor, weight: PackedPlanes | PackedDense, bias: Tensor | None, out: Tensor
) -> Tensor:
    """The prompt class: cuBLAS on decoded weights, in chunks of PROMPT_TILE rows."""
    (num_tokens, num_cols), (num_rows, _) = x.shape, weight.shape
    row_tiles, col_tiles = weight.base.shape[:2]
    width = col_tiles * TILE_COLS
    missing = -num_tokens % PROMPT_TILE
    padded = torch.nn.functional.pad(x, (0, width - num_cols, 0, missing))
    step = max(1, DECODED_WEIGHTS // (TILE_ROWS * width))
    room = torch.empty(
        min(step, row_tiles) * TILE_ROWS, width, dtype=torch.bfloat16, device=x.device
    )
    for first in range(0, row_tiles, step):
        block = decoded(weight, slice(first, first + step), room)
        start = first * TILE_ROWS
        stop = min(num_rows, start + block.shape[0])
        for row in range(0, num_tokens, PROMPT_TILE):
            last = min(num_tokens, row + PROMPT_TILE)
            part = torch.mm(padded[row : row + PROMPT_TILE], block.t(), out_dtype=torch.float32)
            part = part[: last - row, : stop - start]
            if bias is not None:
                part = part + bias[start:stop].float()
            out[row:last, start:stop] = part
    return out


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """A dense float32 or float16 matrix: torch in float32, in tiles of a fixed number of rows."""
    wide, matrix = x.float(), weight.float().t()
    missing = -x.shape[0] % PLAIN_TILE
    padded = torch.nn.functional.pad(wide, (0, 0, 0, missing))
    parts = [torch.mm(part, matrix) for part in torch.split(padded, PLAIN_TILE)]
    result = torch.cat(parts)[: x.shape[0]]
    return out.copy_(result if bias is None else result + bias.float())
