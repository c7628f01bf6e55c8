"""Launches of split.cu: generated rows, several tiles of 8 at a time, on Hopper."""

import ctypes
import functools
import math
from dataclasses import dataclass, replace

import torch

from qspec_llm.kernels.cuda.compile import Kernel, kernel, num_multiprocessors, tensor_map
from qspec_llm.kernels.cuda.form import RANGES, Form, Product
from qspec_llm.kernels.cuda.layout import TILE_COLS, TILE_ROWS

__all__ = [
    "LEAST_TOKENS",
    "MAX_TOKENS",
    "Cut",
    "Tuning",
    "can_run",
    "cut",
    "instance",
    "instances",
    "most_tokens",
    "multiply",
    "tuning",
]

LEAST_TOKENS = 2  # one is faster in direct.cu
MAX_TOKENS = 64  # of any form; beyond its own, wide.cu reads x less often
SMEM = 227 << 10  # of a block
LEAST_SLOTS = 3  # of a ring, of which one waits for its last reader


@dataclass(frozen=True)
class Tuning:
    """What may differ between instances without changing any sum.

    Attributes:
        rows: tiles of 16 rows that a warp multiplies at a time.
        depth: tiles of weights that a warp has on their way.
        teams: warps of a block that read the same x.
        split: blocks of a cluster, which share the columns: 1, 2, 4 or 8.
        lead: those of `depth` that are on their way before earlier kernels have ended.
        piece: most tiles of x that arrive at a time.
    """

    rows: int
    depth: int
    teams: int
    split: int
    lead: int = 1
    piece: int = 4


LEAST_BUSY = 0.8  # of the warps' time, below which the other instance is better


def instances(form: Form, token_tiles: int) -> tuple[Tuning, Tuning]:
    """The measured best (docs/gpu-notes.md): that of most matrices, and another one beside it.

    Args:
        form: of the weights.
        token_tiles: tiles of 8 rows of x.
    """
    if form.bits == 4 and token_tiles == 1:
        other = Tuning(rows=1, depth=2, lead=2, teams=2, split=1)
        depth = 2 if form.act == 8 else 1
        return replace(other, rows=2, depth=depth, lead=depth), other
    return _of_drafts(form, token_tiles) if form.act == 8 else _of_targets(form, token_tiles)


def _of_drafts(form: Form, token_tiles: int) -> tuple[Tuning, Tuning]:
    is_light = form.bits == 4
    # few scales need few registers, and little room
    is_lean = is_light and form.act_group == TILE_COLS
    if token_tiles <= (6 if is_lean else 4):  # x has room in one block
        depth = 2 if is_light and token_tiles <= (4 if is_lean else 3) else 1
        usual = Tuning(rows=1, depth=depth, lead=depth, teams=2, split=1)
        return usual, Tuning(rows=2 if is_light else 1, depth=1, teams=3, split=2)
    usual = Tuning(rows=2, depth=1, teams=2, split=2)
    return usual, replace(usual, teams=3) if token_tiles <= 5 else replace(usual, rows=1, teams=3)


def _of_targets(form: Form, token_tiles: int) -> tuple[Tuning, Tuning]:
    is_light = form.bits == 4
    usual = Tuning(rows=1, depth=1, teams=4, split=2)
    if token_tiles <= 3:  # x has room in one block
        depth = 2 if is_light else 1
        usual = Tuning(rows=1, depth=depth, lead=depth, teams=2, split=1)
    rows = 2 if is_light and token_tiles <= 4 else 1
    return usual, Tuning(rows=rows, depth=1, teams=3, split=2)


