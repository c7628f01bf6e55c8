"""From floating-point weights to nested planes: round to nearest, with an optional clip search.

Chooses scales and codes and nothing else. For the signed grid the choice never changes what the
verify view of a 16-bit tensor computes (the residual makes up for it): a better rule only makes the
draft agree more often. Tensors that cannot be represented are stored dense, with the reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from qspec_llm.weights.pack import pack_nibbles
from qspec_llm.weights.planes import (
    GROUPS,
    RESIDUAL_CENTRE,
    Dense,
    Grid,
    Planes,
    PlaneSpec,
    Stored,
)

__all__ = [
    "Choice",
    "Recipe",
    "Target",
    "draft_bits",
    "nest",
    "nest_affine",
    "nest_signed8",
    "nest_signed16",
]

SIGNED_TOP = 7.44  # largest |w| of a group over s: 16 * 7.44 rounds to 119 = 16 * 7 + 15 - 8
BLOCK_ELEMENTS = 1 << 20  # rows are quantised in blocks of about this many weights
# Scales outside this range would make an anchor (0.5 s .. 7.5 s) infinite or subnormal.
SCALE_MIN, SCALE_MAX = 2.0**-125, 2.0**124


_Draft = Callable[[Tensor, Tensor], Tensor]  # values, step -> what the grid makes of them
_Encode = Callable[[Tensor, slice], dict[str, Tensor]]  # weights [rows, K/G, G], which -> planes


class Target(StrEnum):
    """What the verify view reproduces (docs/format.md)."""

    INT4 = "int4"
    INT8 = "int8"
    BF16 = "bf16"


@dataclass(frozen=True)
class Recipe:
    """How a model is nested.

    Attributes:
        target: what the verify view reproduces.
        group: weights that share one scale, along K: 32, 64 or 128.
        clip_steps: clipping ratios tried per group, 1 for plain round to nearest.
    """

    target: Target
    group: int = 32
    clip_steps: int = 8


@dataclass(frozen=True)
class Choice:
    """Scales and levels that a method chose for one matrix (`qspec_llm.weights.methods`).

    Attributes:
        scale: [N, K/G] float32 values that bf16 holds.
        levels: [N, K] int8; on the signed grid none lies across zero from its weight.
        offset: [N, K/G] float32 values that bf16 holds, for an asymmetric `int4`: weights are then
            level * scale + offset with levels 0..15; None for levels -8..7 without one.
    """

    scale: Tensor
    levels: Tensor
    offset: Tensor | None = None

    def rows(self, rows: slice) -> "Choice":
        """The choice for some rows."""
        offset = None if self.offset is None else self.offset[rows]
        return Choice(self.scale[rows], self.levels[rows], offset)

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scales [rows, K/G] and levels [rows, K/G, G] of some rows."""
        scale = self.scale[rows]
        return scale, self.levels[rows].view(*scale.shape, -1)


class _Unrepresentable(Exception):  # noqa: N818  # caught in this module; says why, not that it failed
    pass


def nest(
    weight: Tensor, recipe: Recipe, *, is_vocabulary: bool = False, choice: Choice | None = None
) -> Stored:
    """Nest one matrix [N, K] of any float dtype for the recipe's target.

    `is_vocabulary` marks the embedding and the LM head, which keep 8 bits under `int4`. A matrix
    that the format cannot hold exactly comes back dense with the reason. `choice` replaces the
    recipe's own rule; 8-bit tensors do not take one, since their codes follow from the scale.
    """
    sizes = [g for g in GROUPS if g <= recipe.group and weight.shape[1] % g == 0]
    original, weight = weight, weight.to(torch.bfloat16)
    if not torch.isfinite(weight).all():
        return Dense(original, "it holds inf or NaN, or a value that is infinite in bf16")
    if not sizes:
        return Dense(weight, f"{weight.shape[1]} columns do not divide into groups of {GROUPS[0]}")
    group = sizes[-1]
    try:
        if recipe.target is Target.BF16:
            return nest_signed16(weight, group, recipe.clip_steps, choice)
        if recipe.target is Target.INT8 or is_vocabulary:
            return nest_signed8(weight, group, draft_bits(recipe.target))
        return nest_affine(weight, group, recipe.clip_steps, choice)
    except _Unrepresentable as error:
        return Dense(weight, str(error))


