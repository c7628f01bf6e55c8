"""Linears of the cuda backend: x times packed weights, and the activations' quantisation.

Two classes of kernels, each row independent in itself (kernels/__init__.py):

- Generated rows go through linear.cu. How a sum is put together depends on the matrix and the view
  alone (`plan`); the number of rows picks only the width of the instance.
- Prompt rows multiply with weights decoded to bf16, some rows of the matrix at a time so that they
  stay in the L2, through cuBLAS, in chunks of exactly `PROMPT_TILE` rows: at a fixed shape its
  reduction order is fixed.

Activations are bf16; sums are float32.
"""

import ctypes
import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import Rows
from qspec_llm.kernels.cuda.compile import Kernel, kernel, num_multiprocessors, tensor_map
from qspec_llm.kernels.cuda.layout import (
    DENSE_BYTES,
    TILE_COLS,
    TILE_ROWS,
    PackedDense,
    PackedMatrix,
    PackedPlain,
    PackedPlanes,
    tile_bytes,
)
from qspec_llm.weights.planes import Grid, PlaneSpec
from qspec_llm.weights.view import VERIFY, Activation, View

__all__ = [
    "MAX_TOKENS",
    "PROMPT_TILE",
    "Plan",
    "Quantized",
    "Tuning",
    "buffers",
    "can_run",
    "decoded",
    "embed",
    "linear",
    "padded_rows",
    "plan",
    "quantize",
    "read_memory",
    "tuning",
    "wants_integers",
]

MAX_TOKENS = 128  # tokens that one instance computes; more are cut into tiles of so many
PROMPT_TILE = 256
DECODED_WEIGHTS = 1 << 24  # decoded at a time for a prompt: 32 MiB, which the L2 keeps
GROUP_OF = {Activation.A8: 64, Activation.A4: 32}
TOP_OF = {Activation.A8: 127, Activation.A4: 7}
OUT_TYPES = (torch.bfloat16, torch.float32)
PLAIN_TILE = 8  # rows in which torch multiplies dense float32 and float16 matrices
SMEM_PER_BLOCK, SMEM_PER_SM, BARRIER_BYTES = 227 << 10, 228 << 10, 272


# ---- activations ---------------------------------------------------------------------------------


