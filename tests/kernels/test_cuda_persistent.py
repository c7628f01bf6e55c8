"""All layers of a row in one kernel: every bit of the same layers kernel by kernel."""

import re
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_cpu import (
    MODEL_VIEWS,
    VIEWS,
    Compile,
    assert_same_bits,
    ragged_rows,
    random_stored,
    refused,
)
from torch import Tensor

from helpers_engine import tiny_decoder
from helpers_weights import FORMS
from qspec_llm.engine.captured import captured
from qspec_llm.kernels import LayerKV, Rows, available_backends
from qspec_llm.kernels.cuda.form import Form
from qspec_llm.kernels.cuda.persistent import (
    LEAST_TILES,
    SMEM,
    STATIC,
    Persistent,
    Sizes,
    layout_of,
)
from qspec_llm.model.decoder import Decoder
from qspec_llm.model.layers import Linear
from qspec_llm.weights.quantize import Target

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif("cuda" not in available_backends(), reason="no GPU that can run it")

# heads, KV heads, head size, hidden, inner: whole tiles of columns and not, ranges without a tile,
# one round of a norm and two
SHAPES = [
    (4, 2, 64, 256, 192),
    (9, 3, 64, 576, 1536),
    (8, 1, 128, 1024, 2112),
    (32, 4, 128, 4160, 1088),
]
CONTEXTS = (1, 33, 257, 700)
LLAMA_8B = Sizes(4096, 14336, 32, 8, 128)
FORMS_READ = {
    "draft a8": Form(bits=4, act=8, base_bytes=1056),
    "draft a8 g128": Form(bits=4, act=8, act_group=128, base_bytes=1056),
    "draft a4": Form(bits=4, group=32, act=8, act_group=32, base_bytes=1152),
    "int4": Form(bits=4, is_signed=False, base_bytes=1056),
    "int8": Form(bits=8, base_bytes=1056, rest_bytes=1024),
}


def decoder_of(
    form: str,
    shape: tuple[int, int, int, int, int],
    family: str = "llama",
    group: int = 32,
    num_layers: int = 2,
    draft_group: int = 64,
) -> Decoder:
    """A tiny decoder whose linears have random weights of one form, which the kernel takes."""
    heads, kv_heads, head_dim, hidden, inner = shape
    decoder = tiny_decoder(
        Target.INT4, backend="cuda", family=family, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, hidden_size=hidden, intermediate_size=inner, context_length=8192,
        num_layers=num_layers,
    )  # fmt: skip

    def other(linear: Linear) -> Linear:
        ((weight, bias),) = linear.parts
        return Linear(((decoder.ops.pack(random_stored(form, *weight.shape, group)), bias),))

    layers = tuple(
        replace(
            layer,
            qkv=other(layer.qkv),
            output=other(layer.output),
            gate_up=other(layer.gate_up),
            down=other(layer.down),
        )
        for layer in decoder.layers
    )
    made: Any = replace(decoder, layers=layers, draft_group=draft_group)
    assert made._whole_step._persistent is not None
    return made


def row_at(context: int, decoder: Decoder) -> tuple[Rows, tuple[LayerKV, ...]]:
    """The last of `context` positions, and a cache of random keys and values."""
    rows, num_blocks = ragged_rows([1], [context])
    config = decoder.config
    generator = torch.Generator("cuda").manual_seed(context)

    def cache() -> Tensor:
        shape = (num_blocks * 16, config.num_kv_heads, config.head_dim)
        return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)

    kv = tuple(LayerKV(cache(), cache(), 16) for _ in decoder.layers)
    return rows.to(torch.device("cuda")), kv


def forward(decoder: Decoder, rows: Rows, kv: tuple[LayerKV, ...], view: str) -> Tensor:
    tokens = torch.full((1,), 7, device="cuda")  # made there, so that it can be captured
    with torch.inference_mode():
        return decoder.forward(tokens, rows, kv, VIEWS[view], None)


