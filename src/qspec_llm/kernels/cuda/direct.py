"""Launches of direct.cu: generated rows, 8 or 16 at a time."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch

from qspec_llm.kernels.cuda.compile import Kernel, kernel, num_multiprocessors
from qspec_llm.kernels.cuda.form import Form, Product
from qspec_llm.kernels.cuda.layout import TILE_COLS, TILE_ROWS

__all__ = ["Tuning", "multiply", "tuning"]

RANGES = 8  # of columns, a warp each; the order of every sum follows from it
WIDEST = 2  # tiles of 8 tokens
SMEM_PER_SM, SMEM_PER_BLOCK, SMEM_RESERVED = 228 << 10, 227 << 10, 1 << 10


@dataclass(frozen=True)
class Tuning:
    """What may differ between instances without changing any sum.

    Attributes:
        rows: tiles of 16 rows a block computes at a time.
        depth: tiles of weights that a warp has on their way.
        blocks: most blocks that share a multiprocessor, which bounds registers.
        persistent: blocks stay for several blocks of rows.
        lead: tiles that a warp fetches into the L2 while it waits for earlier kernels.
    """

    rows: int
    depth: int
    blocks: int
    persistent: bool = True
    lead: int = 0


def tuning(form: Form, token_tiles: int) -> Tuning:
    """The measured best (docs/gpu-notes.md)."""
    if form.rest_bytes or form.bits == 0:
        return Tuning(rows=1, depth=1, blocks=2)
    return Tuning(rows=2 if token_tiles > 1 else 1, depth=2, blocks=2)


@dataclass(frozen=True)
class Cut:
    """How a product is laid over the device.

    Attributes:
        grid: blocks.
        piece: tiles of columns that a warp's buffer of x holds.
        buffers: 1 where a piece is the whole range, else 2.
        smem: bytes a block.
    """

    grid: int
    piece: int
    buffers: int
    smem: int


@cache
def cut(
    form: Form, chosen: Tuning, tokens: int, row_tiles: int, col_tiles: int, multiprocessors: int
) -> Cut:
    """Blocks of equal work on every multiprocessor, and as much x at hand as there is room for.

    Args:
        form: of the weights.
        chosen: the instance.
        tokens: rows of x that a block reads, up to 16.
        row_tiles: tiles of 16 rows of the matrix.
        col_tiles: tiles of 128 columns.
        multiprocessors: of the device.
    """
    num_blocks = math.ceil(row_tiles / chosen.rows)

    token_tiles = math.ceil(tokens / 8)
    sums = 2 * RANGES * chosen.rows * TILE_ROWS * (token_tiles * 8 + 1) * 4 + RANGES * 16
    most = math.ceil(col_tiles / RANGES)

    def cost(blocks: int) -> float:
        # few blocks hide less of the memory's latency
        return math.ceil(num_blocks / (multiprocessors * blocks)) * (blocks + 0.25)

    def room(blocks: int) -> int:
        return min(SMEM_PER_BLOCK, SMEM_PER_SM // blocks - SMEM_RESERVED) - sums

    def size(piece: int) -> int:
        meta = 0 if form.act == 16 else TILE_COLS // form.act_group * token_tiles * 64
        return RANGES * (tokens * (piece * TILE_COLS * form.act // 8 + 16) + piece * meta)

    fitting = [b for b in range(1, chosen.blocks + 1) if 2 * size(1) <= room(b)]
    blocks = min(fitting, key=cost)
    buffers, pieces = 1, 1
    while size(math.ceil(most / pieces)) * buffers > room(blocks):
        buffers, pieces = 2, pieces + 1
    piece = math.ceil(most / pieces)
    grid = min(num_blocks, multiprocessors * blocks) if chosen.persistent else num_blocks
    return Cut(grid, piece, buffers, sums + buffers * size(piece))


class _Problem(ctypes.Structure):
    """direct.cu's Problem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "meta", "base", "rest", "bias", "out")),
        ("ahead", ctypes.c_void_p * 2),
        ("ahead_bytes", ctypes.c_int * 2),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "num_rows", "num_cols", "num_row_tiles", "num_col_tiles", "pitch",
            "num_blocks", "piece", "num_buffers", "lead", "bias_kind", "out_is_float",
        )),
    )  # fmt: skip


@cache
def instance(form: Form, token_tiles: int, chosen: Tuning) -> Kernel:
    """The kernel for tiles of 8 tokens."""
    return kernel(
        "direct.cu",
        "direct",
        **form.defines(),
        NT=token_tiles,
        RT=chosen.rows,
        DEPTH=chosen.depth,
        BLOCKS=chosen.blocks,
    )


def multiply(product: Product, chosen: Tuning | None = None) -> None:
    """Compute a product; `chosen` is an instance other than the measured best."""
    num_tokens, num_cols = product.values.shape
    row_tiles, col_tiles = product.weight.base.shape[:2]
    token_tiles = min(math.ceil(num_tokens / 8), WIDEST)
    tuned = chosen or tuning(product.form, token_tiles)
    device = product.out.device.index
    tokens = min(num_tokens, 8 * token_tiles)
    laid = cut(product.form, tuned, tokens, row_tiles, col_tiles, num_multiprocessors(device))
    rest, bias, meta = product.rest, product.bias, product.meta
    problem = _Problem(
        x=product.values.data_ptr(),
        meta=None if meta is None else meta.data_ptr(),
        base=product.weight.base.data_ptr(),
        rest=None if rest is None else rest.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=product.out.data_ptr(),
        num_tokens=num_tokens,
        num_rows=product.weight.shape[0],
        num_cols=num_cols,
        num_row_tiles=row_tiles,
        num_col_tiles=col_tiles,
        pitch=0 if meta is None else meta.shape[1],
        num_blocks=math.ceil(row_tiles / tuned.rows),
        piece=laid.piece,
        num_buffers=laid.buffers,
        lead=tuned.lead,
        bias_kind=product.bias_kind,
        out_is_float=int(product.out.dtype is torch.float32),
    )
    for index, (address, size) in enumerate(product.ahead):
        problem.ahead[index], problem.ahead_bytes[index] = address, size
    grid = (laid.grid, math.ceil(num_tokens / (8 * token_tiles)))
    function = instance(product.form, token_tiles, tuned)
    function.launch(grid, RANGES * 32, [problem], smem=laid.smem, pdl=product.pdl)
