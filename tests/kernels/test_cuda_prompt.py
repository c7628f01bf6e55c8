"""Prompt rows on a GPU: against float64, and bit for bit whatever else is computed with them."""

from typing import Any

import pytest
import torch
from helpers_cpu import Compile, assert_same_bits, expected_product, random_stored, some_rows
from test_cuda import ROUNDED, TOLERANCE, assert_close, fresh, on_gpu, run
from torch import Tensor

from helpers_weights import FORMS
from qspec_llm.kernels.cuda import fused, layout
from qspec_llm.kernels.cuda.form import Form
from qspec_llm.kernels.cuda.layout import PackedDense, PackedPlanes
from qspec_llm.kernels.cuda.linear import linear
from qspec_llm.kernels.cuda.prompt import through_cublas
from qspec_llm.weights.view import VERIFY

gpu = pytest.mark.gpu
EXACT = ("signed16", "bfloat16")  # others are rounded to bf16
# rows not of whole blocks, columns not of whole tiles, one range and several
SHAPES = [(97, 96, 32), (544, 2432, 32), (1056, 576, 64), (1000, 4096, 128)]
COUNTS = [1, 64, 255, 256, 257, 511, 512]
TILES = [8, 16, 24, 32]


def packed_of(form: str, shape: tuple[int, int, int]) -> PackedPlanes | PackedDense:
    packed = layout.pack(random_stored(form, *shape))
    assert isinstance(packed, PackedPlanes | PackedDense)
    return packed


def product(
    x: Tensor, packed: PackedPlanes | PackedDense, bias: Tensor | None = None, **more: Any
) -> Tensor:
    """`fused.multiply` into a poisoned float32 output."""
    if not fused.can_run(0):
        pytest.skip("fused.cu needs a Hopper GPU")
    out = torch.full((x.shape[0], packed.shape[0]), torch.nan, device="cuda")
    fused.multiply(x, packed, bias, out, **more)
    return out


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [*FORMS, "bfloat16"])
def test_rows_alone_and_among_others(form: str, shape: tuple[int, int, int]) -> None:
    stored = random_stored(form, *shape)
    packed, x = packed_of(form, shape), fresh(1500, shape[1])
    whole = run(x, packed, VERIFY, is_prompt=True)
    limit = TOLERANCE if form in EXACT else ROUNDED
    assert_close(whole, expected_product(x, on_gpu(stored), VERIFY), limit)
    for count in COUNTS:
        for start in (0, 1, 700, 1500 - count):
            part = run(x[start : start + count].contiguous(), packed, VERIFY, is_prompt=True)
            assert_same_bits(part, whole[start : start + count])


@gpu
@pytest.mark.parametrize("form", ["signed16", "affine8_offset", "bfloat16"])
def test_a_bias_is_added_before_the_only_rounding(form: str) -> None:
    for shape in SHAPES:
        packed, x, bias = packed_of(form, shape), fresh(300, shape[1]), fresh(shape[0])
        sums = run(x, packed, VERIFY, is_prompt=True)
        biased = run(x, packed, VERIFY, is_prompt=True, bias=bias)
        assert_same_bits(biased, sums + bias.float())
        assert_same_bits(run(x, packed, VERIFY, is_prompt=True, bias=bias.float()), biased)
        out = torch.full((300, shape[0]), torch.nan, dtype=torch.bfloat16, device="cuda")
        linear(x, packed, bias, VERIFY, some_rows(True), out=out)
        assert_same_bits(out, biased.bfloat16())


@gpu
@pytest.mark.parametrize("ranges", [1, 2])
@pytest.mark.parametrize("form", ["signed16", "affine4", "signed8", "bfloat16"])
def test_the_instance_changes_no_bit(form: str, ranges: int) -> None:
    for shape in [(1056, 576, 64), (1000, 4096, 128)]:
        stored = random_stored(form, *shape)
        packed, x = packed_of(form, shape), fresh(300, shape[1])
        usual = product(x, packed, tiles=32, ranges=ranges)
        limit = TOLERANCE if form in EXACT else ROUNDED
        assert_close(usual, expected_product(x, on_gpu(stored), VERIFY), limit)
        for tiles in TILES:
            assert_same_bits(product(x, packed, tiles=tiles, ranges=ranges), usual)


@gpu
@pytest.mark.parametrize("ranges", [1, 2])
def test_many_units_and_replays(ranges: int) -> None:
    """Clusters that take several units each have the bits of small products."""
    packed, x = packed_of("signed16", (8192, 1024, 128)), fresh(1024, 1024)
    usual = torch.cat([product(part, packed, ranges=ranges) for part in x.split(100)])
    outs = [torch.full_like(usual, torch.nan) for _ in range(3)]
    fused.multiply(x, packed, None, outs[0], ranges=ranges)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            fused.multiply(x, packed, None, out, ranges=ranges)
    for _ in range(20):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        for out in outs:
            assert_same_bits(out, usual)


@gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [*FORMS, "bfloat16"])
def test_through_cublas(form: str, shape: tuple[int, int, int]) -> None:
    """What GPUs without warpgroup products do."""
    stored = random_stored(form, *shape)
    packed, x, bias = packed_of(form, shape), fresh(600, shape[1]), fresh(shape[0])
    wanted = expected_product(x, on_gpu(stored), VERIFY)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((600, shape[0]), torch.nan, dtype=dtype, device="cuda")
        through_cublas(x, packed, None, out)
        assert_close(out, wanted, ROUNDED)
        part = torch.full((130, shape[0]), torch.nan, dtype=dtype, device="cuda")
        through_cublas(x[299:429], packed, None, part)
        assert_same_bits(part, out[299:429])
        through_cublas(x, packed, bias, out)
        assert_close(out, wanted + bias.double(), ROUNDED)


@pytest.mark.parametrize(
    ("shape", "ranges"),
    [((6144, 4096), 1), ((4096, 4096), 2), ((28672, 4096), 1), ((4096, 14336), 2), ((896, 896), 1)],
)
def test_ranges_look_at_the_matrix_alone(shape: tuple[int, int], ranges: int) -> None:
    assert fused.num_ranges(-(-shape[0] // 16), -(-shape[1] // 128)) == ranges


@pytest.mark.parametrize("num_tokens", [1, 64, 200, 256, 300, 512, 2048])
def test_tiles_of_tokens_waste_little(num_tokens: int) -> None:
    for rows, cols in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]:
        shape = rows // 16, cols // 128
        tiles = fused.token_tiles(num_tokens, *shape, fused.num_ranges(*shape), 132)
        assert tiles in TILES
        assert -(-num_tokens // (8 * tiles)) * 8 * tiles < 1.5 * num_tokens + 64


def test_it_compiles(compiled: Compile) -> None:
    forms = [Form(bits=4), Form(bits=4, group=32, is_signed=False, has_offset=True, is_half=True),
             Form(bits=8), Form(bits=16), Form(bits=0)]  # fmt: skip
    for form, tiles in zip(forms, [8, 16, 24, 32, 32], strict=True):
        macros = {**form.defines(), "NT": tiles, "RANGES": 1 + tiles // 24}
        assert compiled("fused.cu", "sm_90a", macros)
