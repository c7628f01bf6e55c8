"""Two streams of activations through one layer at a time: the exact model's and a quantised one's.

The exact stream is the 16-bit model. The other is what the layers quantised so far make of the same
text: for a nested target the draft, whose linears see rounded activations and whose attention reads
KV that the verify view wrote, as it will at the first position of each cycle; for `int4` the target
itself, over its own KV. A layer is quantised with the inputs it will see, and asked for what the
exact layer gives for the inputs *it* sees (`qspec_llm.weights.methods.moments`).

Plain torch on float32 tensors that hold bf16 values where the engine's do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from qspec_llm.kernels.reference import round_activations
from qspec_llm.model.config import ModelConfig
from qspec_llm.quantize.text import CalibrationText
from qspec_llm.weights.methods import Moments
from qspec_llm.weights.view import Activation

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
    exact = _norm(streams.exact, norm, config.norm_eps)
    other = _rounded(_norm(streams.other, norm, config.norm_eps), streams.activation)
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
        (q, q2), (k, k2), (v, v2) = self._linears(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), exact, other
        )
        q, k, q2, k2 = (
            self._rotated(x, name) for x, name in ((q, "q"), (k, "k"), (q2, "q"), (k2, "k"))
        )
        v, v2 = self._heads(v), self._heads(v2)
        exact = self._attend(q, k, v, None)
        own = (k2, v2)
        if self.streams.reads_exact_kv:
            other = self._attend(q2, k, v, own)
        else:
            other = self._attend(q2, *own, None)
        self._add("self_attn.o_proj", exact, other)

    def mlp(self) -> None:
        exact, other = self._normed("post_attention_layernorm")
        (gate, gate2), (up, up2) = self._linears(("mlp.gate_proj", "mlp.up_proj"), exact, other)
        self._add("mlp.down_proj", _silu_mul(gate, up), _silu_mul(gate2, up2))

    def _normed(self, module: str) -> tuple[Tensor, Tensor]:
        weight = self.weights[f"{self.prefix}{module}.weight"]
        eps = self.config.norm_eps
        return _norm(self.streams.exact, weight, eps), _norm(self.streams.other, weight, eps)

    def _add(self, module: str, exact: Tensor, other: Tensor) -> None:
        """The residual connection around a linear."""
        ((change, change2),) = self._linears((module,), exact, other)
        self.streams.exact = _bf16(self.streams.exact + change)
        self.streams.other = _bf16(self.streams.other + change2)

    def _linears(
        self, modules: Sequence[str], exact: Tensor, other: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Quantise matrices on one input; their outputs in both streams."""
        streams = self.streams
        names = [self.prefix + module for module in modules]
        matrices = [self.weights[f"{name}.weight"] for name in names]
        other = _rounded(other, streams.activation)
        chosen = self.choose(names, torch.cat(matrices), _moments(streams, other, exact))
        outputs = []
        for name, matrix, part in zip(
            names, matrices, torch.split(chosen, [len(m) for m in matrices]), strict=True
        ):
            wanted, found = exact @ matrix.T, other @ part.T
            streams.errors[name] = _relative_error(streams, wanted, found)
            bias = self.weights.get(f"{name}.bias", torch.zeros(()))
            outputs.append((_bf16(wanted + bias), _bf16(found + bias)))
        return outputs

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.config.head_dim)

    def _rotated(self, x: Tensor, name: str) -> Tensor:
        heads = self._heads(x)
        norm = self.weights.get(f"{self.prefix}self_attn.{name}_norm.weight")
        if norm is not None:
            heads = _norm(heads, norm, self.config.norm_eps)
        first, second = heads.chunk(2, -1)
        cos, sin = self.streams.cos[:, None], self.streams.sin[:, None]
        return _bf16(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, own: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Causal attention, [T, heads * D]; `own` K and V stand in for a row's own position."""
        repeats = self.config.num_heads // self.config.num_kv_heads
        out = torch.empty_like(query)
        for rows in self.streams.text.spans():
            q, k, v = (x[rows].transpose(0, 1) for x in (query, keys, values))  # [heads, t, D]
            k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
            if own is None:
                result = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                own_k, own_v = (x[rows].transpose(0, 1).repeat_interleave(repeats, 0) for x in own)
                result = _attend_own(q, k, v, own_k, own_v)
            out[rows] = result.transpose(0, 1)
        return _bf16(out.flatten(1))


def _attend_own(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """Attention of [heads, t, D] to earlier K and V, and to a row's own at its own position."""
    scores = (q @ k.transpose(1, 2)) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu()
    scores.masked_fill_(hidden, -torch.inf)
    scores.diagonal(dim1=1, dim2=2).copy_((q * own_k).sum(-1) / math.sqrt(q.shape[-1]))
    weights = scores.softmax(-1)
    on_own = weights.diagonal(dim1=1, dim2=2).clone()
    weights.diagonal(dim1=1, dim2=2).zero_()
    return weights @ v + on_own[..., None] * own_v


def _moments(streams: Streams, other: Tensor, exact: Tensor) -> Moments:
    fitted = slice(0, streams.text.num_fitted)
    return Moments.of(other[fitted], exact[fitted])


def _relative_error(streams: Streams, wanted: Tensor, found: Tensor) -> float:
    rows = slice(streams.text.num_fitted, None)
    error = (found[rows] - wanted[rows]).square().sum()
    return float(error / wanted[rows].square().sum())


def _rounded(x: Tensor, activation: Activation) -> Tensor:
    return round_activations(x, activation)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _bf16(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return _bf16(functional.silu(gate) * up)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
