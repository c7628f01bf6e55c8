"""Scales by search: clipping the largest weight of a group makes the grid finer for the rest.

The error of a column counts as often as its input is large (the diagonal of the second moment, the
weighting of AWQ's search, Lin et al. 2024, arXiv 2306.00978, section 3.2, used for scales).
"""

import torch
from torch import Tensor

from qspec_llm.weights.methods.levels import LevelRange

__all__ = ["search_scale"]

LARGEST_RATIO, SMALLEST_RATIO, NUM_RATIOS = 1.05, 0.5, 16
SCALE_MIN = 2.0**-125


def search_scale(
    weight: Tensor, group: int, levels: LevelRange, importance: Tensor | None = None
) -> Tensor:
    """The scale of every row and group with the least weighted squared rounding error.

    Args:
        weight: [N, K] float32.
        group: columns that share a scale.
        levels: what the grid can hold.
        importance: mean squared input of every column, [K]; None weighs all alike.

    Returns:
        Scales [N, K/G], float32 values that bf16 holds.
    """
    num_rows, num_cols = weight.shape
    grouped = weight.view(num_rows, -1, group)
    start = grouped.abs().amax(-1) / levels.top
    shape = (-1, num_cols // group, group)
    low, high = (t.float().expand(-1, num_cols).reshape(shape) for t in (levels.low, levels.high))
    by_column = torch.ones(num_cols) if importance is None else importance / importance.mean()
    cost = by_column.view(1, -1, group)
    best = torch.zeros_like(start)
    best_error = torch.full_like(start, torch.inf)
    for ratio in torch.linspace(LARGEST_RATIO, SMALLEST_RATIO, NUM_RATIOS).tolist():
        scale = (start * ratio).clamp(min=SCALE_MIN).bfloat16().float()
        step = scale[..., None]
        rounded = torch.round(grouped / step).clamp_(low, high).mul_(step)
        error = rounded.sub_(grouped).square_().mul_(cost).sum(-1)
        is_better = error < best_error
        best = torch.where(is_better, scale, best)
        best_error = torch.where(is_better, error, best_error)
    return best
