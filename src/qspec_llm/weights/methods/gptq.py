"""Levels that make up for each other's rounding, given the second moment of the inputs.

`fit_levels` is GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1): columns are rounded one
after the other, and what one loses is put on those that come after. `refit_scale` solves for the
scales that suit the levels. Each works within a `LevelRange`, so that the signed grid keeps its
signs. Moving single levels afterwards (coordinate descent, as in QuantEase, Behdin et al. 2023,
arXiv 2309.01885) was tried and gained too little to stay (docs/quantising.md).
"""

import torch
from torch import Tensor

from qspec_llm.weights.methods.levels import LevelRange

__all__ = ["fit_levels", "refit_scale"]

BLOCK = 32  # columns that are rounded one by one before the rest of the matrix hears of it
ROWS = 8192  # rows at a time: the vocabulary has many


def fit_levels(weight: Tensor, scale: Tensor, levels: LevelRange, second_moment: Tensor) -> Tensor:
    """GPTQ.

    Args:
        weight: what to stand for, [N, K] float32.
        scale: [N, K/G] float32.
        levels: the levels allowed.
        second_moment: of the inputs, damped, [K, K] float32, positive definite.

    Returns:
        Levels [N, K] int8.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second_moment))
    upper = torch.linalg.cholesky(inverse, upper=True)
    parts = [
        _fit_rows(weight[rows], scale[rows], levels.rows(rows), upper)
        for rows in _row_blocks(len(weight))
    ]
    return torch.cat(parts)


def _fit_rows(weight: Tensor, scale: Tensor, levels: LevelRange, upper: Tensor) -> Tensor:
    num_rows, num_cols = weight.shape
    group = num_cols // scale.shape[1]
    rest = weight.clone()
    chosen = torch.empty(num_rows, num_cols, dtype=torch.int8)
    for start in range(0, num_cols, BLOCK):
        block = slice(start, min(start + BLOCK, num_cols))
        # columns as rows: each is contiguous
        columns = rest[:, block].T.contiguous()
        losses = torch.empty_like(columns)
        corner = upper[block, block]
        for i, column in enumerate(range(block.start, block.stop)):
            step = scale[:, column // group]
            limits = levels.columns(slice(column, column + 1))
            level = limits.nearest(columns[i][:, None], step[:, None])[:, 0]
            losses[i] = (columns[i] - level * step) / corner[i, i]
            columns[i:].addr_(corner[i, i:], losses[i], alpha=-1)
            chosen[:, column] = level.to(torch.int8)
        rest[:, block.stop :] -= losses.T @ upper[block, block.stop :]
    return chosen


def refit_scale(
    chosen: Tensor, weight: Tensor, scale: Tensor, second_moment: Tensor, pull: float = 0.1
) -> Tensor:
    """Scales that fit given levels best: least squares in the K/G scales of every row.

    Args:
        chosen: levels [N, K] int8.
        weight: what to stand for, [N, K] float32.
        scale: the scales that the levels were chosen for, [N, K/G] float32.
        second_moment: of the inputs, damped, [K, K] float32.
        pull: how much the old scale counts, in parts of a row's mean curvature.

    Returns:
        Scales [N, K/G], float32 values that bf16 holds. A group whose best scale would be zero or
        negative keeps its own.
    """
    rows = _row_blocks(len(weight))
    return torch.cat([_refit(chosen[r], weight[r], scale[r], second_moment, pull) for r in rows])


def _refit(chosen: Tensor, weight: Tensor, scale: Tensor, moment: Tensor, pull: float) -> Tensor:
    num_rows, num_groups = scale.shape
    level = chosen.float()
    by_group = (num_rows, num_groups, -1)
    right = (level * (weight @ moment)).view(by_group).sum(-1)  # [N, groups]
    curvature = torch.empty(num_rows, num_groups, num_groups)
    group = weight.shape[1] // num_groups
    for index in range(num_groups):
        columns = slice(index * group, (index + 1) * group)
        curvature[:, index] = (level * (level[:, columns] @ moment[columns])).view(by_group).sum(-1)
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    weight_of_old = pull * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    right = right + weight_of_old * scale
    diagonal.add_(weight_of_old)
    fitted = torch.linalg.solve(curvature, right[..., None])[..., 0].bfloat16().float()
    return torch.where((fitted > 0) & fitted.isfinite(), fitted, scale)


def _row_blocks(num_rows: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, num_rows, ROWS)]
