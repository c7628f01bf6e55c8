"""split.cu: several generated rows, against float64 and, bit for bit, direct.cu."""

import math
from dataclasses import replace

import pytest
import torch
from helpers_cpu import VIEWS, Compile, assert_same_bits, expected_product, random_stored
from test_cuda import assert_close, fresh, on_gpu
from test_cuda_wide import poisoned, product

from helpers_weights import FORMS
from qspec_llm.kernels.cuda import direct, layout, split
from qspec_llm.kernels.cuda.form import Form
from qspec_llm.kernels.cuda.split import Tuning
from qspec_llm.weights.view import VERIFY, View

gpu = pytest.mark.gpu
TOLERANCE = 2e-5  # of float32 sums: tensor cores keep a few bits less than float32
# rows not of whole panels, columns not of whole tiles, fewer tiles than ranges, one of everything,
# x that has room and x that has not
SHAPES = [(97, 96, 32), (544, 2432, 32), (1056, 576, 64), (4224, 4096, 128), (1024, 14336, 128)]
BITS4 = Form(bits=4, base_bytes=1056)
SHARED_BYTES = 227 << 10


def check_against_direct(form: str, view: View, num_tokens: int) -> None:
    for shape in SHAPES:
        stored = random_stored(form, *shape)
        packed, x = layout.pack(stored), fresh(num_tokens, shape[1])
        out, same = poisoned(num_tokens, shape[0]), poisoned(num_tokens, shape[0])
        split.multiply(product(x, packed, view, out))
        direct.multiply(product(x, packed, view, same))
        assert_close(out, expected_product(x, on_gpu(stored), view), TOLERANCE)
        assert_same_bits(out, same)


@gpu
@pytest.mark.parametrize("num_tokens", [1, 6, 17, 40])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", [*FORMS, "bfloat16"])
def test_rows_are_those_of_the_direct_kernel(form: str, view: str, num_tokens: int) -> None:
    check_against_direct(form, VIEWS[view], num_tokens)


@gpu
@pytest.mark.parametrize("num_tokens", [8, 9, 16, 24, 25, 32, 33])
@pytest.mark.parametrize("view", ["verify", "a8", "a8 g128"])
@pytest.mark.parametrize("form", ["signed16", "signed8", "affine4", "affine4_offset"])
def test_products_of_every_width(form: str, view: str, num_tokens: int) -> None:
    check_against_direct(form, VIEWS[view], num_tokens)


