"""Codes to bytes, and what planes mean: golden bytes and blocks computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers_weights import FORMS, assert_same_bits, gaussian, random_planes, refused
from qspec_llm.weights.pack import pack_nibbles, unpack_nibbles
from qspec_llm.weights.planes import (
    GROUPS,
    RESIDUAL_CENTRE,
    Dense,
    Grid,
    Planes,
    PlaneSpec,
    concat_rows,
    draft_weight,
    levels,
    verify_bits,
    verify_weight,
)

# --- nibbles ---------------------------------------------------------------------------------


@given(
    group=st.sampled_from(GROUPS),
    num_rows=st.integers(1, 5),
    num_groups=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_unpacking_undoes_packing(group: int, num_rows: int, num_groups: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (num_rows, num_groups * group), np.uint8)
    packed = pack_nibbles(torch.from_numpy(codes), group)
    assert packed.shape == (num_rows, num_groups * group // 2)
    assert_same_bits(unpack_nibbles(packed, group).flatten(1), torch.from_numpy(codes))


@given(group=st.sampled_from(GROUPS), rows=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_packing_undoes_unpacking(group: int, rows: int, seed: int) -> None:
    packed = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (rows, group), np.uint8)
    )  # two groups a row
    assert_same_bits(pack_nibbles(unpack_nibbles(packed, group).flatten(1), group), packed)


def codes_7i_plus_3(count: int) -> Tensor:
    return ((7 * torch.arange(count) + 3) % 16).to(torch.uint8).view(1, count)


@pytest.mark.parametrize(
    ("group", "golden"),
    [
        # 3, 10, 1, 8, 15, 6, 13, 4, 11, 2, 9, 0, 7, 14, 5, 12 and again: halves are equal
        (32, "33aa1188ff66dd44bb22990077ee55cc" * 2),
        (64, "33aa1188ff66dd44bb22990077ee55cc" * 2),
    ],
)
def test_nibble_bytes_are_golden(group: int, golden: str) -> None:
    assert bytes(pack_nibbles(codes_7i_plus_3(64), group)[0].tolist()).hex() == golden


@pytest.mark.parametrize("group", GROUPS)
def test_a_byte_holds_two_codes_half_a_group_apart(group: int) -> None:
    codes = torch.zeros(1, 2 * group, dtype=torch.uint8)
    codes[0, group + 5] = 0xA  # the second group's sixth code: low nibble
    codes[0, group + 5 + group // 2] = 0xB  # its partner: high nibble
    expected = torch.zeros(1, group, dtype=torch.uint8)
    expected[0, group // 2 + 5] = 0xBA
    assert_same_bits(pack_nibbles(codes, group), expected)


# --- what each form means, computed by hand --------------------------------------------------


def block(
    form: str,
    codes: list[int],
    scale: float,
    *,
    low: list[int] | None = None,
    last: list[int] | None = None,
    offset: float | None = None,
) -> Planes:
    """One group of 32 whose first codes are given; the rest are code 8 with residual 8 (or 0)."""
    spec = PlaneSpec(1, 32, group=32, **FORMS[form])
    rest = 32 - len(codes)

    def nibbles(values: list[int], fill: int) -> Tensor:
        return pack_nibbles(torch.tensor([values + [fill] * rest], dtype=torch.uint8), 32)

    tensors = {"q4": nibbles(codes, 8), "scale": torch.tensor([[scale]], dtype=spec.scale_dtype)}
    if low is not None:
        tensors["r4"] = nibbles(low, 8 if spec.bits == 8 else 0)
    if last is not None:
        tensors["r8"] = torch.tensor([last + [0] * rest], dtype=torch.uint8)
    if offset is not None:
        tensors["offset"] = torch.tensor([[offset]], dtype=spec.scale_dtype)
    return Planes.from_tensors(spec, tensors)


def assert_block(planes: Planes, draft: list[float], verify: list[float]) -> None:
    """The first weights of both views; list equality holds -0.0 and 0.0 equal."""
    assert draft_weight(planes)[0, : len(draft)].tolist() == draft
    assert verify_weight(planes)[0, : len(verify)].tolist() == verify


def test_signed16_by_hand() -> None:
    # s = 1, C = 3583. A = c - 7.5; w = bits(A) + r - C on the magnitude's pattern.
    #   c = 9:  A = 1.5  = 0x3FC0; r = 3519 = 0xDBF: 0x3FC0 - 64 = 0x3F80 =  1.0
    #   c = 5:  A = -2.5 = 0xC020; r = 3583 = 0xDFF: 0xC020             = -2.5
    #   c = 15: A = 7.5  = 0x40F0; r = 3600 = 0xE10: 0x40F0 + 17 = 0x4101 = 8.0625
    #   c = 8 and 7 with r = 0: +0.0 and -0.0
    #   c = 8:  A = 0.5  = 0x3F00; r = 1:    0x3F00 - 3582 = 0x3102 = 130/128 * 2^-29
    #   c = 15: r = 4095 = 0xFFF: 0x40F0 + 512 = 0x42F0 = 120.0
    planes = block(
        "signed16",
        [9, 5, 15, 8, 7, 8, 15],
        1.0,
        low=[0xD, 0xD, 0xE, 0, 0, 0, 0xF],
        last=[0xBF, 0xFF, 0x10, 0, 0, 1, 0xFF],
    )
    expected = [1.0, -2.5, 8.0625, 0.0, -0.0, 130 / 128 * 2.0**-29, 120.0]
    assert_block(planes, [1.0, -2.0, 7.0, 0.0, 0.0, 0.0, 7.0], expected)
    patterns = [0x3F80, 0xC020, 0x4101, 0x0000, 0x8000, 0x3102, 0x42F0]
    assert [b & 0xFFFF for b in verify_bits(planes)[0, :7].tolist()] == patterns


def test_signed8_by_hand() -> None:
    # s = 0.5: draft v/2, verify (16 v + r4 - 8)/32
    planes = block("signed8", [10, 5, 7, 8, 0, 15], 0.5, low=[3, 8, 0, 15, 0, 15])
    assert_block(
        planes,
        [1.0, -1.0, 0.0, 0.0, -3.5, 3.5],
        [27 / 32, -1.0, -8 / 32, 7 / 32, -120 / 32, 119 / 32],
    )


def test_affine4_by_hand() -> None:
    weights = [-2.0, -1.25, 0.0, 1.75]  # (c - 8)/4
    assert_block(block("affine4", [0, 3, 8, 15], 0.25), weights, weights)


def test_affine4_with_offset_by_hand() -> None:
    weights = [1.5, 2.25, 3.5, 5.25]  # c/4 + 1.5
    assert_block(block("affine4_offset", [0, 3, 8, 15], 0.25, offset=1.5), weights, weights)


def test_affine8_by_hand() -> None:
    # s = 2: draft (c - 8 + 7.5/16) 2, verify (16 c + r4 - 128)/8
    planes = block("affine8", [0, 3, 8, 15], 2.0, low=[0, 5, 0, 15])
    assert_block(planes, [-15.0625, -9.0625, 0.9375, 14.9375], [-16.0, -75 / 8, 0.0, 127 / 8])


def test_affine8_with_offset_by_hand() -> None:
    planes = block("affine8_offset", [0, 3, 15], 2.0, low=[0, 5, 15], offset=-1.0)
    assert_block(planes, [-0.0625, 5.9375, 29.9375], [-1.0, 53 / 8 - 1, 255 / 8 - 1])


@pytest.mark.parametrize("form", ["signed8_draft8", "affine8_draft8"])
def test_a_draft_at_8_bits_is_the_8_bit_weight(form: str) -> None:
    planes = random_planes(form, 3, 64)
    assert_same_bits(draft_weight(planes), verify_weight(planes))


def test_every_code_and_residual_of_a_16_bit_tensor() -> None:
    codes, residual = np.divmod(np.arange(16 * 4096), 4096)
    for scale in (2.0**-125, 0.0123, 1.0, 2.0**120):
        s = torch.tensor(scale, dtype=torch.bfloat16)
        # the anchor by float64 arithmetic, which has room to spare, then one rounding to bf16
        anchors = [(c - 7.5) * float(s) for c in range(16)]
        anchor = torch.tensor(anchors, dtype=torch.float64).to(torch.bfloat16).view(torch.int16)
        anchor = anchor.numpy().astype(np.int64)[codes] & 0xFFFF
        expected = np.where(residual > 0, anchor + residual - RESIDUAL_CENTRE, anchor & 0x8000)
        spec = PlaneSpec(1, 16 * 4096, group=128, **FORMS["signed16"])
        planes = Planes(
            spec=spec,
            q4=pack_nibbles(torch.from_numpy(codes.astype(np.uint8))[None], 128),
            r4=pack_nibbles(torch.from_numpy((residual >> 8).astype(np.uint8))[None], 128),
            r8=torch.from_numpy((residual & 255).astype(np.uint8))[None],
            scale=s.expand(1, spec.num_groups),
        )
        # residuals that would leave the magnitude patterns are never stored
        inside = (anchor & 0x7FFF) + residual - RESIDUAL_CENTRE
        inside = (residual == 0) | ((inside >= 0) & (inside <= 0x7FFF))
        assert inside.sum() > 10_000
        actual = verify_bits(planes)[0].numpy().astype(np.int64) & 0xFFFF
        np.testing.assert_array_equal(actual[inside], expected[inside])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", GROUPS)
def test_views_equal_the_formula(form: str, group: int) -> None:
    planes = random_planes(form, 5, 2 * group, group)
    spec = planes.spec
    c = unpack_nibbles(planes.q4, group).double()
    v = torch.where(c >= 8, c - 8, c - 7)
    s = planes.scale.double()[..., None]
    b = -8 * s if planes.offset is None else planes.offset.double()[..., None]
    r4 = None if planes.r4 is None else unpack_nibbles(planes.r4, group).double()
    if spec.grid is Grid.SIGNED:
        four, eight = v * s, None if r4 is None else (16 * v + r4 - 8) * s / 16
    else:
        four = (c + (7.5 / 16 if spec.bits == 8 else 0)) * s + b
        eight = None if r4 is None else (16 * c + r4) * s / 16 + b
    draft = four if spec.draft_bits == 4 else eight
    torch.testing.assert_close(
        draft_weight(planes).double(), draft.flatten(1), rtol=0, atol=2.0**-24
    )
    if spec.bits < 16:
        verify = four if spec.bits == 4 else eight
        torch.testing.assert_close(
            verify_weight(planes).double(), verify.flatten(1), rtol=0, atol=2.0**-24
        )


@pytest.mark.parametrize("form", FORMS)
def test_levels_are_integers_of_the_documented_dtype(form: str) -> None:
    planes = random_planes(form, 2, 64)
    for width in (4, 8) if planes.spec.bits >= 8 else (4,):
        level, scale, offset = levels(planes, width)
        assert level.dtype == (torch.int8 if width == 4 else torch.int16)
        assert level.shape == (2, 2, 32)
        assert (scale.dtype, scale.shape) == (torch.float32, (2, 2))
        assert offset is None or (offset.dtype, offset.shape) == (torch.float32, (2, 2))


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_concat_rows(form: str) -> None:
    planes = random_planes(form, 7, 64)
    whole = verify_weight(planes)
    index = torch.tensor([6, 0, 3, 3])
    assert_same_bits(verify_weight(planes.rows(index)), whole[index])
    parts = [planes.rows(slice(0, 2)), planes.rows(slice(2, 7))]
    joined = concat_rows(parts)
    assert joined.spec == planes.spec
    assert_same_bits(verify_weight(joined), whole)


# --- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_what_the_table_says(form: str, group: int) -> None:
    planes = random_planes(form, 6, 3 * group, group)
    spec, num_weights = planes.spec, 6 * 3 * group
    scales = 16 * (2 if spec.has_offset else 1) / group
    assert spec.bits_stored == spec.bits + scales
    assert spec.draft_bits_read == spec.draft_bits + scales
    held = sum(t.numel() * t.itemsize for t in planes.tensors().values())
    assert planes.nbytes == held == num_weights * spec.bits_stored / 8
    assert planes.draft_nbytes == num_weights * spec.draft_bits_read / 8


@pytest.mark.parametrize(("bits_", "form"), [(4, "affine4"), (8, "signed8"), (16, "signed16")])
@pytest.mark.parametrize("group", GROUPS)
def test_bits_stored_per_target(bits_: int, form: str, group: int) -> None:
    assert PlaneSpec(1, group, group=group, **FORMS[form]).bits_stored == bits_ + 16 / group


def test_a_dense_tensor_is_read_whole_by_both_views() -> None:
    dense = Dense(gaussian(3, 5), "a test")
    assert dense.nbytes == dense.draft_nbytes == 60


# --- refusals --------------------------------------------------------------------------------

BAD_SPECS = {
    "group": ({"group": 48}, ["48", "32"]),
    "columns": ({"num_cols": 96, "group": 64}, ["96", "64"]),
    "signed 4": ({"grid": Grid.SIGNED, "bits": 4}, ["signed", "4-bit"]),
    "affine 16": ({"grid": Grid.AFFINE, "bits": 16}, ["affine", "16-bit"]),
    "no such bits": ({"bits": 5}, ["5-bit"]),
    "signed offset": ({"has_offset": True}, ["offset"]),
    "scale dtype": ({"scale_dtype": torch.float32}, ["float32", "bfloat16"]),
    "signed f16": ({"scale_dtype": torch.float16}, ["signed", "bfloat16"]),
    "draft wider": ({"grid": Grid.AFFINE, "bits": 4, "draft_bits": 8}, ["4-bit", "8 bits"]),
    "draft odd": ({"draft_bits": 5}, ["5 bits"]),
    "draft 8 of 16": ({"bits": 16, "draft_bits": 8}, ["16-bit"]),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_bad_specs_are_refused(case: str) -> None:
    change, words = BAD_SPECS[case]
    good = {"num_rows": 2, "num_cols": 64, "group": 32, "bits": 8, "grid": Grid.SIGNED}
    PlaneSpec(**good)
    with refused(*words):
        PlaneSpec(**{**good, **change})


@pytest.mark.parametrize("form", FORMS)
def test_bad_planes_are_refused(form: str) -> None:
    planes = random_planes(form, 4, 64)
    tensors = planes.tensors()
    for name, tensor in tensors.items():
        with refused(name, "missing"):
            Planes.from_tensors(planes.spec, {n: t for n, t in tensors.items() if n != name})
        with refused(name, "(3,"):
            replace(planes, **{name: tensor[:3]})
        with refused(name, "float64"):
            replace(planes, **{name: tensor.double()})
    for name in {"r4", "r8", "offset"} - tensors.keys():
        with refused(name, "does not belong"):
            replace(planes, **{name: tensors["q4"]})
    with refused("extra", "does not belong"):
        Planes.from_tensors(planes.spec, {**tensors, "extra": tensors["q4"]})


def test_missing_required_planes_are_refused_without_from_tensors() -> None:
    planes = random_planes("signed16", 4, 64)
    with refused("r8", "missing"):
        replace(planes, r8=None)
