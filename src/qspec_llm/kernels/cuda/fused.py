"""Launches of fused.cu: prompt rows on Hopper, weights decoded in registers for the tensor cores.

The workspace in which thread blocks leave sums of ranges belongs to the device: products of one
device are launched on one stream at a time, or in graphs that are replayed so.
"""

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.kernels.cuda.compile import Kernel, kernel, tensor_map
from qspec_llm.kernels.cuda.form import Form, form_of_weight
from qspec_llm.kernels.cuda.layout import TILE_ROWS, PackedDense, PackedPlanes
from qspec_llm.weights.view import VERIFY

__all__ = ["Tuning", "can_run", "multiply", "num_ranges"]

WARPS = 8  # that multiply, a tile of rows each
THREADS = (WARPS + 4) * 32
MAX_TILES = 32  # of 8 tokens
MAX_TOKENS = 1 << 14  # of a launch
MAX_SLOTS = 8
SMEM = (227 << 10) - 1024 - 512  # of a block, less alignment and barriers
LEAST_TILES = 4  # of columns in a range
WORKSPACE_BYTES = 64 << 20
WORKSPACE_MEETINGS = 4096
MANY_BLOCKS = 64  # of rows: enough for every multiprocessor with two blocks of tokens


@dataclass(frozen=True)
class Tuning:
    """What may differ between instances without changing any sum.

    Attributes:
        cluster: thread blocks that share x: 1, 2 or 4.
        token_tiles: of 8 tokens in a block: 8, 16, 24 or 32; None takes the fewest that do.
    """

    cluster: int = 2
    token_tiles: int | None = None


def can_run(device: int) -> bool:
    """Whether the device has warpgroup products."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def num_ranges(row_tiles: int, col_tiles: int) -> int:
    """Into how many ranges the columns are cut: a power of two.

    It decides the order of summation, so it looks at the matrix alone. A matrix of few rows is cut
    so that 256 tokens occupy the multiprocessors.
    """
    ranges = 1
    blocks = math.ceil(row_tiles / WARPS)
    while blocks * ranges < MANY_BLOCKS and col_tiles >= 2 * ranges * LEAST_TILES:
        ranges *= 2
    return ranges


class _Problem(ctypes.Structure):
    """fused.cu's Problem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "base", "rest", "bias", "out", "parts", "meetings",
        )),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "num_rows", "num_row_tiles", "num_col_tiles", "num_token_blocks",
            "num_ranges", "num_x", "num_w", "bias_kind", "out_is_float",
        )),
    )  # fmt: skip


@dataclass(frozen=True)
class _Instance:
    """One kernel and how it is launched for one matrix."""

    kernel: Kernel
    grid: int
    cluster: int
    ranges: int
    token_blocks: int
    tokens: int
    num_x: int
    num_w: int
    smem: int


@functools.cache
def _instance(
    form: Form, row_tiles: int, num_tokens: int, chosen: Tuning, ranges: int
) -> _Instance:
    token_blocks = math.ceil(num_tokens / (8 * MAX_TILES))
    fewest = math.ceil(num_tokens / token_blocks / 64) * 8
    tiles = chosen.token_tiles or fewest
    token_blocks = math.ceil(num_tokens / (8 * tiles))
    row_groups = math.ceil(row_tiles / (WARPS * chosen.cluster))
    weights = WARPS * (form.base_bytes + form.rest_bytes)
    half = 8 * tiles * 128  # bytes of 64 columns of x
    num_w = 3 if 3 * weights + 4 * half <= SMEM else 2
    num_x = min(MAX_SLOTS, (SMEM - num_w * weights) // half)
    num_w = min(MAX_SLOTS, (SMEM - num_x * half) // weights)
    return _Instance(
        kernel=kernel("fused.cu", "fused", **form.defines(), NT=tiles, CLUSTER=chosen.cluster),
        grid=row_groups * token_blocks * ranges * chosen.cluster,
        cluster=chosen.cluster,
        ranges=ranges,
        token_blocks=token_blocks,
        tokens=8 * tiles,
        num_x=num_x,
        num_w=num_w,
        smem=1024 + num_x * half + num_w * weights,
    )


@functools.cache
def _workspace(device: int) -> tuple[Tensor, Tensor]:
    """Where thread blocks leave sums of ranges, and who came to which meeting (0 when idle)."""
    where = torch.device("cuda", device)
    parts = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=where)
    return parts, torch.zeros(2 * WORKSPACE_MEETINGS, dtype=torch.int32, device=where)


def _most_tokens(row_tiles: int, ranges: int) -> int:
    """Of a launch: as many as the workspace has room for, in whole blocks."""
    blocks = math.ceil(row_tiles / WARPS) * (ranges - 1)
    tokens = 8 * MAX_TILES
    sums = WARPS * TILE_ROWS * tokens * 4
    fitting = min(WORKSPACE_BYTES // sums, WORKSPACE_MEETINGS) // max(blocks, 1)
    return tokens * fitting if blocks else MAX_TOKENS


def multiply(
    x: Tensor,
    weight: PackedPlanes | PackedDense,
    bias: Tensor | None,
    out: Tensor,
    chosen: Tuning | None = None,
    ranges: int | None = None,
) -> None:
    """out = x times the verify view's weights, rounded to bf16, transposed, plus bias.

    Args:
        x: [R, K] bf16, contiguous, at a multiple of 16 bytes, K a multiple of 8.
        weight: [N, K].
        bias: [N] bf16 or float32.
        out: [R, N] bf16 or float32, contiguous.
        chosen: an instance other than the measured best, for benchmarks.
        ranges: of columns, other than `num_ranges`; changes sums, for benchmarks.
    """
    row_tiles, col_tiles = weight.base.shape[:2]
    ranges = ranges or num_ranges(row_tiles, col_tiles)
    step = _most_tokens(row_tiles, ranges)
    for first in range(0, x.shape[0], step):
        part = slice(first, first + step)
        _multiply(x[part], weight, bias, out[part], chosen or Tuning(), ranges)


def _multiply(
    x: Tensor,
    weight: PackedPlanes | PackedDense,
    bias: Tensor | None,
    out: Tensor,
    chosen: Tuning,
    ranges: int,
) -> None:
    row_tiles, col_tiles = weight.base.shape[:2]
    one = _instance(form_of_weight(weight, VERIFY), row_tiles, x.shape[0], chosen, ranges)
    rest = weight.rest if isinstance(weight, PackedPlanes) else None
    parts, meetings = _workspace(x.device.index)
    problem = _Problem(
        base=weight.base.data_ptr(),
        rest=None if rest is None else rest.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        parts=parts.data_ptr(),
        meetings=meetings.data_ptr(),
        num_tokens=x.shape[0],
        num_rows=weight.shape[0],
        num_row_tiles=row_tiles,
        num_col_tiles=col_tiles,
        num_token_blocks=one.token_blocks,
        num_ranges=one.ranges,
        num_x=one.num_x,
        num_w=one.num_w,
        bias_kind=0 if bias is None else 1 if bias.dtype is torch.bfloat16 else 2,
        out_is_float=int(out.dtype is torch.float32),
    )
    one.kernel.launch(
        (one.grid,),
        THREADS,
        [tensor_map(x, (one.tokens // one.cluster, 64)), problem],
        smem=one.smem,
        cluster=one.cluster,
    )
