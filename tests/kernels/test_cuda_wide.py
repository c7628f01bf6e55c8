"""wide.cu: 17 generated rows and more, against float64 and, bit for bit, direct.cu."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_cpu import (
    VIEWS,
    Compile,
    assert_same_bits,
    expected_product,
    random_stored,
    some_rows,
)
from test_cuda import assert_close, fresh, on_gpu
from torch import Tensor

from helpers_weights import FORMS
from qspec_llm.kernels.cuda import check, direct, layout, split, wide
from qspec_llm.kernels.cuda.activations import quantize
from qspec_llm.kernels.cuda.form import Form, Product, form_of_weight
from qspec_llm.kernels.cuda.linear import linear, wants_integers
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

gpu = pytest.mark.gpu
TOLERANCE = 2e-5  # of float32 sums: tensor cores keep a few bits less than float32
# rows not of whole blocks, columns not of whole tiles, fewer tiles than ranges, one of everything
SHAPES = [(97, 96, 32), (544, 2432, 32), (1056, 576, 64), (1024, 4096, 128)]
# of 1056 rows: 14 units, or 9 of smaller blocks of rows, pass totals from block to block
CUTS: list[dict[str, Any]] = [
    {"units": 3},
    {"units": 8},
    {"units": 14},
    {"groups": 2, "units": 9},
    {"groups": 3},
    {"stages": 3},
]


def product(x: Tensor, packed: Any, view: View, out: Tensor, bias: Tensor | None = None) -> Product:
    """What `linear` makes of its arguments."""
    integers = quantize(x, view) if wants_integers(packed, view) else None
    return Product(
        form=form_of_weight(packed, view),
        values=integers.codes if integers else x,
        meta=integers.meta if integers else None,
        weight=packed,
        bias=bias,
        out=out,
    )


def poisoned(num_tokens: int, num_rows: int) -> Tensor:
    return torch.full((num_tokens, num_rows), torch.nan, device="cuda")


def check_against_direct(form: str, view: View, num_tokens: int) -> None:
    for shape in SHAPES:
        stored = random_stored(form, *shape)
        packed, x = layout.pack(stored), fresh(num_tokens, shape[1])
        out, same = poisoned(num_tokens, shape[0]), poisoned(num_tokens, shape[0])
        wide.multiply(product(x, packed, view, out))
        direct.multiply(product(x, packed, view, same))
        assert_close(out, expected_product(x, on_gpu(stored), view), TOLERANCE)
        assert_same_bits(out, same)


@gpu
@pytest.mark.parametrize("num_tokens", [17, 45, 100])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", [*FORMS, "bfloat16"])
def test_rows_are_those_of_the_direct_kernel(form: str, view: str, num_tokens: int) -> None:
    check_against_direct(form, VIEWS[view], num_tokens)


@gpu
@pytest.mark.parametrize("num_tokens", [32, 40, 64, 75, 90, 150, 200])
@pytest.mark.parametrize("view", ["verify", "a8"])
@pytest.mark.parametrize("form", ["signed16", "signed8", "affine4", "affine4_offset"])
def test_products_of_every_width(form: str, view: str, num_tokens: int) -> None:
    check_against_direct(form, VIEWS[view], num_tokens)


@gpu
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("form", ["signed16", "affine4"])
def test_the_cut_changes_no_bit(form: str, cut: dict[str, Any]) -> None:
    for num_tokens in (32, 64, 128):
        packed, x = layout.pack(random_stored(form, 1056, 4096, 128)), fresh(num_tokens, 4096)
        for view in (VERIFY, draft_view(Activation.A8)):
            usual, other = poisoned(num_tokens, 1056), poisoned(num_tokens, 1056)
            one = product(x, packed, view, usual)
            wide.multiply(one)
            assert wide.tiles_of(one.form, num_tokens) == num_tokens // 8
            usual_one = wide.tuning(one.form, num_tokens // 8, 1056 // 16, 4096 // 128, 0)
            wide.multiply(replace(one, out=other), replace(usual_one, **cut))
            assert_same_bits(other, usual)


def test_an_instance_without_room_for_x_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "num_multiprocessors", lambda _: 132)
    packed, x = layout.pack(random_stored("signed16", 256, 1024, 128), "cpu"), torch.zeros(64, 1024)
    with pytest.raises(AssertionError, match="no room for x beside Tuning"):
        wide.multiply(product(x, packed, VERIFY, x), wide.Tuning(groups=4, tiles=20))


@gpu
def test_a_bias_and_a_rounded_output() -> None:
    packed, x, bias = (
        layout.pack(random_stored("signed16", 1000, 576, 64)),
        fresh(50, 576),
        fresh(1000),
    )
    out = poisoned(50, 1000)
    wide.multiply(product(x, packed, VERIFY, out, bias))
    rounded = linear(x, packed, bias, VERIFY, some_rows())
    assert rounded.dtype is torch.bfloat16
    assert_same_bits(rounded, out.bfloat16())
    plain = poisoned(50, 1000)
    wide.multiply(product(x, packed, VERIFY, plain))
    assert_same_bits(out, plain + bias.float())


@gpu
def test_shared_rows_in_a_chain_of_dependent_launches() -> None:
    """Kernels that exchange sums follow each other through one workspace, replay after replay."""
    packed = layout.pack(random_stored("signed16", 2048, 4096, 128))
    x, plain = fresh(40, 4096), poisoned(40, 2048)
    cuts = [wide.Tuning(groups=4, units=units) for units in (1, 3, 10)]
    wide.multiply(product(x, packed, VERIFY, plain), cuts[0])  # a kernel is not loaded in a graph
    outs = [poisoned(40, 2048) for _ in range(4)]
    steps = [replace(product(x, packed, VERIFY, out), pdl=True) for out in outs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index, step in enumerate(steps):
            wide.multiply(step, cuts[index % 3])
    for _ in range(20):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        for out in outs:
            assert_same_bits(out, plain)


@pytest.mark.parametrize(
    ("num_units", "num_col_tiles", "blocks"),
    # an 8B layer on 132 multiprocessors: blocks of 256 rows, and gate_up's of 128 and of 192
    [(192, 32, 96), (128, 32, 128), (896, 32, 128), (128, 112, 128), (1792, 32, 132),
     (1200, 32, 132)],
)  # fmt: skip
def test_multiprocessors_are_kept_busy(num_units: int, num_col_tiles: int, blocks: int) -> None:
    assert wide.blocks_of(num_units, num_col_tiles, 132) == blocks


@pytest.mark.parametrize(
    ("form", "num_tokens", "groups"),
    [
        (Form(bits=16), 64, (3, 4, 4, 4)),
        (Form(bits=16), 96, (3, 2, 3, 4)),
        (Form(bits=16), 128, (3, 2, 3, 2)),
        (Form(bits=4, is_signed=False), 64, (3, 4, 4, 4)),
        (Form(bits=4, is_signed=False), 128, (2, 2, 2, 2)),
        (Form(bits=4, act=8, act_group=128), 128, (3, 2, 3, 2)),
        (Form(bits=4, act=8), 128, (2, 2, 2, 2)),
        (Form(bits=4, has_offset=True), 64, (2, 2, 2, 2)),
    ],
)
def test_warpgroups_are_chosen_by_the_matrix(
    form: Form, num_tokens: int, groups: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an 8B layer, as measured: qkv, o, gate_up, down."""
    monkeypatch.setattr(wide, "num_multiprocessors", lambda _: 132)
    layer = [(384, 32), (256, 32), (1792, 32), (256, 112)]
    chosen = [wide.tuning(form, num_tokens // 8, *tiles, 0).groups for tiles in layer]
    assert tuple(chosen) == groups


@pytest.mark.parametrize(
    "form", [Form(bits=16), Form(bits=0), Form(bits=8), Form(bits=4, act=8, act_group=128)]
)
def test_the_self_check_meets_every_instance(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "num_multiprocessors", lambda _: 132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    num_rows = (6144, 4096, 28672)
    checked = {
        (wide.tiles_of(form, count), one)
        for count in check.COUNTS
        for one in check._instances(form, 32, frozenset(num_rows), count, 0)
    }
    for num_tokens in range(wide.LEAST_TOKENS, 400):
        if split.can_run(form, num_tokens, 0):
            continue
        tiles = wide.tiles_of(form, num_tokens)
        for rows in num_rows:
            assert (tiles, wide.tuning(form, tiles, rows // 16, 32, 0)) in checked


@pytest.mark.parametrize(
    ("num_tokens", "tiles"),
    [(17, 4), (33, 5), (64, 8), (128, 16), (129, 20), (160, 20), (170, 12), (256, 16)],
)
def test_blocks_hold_no_more_tokens_than_there_are(num_tokens: int, tiles: int) -> None:
    assert wide.tiles_of(Form(bits=16), num_tokens) == tiles


def test_it_compiles(compiled: Compile) -> None:
    forms = [Form(bits=4, act=8), Form(bits=4, group=32, is_signed=False, has_offset=True, act=8),
             Form(bits=4, is_signed=False, has_offset=True), Form(bits=8), Form(bits=16),
             Form(bits=0)]  # fmt: skip
    for form, token_tiles in zip(forms, [4, 6, 12, 5, 10, 16], strict=True):
        for groups in wide.groups_of(form, token_tiles):
            chosen = {**form.defines(), "NT": token_tiles, "WGS": groups, "RANGES": wide.RANGES}
            assert compiled("wide.cu", "sm_90a", chosen)