def kernel_by_kernel(decoder: Decoder) -> Decoder:
    """The same decoder, without the one kernel."""
    other: Any = replace(decoder)
    other._whole_step._persistent = None
    return other


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_it_equals_the_kernels_one_by_one(form: str, shape: tuple[int, int, int, int, int]) -> None:
    decoder: Any = decoder_of(form, shape)
    many = kernel_by_kernel(decoder)
    for view in MODEL_VIEWS:
        for context in CONTEXTS:
            rows, kv = row_at(context, decoder)
            persistent = decoder._whole_step._persistent
            if persistent.layout(rows, VIEWS[view], 16) is None:
                assert form == "signed16"  # too many bytes a tile for a ring
                assert view == "verify"
                continue
            ours = forward(decoder, rows, kv, view)
            written = [(one.keys.clone(), one.values.clone()) for one in kv]
            rows, kv = row_at(context, decoder)
            theirs = forward(many, rows, kv, view)
            assert torch.isfinite(theirs).all()
            assert_same_bits(ours, theirs)
            for (keys, values), one in zip(written, kv, strict=True):
                assert_same_bits(keys, one.keys)
                assert_same_bits(values, one.values)


def assert_same_as_many(decoder: Any, context: int, view: str) -> None:
    rows, kv = row_at(context, decoder)
    persistent = decoder._whole_step._persistent
    is_large = (view, persistent._spec.bits) == ("verify", 16)  # too many bytes a tile for a ring
    assert is_large or persistent.layout(rows, decoder.read_view(VIEWS[view]), 16) is not None
    ours = forward(decoder, rows, kv, view)
    assert_same_bits(ours, forward(kernel_by_kernel(decoder), rows, kv, view))


@gpu
@needs_gpu
@pytest.mark.parametrize("view", MODEL_VIEWS)
def test_biases(view: str) -> None:
    assert_same_as_many(decoder_of("affine4_offset", SHAPES[0], "qwen2"), 100, view)


@gpu
@needs_gpu
@pytest.mark.parametrize("view", MODEL_VIEWS)
def test_float32_norms_and_biases(view: str) -> None:
    decoder = decoder_of("affine4", SHAPES[0], "qwen2")
    layers = []
    for layer in decoder.layers:
        ((weight, bias),) = layer.qkv.parts
        assert bias is not None
        norms = layer.input_norm.float(), layer.post_attention_norm.float()
        qkv = Linear(((weight, bias.float()),))
        layers.append(replace(layer, qkv=qkv, input_norm=norms[0], post_attention_norm=norms[1]))
    assert_same_as_many(replace(decoder, layers=tuple(layers)), 100, view)


@gpu
@needs_gpu
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("form", ["affine4_offset", "signed8", "signed16"])
def test_longer_groups(form: str, group: int) -> None:
    decoder = decoder_of(form, (8, 2, 64, 512, 1024), group=group)
    assert_same_as_many(decoder, 200, "a8")
    assert_same_as_many(decoder, 200, "verify")


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(8, 2, 128, 512, 1024), (3, 1, 128, 4224, 640)])
@pytest.mark.parametrize("form", ["affine4", "signed8", "signed16"])
def test_groups_of_128_activations(form: str, shape: tuple[int, int, int, int, int]) -> None:
    decoder = decoder_of(form, shape, group=128, draft_group=128)
    for context in CONTEXTS:
        assert_same_as_many(decoder, context, "a8")


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(20, 20, 64, 1280, 256), (40, 40, 128, 1280, 256)])
def test_more_lanes_of_attention_than_blocks_and_than_teams(
    shape: tuple[int, int, int, int, int],
) -> None:
    assert_same_as_many(decoder_of("affine4", shape), 300, "a8")


@gpu
@needs_gpu
@pytest.mark.parametrize("heads", [(5, 1), (12, 2), (7, 1), (12, 1), (14, 1), (16, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_query_heads_that_share_a_key(heads: tuple[int, int], head_dim: int) -> None:
    shape = (*heads, head_dim, 256, 512)
    assert_same_as_many(decoder_of("affine4", shape), 300, "a8")
    assert_same_as_many(decoder_of("affine4", shape), 300, "verify")


@gpu
@needs_gpu
@pytest.mark.parametrize("num_layers", [1, 30])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]])
def test_one_layer_and_many(shape: tuple[int, int, int, int, int], num_layers: int) -> None:
    decoder = decoder_of("affine4", shape, num_layers=num_layers)
    rows, kv = row_at(300, decoder)
    expected = forward(kernel_by_kernel(decoder), rows, kv, "a8")
    for _ in range(100):
        assert_same_bits(forward(decoder, rows, kv, "a8"), expected)


