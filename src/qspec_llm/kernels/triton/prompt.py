"""Attention of prompt positions: many rows of one sequence, tile by tile over the keys before them.

One program takes TILE queries (rows times the query heads that share a KV head) and walks the keys
in order with a running maximum (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). Keys
beyond a row change neither its maximum nor its sums, so how a prompt is cut changes no bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.kernels.triton.launch import next_power, options, start

__all__ = ["attend_prompt"]

TILE, KEYS = 128, 64  # queries and keys of one step


@triton.jit
def _prompt_kernel(
    query, keys, values, out, positions, cu_rows, tables, table_stride, scale,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, IS_WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    RATIO: tl.constexpr = NUM_HEADS // NUM_KV
    low = tl.program_id(0) * TILE
    kv_head = tl.program_id(1)
    seq = tl.program_id(2)
    start(OVERLAP)
    first = tl.load(cu_rows + seq)
    num_queries = (tl.load(cu_rows + seq + 1) - first).to(tl.int32) * RATIO
    if low < num_queries:
        m = low + tl.arange(0, TILE)
        d = tl.arange(0, BLOCK_D)
        is_query = m < num_queries
        row = first + m // RATIO
        at = ((row * NUM_HEADS + kv_head * RATIO + m % RATIO) * HEAD)[:, None] + d[None, :]
        is_out = is_query[:, None] & (d < HEAD)[None, :]
        q = tl.load(query + at, is_out, other=0)
        position = tl.load(positions + row, is_query, other=0).to(tl.int32)
        top = tl.full((TILE,), float("-inf"), tl.float32)
        norm = tl.zeros((TILE,), tl.float32)
        total = tl.zeros((TILE, BLOCK_D), tl.float32)
        context = tl.max(position, 0) + 1
        for begin in range(0, context, KEYS):
            n = begin + tl.arange(0, KEYS)
            is_key = n < context
            block = tl.load(tables + seq * table_stride + n // BLOCK_SIZE, is_key, other=0)
            slot = (block * BLOCK_SIZE + n % BLOCK_SIZE) * (NUM_KV * HEAD) + kv_head * HEAD
            is_in = is_key[:, None] & (d < HEAD)[None, :]
            k = tl.load(keys + slot[:, None] + d[None, :], is_in, other=0)
            v = tl.load(values + slot[:, None] + d[None, :], is_in, other=0)
            if IS_WIDE:
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            else:
                scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where(n[None, :] <= position[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp(top - new_top)
            weight = tl.exp(scores - new_top[:, None])
            norm = norm * shrink + tl.sum(weight, 1)
            if IS_WIDE:
                total = total * shrink[:, None] + tl.dot(weight, v, input_precision="ieee")
            else:
                total = total * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
            top = new_top
        tl.store(out + at, tl.div_rn(total, norm[:, None]).to(out.dtype.element_ty), is_out)


def attend_prompt(query: Tensor, kv: LayerKV, rows: Rows) -> Tensor:
    """Causal attention of query [R, heads, D] over the cache, scaled by 1/sqrt(D): same shape."""
    num_rows, num_heads, head_dim = query.shape
    num_kv, num_seqs = kv.keys.shape[1], rows.contexts.shape[0]
    is_wide = query.dtype is torch.float32
    tile = TILE // 4 if is_wide else TILE
    out = torch.empty_like(query)
    # no sequence has more rows than all have together
    grid = (-(-num_rows * (num_heads // num_kv) // tile), num_kv, num_seqs)
    _prompt_kernel[grid](
        query, kv.keys, kv.values, out, rows.positions, rows.cu_rows, rows.block_tables,
        rows.block_tables.stride(0), head_dim**-0.5,
        NUM_HEADS=num_heads, NUM_KV=num_kv, HEAD=head_dim, BLOCK_D=next_power(head_dim, 16),
        BLOCK_SIZE=kv.block_size, TILE=tile, KEYS=KEYS, IS_WIDE=is_wide,
        **options(8 if head_dim > 64 else 4),
    )  # fmt: skip
    return out