def padded_rows(num_rows: int) -> int:
    """Rows that the narrowest instance for `num_rows` reads: 8, 16, 32, 64 or a multiple of 128."""
    for size in (8, 16, 32, 64):
        if num_rows <= size:
            return size
    return -(-num_rows // MAX_TOKENS) * MAX_TOKENS


def activation_group(num_cols: int, activation: Activation) -> int:
    """Columns of x that share a scale."""
    group = GROUP_OF[activation]
    return group if num_cols % group == 0 else 32


@dataclass(frozen=True)
class Quantized:
    """Activations as integers, as linears of a draft read them.

    Attributes:
        codes: [R, K] int8; within every 16 columns the two halves of 8 are interleaved:
            stored[2 i] = code[i], stored[2 i + 1] = code[8 + i].
        meta: [groups, pitch, 2] int32: the bits of the float32 scale, and the sum of the codes, of
            every group of columns and row. Rows from R on hold anything, groups beyond K zeros.
        activation: a8 or a4.
        group: columns that share a scale.
    """

    codes: Tensor
    meta: Tensor
    activation: Activation
    group: int

    @classmethod
    def empty(
        cls, num_rows: int, num_cols: int, activation: Activation, device: torch.device
    ) -> "Quantized":
        """Room for R rows of K columns, for a kernel to fill."""
        group = activation_group(num_cols, activation)
        num_groups = -(-num_cols // TILE_COLS) * TILE_COLS // group
        make = torch.empty if num_cols % TILE_COLS == 0 else torch.zeros
        codes = torch.empty(num_rows, num_cols, dtype=torch.int8, device=device)
        meta = make(num_groups, padded_rows(num_rows), 2, dtype=torch.int32, device=device)
        return cls(codes, meta, activation, group)

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""
        return self.codes.shape


def quantize(x: Tensor, activation: Activation, *, pdl: bool = False) -> Quantized:
    """x [R, K] bf16 or float32 as integers: those of `reference.quantize_activations`."""
    _check_rows(x, (torch.bfloat16, torch.float32))
    num_rows, num_cols = x.shape
    if num_cols % 32:
        raise QSpecError(f"{num_cols} columns do not divide into groups of 32 activations")
    out = Quantized.empty(num_rows, num_cols, activation, x.device)
    if num_rows == 0:
        return out
    num_groups = num_cols // out.group
    function = kernel(
        "activations.cu",
        "quantize",
        TOP=TOP_OF[activation],
        ACT_GROUP=out.group,
        X_FLOAT=int(x.dtype is torch.float32),
    )
    args = [x, out.codes, out.meta, num_cols, out.meta.shape[1], num_groups]
    function.launch((-(-num_groups // 8), num_rows), 256, args, pdl=pdl)
    return out


# ---- which instance, and how the work is cut -----------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A tensor as one view reads it: the parameters of tile.cuh, and the bytes of a tile."""

    bits: int
    group: int = 128
    is_signed: bool = True
    has_offset: bool = False
    has_middle: bool = False
    is_half: bool = False
    act: int = 16
    act_group: int = 64
    base_bytes: int = DENSE_BYTES
    rest_bytes: int = 0

    @property
    def has_warpgroups(self) -> bool:
        """Whether linear.cu has this form for warpgroups: those that need no sums of x."""
        needs_sums = self.group < self.act_group if self.act == 8 else self.has_shift
        return not needs_sums

    @property
    def has_shift(self) -> bool:
        """Whether the weight is more than a level times a scale."""
        return self.has_offset or self.has_middle

    def defines(self) -> dict[str, int]:
        """Macros."""
        return {
            "BITS": self.bits,
            "GROUP": self.group,
            "SIGNED": int(self.is_signed),
            "OFFSET": int(self.has_offset),
            "MIDDLE": int(self.has_middle),
            "SCALE_HALF": int(self.is_half),
            "ACT": self.act,
            "ACT_GROUP": self.act_group,
        }


@functools.cache
def _form(spec: PlaneSpec | None, view: View, act_group: int) -> Form:
    """How `view` reads a tensor of `spec` (None: a dense one)."""
    if spec is None:
        return Form(bits=0)
    bits = spec.draft_bits if view.is_draft else spec.bits
    base_bytes, rest_bytes = tile_bytes(spec)
    return Form(
        bits=bits,
        group=spec.group,
        is_signed=spec.grid is Grid.SIGNED,
        has_offset=spec.has_offset,
        has_middle=spec.grid is Grid.AFFINE and bits == 4 and spec.bits == 8,
        is_half=spec.scale_dtype is torch.float16,
        act=16 if view.activation is Activation.A16 else 8,
        act_group=act_group,
        base_bytes=base_bytes,
        rest_bytes=0 if bits == 4 else rest_bytes,
    )


@dataclass(frozen=True)
class Plan:
    """How a matrix is cut: `panels` of 16 rows a block, columns in `splits` ranges of one cluster.

    The order of every sum follows from `splits`, which never depends on the rows of x.
    """

    panels: int
    splits: int


# Share of the multiprocessors that clusters of a size can fill: a cluster stays within one part of
# the chip, and the parts of an H200 are no multiples of 4 (cuOccupancyMaxActiveClusters).
CLUSTER_SHARE = {1: 1.0, 2: 1.0, 4: 120 / 132, 8: 120 / 132}
MOST_PANELS = 28  # of a block: one a warp, and one warp that feeds
STAGE_BYTES = 60 << 10  # of weights: three stages must fit


def _slots(multiprocessors: int, splits: int) -> int:
    """Clusters of that size that run at once, one block to a multiprocessor."""
    return max(1, int(multiprocessors * CLUSTER_SHARE[splits]) // splits)


@functools.cache
def plan(
    num_row_tiles: int,
    num_col_tiles: int,
    tile: int,
    multiprocessors: int,
    has_clusters: bool,
    most: int = MOST_PANELS,
) -> Plan:
    """The cut with which the busiest multiprocessor is done first.

    A column of a block takes as long as its panels and three more for x, and at least as long as
    one warp takes for one tile, about 16 panels' share of a multiprocessor. A range costs its part
    of a cluster's exchange as well, a tenth of a column.

    Args:
        num_row_tiles: tiles of 16 rows.
        num_col_tiles: tiles of 128 columns.
        tile: bytes of a tile in this view.
        multiprocessors: of the device.
        has_clusters: whether blocks can write into each other's shared memory.
        most: most panels a block; only the panels depend on it.
    """
    widest = min(MOST_PANELS, STAGE_BYTES // tile // 2 * 2)

    def turns(panels: int, splits: int) -> int:
        return math.ceil(math.ceil(num_row_tiles / panels) / _slots(multiprocessors, splits))

    def cost(panels: int, splits: int) -> float:
        cols = math.ceil(num_col_tiles / splits) + 0.1 * splits
        return turns(panels, splits) * (max(panels, min(widest, 16)) + 3) * cols

    choices = [s for s in ((1, 2, 4, 8) if has_clusters else (1,)) if s <= num_col_tiles]
    widths = range(widest, 0, -2)
    splits = min(choices, key=lambda s: min(cost(panels, s) for panels in widths))
    fitting = [panels for panels in widths if panels <= most]
    return Plan(min(fitting, key=lambda panels: turns(panels, splits) * (panels + 3)), splits)


@dataclass(frozen=True)
class Tuning:
    """What may differ between instances without changing any sum.

    Attributes:
        panels: panels of 16 rows a warp: 1 makes more warps, 2 reads x less often.
        cols: tiles of columns a stage.
        blocks: blocks that share a multiprocessor, which bounds registers and stages.
        stages: most stages of a ring.
        is_wgmma: products by warpgroups (sm_90a, 32 tokens and more).
        most: most panels a block.
    """

    panels: int
    cols: int
    blocks: int = 1
    stages: int = 16
    is_wgmma: bool = False
    most: int = MOST_PANELS


def tuning(form: Form, token_tiles: int) -> Tuning:
    """The measured best (docs/gpu-notes.md)."""
    if token_tiles >= 4:
        return Tuning(1, 1, is_wgmma=True, most=16 if token_tiles <= 8 else 12)
    return Tuning(panels=1, cols=1 if form.rest_bytes or form.bits == 0 else 2)


def _token_tiles(num_tokens: int) -> int:
    return min(padded_rows(num_tokens), MAX_TOKENS) // 8


class _Ahead(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in (
            "base_bytes", "rest_bytes", "num_row_tiles", "num_col_tiles", "log_splits", "depth",
        )),
    )  # fmt: skip


class _Problem(ctypes.Structure):
    """linear.cu's Problem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "meta", "base", "rest", "bias", "out")),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "num_rows", "num_cols", "num_row_tiles", "num_col_tiles", "pitch",
            "log_splits", "panels", "num_blocks", "num_stages", "bias_kind", "out_is_float",
        )),
        ("ahead", _Ahead),
    )  # fmt: skip


NO_MAP = (ctypes.c_uint64 * 16)()


@dataclass(frozen=True)
class _Instance:
    """One kernel and how it is launched for one matrix."""

    kernel: Kernel
    cut: Plan
    threads: int
    num_blocks: int
    num_stages: int
    smem: int
    grid: tuple[int, int]
    tokens: int
    has_engine: bool


@functools.cache
def _instance(
    form: Form, row_tiles: int, col_tiles: int, num_tokens: int, device: int, chosen: Tuning | None
) -> _Instance:
    has_engine = torch.cuda.get_device_capability(device) >= (9, 0)
    multiprocessors = num_multiprocessors(device)
    token_tiles = _token_tiles(num_tokens)
    tuned = chosen or tuning(form, token_tiles)
    if not has_engine:
        tuned = Tuning(panels=2, cols=1, most=16)
    if torch.cuda.get_device_capability(device) != (9, 0) or not form.has_warpgroups:
        tuned = replace(tuned, is_wgmma=False)
    tile = form.base_bytes + form.rest_bytes
    cut = plan(row_tiles, col_tiles, tile, multiprocessors, has_engine, tuned.most)
    tokens = token_tiles * 8
    consumers = math.ceil(cut.panels / tuned.panels)
    if tuned.is_wgmma:
        consumers = math.ceil(consumers / 4) * 4
    x_bytes = tokens * (128 if form.act == 8 else 256)
    if form.act == 8:
        x_bytes += TILE_COLS // form.act_group * tokens * 8
    stage = _whole(tuned.cols * x_bytes, 1024)
    weights = _whole(consumers * tuned.panels * tuned.cols * tile, 1024)
    parts = cut.panels * TILE_ROWS * (min(tokens, 32) + 2) * 4
    room = SMEM_PER_BLOCK
    if tuned.blocks > 1:
        room = min(room, SMEM_PER_SM // tuned.blocks - 1024)
    room -= 1024 + BARRIER_BYTES + parts
    num_blocks = math.ceil(row_tiles / cut.panels)
    slots = _slots(multiprocessors, cut.splits) * tuned.blocks
    steps = math.ceil(math.ceil(col_tiles / cut.splits) / tuned.cols)
    num_stages = min(room // (stage + weights), tuned.stages, steps * math.ceil(num_blocks / slots))
    num_stages = max(num_stages, 1)
    if not has_engine:
        num_stages, stage = 3, stage + weights
        weights = 0
    feeding = 0 if not has_engine else 4 if tuned.is_wgmma else 1
    threads = (consumers + feeding) * 32
    return _Instance(
        kernel=kernel(
            "linear.cu",
            "linear",
            **form.defines(),
            NT=token_tiles,
            RT=tuned.panels,
            COLS=tuned.cols,
            WGMMA=int(tuned.is_wgmma),
            THREADS=threads,
            BLOCKS=tuned.blocks,
        ),
        cut=cut,
        threads=threads,
        num_blocks=num_blocks,
        num_stages=num_stages,
        smem=num_stages * (stage + weights) + parts + 1024,
        grid=(min(num_blocks, slots) * cut.splits, math.ceil(num_tokens / tokens)),
        tokens=tokens,
        has_engine=has_engine,
    )


def _whole(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit


# ---- the operations ------------------------------------------------------------------------------


def buffers(packed: PackedMatrix) -> list[Tensor]:
    """The tensors that hold its bytes."""
    return packed.tensors()


def can_run(x: Tensor) -> bool:
    """Whether `linear` computes activations of this type."""
    return x.dtype is torch.bfloat16


def wants_integers(packed: PackedMatrix, view: View) -> bool:
    """Whether `linear` multiplies quantised activations: a draft's, with nested weights."""
    is_nested = isinstance(packed, PackedPlanes)
    return is_nested and view.is_draft and view.activation is not Activation.A16


def linear(
    x: Tensor | Quantized,
    weight: PackedMatrix,
    bias: Tensor | None,
    view: View,
    rows: Rows,
    out_dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    ahead: tuple[PackedMatrix, View] | None = None,
    pdl: bool = False,
    chosen: Tuning | None = None,
) -> Tensor:
    """x [R, K] times the view's weights [N, K] transposed, plus bias [N]: [R, N].

    Args:
        x: bf16, or what `quantize` or a fused kernel made of it where `wants_integers`.
        weight: [N, K].
        bias: bf16 or float32.
        view: which precision to read.
        rows: prompt rows use the prompt class; nothing else is looked at.
        out_dtype: bf16 (the default) or float32.
        out: where to write, contiguous [R, N] of `out_dtype`.
        ahead: the weights that the next linear of the step reads: their first bytes are fetched
            into the L2 while this one ends.
        pdl: programmatic dependent launch (compile.Kernel.launch).
        chosen: an instance other than the measured best, for benchmarks.

    Raises:
        QSpecError: x, bias or out have a type, shape or place that no kernel reads.
    """
    num_rows, num_cols = weight.shape
    if x.shape[1] != num_cols:
        raise QSpecError(
            f"x has shape {tuple(x.shape)}; a linear of {num_cols} columns needs rows of that "
            "length"
        )
    out = _room(out, x.shape[0], num_rows, out_dtype or torch.bfloat16, weight)
    if x.shape[0] == 0:
        return out
    if bias is not None and (tuple(bias.shape) != (num_rows,) or bias.dtype not in OUT_TYPES):
        raise QSpecError(
            f"a bias is {bias.dtype} {tuple(bias.shape)}, not bfloat16 or float32 ({num_rows},)"
        )
    if isinstance(weight, PackedPlain):
        if isinstance(x, Quantized):
            raise QSpecError("quantised activations meet only the nested weights of a draft view")
        return _plain(x, weight.weight, bias, out)
    if isinstance(x, Quantized):
        if not wants_integers(weight, view):
            raise QSpecError("quantised activations meet only the nested weights of a draft view")
    elif x.device != weight.base.device:
        raise QSpecError(f"x is on {x.device}, its weights on {weight.base.device}")
    else:
        _check_rows(x, (torch.bfloat16,))
        if rows.is_prompt and (isinstance(weight, PackedDense) or not view.is_draft):
            return _prompt(x, weight, bias, out)
        if wants_integers(weight, view):
            x = quantize(x, view.activation, pdl=pdl)
        elif num_cols % 8:  # the copy engine reads rows from multiples of 16 bytes
            x = torch.nn.functional.pad(x, (0, -num_cols % 8))
    _generated(x, weight, bias, view, out, ahead, pdl, chosen)
    return out


def _room(
    out: Tensor | None, num_tokens: int, num_rows: int, dtype: torch.dtype, weight: PackedMatrix
) -> Tensor:
    if dtype not in OUT_TYPES:
        raise QSpecError(
            f"a linear's output is {dtype}; the cuda backend writes bfloat16 or float32"
        )
    if out is None:
        return torch.empty(num_tokens, num_rows, dtype=dtype, device=weight.tensors()[0].device)
    if tuple(out.shape) != (num_tokens, num_rows) or out.dtype != dtype or not out.is_contiguous():
        raise QSpecError(
            f"the output is {out.dtype} {tuple(out.shape)}, not contiguous {dtype} "
            f"({num_tokens}, {num_rows})"
        )
    return out


def _check_rows(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        raise QSpecError(f"x is {x.dtype}; the cuda backend computes bfloat16 activations")
    if x.ndim != 2 or not x.is_contiguous() or not x.is_cuda:
        raise QSpecError(
            f"x is on {x.device} with shape {tuple(x.shape)} and strides {x.stride()}; a linear "
            "needs contiguous rows on a GPU"
        )


def _generated(
    x: Tensor | Quantized,
    weight: PackedPlanes | PackedDense,
    bias: Tensor | None,
    view: View,
    out: Tensor,
    ahead: tuple[PackedMatrix, View] | None,
    pdl: bool,
    chosen: Tuning | None,
) -> None:
    values = x.codes if isinstance(x, Quantized) else x
    if values.data_ptr() % 16:
        values = values.clone()
    act_group = x.group if isinstance(x, Quantized) else 64
    spec = weight.spec if isinstance(weight, PackedPlanes) else None
    rest = weight.rest if isinstance(weight, PackedPlanes) else None
    num_tokens, num_cols = values.shape
    row_tiles, col_tiles = weight.base.shape[:2]
    one = _instance(
        _form(spec, view, act_group), row_tiles, col_tiles, num_tokens, weight.base.device.index,
        chosen,
    )  # fmt: skip
    problem = _Problem(
        x=values.data_ptr(),
        meta=x.meta.data_ptr() if isinstance(x, Quantized) else None,
        base=weight.base.data_ptr(),
        rest=None if rest is None else rest.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        num_tokens=num_tokens,
        num_rows=weight.shape[0],
        num_cols=num_cols,
        num_row_tiles=row_tiles,
        num_col_tiles=col_tiles,
        pitch=x.meta.shape[1] if isinstance(x, Quantized) else 0,
        log_splits=one.cut.splits.bit_length() - 1,
        panels=one.cut.panels,
        num_blocks=one.num_blocks,
        num_stages=one.num_stages,
        bias_kind=0 if bias is None else 1 if bias.dtype is torch.bfloat16 else 2,
        out_is_float=int(out.dtype is torch.float32),
        ahead=_ahead(ahead),
    )
    has_codes = isinstance(x, Quantized)
    box = (one.tokens, 128 if has_codes else 64)
    described = tensor_map(values, box) if one.has_engine else NO_MAP
    one.kernel.launch(
        one.grid,
        one.threads,
        [described, problem],
        smem=one.smem,
        cluster=one.cut.splits,
        pdl=pdl,
    )


AHEAD_BYTES = 24 << 20  # at most this much of the next weights is fetched: less than half of the L2


def _ahead(ahead: tuple[PackedMatrix, View] | None) -> _Ahead:
    """The first tiles of every block's stream, as many as fit in AHEAD_BYTES."""
    if ahead is None:
        return _Ahead()
    weight, view = ahead
    if isinstance(weight, PackedPlain):
        return _Ahead()
    device = weight.base.device.index
    if torch.cuda.get_device_capability(device) < (9, 0):
        return _Ahead()
    form = _form(weight.spec if isinstance(weight, PackedPlanes) else None, view, 64)
    row_tiles, col_tiles = weight.base.shape[:2]
    tile = form.base_bytes + form.rest_bytes
    cut = plan(row_tiles, col_tiles, tile, num_multiprocessors(device), True)
    bytes_a_depth = row_tiles * cut.splits * tile
    depth = min(AHEAD_BYTES // bytes_a_depth, col_tiles // cut.splits)
    rest = weight.rest if isinstance(weight, PackedPlanes) and form.rest_bytes else None
    return _Ahead(
        base=weight.base.data_ptr(),
        rest=None if rest is None else rest.data_ptr(),
        base_bytes=form.base_bytes,
        rest_bytes=form.rest_bytes,
        num_row_tiles=row_tiles,
        num_col_tiles=col_tiles,
        log_splits=cut.splits.bit_length() - 1,
        depth=depth,
    )


def decoded(
    weight: PackedPlanes | PackedDense, tiles: slice, out: Tensor, *, pdl: bool = False
) -> Tensor:
    """Rows of the matrix as the verify view reads them, rounded to bf16, filled up to whole tiles.

    Args:
        weight: [N, K].
        tiles: which tiles of 16 rows; whole numbers, step 1.
        out: contiguous bf16, at least [16 tiles, K up to a multiple of 128].
    """
    row_tiles, col_tiles = weight.base.shape[:2]
    first, last, _ = tiles.indices(row_tiles)
    form = _verify_form(weight)
    rest = weight.rest if isinstance(weight, PackedPlanes) else None
    function = kernel("weights.cu", "decode", **form.defines())
    args = [weight.base, rest, out, first, col_tiles]
    function.launch((-(-col_tiles // 4), last - first), 128, args, pdl=pdl)
    shape = ((last - first) * TILE_ROWS, col_tiles * TILE_COLS)
    return out.view(-1)[: shape[0] * shape[1]].view(shape)


def _verify_form(weight: PackedPlanes | PackedDense) -> Form:
    return _form(weight.spec if isinstance(weight, PackedPlanes) else None, VERIFY, 64)


def _prompt(
    x: Tensor, weight: PackedPlanes | PackedDense, bias: Tensor | None, out: Tensor
) -> Tensor:
    """The prompt class: cuBLAS on decoded weights, in chunks of PROMPT_TILE rows."""
    (num_tokens, num_cols), (num_rows, _) = x.shape, weight.shape
    row_tiles, col_tiles = weight.base.shape[:2]
    width = col_tiles * TILE_COLS
    missing = -num_tokens % PROMPT_TILE
    padded = torch.nn.functional.pad(x, (0, width - num_cols, 0, missing))
    step = max(1, DECODED_WEIGHTS // (TILE_ROWS * width))
    room = torch.empty(
        min(step, row_tiles) * TILE_ROWS, width, dtype=torch.bfloat16, device=x.device
    )
    for first in range(0, row_tiles, step):
        block = decoded(weight, slice(first, first + step), room)
        start = first * TILE_ROWS
        stop = min(num_rows, start + block.shape[0])
        for row in range(0, num_tokens, PROMPT_TILE):
            last = min(num_tokens, row + PROMPT_TILE)
            part = torch.mm(padded[row : row + PROMPT_TILE], block.t(), out_dtype=torch.float32)
            part = part[: last - row, : stop - start]
            if bias is not None:
                part = part + bias[start:stop].float()
            out[row:last, start:stop] = part
    return out


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """A dense float32 or float16 matrix: torch in float32, in tiles of a fixed number of rows."""
    wide, matrix = x.float(), weight.float().t()
    missing = -x.shape[0] % PLAIN_TILE
    padded = torch.nn.functional.pad(wide, (0, 0, 0, missing))
    parts = [torch.mm(part, matrix) for part in torch.split(padded, PLAIN_TILE)]
    result = torch.cat(parts)[: x.shape[0]]
    return out.copy_(result if bias is None else result + bias.float())


def embed(tokens: Tensor, table: PackedMatrix, dtype: torch.dtype, *, pdl: bool = False) -> Tensor:
    """Rows of the embedding at full precision: tokens [R] int64 to [R, K] bf16 or float32.

    A token outside the table gives zeros; the caller checks tokens.
    """
    if isinstance(table, PackedPlain):
        return table.weight[tokens].to(dtype)
    if dtype not in OUT_TYPES or tokens.dtype is not torch.int64 or tokens.ndim != 1:
        raise QSpecError(
            f"tokens are {tokens.dtype} {tuple(tokens.shape)} and rows of {dtype} are asked for; "
            "the cuda backend looks up int64 tokens in one dimension, as bfloat16 or float32"
        )
    num_rows, num_cols = table.shape
    out = torch.empty(tokens.shape[0], num_cols, dtype=dtype, device=tokens.device)
    if tokens.shape[0]:
        rest = table.rest if isinstance(table, PackedPlanes) else None
        args = [tokens, table.base, rest, out, num_cols, table.base.shape[1], num_rows]
        function = kernel("weights.cu", "embed", **_verify_form(table).defines())
        is_float = int(dtype is torch.float32)
        function.launch((tokens.shape[0],), 256, [*args, is_float], pdl=pdl)
    return out


def read_memory(memory: Tensor) -> None:
    """Read every byte of a tensor once: [bytes] uint8, a multiple of 16."""
    sink = torch.empty(1, dtype=torch.int32, device=memory.device)
    function = kernel("weights.cu", "read_all", **Form(bits=0).defines())
    blocks = num_multiprocessors(memory.device.index) * 8
    function.launch((blocks,), 256, [memory, sink, ctypes.c_longlong(memory.nbytes // 16)])
