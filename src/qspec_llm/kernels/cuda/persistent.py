"""Launches of persistent.cu: all layers of a pass over one generated row, in one kernel.

It wants Hopper's copy engine, bf16 activations, nested linears of one form, and room for the row in
shared memory. Other passes run kernel by kernel (step.py), with the same bits.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.kernels.cuda.activations import TOP_OF
from qspec_llm.kernels.cuda.compile import architecture, kernel, num_multiprocessors
from qspec_llm.kernels.cuda.device import is_interpreted
from qspec_llm.kernels.cuda.form import HEAD_DIMS, LANES, PLACED, Form, form_of
from qspec_llm.kernels.cuda.layout import TILE_COLS, TILE_ROWS, PackedPlanes
from qspec_llm.weights.planes import PlaneSpec
from qspec_llm.weights.view import ACTIVATION_GROUPS, Activation, View, draft_view

__all__ = ["Layout", "Persistent", "Sizes", "layout_of"]

WARPS, TEAMS = 16, 2  # of a block
LINEARS = ("qkv", "output", "gate_up", "down")
WIDEST_NORM = 8192  # columns that one norm of rows.cu reads in a round
LEAST_TILES, MOST_TILES = 3, 6  # of a warp's ring: fewer and more are slower
# Layouts to try, the best first (docs/gpu-steps.md): keys, or values, that a lane of attention
# takes at a time, units of them that it keeps, and tiles of a slot. Integers go tile by tile; what
# is more work overlaps two.
LAYOUTS = {
    8: ((128, 3, 1), (96, 3, 1), (64, 4, 1), (64, 3, 1)),
    16: ((128, 3, 2), (96, 3, 2), (64, 4, 2), (64, 4, 1), (64, 3, 1)),
}
# Of block tables for more keys than the first and as many as the second, a lane keeps more where it
# takes three chunks at a time; cycles' tables double in length
LONGER_KEPT, KEPT = (96, 4, 1), (1024, 2048)
VECTOR_TYPES = {torch.bfloat16, torch.float32}  # of norms' weights and biases
QUERIES = 16  # that a lane of attention takes at a time
# Bytes of shared memory a block, and what the kernel declares itself or the system may keep of them
SMEM, STATIC = 227 << 10, 2 << 10
MOST_LAYERS = 250  # whose addresses fit into a kernel's parameters


@dataclass(frozen=True)
class Sizes:
    """What a model's layers have in common.

    Attributes:
        hidden, inner: columns.
        heads, kv_heads, head_dim: of attention.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Layout:
    """How a block uses its shared memory, and what its kernel is compiled for.

    Attributes:
        teams: those of a block that have room for a lane of attention.
        unit: keys, or values, that a lane of attention takes at a time.
        stages: units that a lane keeps.
        slots, slot_tiles: of a warp's ring of weights.
        smem: bytes that a launch asks for.
    """

    teams: int
    unit: int
    stages: int
    slots: int
    slot_tiles: int
    smem: int

    def defines(self) -> dict[str, int]:
        """The kernel's macros."""
        return {
            "LANE_TEAMS": self.teams,
            "UNIT": self.unit,
            "STAGES": self.stages,
            "SLOTS": self.slots,
            "SLOT_TILES": self.slot_tiles,
            "SMEM": self.smem,
        }