@gpu
@needs_gpu
@pytest.mark.parametrize("start", [65526, -7])
def test_stamps_begin_again(start: int) -> None:
    decoder: Any = decoder_of("affine4", SHAPES[1])
    rows, kv = row_at(100, decoder)
    expected = forward(decoder, rows, kv, "a8")
    persistent = decoder._whole_step._persistent
    persistent._rooms[persistent._room_of(VIEWS["a8"])]["counts"][0] = start
    for _ in range(10):  # of two stamps each
        assert_same_bits(forward(decoder, rows, kv, "a8"), expected)


@gpu
@needs_gpu
def test_views_of_one_activation_take_turns() -> None:
    decoder = decoder_of("signed8", SHAPES[1])
    rows, kv = row_at(100, decoder)
    views = ("verify", "a16")
    expected = [forward(kernel_by_kernel(decoder), rows, kv, view) for view in views]
    out = [torch.empty_like(one) for one in expected]

    def both() -> None:
        for one, view in zip(out, views, strict=True):
            one.copy_(forward(decoder, rows, kv, view))

    replay = captured(both)
    for _ in range(20):
        replay()
        for one, other in zip(out, expected, strict=True):
            assert_same_bits(one, other)


@gpu
@needs_gpu
@pytest.mark.parametrize("context", [1500, 5000])
def test_more_keys_than_a_lane_keeps(context: int) -> None:
    assert_same_as_many(decoder_of("affine4", SHAPES[1]), context, "a8")


@gpu
@needs_gpu
def test_a_row_of_no_sequence_leaves_the_cache_alone() -> None:
    decoder = decoder_of("affine4", SHAPES[0])
    rows, kv = row_at(100, decoder)
    idle = replace(rows, contexts=torch.zeros_like(rows.contexts), slots=rows.slots * 0 - 1)
    before = [(one.keys.clone(), one.values.clone()) for one in kv]
    forward(decoder, idle, kv, "a8")
    for (keys, values), one in zip(before, kv, strict=True):
        assert_same_bits(one.keys, keys)
        assert_same_bits(one.values, values)
    assert_same_as_many(decoder, 100, "a8")


@gpu
@needs_gpu
def test_replays_of_a_graph_agree() -> None:
    decoder = decoder_of("signed16", SHAPES[1])
    rows, kv = row_at(300, decoder)
    out = torch.empty(1, decoder.config.vocab_size, device="cuda")
    replay = captured(lambda: out.copy_(forward(decoder, rows, kv, "a8")))
    expected = forward(kernel_by_kernel(decoder), rows, kv, "a8")
    for _ in range(20):
        out.fill_(torch.nan)
        replay()
        assert_same_bits(out, expected)


@gpu
@needs_gpu
def test_a_kernel_that_differs_is_refused_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: Persistent, x: Tensor, *__: object) -> None:
        x += 1

    monkeypatch.setattr(Persistent, "__call__", wrong)
    decoder = decoder_of("affine4", SHAPES[0])
    rows, kv = row_at(40, decoder)
    with refused("self-check failed", "in one kernel"):
        forward(decoder, rows, kv, "verify")


@pytest.mark.skipif("cuda" not in available_backends(), reason="needs a GPU or its interpreter")
def test_the_self_check_compares_what_both_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    # the kernels one by one stand for the one kernel, so that an interpreter can run this
    decoder: Any = tiny_decoder(Target.INT4, backend="cuda", head_dim=64)
    decoder = replace(decoder, dtype=torch.float32)
    step = decoder._whole_step
    wrong = {"row": 0, "value": 0}

    class Both:
        """Stands for `Persistent`."""

        def layout(self, *_: object) -> str:
            return "a layout"

        def __call__(self, x: Tensor, rows: Rows, kv: Any, view: Any, _: object) -> None:
            total, delta = step._one_by_one(x.clone(), rows, kv, view)
            x.copy_((total.float() + delta.float()).to(x.dtype) + wrong["row"])
            kv[0].values[rows.slots] += wrong["value"]

    monkeypatch.setattr(step, "_persistent", Both())
    step._check(VIEWS["verify"], "a layout", 16)
    assert step._checked == {(VIEWS["verify"], "a layout")}
    for part in wrong:
        wrong.update(row=0, value=0)
        wrong[part] = 1
        with refused("self-check failed", "in one kernel"):
            step._check(VIEWS["verify"], "a layout", 16)


