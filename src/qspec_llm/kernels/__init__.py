"""The contract between the model and its kernels: one module a backend, one function an operation.

`reference` is the definition: plain torch, slow, exact in what it promises. Every backend exports
the names of `Backend`; shapes and dtypes are stated there once.

Row independence is part of the contract: a row's result depends on that row, the weights, the view
and `rows.is_prompt`, never on how many other rows are computed with it or which. That is what makes
speculative output equal to plain output bit for bit.
"""

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.planes import Stored
from qspec_llm.weights.view import View

__all__ = [
    "BACKENDS",
    "Backend",
    "Forward",
    "LayerKV",
    "Packed",
    "Rows",
    "available_backends",
    "get_backend",
]

# A stored tensor in the arrangement that one backend reads; only that backend looks inside.
Packed: TypeAlias = Any


@dataclass(frozen=True)
class Rows:
    """Where the rows of one forward pass sit: R rows of S sequences, laid end to end.

    Attributes:
        positions: [R] int64, position of each row in its sequence.
        slots: [R] int64, where each row's K and V are written.
        cu_rows: [S + 1] int64, first row of each sequence, then R.
        contexts: [S] int64, keys that the last row of each sequence sees (its position + 1).
        block_tables: [S, max blocks] int64, KV blocks of each sequence, padded with 0.
        is_prompt: every row is a prompt position (prefill kernels) or every row is a generated
            one (decode kernels). It depends on the position alone, so recomputing gives the same.
    """

    positions: Tensor
    slots: Tensor
    cu_rows: Tensor
    contexts: Tensor
    block_tables: Tensor
    is_prompt: bool

    def to(self, device: torch.device) -> "Rows":
        """The same rows on a device; itself where it is there already."""
        if self.positions.device == device:
            return self
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "is_prompt"
        }
        return Rows(**moved, is_prompt=self.is_prompt)


@dataclass(frozen=True)
class LayerKV:
    """K and V of one layer, [slots, KV heads, D]; slot = block * block_size + offset."""

    keys: Tensor
    values: Tensor
    block_size: int


# Tokens, rows, cache, view and rows wanted to logits: what `Decoder.forward` does.
Forward: TypeAlias = Callable[[Tensor, Rows, Sequence[LayerKV], View, Tensor | None], Tensor]


class Backend(Protocol):
    """What a backend module exports."""

    name: str
    device: torch.device  # where its tensors lie

    def configure(self, num_threads: int | None, isa: str | None) -> None:
        """Set threads and instruction set for the whole process; None leaves what is.

        Raises:
            QSpecError: this machine or this backend has no such thing.
        """

    def num_threads(self) -> int:
        """Threads that the kernels use."""

    def pack(self, stored: Stored) -> Packed:
        """Arrange a stored tensor for this backend; the same bits, no copy kept."""

    def unpack(self, packed: Packed) -> Stored:
        """Undo `pack` exactly."""

    def buffers(self, packed: Packed) -> list[Tensor]:
        """The tensors that hold its bytes, so that bytes can be counted where they lie."""

    def check(self, packed: Sequence[Packed], views: Sequence[View]) -> None:
        """Compare, once, the kernels that these matrices need in these views with the reference.

        A backend whose kernels were compiled and tested before they were installed does nothing.

        Raises:
            QSpecError: a kernel computed something else.
        """

    def read_memory(self, memory: Tensor) -> None:
        """Read every byte of a tensor once, as fast as this backend can read anything."""

    def embed(self, tokens: Tensor, table: Packed, dtype: torch.dtype) -> Tensor:
        """Rows of the embedding at full precision in either view: tokens [R] to [R, hidden]."""

    def linear(
        self,
        x: Tensor,
        weight: Packed,
        bias: Tensor | None,
        view: View,
        rows: Rows,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [R, K] times the view's weights [N, K] transposed, plus bias [N]: [R, N].

        Accumulates in float32 at least; returns `out_dtype`, by default that of x. What a draft
        sees of x is `reference.quantize_activations`; of a model whose a4 drafts have outlier
        columns a backend may refuse `whole_step`.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype."""

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate heads: x [R, heads, D], cos and sin [R, D/2] float32, halves D/2 apart."""

    def write_kv(self, keys: Tensor, values: Tensor, kv: LayerKV, view: View, rows: Rows) -> None:
        """Write K and V [R, KV heads, D] to `rows.slots`, over whatever was there."""

    def attention(self, query: Tensor, kv: LayerKV, view: View, rows: Rows) -> Tensor:
        """Causal attention of query [R, heads, D] over the cache at 1/sqrt(D): same shape."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for gate_up [R, 2 I] = gate then up: [R, I]."""

    def hadamard(self, x: Tensor, order: int) -> Tensor:
        """x [R, K] times H (x) I, H the Hadamard matrix of `order` rows, in x's dtype.

        Every bit is `weights.hadamard.transform`'s, rounded once.
        """

    def whole_step(self, decoder: Any) -> Forward | None:
        """The decoder's forward pass as one call, or None: run it operation by operation.

        For a small model the way from one operation to the next costs as much as the operation. The
        results must equal, bit for bit, those of this backend's operations one by one. `decoder` is
        a `model.decoder.Decoder` whose tensors this backend packed.
        """


BACKENDS = ("reference", "cpu", "cuda")
MODULES = {"cuda": "cuda.backend"}  # of those whose package can be imported where they cannot run


def available_backends() -> tuple[str, ...]:
    """Backends that run on this machine, the fastest first."""
    found = []
    for name in reversed(BACKENDS):
        with contextlib.suppress(QSpecError):
            get_backend(name)
            found.append(name)
    return tuple(found)


def get_backend(name: str) -> Backend:
    """The backend module of that name.

    Raises:
        QSpecError: there is no such backend, or it does not run on this machine.
    """
    if name not in BACKENDS:
        raise QSpecError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(f"qspec_llm.kernels.{MODULES.get(name, name)}"))
