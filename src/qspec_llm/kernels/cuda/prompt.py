"""Prompt rows, and dense weights of types that no kernel here reads.

Prompts multiply with the verify view's weights rounded to bf16: on Hopper by fused.cu, elsewhere by
cuBLAS with decoded weights. cuBLAS multiplies a fixed number of rows at a time: at a fixed shape a
library's order of summation is fixed, so that a row does not depend on how many others there are.
"""

import torch
from torch import Tensor

from qspec_llm.kernels.cuda import fused
from qspec_llm.kernels.cuda.layout import TILE_COLS, TILE_ROWS, PackedDense, PackedPlanes
from qspec_llm.kernels.cuda.tables import decoded

__all__ = ["PROMPT_TILE", "plain", "prompt", "through_cublas"]

PROMPT_TILE = 256
DECODED_WEIGHTS = 1 << 26  # decoded at a time: 128 MiB, products large enough for the whole chip
PLAIN_TILE = 8


def prompt(
    x: Tensor, weight: PackedPlanes | PackedDense, bias: Tensor | None, out: Tensor
) -> Tensor:
    """The prompt class: x [R, K] bf16 to out [R, N] bf16 or float32, bias bf16 or float32."""
    if not fused.can_run(weight.base.device.index):
        return through_cublas(x, weight, bias, out)
    if x.shape[1] % 8:  # the copy engine reads rows from multiples of 16 bytes
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    fused.multiply(x.clone() if x.data_ptr() % 16 else x, weight, bias, out)
    return out


def through_cublas(
    x: Tensor, weight: PackedPlanes | PackedDense, bias: Tensor | None, out: Tensor
) -> Tensor:
    """The same by cuBLAS on decoded weights, in tiles of PROMPT_TILE rows."""
    (num_tokens, num_cols), (num_rows, _) = x.shape, weight.shape
    row_tiles, col_tiles = weight.base.shape[:2]
    width = col_tiles * TILE_COLS
    step = max(1, DECODED_WEIGHTS // (TILE_ROWS * width))
    room = torch.empty(
        min(step, row_tiles) * TILE_ROWS, width, dtype=torch.bfloat16, device=x.device
    )
    whole = num_tokens // PROMPT_TILE * PROMPT_TILE
    rest = torch.nn.functional.pad(x[whole:], (0, 0, 0, -num_tokens % PROMPT_TILE))
    rest_out = torch.empty(PROMPT_TILE, num_rows, dtype=out.dtype, device=x.device)
    for first in range(0, row_tiles, step):
        block = decoded(weight, slice(first, first + step), room)
        start = first * TILE_ROWS
        stop = min(num_rows, start + block.shape[0])
        matrix = block[: stop - start, :num_cols].t()
        part_of_bias = None if bias is None else bias[start:stop]
        for row in range(0, whole, PROMPT_TILE):
            tile = slice(row, row + PROMPT_TILE)
            _tile(x[tile], matrix, part_of_bias, out[tile, start:stop])
        if whole < num_tokens:
            _tile(rest, matrix, part_of_bias, rest_out[:, start:stop])
    out[whole:] = rest_out[: num_tokens - whole]
    return out


def _tile(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """One product of PROMPT_TILE rows, rounded once."""
    if bias is None and out.dtype is torch.bfloat16:
        torch.mm(x, matrix, out=out)
        return
    sums = torch.mm(x, matrix, out_dtype=torch.float32)
    out.copy_(sums if bias is None else sums.add_(bias))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """A dense float32 or float16 matrix: torch in float32, in tiles of a fixed number of rows."""
    wide, matrix = x.float(), weight.float().t()
    missing = -x.shape[0] % PLAIN_TILE
    padded = torch.nn.functional.pad(wide, (0, 0, 0, missing))
    parts = [torch.mm(part, matrix) for part in torch.split(padded, PLAIN_TILE)]
    result = torch.cat(parts)[: x.shape[0]]
    return out.copy_(result if bias is None else result + bias.float())
