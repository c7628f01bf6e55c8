"""A forward pass with fused kernels: the same bits as the operations one by one.

A single generated row goes through all layers in one kernel (persistent.py), where that knows the
model. Others take seven launches a layer. Fused are the residual add with the norm after it and the
quantisation after that; RoPE, the write of K and V, attention, the merge of its splits and the
quantisation after it; SwiGLU with the quantisation after it. Nothing here waits for the GPU but the
self-check of a view's first pass, so a pass can be captured in a graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import Forward, LayerKV, Rows
from qspec_llm.kernels.cuda.activations import Quantized
from qspec_llm.kernels.cuda.attention import rotate_write_attend
from qspec_llm.kernels.cuda.matrices import embed, linear, takes_quantized
from qspec_llm.kernels.cuda.persistent import Layout, Persistent
from qspec_llm.kernels.cuda.rows import add_rms_norm, rms_norm, silu_mul
from qspec_llm.kernels.triton.prompt import attend_prompt
from qspec_llm.kernels.triton.rope import rotate_and_write
from qspec_llm.weights.view import Activation, View

__all__ = ["whole_step"]

CHECKED_CONTEXT = 300  # positions that a self-check attends to: every lane has keys


def whole_step(decoder: Any) -> Forward | None:
    """A replacement for `Decoder.forward` with equal results.

    Raises:
        QSpecError: the model is rotated or has outlier columns, which the kernels do not know yet.
    """
    if decoder.config.hadamard is not None:
        raise QSpecError(
            "the linears of this model take rotated inputs, which backend 'cuda' does not support "
            "yet; use --backend cpu"
        )
    if decoder.config.outliers is not None:
        raise QSpecError(
            "the drafts of this model see outlier columns in 8 bits, which backend 'cuda' does not "
            "support yet; use --backend cpu"
        )
    return _WholeStep(decoder)


class _WholeStep:
    """The decoder's layers, and which of their linears take quantised activations."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        config = decoder.config
        self._sizes = [config.query_size, config.kv_size, config.kv_size]
        self._persistent = Persistent(decoder) if Persistent.takes(decoder) else None
        self._checked: set[tuple[View, Layout]] = set()

    def __call__(
        self,
        tokens: Tensor,
        rows: Rows,
        kv: Sequence[LayerKV],
        view: View,
        logit_rows: Tensor | None,
    ) -> Tensor:
        """What `Decoder.forward` returns, for tensors on the GPU."""
        decoder, eps = self._decoder, self._decoder.config.norm_eps
        x = embed(tokens, decoder.embedding, decoder.dtype)
        x, delta = self._layers(x, rows, kv, view)
        if logit_rows is not None:
            if logit_rows.numel() == 0:
                return x.new_zeros(0, decoder.config.vocab_size, dtype=torch.float32)
            x = x[logit_rows]
            delta = None if delta is None else delta[logit_rows]
        _, hidden = add_rms_norm(x, delta, decoder.final_norm, eps, self._form(decoder.head, view))
        return self._linear(hidden, decoder.head, view, rows, torch.float32)

    def _layers(
        self, x: Tensor, rows: Rows, kv: Sequence[LayerKV], view: View
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after all layers, and what is still to be added to it."""
        if self._persistent is None:
            return self._one_by_one(x, rows, kv, view)
        laid = self._persistent.layout(rows, view, kv[0].block_size)
        if laid is None:
            return self._one_by_one(x, rows, kv, view)
        if (view, laid) not in self._checked and not torch.cuda.is_current_stream_capturing():
            self._check(view, laid, kv[0].block_size)
        self._persistent(x, rows, kv, view, laid)
        return x, None

    def _check(self, view: View, laid: Layout, block_size: int) -> None:
        """Compare, before it serves, the one kernel with the many: every bit of a random row.

        Raises:
            QSpecError: they differ.
        """
        assert self._persistent is not None
        config, device = self._decoder.config, self._decoder.cos.device
        generator = torch.Generator(device).manual_seed(0)

        def some(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return values.to(self._decoder.dtype)

        context = min(CHECKED_CONTEXT, self._decoder.cos.shape[0])
        num_blocks = -(-context // block_size)
        last = torch.tensor([context - 1])
        bounds, tables = torch.tensor([0, 1]), torch.arange(num_blocks)[None]
        rows = Rows(last, last, bounds, last + 1, tables, is_prompt=False).to(device)
        size = (num_blocks * block_size, config.num_kv_heads, config.head_dim)
        cache = LayerKV(some(*size), some(*size), block_size)  # of all layers, each writes its row
        kv = [cache] * len(self._decoder.layers)

        def found(x: Tensor) -> list[Tensor]:
            """The row after all layers, and what the last of them left in the cache."""
            written = cache.keys[context - 1].clone(), cache.values[context - 1].clone()
            cache.keys[context - 1] = cache.values[context - 1] = torch.nan
            return [x, *written]

        start = some(1, config.hidden_size)
        found(start)  # forgets the row
        ours = start.clone()
        self._persistent(ours, rows, kv, view, laid)
        one = found(ours)
        x, delta = self._one_by_one(start, rows, kv, view)
        assert delta is not None
        many = found((x.float() + delta.float()).to(x.dtype))
        pairs = [(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(one, many, strict=True)]
        is_finite = all(bool(torch.isfinite(part).all()) for part in many)
        if not is_finite or not all(torch.equal(a, b) for a, b in pairs):
            raise QSpecError(
                f"the cuda backend's self-check failed on {config.family} layers: a row that goes "
                "through all of them in one kernel differs from one that goes kernel by kernel; "
                "use backend 'cpu' and report the versions of the driver and of qspec-llm"
            )
        self._checked.add((view, laid))

    def _one_by_one(
        self, x: Tensor, rows: Rows, kv: Sequence[LayerKV], view: View
    ) -> tuple[Tensor, Tensor | None]:
        """The layers, kernel by kernel."""
        decoder, eps = self._decoder, self._decoder.config.norm_eps
        delta = None
        for layer, layer_kv in zip(decoder.layers, kv, strict=True):
            x, hidden = add_rms_norm(x, delta, layer.input_norm, eps, self._form(layer.qkv, view))
            qkv = self._linear(hidden, layer.qkv, view, rows)
            attended = self._attend(qkv, layer, layer_kv, rows, self._form(layer.output, view))
            delta = self._linear(attended, layer.output, view, rows)
            post_norm = layer.post_attention_norm
            x, hidden = add_rms_norm(x, delta, post_norm, eps, self._form(layer.gate_up, view))
            gate_up = self._linear(hidden, layer.gate_up, view, rows)
            inner = silu_mul(gate_up, self._form(layer.down, view))
            delta = self._linear(inner, layer.down, view, rows)
        return x, delta

    def _form(self, layer: Any, view: View) -> View | None:
        """How to quantise the input of a linear: not at all if one of its parts is dense."""
        takes = all(takes_quantized(weight, self._decoder.dtype) for weight, _ in layer.parts)
        return view if takes and view.activation is not Activation.A16 else None

    def _linear(
        self,
        x: Tensor | Quantized,
        layer: Any,
        view: View,
        rows: Rows,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        out_dtype = out_dtype or self._decoder.dtype
        parts = [linear(x, weight, bias, view, rows, out_dtype) for weight, bias in layer.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _attend(
        self, qkv: Tensor, layer: Any, kv: LayerKV, rows: Rows, form: View | None
    ) -> Tensor | Quantized:
        """q, k, v [R, (heads + 2 KV heads) D] to the attention's rows [R, heads D]."""
        decoder = self._decoder
        query, key, value = (
            part.view(len(part), -1, decoder.config.head_dim)
            for part in torch.split(qkv, self._sizes, dim=-1)
        )
        if layer.q_norm is not None:
            query = rms_norm(query, layer.q_norm, decoder.config.norm_eps)
            key = rms_norm(key, layer.k_norm, decoder.config.norm_eps)
        angles = (decoder.cos, decoder.sin)
        if rows.is_prompt:
            query = rotate_and_write(query, key, value, kv, *angles, rows.positions, rows.slots)
            return attend_prompt(query, kv, rows).flatten(1)
        out = rotate_write_attend(query, key, value, kv, angles, rows, form)
        return out if isinstance(out, Quantized) else out.flatten(1)