def nest_signed16(
    weight: Tensor, group: int, clip_steps: int = 1, choice: Choice | None = None
) -> Planes:
    """Nest bf16 weights [N, K] so that the verify view returns every bit (`bf16` target).

    A chosen level from which the residual does not reach the weight becomes the nearest one.
    """
    spec = PlaneSpec(weight.shape[0], weight.shape[1], group=group, bits=16, grid=Grid.SIGNED)

    def encode(block: Tensor, rows: slice) -> dict[str, Tensor]:
        if choice is None:
            magnitude = block.abs().float()
            start = magnitude.amax(-1) / SIGNED_TOP
            return _signed16_block(block, _clip_search(magnitude, start, clip_steps, _signed_value))
        scale, levels = choice.block(rows)
        return _signed16_block(block, _in_range(scale), levels.abs().to(torch.uint8))

    return _by_blocks(weight, spec, encode)


def _signed16_block(
    grouped: Tensor, scale: Tensor, chosen: Tensor | None = None
) -> dict[str, Tensor]:
    """Planes of bf16 weights [rows, K/G, G]; `chosen` levels uint8, else the nearest."""
    scale = _within_residual_range(grouped, scale)
    step = scale.float()[..., None]
    is_negative, is_zero = grouped.view(torch.int16) < 0, grouped == 0
    nearest = torch.round(grouped.abs().float() / step).clamp_(max=7).to(torch.uint8)
    level = nearest if chosen is None else chosen
    codes, residual = _code_and_residual(grouped, scale, level, is_negative)
    is_reached = is_zero | ((residual >= 1) & (residual <= 4095))
    if chosen is not None and not is_reached.all():
        level = torch.where(is_reached, chosen, nearest)
        codes, residual = _code_and_residual(grouped, scale, level, is_negative)
        is_reached = is_zero | ((residual >= 1) & (residual <= 4095))
    if not is_reached.all():
        raise _Unrepresentable("a group spans more than the 36 octaves that a residual reaches")
    residual.masked_fill_(is_zero, 0)
    group = grouped.shape[-1]
    return {
        "q4": _pack(codes, group),
        "r4": _pack((residual >> 8).to(torch.uint8), group),
        "r8": (residual & 255).to(torch.uint8).flatten(1),
        "scale": scale,
    }


