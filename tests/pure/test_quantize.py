"""Nesting: the bf16 target gives every bit back or says why not; the others stay in bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers_weights import assert_same_bits, bits, gaussian
from qspec_llm.weights.pack import unpack_nibbles
from qspec_llm.weights.planes import (
    GROUPS,
    Dense,
    Grid,
    Planes,
    Stored,
    draft_weight,
    verify_bits,
    verify_weight,
)
from qspec_llm.weights.quantize import (
    Recipe,
    Target,
    draft_bits,
    nest,
    nest_affine,
    nest_signed8,
    nest_signed16,
)

LARGEST = 0x7F7F  # magnitude pattern of the largest finite bf16


def from_patterns(patterns: Tensor | list[int]) -> Tensor:
    """bf16 values of patterns 0..65535."""
    wide = torch.as_tensor(patterns)
    return torch.where(wide > 0x7FFF, wide - 0x10000, wide).to(torch.int16).view(torch.bfloat16)


def assert_nested_exactly(weight: Tensor, stored: Stored) -> Planes:
    assert isinstance(stored, Planes), stored.reason
    assert_same_bits(verify_bits(stored), weight.view(torch.int16))
    assert_same_bits(bits(verify_weight(stored).to(torch.bfloat16)), weight.view(torch.int16))
    codes = unpack_nibbles(stored.q4, stored.spec.group).flatten(1)
    assert_same_bits(codes < 8, weight.view(torch.int16) < 0)
    return stored


def exact_or_dense(weight: Tensor, recipe: Recipe) -> None:
    """The bits come back from planes, or the tensor is dense, whole, and says why."""
    stored = nest(weight, recipe)
    if isinstance(stored, Dense):
        assert stored.reason
        assert_same_bits(stored.weight, weight)
    else:
        assert_nested_exactly(weight, stored)


# --- bf16 target: every pattern --------------------------------------------------------------


def with_leaders(group: int, octaves: int) -> Tensor:
    """All 65,280 finite patterns in groups that each also hold a weight `octaves` above the rest.

    A group is `group - 1` neighbouring magnitudes of both signs and one leader: the largest of
    them times 2^octaves, as far as bf16 goes.
    """
    magnitude = torch.arange(LARGEST + 1).repeat_interleave(2)
    pattern = magnitude + 0x8000 * (torch.arange(len(magnitude)) % 2)
    missing = -len(pattern) % (group - 1)
    pattern = torch.cat((pattern, pattern[-1:].expand(missing))).view(-1, group - 1)
    leader = ((pattern & 0x7FFF).amax(1) + 128 * octaves).clamp(max=LARGEST)
    leader[::2] += 0x8000
    place = octaves % group  # not always the same column
    return from_patterns(
        torch.cat((pattern[:, :place], leader[:, None], pattern[:, place:]), dim=1)
    )


@pytest.mark.parametrize("octaves", [0, 1, 3, 4, 8, 16, 27, 28, 32, 35])
@pytest.mark.parametrize("group", GROUPS)
def test_every_finite_pattern_at_every_scale(group: int, octaves: int) -> None:
    weight = with_leaders(group, octaves)
    assert len(set(weight.view(torch.int16).flatten().tolist())) == 2 * (LARGEST + 1)
    stored = assert_nested_exactly(weight, nest(weight, Recipe(Target.BF16, group, clip_steps=1)))
    assert stored.spec.group == group


@pytest.mark.parametrize("clip_steps", [2, 8])
@pytest.mark.parametrize("octaves", [0, 2, 30])
def test_every_finite_pattern_with_a_clip_search(octaves: int, clip_steps: int) -> None:
    weight = with_leaders(32, octaves)
    assert_nested_exactly(weight, nest(weight, Recipe(Target.BF16, 32, clip_steps)))


@pytest.mark.parametrize("zero", [0x0000, 0x8000])
def test_every_finite_pattern_beside_zeros(zero: int) -> None:
    weight = with_leaders(32, 6).clone()
    weight[:, 5::3] = from_patterns([zero])
    assert_nested_exactly(weight, nest(weight, Recipe(Target.BF16)))


@pytest.mark.parametrize(
    "pattern", [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0xFF7F, 0x7F7F]
)
def test_groups_of_one_value(pattern: int) -> None:
    weight = from_patterns([pattern]).expand(3, 64).contiguous()
    assert_nested_exactly(weight, nest(weight, Recipe(Target.BF16)))


def test_every_pattern_that_is_not_finite_is_refused() -> None:
    patterns = [p for p in range(0x10000) if p & 0x7FFF > LARGEST]
    assert len(patterns) == 256
    for pattern in patterns:
        weight = gaussian(1, 32).to(torch.bfloat16)
        weight[0, pattern % 32] = from_patterns([pattern])[0]
        for target in Target:
            stored = nest(weight, Recipe(target, clip_steps=1))
            assert isinstance(stored, Dense)
            assert "inf or NaN" in stored.reason
            assert_same_bits(stored.weight, weight)


@pytest.mark.parametrize("octaves", [36, 37, 50, 200])
def test_a_group_over_more_than_36_octaves_is_dense(octaves: int) -> None:
    for smallest in (0x0001, 0x0080, 0x1000, 0x2F00):
        if smallest + 128 * octaves > LARGEST:
            continue
        weight = gaussian(2, 64).to(torch.bfloat16)
        weight[1, 40] = from_patterns([smallest])[0]
        weight[1, 50] = from_patterns([smallest + 128 * octaves])[0]
        stored = nest(weight, Recipe(Target.BF16))
        assert isinstance(stored, Dense)
        assert "36 octaves" in stored.reason
        assert_same_bits(stored.weight, weight)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    middle=st.integers(0, LARGEST),
    reach=st.integers(0, 40 * 128),
    group=st.sampled_from(GROUPS),
    clip_steps=st.sampled_from([1, 3, 8]),
)
def test_any_patterns_are_exact_or_dense(
    seed: int, middle: int, reach: int, group: int, clip_steps: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    magnitude = middle + torch.randint(-reach // 2, reach // 2 + 1, (3, 2 * group), generator=rng)
    sign = torch.randint(0, 2, magnitude.shape, generator=rng)
    weight = from_patterns(magnitude.clamp(0, LARGEST) + 0x8000 * sign)
    exact_or_dense(weight, Recipe(Target.BF16, group, clip_steps))


@pytest.mark.parametrize("degrees", [2.0, 3.0, 4.0])
def test_heavy_tails_are_exact(degrees: float) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(degrees).sample((64, 256)).to(torch.bfloat16)
    assert_nested_exactly(weight, nest(weight, Recipe(Target.BF16)))


def test_many_rows_are_quantised_in_blocks_like_one() -> None:
    weight = gaussian(300, 8192).to(torch.bfloat16)  # three blocks
    whole = nest_signed16(weight, 64)
    alone = nest_signed16(weight[290:], 64)
    for name, tensor in alone.tensors().items():
        assert_same_bits(whole.tensors()[name][290:], tensor)
    assert_nested_exactly(weight, whole)


def test_a_transposed_weight_is_nested_as_it_reads() -> None:
    weight = gaussian(64, 96).to(torch.bfloat16).T
    assert_nested_exactly(weight.contiguous(), nest(weight, Recipe(Target.BF16)))


# --- int8 target -----------------------------------------------------------------------------

SPREADS = {
    "gaussian": lambda: gaussian(32, 256),
    "tiny": lambda: gaussian(32, 256) * 1e-20,
    "huge": lambda: gaussian(32, 256) * 1e20,
    "denormal": lambda: gaussian(32, 256) * 2.0**-130,
    "rows of many scales": lambda: gaussian(32, 256) * 10.0 ** torch.arange(-16, 16)[:, None],
    "zeros": lambda: torch.zeros(4, 64),
    "negative zeros": lambda: -torch.zeros(4, 64),
    "one weight a group": lambda: torch.eye(64),
    "equal": lambda: torch.full((4, 64), -0.3),
}


def check_signed8(weight: Tensor, stored: Stored) -> None:
    """|w8 - w| <= s/32, |V| <= 120, and codes that tell the sign."""
    assert isinstance(stored, Planes)
    assert stored.spec.grid is Grid.SIGNED
    group = stored.spec.group
    weight = weight.to(torch.bfloat16)
    step = stored.scale.double().repeat_interleave(group, 1) / 16
    assert (step > 0).all()
    value = verify_weight(stored).double() / step
    assert (value == value.round()).all()
    assert value.abs().max() <= 120
    error = (verify_weight(stored).double() - weight.double()).abs()
    assert (error <= step / 2 * (1 + 1e-6)).all()
    codes = unpack_nibbles(stored.q4, group).flatten(1)
    assert_same_bits(codes < 8, weight.view(torch.int16) < 0)
    # the draft's weight is within a step of the verify view's: r4 - 8 in -8..7
    residual = (verify_weight(stored) - draft_weight(stored)).double() / step
    assert ((residual >= -8) & (residual <= 7)).all()


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("group", GROUPS)
def test_signed8_bounds(spread: str, group: int) -> None:
    weight = SPREADS[spread]()
    size = min(group, weight.shape[1])
    check_signed8(weight, nest(weight, Recipe(Target.INT8, size)))


def test_signed8_of_every_value_of_a_group() -> None:
    top = torch.full((1,), 7.44)
    weight = torch.cat((torch.linspace(-7.44, 7.44, 2047), top)).to(torch.bfloat16)
    weight = weight[torch.randperm(2048, generator=torch.Generator().manual_seed(0))].view(16, 128)
    check_signed8(weight, nest_signed8(weight, 128))


@pytest.mark.parametrize("largest", [1e37, 3e37, 2e38, 3.3e38])
def test_signed8_near_the_top_of_the_range_is_right_or_dense(largest: float) -> None:
    weight = (gaussian(2, 64) / 100).clamp(-1, 1) * largest
    weight[0, 3] = largest
    stored = nest(weight, Recipe(Target.INT8))
    if isinstance(stored, Dense):
        assert stored.reason
    else:
        check_signed8(weight, stored)


# --- int4 target -----------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [s for s in SPREADS if s != "denormal"])
@pytest.mark.parametrize("group", GROUPS)
def test_affine4_bounds(spread: str, group: int) -> None:
    weight = SPREADS[spread]().to(torch.bfloat16)
    size = min(group, weight.shape[1])
    planes = nest_affine(weight, size)  # round to nearest: nothing is clipped by much
    assert planes.offset is None
    step = planes.scale.double().repeat_interleave(size, 1)
    value = verify_weight(planes).double() / step
    assert (value == value.round()).all()
    assert ((value >= -8) & (value <= 7)).all()
    # half a step, or a little more above 7 s: w = 7.5 s with s rounded to 8 bits
    error = (verify_weight(planes).double() - weight.double()).abs() / step
    assert (error <= 0.5 + 7.5 / 256).all()
    assert (error[weight < 0] <= 0.5).all()


def test_affine4_clips_only_the_ends() -> None:
    weight = gaussian(16, 128).to(torch.bfloat16)
    planes = nest_affine(weight, 32, clip_steps=8)
    step = planes.scale.double().repeat_interleave(32, 1)
    inside = (weight.double() > -8.5 * step) & (weight.double() < 7.5 * step)
    error = (verify_weight(planes).double() - weight.double()).abs() / step
    assert (error[inside] <= 0.5).all()


@pytest.mark.parametrize("largest", [1e37, 2e38, 3.3e38])
def test_affine4_near_the_top_of_the_range_is_right_or_dense(largest: float) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 3] = largest
    stored = nest(weight, Recipe(Target.INT4, clip_steps=1))
    if isinstance(stored, Planes):
        assert abs(float(verify_weight(stored)[0, 3]) - largest) < 0.08 * largest
    else:
        assert stored.reason


# --- clip search -----------------------------------------------------------------------------


def group_errors(weight: Tensor, values: Tensor, group: int) -> Tensor:
    return (values.double() - weight.double()).square().view(len(weight), -1, group).sum(-1)


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("nester", [nest_affine, nest_signed16])
def test_a_clip_search_is_never_worse(nester, group: int, steps: int) -> None:
    weight = gaussian(24, 256, seed=3).to(torch.bfloat16)
    plain, searched = nester(weight, group, 1), nester(weight, group, steps)
    before = group_errors(weight, draft_weight(plain), group)
    after = group_errors(weight, draft_weight(searched), group)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


# --- what `nest` decides ---------------------------------------------------------------------


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("num_cols", [1, 31, 33, 48, 80])
def test_columns_that_do_not_divide_are_dense(num_cols: int, target: Target) -> None:
    weight = gaussian(3, num_cols)
    stored = nest(weight, Recipe(target))
    assert isinstance(stored, Dense)
    assert str(num_cols) in stored.reason
    assert "32" in stored.reason
    assert_same_bits(stored.weight, weight.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("num_cols", "asked", "group"),
    [(128, 128, 128), (192, 128, 64), (96, 128, 32), (256, 64, 64), (256, 32, 32), (96, 64, 32)],
)
def test_the_largest_group_that_divides(num_cols: int, asked: int, group: int) -> None:
    for target in Target:
        stored = nest(gaussian(2, num_cols), Recipe(target, asked))
        assert isinstance(stored, Planes)
        assert stored.spec.group == group


@pytest.mark.parametrize(
    ("target", "is_vocabulary", "grid", "num_bits", "drafted"),
    [
        (Target.INT4, False, Grid.AFFINE, 4, 4),
        (Target.INT4, True, Grid.SIGNED, 8, 8),
        (Target.INT8, False, Grid.SIGNED, 8, 4),
        (Target.INT8, True, Grid.SIGNED, 8, 4),
        (Target.BF16, False, Grid.SIGNED, 16, 4),
        (Target.BF16, True, Grid.SIGNED, 16, 4),
    ],
)
@pytest.mark.parametrize("group", GROUPS)
def test_form_and_bytes_per_target(
    target: Target, is_vocabulary: bool, grid: Grid, num_bits: int, drafted: int, group: int
) -> None:
    stored = nest(gaussian(8, 256), Recipe(target, group), is_vocabulary=is_vocabulary)
    assert isinstance(stored, Planes)
    spec = stored.spec
    assert (spec.grid, spec.bits, spec.draft_bits) == (grid, num_bits, drafted)
    held = sum(t.numel() * t.itemsize for t in stored.tensors().values())
    assert 8 * held / (8 * 256) == spec.bits_stored == num_bits + 16 / group
    assert 8 * stored.draft_nbytes / (8 * 256) == spec.draft_bits_read == drafted + 16 / group


def test_draft_bits_of_8_bit_tensors() -> None:
    assert [draft_bits(target) for target in Target] == [8, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_wider_floats_are_rounded_to_bf16_once(dtype: torch.dtype) -> None:
    weight = gaussian(4, 64).to(dtype)
    assert_nested_exactly(weight.to(torch.bfloat16), nest(weight, Recipe(Target.BF16)))


def test_a_float_beyond_bf16_keeps_its_value() -> None:
    """3.4e38 is a float32 but rounds to infinity in bf16: it must not be stored as infinity."""
    weight = gaussian(1, 32)
    weight[0, 0] = 3.4e38
    stored = nest(weight, Recipe(Target.BF16))
    assert isinstance(stored, Dense)
    assert torch.isfinite(stored.weight).all()


@pytest.mark.parametrize("target", Target)
def test_nesting_does_not_touch_its_input(target: Target) -> None:
    weight = gaussian(4, 64).to(torch.bfloat16)
    before = weight.clone()
    nest(weight, Recipe(target))
    assert_same_bits(weight, before)
