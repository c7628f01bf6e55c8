"""Views: which precision of the one stored model a forward pass reads.

A view is an argument. Switching costs nothing: no copy, no reload, no re-packing.
"""

from dataclasses import dataclass
from enum import StrEnum

from qspec_llm.errors import QSpecError

__all__ = [
    "ACTIVATION_GROUPS",
    "OUTLIER_GROUP",
    "USUAL_GROUP",
    "VERIFY",
    "Activation",
    "View",
    "draft_view",
]


class Activation(StrEnum):
    """What linears multiply weights with: 4- or 8-bit integers per token and group, or 16 bits."""

    A4 = "a4"
    A8 = "a8"
    A16 = "a16"

    @property
    def bits(self) -> int:
        """Of one activation."""
        return int(self.value[1:])


# Columns of a4 activations that share a scale: outliers fill such groups.
OUTLIER_GROUP = 32
# Those of a8. A scale for every 64 costs products of many rows more than their multiplications do.
# With one for every 128, drafts agree less often where they have the target's own weights (`int4`:
# 0.975 instead of 0.986 on Qwen2.5-Coder-0.5B), and as often where their weights are rounded.
USUAL_GROUP = 64
ACTIVATION_GROUPS = (USUAL_GROUP, 128)


@dataclass(frozen=True)
class View:
    """One way to read the model: the draft's planes or all of them, and the activations' width.

    Attributes:
        is_draft: 4-bit prefixes of the weights, else all bits.
        activation: what linears multiply them with.
        outliers: columns at the beginning of a linear's input that have 8 bits where `activation`
            is A4, a multiple of `OUTLIER_GROUP`; nothing else looks at it.
        group: columns that share a scale where `activation` is A8, one of `ACTIVATION_GROUPS`;
            nothing else looks at it.
    """

    is_draft: bool
    activation: Activation
    outliers: int = 0
    group: int = USUAL_GROUP

    def __post_init__(self) -> None:
        if self.group not in ACTIVATION_GROUPS:
            raise QSpecError(
                f"group is {self.group} activations; it must be one of {ACTIVATION_GROUPS}"
            )

    def columns_a_scale(self, num_cols: int) -> int:
        """Columns that share a scale in a linear's input of `num_cols`, a multiple of 32."""
        if self.activation is Activation.A4:
            return OUTLIER_GROUP
        return next(size for size in (self.group, USUAL_GROUP, 32) if num_cols % size == 0)


VERIFY = View(is_draft=False, activation=Activation.A16)


def draft_view(activation: Activation, group: int = USUAL_GROUP) -> View:
    """The view that proposes tokens: 4-bit prefixes of the weights, `activation` for the rest."""
    return View(is_draft=True, activation=activation, group=group)
