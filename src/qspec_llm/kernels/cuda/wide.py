"""Launches of wide.cu: generated rows from 17 on, up to 128 at a time, on Hopper.

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
from qspec_llm.kernels.cuda.form import Form, Product
from qspec_llm.kernels.cuda.layout import TILE_COLS

__all__ = ["LEAST_TOKENS", "MAX_TOKENS", "Tuning", "can_run", "multiply", "tuning", "units_of"]

LEAST_TOKENS = 17  # below, direct.cu reads the same bytes with less ado
MAX_TOKENS = 128  # of a block; more are cut into blocks of so many
RANGES = 8  # of columns: direct.cu sums in the same ones
MAX_STAGES = 32
SMEM = (227 << 10) - 1024 - 16 * MAX_STAGES  # of a block, less alignment and barriers
WORKSPACE_BYTES = 64 << 20
WORKSPACE_COUNTERS = 4096


@dataclass(frozen=True)
class Tuning:
    """What may differ between instances without changing any sum.

    Attributes:
        groups: warpgroups, 64 rows each: 2, 3 or 4.
        units: of a thread block; None lets `units_of` choose.
        stages: most tiles of x in shared memory.
    """

    groups: int
    units: int | None = None
    stages: int = MAX_STAGES


def tuning(form: Form, token_tiles: int) -> Tuning:
    """The measured best (docs/gpu-notes.md)."""
    is_shifted = form.act == 16 and form.bits in (4, 8) and (form.has_offset or form.has_middle)
    if token_tiles > 8 or is_shifted:  # sums of x take as many registers as the products
        return Tuning(groups=2)
    return Tuning(groups=4)


def can_run(form: Form, num_tokens: int, device: int) -> bool:
    """Whether to use `multiply`: rows enough, warpgroup products, a form that it was run with.

    The other forms compile and have tests (tests/kernels/test_cuda_wide.py) that have not been run.
    """
    has_run = form.group >= 64 and form.act_group == 64 and form.bits in (4, 16)
    has_run = has_run and not (form.has_offset or form.has_middle or form.is_half)
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return num_tokens >= LEAST_TOKENS and is_hopper and has_run


@functools.cache
def units_of(num_units: int, num_col_tiles: int, slots: int) -> int:
    """How many units a thread block takes: with which the busiest multiprocessor is done first.

    A thread block costs about the time of two tiles of columns besides its own, and of six more
    where it shares rows: sums go through the L2 and everyone waits for everyone (measured on
    gate_up, where even shares for 128 multiprocessors lost to whole blocks of rows on 112).

    Args:
        num_units: ranges of blocks of rows, of one block of tokens.
        num_col_tiles: tiles of 128 columns.
        slots: thread blocks that run at once.
    """

    def cost(units: int) -> float:
        turns = math.ceil(math.ceil(num_units / units) / slots)
        return turns * (num_col_tiles * units / RANGES + 2) + 6 * (units < RANGES)

    return min(range(1, RANGES + 1), key=cost)


class _Problem(ctypes.Structure):
    """wide.cu's Problem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "meta", "base", "rest", "bias", "out", "parts", "arrivals",
        )),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "num_rows", "num_row_tiles", "num_col_tiles", "pitch", "num_units",
            "num_stages", "bias_kind", "out_is_float",
        )),
    )  # fmt: skip


@dataclass(frozen=True)
class _Instance:
    """One kernel and how it is launched for one matrix."""

    kernel: Kernel
    grid: tuple[int, int]
    threads: int
    num_units: int
    num_stages: int
    smem: int
    box: tuple[int, int]


@functools.cache
def _instance(
    form: Form, row_tiles: int, col_tiles: int, num_tokens: int, device: int, chosen: Tuning | None
) -> _Instance:
    token_tiles = next(tiles for tiles in (4, 8, 16) if 8 * tiles >= min(num_tokens, MAX_TOKENS))
    tokens = token_tiles * 8
    tuned = chosen or tuning(form, token_tiles)
    threads = tuned.groups * 128
    row_blocks = math.ceil(row_tiles / (4 * tuned.groups))
    token_blocks = math.ceil(num_tokens / tokens)
    sums = threads * token_tiles * 16  # bytes of a range of a block of rows
    places = row_blocks * token_blocks
    fits = places <= WORKSPACE_COUNTERS and places * RANGES * sums <= WORKSPACE_BYTES
    slots = max(1, num_multiprocessors(device) // token_blocks)
    num_units = row_blocks * RANGES
    units = tuned.units or units_of(num_units, col_tiles, slots) if fits else RANGES
    num_blocks = math.ceil(num_units / units)
    stage = tokens * TILE_COLS * form.act // 8
    if form.act == 8:
        stage += TILE_COLS // form.act_group * tokens * 8
    num_stages = min((SMEM - sums) // stage, tuned.stages)
    return _Instance(
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
        num_units=num_units,
        num_stages=num_stages,
        smem=1024 + num_stages * stage + sums,
        box=(tokens, 128 if form.act == 8 else 64),
    )


@functools.cache
def _workspace(device: int) -> tuple[Tensor, Tensor]:
    """Where blocks of the same rows leave sums for each other, and count each other."""
    where = torch.device("cuda", device)
    parts = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=where)
    return parts, torch.zeros(WORKSPACE_COUNTERS, dtype=torch.int32, device=where)


def multiply(product: Product, chosen: Tuning | None = None) -> None:
    """Compute a product; `chosen` is an instance other than the measured best."""
    num_tokens = product.values.shape[0]
    row_tiles, col_tiles = product.weight.base.shape[:2]
    device = product.weight.base.device.index
    one = _instance(product.form, row_tiles, col_tiles, num_tokens, device, chosen)
    rest, bias, meta = product.rest, product.bias, product.meta
    parts, arrivals = _workspace(device)
    problem = _Problem(
        meta=None if meta is None else meta.data_ptr(),
        base=product.weight.base.data_ptr(),
        rest=None if rest is None else rest.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=product.out.data_ptr(),
        parts=parts.data_ptr(),
        arrivals=arrivals.data_ptr(),
        num_tokens=num_tokens,
        num_rows=product.weight.shape[0],
        num_row_tiles=row_tiles,
        num_col_tiles=col_tiles,
        pitch=0 if meta is None else meta.shape[1],
        num_units=one.num_units,
        num_stages=one.num_stages,
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
