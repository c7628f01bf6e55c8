"""CUDA kernels on a CPU (emulated/): what they compute, whatever the order of their warps.

What a GPU adds, instructions that round in their own way and memory that is ordered in its own way,
only the GPU tests see. What multiplies by warpgroups, wide.cu and fused.cu, is tested in
test_emulated_wide.py.
"""

import platform
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_cpu import (
    VIEWS,
    assert_close,
    assert_quantizes,
    assert_same_bits,
    expected_product,
    gaussian,
    ragged_rows,
    random_cache,
    random_stored,
    some_rows,
)
from helpers_emulated import Emulated, tensor_map
from torch import Tensor

from qspec_llm.kernels import LayerKV, Rows, reference
from qspec_llm.kernels.cuda import (
    activations,
    attention,
    check,
    direct,
    layout,
    linear,
    persistent,
    rows,
    split,
    tables,
)
from qspec_llm.kernels.cuda.activations import Quantized, quantize
from qspec_llm.kernels.cuda.form import Product, form_of_weight
from qspec_llm.weights.planes import Planes, verify_weight
from qspec_llm.weights.quantize import nest_signed16
from qspec_llm.weights.view import VERIFY, View

CAN_RUN = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++")
pytestmark = pytest.mark.skipif(not CAN_RUN, reason="emulation needs g++ on x86-64 Linux")
MULTIPROCESSORS = 4
BF16 = torch.bfloat16
LINEARS = ("qkv", "output", "gate_up", "down")


@pytest.fixture(autouse=True)
def emulated(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run on the CPU, as on a small GPU of Hopper's kind."""

    def kernel(source: str, function: str, **defines: object) -> Emulated:
        return Emulated(source, function, seed, **defines)

    for module in (activations, attention, direct, persistent, rows, split, tables):
        monkeypatch.setattr(module, "kernel", kernel)
    monkeypatch.setattr(direct, "instance", direct.instance.__wrapped__)  # not the one of a GPU
    device = direct.Device(MULTIPROCESSORS, 228 << 10, 227 << 10, has_multicast=True)
    monkeypatch.setattr(direct, "_device", lambda _: device)
    for module in (linear.wide, linear.split):
        monkeypatch.setattr(module, "can_run", lambda *_: False)
    monkeypatch.setattr(split, "instance", split.instance.__wrapped__)
    monkeypatch.setattr(split, "tensor_map", tensor_map)
    monkeypatch.setattr(
        split, "_slots", lambda _, __, chosen, *___: MULTIPROCESSORS // chosen.split
    )
    for module in (attention, persistent, split):
        monkeypatch.setattr(module, "num_multiprocessors", lambda _: MULTIPROCESSORS)
    for module in (attention, rows):
        monkeypatch.setattr(module, "can_overlap", lambda: True)
        monkeypatch.setattr(module, "_fits", lambda *_: True)
    for module in (activations, linear):
        monkeypatch.setattr(module, "check_rows", lambda *_: None)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("writes_outside", "an address outside of shared memory"),
        ("waits_alone", "all wait for what never comes"),
        ("is_trapped", "a trap .* thread 7"),
        ("waits_for_no_copy", "a copy that no barrier counts"),
        ("ends_before_its_copy", "a copy into a block that has ended"),
    ],
)
def test_a_wrong_kernel_ends_with_a_sentence(fault: str, sentence: str, seed: int) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(AssertionError, match=sentence):
        Emulated("faults.cu", fault, seed).launch((1,), 64, [out], smem=256)


def test_orders_show_that_a_meeting_is_missing() -> None:
    found = torch.zeros(10, 64, dtype=torch.int32)
    for seed, out in enumerate(found):
        Emulated("faults.cu", "reads_too_early", seed).launch((1,), 64, [out], smem=256)
    is_early = found.view(torch.float32).isnan()
    assert is_early[:, :32].any()
    assert is_early[:, 32:].any()


# ---- rows ----------------------------------------------------------------------------------------


QUANTIZED = [view for view in VIEWS.values() if view.activation.bits < 16]


