"""A checkpoint whose linears expect rotated inputs, so that 4-bit activations lose little.

Every linear's weights W [N, K] become (W / d) H: H is `weights.hadamard`'s, computed on the inputs
in every step; d balances the columns, and multiplies the inputs for free in what comes before:

    linears            d is folded into
    q, k, v            the gains of the norm before them
    gate, up           the same
    o                  rows of v (heads that share a KV head share d)
    down               rows of up

In x d H every column carries the same share of the energy of x d, so the rounding errors of 4-bit
integers are alike, of mean square proportional to |x d|^2. W / d multiplies them by its own norm,
and by Cauchy-Schwarz |x d| |W / d| is least where d^2 = |column of W| / (root mean square of x).
That is SmoothQuant's balance (Xiao et al. 2023, arXiv 2211.10438, equation 4, with 2-norms for
maxima and alpha = 1/2), which before a rotation is not a heuristic. Rounding the rotated weights
loses least at the same d.

In exact arithmetic nothing changes: what the model computes is the original's. The embedding and
the LM head are left alone, so that they stay tied; the head's drafts see 8-bit activations at
least, since its input is not rotated (QSpec keeps the head at 16 bits).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.checkpoint.changed import ChangedCheckpoint
from qspec_llm.weights.hadamard import order_for, transform
from qspec_llm.weights.planes import Stored
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import Activation

__all__ = ["HADAMARD", "INPUTS", "ROTATION_KEY", "RotatedCheckpoint", "rotated"]

ROTATION_KEY = "qspec.rotation"  # in a checkpoint's metadata: fields of ModelConfig
# On SmolLM2 64 and 512 agree alike, and 64 divides the sizes of nearly all models.
HADAMARD = 64
LEAST_SHARE = 1e-3  # of the mean: where a channel is silent in the calibration text

# Linears by input, and what comes before that input.
INPUTS: dict[tuple[str, ...], str] = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "input_layernorm",
    ("self_attn.o_proj",): "self_attn.v_proj",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.up_proj",
}
_INPUT_OF = {module: modules for modules in INPUTS for module in modules}
_FOLDED_INTO = {before: modules for modules, before in INPUTS.items()}


def rotated(
    checkpoint: Checkpoint,
    *,
    head_dim: int,
    magnitudes: Mapping[str, Tensor] | None = None,
    hadamard: int = HADAMARD,
) -> "RotatedCheckpoint":
    """A checkpoint whose linears take rotated inputs.

    Args:
        checkpoint: floating-point weights, or codes that are dequantised.
        head_dim: columns of one attention head.
        magnitudes: root mean square of every channel of the linears' inputs, [K] float32, under the
            full name of the first linear of each input ("model.layers.0.self_attn.q_proj"):
            `model.magnitudes.input_magnitudes`. None does not balance, which costs agreement.
        hadamard: the largest Hadamard matrix, a power of two.

    Raises:
        QSpecError: the checkpoint is nested, or rotated, already.
    """
    if checkpoint.kind == "nested" or ROTATION_KEY in checkpoint.metadata:
        raise QSpecError(f"{checkpoint.path} cannot be rotated any more; rotate the original")
    return RotatedCheckpoint(checkpoint, head_dim, magnitudes, hadamard)


class RotatedCheckpoint(ChangedCheckpoint):
    """A checkpoint that is balanced and rotated as its tensors are read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        head_dim: int,
        magnitudes: Mapping[str, Tensor] | None,
        hadamard: int,
    ) -> None:
        super().__init__(checkpoint)
        self._head_dim, self._magnitudes, self._hadamard = head_dim, magnitudes, hadamard
        self._balances: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        fields: dict[str, Any] = {"hadamard": hadamard, "head_draft": Activation.A8}
        self.metadata = {**checkpoint.metadata, ROTATION_KEY: fields}

    def read(self, name: str, target: Target) -> Tensor | Stored:
        """One tensor: float32 where it was changed, else as the original has it."""
        prefix, module, leaf = _split(name)
        columns, rows = _INPUT_OF.get(module), _FOLDED_INTO.get(module)
        if columns is None and (rows is None or self._magnitudes is None):
            return super().read(name, target)
        value = self.values(name).float()
        if rows is not None and self._magnitudes is not None:
            balance = self._before(prefix, rows, len(value))
            value = value * (balance[:, None] if value.ndim == 2 else balance)
        if columns is not None and leaf == "weight":
            if self._magnitudes is not None:
                value = value / self._balance(prefix, columns)
            value = transform(value, order_for(value.shape[1], self._hadamard))
        return value

    def _before(self, prefix: str, modules: tuple[str, ...], size: int) -> Tensor:
        """d as the rows of what comes before an input: one KV head for all heads that share it."""
        balance = self._balance(prefix, modules)
        if len(balance) == size:
            return balance
        return balance.view(-1, len(balance) // size, self._head_dim)[:, 0].flatten()

    def _balance(self, prefix: str, modules: tuple[str, ...]) -> Tensor:
        """d of the input of some linears, [K] float32."""
        key = prefix, modules
        if key not in self._balances:
            self._balances[key] = self._compute_balance(prefix, modules)
        return self._balances[key]

    def _compute_balance(self, prefix: str, modules: tuple[str, ...]) -> Tensor:
        assert self._magnitudes is not None
        if (name := prefix + modules[0]) not in self._magnitudes:
            raise QSpecError(f"no magnitudes of the inputs of {name!r} are given")
        squares = [
            self.values(f"{prefix}{module}.weight").float().square().sum(0) for module in modules
        ]
        weight = torch.stack(squares).sum(0)  # [K]
        energy = self._magnitudes[name].float().square()
        if energy.shape != weight.shape:
            raise QSpecError(
                f"the magnitudes of {name!r} have shape {tuple(energy.shape)}, "
                f"not {tuple(weight.shape)}"
            )
        num_rows = self.shape(f"{prefix}{INPUTS[modules]}.weight")[0]
        shared = (num_rows // self._head_dim, len(weight) // num_rows, self._head_dim)
        if len(weight) != num_rows:  # heads that share a KV head
            weight, energy = (
                values.view(shared).mean(1, keepdim=True).expand(shared).flatten()
                for values in (weight, energy)
            )
        ratio = (_lifted(weight) / _lifted(energy)).sqrt()  # |column| / root mean square
        return (ratio.log() - ratio.log().mean()).mul(0.5).exp()


def _lifted(squares: Tensor) -> Tensor:
    """Squares [K] with a floor, so that a channel that was never seen is not scaled without end."""
    return squares.clamp(min=max(LEAST_SHARE**2 * float(squares.mean()), 1e-30))


def _split(name: str) -> tuple[str, str, str]:
    """ "model.layers.0." "mlp.up_proj" "weight" of a layer's tensor; the first is empty else."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return "", name, ""
    return ".".join(parts[:3]) + ".", ".".join(parts[3:-1]), parts[-1]
