"""The operations of the contract on this backend: checks in sentences, then one call into C++.

Activations are bfloat16 or float32. Weights of `linear` as in `layout`; integers of a16 activations
have 16 bits a value and one power of two for each 32 or 64 columns (rows.inl, fill_split).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import LayerKV, Packed, Rows
from qspec_llm.kernels.cpu import _cpu
from qspec_llm.kernels.cpu.layout import TYPE_CODES, PackedMatrix
from qspec_llm.weights.view import Activation, View

__all__ = [
    "ACTIVATION_CODES",
    "ACTIVATION_TYPES",
    "attention",
    "buffers",
    "check",
    "check_head_dim",
    "embed",
    "hadamard",
    "linear",
    "pools_of",
    "read_memory",
    "rms_norm",
    "rope",
    "row_table",
    "silu_mul",
    "write_kv",
]

ACTIVATION_CODES = {Activation.A16: 0, Activation.A8: 1, Activation.A4: 2}
ACTIVATION_TYPES = (torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def buffers(packed: PackedMatrix) -> list[Tensor]:
    """The tensors that hold its bytes."""
    return packed.tensors()


def check(packed: Sequence[Packed], views: Sequence[View]) -> None:
    """Nothing: kernels are compiled and tested before they are installed."""


def read_memory(memory: Tensor) -> None:
    """Read every byte of a tensor once."""
    _cpu.read_memory(memory.data_ptr(), memory.nbytes)


def embed(tokens: Tensor, table: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """Rows of the embedding at full precision: tokens [R] int64 to [R, hidden]."""
    _check_indices("tokens", tokens, 1)
    out = torch.empty(tokens.shape[0], table.shape[1], dtype=dtype)
    code = _type_code("the embedding's output", out)
    _cpu.embed(table.matrix, tokens.data_ptr(), tokens.shape[0], out.data_ptr(), code)
    return out


def linear(
    x: Tensor,
    weight: PackedMatrix,
    bias: Tensor | None,
    view: View,
    rows: Rows,  # noqa: ARG001  # one kernel serves prompts and answers
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [R, K] times the view's weights [N, K] transposed, plus bias [N]: [R, N]."""
    num_rows, num_cols = weight.shape
    code = _type_code("x", x)
    if x.ndim != 2 or x.shape[1] != num_cols or not x.is_contiguous():
        raise QSpecError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}; a linear of {num_cols} "
            "columns needs contiguous rows of that length"
        )
    out = torch.empty(x.shape[0], num_rows, dtype=out_dtype or x.dtype)
    out_code = _type_code("a linear's output", out)
    if x.shape[0] == 0:
        return out
    if bias is not None:
        if tuple(bias.shape) != (num_rows,):
            raise QSpecError(f"a bias has shape {tuple(bias.shape)}, not ({num_rows},)")
        bias = bias.float().contiguous()
    _cpu.linear(
        weight.matrix,
        view.is_draft,
        ACTIVATION_CODES[view.activation],
        view.outliers,
        view.group,
        x.data_ptr(),
        code,
        x.shape[0],
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out_code,
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype."""
    size = x.shape[-1]
    if tuple(weight.shape) != (size,):
        raise QSpecError(f"a norm of shape {tuple(weight.shape)} does not fit rows of {size}")
    heads = x.shape[1] if x.ndim == 3 else 1
    stride = _row_stride("x", x)
    out = torch.empty(x.shape, dtype=x.dtype)
    scale = weight.float().contiguous()
    _cpu.rms_norm(
        x.data_ptr(), _type_code("x", x), x.shape[0], stride, heads, size, scale.data_ptr(), eps,
        out.data_ptr(),
    )  # fmt: skip
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads: x [R, heads, D], cos and sin [R, D/2] float32, halves D/2 apart."""
    if x.ndim != 3 or x.shape[2] % 2:
        raise QSpecError(f"heads to rotate have shape {tuple(x.shape)}, not [rows, heads, even D]")
    num_rows, heads, size = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        is_fit = table.dtype is torch.float32 and table.is_contiguous()
        if not is_fit or tuple(table.shape) != (num_rows, size // 2):
            raise QSpecError(
                f"{name} is {table.dtype} {tuple(table.shape)}, not contiguous float32 "
                f"({num_rows}, {size // 2})"
            )
    stride = _row_stride("x", x)
    out = torch.empty(x.shape, dtype=x.dtype)
    _cpu.rope(
        x.data_ptr(), _type_code("x", x), num_rows, stride, heads, size, cos.data_ptr(),
        sin.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def write_kv(
    keys: Tensor,
    values: Tensor,
    kv: LayerKV,
    view: View,  # noqa: ARG001  # both views share one cache
    rows: Rows,
) -> None:
    """Write K and V [R, KV heads, D] to `rows.slots`, over whatever was there."""
    for name, tensor in (("keys", keys), ("values", values)):
        expected = (rows.slots.shape[0], *kv.keys.shape[1:])
        if tuple(tensor.shape) != expected or tensor.dtype != keys.dtype:
            raise QSpecError(
                f"{name} are {tensor.dtype} {tuple(tensor.shape)}, not {keys.dtype} {expected}"
            )
    _cpu.write_kv(
        keys.data_ptr(), _row_stride("keys", keys), values.data_ptr(),
        _row_stride("values", values), _type_code("keys", keys), pools_of(kv), row_table(rows),
    )  # fmt: skip


def attention(
    query: Tensor,
    kv: LayerKV,
    view: View,  # noqa: ARG001  # both views share one cache
    rows: Rows,
) -> Tensor:
    """Causal attention of query [R, heads, D] over the cache at 1/sqrt(D): same shape."""
    num_kv_heads, head_dim = kv.keys.shape[1:]
    is_fit = query.ndim == 3 and query.shape[0] == rows.positions.shape[0]
    if not is_fit or query.shape[2] != head_dim or query.shape[1] % num_kv_heads:
        raise QSpecError(
            f"queries have shape {tuple(query.shape)}; {rows.positions.shape[0]} rows over "
            f"{num_kv_heads} KV heads of {head_dim} need [rows, multiple of KV heads, {head_dim}]"
        )
    check_head_dim(head_dim)
    query = query.contiguous()
    out = torch.empty_like(query)
    _cpu.attention(
        query.data_ptr(), _type_code("query", query), query.shape[1], pools_of(kv),
        row_table(rows), out.data_ptr(),
    )  # fmt: skip
    return out


def hadamard(x: Tensor, order: int) -> Tensor:
    """x [R, K] times H (x) I, H the Hadamard matrix of `order` rows, in x's dtype."""
    code = _type_code("x", x)
    if x.ndim != 2 or not x.is_contiguous():
        raise QSpecError(f"x has shape {tuple(x.shape)} and strides {x.stride()}, not whole rows")
    if order < 1 or order.bit_count() != 1 or x.shape[1] % order:
        raise QSpecError(f"rows of {x.shape[1]} have no Hadamard rotation of order {order}")
    out = torch.empty_like(x)
    _cpu.hadamard(x.data_ptr(), code, x.shape[0], x.shape[1], order, out.data_ptr())
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [R, 2 I] = gate then up: [R, I]."""
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise QSpecError(
            f"gate and up have shape {tuple(gate_up.shape)} and strides {gate_up.stride()}; "
            "they must be contiguous rows of even length"
        )
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype)
    code = _type_code("gate_up", gate_up)
    _cpu.silu_mul(gate_up.data_ptr(), code, num_rows, size, out.data_ptr())
    return out


def check_head_dim(head_dim: int) -> None:
    """Refuse a head size that the attention kernel does not compute."""
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        raise QSpecError(
            f"a head size of {head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}, which the "
            "CPU backend's attention needs"
        )


def pools_of(kv: LayerKV) -> _cpu.Pools:
    """One layer of the cache as C++ sees it; the tensors must outlive it."""
    for name, pool in (("keys", kv.keys), ("values", kv.values)):
        is_fit = pool.ndim == 3 and pool.shape == kv.keys.shape and pool.dtype == kv.keys.dtype
        if not is_fit or not pool.is_contiguous():
            raise QSpecError(
                f"the cache's {name} are {pool.dtype} {tuple(pool.shape)}; both must be contiguous "
                "[slots, KV heads, D] of one dtype"
            )
    num_slots, num_kv_heads, head_dim = kv.keys.shape
    return _cpu.Pools(
        kv.keys.data_ptr(), kv.values.data_ptr(), _type_code("the cache", kv.keys), num_slots,
        num_kv_heads, head_dim, kv.block_size,
    )  # fmt: skip


def row_table(rows: Rows) -> _cpu.RowTable:
    """Rows as C++ sees them; the tensors must outlive it."""
    _check_indices("positions", rows.positions, 1)
    _check_indices("slots", rows.slots, 1)
    _check_indices("cu_rows", rows.cu_rows, 1)
    _check_indices("block_tables", rows.block_tables, 2)
    num_rows, num_spans = rows.positions.shape[0], rows.cu_rows.shape[0] - 1
    if rows.slots.shape[0] != num_rows or rows.block_tables.shape[0] != num_spans:
        raise QSpecError(
            f"{num_rows} positions, {rows.slots.shape[0]} slots, {num_spans} sequences and "
            f"{rows.block_tables.shape[0]} block tables do not belong together"
        )
    return _cpu.RowTable(
        rows.positions.data_ptr(), rows.slots.data_ptr(), rows.cu_rows.data_ptr(),
        rows.block_tables.data_ptr(), num_rows, num_spans, rows.block_tables.shape[1],
    )  # fmt: skip


def _type_code(name: str, tensor: Tensor) -> int:
    if tensor.dtype not in ACTIVATION_TYPES:
        raise QSpecError(f"{name} is {tensor.dtype}; the CPU backend computes bfloat16 or float32")
    return TYPE_CODES[tensor.dtype]


def _check_indices(name: str, tensor: Tensor, num_dims: int) -> None:
    if tensor.dtype is not torch.int64 or tensor.ndim != num_dims or not tensor.is_contiguous():
        raise QSpecError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not contiguous int64 with "
            f"{num_dims} dimension{'s' * (num_dims > 1)}"
        )


def _row_stride(name: str, x: Tensor) -> int:
    """Values from one row to the next; what lies within a row must lie together."""
    inner = x.stride()[1:]
    is_fit = inner == (1,) if x.ndim == 2 else x.ndim == 3 and inner == (x.shape[2], 1)
    # a dimension of one element has any stride
    if not is_fit and not x.is_contiguous():
        raise QSpecError(
            f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; it must be [rows, size] "
            "or [rows, heads, D] with each row in one piece"
        )
    return x.stride(0) if x.shape[0] > 1 else 0