@gpu
@pytest.mark.parametrize(
    "chosen",
    [
        Tuning(rows=1, depth=1, teams=1, split=1),
        Tuning(rows=2, depth=2, teams=2, split=1, lead=2, piece=1),
        Tuning(rows=1, depth=3, teams=2, split=4, piece=2),
        Tuning(rows=2, depth=1, teams=6, split=8),
        Tuning(rows=1, depth=2, teams=6, split=2),
    ],
)
@pytest.mark.parametrize("form", ["signed16", "affine4"])
def test_the_instance_changes_no_bit(form: str, chosen: Tuning) -> None:
    runs = 0
    for num_tokens, num_cols in ((8, 4096), (31, 4096), (24, 6144)):
        packed = layout.pack(random_stored(form, 4224, num_cols, 128))
        x = fresh(num_tokens, num_cols)
        for view in (VERIFY, VIEWS["a8"], VIEWS["a8 g128"]):
            usual, other = poisoned(num_tokens, 4224), poisoned(num_tokens, 4224)
            one = product(x, packed, view, usual)
            if split.cut(one.form, chosen, math.ceil(num_tokens / 8), num_cols // 128) is None:
                continue
            direct.multiply(one)
            split.multiply(replace(one, out=other), chosen)
            assert_same_bits(other, usual)
            runs += 1
    assert runs >= 6


@gpu
@pytest.mark.parametrize("num_tokens", [41, 48, 56, 64])
@pytest.mark.parametrize("view", ["a8", "a8 g128"])
@pytest.mark.parametrize("form", ["signed16", "signed8", "affine4"])
def test_drafts_of_more_rows(form: str, view: str, num_tokens: int) -> None:
    check_against_direct(form, VIEWS[view], num_tokens)


@gpu
@pytest.mark.parametrize("num_tokens", [41, 48])
def test_exact_weights_of_more_rows(num_tokens: int) -> None:
    check_against_direct("signed16", VERIFY, num_tokens)


@gpu
def test_a_bias_and_a_rounded_output() -> None:
    packed, x = layout.pack(random_stored("signed16", 1000, 576, 64)), fresh(20, 576)
    bias, out, plain = fresh(1000), poisoned(20, 1000), poisoned(20, 1000)
    one = product(x, packed, VERIFY, out, bias)
    split.multiply(one)
    rounded = replace(one, out=poisoned(20, 1000).bfloat16())
    split.multiply(rounded)
    assert_same_bits(rounded.out, out.bfloat16())
    split.multiply(replace(one, out=plain, bias=None))
    assert_same_bits(out, plain + bias.float())


@gpu
def test_clusters_in_a_chain_of_dependent_launches() -> None:
    """Kernels that hand on totals follow each other, replay after replay."""
    packed = layout.pack(random_stored("signed16", 4096, 4096, 128))
    x, plain = fresh(32, 4096), poisoned(32, 4096)
    direct.multiply(product(x, packed, VERIFY, plain))
    outs = [poisoned(32, 4096) for _ in range(4)]
    steps = [replace(product(x, packed, VERIFY, out), pdl=True) for out in outs]

    def run() -> None:
        for index, step in enumerate(steps):
            parts = (1, 2, 4)[index % 3]
            split.multiply(step, Tuning(rows=1, depth=1, teams=2 * parts, split=parts))

    run()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(20):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        for out in outs:
            assert_same_bits(out, plain)


@pytest.mark.parametrize("token_tiles", range(1, 1 + split.MAX_TOKENS // 8))
@pytest.mark.parametrize(("act", "act_group"), [(8, 64), (8, 128), (16, 64)])
@pytest.mark.parametrize("bits", [0, 4, 8, 16])
def test_x_has_room_in_shared_memory(bits: int, act: int, act_group: int, token_tiles: int) -> None:
    rest = {8: 1024, 16: 3072}.get(bits, 0)
    form = replace(BITS4, bits=bits, act=act, act_group=act_group, rest_bytes=rest)
    if token_tiles * 8 > split.most_tokens(form):
        return
    for row_tiles in (6, 256, 384, 1792, 8016):
        chosen = split.tuning(form, token_tiles, row_tiles, 132)
        for col_tiles in (1, 5, 8, 32, 112, 400):
            laid = split.cut(form, chosen, token_tiles, col_tiles)
            assert laid is not None
            assert laid.smem <= SHARED_BYTES
            pieces = math.ceil(math.ceil(col_tiles / 8) / laid.piece)
            assert laid.slots >= split.LEAST_SLOTS or laid.keeps_x
            assert laid.slots == pieces or not laid.keeps_x


@pytest.mark.parametrize(
    ("row_tiles", "warps"),  # qkv, o and gate_up of an 8B layer on 132 multiprocessors
    [(384, 12), (256, 16), (1792, 16)],
)
def test_warps_are_kept_busy(row_tiles: int, warps: int) -> None:
    for token_tiles in (2, 3, 4):
        for act in (8, 16):
            chosen = split.tuning(replace(BITS4, act=act), token_tiles, row_tiles, 132)
            assert chosen.teams * split.RANGES // chosen.split == warps


def test_it_compiles(compiled: Compile) -> None:
    forms = [
        BITS4,
        replace(BITS4, act=8),
        replace(BITS4, act=8, group=32, is_signed=False, has_offset=True, base_bytes=1280),
        Form(bits=8, is_signed=False, has_middle=True, base_bytes=1056, rest_bytes=1024),
        Form(bits=16, base_bytes=1056, rest_bytes=3072),
        Form(bits=0),
        replace(BITS4, act=8, act_group=128),
        replace(BITS4, act=8, act_group=128),
    ]
    for form, token_tiles in zip(forms, [1, 2, 3, 4, 5, 4, 6, 8], strict=True):
        chosen = split.tuning(form, token_tiles, 256, 132)
        laid = split.cut(form, chosen, token_tiles, 112)
        assert laid is not None
        macros = {
            name: int(value)
            for name, value in split.instance(form, token_tiles, chosen, laid).defines
        }
        assert compiled("split.cu", "sm_90a", macros)
