"""The cuda backend's linears against float64, and what needs no GPU: packing and compiling.

Every GPU test draws fresh inputs, writes into a poisoned output and compares with weights decoded
by `weights.planes`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cpu import (
    DENSE_TYPES,
    VIEWS,
    Compile,
    assert_quantizes,
    assert_same_bits,
    expected_product,
    random_stored,
    refused,
    some_rows,
)
from torch import Tensor

from helpers_weights import FORMS, assert_same_stored
from qspec_llm.kernels.cuda import activations, check, direct, layout, linear, tables
from qspec_llm.kernels.cuda import compile as nvrtc
from qspec_llm.kernels.cuda.form import Form, form_of
from qspec_llm.weights.planes import (
    Dense,
    Planes,
    PlaneSpec,
    Stored,
    verify_bits,
    verify_weight,
)
from qspec_llm.weights.quantize import nest_signed16
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

gpu = pytest.mark.gpu
SHAPES = [(64, 256, 128), (97, 96, 32), (160, 576, 64), (1024, 1024, 128), (544, 2432, 32)]
TOLERANCE = 2e-5  # of float32 sums: tensor cores keep a few bits less than float32
ROUNDED = 3e-3  # of a result rounded to bf16, and of weights rounded to bf16


def fresh(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """New values in every call, with a few heavy tails."""
    x = torch.randn(*shape, device="cuda")
    return torch.where(torch.rand(*shape, device="cuda") < 0.01, x * 20, x).to(dtype)


def on_gpu(stored: Stored) -> Stored:
    if isinstance(stored, Dense):
        return Dense(stored.weight.cuda(), stored.reason)
    return Planes.from_tensors(stored.spec, {n: t.cuda() for n, t in stored.tensors().items()})


def run(
    x: Tensor, packed: layout.PackedMatrix, view: View, *, is_prompt: bool = False, **more: Any
) -> Tensor:
    """`linear` into a poisoned float32 output."""
    out = torch.full((x.shape[0], packed.shape[0]), torch.nan, device="cuda")
    bias = more.pop("bias", None)
    rows = some_rows(is_prompt)
    linear.linear(x, packed, bias, view, rows, torch.float32, out=out, **more)
    return out


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((actual.double() - wanted).norm() / wanted.norm())
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("form", [*FORMS, *DENSE_TYPES])
@pytest.mark.parametrize(("num_rows", "num_cols", "group"), SHAPES)
def test_packing_loses_nothing(form: str, num_rows: int, num_cols: int, group: int) -> None:
    stored = random_stored(form, num_rows, num_cols, group)
    packed = layout.pack(stored, "cpu")
    assert packed.shape == (num_rows, num_cols)
    assert_same_stored(layout.unpack(packed), stored)


def test_a_tile_byte_by_byte() -> None:
    """Column 37 of row 21: half 0, step 2, 5 = 2 t + b0 with t = 2, b0 = 1; tile 1, g = 5."""
    stored = random_stored("signed16", 32, 128, 128)
    assert isinstance(stored, Planes)
    packed = layout.pack(stored, "cpu")
    assert isinstance(packed, layout.PackedPlanes)
    assert packed.rest is not None
    lane = 5 * 4 + 2
    codes = stored.q4[21, 37] & 15  # the low nibble: column 37 of 128 lies in the first half
    assert packed.base[1, 0, lane * 16 + 2 * 4 + 2] & 15 == codes
    at = 1024 + 512 + lane * 16 + 0 * 8 + 0 * 4 + 1
    assert packed.rest[1, 0, at] == stored.r8[21, 37]  # type: ignore[index]


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_every_kernel_compiles(arch: str, compiled: Compile, tmp_path: Path) -> None:
    assert compiled("activations.cu", arch, {"TOP": 127, "ACT_GROUP": 64, "X_FLOAT": 0})
    draft, wide = draft_view(Activation.A8), draft_view(Activation.A8, 128)
    for name, view, token_tiles in [
        ("signed16", VERIFY, 1),
        ("signed16", draft, 2),
        ("signed16", wide, 2),
        ("affine8_offset", VERIFY, 2),
        ("affine8_draft8", draft, 1),
        ("affine4_f16", draft_view(Activation.A16), 1),
        (None, VERIFY, 2),
    ]:
        stored = None if name is None else random_stored(name, 32, 128, 64)
        spec = stored.spec if isinstance(stored, Planes) else None
        shape = form_of(spec, view)
        more = {"NT": token_tiles, "RT": 1, "DEPTH": 2, "LEAD": 1, "BLOCKS": 1}
        macros = {**shape.defines(), **more}
        for cluster in (1, 2) if arch in direct.MULTICASTS else (1,):
            assert compiled("direct.cu", arch, {**macros, "CLUSTER": cluster})
        if view == VERIFY:
            assert compiled("weights.cu", arch, macros)
    assert len(list(tmp_path.iterdir())) == (18 if arch in direct.MULTICASTS else 11)
    with refused("direct.cu", "error"):
        compiled("direct.cu", arch, {"ACT": 8})


def test_an_architecture_that_nvrtc_does_not_know_is_refused() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", exc_type=Exception)
    with refused("sm_52"):
        nvrtc.compile_source("direct.cu", "sm_52")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence() -> None:
    with refused("no CUDA device", "'cpu'"):
        nvrtc.architecture()


@pytest.mark.parametrize("tokens", [1, 5, 8, 16])
@pytest.mark.parametrize("act", [8, 16])
@pytest.mark.parametrize(
    "shape", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (100, 576)]
)
def test_the_cut_keeps_every_multiprocessor_busy(
    shape: tuple[int, int], act: int, tokens: int
) -> None:
    tiles = -(-shape[0] // 16), -(-shape[1] // 128)
    read = Form(bits=4, act=act, base_bytes=1056)
    chosen = direct.tuning(read, -(-tokens // 8), tiles[0])
    for smem in (227 << 10, 99 << 10):
        device = direct.Device(132, smem + 1024, smem)
        laid = direct.cut(read, chosen, tokens, *tiles, device)
        assert laid is not None
        turns = -(-tiles[0] // chosen.rows // laid.grid)
        assert turns * laid.grid * chosen.rows < 1.4 * tiles[0] + 2 * chosen.rows
        assert laid.smem <= smem
        pieces = math.ceil(math.ceil(tiles[1] / 8) / laid.piece)
        assert laid.buffers <= pieces
        assert laid.keeps_x == (laid.buffers == pieces)
        assert direct.sharers(laid, tokens, device) == 1
        shared = direct.sharers(laid, tokens, replace(device, has_multicast=True))
        assert laid.grid % shared == 0
        assert (shared == 2) == (tokens >= 3 and laid.grid % 2 == 0)


@gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 33, 100, 300])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", [*FORMS, "bfloat16"])
def test_linear_is_the_definition(form: str, view: str, num_tokens: int) -> None:
    for shape in SHAPES:
        stored = random_stored(form, *shape)
        packed = layout.pack(stored)
        x = fresh(num_tokens, shape[1])
        assert_close(
            run(x, packed, VIEWS[view]), expected_product(x, on_gpu(stored), VIEWS[view]), TOLERANCE
        )


@gpu
@pytest.mark.parametrize("form", ["signed16", "affine4", "signed8_draft8", "bfloat16"])
def test_prompts_and_other_outputs(form: str) -> None:
    stored = random_stored(form, 1056, 576, 64)
    packed, x, bias = layout.pack(stored), fresh(300, 576), fresh(1056)
    wanted = expected_product(x, on_gpu(stored), VERIFY) + bias.double()
    is_exact = form in ("signed16", "bfloat16")
    out = run(x, packed, VERIFY, is_prompt=True, bias=bias)
    assert_close(out, wanted, TOLERANCE if is_exact else ROUNDED)
    assert_close(run(x, packed, VERIFY, bias=bias.float()), wanted, TOLERANCE)
    rounded = linear.linear(x, packed, bias, VERIFY, some_rows())
    assert rounded.dtype is torch.bfloat16
    assert_close(rounded, wanted, ROUNDED)
    assert_same_bits(rounded, run(x, packed, VERIFY, bias=bias).bfloat16())


@gpu
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_other_dense_types(kind: str) -> None:
    stored = random_stored(kind, 100, 96)
    packed, x = layout.pack(stored), fresh(20, 96)
    assert_close(run(x, packed, VERIFY), expected_product(x, on_gpu(stored), VERIFY), TOLERANCE)
    assert_same_bits(run(x[:3].contiguous(), packed, VERIFY), run(x, packed, VERIFY)[:3])


@gpu
@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", ["signed16", "affine4_offset", "affine8", "bfloat16"])
@pytest.mark.parametrize("shape", [(4096, 4096, 128), (1536, 2048, 64), (97, 576, 32)])
def test_a_row_does_not_depend_on_the_others(
    shape: tuple[int, int, int], form: str, view: str, is_prompt: bool
) -> None:
    packed, x = layout.pack(random_stored(form, *shape)), fresh(256, shape[1])
    whole = run(x, packed, VIEWS[view], is_prompt=is_prompt)
    counts = [1, 200] if is_prompt else [1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 48, 64, 65, 128, 129]
    for count in counts:
        start = 256 - count
        assert_same_bits(run(x[:count], packed, VIEWS[view], is_prompt=is_prompt), whole[:count])
        part = x[start:].contiguous()
        assert_same_bits(run(part, packed, VIEWS[view], is_prompt=is_prompt), whole[start:])


@gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 8, 9, 15, 16, 21])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", ["signed16", "affine4_offset", "bfloat16"])
def test_blocks_that_share_x_change_no_bit(
    form: str, view: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of x kept and not, ranges without columns, a last tile that is not whole, odd grids."""
    for shape in [
        (4096, 4096, 128),
        (512, 14336, 128),
        (128, 576, 64),
        (544, 2432, 32),
        (97, 96, 32),
    ]:
        packed, x = layout.pack(random_stored(form, *shape)), fresh(num_tokens, shape[1])
        monkeypatch.setattr(direct, "LEAST_SHARED", 1000)
        alone = run(x, packed, VIEWS[view])
        monkeypatch.setattr(direct, "LEAST_SHARED", 1)
        for pdl in (False, True, True, True):
            assert_same_bits(run(x, packed, VIEWS[view], pdl=pdl), alone)


