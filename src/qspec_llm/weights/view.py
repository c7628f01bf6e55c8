"""Views: which precision of the one stored model a forward pass reads.

A view is an argument. Switching costs nothing: no copy, no reload, no re-packing.
"""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["VERIFY", "Activation", "View", "draft_view"]


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
    """One way to read the model: the draft's planes or all of them, and the activations' width."""

    is_draft: bool
    activation: Activation


VERIFY = View(is_draft=False, activation=Activation.A16)


def draft_view(activation: Activation) -> View:
    """The view that proposes tokens: 4-bit prefixes of the weights, `activation` for the rest."""
    return View(is_draft=True, activation=activation)
