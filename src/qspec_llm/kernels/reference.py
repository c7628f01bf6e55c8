"""The definition of every operation, in plain torch.

Rows are computed in tiles of a fixed number of rows, padded with zeros. Matrix libraries choose
their reduction order by shape, so a row computed alone differs in the last bits from the same row
computed with others; at a fixed shape it does not, wherever in the tile it stands. The test suite
checks that on the machine it runs on.

A draft's linear is the float32 product of the draft's weights and the rounded activations; kernels
that multiply integers compute the same to float tolerance.

Everything accumulates in float32 and is rounded once, to the dtype of the activations.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import Forward, LayerKV, Packed, Rows
from qspec_llm.weights.hadamard import transform
from qspec_llm.weights.planes import (
    Dense,
    Planes,
    Stored,
    draft_weight,
    verify_weight,
)
from qspec_llm.weights.view import Activation, View

__all__ = [
    "attention",
    "buffers",
    "check",
    "configure",
    "device",
    "embed",
    "hadamard",
    "linear",
    "name",
    "num_threads",
    "pack",
    "quantize_activations",
    "read_memory",
    "rms_norm",
    "rope",
    "round_activations",
    "silu_mul",
    "unpack",
    "whole_step",
    "write_kv",
]

name = "reference"
device = torch.device("cpu")

DECODE_TILE, PROMPT_TILE = 8, 64  # rows
BLOCK_WEIGHTS = 1 << 20  # weights decoded at a time: their temporaries stay in the L2 cache
KEY_CHUNK = 64  # keys reduced together in attention; partial results are added in order
ACTIVATION_TOP = {Activation.A8: 127, Activation.A4: 7}


def configure(num_threads: int | None, isa: str | None) -> None:
    """Set torch's threads; torch chooses its instruction set itself."""
    if isa is not None:
        raise QSpecError(f"isa {isa!r} is an option of the cpu backend, not of the reference")
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def num_threads() -> int:
    """Threads that torch uses."""
    return torch.get_num_threads()


def pack(stored: Stored) -> Packed:
    """The reference reads planes as they are stored."""
    return stored


def unpack(packed: Packed) -> Stored:
    """Undo `pack`."""
    assert isinstance(packed, Planes | Dense)
    return packed


def buffers(packed: Packed) -> list[Tensor]:
    """The tensors that hold its bytes."""
    return [packed.weight] if isinstance(packed, Dense) else list(packed.tensors().values())


def read_memory(memory: Tensor) -> None:
    """Read every byte of a tensor once: [bytes] uint8, a multiple of 8."""
    memory.view(torch.int64).sum()


def embed(tokens: Tensor, table: Packed, dtype: torch.dtype) -> Tensor:
    """Rows of the embedding: tokens [R] int64 to [R, hidden]."""
    if isinstance(table, Dense):
        return table.weight[tokens].to(dtype)
    return verify_weight(table.rows(tokens)).to(dtype)


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    view: View,
    rows: Rows,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [R, K] times the view's weights [N, K] transposed, plus bias [N]: [R, N]."""
    tile = PROMPT_TILE if rows.is_prompt else DECODE_TILE
    read = draft_weight if view.is_draft else verify_weight
    wide = x.float()
    if view.is_draft and isinstance(weight, Planes):
        wide = round_activations(wide, view)
    # A few rows of the matrix at a time: what is decoded stays in the cache.
    num_rows = max(1, BLOCK_WEIGHTS // x.shape[1])
    blocks = [
        _by_tile(lambda part, block=block: (block @ part.T).T, wide, tile)  # type: ignore[misc]
        for block in _decode(weight, read, num_rows)
    ]
    out = torch.cat(blocks, dim=1)
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype or x.dtype)


def _decode(weight: Stored, read: Callable[[Planes], Tensor], num_rows: int) -> Iterator[Tensor]:
    """The matrix in float32, some rows at a time."""
    if isinstance(weight, Dense):
        yield from (part.float() for part in torch.split(weight.weight, num_rows))
    else:
        for start in range(0, weight.spec.num_rows, num_rows):
            yield read(weight.rows(slice(start, start + num_rows)))


def round_activations(x: Tensor, view: View) -> Tensor:
    """x [R, K] float32 as a draft's linears see it: integers times one scale per row and group."""
    if view.activation is Activation.A16:
        return x
    integers, scale = quantize_activations(x, view)
    return (integers * scale).view(x.shape)


