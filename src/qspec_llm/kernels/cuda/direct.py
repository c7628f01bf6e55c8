"""Launches of direct.cu: generated rows, 8 or 16 at a time."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch

from qspec_llm.kernels.cuda.compile import Kernel, kernel
from qspec_llm.kernels.cuda.form import Form, Product
from qspec_llm.kernels.cuda.layout import TILE_COLS, TILE_ROWS

__all__ = ["Tuning", "multiply", "tuning"]

RANGES = 8  # of columns, a warp each; the order of every sum follows from it
WIDEST = 2  # tiles of 8 tokens


@dataclass(frozen=True)
class Tuning:
    """What may differ between instances without changing any sum.

    Attributes:
        rows: tiles of 16 rows a block.
        depth: tiles of weights that a warp has on their way.
        stages: tiles of x that a warp has on their way.
        blocks: blocks that share a multiprocessor, which bounds registers.
        cached: copies of x go through the L1.
    """

    rows: int
    depth: int
    stages: int
    blocks: int
    cached: bool = False


def tuning(form: Form, token_tiles: int) -> Tuning:
    """The measured best (docs/gpu-notes.md)."""
    if form.rest_bytes or form.bits == 0:
        return Tuning(rows=1, depth=1, stages=2, blocks=2)
    if token_tiles > 1:
        return Tuning(rows=1, depth=1, stages=2, blocks=3)
    return Tuning(rows=1, depth=2, stages=4 if form.act == 8 else 2, blocks=3)


class _Problem(ctypes.Structure):
    """direct.cu's Problem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "meta", "base", "rest", "bias", "out")),
        ("ahead", ctypes.c_void_p * 2),
        ("ahead_bytes", ctypes.c_int * 2),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "num_rows", "num_cols", "num_row_tiles", "num_col_tiles", "pitch",
            "bias_kind", "out_is_float",
        )),
    )  # fmt: skip


@cache
def _instance(form: Form, token_tiles: int, chosen: Tuning) -> tuple[Kernel, int]:
    """The kernel and its bytes of shared memory."""
    function = kernel(
        "direct.cu",
        "direct",
        **form.defines(),
        NT=token_tiles,
        RT=chosen.rows,
        DEPTH=chosen.depth,
        STAGES=chosen.stages,
        BLOCKS=chosen.blocks,
        X_CACHED=int(chosen.cached),
    )
    tokens = token_tiles * 8
    stage = tokens * TILE_COLS * form.act // 8
    if form.act == 8:
        stage += TILE_COLS // form.act_group * tokens * 8
    sums = _whole(chosen.rows * TILE_ROWS * (tokens + 1) * 4, 128)
    return function, RANGES * max(chosen.stages * stage, sums)


def _whole(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit


def multiply(product: Product, chosen: Tuning | None = None) -> None:
    """Compute a product; `chosen` is an instance other than the measured best."""
    num_tokens, num_cols = product.values.shape
    row_tiles, col_tiles = product.weight.base.shape[:2]
    token_tiles = min(math.ceil(num_tokens / 8), WIDEST)
    tuned = chosen or tuning(product.form, token_tiles)
    function, smem = _instance(product.form, token_tiles, tuned)
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
        bias_kind=product.bias_kind,
        out_is_float=int(product.out.dtype is torch.float32),
    )
    for index, (address, size) in enumerate(product.ahead):
        problem.ahead[index], problem.ahead_bytes[index] = address, size
    grid = (math.ceil(row_tiles / tuned.rows), math.ceil(num_tokens / (8 * token_tiles)))
    function.launch(grid, RANGES * 32, [problem], smem=smem, pdl=product.pdl)
