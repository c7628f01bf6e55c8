"""Attention of generated rows, with RoPE and the write of K and V before it: attention.cu.

bf16 heads of 64 and 128; others go through Triton, operation by operation, which is imported where
it is needed: this kernel does without it.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.kernels.cuda.activations import Quantized, group_and_top
from qspec_llm.kernels.cuda.compile import kernel, num_multiprocessors
from qspec_llm.kernels.cuda.device import can_overlap
from qspec_llm.kernels.cuda.form import HEAD_DIMS, LANES, PLACED
from qspec_llm.kernels.cuda.rows import targets
from qspec_llm.weights.view import View

__all__ = ["attend", "rotate_write_attend"]

QUERIES, WARPS = 16, 8  # of attention.cu, for each tile of queries
CLUSTERS = (8, 4, 2, 1)  # blocks that may share a KV head
MOST_STAGES = 8
PART = 64  # columns that a warp merges at least
SMEM_PER_BLOCK, SMEM_PER_SM = 227 << 10, 228 << 10


def attend(query: Tensor, kv: LayerKV, rows: Rows, view: View | None = None) -> Tensor | Quantized:
    """Causal attention of rotated queries over the cache, scaled by 1/sqrt(D).

    Args:
        query: [R, heads, D].
        kv: the cache of this layer.
        rows: where the rows sit, each sequence's its last positions.
        view: how to quantise the result, if a group of columns lies within a head.

    Returns:
        [R, heads, D] in the dtype of `query`, or the quantised rows [R, heads D].
    """
    view = _fitting(view, query)
    if _fits(query, kv):
        return _attend(query, None, None, kv, None, rows, view)
    from qspec_llm.kernels.triton import attention as by_triton

    return by_triton.attend_decode(query, kv, rows, _max_context(kv, rows), view)


def rotate_write_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    kv: LayerKV,
    angles: tuple[Tensor, Tensor],
    rows: Rows,
    view: View | None,
) -> Tensor | Quantized:
    """RoPE, the write of K and V to their slots (not where slot < 0), and attention.

    Args:
        query: [R, heads, D], rows any distance apart.
        keys, values: [R, KV heads, D], likewise; each sequence's rows are its last positions.
        kv: the cache of this layer.
        angles: cos and sin [positions, D/2] float32, of every position.
        rows: where the rows sit.
        view: how to quantise the result, if a group of columns lies within a head.

    Returns:
        [R, heads, D] in the dtype of `query`, or the quantised rows [R, heads D].
    """
    view = _fitting(view, query)
    if _fits(query, kv):
        return _attend(query, keys, values, kv, angles, rows, view)
    from qspec_llm.kernels.triton import attention as by_triton
    from qspec_llm.kernels.triton.rope import rotate_and_write

    rotated = rotate_and_write(query, keys, values, kv, *angles, rows.positions, rows.slots)
    return by_triton.attend_decode(rotated, kv, rows, _max_context(kv, rows), view)


def _fitting(view: View | None, query: Tensor) -> View | None:
    """The view where the kernels can quantise for it: groups of columns lie within heads."""
    _, num_heads, head_dim = query.shape
    if view is None or head_dim not in HEAD_DIMS:
        return None
    group = view.columns_a_scale(num_heads * head_dim)
    return None if head_dim % max(PART, group) else view


def _fits(query: Tensor, kv: LayerKV) -> bool:
    """Whether attention.cu runs: bf16, heads it knows, clusters and the shared memory of Hopper."""
    is_known = query.dtype is torch.bfloat16 and query.shape[2] in HEAD_DIMS
    is_known &= kv.block_size % PLACED == 0
    return is_known and query.is_cuda and _has_room(query.device.index)


def _max_context(kv: LayerKV, rows: Rows) -> int:
    return rows.block_tables.shape[1] * kv.block_size


def _attend(
    query: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    kv: LayerKV,
    angles: tuple[Tensor, Tensor] | None,
    rows: Rows,
    view: View | None,
) -> Tensor | Quantized:
    num_rows, num_heads, head_dim = query.shape
    num_kv, device = kv.keys.shape[1], query.device
    num_seqs = rows.contexts.shape[0]
    group, top = group_and_top(num_heads * head_dim, view)
    # neither the queries that a block holds nor the blocks that share a head change a sum
    num_queries = -(-num_rows // num_seqs) * (num_heads // num_kv)
    tiles = 1 if num_queries <= QUERIES else 2
    cluster, stages = _cut(head_dim, tiles, num_seqs * num_kv, device.index)
    function = kernel(
        "attention.cu",
        "attend",
        HEAD=head_dim,
        NUM_HEADS=num_heads,
        NUM_KV=num_kv,
        BLOCK_SIZE=kv.block_size,
        MT=tiles,
        CLUSTER=cluster,
        STAGES=stages,
        ROTATE=int(angles is not None),
        QUANT_GROUP=group,
        TOP=top,
    )
    out: Tensor | Quantized
    if view is None:
        out = torch.empty((num_rows, num_heads, head_dim), dtype=query.dtype, device=device)
    else:
        out = Quantized.empty(num_rows, num_heads * head_dim, view, device)
    cos, sin = angles if angles is not None else (None, None)
    strides = [0 if x is None else x.stride(0) for x in (query, keys, values)]
    tables = rows.block_tables
    args = [
        query, keys, values, *strides, cos, sin, kv.keys, kv.values, *targets(out),
        rows.positions, rows.slots, rows.cu_rows, rows.contexts,
        tables, tables.stride(0), tables.shape[1], head_dim**-0.5,
    ]  # fmt: skip
    smem = _shared_bytes(head_dim, tiles, cluster, stages)
    grid = (cluster, num_kv, num_seqs)
    threads = 32 * WARPS * tiles
    function.launch(grid, threads, args, smem=smem, cluster=cluster, pdl=can_overlap())
    return out


@cache
def _cut(head_dim: int, tiles: int, num_heads: int, device: int) -> tuple[int, int]:
    """Blocks that share a KV head, and units that a lane keeps.

    As many blocks as there are multiprocessors for; with several on one, two of one tile of queries
    fit, as their registers do. A cluster of 4 or 8 has to find room within one of the parts that a
    GPU is built of, whose multiprocessors it seldom uses up: 30 clusters of 4 run at once on 132.
    """
    room = num_multiprocessors(device)
    fits = (size for size in CLUSTERS if num_heads * size <= room * (1 if size <= 2 else 7 / 8))
    cluster = next(fits, CLUSTERS[-1])
    is_alone = tiles > 1 or num_heads * cluster <= room
    most = SMEM_PER_BLOCK if is_alone else SMEM_PER_SM // 2 - 1024
    sizes = range(MOST_STAGES, 2, -1)
    stages = next(n for n in sizes if _shared_bytes(head_dim, tiles, cluster, n) <= most)
    return cluster, stages


def _shared_bytes(head_dim: int, tiles: int, cluster: int, stages: int) -> int:
    """sizeof(Shared) of attention.cu."""
    own, queries, pitch = LANES // cluster, QUERIES * tiles, 2 * (head_dim + 8)
    unit = 16 * (8 // own)  # keys
    ring, result = own * stages * unit * pitch, own * queries * (head_dim + 4) * 4
    shared = own * queries * (-(-unit // 64) * 16 + (unit + 8) * 2) if own < 8 else 0
    return queries * pitch + own * queries * 8 + shared + max(ring, result)


@cache
def _has_room(device: int) -> bool:
    """Whether the GPU has clusters, and blocks as large as the largest of ours."""
    properties: Any = torch.cuda.get_device_properties(device)
    return can_overlap() and properties.shared_memory_per_block_optin >= SMEM_PER_BLOCK
