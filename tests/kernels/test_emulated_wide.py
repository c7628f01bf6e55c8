"""Warpgroup products on a CPU (emulated/): wide.cu and fused.cu, whatever the order of warps.

When a product reads its operands is drawn as well, up to the wait that covers it. That its sums are
those of other products of tensor cores, bit for bit, is presumed here: only a GPU can show it.
"""

from dataclasses import replace

import pytest
import torch
from helpers_cpu import (
    VIEWS,
    assert_close,
    assert_same_bits,
    expected_product,
    gaussian,
    random_stored,
)
from helpers_emulated import Emulated, tensor_map
from test_emulated import BF16, CAN_RUN, MULTIPROCESSORS, product_of
from torch import Tensor

from qspec_llm.kernels.cuda import activations, direct, fused, layout, wide
from qspec_llm.kernels.cuda.wide import Tuning
from qspec_llm.weights.view import VERIFY

pytestmark = pytest.mark.skipif(not CAN_RUN, reason="emulation needs g++ on x86-64 Linux")
WORKSPACE_BYTES = 8 << 20
SOON_AGAIN = -2 * wide.RANGES  # arrivals so far: after two launches they count from 0 on again
FAULTS = ["none", "holds too early", "does not hold", "does not begin", "lacks a warp",
          "does not wait", "overwrites"]  # fmt: skip
Workspace = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def workspace(seed: int, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """That of the small GPU of Hopper's kind for which the CPU stands: full of NaN."""

    def kernel(source: str, function: str, **defines: object) -> Emulated:
        return Emulated(source, function, seed, **defines)

    def kernel_at_once(*args: str, **defines: object) -> Emulated:
        return Emulated(*args, seed, at_once=True, **defines)

    for module in (activations, direct, fused):
        monkeypatch.setattr(module, "kernel", kernel)
    monkeypatch.setattr(wide, "kernel", kernel_at_once)
    monkeypatch.setattr(direct, "instance", direct.instance.__wrapped__)  # not the one of a GPU
    device = direct.Device(MULTIPROCESSORS, 228 << 10, 227 << 10, has_multicast=True)
    monkeypatch.setattr(direct, "_device", lambda _: device)
    monkeypatch.setattr(activations, "check_rows", lambda *_: None)
    monkeypatch.setattr(wide, "instance", wide.instance.__wrapped__)
    monkeypatch.setattr(fused, "_instance", fused._instance.__wrapped__)
    for module in (wide, fused):
        monkeypatch.setattr(module, "num_multiprocessors", lambda _: MULTIPROCESSORS)
        monkeypatch.setattr(module, "tensor_map", tensor_map)
    monkeypatch.setattr(wide, "WORKSPACE_BYTES", WORKSPACE_BYTES)
    room = (
        torch.full((WORKSPACE_BYTES,), 255, dtype=torch.uint8),
        torch.full((wide.WORKSPACE_COUNTERS,), SOON_AGAIN, dtype=torch.int32),
        torch.zeros(wide.WORKSPACE_COUNTERS * wide.MAX_WARPS, dtype=torch.int32),
    )
    monkeypatch.setattr(wide, "_workspace", lambda _: room)
    return room


def faulty(fault: str, seed: int) -> Tensor:
    """A sum of each of 128 threads: of 32 ones, if `fault` is "none"."""
    out = torch.zeros(128)
    emulated = Emulated("faults_of_warpgroups.cu", "products", seed)
    emulated.launch((1,), 128, [out, FAULTS.index(fault)], smem=4096)
    return out


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("holds too early", "sums of products that are under way"),
        ("does not begin", "a product without wgmma_begin"),
        ("lacks a warp", "a warpgroup whose warps have not issued the same products"),
        ("does not wait", "products that nobody has waited for"),
    ],
)
def test_wrong_products_end_with_a_sentence(fault: str, sentence: str, seed: int) -> None:
    with pytest.raises(AssertionError, match=sentence):
        faulty(fault, seed)


def test_sums_that_are_not_there_and_operands_that_are_overwritten(seed: int) -> None:
    assert (faulty("none", seed) == 32).all()
    assert faulty("does not hold", seed).isnan().all()
    found = torch.stack([faulty("overwrites", 10 * seed + i) for i in range(10)])
    assert (found == 32).any()
    assert (found > 32).any()


