"""What reads without multiplying: rows of an embedding, whole tiles of weights, a memory."""

import ctypes

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels.cuda.compile import kernel, num_multiprocessors
from qspec_llm.kernels.cuda.form import Form, form_of_weight
from qspec_llm.kernels.cuda.layout import (
    TILE_COLS,
    TILE_ROWS,
    PackedDense,
    PackedMatrix,
    PackedPlain,
    PackedPlanes,
)
from qspec_llm.weights.view import VERIFY

__all__ = ["decoded", "embed", "read_memory"]

ROW_TYPES = (torch.bfloat16, torch.float32)


def decoded(weight: PackedPlanes | PackedDense, tiles: slice, out: Tensor) -> Tensor:
    """Rows of the matrix as the verify view reads them, rounded to bf16, filled up to whole tiles.

    Args:
        weight: [N, K].
        tiles: which tiles of 16 rows; whole numbers, step 1.
        out: contiguous bf16, at least [16 tiles, K up to a multiple of 128].
    """
    row_tiles, col_tiles = weight.base.shape[:2]
    first, last, _ = tiles.indices(row_tiles)
    form = form_of_weight(weight, VERIFY)
    rest = weight.rest if isinstance(weight, PackedPlanes) else None
    function = kernel("weights.cu", "decode", **form.defines())
    args = [weight.base, rest, out, first, col_tiles]
    function.launch((-(-col_tiles // 4), last - first), 128, args)
    shape = ((last - first) * TILE_ROWS, col_tiles * TILE_COLS)
    return out.view(-1)[: shape[0] * shape[1]].view(shape)


def embed(tokens: Tensor, table: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """Rows of the embedding at full precision: tokens [R] int64 to [R, K] bf16 or float32.

    A token outside the table gives zeros; the caller checks tokens.
    """
    if isinstance(table, PackedPlain):
        return table.weight[tokens].to(dtype)
    if dtype not in ROW_TYPES or tokens.dtype is not torch.int64 or tokens.ndim != 1:
        raise QSpecError(
            f"tokens are {tokens.dtype} {tuple(tokens.shape)} and rows of {dtype} are asked for; "
            "the cuda backend looks up int64 tokens in one dimension, as bfloat16 or float32"
        )
    num_rows, num_cols = table.shape
    out = torch.empty(tokens.shape[0], num_cols, dtype=dtype, device=tokens.device)
    if tokens.shape[0]:
        rest = table.rest if isinstance(table, PackedPlanes) else None
        args = [tokens, table.base, rest, out, num_cols, table.base.shape[1], num_rows]
        function = kernel("weights.cu", "embed", **form_of_weight(table, VERIFY).defines())
        is_float = int(dtype is torch.float32)
        function.launch((tokens.shape[0],), 256, [*args, is_float])
    return out


def read_memory(memory: Tensor) -> None:
    """Read every byte of a tensor once: [bytes] uint8, a multiple of 16."""
    sink = torch.empty(1, dtype=torch.int32, device=memory.device)
    function = kernel("weights.cu", "read_all", **Form(bits=0).defines())
    blocks = num_multiprocessors(memory.device.index) * 8
    function.launch((blocks,), 256, [memory, sink, ctypes.c_longlong(memory.nbytes // 16)])
