"""Launches of wide.cu: many generated rows, up to 160 at a time, on Hopper.

The workspace in which blocks leave the sums of ranges belongs to the device: products of one device
are launched on one stream at a time, or in graphs that are replayed so.
"""

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.kernels.cuda.compile import Kernel, kernel, num_multiprocessors, tensor_map
from qspec_llm.kernels.cuda.form import RANGES, Form, Product
from qspec_llm.kernels.cuda.layout import TILE_COLS

__all__ = [
    "LEAST_TOKENS",
    "MAX_TOKENS",
    "Instance",
    "Tuning",
    "blocks_of",
    "can_run",
    "groups_of",
    "instance",
    "multiply",
    "tiles_of",
    "tuning",
]

LEAST_TOKENS = 17  # it computes fewer too, for which split.cu is asked first
MAX_TOKENS = 128  # of a block; more are cut into equal blocks
WIDEST = 20  # tiles of 8 tokens that a block can hold of bf16, where its registers suffice
MAX_STAGES = 32
LEAST_STAGES = 2  # of x: a tile is fetched when the one two before it has been read
SMEM = (227 << 10) - 1024 - 1536  # of a block, less alignment and what is not dynamic
WORKSPACE_BYTES = 64 << 20
WORKSPACE_COUNTERS = 4096
MAX_WARPS = 16  # of a thread block
LEAST_PASSED = 7  # units of a thread block from which on no rows are shared by three


@dataclass(frozen=True)
class Tuning:
    """What may differ between instances without changing any sum.

    Attributes:
        groups: warpgroups, 64 rows each: 2, 3 or 4.
        units: most of a thread block; None lets `blocks_of` choose.
        stages: most tiles of x in shared memory.
        tiles: of 8 tokens in a block; None lets `tiles_of` choose.
    """

    groups: int
    units: int | None = None
    stages: int = MAX_STAGES
    tiles: int | None = None


def _is_shifted(form: Form) -> bool:
    """Whether sums of x take as many registers as the products."""
    return form.act == 16 and form.bits in (4, 8) and (form.has_offset or form.has_middle)


def tiles_of(form: Form, num_tokens: int) -> int:
    """Tiles of 8 tokens of a block: the products' widths that bf16 and integers have."""
    has_registers = form.act == 16 and form.bits in (4, 16) and not _is_shifted(form)
    if has_registers and MAX_TOKENS < num_tokens <= 8 * WIDEST:
        return WIDEST  # one block takes 0.8 to 0.9 of the time of two
    widths = (4, 5, 6, 8, 10, 12, 16) if form.act == 16 else (4, 6, 8, 12, 16)
    share = math.ceil(num_tokens / math.ceil(num_tokens / MAX_TOKENS))
    return next(tiles for tiles in widths if 8 * tiles >= share)


def tuning(form: Form, token_tiles: int, row_tiles: int, col_tiles: int, device: int) -> Tuning:
    """The measured best (docs/gpu-notes.md, item 9 of wide.cu), for a matrix of so many tiles.

    However many blocks of tokens there are, so that the self-check meets every instance.
    """
    slots = num_multiprocessors(device)

    def cost(groups: int) -> float:
        num_units = math.ceil(row_tiles / (4 * groups)) * RANGES
        blocks = blocks_of(num_units, col_tiles, slots)
        return _cost(blocks, num_units, col_tiles, slots) * _slowdown(groups, token_tiles)

    return Tuning(groups=min(groups_of(form, token_tiles), key=cost))


def groups_of(form: Form, token_tiles: int) -> tuple[int, ...]:
    """Numbers of warpgroups that may be fastest: whose registers suffice, or nearly."""
    has_ones = form.act == 8 and form.group < form.act_group and token_tiles > 4
    if _is_shifted(form) or has_ones or token_tiles > 16:
        return (2,)
    if token_tiles <= 8:
        return (4, 3, 2)
    if form.bits in (0, 16):
        return (4, 3, 2) if token_tiles < 16 else (3, 2)
    if token_tiles == 16:
        return (3, 2) if form.act == 8 and form.act_group == 128 else (2,)
    return (2,) if form.bits == 8 else (3, 2)


def _slowdown(groups: int, token_tiles: int) -> float:
    """Of a tile, as long as more warpgroups share a multiprocessor: most where tokens are many."""
    return {2: 1.0, 3: 1.15, 4: 1.3 if token_tiles <= 8 else 1.6}[groups]


