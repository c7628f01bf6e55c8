"""Pieces of a decoder layer in plain torch, for passes over calibration text.

Tensors are float32 and hold bf16 values where the engine's do. Everything can be differentiated.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qspec_llm.model.config import ModelConfig
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.hadamard import order_for, transform
from qspec_llm.weights.planes import Dense, Planes, verify_weight
from qspec_llm.weights.quantize import Target

__all__ = [
    "attend",
    "bf16",
    "heads",
    "norm_of",
    "read_floats",
    "rms_norm",
    "rotated",
    "silu_mul",
    "turned",
]


def read_floats(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor as float32; matrices are rounded to bf16, as the format keeps them."""
    value = checkpoint.read(name, Target.BF16)
    if isinstance(value, Planes):
        return verify_weight(value)
    if isinstance(value, Dense):
        return value.weight.float()
    return value.float() if value.ndim == 1 else bf16(value)


def bf16(x: Tensor) -> Tensor:
    """Rounded to bf16."""
    return x.to(torch.bfloat16).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return bf16(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return bf16(functional.silu(gate) * up)


def turned(x: Tensor, config: ModelConfig) -> Tensor:
    """A linear's input [T, K] as its weights expect it: rotated, where the model is."""
    if config.hadamard is None:
        return x
    return bf16(transform(x, order_for(x.shape[1], config.hadamard)))


def heads(x: Tensor, config: ModelConfig) -> Tensor:
    """x [T, heads * D] as [T, heads, D]."""
    return x.view(len(x), -1, config.head_dim)


def rotated(
    x: Tensor,
    norm: Tensor | None,
    rotation: tuple[Tensor, Tensor],
    config: ModelConfig,
) -> Tensor:
    """Query or key heads, [T, heads * D] to [T, heads, D]: Qwen3's norm where there is one, RoPE.

    `rotation` is cos and sin, [T, D/2] each.
    """
    x = heads(x, config)
    if norm is not None:
        x = rms_norm(x, norm, config.norm_eps)
    first, second = x.chunk(2, -1)
    cos, sin = (table[:, None] for table in rotation)
    return bf16(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own: tuple[Tensor, Tensor] | None,
    spans: Sequence[slice],
) -> Tensor:
    """Causal attention within each span of rows, [T, heads, D] to [T, heads * D].

    Args:
        query: [T, heads, D].
        keys: [T, KV heads, D].
        values: [T, KV heads, D].
        own: K and V that stand in for a row's own position: a draft's, over KV of the verify view.
        spans: rows of each sequence.
    """
    repeats = query.shape[1] // keys.shape[1]
    parts = []
    for rows in spans:
        q = query[rows].transpose(0, 1)  # [heads, t, D]
        k, v = (x[rows].transpose(0, 1).repeat_interleave(repeats, 0) for x in (keys, values))
        if own is None:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            own_k, own_v = (x[rows].transpose(0, 1).repeat_interleave(repeats, 0) for x in own)
            out = _attend_own(q, k, v, own_k, own_v)
        parts.append(out.transpose(0, 1))
    return bf16(torch.cat(parts).flatten(1))


def _attend_own(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """Attention of [heads, t, D] to earlier K and V, and to a row's own."""
    earlier = (q @ k.transpose(1, 2)).masked_fill(_not_earlier(q.shape[1]), -torch.inf)
    here = (q * own_k).sum(-1, keepdim=True)
    weights = (torch.cat((earlier, here), -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return weights[..., :-1] @ v + weights[..., -1:] * own_v


def _not_earlier(num_rows: int) -> Tensor:
    return torch.ones(num_rows, num_rows, dtype=torch.bool).triu()


def norm_of(weights: Mapping[str, Tensor], prefix: str, name: str) -> Tensor | None:
    """The norm of query or key heads, which Qwen3 has."""
    return weights.get(f"{prefix}self_attn.{name}_norm.weight")
