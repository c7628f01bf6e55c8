"""Launches of direct.cu: generated rows, 8 or 16 at a time."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qspec_llm.kernels.cuda.compile import Kernel, architecture, kernel
from qspec_llm.kernels.cuda.form import RANGES, Form, Product
from qspec_llm.kernels.cuda.layout import TILE_COLS, TILE_ROWS

__all__ = [
    "Cut",
    "Device",
    "Tuning",
    "cut",
    "instance",
    "multiply",
    "sharers",
    "tuning",
]

WIDEST = 2  # tiles of 8 tokens
MOST_BUFFERS = 8  # of x, a warp
RESERVED = 1 << 10  # bytes of shared memory that the system keeps of every block
MULTICASTS = ("sm_90a", "sm_100")  # where one copy reaches several blocks at full speed
LEAST_SHARED = 3  # rows of x from which on two blocks share the loading of them


@dataclass(frozen=True)
class Tuning:
    """What may differ between instances without changing any sum.

    Attributes:
        rows: tiles of 16 rows a block computes at a time.
        depth: tiles of weights that a warp has on their way.
        blocks: most blocks that share a multiprocessor, which bounds registers.
        lead: those of `depth` that are on their way before earlier kernels have ended.
        piece: most tiles of x that arrive at a time.
    """

    rows: int
    depth: int
    blocks: int
    lead: int
    piece: int = 4


MANY_ROW_TILES = 4096  # of an LM head: more than any other matrix has


def tuning(form: Form, token_tiles: int, row_tiles: int) -> Tuning:
    """The measured best (docs/gpu-notes.md).

    In a chain of kernels a block that fills the registers of a multiprocessor was faster than
    several smaller ones, which share it unevenly with those of the next kernel; a long matrix is
    faster with more warps.
    """
    if token_tiles > 1:
        return Tuning(rows=2, depth=2, blocks=1, lead=2)
    if form.rest_bytes or form.bits == 0:
        return Tuning(rows=1, depth=2, blocks=1, lead=2)
    if row_tiles > MANY_ROW_TILES:
        if form.act == 8:
            return Tuning(rows=1, depth=4, blocks=2, lead=4)
        return Tuning(rows=2, depth=2, blocks=2, lead=2)
    return Tuning(rows=2, depth=4, blocks=1, lead=4)


@dataclass(frozen=True)
class Device:
    """What a cut depends on: multiprocessors, bytes of shared memory, copies to several blocks."""

    multiprocessors: int
    smem_per_sm: int
    smem_per_block: int
    has_multicast: bool = False


@cache
def _device(index: int) -> Device:
    found: Any = torch.cuda.get_device_properties(index)
    return Device(
        found.multi_processor_count,
        found.shared_memory_per_multiprocessor,
        found.shared_memory_per_block_optin,
        architecture(index) in MULTICASTS,
    )


@dataclass(frozen=True)
class Cut:
    """How a product is laid over a device.

    Attributes:
        grid: blocks.
        piece: tiles of x in a buffer.
        buffers: of a warp.
        keeps_x: there is a buffer for every piece.
        smem: bytes a block.
    """

    grid: int
    piece: int
    buffers: int
    keeps_x: bool
    smem: int


@cache
def cut(
    form: Form, chosen: Tuning, tokens: int, row_tiles: int, col_tiles: int, device: Device
) -> Cut | None:
    """Blocks of equal work on every multiprocessor, and as much x at hand as there is room for.

    None: there is no room for any.

    Args:
        form: of the weights.
        chosen: the instance.
        tokens: rows of x that a block reads, up to 16.
        row_tiles: tiles of 16 rows of the matrix.
        col_tiles: tiles of 128 columns.
        device: what it runs on.
    """
    num_blocks = math.ceil(row_tiles / chosen.rows)
    token_tiles = math.ceil(tokens / 8)
    sums = 2 * RANGES * chosen.rows * TILE_ROWS * (token_tiles * 8 + 1) * 4
    barriers = RANGES * MOST_BUFFERS * 8
    meta = 0 if form.act == 16 else TILE_COLS // form.act_group * token_tiles * 64
    most = math.ceil(col_tiles / RANGES)

    def buffer_bytes(piece: int) -> int:
        return RANGES * (tokens * (piece * TILE_COLS * form.act // 8 + 16) + piece * meta)

    def room(blocks: int) -> int:
        per_block = min(device.smem_per_block, device.smem_per_sm // blocks - RESERVED)
        return per_block - sums - barriers

    def cost(blocks: int) -> float:
        # few blocks hide less of the memory's latency
        return math.ceil(num_blocks / (device.multiprocessors * blocks)) * (blocks + 0.25)

    fitting = [b for b in range(1, chosen.blocks + 1) if buffer_bytes(1) <= room(b)]
    if not fitting:
        return None
    blocks = min(fitting, key=cost)
    pieces = math.ceil(most / min(most, chosen.piece))
    piece = math.ceil(most / pieces)
    while piece > 1 and buffer_bytes(piece) * min(2, math.ceil(most / piece)) > room(blocks):
        piece -= 1
    pieces = math.ceil(most / piece)
    buffers = min(pieces, room(blocks) // buffer_bytes(piece), MOST_BUFFERS)
    return Cut(
        grid=min(num_blocks, device.multiprocessors * blocks),
        piece=piece,
        buffers=buffers,
        keeps_x=buffers == pieces,
        smem=sums + barriers + buffers * buffer_bytes(piece),
    )


def sharers(laid: Cut, tokens: int, device: Device) -> int:
    """Neighbouring blocks that load x together, as a cluster: 1 or 2.

    In pairs every block has rows to compute, so that it lasts as long as what is copied into it.

    Args:
        laid: the cut.
        tokens: rows of x that a block reads.
        device: what it runs on.
    """
    return 2 if device.has_multicast and tokens >= LEAST_SHARED and laid.grid % 2 == 0 else 1


class _Problem(ctypes.Structure):
    """direct.cu's Problem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "meta", "base", "rest", "bias", "out")),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "num_rows", "num_cols", "num_row_tiles", "num_col_tiles", "pitch",
            "num_blocks", "piece", "num_buffers", "keeps_x", "bias_kind", "out_is_float",
        )),
    )  # fmt: skip