def can_run(num_tokens: int, device: int) -> bool:
    """Whether to use `multiply`: rows enough and warpgroup products."""
    return num_tokens >= LEAST_TOKENS and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def blocks_of(num_units: int, num_col_tiles: int, slots: int) -> int:
    """Thread blocks among which units are dealt out: with which the busiest is done first.

    Args:
        num_units: ranges of blocks of rows, of one block of tokens.
        num_col_tiles: tiles of 128 columns.
        slots: thread blocks that run at once.
    """
    shares = [math.ceil(num_units / units) for units in range(1, RANGES + 1)]
    passing = min(slots, num_units // LEAST_PASSED)
    return min(
        [*reversed(shares), passing] if passing else shares,
        key=lambda blocks: _cost(blocks, num_units, num_col_tiles, slots),
    )


def _cost(num_blocks: int, num_units: int, num_col_tiles: int, slots: int) -> float:
    """Time of so many thread blocks, in tiles of columns.

    A thread block costs about the time of two tiles besides its own. Where it shares rows, it
    costs one more if it has so many units that totals pass from one to the next, and else six:
    sums go through the L2 and everyone waits for everyone.
    """
    units = math.ceil(num_units / num_blocks)
    shares = num_blocks * RANGES != num_units
    sharing = (1 if _passes(num_units, num_blocks) else 6) if shares else 0
    turns = math.ceil(num_blocks / slots)
    return turns * (num_col_tiles * units / RANGES + 2) + sharing


def _passes(num_units: int, num_blocks: int) -> bool:
    return num_units // num_blocks >= LEAST_PASSED


class _Problem(ctypes.Structure):
    """wide.cu's Problem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "meta", "base", "rest", "bias", "out", "parts", "arrivals", "flags",
        )),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "num_rows", "num_row_tiles", "num_col_tiles", "num_row_blocks", "pitch",
            "num_stages", "units", "num_longer", "passes", "bias_kind", "out_is_float",
        )),
    )  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """One kernel and how it is launched for one matrix."""

    kernel: Kernel
    grid: tuple[int, int]
    threads: int
    num_row_blocks: int
    num_stages: int
    passes: bool
    smem: int
    box: tuple[int, int]


@functools.cache
def instance(
    form: Form, row_tiles: int, col_tiles: int, num_tokens: int, device: int, chosen: Tuning | None
) -> Instance:
    """The kernel and its launch for a matrix of so many tiles; `chosen` as in `multiply`."""
    token_tiles = (chosen and chosen.tiles) or tiles_of(form, num_tokens)
    tokens = token_tiles * 8
    token_blocks = math.ceil(num_tokens / tokens)
    tuned = chosen or tuning(form, token_tiles, row_tiles, col_tiles, device)
    threads = tuned.groups * 128
    row_blocks = math.ceil(row_tiles / (4 * tuned.groups))
    sums = threads * token_tiles * 16  # bytes of a range of a block of rows
    places = row_blocks * token_blocks
    num_units = row_blocks * RANGES
    slots = max(1, num_multiprocessors(device) // token_blocks)
    num_blocks = blocks_of(num_units, col_tiles, slots)
    if tuned.units:
        num_blocks = math.ceil(num_units / tuned.units)
    if col_tiles < RANGES:  # there are empty ranges: a thread block must not have these alone
        num_blocks = row_blocks
    passes = _passes(num_units, num_blocks)
    room = places * sums * (1 if passes else RANGES)
    if places > WORKSPACE_COUNTERS or room > WORKSPACE_BYTES:
        num_blocks, passes = row_blocks, True  # nothing is shared
    stage = tokens * TILE_COLS * form.act // 8
    if form.act == 8:
        stage += TILE_COLS // form.act_group * tokens * 8
    num_stages = min((SMEM - sums) // stage, tuned.stages)
    return Instance(
        kernel=kernel(
            "wide.cu",
            "wide",
            **form.defines(),
            NT=token_tiles,
            WGS=tuned.groups,
            RANGES=RANGES,
        ),
        grid=(num_blocks, token_blocks),
        threads=threads,
        num_row_blocks=row_blocks,
        num_stages=num_stages,
        passes=passes,
        smem=1024 + num_stages * stage + sums,
        box=(tokens, 128 if form.act == 8 else 64),
    )


@functools.cache
def _workspace(device: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where blocks of the same rows leave sums for each other, and count and flag them."""
    where = torch.device("cuda", device)
    parts = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=where)
    arrivals = torch.zeros(WORKSPACE_COUNTERS, dtype=torch.int32, device=where)
    flags = torch.zeros(WORKSPACE_COUNTERS * MAX_WARPS, dtype=torch.int32, device=where)
    return parts, arrivals, flags


def multiply(product: Product, chosen: Tuning | None = None) -> None:
    """Compute a product; `chosen` is an instance other than the measured best."""
    num_tokens = product.values.shape[0]
    row_tiles, col_tiles = product.weight.base.shape[:2]
    device = product.weight.base.device.index
    one = instance(product.form, row_tiles, col_tiles, num_tokens, device, chosen)
    assert one.num_stages >= LEAST_STAGES, f"there is no room for x beside {chosen}"
    rest, bias, meta = product.rest, product.bias, product.meta
    parts, arrivals, flags = _workspace(device)
    problem = _Problem(
        meta=None if meta is None else meta.data_ptr(),
        base=product.weight.base.data_ptr(),
        rest=None if rest is None else rest.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=product.out.data_ptr(),
        parts=parts.data_ptr(),
        arrivals=arrivals.data_ptr(),
        flags=flags.data_ptr(),
        num_tokens=num_tokens,
        num_rows=product.weight.shape[0],
        num_row_tiles=row_tiles,
        num_col_tiles=col_tiles,
        pitch=0 if meta is None else meta.shape[1],
        num_row_blocks=one.num_row_blocks,
        units=one.num_row_blocks * RANGES // one.grid[0],
        num_longer=one.num_row_blocks * RANGES % one.grid[0],
        num_stages=one.num_stages,
        passes=int(one.passes),
        bias_kind=product.bias_kind,
        out_is_float=int(product.out.dtype is torch.float32),
    )
    one.kernel.launch(
        one.grid,
        one.threads,
        [tensor_map(product.values, one.box), problem],
        smem=one.smem,
        pdl=product.pdl,
    )
