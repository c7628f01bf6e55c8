"""Launches of fused.cu: prompt rows on Hopper, weights decoded in registers."""

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.kernels.cuda.compile import Kernel, kernel, num_multiprocessors, tensor_map
from qspec_llm.kernels.cuda.form import Form, form_of_weight
from qspec_llm.kernels.cuda.layout import PackedDense, PackedPlanes
from qspec_llm.weights.view import VERIFY

__all__ = ["can_run", "multiply", "num_ranges", "token_tiles"]

WARPS = 8  # that multiply, a tile of rows each
THREADS = (WARPS + 4) * 32
CLUSTER = 2
MAX_SLOTS = 8
SMEM = (227 << 10) - 1024 - 512  # of a block, less alignment and barriers
OUT_BYTES = 64 * (WARPS * 32 + 16)  # of results on their way to memory
FEW_BLOCKS = 48  # of rows; with two ranges each, 512 tokens occupy a chip of 132 multiprocessors
LEAST_TILES = 4  # of columns in a range
# Tiles of 8 tokens in a block, and microseconds for each tile of columns (measured on an H200)
TILE_SECONDS = {8: 0.85, 16: 0.95, 24: 1.2, 32: 1.5}
BLOCK_SECONDS = 7.0  # besides


def can_run(device: int) -> bool:
    """Whether the device has warpgroup products."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def num_ranges(row_tiles: int, col_tiles: int) -> int:
    """Into how many ranges the columns are cut: 1 or 2.

    It decides the order of summation, so it looks at the matrix alone.
    """
    is_short = math.ceil(row_tiles / WARPS) < FEW_BLOCKS
    return 2 if is_short and col_tiles >= 2 * LEAST_TILES else 1


@functools.cache
def token_tiles(
    num_tokens: int, row_tiles: int, col_tiles: int, ranges: int, multiprocessors: int
) -> int:
    """Tiles of 8 tokens in a thread block: with which all are done first; changes no sum."""

    def cost(tiles: int) -> float:
        clusters = _num_clusters(num_tokens, row_tiles, tiles, ranges)
        turns = math.ceil(clusters / (multiprocessors // CLUSTER))
        return turns * (col_tiles / ranges * TILE_SECONDS[tiles] + BLOCK_SECONDS)

    return min(TILE_SECONDS, key=cost)


def _num_clusters(num_tokens: int, row_tiles: int, tiles: int, ranges: int) -> int:
    sharers = CLUSTER // ranges  # of x: blocks of rows
    return math.ceil(row_tiles / (WARPS * sharers)) * math.ceil(num_tokens / (8 * tiles))


class _Problem(ctypes.Structure):
    """fused.cu's Problem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "base", "rest", "bias", "out",
        )),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "num_rows", "num_row_tiles", "num_col_tiles", "num_token_blocks",
            "num_units", "num_x", "num_w", "bias_kind", "out_is_float",
        )),
    )  # fmt: skip


@dataclass(frozen=True)
class _Instance:
    """One kernel and how it is launched for one matrix."""

    kernel: Kernel
    num_units: int
    tokens: int
    box: tuple[int, int]
    num_x: int
    num_w: int
    smem: int


@functools.cache
def _instance(form: Form, row_tiles: int, num_tokens: int, tiles: int, ranges: int) -> _Instance:
    weights = WARPS * (form.base_bytes + form.rest_bytes)
    half = 8 * tiles * 128  # bytes of 64 columns of x
    room = SMEM - OUT_BYTES
    num_w = 3
    num_x = min(MAX_SLOTS, (room - num_w * weights) // half)
    return _Instance(
        kernel=kernel("fused.cu", "fused", **form.defines(), NT=tiles, RANGES=ranges),
        num_units=_num_clusters(num_tokens, row_tiles, tiles, ranges),
        tokens=8 * tiles,
        box=(8 * tiles * ranges // CLUSTER, 64),
        num_x=num_x,
        num_w=num_w,
        smem=1024 + num_x * half + num_w * weights + OUT_BYTES,
    )


def multiply(
    x: Tensor,
    weight: PackedPlanes | PackedDense,
    bias: Tensor | None,
    out: Tensor,
    *,
    tiles: int | None = None,
    ranges: int | None = None,
) -> None:
    """out = x times the verify view's weights, rounded to bf16, transposed, plus bias.

    Args:
        x: [R, K] bf16, contiguous, at a multiple of 16 bytes, K a multiple of 8.
        weight: [N, K].
        bias: [N] bf16 or float32.
        out: [R, N] bf16 or float32, contiguous.
        tiles: of 8 tokens in a thread block, other than `token_tiles`.
        ranges: of columns, other than `num_ranges`; changes sums, for benchmarks.
    """
    num_tokens = x.shape[0]
    row_tiles, col_tiles = weight.base.shape[:2]
    ranges = ranges or num_ranges(row_tiles, col_tiles)
    multiprocessors = num_multiprocessors(weight.base.device.index)
    if tiles is None:
        tiles = token_tiles(num_tokens, row_tiles, col_tiles, ranges, multiprocessors)
    one = _instance(form_of_weight(weight, VERIFY), row_tiles, num_tokens, tiles, ranges)
    rest = weight.rest if isinstance(weight, PackedPlanes) else None
    problem = _Problem(
        base=weight.base.data_ptr(),
        rest=None if rest is None else rest.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        num_tokens=num_tokens,
        num_rows=weight.shape[0],
        num_row_tiles=row_tiles,
        num_col_tiles=col_tiles,
        num_token_blocks=math.ceil(num_tokens / one.tokens),
        num_units=one.num_units,
        num_x=one.num_x,
        num_w=one.num_w,
        bias_kind=0 if bias is None else 1 if bias.dtype is torch.bfloat16 else 2,
        out_is_float=int(out.dtype is torch.float32),
    )
    # clusters that stay take unit after unit; those with two ranges use their rings to meet
    clusters = min(one.num_units, multiprocessors // CLUSTER) if ranges == 1 else one.num_units
    args = [tensor_map(x, one.box), problem]
    one.kernel.launch((clusters * CLUSTER,), THREADS, args, smem=one.smem, cluster=CLUSTER)
