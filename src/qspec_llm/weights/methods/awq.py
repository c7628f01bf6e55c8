"""Columns made larger before rounding where their inputs are large, and inputs smaller by as much.

AWQ (Lin et al. 2024, arXiv 2306.00978, section 3.2): with s = (typical |x|)^alpha a layer computes
Q(W diag(s)) diag(1/s) x, whose error in columns of large inputs is smaller. 1/s goes into what
comes before, the weight of a norm or the rows of another matrix, so that nothing is added at run
time. alpha is searched.
"""

import torch
from torch import Tensor

from qspec_llm.weights.methods.clip import search_scale
from qspec_llm.weights.methods.levels import LevelRange
from qspec_llm.weights.methods.moments import Moments

__all__ = ["input_scale"]

NUM_ALPHAS = 10


def input_scale(
    weight: Tensor, group: int, levels: LevelRange, moments: Moments, *, is_power_of_two: bool
) -> Tensor:
    """By what to multiply columns so that the output's squared error is least.

    Args:
        weight: [N, K] float32.
        group: columns that share a scale of the grid.
        levels: what the grid can hold, the same for all weights.
        moments: of the inputs.
        is_power_of_two: whether only powers of two will do, by which any scale divides exactly.

    Returns:
        [K] float32, positive; ones where nothing helps.
    """
    second = moments.second
    typical = second.diagonal().sqrt().clamp(min=1e-6)
    best, best_error = torch.ones(len(second)), torch.inf
    for step in range(NUM_ALPHAS):
        scale = typical ** (step / NUM_ALPHAS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        if is_power_of_two:
            scale = torch.exp2(torch.round(torch.log2(scale)))
        error = _error(weight, scale, group, levels, second)
        if error < best_error:
            best, best_error = scale, error
    return best


def _error(weight: Tensor, scale: Tensor, group: int, levels: LevelRange, second: Tensor) -> float:
    scaled = weight * scale
    importance = second.diagonal() / scale.square()
    steps = search_scale(scaled, group, levels, importance).repeat_interleave(group, 1)
    change = (levels.nearest(scaled, steps) * steps) / scale - weight
    return float(((change @ second) * change).sum())
