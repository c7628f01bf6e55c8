"""The operations of the contract, one kernel each: what `step`, which fuses them, must equal."""

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.kernels.cuda import attention as decode_attention
from qspec_llm.kernels.cuda import rows as row_kernels
from qspec_llm.kernels.triton import prompt
from qspec_llm.kernels.triton import rope as rotation
from qspec_llm.weights.hadamard import transform
from qspec_llm.weights.view import View

__all__ = [
    "attention",
    "configure",
    "hadamard",
    "num_threads",
    "rms_norm",
    "rope",
    "silu_mul",
    "write_kv",
]


def configure(num_threads: int | None, isa: str | None) -> None:
    """Threads are torch's on the host; there is no instruction set to choose."""
    if isa is not None:
        raise QSpecError(f"isa {isa!r} is an option of the cpu backend, not of the cuda backend")
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def num_threads() -> int:
    """Threads that torch uses on the host."""
    return torch.get_num_threads()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of [R, K] or [R, heads, K]."""
    return row_kernels.rms_norm(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads: x [R, heads, D], cos and sin [R, D/2] float32, halves D/2 apart."""
    return rotation.rope(x, cos, sin)


def write_kv(keys: Tensor, values: Tensor, kv: LayerKV, view: View, rows: Rows) -> None:  # noqa: ARG001  # both views share one cache
    """Write K and V [R, KV heads, D] to `rows.slots`, over whatever was there."""
    rotation.write_kv(keys, values, kv, rows.slots)


def attention(query: Tensor, kv: LayerKV, view: View, rows: Rows) -> Tensor:  # noqa: ARG001
    """Causal attention of query [R, heads, D] over the cache at 1/sqrt(D): same shape."""
    if rows.is_prompt:
        return prompt.attend_prompt(query, kv, rows)
    out = decode_attention.attend(query, kv, rows)
    assert isinstance(out, Tensor)
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [R, 2 I] = gate then up: [R, I]."""
    out = row_kernels.silu_mul(gate_up)
    assert isinstance(out, Tensor)
    return out


def hadamard(x: Tensor, order: int) -> Tensor:
    """x [R, K] times H (x) I, H of `order` rows: the reference's additions, on the GPU."""
    return transform(x.float(), order).to(x.dtype)