@functools.cache
def tuning(form: Form, token_tiles: int, row_tiles: int, multiprocessors: int) -> Tuning:
    """Which of the instances: as panels divide among its teams.

    Args:
        form: of the weights.
        token_tiles: tiles of 8 rows of x.
        row_tiles: tiles of 16 rows of the matrix.
        multiprocessors: of the device.
    """

    def busy(chosen: Tuning) -> float:
        panels = math.ceil(row_tiles / chosen.rows)
        at_once = max(1, multiprocessors // chosen.split) * chosen.teams
        return panels / (math.ceil(panels / at_once) * at_once)

    usual, other = instances(form, token_tiles)
    return usual if busy(usual) >= min(LEAST_BUSY, busy(other)) else other


@dataclass(frozen=True)
class Cut:
    """How a product is laid over blocks.

    Attributes:
        piece: tiles of x in a slot.
        slots: of a range.
        keeps_x: there is a slot for every piece.
        sum_buffers: of a team.
        inboxes: of a team.
        smem: bytes a block.
    """

    piece: int
    slots: int
    keeps_x: bool
    sum_buffers: int
    inboxes: int
    smem: int


@functools.cache
def cut(form: Form, chosen: Tuning, token_tiles: int, col_tiles: int) -> Cut | None:
    """As much x at hand as there is room for; None: there is no room for any.

    Args:
        form: of the weights.
        chosen: the instance.
        token_tiles: tiles of 8 rows of x.
        col_tiles: tiles of 128 columns.
    """
    size = RANGES // chosen.split
    tile = token_tiles * 8 * TILE_COLS * form.act // 8  # bytes of x
    if form.act == 8:
        tile += TILE_COLS // form.act_group * token_tiles * 64
    panel = chosen.rows * TILE_ROWS * token_tiles * 8 * 4
    sums = chosen.teams * size * panel
    box = chosen.teams * panel if chosen.split > 1 else 0
    most = math.ceil(col_tiles / RANGES)

    def laid(sum_buffers: int, inboxes: int, piece: int, slots: int) -> Cut:
        barriers = 2 * 8 * (size * slots + chosen.teams * inboxes)
        return Cut(
            piece=piece,
            slots=slots,
            keeps_x=slots == math.ceil(most / piece),
            sum_buffers=sum_buffers,
            inboxes=inboxes,
            smem=size * slots * piece * tile + sum_buffers * sums + inboxes * box + barriers,
        )

    piece = math.ceil(most / math.ceil(most / chosen.piece))
    buffers = [(2, 2), (1, 2), (1, 1)]
    for sum_buffers, inboxes in buffers:
        kept = laid(sum_buffers, inboxes, piece, math.ceil(most / piece))
        if kept.smem <= SMEM:
            return kept
    for sum_buffers, inboxes in buffers:
        for smaller in range(piece, 0, -1):
            fitting = [laid(sum_buffers, inboxes, smaller, n) for n in range(LEAST_SLOTS, 9)]
            fitting = [one for one in fitting if one.smem <= SMEM]
            if fitting:
                return fitting[-1]
    return None


class _Problem(ctypes.Structure):
    """split.cu's Problem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("meta", "base", "rest", "bias", "out")),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "num_rows", "num_row_tiles", "num_col_tiles", "pitch", "num_panels",
            "piece", "num_slots", "keeps_x", "bias_kind", "out_is_float",
        )),
    )  # fmt: skip


@functools.cache
def instance(form: Form, token_tiles: int, chosen: Tuning, laid: Cut) -> Kernel:
    """The kernel for tiles of 8 tokens."""
    return kernel(
        "split.cu",
        "split",
        **form.defines(),
        NT=token_tiles,
        RT=chosen.rows,
        DEPTH=chosen.depth,
        LEAD=min(chosen.lead, chosen.depth),
        TEAMS=chosen.teams,
        SPLIT=chosen.split,
        SUM_BUFFERS=laid.sum_buffers,
        INBOXES=laid.inboxes,
    )


@functools.cache
def _slots(form: Form, token_tiles: int, chosen: Tuning, laid: Cut, device: int) -> int:
    """Clusters that run at a time."""
    if chosen.split == 1:
        return num_multiprocessors(device)
    function = instance(form, token_tiles, chosen, laid)
    return function.max_active_clusters(chosen.split, _threads(chosen), laid.smem)


def _threads(chosen: Tuning) -> int:
    return 32 * chosen.teams * RANGES // chosen.split


def most_tokens(form: Form) -> int:
    """Rows of x up to which this was measured to be faster than wide.cu."""
    if form.act == 8 and form.bits == 4 and not (form.has_offset or form.has_middle):
        return MAX_TOKENS
    return 48 if form.act == 16 and form.bits == 16 else 40


def can_run(form: Form, num_tokens: int, device: int) -> bool:
    """Whether to use `multiply`: a few rows, on Hopper."""
    is_few = LEAST_TOKENS <= num_tokens <= most_tokens(form)
    return is_few and torch.cuda.get_device_capability(device) == (9, 0)


def multiply(product: Product, chosen: Tuning | None = None) -> None:
    """Compute a product; `chosen` is an instance other than the measured best."""
    num_tokens = product.values.shape[0]
    most = MAX_TOKENS if chosen else most_tokens(product.form)
    assert num_tokens <= most, f"{num_tokens} rows of x are for wide.cu"
    row_tiles, col_tiles = product.weight.base.shape[:2]
    token_tiles = math.ceil(num_tokens / 8)
    device = product.out.device.index
    tuned = chosen or tuning(product.form, token_tiles, row_tiles, num_multiprocessors(device))
    laid = cut(product.form, tuned, token_tiles, col_tiles)
    assert laid is not None, "there is no room for a piece of x"
    function = instance(product.form, token_tiles, tuned, laid)
    panels = math.ceil(row_tiles / tuned.rows)
    slots = _slots(product.form, token_tiles, tuned, laid, device)
    clusters = min(math.ceil(panels / tuned.teams), max(1, slots))
    rest, bias, meta = product.rest, product.bias, product.meta
    problem = _Problem(
        meta=None if meta is None else meta.data_ptr(),
        base=product.weight.base.data_ptr(),
        rest=None if rest is None else rest.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=product.out.data_ptr(),
        num_tokens=num_tokens,
        num_rows=product.weight.shape[0],
        num_row_tiles=row_tiles,
        num_col_tiles=col_tiles,
        pitch=0 if meta is None else meta.shape[1],
        num_panels=panels,
        piece=laid.piece,
        num_slots=laid.slots,
        keeps_x=int(laid.keeps_x),
        bias_kind=product.bias_kind,
        out_is_float=int(product.out.dtype is torch.float32),
    )
    # boxes of no more rows than there are: the copy engine is slow to fill up with zeros
    box = (num_tokens, TILE_COLS if product.form.act == 8 else TILE_COLS // 2)
    function.launch(
        (clusters * tuned.split,),
        _threads(tuned),
        [tensor_map(product.values, box), problem],
        smem=laid.smem,
        cluster=tuned.split,
        pdl=product.pdl,
    )
