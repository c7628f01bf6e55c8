"""The one decoder: token ids in, logits out, at the precision that the view names."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qspec_llm.kernels import Backend, Forward, LayerKV, Packed, Rows
from qspec_llm.model.config import ModelConfig
from qspec_llm.model.layers import Layer, Linear, Rotation, decoder_layer, linear
from qspec_llm.weights.view import USUAL_GROUP, View

__all__ = ["Decoder", "rope_table"]


@dataclass(frozen=True)
class Decoder:
    """Weights and the functions to run them. Holds no state between calls.

    `head` is the embedding's own packed tensor where they are tied. `cos` and `sin` are
    [positions, D/2] float32; activations and KV are `dtype`.
    """

    config: ModelConfig
    ops: Backend
    dtype: torch.dtype
    embedding: Packed
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Linear
    cos: Tensor
    sin: Tensor
    stored_bytes: int  # of the model's tensors, each counted once as it was read
    draft_bytes: int = 0  # of those, what the draft view can read
    draft_group: int = USUAL_GROUP  # of a8 activations: `View.group` of this model's drafts

    def forward(
        self,
        tokens: Tensor,
        rows: Rows,
        kv: Sequence[LayerKV],
        view: View,
        logit_rows: Tensor | None,
    ) -> Tensor:
        """Compute rows, write their KV, and return logits of some of them.

        Tokens and rows may lie on the host; the logits come back where the tokens lie.

        Args:
            tokens: [R] int64.
            rows: where the rows sit.
            kv: the cache, one entry a layer; slots of these rows are overwritten.
            view: which precision to read.
            logit_rows: [L] int64, rows whose logits are wanted; None for all, in order.

        Returns:
            Logits [L, vocabulary] float32.
        """
        view = self.read_view(view)
        home, device = tokens.device, self.ops.device
        if home != device:
            wanted = None if logit_rows is None else logit_rows.to(device)
            return self.forward(tokens.to(device), rows.to(device), kv, view, wanted).to(home)
        if self._whole_step is not None:
            return self._whole_step(tokens, rows, kv, view, logit_rows)
        x = self.ops.embed(tokens, self.embedding, self.dtype)
        rotation = Rotation(self.cos[rows.positions], self.sin[rows.positions])
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x = decoder_layer(self.ops, self.config, x, layer, layer_kv, rotation, view, rows)
        if logit_rows is not None:
            if logit_rows.numel() == 0:
                return x.new_zeros(0, self.config.vocab_size, dtype=torch.float32)
            x = x[logit_rows]
        x = self.ops.rms_norm(x, self.final_norm, self.config.norm_eps)
        return linear(self.ops, x, self.head, self.head_view(view), rows, torch.float32)

    def read_view(self, view: View) -> View:
        """The view with what the model itself says of its drafts."""
        return replace(view, group=self.draft_group) if view.is_draft else view

    def head_view(self, view: View) -> View:
        """The view that the LM head is read in: a draft's activations may be wider there."""
        least = self.config.head_draft
        if not view.is_draft or least is None:
            return view
        wider = max(view.activation, least, key=lambda activation: activation.bits)
        return replace(view, activation=wider)

    @cached_property
    def _whole_step(self) -> Forward | None:
        """All of `forward` in one call, where the backend has that: same results, less between."""
        return self.ops.whole_step(self)

    def matrices(self) -> list[Packed]:
        """Every packed matrix: the embedding, the linears of all layers, the head."""
        linears = [
            part
            for layer in self.layers
            for part in (layer.qkv, layer.output, layer.gate_up, layer.down)
        ]
        parts = [weight for part in (*linears, self.head) for weight, _ in part.parts]
        return [self.embedding, *parts]

    def nbytes(self) -> int:
        """Bytes of weights held, each once: tied tensors lie at one address."""
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in self._tensors()}.values())

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.ops.buffers(self.embedding)
        yield self.final_norm
        linears = [self.head]
        for layer in self.layers:
            linears += [layer.qkv, layer.output, layer.gate_up, layer.down]
            norms = (layer.input_norm, layer.post_attention_norm, layer.q_norm, layer.k_norm)
            yield from (norm for norm in norms if norm is not None)
        for weight, bias in (part for layer in linears for part in layer.parts):
            yield from self.ops.buffers(weight)
            if bias is not None:
                yield bias


def rope_table(
    config: ModelConfig, num_positions: int, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each [num_positions, D/2] float32.

    `factors` [D/2] divide the frequencies: GGUF files carry Llama 3's scaling in that form.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if factors is not None:
        frequency = frequency / factors
    if config.rope_scaling is not None:
        frequency = _stretch(frequency, config)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequency
    return angles.cos(), angles.sin()


def _stretch(frequency: Tensor, config: ModelConfig) -> Tensor:
    """Llama 3's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    scaling = config.rope_scaling
    assert scaling is not None
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_context / wavelength
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
