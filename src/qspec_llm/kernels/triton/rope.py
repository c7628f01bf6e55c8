"""RoPE and the write of K and V: what stands between q, k, v and attention.

One program for each row and head. The products of a rotation are rounded one by one (no fused
multiply-add), as the reference rounds them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qspec_llm.kernels import LayerKV
from qspec_llm.kernels.triton.launch import NO_FUSED_MULTIPLY, next_power, options, start

__all__ = ["rope", "rotate_and_write", "write_kv"]


@triton.jit
def _rotate(source, target, cos, sin, pair, is_in, is_kept, HALF: tl.constexpr):
    """Rotate one head of D = 2 HALF values, halves D/2 apart."""
    low = tl.load(source + pair, is_in, other=0).to(tl.float32)
    high = tl.load(source + HALF + pair, is_in, other=0).to(tl.float32)
    c = tl.load(cos + pair, is_in, other=0)
    s = tl.load(sin + pair, is_in, other=0)
    tl.store(target + pair, (low * c - high * s).to(target.dtype.element_ty), is_kept)
    tl.store(target + HALF + pair, (high * c + low * s).to(target.dtype.element_ty), is_kept)


@triton.jit
def _rotate_and_write_kernel(
    q, k, v, query, keys, values, cos, sin, positions, slots, q_stride, k_stride, v_stride,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    is_in = pair < HALF
    start(OVERLAP)
    turn = tl.load(positions + row) * HALF
    slot = tl.load(slots + row)
    is_kept = is_in & (slot >= 0)
    if head < NUM_HEADS:
        source = q + row * q_stride + head * (2 * HALF)
        target = query + (row * NUM_HEADS + head) * (2 * HALF)
        _rotate(source, target, cos + turn, sin + turn, pair, is_in, is_in, HALF)
    elif head < NUM_HEADS + NUM_KV:
        source = k + row * k_stride + (head - NUM_HEADS) * (2 * HALF)
        target = keys + (slot * NUM_KV + head - NUM_HEADS) * (2 * HALF)
        _rotate(source, target, cos + turn, sin + turn, pair, is_in, is_kept, HALF)
    else:
        source = v + row * v_stride + (head - NUM_HEADS - NUM_KV) * (2 * HALF)
        target = values + (slot * NUM_KV + head - NUM_HEADS - NUM_KV) * (2 * HALF)
        tl.store(target + pair, tl.load(source + pair, is_in), is_kept)
        tl.store(target + HALF + pair, tl.load(source + HALF + pair, is_in), is_kept)


def rotate_and_write(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    kv: LayerKV,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotated queries [R, heads, D]; rotated K, and V, go to their slots (not where slot < 0).

    Args:
        query: [R, heads, D], rows any distance apart.
        keys, values: [R, KV heads, D], likewise.
        kv: the cache of this layer.
        cos, sin: [positions, D/2] float32, of every position.
        positions, slots: [R] int64.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv = keys.shape[1]
    out = torch.empty((num_rows, num_heads, head_dim), dtype=query.dtype, device=query.device)
    _rotate_and_write_kernel[(num_rows, num_heads + 2 * num_kv)](
        query, keys, values, out, kv.keys, kv.values, cos, sin, positions, slots,
        query.stride(0), keys.stride(0), values.stride(0),
        NUM_HEADS=num_heads, NUM_KV=num_kv, HALF=head_dim // 2, BLOCK=next_power(head_dim // 2, 16),
        **options(1), **NO_FUSED_MULTIPLY,
    )  # fmt: skip
    return out


@triton.jit
def _rope_kernel(
    x, out, cos, sin, stride, NUM_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    is_in = pair < HALF
    start(OVERLAP)
    source = x + row * stride + head * (2 * HALF)
    target = out + (row * NUM_HEADS + head) * (2 * HALF)
    _rotate(source, target, cos + row * HALF, sin + row * HALF, pair, is_in, is_in, HALF)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads: x [R, heads, D], cos and sin [R, D/2] float32, halves D/2 apart."""
    num_rows, num_heads, head_dim = x.shape
    out = torch.empty((num_rows, num_heads, head_dim), dtype=x.dtype, device=x.device)
    _rope_kernel[(num_rows, num_heads)](
        x, out, cos.contiguous(), sin.contiguous(), x.stride(0),
        NUM_HEADS=num_heads, HALF=head_dim // 2, BLOCK=next_power(head_dim // 2, 16),
        **options(1), **NO_FUSED_MULTIPLY,
    )  # fmt: skip
    return out


def write_kv(keys: Tensor, values: Tensor, kv: LayerKV, slots: Tensor) -> None:
    """Write K and V [R, KV heads, D] to their slots."""
    kv.keys[slots] = keys
    kv.values[slots] = values