def _row_bytes(sizes: Sizes, form: Form) -> int:
    """Bytes of the widest linear's row in shared memory (Input of persistent.cu)."""
    widest = max(sizes.hidden, sizes.heads * sizes.head_dim, sizes.inner)
    tiles = math.ceil(widest / TILE_COLS)
    scales = TILE_COLS // form.act_group * 8 if form.act == 8 else 0
    return -(-tiles * (TILE_COLS * form.act // 8 + scales) // 16) * 16


def _lane_bytes(sizes: Sizes, unit: int, stages: int) -> int:
    """sizeof(LaneRoom) of persistent.cu."""
    head_dim, num_queries = sizes.head_dim, sizes.heads // sizes.kv_heads
    pitch = 2 * (head_dim + 8)
    ring, result = stages * unit * pitch, QUERIES * (head_dim + 4) * 4
    fresh = (num_queries + 2) * head_dim * 2
    shared = num_queries * (pitch + -(-unit // 64) * 16 + (unit + 8) * 2)
    return shared + QUERIES * 8 + max(ring, result) + fresh


@cache
def layout_of(sizes: Sizes, form: Form, multiprocessors: int, num_keys: int) -> Layout | None:
    """Shared memory of a block; None: it has no room.

    The row and the teams' lanes of attention have room of their own; weights on their way get what
    is left.

    Args:
        sizes: of the model.
        form: how the view reads the weights.
        multiprocessors: of the GPU, a block each.
        num_keys: that the block table has room for.
    """
    teams = min(TEAMS, math.ceil(sizes.kv_heads * LANES / multiprocessors))
    tile = form.base_bytes + form.rest_bytes
    sums = 2 * TEAMS * TILE_ROWS * 8 * 4
    layouts = LAYOUTS[form.act]
    if form.act == 8 and KEPT[0] < num_keys <= KEPT[1]:
        layouts = (LONGER_KEPT, *layouts)
    for unit, stages, slot_tiles in layouts:
        room = _row_bytes(sizes, form) + teams * _lane_bytes(sizes, unit, stages)
        slot = WARPS * (slot_tiles * tile + 8)
        slots = min((SMEM - STATIC - sums - room) // slot, MOST_TILES // slot_tiles)
        if slots * slot_tiles >= LEAST_TILES:
            return Layout(teams, unit, stages, slots, slot_tiles, slots * slot + sums + room)
    return None


class _Layer(ctypes.Structure):
    """persistent.cu's LayerTable."""

    _fields_ = (
        ("base", ctypes.c_void_p * 4),
        ("rest", ctypes.c_void_p * 4),
        ("bias", ctypes.c_void_p * 4),
        ("norm", ctypes.c_void_p * 2),
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
    )


POINTERS = (
    "x", "after_attention", "after_mlp", "qkv", "gate_up", "attended", "inner", "lanes",
    "lane_stats", "counts", "cosines", "sines", "positions", "slots", "cu_rows", "contexts",
    "tables",
)  # fmt: skip
COUNTS = ("table_stride", "table_size", "bias_is_float")


@cache
def _step_type(num_layers: int) -> Any:
    """persistent.cu's Step."""
    fields = [
        ("layers", _Layer * num_layers),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in COUNTS),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]
    return type("Step", (ctypes.Structure,), {"_fields_": fields})


class Persistent:
    """The layers of one decoder, as one kernel, and what its blocks hand to each other."""

    def __init__(self, decoder: Any) -> None:
        """The layers of a decoder that `takes`."""
        config = decoder.config
        self._decoder = decoder
        self._spec = _spec_of(decoder.layers[0].qkv)  # the others' form is the same
        self._sizes = Sizes(
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        views = [draft_view(one, size) for one in Activation for size in ACTIVATION_GROUPS]
        self._rooms = {self._room_of(view): self._room(view) for view in views}
        first = [getattr(decoder.layers[0], name) for name in LINEARS]
        biases = [bias for one in first for _, bias in one.parts if bias is not None]
        self._bias_is_float = any(bias.dtype is torch.float32 for bias in biases)
        self._table, self._caches = self._weights(), list[tuple[int, int]]()

    @staticmethod
    def takes(decoder: Any) -> bool:
        """Whether the kernel knows layers of this decoder's kind, and the GPU the kernel."""
        config = decoder.config
        if is_interpreted() or decoder.dtype is not torch.bfloat16 or not decoder.layers:
            return False
        if not architecture(decoder.final_norm.device).startswith("sm_9"):
            return False
        widths = (config.hidden_size, config.query_size, config.intermediate_size)
        fits = config.head_dim in HEAD_DIMS and config.hidden_size <= WIDEST_NORM
        fits &= len(decoder.layers) <= MOST_LAYERS
        fits &= all(width % 64 == 0 for width in widths)
        fits &= config.num_heads // config.num_kv_heads <= QUERIES
        fits &= all(layer.q_norm is None for layer in decoder.layers)
        if not fits:
            return False
        linears = [getattr(layer, name) for layer in decoder.layers for name in LINEARS]
        forms = {_form_key(_spec_of(one)) for one in linears}
        norms = {
            norm.dtype
            for layer in decoder.layers
            for norm in (layer.input_norm, layer.post_attention_norm)
        }
        biases = {bias.dtype for one in linears for _, bias in one.parts if bias is not None}
        is_one = len(forms) == 1 and len(norms) == 1 and len(biases) <= 1
        return is_one and None not in forms and norms | biases <= VECTOR_TYPES

    def layout(self, rows: Rows, view: View, block_size: int) -> Layout | None:
        """How a pass over these rows is laid out; None: other kernels compute it."""
        is_one = rows.positions.shape[0] == 1 and rows.contexts.shape[0] == 1
        if rows.is_prompt or not is_one or block_size % PLACED:
            return None
        sizes = self._sizes
        widths = (sizes.hidden, sizes.inner, sizes.heads * sizes.head_dim)
        # one group for all inputs, within heads: loaded models have it so
        group = view.columns_a_scale(sizes.hidden)
        if any(view.columns_a_scale(width) != group for width in widths) or sizes.head_dim % group:
            return None
        num_keys = rows.block_tables.shape[1] * block_size
        multiprocessors = num_multiprocessors(rows.positions.device.index)
        return layout_of(sizes, self._form(view), multiprocessors, num_keys)

    def __call__(
        self, x: Tensor, rows: Rows, kv: Sequence[LayerKV], view: View, laid: Layout
    ) -> None:
        """Take the residual stream x [1, hidden] through all layers, in place."""
        decoder, config = self._decoder, self._decoder.config
        tables = rows.block_tables
        step = _step_type(len(decoder.layers))(
            layers=self._layers(kv),
            x=x.data_ptr(),
            **{
                name: tensor.data_ptr() for name, tensor in self._rooms[self._room_of(view)].items()
            },
            cosines=decoder.cos.data_ptr(),
            sines=decoder.sin.data_ptr(),
            positions=rows.positions.data_ptr(),
            slots=rows.slots.data_ptr(),
            cu_rows=rows.cu_rows.data_ptr(),
            contexts=rows.contexts.data_ptr(),
            tables=tables.data_ptr(),
            table_stride=tables.stride(0),
            table_size=tables.shape[1],
            bias_is_float=int(self._bias_is_float),
            eps=config.norm_eps,
            scale=config.head_dim**-0.5,
        )
        form = self._form(view)
        function = kernel(
            "persistent.cu",
            "layers",
            **form.defines(),
            HEAD=config.head_dim,
            NUM_HEADS=config.num_heads,
            NUM_KV=config.num_kv_heads,
            BLOCK_SIZE=kv[0].block_size,
            HIDDEN=config.hidden_size,
            INNER=config.intermediate_size,
            NUM_LAYERS=len(decoder.layers),
            NORM_FLOAT=int(decoder.layers[0].input_norm.dtype is torch.float32),
            TOP=0 if form.act == 16 else TOP_OF[view.activation],
            **laid.defines(),
        )
        grid = (num_multiprocessors(x.device.index),)
        function.launch(grid, 32 * WARPS, [step], smem=laid.smem, cooperative=True)

    def _room_of(self, view: View) -> tuple[Activation, int]:
        """Views with one of these are laid out alike."""
        return view.activation, view.columns_a_scale(self._sizes.hidden)

    def _room(self, view: View) -> dict[str, Tensor]:
        """What blocks hand to each other (persistent.cu's Step), zeros at first.

        Stamps are counted in it, and every pass writes all of it: so passes over other activations,
        which are laid out in another way, have their own.
        """
        sizes, device = self._sizes, self._decoder.final_norm.device
        query = sizes.heads * sizes.head_dim

        def room(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        def pieces(columns: int) -> Tensor:
            if view.activation is Activation.A16:
                return room(columns)
            return room(columns // 8 + columns // view.columns_a_scale(sizes.hidden), 4)

        return {
            "after_attention": room(sizes.hidden),
            "after_mlp": room(sizes.hidden),
            "qkv": room(query + 2 * sizes.kv_heads * sizes.head_dim),
            "gate_up": room(2 * sizes.inner),
            "attended": pieces(query),
            "inner": pieces(sizes.inner),
            "lanes": room(sizes.heads, LANES, sizes.head_dim, 2),
            "lane_stats": room(sizes.heads, LANES, 4),
            "counts": room(2),
        }

    def _form(self, view: View) -> Form:
        """How the view reads the linears, which all have one form."""
        return form_of(self._spec, view)

    def _layers(self, kv: Sequence[LayerKV]) -> Any:
        """Where every layer's weights and cache lie."""
        caches = [(cache.keys.data_ptr(), cache.values.data_ptr()) for cache in kv]
        if caches != self._caches:
            for entry, (keys, values) in zip(self._table, caches, strict=True):
                entry.key_cache, entry.value_cache = keys, values
            self._caches = caches
        return self._table

    def _weights(self) -> Any:
        table = (_Layer * len(self._decoder.layers))()
        for entry, layer in zip(table, self._decoder.layers, strict=True):
            for i, name in enumerate(LINEARS):
                ((weight, bias),) = getattr(layer, name).parts
                entry.base[i] = weight.base.data_ptr()
                entry.rest[i] = None if weight.rest is None else weight.rest.data_ptr()
                entry.bias[i] = None if bias is None else bias.data_ptr()
            entry.norm[0] = layer.input_norm.data_ptr()
            entry.norm[1] = layer.post_attention_norm.data_ptr()
        return table


def _spec_of(linear: Any) -> PlaneSpec | None:
    """The spec of a linear that is one nested matrix of whole tiles of rows."""
    if len(linear.parts) != 1 or not isinstance(linear.parts[0][0], PackedPlanes):
        return None
    spec: PlaneSpec = linear.parts[0][0].spec
    return None if spec.num_rows % TILE_ROWS else spec


def _form_key(spec: PlaneSpec | None) -> tuple[Any, ...] | None:
    """What two specs of one form have in common."""
    if spec is None:
        return None
    return (spec.bits, spec.draft_bits, spec.group, spec.grid, spec.has_offset, spec.scale_dtype)