def sparse(*shape: int) -> Tensor:
    """A tenth of exact zeros, of either sign."""
    w = torch.randn(*shape) * 0.02 * (torch.rand(*shape) > 0.1)
    return torch.where(torch.rand(*shape) < 0.5, w, -w)


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "gaussian": lambda *shape: torch.randn(*shape) * 0.02,
    "heavy tails": lambda *shape: torch.distributions.StudentT(4.0).sample(shape) * 0.01,
    "zeros": sparse,
    "many octaves": lambda *shape: (
        torch.randn(*shape) * 0.02 * torch.exp2(-12 * torch.rand(*shape))
    ),
}


@gpu
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_bf16_target_returns_every_bit(kind: str, group: int) -> None:
    weight = WEIGHTS[kind](256, 512).bfloat16()
    stored = nest_signed16(weight, group)
    packed = layout.pack(stored)
    assert isinstance(packed, layout.PackedPlanes)
    room = torch.full((256, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
    assert_same_bits(tables.decoded(packed, slice(None), room).cpu(), weight)
    assert_same_bits(verify_bits(stored).view(torch.bfloat16), weight)
    assert_same_bits(tables.embed(torch.arange(256).cuda(), packed, torch.bfloat16).cpu(), weight)
    one_hot = torch.eye(512, dtype=torch.bfloat16, device="cuda")
    for first in range(0, 512, 256):
        out = run(one_hot[first : first + 256], packed, VERIFY)
        # a sum that starts at 0 shows no sign of zero
        assert_same_bits(out.t().cpu() + 0.0, weight.float()[:, first : first + 256] + 0.0)


@gpu
@pytest.mark.parametrize("form", [*FORMS, "bfloat16", "float16"])
def test_embed(form: str) -> None:
    stored = random_stored(form, 97, 576, 64)
    weight = stored.weight.float() if isinstance(stored, Dense) else verify_weight(stored)
    tokens = torch.tensor([0, 96, 31, 32, 5, 5], device="cuda")
    out = tables.embed(tokens, layout.pack(stored), torch.float32)
    assert_same_bits(out.cpu(), weight[tokens.cpu()])


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_cols", [96, 576, 4096])
@pytest.mark.parametrize("view", ["a8", "a8 g128", "a4"])
def test_quantised_activations(view: str, num_cols: int, dtype: torch.dtype) -> None:
    x = fresh(21, num_cols, dtype=dtype)
    x[3], x[4] = 0, x[4] * 1e-30  # both quantised in ways of their own
    assert_quantizes(activations.quantize(x, VIEWS[view]), x, VIEWS[view])


@gpu
def test_dependent_launch_changes_nothing() -> None:
    view = draft_view(Activation.A8)
    packed = layout.pack(random_stored("signed16", 2048, 2048, 128))
    x = fresh(9, 2048)
    plain = run(x, packed, view)
    for _ in range(20):
        assert_same_bits(run(x, packed, view, pdl=True), plain)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(plain)
    with torch.cuda.graph(graph):
        for _ in range(4):
            linear.linear(x, packed, None, view, some_rows(), torch.float32, out=out, pdl=True)
    out.fill_(torch.nan)
    graph.replay()
    assert_same_bits(out, plain)


@gpu
def test_bad_input_is_refused_in_a_sentence() -> None:
    packed, x = layout.pack(random_stored("affine4", 16, 64)), fresh(4, 64)
    rows = some_rows()
    with refused("(4, 63)", "64 columns"):
        linear.linear(x[:, :63], packed, None, VERIFY, rows)
    with refused("strides", "contiguous"):
        linear.linear(fresh(64, 4).t(), packed, None, VERIFY, rows)
    with refused("torch.float64"):
        linear.linear(x.double(), packed, None, VERIFY, rows)
    with refused("cpu"):
        linear.linear(x.cpu(), packed, None, VERIFY, rows)
    with refused("bias", "(15,)"):
        linear.linear(x, packed, fresh(15), VERIFY, rows)
    with refused("draft"):
        linear.linear(activations.quantize(x, VIEWS["a8"]), packed, None, VERIFY, rows)
    with refused("torch.float16"):
        linear.linear(x, packed, None, VERIFY, rows, torch.float16)


def test_the_self_check_draws_what_the_format_allows() -> None:
    """Weights around the anchor and exact zeros, and the packed form gives back every plane."""
    spec = linear_spec("signed16")
    planes = check.some_planes(spec)
    weight = verify_weight(planes)
    assert torch.isfinite(weight).all()
    assert 0.05 < float((weight == 0).float().mean()) < 0.2
    assert_same_stored(layout.unpack(layout.pack(planes, "cpu")), planes)


def linear_spec(form: str, num_cols: int = 1024) -> PlaneSpec:
    return PlaneSpec(check.ROWS[0], num_cols, group=64, **FORMS[form])


@gpu
@pytest.mark.parametrize("num_cols", [1024, 4096])
def test_the_self_check_passes_here(num_cols: int) -> None:
    specs = [linear_spec(form, num_cols) for form in FORMS]
    check.check([(1, num_cols), *specs], [draft_view(a) for a in Activation])


@gpu
def test_the_self_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, out: Tensor, **more: Any) -> Tensor:
        linear.linear(*args, out=out, **more)
        out[0, 3] += out.norm()
        return out

    check._check_form.cache_clear()
    monkeypatch.setattr(check, "linear", wrong)
    with refused("self-check", "16-bit", "cpu"):
        check.check([linear_spec("signed16")], [])
    check._check_form.cache_clear()


def test_a_scale_too_small_to_decode_in_pairs_is_refused() -> None:
    stored = random_stored("signed16", 16, 128)
    assert isinstance(stored, Planes)
    tiny = replace(stored, scale=torch.full_like(stored.scale, 2.0**-100))
    with refused("2^-97"):
        layout.pack(tiny, "cpu")
    nothing = {"r4": torch.zeros_like(stored.q4), "r8": torch.zeros(16, 128, dtype=torch.uint8)}
    zeros = replace(tiny, **nothing)
    assert_same_stored(layout.unpack(layout.pack(zeros, "cpu")), zeros)