def quantize_activations(x: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Integers and scales of x [R, K], one scale per row and group of K: x ~ integers * scale.

    Returns:
        integers [R, K/A, A] float32 (|q| <= 127 for a8 and the first `view.outliers` columns of a4,
        7 for its others) and scale [R, K/A, 1] float32, with A = `view.columns_a_scale(K)`.
    """
    group = view.columns_a_scale(x.shape[1])
    grouped = x.view(x.shape[0], -1, group)
    top = torch.full((grouped.shape[1], 1), ACTIVATION_TOP[view.activation], dtype=torch.float32)
    if view.activation is Activation.A4:
        top[: view.outliers // group] = ACTIVATION_TOP[Activation.A8]
    scale = grouped.abs().amax(-1, keepdim=True) / top
    # an all-zero group has scale 0; its integers are 0 whatever it is divided by
    integers = torch.round(grouped / scale.clamp(min=torch.finfo(torch.float32).tiny))
    return integers.clamp_(-top, top), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    wide = x.float().reshape(-1, x.shape[-1])

    def part(row: Tensor) -> Tensor:
        return row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps) * weight.float()

    return _by_tile(part, wide, DECODE_TILE).to(x.dtype).view(x.shape)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads (RoFormer, eq. 34): x [R, heads, D], cos and sin [R, D/2] float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def write_kv(keys: Tensor, values: Tensor, kv: LayerKV, view: View, rows: Rows) -> None:
    """Write K and V [R, KV heads, D] to `rows.slots`; both views share one 16-bit cache."""
    kv.keys[rows.slots] = keys
    kv.values[rows.slots] = values


def attention(query: Tensor, kv: LayerKV, view: View, rows: Rows) -> Tensor:
    """Causal attention of query [R, heads, D] over the cache, scaled by 1/sqrt(D)."""
    out = torch.empty_like(query)
    tile = PROMPT_TILE if rows.is_prompt else DECODE_TILE
    bounds = rows.cu_rows.tolist()
    for index, context in enumerate(rows.contexts.tolist()):
        start, stop = bounds[index], bounds[index + 1]
        keys, values = _gather(kv, rows.block_tables[index], context)
        for first in range(start, stop, tile):
            part = slice(first, min(first + tile, stop))
            out[part] = _attend(query[part], keys, values, rows.positions[part], tile)
    return out


def _gather(kv: LayerKV, blocks: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """K and V of one sequence, whole chunks of them: [chunks, KEY_CHUNK, KV heads, D] float32."""
    num_chunks = math.ceil(context / KEY_CHUNK)
    # Block 0 pads the table up to a whole chunk; those keys are masked.
    padded = torch.zeros(num_chunks * KEY_CHUNK // kv.block_size, dtype=torch.int64)
    num_blocks = math.ceil(context / kv.block_size)
    padded[:num_blocks] = blocks[:num_blocks]
    shape = (-1, kv.block_size, *kv.keys.shape[1:])
    keys, values = (cache.view(shape)[padded].float() for cache in (kv.keys, kv.values))
    chunked = (num_chunks, KEY_CHUNK, *kv.keys.shape[1:])
    return keys.view(chunked), values.view(chunked)


def _attend(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, tile: int) -> Tensor:
    """Attention of up to `tile` rows of one sequence: query [r, heads, D] to the same shape.

    The maximum is exact in any order; sums run within chunks of fixed shape and then over chunks in
    order, so chunks that lie beyond a row's position add zeros and change nothing.
    """
    num_rows, num_heads, head_dim = query.shape
    num_chunks, _, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    q = _pad_rows(query.float(), tile) / math.sqrt(head_dim)
    q = q.view(tile, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    q = q.reshape(num_kv_heads, group * tile, head_dim)

    batch = num_chunks * num_kv_heads
    q = q.expand(num_chunks, -1, -1, -1).reshape(batch, group * tile, head_dim)
    k = keys.permute(0, 2, 3, 1).reshape(batch, head_dim, KEY_CHUNK)
    scores = torch.bmm(q, k).view(num_chunks, num_kv_heads, group, tile, KEY_CHUNK)

    key_positions = torch.arange(num_chunks * KEY_CHUNK).view(num_chunks, 1, 1, 1, KEY_CHUNK)
    row_positions = _pad_rows(positions, tile).view(tile, 1)
    scores.masked_fill_(key_positions > row_positions, -torch.inf)
    top = scores.amax(-1, keepdim=True).amax(0, keepdim=True)
    weights = torch.exp(scores.sub_(top))

    v = values.transpose(1, 2).reshape(batch, KEY_CHUNK, head_dim)
    parts = torch.bmm(weights.view(batch, group * tile, KEY_CHUNK), v)
    parts = parts.view(num_chunks, num_kv_heads, group, tile, head_dim)
    total, norm = _sum_in_order(parts), _sum_in_order(weights.sum(-1, keepdim=True))
    out = (total / norm).permute(2, 0, 1, 3).reshape(tile, num_heads, head_dim)
    return out[:num_rows].to(query.dtype)


def _sum_in_order(parts: Tensor) -> Tensor:
    """Sum over the first dimension, first to last: adding zeros at the end changes no bit."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [R, 2 I]: [R, I]."""

    def part(row: Tensor) -> Tensor:
        gate, up = row.chunk(2, dim=-1)
        return gate / (1 + torch.exp(-gate)) * up

    return _by_tile(part, gate_up.float(), DECODE_TILE).to(gate_up.dtype)


def hadamard(x: Tensor, order: int) -> Tensor:
    """x [R, K] times H (x) I, H of `order` rows: additions in one order for every row."""
    return transform(x.float(), order).to(x.dtype)


def check(packed: Sequence[Packed], views: Sequence[View]) -> None:
    """Nothing: this is what others are compared with."""


def whole_step(decoder: Any) -> Forward | None:
    """None: the reference runs operation by operation."""
    return None


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    """x with zero rows appended up to `num_rows`."""
    if x.shape[0] == num_rows:
        return x
    return torch.cat((x, x.new_zeros(num_rows - x.shape[0], *x.shape[1:])))


def _by_tile(compute: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """Apply `compute` to x [R, ...] in tiles of exactly `tile` rows; its results [R, N]."""
    num_rows = x.shape[0]
    padded = _pad_rows(x, math.ceil(num_rows / tile) * tile)
    parts = [compute(part) for part in torch.split(padded, tile)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows]
