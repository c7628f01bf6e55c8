"""Attention of generated positions: a few rows of each of many sequences, each over a long context.

The context is split every SPLIT keys, wherever it ends. One program takes one split of one KV head
for up to TILE queries (the rows of a sequence times the query heads that share the KV head); the
program that comes last merges the splits in their order. A split that lies beyond a row's position
adds zeros, so a row's result does not depend on the rows computed with it.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.kernels.cuda.activations import Quantized, group_and_top
from qspec_llm.kernels.triton.launch import next_power, options, start
from qspec_llm.kernels.triton.quantize import codes_of
from qspec_llm.weights.view import View

__all__ = ["SPLIT", "attend_decode", "check_counters", "counters", "num_splits_of"]

SPLIT = 128  # keys of one program
TILE = 32  # queries of one program
MERGED = 4  # splits whose partial results are loaded together
MAX_COUNTERS = 1 << 16  # sequences times KV heads of one launch


def num_splits_of(context: int) -> int:
    """Splits of a context."""
    return -(-context // SPLIT)


@triton.jit
def _decode_kernel(
    query, keys, values, out, codes, meta, pitch, tops, norms, totals, counters,
    positions, cu_rows, contexts, tables, table_stride, max_splits, scale,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, MERGED: tl.constexpr,
    IS_WIDE: tl.constexpr, GROUP: tl.constexpr, TOP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    RATIO: tl.constexpr = NUM_HEADS // NUM_KV
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2)
    start(OVERLAP)
    context = tl.load(contexts + seq).to(tl.int32)
    num_splits = (context + SPLIT - 1) // SPLIT
    if split < num_splits:
        first = tl.load(cu_rows + seq)
        num_queries = (tl.load(cu_rows + seq + 1) - first).to(tl.int32) * RATIO
        d = tl.arange(0, BLOCK_D)
        n = split * SPLIT + tl.arange(0, SPLIT)
        is_key = n < context
        block = tl.load(tables + seq * table_stride + n // BLOCK_SIZE, is_key, other=0)
        slot = (block * BLOCK_SIZE + n % BLOCK_SIZE) * (NUM_KV * HEAD) + kv_head * HEAD
        is_in = is_key[:, None] & (d < HEAD)[None, :]
        k = tl.load(keys + slot[:, None] + d[None, :], is_in, other=0)
        v = tl.load(values + slot[:, None] + d[None, :], is_in, other=0)
        for low in range(0, num_queries, TILE):
            m = low + tl.arange(0, TILE)
            is_query = m < num_queries
            row = first + m // RATIO
            head = kv_head * RATIO + m % RATIO
            is_out = is_query[:, None] & (d < HEAD)[None, :]
            at = ((row * NUM_HEADS + head) * HEAD)[:, None] + d[None, :]
            q = tl.load(query + at, is_out, other=0)
            position = tl.load(positions + row, is_query, other=-1)
            if IS_WIDE:
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            else:
                scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where(n[None, :] <= position[:, None], scores, float("-inf"))
            top = tl.max(scores, 1)
            weight = tl.exp(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
            if IS_WIDE:
                total = tl.dot(weight, v, input_precision="ieee")
            else:
                total = tl.dot(weight.to(v.dtype), v)
            part = (row * NUM_HEADS + head) * max_splits + split  # of [R, heads, splits]
            tl.store(tops + part, top, is_query)
            tl.store(norms + part, tl.sum(weight, 1), is_query)
            tl.store(totals + part[:, None] * HEAD + d[None, :], total, is_out)
        tl.debug_barrier()
        num_done = tl.atomic_add(counters + seq * NUM_KV + kv_head, 1, sem="acq_rel")
        if num_done == num_splits - 1:
            tl.store(counters + seq * NUM_KV + kv_head, 0)
            for low in range(0, num_queries, TILE):
                m = low + tl.arange(0, TILE)
                _merge(
                    out, codes, meta, pitch, tops, norms, totals, max_splits, num_splits,
                    first + m // RATIO, kv_head * RATIO + m % RATIO, m < num_queries, d,
                    NUM_HEADS, HEAD, TILE, MERGED, GROUP, TOP,
                )  # fmt: skip


@triton.jit
def _merge(
    out, codes, meta, pitch, tops, norms, totals, max_splits, num_splits, row, head, is_query, d,
    NUM_HEADS: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr, MERGED: tl.constexpr,
    GROUP: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a tile of queries, first to last, and write them."""
    BLOCK_D: tl.constexpr = d.shape[0]
    base = (row * NUM_HEADS + head) * max_splits
    is_out = is_query[:, None] & (d < HEAD)[None, :]
    top = tl.full((TILE,), float("-inf"), tl.float32)
    for split in range(num_splits):
        found = tl.load(tops + base + split, is_query, other=float("-inf"), cache_modifier=".cg")
        top = tl.maximum(top, found)
    top = tl.where(top == float("-inf"), 0.0, top)  # a query that is none, or sees no key
    total = tl.zeros((TILE, BLOCK_D), tl.float32)
    norm = tl.zeros((TILE,), tl.float32)
    for low in range(0, num_splits, MERGED):
        for step in tl.static_range(MERGED):
            is_in = is_query & (low + step < num_splits)
            at = base + low + step
            found = tl.load(tops + at, is_in, other=float("-inf"), cache_modifier=".cg")
            weight = tl.exp(found - top)
            norm += weight * tl.load(norms + at, is_in, other=0, cache_modifier=".cg")
            part = tl.load(
                totals + at[:, None] * HEAD + d[None, :],
                is_in[:, None] & (d < HEAD)[None, :],
                other=0,
                cache_modifier=".cg",
            )
            total += weight[:, None] * part
    result = tl.div_rn(total, tl.where(norm == 0, 1.0, norm)[:, None]).to(out.dtype.element_ty)
    if GROUP:
        # whole groups lie within a head
        NUM_GROUPS: tl.constexpr = HEAD // GROUP
        wide = tl.reshape(result.to(tl.float32), (TILE, NUM_GROUPS, GROUP))
        code, scale = codes_of(wide, TOP, 2)
        halves = tl.permute(tl.reshape(code, (TILE, HEAD // 16, 2, 8)), (0, 1, 3, 2))
        at = ((row * NUM_HEADS + head) * HEAD)[:, None] + d[None, :]
        tl.store(codes + at, tl.reshape(halves, (TILE, BLOCK_D)).to(tl.int8), is_out)
        every = (head * NUM_GROUPS)[:, None] + tl.arange(0, NUM_GROUPS)[None, :]
        at = (every * pitch + row[:, None]) * 2
        bits = tl.reshape(scale, (TILE, NUM_GROUPS)).to(tl.int32, bitcast=True)
        tl.store(meta + at, bits, is_query[:, None])
        tl.store(meta + at + 1, tl.sum(code, 2), is_query[:, None])
    else:
        tl.store(out + ((row * NUM_HEADS + head) * HEAD)[:, None] + d[None, :], result, is_out)


def check_counters(size: int) -> None:
    """Refuse a launch of more sequences times KV heads than there are counters."""
    assert size <= MAX_COUNTERS, f"{size} sequences times KV heads are too many for one step"


@cache
def counters(device: torch.device) -> Tensor:
    """Zeros; kernels leave them so. One allocation, since captured graphs keep using it."""
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


def attend_decode(
    query: Tensor,
    kv: LayerKV,
    rows: Rows,
    max_context: int,
    view: View | None = None,
) -> Tensor | Quantized:
    """Causal attention of a few rows a sequence, scaled by 1/sqrt(D).

    Args:
        query: [R, heads, D].
        kv: the cache of this layer.
        rows: where the rows sit.
        max_context: no sequence has more keys (a larger bound costs only idle programs).
        view: how to quantise the result, whose groups must not span heads; None for none.

    Returns:
        [R, heads, D] in the dtype of `query`, or the quantised rows [R, heads D].
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv, device = kv.keys.shape[1], query.device
    num_seqs, max_splits = rows.contexts.shape[0], num_splits_of(max_context)
    check_counters(num_seqs * num_kv)
    parts = torch.empty((2, num_rows, num_heads, max_splits), device=device)
    totals = torch.empty((num_rows, num_heads, max_splits, head_dim), device=device)
    group, top = group_and_top(num_heads * head_dim, view)
    out: Tensor | Quantized
    if view is None:
        out = torch.empty_like(query)
        targets = (out, out, out, 0)
    else:
        assert head_dim % group == 0, f"groups of {group} span heads of {head_dim}"
        out = Quantized.empty(num_rows, num_heads * head_dim, view, device)
        targets = (query, out.codes, out.meta, out.meta.shape[1])
    _decode_kernel[(max_splits, num_kv, num_seqs)](
        query, kv.keys, kv.values, *targets, parts[0], parts[1], totals, counters(device),
        rows.positions, rows.cu_rows, rows.contexts, rows.block_tables,
        rows.block_tables.stride(0), max_splits, head_dim**-0.5,
        NUM_HEADS=num_heads, NUM_KV=num_kv, HEAD=head_dim, BLOCK_D=next_power(head_dim, 16),
        BLOCK_SIZE=kv.block_size, TILE=TILE, SPLIT=SPLIT, MERGED=MERGED,
        IS_WIDE=query.dtype is torch.float32, GROUP=group, TOP=top, **options(4),
    )  # fmt: skip
    return out
