"""A checkpoint whose columns are in order of magnitude, so that outliers have groups of their own.

A few channels of a linear's input are many times larger than the rest, and the 4-bit integers of a
group that holds one have little left for the others. Atom (Zhao et al. 2023, arXiv 2310.19102,
section 4.1) moves them to the end of the matrix and keeps them in 8 bits. Here they come first:

    inputs of               order                          folded into
    q, k, v, gate, up       one for the whole model        columns of the embedding and the head,
                            (the residual stream's)        the norms' gains, rows of o and down
    down                    one a layer                    rows of gate and up
    o                       as it was                      (a head's columns stay together)

Atom gives every linear an order of its own and moves the columns in every step. With one order for
the residual stream nothing is moved while the model runs, and little is lost: the same channels are
large in all layers (docs/fidelity.md). The first N columns of the inputs of q, k, v, gate, up and
down have 8 bits in an a4 draft, those of o none. All columns are sorted, so that groups of 32 hold
channels of one size, as in RPTQ (Yuan et al. 2023, arXiv 2304.01089).

Atom keeps the weights of outlier channels in 8 bits too. Here they have 4 like all others: both
views of an `int4` model read the same codes, so that acceptance does not depend on them. 8 bits
would need matrices whose columns differ in width, which the format does not have.

In exact arithmetic nothing changes: what the model computes is the original's. The head's drafts
see 8-bit activations at least, as in a rotated model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.checkpoint.changed import ChangedCheckpoint
from qspec_llm.weights.planes import Stored
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import Activation

__all__ = ["OUTLIERS_KEY", "ReorderedCheckpoint", "reordered"]

OUTLIERS_KEY = "qspec.outliers"  # in a checkpoint's metadata: fields of ModelConfig

# What the rows and the columns of a tensor are: channels of the residual stream, of the MLP of one
# layer, or neither.
CHANNELS = {
    "embed_tokens": ("", "hidden"),
    "lm_head": ("", "hidden"),
    "norm": ("hidden", ""),
    "input_layernorm": ("hidden", ""),
    "post_attention_layernorm": ("hidden", ""),
    "q_proj": ("", "hidden"),
    "k_proj": ("", "hidden"),
    "v_proj": ("", "hidden"),
    "o_proj": ("hidden", ""),
    "gate_proj": ("inner", "hidden"),
    "up_proj": ("inner", "hidden"),
    "down_proj": ("hidden", "inner"),
}
ON_RESIDUAL = ("self_attn.q_proj", "mlp.gate_proj")  # first linears of the inputs of this order


def reordered(
    checkpoint: Checkpoint, *, outliers: int, magnitudes: Mapping[str, Tensor]
) -> "ReorderedCheckpoint":
    """A checkpoint whose large channels come first.

    Args:
        checkpoint: floating-point weights, or codes that are dequantised.
        outliers: columns that a4 drafts see in 8 bits; `ModelConfig` says which numbers it takes.
        magnitudes: root mean square of every channel of the linears' inputs, [K] float32, as
            `quantize.magnitudes.input_magnitudes` gives them.

    Raises:
        QSpecError: the checkpoint is nested, or reordered, already.
    """
    if checkpoint.kind == "nested" or OUTLIERS_KEY in checkpoint.metadata:
        raise QSpecError(f"{checkpoint.path} cannot be reordered any more; use the original")
    return ReorderedCheckpoint(checkpoint, outliers, magnitudes)


class ReorderedCheckpoint(ChangedCheckpoint):
    """A checkpoint whose tensors' channels are moved as they are read."""

    def __init__(
        self, checkpoint: Checkpoint, outliers: int, magnitudes: Mapping[str, Tensor]
    ) -> None:
        super().__init__(checkpoint)
        self._magnitudes = magnitudes
        self._residual_order = _residual_order(magnitudes)
        fields: dict[str, Any] = {"outliers": outliers, "head_draft": Activation.A8}
        self.metadata = {**checkpoint.metadata, OUTLIERS_KEY: fields}

    def read(self, name: str, target: Target) -> Tensor | Stored:
        """One tensor: its values where they belong now, else as the original has it."""
        rows, columns = CHANNELS.get(name.split(".")[-2], ("", ""))
        if not rows and not columns:
            return super().read(name, target)
        value = self.values(name)
        if rows:
            value = value[self._order(name, rows)]
        if columns and value.ndim == 2:  # a bias has rows alone
            value = value[:, self._order(name, columns)]
        return value

    def _order(self, name: str, channels: str) -> Tensor:
        """Where the channels of a tensor come from, [K] int64."""
        if channels == "hidden":
            return self._residual_order
        layer = ".".join(name.split(".")[:3])
        return self._magnitudes[f"{layer}.mlp.down_proj"].argsort(descending=True, stable=True)


def _residual_order(magnitudes: Mapping[str, Tensor]) -> Tensor:
    """Channels of the residual stream by their share of the energy of all inputs that read it."""
    energies = [m.double().square() for n, m in magnitudes.items() if n.endswith(ON_RESIDUAL)]
    shares = torch.stack([energy / energy.sum() for energy in energies])
    return shares.sum(0).argsort(descending=True, stable=True)
