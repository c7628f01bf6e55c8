"""What each linear's rounding costs a draft, from one pass forwards and backwards over text.

A draft's linear returns y + d instead of y. To second order the logits' divergence from the verify
view is then E[(g d)^2] / 2 with g the gradient of a sampled token's log-probability with respect to
y (the Fisher information, whose use for choosing bits goes back to Optimal Brain Damage, LeCun et
al. 1989; per layer as in HAWQ, Dong et al. 2019). Sums over linears assume that their errors are
independent. A draft reads earlier KV of the verify view, so a row's error stays in its row, and one
gradient a row is all that is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.kernels.reference import round_activations
from qspec_llm.model.config import ModelConfig
from qspec_llm.model.decoder import rope_table
from qspec_llm.model.load import EMBEDDING, FINAL_NORM, HEAD, ROPE_FACTORS
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
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.planes import Dense, Planes, levels, verify_weight
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import Activation, View

__all__ = ["HEAD_UNIT", "Unit", "measure"]

HEAD_UNIT = "lm_head"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT, GATE_UP, DOWN = ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
ROWS = 512  # of logits at a time


@dataclass(frozen=True)
class Unit:
    """Linears on one input, which are drafted alike.

    Attributes:
        names: their tensors.
        divergence: nats that drafting this unit adds, by bits read and activations.
        more_bytes: that a draft reads at 8 bits; 0 where there is no choice.
    """

    names: tuple[str, ...]
    divergence: dict[tuple[int, Activation], float]
    more_bytes: int


def measure(
    checkpoint: Checkpoint, config: ModelConfig, target: Target, text: CalibrationText
) -> list[Unit]:
    """Units of a nested checkpoint, layers in order and the LM head last.

    Holds one layer's weights in float32 and every layer's input, [T, hidden].
    """
    return _Pass(checkpoint, config, target, text).run()


class _Pass:
    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, target: Target, text: CalibrationText
    ) -> None:
        self._checkpoint, self._config, self._target = checkpoint, config, target
        self._text, self._spans = text, text.spans()
        names = checkpoint.names()
        factors = self._vector(ROPE_FACTORS).float() if ROPE_FACTORS in names else None
        table = rope_table(config, int(text.positions.max()) + 1, factors)
        self._rotation = table[0][text.positions], table[1][text.positions]
        self._names = names

    def run(self) -> list[Unit]:
        embedding = self._read(EMBEDDING)
        x = _exact(embedding)[self._text.tokens].to(torch.bfloat16).float()
        inputs = []
        for index in range(self._config.num_layers):
            inputs.append(x)
            x = self._layer(x, index, self._weights(index)).out
        head = embedding if self._config.tied_head else self._read(HEAD)
        name = EMBEDDING if self._config.tied_head else HEAD
        unit, slope = self._head(x, name, head)
        units = [unit]
        for index in reversed(range(self._config.num_layers)):
            found, slope = self._backwards(inputs.pop(), index, slope)
            units += reversed(found)
        return units[::-1]

    def _weights(self, index: int) -> dict[str, Planes | Dense]:
        prefix = f"model.layers.{index}."
        return {name: self._read(name) for name in self._names if name.startswith(prefix)}

    def _read(self, name: str) -> Planes | Dense:
        stored = self._checkpoint.read(name, self._target)
        assert isinstance(stored, Planes | Dense)
        return stored

    def _vector(self, name: str) -> Tensor:
        return _exact(self._read(name))

    def _layer(self, x: Tensor, index: int, stored: Mapping[str, Planes | Dense]) -> "_Taps":
        config, prefix = self._config, f"model.layers.{index}."
        weights = {name: _exact(value) for name, value in stored.items()}
        taps: dict[tuple[str, ...], tuple[Tensor, list[Tensor]]] = {}

        def linear(modules: tuple[str, ...], inputs: Tensor) -> list[Tensor]:
            inputs = turned(inputs, config)
            outputs = []
            for module in modules:
                out = inputs @ weights[f"{prefix}{module}.weight"].T
                outputs.append(out + weights.get(f"{prefix}{module}.bias", torch.zeros(())))
            taps[tuple(f"{prefix}{module}.weight" for module in modules)] = inputs, outputs
            return [bf16(out) for out in outputs]

        q, k, v = linear(
            QKV, rms_norm(x, weights[f"{prefix}input_layernorm.weight"], config.norm_eps)
        )
        q, k = (
            rotated(part, norm_of(weights, prefix, name), self._rotation, config)
            for part, name in ((q, "q"), (k, "k"))
        )
        v = heads(v, config)
        out = attend(q, k.detach(), v.detach(), (k, v), self._spans)
        x = bf16(x + linear(OUTPUT, out)[0])
        norm = weights[f"{prefix}post_attention_layernorm.weight"]
        gate, up = linear(GATE_UP, rms_norm(x, norm, config.norm_eps))
        return _Taps(bf16(x + linear(DOWN, silu_mul(gate, up))[0]), taps)

    def _backwards(self, x: Tensor, index: int, slope: Tensor) -> tuple[list[Unit], Tensor]:
        """Units of one layer, and the slope with respect to its input."""
        stored = self._weights(index)
        with torch.enable_grad():
            x = x.requires_grad_()
            taps = self._layer(x, index, stored)
            outputs = [out for _, parts in taps.linears.values() for out in parts]
            before, *slopes = torch.autograd.grad(taps.out, [x, *outputs], slope)
        units = []
        for names, (inputs, parts) in taps.linears.items():
            mine, slopes = slopes[: len(parts)], slopes[len(parts) :]
            pairs = [(stored[name], part) for name, part in zip(names, mine, strict=True)]
            is_output = names[0].endswith(f"{OUTPUT[0]}.weight")
            outliers = 0 if is_output else self._config.outliers or 0
            units.append(_unit(names, inputs.detach(), pairs, outliers))
        return units, before

    def _head_activation(self, activation: Activation) -> Activation:
        """What the LM head's drafts see where the layers' see `activation`."""
        least = self._config.head_draft
        return activation if least is None or least.bits < activation.bits else least

    def _head(self, x: Tensor, name: str, head: Planes | Dense) -> tuple[Unit, Tensor]:
        """The LM head, and the slope with respect to the last layer's output."""
        weight, norm = _exact(head), self._vector(FINAL_NORM)
        generator = torch.Generator().manual_seed(0)
        slopes, out = [], []
        with torch.enable_grad():
            for part in torch.split(x, ROWS):
                part = part.detach().requires_grad_()
                hidden = rms_norm(part, norm, self._config.norm_eps)
                scores = (hidden @ weight.T).log_softmax(-1)
                drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
                chosen = scores.gather(1, drawn)
                slopes.append(torch.autograd.grad(chosen.sum(), part)[0])
                out.append((hidden.detach(), scores.detach().exp()))
        divergence = {
            key: sum(
                _variance(hidden @ weight.T - _rounded(hidden, head, seen) @ rough.T, chance)
                for hidden, chance in out
            )
            / (2 * len(x))
            for key in _choices([head])
            for rough, seen in [(_draft(head, key[0]), self._head_activation(key[1]))]
        }
        return Unit((name,), divergence, _more_bytes([head])), torch.cat(slopes)