@pytest.mark.parametrize("num_cols", [576, 640])  # 128 divides one of them
def test_norm_and_swiglu(num_cols: int) -> None:
    x, delta = (gaussian(3, num_cols, dtype=BF16, seed=i) for i in range(2))
    x[1], x[2], delta[1:] = 0, x[2] * 1e-30, 0  # both quantised in ways of their own
    weight = gaussian(num_cols, seed=2).abs().to(BF16)
    total, normed = rows.add_rms_norm(x, delta, weight, 1e-5, None)
    assert isinstance(normed, Tensor)
    assert_same_bits(total, (x.float() + delta.float()).to(BF16))
    assert_close(normed, reference.rms_norm(total, weight, 1e-5), 3e-3)
    inner = rows.silu_mul(torch.cat([x, delta], -1))
    assert isinstance(inner, Tensor)
    assert_close(inner, reference.silu_mul(torch.cat([x, delta], -1)), 3e-3)
    for view in QUANTIZED:
        _, codes = rows.add_rms_norm(x, delta, weight, 1e-5, view)
        assert_quantizes(codes, normed, view)
        assert_quantizes(rows.silu_mul(torch.cat([x, delta], -1), view), inner, view)
        assert_quantizes(activations.quantize(x, view), x, view)


def product_of(x: Tensor, packed: layout.PackedPlanes, view: View, bias: Tensor | None) -> Product:
    """What `linear` makes of its arguments, into a poisoned output."""
    integers = quantize(x, view) if linear.wants_integers(packed, view) else None
    return Product(
        form=form_of_weight(packed, view),
        values=integers.codes if integers else x,
        meta=integers.meta if integers else None,
        weight=packed,
        bias=bias,
        out=torch.full((len(x), packed.shape[0]), torch.nan),
    )


# ---- linears -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "view", "group", "num_cols"),
    [
        ("signed16", "verify", 32, 1440),  # ranges with a tile more, and with a part of one
        ("signed16", "a8", 128, 1408),
        ("signed16", "a8 g128", 128, 1408),
        ("signed8", "verify", 128, 640),  # and without
        ("affine4", "verify", 64, 1472),
        ("affine4_f16", "a8", 32, 1440),
        ("affine8", "a4", 32, 224),
        ("affine4_offset", "a8 g128", 64, 640),
        ("signed8_draft8", "a8 g128", 128, 640),
    ],
)
def test_a_linear_of_any_number_of_rows(form: str, view: str, group: int, num_cols: int) -> None:
    stored = random_stored(form, 112, num_cols, group)
    assert isinstance(stored, Planes)
    packed, bias = layout.pack(stored, "cpu"), gaussian(112, seed=3)
    x = gaussian(20, num_cols, dtype=BF16)

    def run(some: Tensor) -> Tensor:
        out = torch.full((len(some), 112), torch.nan)
        return linear.linear(some, packed, bias, VIEWS[view], some_rows(), torch.float32, out=out)

    together = run(x)
    assert_close(together.double(), expected_product(x, stored, VIEWS[view]) + bias, 2e-5)
    for some in (slice(0, 1), slice(2, 7), slice(8, 19)):  # alone, and by pairs of blocks
        assert_same_bits(run(x[some].contiguous()), together[some])


