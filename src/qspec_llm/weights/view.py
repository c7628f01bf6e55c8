"""Views: which precision of the one stored model a forward pass reads.

A view is an argument. Switching costs nothing: no copy, no reload, no re-packing.
"""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["OUTLIER_GROUP", "VERIFY", "Activation", "View", "draft_view"]


class Activation(StrEnum):
    """What linears multiply weights with: 4- or 8-bit integers per token and group, or 16 bits."""

    A4 = "a4"
    A8 = "a8"
    A16 = "a16"

    @property
    def bits(self) -> int:
        """Of one activation."""
        return int(self.value[1:])


@dataclass(frozen=True)
class View:
    """One way to read the model: the draft's planes or all of them, and the activations' width.

    `outliers` is how many columns at the beginning of a linear's input have 8 bits where
    `activation` is A4, a multiple of `OUTLIER_GROUP`; nothing else looks at it.
    """

    is_draft: bool
    activation: Activation
    outliers: int = 0


# Columns of a4 activations that share a scale: outliers fill such groups.
OUTLIER_GROUP = 32
VERIFY = View(is_draft=False, activation=Activation.A16)


def draft_view(activation: Activation) -> View:
    """The view that proposes tokens: 4-bit prefixes of the weights, `activation` for the rest."""
    return View(is_draft=True, activation=activation)