def _code_and_residual(
    grouped: Tensor, scale: Tensor, level: Tensor, is_negative: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and residuals int16 of bf16 weights at given levels, in range or not."""
    codes = torch.where(is_negative, 7 - level, 8 + level)
    anchor = codes.to(torch.bfloat16).sub_(7.5).mul_(scale[..., None])
    return codes, _magnitude_bits(grouped) - _magnitude_bits(anchor) + RESIDUAL_CENTRE


def draft_bits(target: Target) -> int:
    """Bits that a draft reads of an 8-bit tensor: half under `int8`, all of them under `int4`.

    The few 8-bit tensors of an `int4` model, the LM head above all, decide whether its draft
    agrees: on SmolLM2's GGUF in 0.85 of the cases with half of the head's bits, 0.98 with all.
    """
    return 8 if target is Target.INT4 else 4


def nest_signed8(weight: Tensor, group: int, draft_bits: int = 4) -> Planes:
    """Nest weights [N, K] at 8 bits (`int8` target): V = round(16 w / s), split into v and r4."""
    spec = PlaneSpec(
        weight.shape[0],
        weight.shape[1],
        group=group,
        bits=8,
        grid=Grid.SIGNED,
        draft_bits=draft_bits,
    )
    return _by_blocks(weight, spec, lambda block, _: _signed8_block(block, group))


def _signed8_block(grouped: Tensor, group: int) -> dict[str, Tensor]:
    magnitude = grouped.abs().float()
    scale = _up_to_bf16(_checked(magnitude.amax(-1) / SIGNED_TOP))
    value = torch.round(grouped.float() / (scale.float()[..., None] / 16)).to(torch.int16)
    value.clamp_(-120, 119)
    level = (value + 8) >> 4  # v in -7..7
    is_negative = (level < 0) | ((level == 0) & (grouped.view(torch.int16) < 0))
    codes = torch.where(is_negative, 7 + level, 8 + level)
    return {
        "q4": _pack(codes.to(torch.uint8), group),
        "r4": _pack(((value + 8) & 15).to(torch.uint8), group),
        "scale": scale,
    }


def nest_affine(
    weight: Tensor, group: int, clip_steps: int = 1, choice: Choice | None = None
) -> Planes:
    """Quantise weights [N, K] to 4-bit codes (`int4` target): w = (c - 8) s, or c s + b where a
    choice has offsets."""
    has_offset = choice is not None and choice.offset is not None
    spec = PlaneSpec(
        weight.shape[0],
        weight.shape[1],
        group=group,
        bits=4,
        grid=Grid.AFFINE,
        has_offset=has_offset,
    )

    def encode(block: Tensor, rows: slice) -> dict[str, Tensor]:
        if choice is None:
            return _affine_block(block, group, clip_steps)
        scale, levels = choice.block(rows)
        if choice.offset is None:
            return {"q4": _pack((levels + 8).to(torch.uint8), group), "scale": _in_range(scale)}
        return {
            "q4": _pack(levels.to(torch.uint8), group),
            "scale": _in_range(scale),
            "offset": choice.offset[rows].to(torch.bfloat16),
        }

    return _by_blocks(weight, spec, encode)


def _affine_block(grouped: Tensor, group: int, clip_steps: int) -> dict[str, Tensor]:
    values = grouped.float()
    start = _checked(values.abs().amax(-1) / 7.5)
    scale = _clip_search(values, start, clip_steps, _symmetric_value)
    level = _symmetric_level(values, scale.float()[..., None])
    return {"q4": _pack((level + 8).to(torch.uint8), group), "scale": scale}


def _symmetric_level(values: Tensor, step: Tensor) -> Tensor:
    return torch.round(values / step).clamp_(-8, 7)


def _symmetric_value(values: Tensor, step: Tensor) -> Tensor:
    return _symmetric_level(values, step).mul_(step)


def _signed_value(magnitude: Tensor, step: Tensor) -> Tensor:
    return torch.round(magnitude / step).clamp_(max=7).mul_(step)


def _clip_search(values: Tensor, start: Tensor, steps: int, draft: _Draft) -> Tensor:
    """The scale, of `steps` candidates from `start` downwards, with the least squared error.

    Clipping the largest weight of a group makes the grid finer for the rest: candidates run from
    `start` to about 0.6 of it. values [N, K/G, G] and start [N, K/G] float32; returns bf16.
    """
    best = _in_range(start)
    if steps == 1:
        return best
    best_error = torch.full_like(start, torch.inf)
    for ratio in torch.linspace(1.0, 0.6, steps).tolist():
        scale = _in_range(start * ratio)
        error = (draft(values, scale.float()[..., None]) - values).square_().sum(-1)
        is_better = error < best_error
        best = torch.where(is_better, scale, best)
        best_error = torch.where(is_better, error, best_error)
    return best


def _checked(scale: Tensor) -> Tensor:
    """`scale` itself, refused where it would have to be larger than a scale can be."""
    if (scale > SCALE_MAX).any():
        raise _Unrepresentable(f"a weight is too large for a scale of at most {SCALE_MAX:g}")
    return scale


def _in_range(scale: Tensor) -> Tensor:
    return scale.clamp(SCALE_MIN, SCALE_MAX).to(torch.bfloat16)


def _up_to_bf16(scale: Tensor) -> Tensor:
    """Round up to bf16, so that the largest weight of a group never leaves the grid."""
    rounded = _in_range(scale)
    next_up = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(rounded.float() < scale.clamp(max=SCALE_MAX), next_up, rounded)


def _magnitude_bits(values: Tensor) -> Tensor:
    """15-bit magnitude patterns of bf16 values as int16; they are ordered like the values."""
    return values.view(torch.int16) & 0x7FFF


def _within_residual_range(grouped: Tensor, scale: Tensor) -> Tensor:
    """Move scales so that the residual reaches both ends of the group, where one scale can.

    The smallest non-zero |w| may lie at most 28 octaves below 0.5 s and the largest at most
    4 octaves above 7.5 s. Almost no group needs this; one that does gets a poorer draft, which is
    cheaper than a dense tensor.
    """
    bits = _magnitude_bits(grouped)
    smallest = bits.masked_fill(bits == 0, 0x7FFF).amin(-1)
    below_half = _magnitude_bits(scale * 0.5) + 1 - RESIDUAL_CENTRE > smallest
    ceiling = (smallest + (RESIDUAL_CENTRE - 1)).clamp(max=0x7F00).view(torch.bfloat16) * 2
    return torch.where(below_half, ceiling.clamp(max=SCALE_MAX), scale)


def _pack(codes: Tensor, group: int) -> Tensor:
    return pack_nibbles(codes.flatten(1), group)


def _by_blocks(weight: Tensor, spec: PlaneSpec, encode: _Encode) -> Planes:
    """Encode a few rows at a time: temporaries stay small next to the tensor."""
    parts = [encode(block, rows) for block, rows in _blocks(weight, spec.group)]
    return Planes.from_tensors(spec, {n: torch.cat([p[n] for p in parts]) for n in parts[0]})


def _blocks(weight: Tensor, group: int) -> Iterator[tuple[Tensor, slice]]:
    num_rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), num_rows):
        rows = slice(start, start + num_rows)
        block = weight[rows].contiguous()
        yield block.view(block.shape[0], -1, group), rows