@pytest.mark.parametrize(
    ("form", "view", "group", "chosen", "num_tokens"),
    [
        ("signed16", "verify", 128, split.Tuning(rows=1, depth=1, teams=4, split=2), 30),
        ("signed16", "a8", 128, split.Tuning(rows=2, depth=2, teams=2, split=1, lead=2), 32),
        ("signed8", "a8", 32, split.Tuning(rows=1, depth=3, teams=2, split=4, piece=1), 39),
        ("affine4", "verify", 64, split.Tuning(rows=2, depth=1, teams=3, split=8, piece=2), 17),
        ("affine4_offset", "a8", 128, split.Tuning(rows=1, depth=2, teams=2, split=2), 40),
        ("signed8", "verify", 32, split.Tuning(rows=1, depth=1, teams=1, split=2), 9),
        ("signed16", "a8", 128, split.Tuning(rows=1, depth=1, teams=2, split=1, piece=1), 8),
        ("signed16", "a8", 128, split.Tuning(rows=2, depth=1, teams=2, split=2), 63),
        ("signed16", "verify", 128, split.Tuning(rows=1, depth=1, teams=4, split=2), 47),
        ("signed16", "a8 g128", 128, split.Tuning(rows=2, depth=1, teams=2, split=2), 63),
        ("signed8", "a8 g128", 128, split.Tuning(rows=1, depth=2, teams=2, split=1, lead=2), 31),
        ("signed16", "a8 g128", 128, split.Tuning(rows=1, depth=1, teams=2, split=1), 45),
    ],
)
@pytest.mark.parametrize("room", [227 << 10, 0])
def test_columns_that_blocks_of_a_cluster_share(
    form: str,
    view: str,
    group: int,
    chosen: split.Tuning,
    num_tokens: int,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every bit of direct.cu: with all of x in shared memory, and with the smallest rings."""
    num_cols = 2176 if group == 128 else 1440 if group == 32 else 448  # then there are empty ranges
    stored = random_stored(form, 240, num_cols, group)
    packed, bias = layout.pack(stored, "cpu"), gaussian(240, seed=3)
    assert isinstance(packed, layout.PackedPlanes)
    product = product_of(gaussian(num_tokens, num_cols, dtype=BF16), packed, VIEWS[view], bias)
    token_tiles = -(-num_tokens // 8)
    if not room:
        most = split.cut(product.form, chosen, token_tiles, packed.base.shape[1])
        assert most is not None
        assert most.keeps_x
        smallest = replace(
            most, piece=1, slots=2, keeps_x=False, sum_buffers=1, inboxes=1, smem=split.SMEM
        )
        monkeypatch.setattr(split, "cut", lambda *_: smallest)
    split.multiply(product, chosen)
    same = replace(product, out=torch.full_like(product.out, torch.nan))
    direct.multiply(same)
    assert_same_bits(product.out, same.out)


@pytest.mark.parametrize("seed", [1], indirect=True)
def test_the_self_check_runs_every_instance(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = random_stored("signed16", 112, 1024, 128)
    assert isinstance(stored, Planes)
    chosen = []

    def multiply(product: Product, one: split.Tuning | None) -> None:
        chosen.append(one)
        usual(product, one)

    usual = split.multiply
    monkeypatch.setattr(split, "multiply", multiply)
    monkeypatch.setattr(split, "can_run", lambda _, count, __: 2 <= count <= 64)
    monkeypatch.setattr(check, "pack", lambda one, _: layout.pack(one, "cpu"))
    monkeypatch.setattr(check, "COUNTS", [count for count in check.COUNTS if count <= 64])
    check._check_form.__wrapped__(stored.spec, frozenset({112}), VIEWS["a8"], 0)
    form = form_of_weight(layout.pack(stored, "cpu"), VIEWS["a8"])  # type: ignore[arg-type]
    assert set(chosen) == {one for tiles in range(1, 9) for one in split.instances(form, tiles)}


@pytest.mark.parametrize("group", [32, 128])
def test_the_bf16_target_returns_every_bit(group: int) -> None:
    weight = gaussian(32, 256).to(BF16) * 0.02  # with heavy tails
    weight[torch.rand(32, 256, generator=torch.Generator().manual_seed(1)) < 0.1] = -0.0
    weight[:, 7] = 0
    packed = layout.pack(nest_signed16(weight, group), "cpu")
    assert isinstance(packed, layout.PackedPlanes)
    room = torch.full((32, 256), torch.nan, dtype=BF16)
    assert_same_bits(tables.decoded(packed, slice(None), room), weight)
    assert_same_bits(tables.embed(torch.arange(32), packed, BF16), weight)
    out = torch.full((256, 32), torch.nan)
    one_hot = torch.eye(256, dtype=BF16)
    linear.linear(one_hot, packed, None, VERIFY, some_rows(), torch.float32, out=out)
    # a sum that starts at 0 shows no sign of zero
    assert_same_bits(out.t() + 0.0, weight.float() + 0.0)


@pytest.mark.parametrize(
    ("form", "view", "group"),
    [
        ("signed16", "verify", 64),
        ("signed16", "a8", 128),
        ("signed8", "verify", 32),
        ("affine4_offset", "a4", 64),
    ],
)
def test_linears_of_gpus_before_hopper(
    form: str, view: str, group: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits without a copy engine and clusters, with less shared memory."""
    packed = layout.pack(random_stored(form, 112, 1408, group), "cpu")
    assert isinstance(packed, layout.PackedPlanes)
    hopper = product_of(gaussian(20, 1408, dtype=BF16), packed, VIEWS[view], gaussian(112, seed=3))
    direct.multiply(hopper)

    def kernel(source: str, function: str, **defines: object) -> Emulated:
        return Emulated(source, function, seed, __CUDA_ARCH__=890, **defines)

    monkeypatch.setattr(direct, "kernel", kernel)
    device = direct.Device(MULTIPROCESSORS, 100 << 10, 99 << 10)
    monkeypatch.setattr(direct, "_device", lambda _: device)
    for some in (slice(0, 1), slice(0, 20)):
        part = {
            "values": hopper.values[some].contiguous(),
            "out": torch.full_like(hopper.out[some], torch.nan),
        }
        ada = replace(hopper, **part)
        direct.multiply(ada)
        assert_same_bits(ada.out, hopper.out[some])


@pytest.mark.parametrize(("form", "group"), [("affine4_offset", 64), ("affine8", 32)])
def test_rows_and_tiles_of_a_matrix(form: str, group: int) -> None:
    stored = random_stored(form, 97, 320, group)
    assert isinstance(stored, Planes)
    packed, weight = layout.pack(stored, "cpu"), verify_weight(stored)
    assert isinstance(packed, layout.PackedPlanes)
    tokens = torch.tensor([0, 96, 31, 32, 5, 5])
    assert_same_bits(tables.embed(tokens, packed, torch.float32), weight[tokens])
    room = torch.full((48, 384), torch.nan, dtype=BF16)
    assert_close(tables.decoded(packed, slice(1, 4), room)[:, :320], weight[16:64].to(BF16), 3e-3)


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 2])
def test_attention_is_the_same_however_it_is_laid_out(
    tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [1, 3, 2] if tiles == 1 else [5, 7, 6]
    contexts = [600, 3, 130] if tiles == 1 else [600, 9, 130]
    places, num_blocks = ragged_rows(counts, contexts)
    qkv = gaussian(sum(counts), 8 * 64, dtype=BF16, seed=5).view(-1, 8, 64)
    query, keys, values = qkv.split([4, 2, 2], dim=1)
    angle = gaussian(600, 32, seed=6)
    angles = (angle.cos(), angle.sin())
    expected_kv = random_cache(num_blocks, 2, 64, BF16)
    expected = by_reference(query, keys, values, angles, expected_kv, places)

    outputs = []
    for cluster, stages in ((8, 3), (4, 5), (2, 4), (1, 3)):
        monkeypatch.setattr(attention, "_cut", lambda *_, cut=(cluster, stages): cut)
        kv = random_cache(num_blocks, 2, 64, BF16)
        out = attention.rotate_write_attend(query, keys, values, kv, angles, places, None)
        assert isinstance(out, Tensor)
        outputs.append(out)
        assert_same_bits(kv.keys, expected_kv.keys)
        assert_same_bits(kv.values, expected_kv.values)
    assert_close(outputs[0], expected, 1e-2)
    for out in outputs[1:]:
        assert_same_bits(out, outputs[0])
    codes = attention.rotate_write_attend(query, keys, values, kv, angles, places, VIEWS["a8"])
    assert_quantizes(codes, outputs[0].flatten(1), VIEWS["a8"])


def by_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    angles: tuple[Tensor, Tensor],
    kv: LayerKV,
    at: Rows,
) -> Tensor:
    cos, sin = (table[at.positions] for table in angles)
    reference.write_kv(reference.rope(keys, cos, sin), values, kv, VERIFY, at)
    return reference.attention(reference.rope(query, cos, sin), kv, VERIFY, at)


