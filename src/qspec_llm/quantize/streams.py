"""Two streams of activations through one layer at a time: the exact model's and a quantised one's.

The exact stream is the 16-bit model. The other is what the layers quantised so far make of the same
text: for a nested target the draft, whose linears see rounded activations and whose attention reads
KV that the verify view wrote, as it will at the first position of each cycle; for `int4` the target
itself, over its own KV. A layer is quantised with the inputs it will see, and asked for what the
exact layer gives for the inputs *it* sees (`qspec_llm.weights.methods.moments`).

Plain torch on float32 tensors that hold bf16 values where the engine's do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qspec_llm.kernels.reference import round_activations
from qspec_llm.model.config import ModelConfig
from qspec_llm.quantize.layer import (
    attend,
    bf16,
    heads,
    norm_of,
    rms_norm,
    rotated,
    silu_mul,
    turned,
)
from qspec_llm.quantize.text import CalibrationText
from qspec_llm.weights.methods import Moments
from qspec_llm.weights.view import Activation, draft_view

__all__ = ["Choose", "Streams", "advance", "measure_head", "start"]

# (module names on one input, their weights stacked [N, K] float32, inputs) -> what to multiply with
Choose = Callable[[Sequence[str], Tensor, Moments], Tensor]


@dataclass
class Streams:
    """Hidden states of both, [T, hidden] float32, and what the other one differs by.

    `activation` is what its linears see; A16 stands for a target that computes its own KV. `errors`
    has, by module, the squared error of its output in parts of the output's square, held-out rows.
    """

    text: CalibrationText
    cos: Tensor  # [T, D/2]
    sin: Tensor
    exact: Tensor
    other: Tensor
    activation: Activation
    reads_exact_kv: bool
    errors: dict[str, float] = field(default_factory=dict)


def start(
    text: CalibrationText,
    embedded: Tensor,
    rotation: tuple[Tensor, Tensor],
    activation: Activation,
    *,
    reads_exact_kv: bool,
) -> Streams:
    """Both streams before the first layer.

    Args:
        text: the calibration text.
        embedded: its tokens' embeddings, [T, hidden] float32.
        rotation: cos and sin of every position, [positions, D/2].
        activation: what the other stream's linears see.
        reads_exact_kv: whether its attention reads the exact stream's K and V, as a draft does.
    """
    cos, sin = (table[text.positions] for table in rotation)
    return Streams(text, cos, sin, embedded, embedded, activation, reads_exact_kv)


def advance(
    streams: Streams,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    prefix: str,
    choose: Choose,
) -> None:
    """Take both streams through one layer, in place.

    Args:
        streams: hidden states before the layer; after it when this returns.
        config: of the model.
        weights: the layer's tensors, float32, by full name.
        prefix: what their names begin with, "model.layers.3.".
        choose: quantises matrices that share an input.
    """
    layer = _Layer(streams, config, weights, prefix, choose)
    layer.attention()
    layer.mlp()


def measure_head(
    streams: Streams, final: tuple[Tensor, Tensor], config: ModelConfig, module: str, choose: Choose
) -> float | None:
    """Quantise the LM head and say on which share of held-out answer rows both streams agree.

    Args:
        streams: hidden states after the last layer.
        final: weights of the last norm [hidden] and of the head [vocabulary, hidden].
        config: of the model.
        module: the head's name.
        choose: quantises it.
    """
    norm, head = final
    exact = rms_norm(streams.exact, norm, config.norm_eps)
    other = rms_norm(streams.other, norm, config.norm_eps)
    other = round_activations(other, draft_view(streams.activation))
    quantised = choose((module,), head, _moments(streams, other, exact))
    first = streams.text.num_fitted
    rows = torch.nonzero(streams.text.is_answer[first:])[:, 0] + first
    if not len(rows):
        return None
    hits = sum(
        int(((exact[part] @ head.T).argmax(-1) == (other[part] @ quantised.T).argmax(-1)).sum())
        for part in torch.split(rows, 512)
    )
    return hits / len(rows)


@dataclass
class _Layer:
    streams: Streams
    config: ModelConfig
    weights: Mapping[str, Tensor]
    prefix: str
    choose: Choose

    def attention(self) -> None:
        exact, other = self._normed("input_layernorm")
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        outputs = self._linears(names, exact, other)
        (q, k, v), (q2, k2, v2) = (self._query_key_value(*x) for x in zip(*outputs, strict=True))
        spans = self.streams.text.spans()
        exact = attend(q, k, v, None, spans)
        reads_exact = self.streams.reads_exact_kv
        other = (
            attend(q2, k, v, (k2, v2), spans) if reads_exact else attend(q2, k2, v2, None, spans)
        )
        self._add("self_attn.o_proj", exact, other)

    def mlp(self) -> None:
        exact, other = self._normed("post_attention_layernorm")
        (gate, gate2), (up, up2) = self._linears(("mlp.gate_proj", "mlp.up_proj"), exact, other)
        self._add("mlp.down_proj", silu_mul(gate, up), silu_mul(gate2, up2))

    def _normed(self, module: str) -> tuple[Tensor, Tensor]:
        weight = self.weights[f"{self.prefix}{module}.weight"]
        eps = self.config.norm_eps
        return rms_norm(self.streams.exact, weight, eps), rms_norm(self.streams.other, weight, eps)

    def _add(self, module: str, exact: Tensor, other: Tensor) -> None:
        """The residual connection around a linear."""
        ((change, change2),) = self._linears((module,), exact, other)
        self.streams.exact = bf16(self.streams.exact + change)
        self.streams.other = bf16(self.streams.other + change2)

    def _linears(
        self, modules: Sequence[str], exact: Tensor, other: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Quantise matrices on one input; their outputs in both streams."""
        streams = self.streams
        names = [self.prefix + module for module in modules]
        matrices = [self.weights[f"{name}.weight"] for name in names]
        exact, other = turned(exact, self.config), turned(other, self.config)
        other = round_activations(other, draft_view(streams.activation))
        chosen = self.choose(names, torch.cat(matrices), _moments(streams, other, exact))
        outputs = []
        for name, matrix, part in zip(
            names, matrices, torch.split(chosen, [len(m) for m in matrices]), strict=True
        ):
            wanted, found = exact @ matrix.T, other @ part.T
            streams.errors[name] = _relative_error(streams, wanted, found)
            bias = self.weights.get(f"{name}.bias", torch.zeros(()))
            outputs.append((bf16(wanted + bias), bf16(found + bias)))
        return outputs

    def _query_key_value(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rotation = self.streams.cos, self.streams.sin
        q, k = (
            rotated(x, norm_of(self.weights, self.prefix, name), rotation, self.config)
            for x, name in ((q, "q"), (k, "k"))
        )
        return q, k, heads(v, self.config)


def _moments(streams: Streams, other: Tensor, exact: Tensor) -> Moments:
    fitted = slice(0, streams.text.num_fitted)
    return Moments.of(other[fitted], exact[fitted])


def _relative_error(streams: Streams, wanted: Tensor, found: Tensor) -> float:
    rows = slice(streams.text.num_fitted, None)
    error = (found[rows] - wanted[rows]).square().sum()
    return float(error / wanted[rows].square().sum())