@gpu
@needs_gpu
def test_models_that_it_does_not_know_run_without_it() -> None:
    for changes in ({"family": "qwen3", "head_dim": 64}, {"head_dim": 16}):
        decoder: Any = tiny_decoder(Target.INT4, backend="cuda", **changes)
        assert decoder._whole_step._persistent is None


@pytest.mark.parametrize("name", FORMS_READ)
def test_shared_memory_has_room(name: str) -> None:
    assert layout_of(LLAMA_8B, FORMS_READ[name], 132, 4096) is not None
    for inner in range(1024, 40960, 64):
        for head_dim, kv_heads in ((64, 8), (128, 8), (128, 40)):
            sizes = replace(LLAMA_8B, inner=inner, head_dim=head_dim, kv_heads=kv_heads)
            laid = layout_of(sizes, FORMS_READ[name], 132, 2048)
            if laid is not None:
                assert laid.smem + STATIC <= SMEM
                assert laid.slots * laid.slot_tiles >= LEAST_TILES


def test_exact_bf16_tiles_have_no_room() -> None:
    assert layout_of(LLAMA_8B, Form(bits=16, base_bytes=1056, rest_bytes=3072), 132, 64) is None


def frame_sizes(cubin: bytes) -> list[int]:
    """Bytes of local memory that a thread of each function takes: EIATTR_FRAME_SIZE in .nv.info."""
    start, size, count, names = (
        *struct.unpack_from("<Q", cubin, 0x28),
        *struct.unpack_from("<HHH", cubin, 0x3A),
    )
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    texts = sections[names][4]
    for name, *_, offset, length in sections:
        if cubin[texts + name :].startswith(b".nv.info\0"):
            info = cubin[offset : offset + length]
            found = re.findall(rb"\x04\x11\x08\x00.{4}(.{4})", info, re.DOTALL)
            return [int.from_bytes(one, "little") for one in found]
    raise AssertionError("no .nv.info")


@pytest.mark.parametrize("num_keys", [1024, 2048])
def test_it_compiles(num_keys: int, compiled: Compile) -> None:
    sizes = {"HEAD": 128, "NUM_HEADS": 32, "NUM_KV": 8, "BLOCK_SIZE": 16, "HIDDEN": 4096,
             "INNER": 14336, "NUM_LAYERS": 32, "NORM_FLOAT": 0}  # fmt: skip
    for name, form in FORMS_READ.items():
        laid = layout_of(LLAMA_8B, form, 132, num_keys)
        assert laid is not None
        sizes["NORM_FLOAT"] = int(name == "int4")
        top = 0 if form.act == 16 else 7 if name == "draft a4" else 127
        macros = {**form.defines(), **sizes, **laid.defines(), "TOP": top}
        cubin = compiled("persistent.cu", "sm_90a", macros)
        # registers that do not fit go to memory, past a cache without room: a step a fifth slower
        assert max(frame_sizes(cubin)) == 0, name


@pytest.mark.parametrize("ratio", [1, 5, 16])
def test_both_sides_lay_shared_memory_out_alike(ratio: int, compiled: Compile) -> None:
    # the kernel asserts it: heads of both sizes, one team with lanes and two, more stages and fewer
    for head_dim, kv_heads, inner in ((64, 8, 1536), (128, 8, 27648), (64, 20, 2112)):
        shape = Sizes(2048, inner, kv_heads * ratio, kv_heads, head_dim)
        laid = layout_of(shape, FORMS_READ["draft a8"], 132, kv_heads * 128)
        assert laid is not None
        macros = {
            "HEAD": head_dim, "NUM_HEADS": shape.heads, "NUM_KV": kv_heads, "BLOCK_SIZE": 16,
            "HIDDEN": 2048, "INNER": inner, "NUM_LAYERS": 2, "NORM_FLOAT": 0, "TOP": 127,
        }  # fmt: skip
        macros |= FORMS_READ["draft a8"].defines() | laid.defines()
        assert compiled("persistent.cu", "sm_90a", macros)
        with refused("persistent.py lays shared memory out in another way"):
            compiled("persistent.cu", "sm_90a", macros | {"SMEM": laid.smem + 16})
