"""Scales by search: clipping the largest weight of a group makes the grid finer for the rest.

The error of a column counts as often as its input is large (the diagonal of the second moment, the
weighting of AWQ's search, Lin et al. 2024, arXiv 2306.00978, section 3.2, used for scales).
"""

import torch
from torch import Tensor

from qspec_llm.weights.methods.levels import LevelRange

__all__ = ["NUM_RATIOS", "search_offset", "search_scale"]

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


def search_offset(
    weight: Tensor, group: int, importance: Tensor | None = None, *, num_ratios: int = NUM_RATIOS
) -> tuple[Tensor, Tensor]:
    """Scales and offsets of an asymmetric grid: w = c s + b with c in 0..15.

    The range of a group's weights is shrunk towards its middle until the weighted squared error is
    least.

    Args:
        weight: [N, K] float32.
        group: columns that share both.
        importance: mean squared input of every column, [K]; None weighs all alike.
        num_ratios: how many ranges are tried; 1 takes the whole.

    Returns:
        Scales and offsets [N, K/G], float32 values that bf16 holds.
    """
    num_rows, num_cols = weight.shape
    grouped = weight.view(num_rows, -1, group)
    lowest, highest = grouped.amin(-1), grouped.amax(-1)
    middle, reach = (highest + lowest) / 2, (highest - lowest) / 2
    by_column = torch.ones(num_cols) if importance is None else importance / importance.mean()
    cost = by_column.view(1, -1, group)
    best = best_offset = torch.zeros_like(middle)
    best_error = torch.full_like(middle, torch.inf)
    for ratio in torch.linspace(1.0, SMALLEST_RATIO, NUM_RATIOS).tolist()[:num_ratios]:
        scale = (reach * (ratio * 2 / 15)).clamp(min=SCALE_MIN).bfloat16().float()
        offset = (middle - 7.5 * scale).bfloat16().float()
        step, low = scale[..., None], offset[..., None]
        rounded = torch.round((grouped - low) / step).clamp_(0, 15).mul_(step).add_(low)
        error = rounded.sub_(grouped).square_().mul_(cost).sum(-1)
        is_better = error < best_error
        best, best_offset = (
            torch.where(is_better, new, old) for new, old in ((scale, best), (offset, best_offset))
        )
        best_error = torch.where(is_better, error, best_error)
    return best, best_offset
