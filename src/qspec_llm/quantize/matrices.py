"""One set of matrices on one input: from weights and moments to stored planes, by a method."""

from dataclasses import replace
from enum import StrEnum

import torch
from torch import Tensor

from qspec_llm.weights.methods import (
    LevelRange,
    Moments,
    compensated,
    fit_levels,
    input_scale,
    refit_scale,
    search_offset,
    search_scale,
    symmetric_range,
    toward_zero_range,
    unsigned_range,
)
from qspec_llm.weights.methods.clip import NUM_RATIOS
from qspec_llm.weights.planes import GROUPS, Stored
from qspec_llm.weights.quantize import Choice, Recipe, Target, nest

__all__ = ["Method", "input_scales", "store_matrices"]

# On SmolLM2 with 14,000 tokens of calibration text; less of either fits that text too closely.
DAMPING, COMPENSATION = 0.1, 0.5


class Method(StrEnum):
    """How scales and 4-bit codes are chosen.

    RTN rounds to nearest; MSE searches the clipping that makes the squared error of the weights
    least; AWQ the one that makes it least with the inputs' mean squares as weights, and under
    `int4` scales columns before (`input_scales`); GPTQ takes AWQ's clipping, rounds columns in
    turn, each making up for those before, and fits the scales anew.
    """

    RTN = "rtn"
    MSE = "mse"
    AWQ = "awq"
    GPTQ = "gptq"


def store_matrices(
    weight: Tensor,
    sizes: list[int],
    moments: Moments,
    method: Method,
    recipe: Recipe,
    *,
    is_asymmetric: bool = False,
) -> list[Stored]:
    """Nest matrices that share an input.

    Args:
        weight: the matrices stacked, [N, K] float32 that bf16 holds.
        sizes: rows of each.
        moments: of their inputs.
        method: how codes are chosen. A matrix that the format cannot hold stays dense whatever the
            method, and one whose columns no group size divides.
        recipe: target and group size.
        is_asymmetric: whether groups have an offset too (`int4` alone).
    """
    choose = _choose_asymmetric if is_asymmetric else _choose
    choice = choose(weight, moments, method, recipe)
    recipe = replace(recipe, clip_steps=1 if method is Method.RTN else recipe.clip_steps)
    stored = []
    for rows in _row_ranges(sizes):
        part = None if choice is None else choice.rows(rows)
        stored.append(nest(weight[rows], recipe, choice=part))
    return stored


def input_scales(
    weight: Tensor, moments: Moments, method: Method, recipe: Recipe, *, is_power_of_two: bool
) -> Tensor | None:
    """What to multiply columns by before `store_matrices`, [K]; None where the method does not.

    The outputs of a nested target's verify view must not change, so only `int4` is scaled.
    """
    group = _group(weight, recipe)
    if method is not Method.AWQ or recipe.target is not Target.INT4 or group is None:
        return None
    return input_scale(weight, group, symmetric_range(), moments, is_power_of_two=is_power_of_two)


def _group(weight: Tensor, recipe: Recipe) -> int | None:
    """The group size that the format will take."""
    return max((g for g in GROUPS if g <= recipe.group and weight.shape[1] % g == 0), default=None)


def _choose(weight: Tensor, moments: Moments, method: Method, recipe: Recipe) -> Choice | None:
    group = _group(weight, recipe)
    if method in (Method.RTN, Method.MSE) or group is None or recipe.target is Target.INT8:
        return None
    is_signed = recipe.target is Target.BF16
    levels = toward_zero_range(weight) if is_signed else symmetric_range()
    scale = search_scale(weight, group, levels, moments.second.diagonal())
    if method is Method.AWQ:
        return Choice(scale, _nearest(weight, scale, levels))
    wanted, curvature = compensated(weight, moments, COMPENSATION, DAMPING), moments.damped(DAMPING)
    chosen = fit_levels(wanted, scale, levels, curvature)
    return Choice(refit_scale(chosen, wanted, scale, curvature), chosen)


def _choose_asymmetric(
    weight: Tensor, moments: Moments, method: Method, recipe: Recipe
) -> Choice | None:
    """With an offset for each group: the same methods on what is left of the weights."""
    group = _group(weight, recipe)
    if group is None:
        return None
    importance = moments.second.diagonal() if method in (Method.AWQ, Method.GPTQ) else None
    num_ratios = 1 if method is Method.RTN else NUM_RATIOS
    scale, offset = search_offset(weight, group, importance, num_ratios=num_ratios)
    levels, shift = unsigned_range(), offset.repeat_interleave(group, 1)
    if method is not Method.GPTQ:
        return Choice(scale, _nearest(weight - shift, scale, levels), offset)
    wanted = compensated(weight, moments, COMPENSATION, DAMPING) - shift
    curvature = moments.damped(DAMPING)
    chosen = fit_levels(wanted, scale, levels, curvature)
    return Choice(refit_scale(chosen, wanted, scale, curvature), chosen, offset)


def _nearest(weight: Tensor, scale: Tensor, levels: LevelRange) -> Tensor:
    step = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return levels.nearest(weight, step).to(torch.int8)


def _row_ranges(sizes: list[int]) -> list[slice]:
    ranges, start = [], 0
    for size in sizes:
        ranges.append(slice(start, start + size))
        start += size
    return ranges