@cache
def instance(form: Form, token_tiles: int, chosen: Tuning, cluster: int = 1) -> Kernel:
    """The kernel for tiles of 8 tokens, and for clusters of as many blocks."""
    return kernel(
        "direct.cu",
        "direct",
        **form.defines(),
        NT=token_tiles,
        RT=chosen.rows,
        DEPTH=chosen.depth,
        LEAD=chosen.lead,
        BLOCKS=chosen.blocks,
        CLUSTER=cluster,
    )


def multiply(product: Product, chosen: Tuning | None = None) -> None:
    """Compute a product; `chosen` is an instance other than the measured best."""
    num_tokens, num_cols = product.values.shape
    row_tiles, col_tiles = product.weight.base.shape[:2]
    token_tiles = min(math.ceil(num_tokens / 8), WIDEST)
    tuned = chosen or tuning(product.form, token_tiles, row_tiles)
    tokens = min(num_tokens, 8 * token_tiles)
    device = _device(product.out.device.index)
    laid = cut(product.form, tuned, tokens, row_tiles, col_tiles, device)
    assert laid is not None, "two tiles of tokens fit into the smallest shared memory"
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
        keeps_x=int(laid.keeps_x),
        bias_kind=product.bias_kind,
        out_is_float=int(product.out.dtype is torch.float32),
    )
    grid = (laid.grid, math.ceil(num_tokens / (8 * token_tiles)))
    cluster = sharers(laid, tokens, device)
    function = instance(product.form, token_tiles, tuned, cluster)
    function.launch(grid, RANGES * 32, [problem], smem=laid.smem, cluster=cluster, pdl=product.pdl)
