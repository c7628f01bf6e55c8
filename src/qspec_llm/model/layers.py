"""The parts of a decoder layer, as functions of their inputs and their weights.

State comes in as arguments: one `Rows`, one `View`, one layer of KV. Nothing is remembered.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qspec_llm.kernels import Backend, LayerKV, Packed, Rows
from qspec_llm.model.config import ModelConfig
from qspec_llm.weights.hadamard import order_for
from qspec_llm.weights.view import View

__all__ = ["Layer", "Linear", "Rotation", "decoder_layer", "linear"]


@dataclass(frozen=True)
class Linear:
    """One or more matrices on the same input, their outputs side by side.

    q, k, v (and gate, up) are one part where they share a spec and several where they do not.
    """

    parts: tuple[tuple[Packed, Tensor | None], ...]  # (matrix [N, K], bias [N] or None)


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer. Norm weights are vectors; q_norm and k_norm are Qwen3's."""

    input_norm: Tensor
    qkv: Linear
    output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True)
class Rotation:
    """cos and sin [R, D/2] float32 of the rows' positions."""

    cos: Tensor
    sin: Tensor


def linear(
    ops: Backend,
    x: Tensor,
    layer: Linear,
    view: View,
    rows: Rows,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [R, K] through every part of `layer`: [R, sum of N]."""
    parts = [ops.linear(x, weight, bias, view, rows, out_dtype) for weight, bias in layer.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def decoder_layer(
    ops: Backend,
    config: ModelConfig,
    x: Tensor,
    layer: Layer,
    kv: LayerKV,
    rotation: Rotation,
    view: View,
    rows: Rows,
) -> Tensor:
    """One layer: x [R, hidden] plus its attention, plus its MLP."""
    view = replace(view, outliers=config.outliers or 0)
    hidden = _turned(ops, config, ops.rms_norm(x, layer.input_norm, config.norm_eps))
    x = x + _attention(ops, config, hidden, layer, kv, rotation, view, rows)
    hidden = _turned(ops, config, ops.rms_norm(x, layer.post_attention_norm, config.norm_eps))
    return x + _mlp(ops, config, hidden, layer, view, rows)


def _turned(ops: Backend, config: ModelConfig, x: Tensor) -> Tensor:
    """A linear's input x [R, K] as its weights expect it: rotated, where the model is."""
    if config.hadamard is None:
        return x
    return ops.hadamard(x, order_for(x.shape[-1], config.hadamard))


def _attention(
    ops: Backend,
    config: ModelConfig,
    x: Tensor,
    layer: Layer,
    kv: LayerKV,
    rotation: Rotation,
    view: View,
    rows: Rows,
) -> Tensor:
    sizes = [config.query_size, config.kv_size, config.kv_size]
    qkv = torch.split(linear(ops, x, layer.qkv, view, rows), sizes, dim=-1)
    query, key, value = (part.reshape(len(part), -1, config.head_dim) for part in qkv)
    if layer.q_norm is not None and layer.k_norm is not None:
        query = ops.rms_norm(query, layer.q_norm, config.norm_eps)
        key = ops.rms_norm(key, layer.k_norm, config.norm_eps)
    query = ops.rope(query, rotation.cos, rotation.sin)  # [R, heads, D]
    key = ops.rope(key, rotation.cos, rotation.sin)  # [R, KV heads, D]
    ops.write_kv(key, value, kv, view, rows)
    out = _turned(ops, config, ops.attention(query, kv, view, rows).flatten(1))
    # its columns keep their heads' order, so that none of them are known to be outliers
    return linear(ops, out, layer.output, replace(view, outliers=0), rows)


def _mlp(
    ops: Backend, config: ModelConfig, x: Tensor, layer: Layer, view: View, rows: Rows
) -> Tensor:
    gate_up = linear(ops, x, layer.gate_up, view, rows)
    return linear(ops, _turned(ops, config, ops.silu_mul(gate_up)), layer.down, view, rows)