# ---- all layers in one kernel --------------------------------------------------------------------


def small_decoder(form: str, group: int, shape: tuple[int, int, int, int, int]) -> Any:
    """Two layers, as `Persistent` and `one_by_one` look at them."""
    heads, kv_heads, head_dim, hidden, inner = shape
    config = SimpleNamespace(
        hidden_size=hidden, intermediate_size=inner, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, norm_eps=1e-5,
    )  # fmt: skip
    qkv = (heads + 2 * kv_heads) * head_dim
    sizes = ((qkv, hidden), (hidden, heads * head_dim), (2 * inner, hidden), (hidden, inner))

    def layer(seed: int) -> Any:
        found: dict[str, Any] = {}
        for name, (num_rows, num_cols) in zip(LINEARS, sizes, strict=True):
            weight = layout.pack(random_stored(form, num_rows, num_cols, group), "cpu")
            bias = gaussian(num_rows, seed=seed, dtype=BF16) if name == "qkv" else None
            found[name] = SimpleNamespace(parts=((weight, bias),))
        norms = (1 + gaussian(hidden, seed=seed + i).abs().to(BF16) for i in (1, 2))
        found["input_norm"], found["post_attention_norm"] = norms
        return SimpleNamespace(**found)

    angle = gaussian(2048, head_dim // 2, seed=9)
    layers = [layer(10 * i) for i in range(2)]
    return SimpleNamespace(
        config=config, layers=layers, cos=angle.cos(), sin=angle.sin(), dtype=BF16,
        final_norm=layers[0].input_norm,
    )  # fmt: skip


def one_by_one(x: Tensor, decoder: Any, at: Rows, kv: list[LayerKV], view: View) -> Tensor:
    """step.py's layers, kernel by kernel."""
    config, delta = decoder.config, None
    form = view if view.is_draft else None
    sizes = [size * config.head_dim for size in (config.num_heads, *2 * [config.num_kv_heads])]

    def multiply(x: Tensor | Quantized, layer: Any) -> Tensor:
        ((weight, bias),) = layer.parts
        return linear.linear(x, weight, bias, view, at)

    for layer, layer_kv in zip(decoder.layers, kv, strict=True):
        x, hidden = rows.add_rms_norm(x, delta, layer.input_norm, config.norm_eps, form)
        parts = multiply(hidden, layer.qkv).split(sizes, -1)
        query, keys, values = (part.view(len(x), -1, config.head_dim) for part in parts)
        angles = (decoder.cos, decoder.sin)
        found = attention.rotate_write_attend(query, keys, values, layer_kv, angles, at, form)
        attended = found if isinstance(found, Quantized) else found.flatten(1)
        delta = multiply(attended, layer.output)
        x, hidden = rows.add_rms_norm(x, delta, layer.post_attention_norm, config.norm_eps, form)
        delta = multiply(rows.silu_mul(multiply(hidden, layer.gate_up), form), layer.down)
    assert delta is not None
    return (x.float() + delta.float()).to(BF16)


def caches(decoder: Any, num_blocks: int) -> list[LayerKV]:
    config = decoder.config
    size = (num_blocks, config.num_kv_heads, config.head_dim, BF16)
    return [random_cache(*size) for _ in decoder.layers]


@pytest.mark.parametrize(
    ("form", "view", "group", "shape"),
    [
        ("signed16", "a8", 64, (4, 2, 64, 256, 192)),
        ("signed16", "a8 g128", 128, (2, 1, 128, 384, 640)),
        ("affine4", "verify", 64, (9, 3, 64, 576, 704)),
        ("signed8", "verify", 32, (3, 1, 64, 384, 192)),
        ("affine8_offset", "a4", 32, (4, 2, 64, 256, 192)),
    ],
)
def test_all_layers_in_one_kernel_are_those_kernel_by_kernel(
    form: str,
    view: str,
    group: int,
    shape: tuple[int, int, int, int, int],
) -> None:
    decoder = small_decoder(form, group, shape)
    whole = persistent.Persistent(decoder)
    for context in (1, 40, 300, 1300):
        at, num_blocks = ragged_rows([1], [context])
        laid = whole.layout(at, VIEWS[view], 16)
        assert laid is not None
        start = gaussian(1, shape[3], dtype=BF16, seed=context)
        ours, theirs = caches(decoder, num_blocks), caches(decoder, num_blocks)
        x = start.clone()
        whole(x, at, ours, VIEWS[view], laid)
        assert_same_bits(x, one_by_one(start, decoder, at, theirs, VIEWS[view]))
        for one, other in zip(ours, theirs, strict=True):
            assert_same_bits(one.keys, other.keys)
            assert_same_bits(one.values, other.values)
        if context == 1:
            # stamps soon begin again
            whole._rooms[whole._room_of(VIEWS[view])]["counts"][0] = 65533
