"""A forward pass as one call into C++, where the decoder is one that it can run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import Forward, LayerKV, Rows
from qspec_llm.kernels.cpu import _cpu
from qspec_llm.kernels.cpu.ops import (
    ACTIVATION_CODES,
    ACTIVATION_TYPES,
    check_head_dim,
    pools_of,
    row_table,
)
from qspec_llm.weights.view import View

__all__ = ["whole_step"]


def whole_step(decoder: Any) -> Forward | None:
    """A replacement for `Decoder.forward` with equal results, or None where there is none."""
    if decoder.dtype not in ACTIVATION_TYPES:
        return None
    try:
        check_head_dim(decoder.config.head_dim)
    except QSpecError:
        return None
    # From here on torch only chooses tokens. Its threads would spin, for milliseconds after each of
    # those small operations, on the cores that ours need: a third of SmolLM2's speed.
    torch.set_num_threads(1)
    return _WholeStep(decoder)


class _WholeStep:
    """Holds what C++ holds the addresses of."""

    def __init__(self, decoder: Any) -> None:
        config = decoder.config
        self._decoder = decoder
        self._vectors: list[Tensor] = []  # norms and biases as float32
        self._kv: Sequence[LayerKV] = ()
        self._step = _cpu.Step(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocabulary=config.vocab_size,
            eps=config.norm_eps,
            is_float=decoder.dtype is torch.float32,
            hadamard=config.hadamard or 0,
            outliers=config.outliers or 0,
            embedding=decoder.embedding.matrix,
            final_norm=self._vector(decoder.final_norm),
            head=self._parts(decoder.head),
            cos=self._vector(decoder.cos),
            sin=self._vector(decoder.sin),
            num_positions=decoder.cos.shape[0],
        )
        for layer in decoder.layers:
            self._step.add_layer(
                input_norm=self._vector(layer.input_norm),
                post_norm=self._vector(layer.post_attention_norm),
                q_norm=self._vector(layer.q_norm),
                k_norm=self._vector(layer.k_norm),
                qkv=self._parts(layer.qkv),
                output=self._parts(layer.output),
                gate_up=self._parts(layer.gate_up),
                down=self._parts(layer.down),
            )

    def __call__(
        self,
        tokens: Tensor,
        rows: Rows,
        kv: Sequence[LayerKV],
        view: View,
        logit_rows: Tensor | None,
    ) -> Tensor:
        """What `Decoder.forward` returns."""
        if logit_rows is None:
            logit_rows = torch.arange(len(tokens))
        if kv is not self._kv:
            self._step.set_cache([pools_of(layer) for layer in kv])
            self._kv = kv  # and thereby alive
        if tokens.dtype is not torch.int64 or tokens.shape != rows.positions.shape:
            raise QSpecError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}, not int64 like the "
                f"{rows.positions.shape[0]} positions"
            )
        if logit_rows.dtype is not torch.int64 or logit_rows.ndim != 1:
            raise QSpecError(f"logit_rows is {logit_rows.dtype} of {logit_rows.ndim} dimensions")
        tokens, logit_rows = tokens.contiguous(), logit_rows.contiguous()
        logits = torch.empty(logit_rows.shape[0], self._decoder.config.vocab_size)
        self._step.forward(
            tokens.data_ptr(),
            row_table(rows),
            view.is_draft,
            ACTIVATION_CODES[view.activation],
            view.group,
            ACTIVATION_CODES[self._decoder.head_view(view).activation],
            logit_rows.data_ptr(),
            logit_rows.shape[0],
            logits.data_ptr(),
        )
        return logits

    def _vector(self, tensor: Tensor | None) -> int:
        """The address of a vector or table as float32, 0 where there is none."""
        if tensor is None:
            return 0
        self._vectors.append(tensor.float().contiguous())
        return self._vectors[-1].data_ptr()

    def _parts(self, linear: Any) -> list[tuple[_cpu.Matrix, int]]:
        return [(weight.matrix, self._vector(bias)) for weight, bias in linear.parts]