@dataclass(frozen=True)
class _Taps:
    out: Tensor  # [T, hidden]
    linears: dict[tuple[str, ...], tuple[Tensor, list[Tensor]]]  # names -> input, outputs


def _unit(
    names: tuple[str, ...],
    inputs: Tensor,
    pairs: Sequence[tuple[Planes | Dense, Tensor]],
    outliers: int,
) -> Unit:
    divergence = {}
    for key in _choices([stored for stored, _ in pairs]):
        along = torch.zeros(len(inputs))
        for stored, slope in pairs:
            change = inputs @ _exact(stored).T
            change -= _rounded(inputs, stored, key[1], outliers) @ _draft(stored, key[0]).T
            along += (slope * change).sum(-1)
        divergence[key] = float(along.square().mean()) / 2
    return Unit(names, divergence, _more_bytes([stored for stored, _ in pairs]))


def _choices(stored: Sequence[Planes | Dense]) -> list[tuple[int, Activation]]:
    """Bits and activations that a unit can be drafted with; 8 bits only where all can read them."""
    has_eight = all(isinstance(one, Planes) and one.spec.bits == 8 for one in stored)
    return [(bits, a) for bits in ((4, 8) if has_eight else (4,)) for a in Activation]


def _more_bytes(stored: Sequence[Planes | Dense]) -> int:
    if (8, Activation.A8) not in _choices(stored):
        return 0
    return sum(one.r4.nbytes for one in stored if isinstance(one, Planes) and one.r4 is not None)


def _rounded(
    x: Tensor, stored: Planes | Dense, activation: Activation, outliers: int = 0
) -> Tensor:
    view = View(is_draft=True, activation=activation, outliers=outliers)
    return x if isinstance(stored, Dense) else round_activations(x, view)


def _draft(stored: Planes | Dense, bits: int) -> Tensor:
    if isinstance(stored, Dense):
        return stored.weight.float()
    level, scale, offset = levels(stored, bits)
    weight = level.float() * scale[..., None]
    return (weight if offset is None else weight + offset[..., None]).view(len(level), -1)


def _exact(stored: Planes | Dense) -> Tensor:
    return stored.weight.float() if isinstance(stored, Dense) else verify_weight(stored)


def _variance(change: Tensor, chance: Tensor) -> float:
    """Sum over rows of the variance of `change` [R, V] under each row's distribution."""
    mean = (chance * change).sum(-1)
    return float(((chance * change.square()).sum(-1) - mean.square()).sum())
