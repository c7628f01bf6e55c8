"""Attention of generated rows, with RoPE and the write of K and V before it: attention.cu.

bf16 heads of 64 and 128; others go through Triton, operation by operation.
"""

import torch
from torch import Tensor

from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.kernels.cuda.compile import kernel
from qspec_llm.kernels.cuda.linear import Quantized
from qspec_llm.kernels.cuda.rows import targets
from qspec_llm.kernels.triton import attention as by_triton
from qspec_llm.kernels.triton.launch import can_overlap
from qspec_llm.kernels.triton.quantize import group_and_top
from qspec_llm.kernels.triton.rope import rotate_and_write
from qspec_llm.weights.view import Activation

__all__ = ["attend", "rotate_write_attend"]

HEAD_DIMS = (64, 128)
THREADS = 256
SPLIT, TILE, WARPS = 128, 16, 8


def attend(query: Tensor, kv: LayerKV, rows: Rows) -> Tensor:
    """Causal attention of rotated query [R, heads, D] over the cache at 1/sqrt(D): same shape."""
    if not _fits(query):
        out = by_triton.attend_decode(query, kv, rows, _max_context(kv, rows))
    else:
        out = _attend(query, None, None, kv, None, rows, None)
    assert isinstance(out, Tensor)
    return out


def rotate_write_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    kv: LayerKV,
    angles: tuple[Tensor, Tensor],
    rows: Rows,
    activation: Activation | None,
) -> Tensor | Quantized:
    """RoPE, the write of K and V to their slots (not where slot < 0), and attention.

    Args:
        query: [R, heads, D], rows any distance apart.
        keys, values: [R, KV heads, D], likewise; each sequence's rows are its last positions.
        kv: the cache of this layer.
        angles: cos and sin [positions, D/2] float32, of every position.
        rows: where the rows sit.
        activation: how to quantise the result, if a group of columns lies within a head.

    Returns:
        [R, heads, D] in the dtype of `query`, or the quantised rows [R, heads D].
    """
    head_dim = query.shape[2]
    if activation is not None and head_dim % 64:
        activation = None
    if _fits(query):
        return _attend(query, keys, values, kv, angles, rows, activation)
    rotated = rotate_and_write(query, keys, values, kv, *angles, rows.positions, rows.slots)
    if head_dim not in HEAD_DIMS:
        activation = None
    return by_triton.attend_decode(rotated, kv, rows, _max_context(kv, rows), activation)


def _fits(query: Tensor) -> bool:
    is_known = query.dtype is torch.bfloat16 and query.shape[2] in HEAD_DIMS
    return is_known and query.is_cuda and query.data_ptr() % 4 == 0


def _max_context(kv: LayerKV, rows: Rows) -> int:
    return rows.block_tables.shape[1] * kv.block_size


def _attend(
    query: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    kv: LayerKV,
    angles: tuple[Tensor, Tensor] | None,
    rows: Rows,
    activation: Activation | None,
) -> Tensor | Quantized:
    num_rows, num_heads, head_dim = query.shape
    num_kv, device = kv.keys.shape[1], query.device
    num_seqs, max_splits = rows.contexts.shape[0], -(-_max_context(kv, rows) // SPLIT)
    by_triton.check_counters(num_seqs * num_kv)
    group, top = group_and_top(num_heads * head_dim, activation)
    function = kernel(
        "attention.cu",
        "attend",
        HEAD=head_dim,
        NUM_HEADS=num_heads,
        NUM_KV=num_kv,
        BLOCK_SIZE=kv.block_size,
        ROTATE=int(angles is not None),
        GROUP=group,
        TOP=top,
    )
    out: Tensor | Quantized
    if activation is None:
        out = torch.empty((num_rows, num_heads, head_dim), dtype=query.dtype, device=device)
    else:
        out = Quantized.empty(num_rows, num_heads * head_dim, activation, device)
    parts = torch.empty((2, num_rows, num_heads, max_splits), device=device)
    totals = torch.empty((num_rows, num_heads, max_splits, head_dim), device=device)
    cos, sin = angles if angles is not None else (None, None)
    strides = [0 if x is None else x.stride(0) for x in (query, keys, values)]
    args = [
        query, keys, values, *strides, cos, sin, kv.keys, kv.values, *targets(out),
        parts[0], parts[1], totals, by_triton.counters(device), rows.positions, rows.slots,
        rows.cu_rows, rows.contexts, rows.block_tables, rows.block_tables.stride(0), max_splits,
        head_dim**-0.5,
    ]  # fmt: skip
    grid = (max_splits, num_kv, num_seqs)
    function.launch(grid, THREADS, args, smem=_shared_bytes(head_dim), pdl=can_overlap())
    return out


def _shared_bytes(head_dim: int) -> int:
    """sizeof(Shared) of attention.cu, rounded up."""
    halves = (2 * SPLIT + TILE) * (head_dim + 8) + TILE * (SPLIT + 8)
    floats = 2 * WARPS * TILE + TILE * (head_dim + 4) + TILE + 1
    return -(-(2 * halves + 4 * floats) // 16) * 16