# ---- generated rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "view", "group", "num_tokens", "chosen"),
    [
        ("signed16", "verify", 128, 100, Tuning(groups=2, stages=3)),
        ("signed16", "verify", 32, 45, None),
        ("signed16", "a8", 64, 64, None),
        ("signed16", "a8 g128", 128, 64, Tuning(groups=2)),
        ("affine4_offset", "a8 g128", 64, 48, None),
        ("signed8_draft8", "a8 g128", 128, 41, None),
        ("signed8", "verify", 128, 41, Tuning(groups=2)),
        ("affine4_offset", "verify", 32, 64, Tuning(groups=2, stages=3)),
        ("affine8_offset", "a4", 32, 45, Tuning(groups=2, stages=3)),
        ("signed8_draft8", "a8", 64, 41, Tuning(groups=2)),
        ("affine4", "verify", 128, 160, Tuning(groups=2)),
        ("bfloat16", "verify", 128, 160, Tuning(groups=2, stages=3)),
    ],
)
def test_rows_are_those_of_the_direct_kernel(
    form: str, view: str, group: int, num_tokens: int, chosen: Tuning | None
) -> None:
    """Columns of part of a tile; rows of part of a block; ranges of two tiles and of three."""
    num_cols = 2176 + group % 128
    stored = random_stored(form, 304, num_cols, group)
    packed, bias = layout.pack(stored, "cpu"), gaussian(304, seed=3)
    x = gaussian(num_tokens, num_cols, dtype=BF16)
    product = product_of(x, packed, VIEWS[view], bias)
    wide.multiply(product, chosen)
    same = replace(product, out=torch.full_like(product.out, torch.nan))
    direct.multiply(same)
    assert_close(same.out.double(), expected_product(x, stored, VIEWS[view]) + bias, 2e-5)
    assert_same_bits(product.out, same.out)


@pytest.mark.parametrize(
    ("form", "num_tokens", "chosen"),
    [
        ("signed16", 100, Tuning(groups=2, stages=4, tiles=16)),
        ("signed8", 41, Tuning(groups=2, stages=4, tiles=6)),
        ("signed8", 90, Tuning(groups=2, stages=4, tiles=6)),  # two blocks
    ],
)
def test_the_cut_changes_no_bit(
    form: str, num_tokens: int, chosen: Tuning, workspace: Workspace
) -> None:
    """Launches that follow each other through one workspace.

    Units of a thread block: one range, parts of one or two blocks of rows, whole blocks of rows, so
    many that totals pass on, among two and among four, all.
    """
    for num_rows, num_cols, cuts in ((304, 2176, (1, 3, 5, 8, 12, 24)), (528, 1152, (10,)),
                                     (144, 384, (None,))):  # fmt: skip
        packed = layout.pack(random_stored(form, num_rows, num_cols, 128), "cpu")
        product = product_of(gaussian(num_tokens, num_cols, dtype=BF16), packed, VERIFY, None)
        direct.multiply(product)
        for units in cuts:
            other = replace(product, out=torch.full_like(product.out, torch.nan))
            wide.multiply(other, replace(chosen, units=units))
            assert_same_bits(other.out, product.out)
    _, arrivals, flags = workspace
    assert not (arrivals % wide.RANGES).any()
    assert (arrivals[:3] >= 0).all()
    assert not flags.any()


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "group", "tiles", "ranges"),
    [
        ("signed16", 128, (8, 16), 1),
        ("signed8", 64, (8,), 2),
        ("affine4_f16", 32, (8,), 1),
        ("bfloat16", 128, (8,), 2),
    ],
)
def test_rows_of_prompts(form: str, group: int, tiles: tuple[int, ...], ranges: int) -> None:
    """Alone and among others; clusters that take several units; two blocks of rows and a part."""
    num_cols = 1152 + group % 128
    stored = random_stored(form, 296, num_cols, group)
    packed, bias = layout.pack(stored, "cpu"), gaussian(296, seed=3)
    x = gaussian(150, num_cols, dtype=BF16)

    def run(some: Tensor, num_tiles: int, dtype: torch.dtype = torch.float32) -> Tensor:
        out = torch.full((len(some), 296), torch.nan, dtype=dtype)
        fused.multiply(some, packed, bias, out, tiles=num_tiles, ranges=ranges)
        return out

    together = run(x, tiles[0])
    tolerance = 2e-5 if form in ("signed16", "bfloat16") else 3e-3  # others are rounded to bf16
    assert_close(together.double(), expected_product(x, stored, VERIFY) + bias, tolerance)
    for some in (slice(0, 1), slice(3, 73)):
        assert_same_bits(run(x[some], tiles[0]), together[some])
    for num_tiles in tiles[1:]:
        assert_same_bits(run(x, num_tiles), together)
    assert_same_bits(run(x[:73], tiles[-1], BF16), together[:73].to(BF16))
