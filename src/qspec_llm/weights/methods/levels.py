"""Which integer levels a weight may take.

On the signed grid a code tells the sign of the original weight, so a positive weight may take 0..7
and a negative one -7..0: a method may move a level to anywhere on the weight's own side of zero,
and the verify view of a 16-bit tensor still returns every bit. The symmetric grid allows -8..7.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LevelRange", "symmetric_range", "toward_zero_range", "unsigned_range"]


@dataclass(frozen=True)
class LevelRange:
    """Smallest and largest level of every weight, [N, K] int8 or [1, 1]; top is the largest |level|
    that a scale is chosen for."""

    low: Tensor
    high: Tensor
    top: float

    def columns(self, index: slice) -> "LevelRange":
        """The range of some columns."""
        if self.low.shape[1] == 1:
            return self
        return LevelRange(self.low[:, index], self.high[:, index], self.top)

    def rows(self, index: slice) -> "LevelRange":
        """The range of some rows."""
        if self.low.shape[0] == 1:
            return self
        return LevelRange(self.low[index], self.high[index], self.top)

    def nearest(self, values: Tensor, step: Tensor) -> Tensor:
        """Levels of values [N, ...] with scales `step` of a shape that broadcasts, float32."""
        return torch.round(values / step).clamp(self.low, self.high)


def toward_zero_range(weight: Tensor) -> LevelRange:
    """The signed grid: levels on the side of zero where the bf16 weight [N, K] lies."""
    is_negative = weight.to(torch.bfloat16).view(torch.int16) < 0
    low = torch.where(is_negative, -7, 0).to(torch.int8)
    return LevelRange(low, low + 7, 7.44)


def symmetric_range() -> LevelRange:
    """Symmetric 4-bit codes: -8..7 everywhere."""
    return LevelRange(torch.tensor([[-8]]), torch.tensor([[7]]), 7.5)


def unsigned_range() -> LevelRange:
    """The codes themselves, 0..15, of weights less their group's offset."""
    return LevelRange(torch.tensor([[0]]), torch.tensor([[15]]), 15.0)
