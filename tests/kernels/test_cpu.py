"""The CPU backend against the reference, on every instruction set that this machine can run."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_cpu import (
    DENSE_TYPES,
    FORMS,
    VIEWS,
    assert_close,
    assert_same_bits,
    gaussian,
    ragged_rows,
    random_cache,
    random_stored,
    refused,
    run_passes,
    some_rows,
)
from torch import Tensor

from qspec_llm.kernels import get_backend, reference
from qspec_llm.kv.pool import allocate
from qspec_llm.model.config import ModelConfig
from qspec_llm.model.decoder import Decoder, rope_table
from qspec_llm.model.layers import Layer, Linear
from qspec_llm.weights.planes import Dense, Planes, PlaneSpec, Stored
from qspec_llm.weights.quantize import nest_signed16
from qspec_llm.weights.view import VERIFY, Activation, draft_view

cpu: Any = pytest.importorskip("qspec_llm.kernels.cpu", exc_type=Exception)

TYPES = (torch.float32, torch.bfloat16)
# In bf16 the kernels keep 15 bits below the largest value of 32 or 64 columns: with outliers of 20
# times the rest, a hundredth of what rounding x to bf16 lost.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-5}


@pytest.fixture(params=cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set, then goes back to the best."""
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(cpu.available_isas()[0])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost milliseconds a call."""
    before = cpu.num_threads()
    cpu.set_num_threads(1)
    yield
    cpu.set_num_threads(before)


def assert_round_trip(stored: Stored) -> None:
    back = cpu.unpack(cpu.pack(stored))
    if isinstance(stored, Dense):
        assert back.reason == stored.reason
        assert_same_bits(back.weight, stored.weight)
        return
    assert back.spec == stored.spec
    for name, plane in stored.tensors().items():
        assert_same_bits(back.tensors()[name], plane)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_rows", "num_cols", "group"), [(16, 128, 128), (37, 576, 64)])
def test_packing_is_undone_exactly(form: str, num_rows: int, num_cols: int, group: int) -> None:
    assert_round_trip(random_stored(form, num_rows, num_cols, group))


@pytest.mark.parametrize("form", DENSE_TYPES)
def test_packing_a_dense_matrix_is_undone_exactly(form: str) -> None:
    assert_round_trip(random_stored(form, 21, 45))


@pytest.mark.parametrize("form", FORMS)
def test_packing_stores_nothing_twice(form: str) -> None:
    stored = random_stored(form, 64, 256, 64)
    assert isinstance(stored, Planes)
    assert sum(tensor.nbytes for tensor in cpu.buffers(cpu.pack(stored))) == stored.nbytes


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", [*FORMS, *DENSE_TYPES])
def test_embedding_equals_the_reference(form: str, dtype: torch.dtype, isa: str) -> None:
    stored = random_stored(form, 37, 96)
    tokens = torch.tensor([36, 0, 17, 17])
    assert_same_bits(
        cpu.embed(tokens, cpu.pack(stored), dtype), reference.embed(tokens, stored, dtype)
    )


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", [*FORMS, *DENSE_TYPES])
@pytest.mark.parametrize(
    ("num_rows", "num_cols", "group"), [(16, 32, 32), (50, 576, 64), (33, 640, 128), (5, 96, 32)]
)
def test_linear(form: str, view: str, num_rows: int, num_cols: int, group: int, isa: str) -> None:
    stored = random_stored(form, num_rows, num_cols, group)
    packed, bias = cpu.pack(stored), gaussian(num_rows, seed=3)
    for dtype in TYPES:
        x = gaussian(17, num_cols, dtype=dtype)
        arguments = (bias, VIEWS[view], some_rows())
        expected = reference.linear(x, stored, *arguments, torch.float32)
        actual = cpu.linear(x, packed, *arguments, torch.float32)
        assert_close(actual, expected, TOLERANCE[dtype])
        for count in range(1, 17):  # alone or with others, first or last: the same bits
            part = x[17 - count :].contiguous()
            alone = cpu.linear(part, packed, *arguments, torch.float32)
            assert_same_bits(alone, actual[17 - count :])


@pytest.mark.parametrize("outliers", [32, 96, 544])
def test_linear_with_outlier_columns(outliers: int, isa: str) -> None:
    stored, bias = random_stored("affine4", 50, 576), gaussian(50, seed=3)
    packed = cpu.pack(stored)
    view = replace(VIEWS["a4"], outliers=outliers)
    for dtype in TYPES:
        x = gaussian(17, 576, dtype=dtype)
        expected = reference.linear(x, stored, bias, view, some_rows(), torch.float32)
        for count in (1, 2, 3):  # threads, whose shares begin at columns of their own
            cpu.set_num_threads(count)
            actual = cpu.linear(x, packed, bias, view, some_rows(), torch.float32)
            assert_close(actual, expected, TOLERANCE[dtype])
            alone = cpu.linear(x[4:5].contiguous(), packed, bias, view, some_rows(), torch.float32)
            assert_same_bits(alone, actual[4:5])
        plain = cpu.linear(x, packed, bias, VIEWS["a4"], some_rows(), torch.float32)
        assert (plain - expected).norm() > 0.01 * expected.norm()
        for name in ("a8", "a16", "verify"):  # nobody else looks at it
            other = replace(VIEWS[name], outliers=outliers)
            pair = [cpu.linear(x, packed, bias, v, some_rows()) for v in (VIEWS[name], other)]
            assert_same_bits(*pair)


def test_linear_rounds_once_to_its_output_type(isa: str) -> None:
    packed = cpu.pack(random_stored("signed16", 50, 96))
    x = gaussian(3, 96, dtype=torch.bfloat16)
    wide = cpu.linear(x, packed, None, VERIFY, some_rows(), torch.float32)
    assert_same_bits(cpu.linear(x, packed, None, VERIFY, some_rows()), wide.bfloat16())


def test_exact_weights_are_the_checkpoints_own(isa: str) -> None:
    weight = (gaussian(40, 192) * 0.05).bfloat16()
    weight[:, ::7] = 0
    weight[3, ::2] = -0.0
    weight[5, 64:128] = 0
    weight[7, 1] = 2.0**-30
    packed = cpu.pack(nest_signed16(weight, 64))
    columns = cpu.linear(torch.eye(192), packed, None, VERIFY, some_rows())
    assert torch.equal(columns.T, weight.float())
    assert_same_bits(cpu.embed(torch.arange(40), packed, torch.bfloat16), weight)


def test_exact_weights_of_any_magnitude(isa: str) -> None:
    for exponent in (-100, -60, 0, 60, 90):
        weight = (gaussian(16, 64) * 2.0**exponent).bfloat16()
        packed = cpu.pack(nest_signed16(weight, 32))
        columns = cpu.linear(torch.eye(64), packed, None, VERIFY, some_rows())
        assert torch.equal(columns.T, weight.float())


@pytest.mark.parametrize("form", ["signed16", "signed8", "affine4_offset", "bfloat16"])
def test_threads_change_no_bit(form: str, isa: str) -> None:
    packed, x = cpu.pack(random_stored(form, 200, 576)), gaussian(9, 576, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        cpu.set_num_threads(count)
        assert cpu.num_threads() == count
        results.append(cpu.linear(x, packed, None, VERIFY, some_rows()))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_many_rows(isa: str) -> None:
    stored = random_stored("signed16", 48, 96)
    x = gaussian(70, 96)
    actual = cpu.linear(x, cpu.pack(stored), None, VERIFY, some_rows(is_prompt=True))
    assert_close(actual, reference.linear(x, stored, None, VERIFY, some_rows(True)), 2e-6)


@pytest.mark.parametrize("view", ["verify", "a8"])
def test_nan_reaches_the_result(view: str, isa: str) -> None:
    packed, x = cpu.pack(random_stored("affine4", 16, 128)), gaussian(2, 128)
    x[1, 70] = torch.nan
    out = cpu.linear(x, packed, None, VIEWS[view], some_rows())
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_rows_of_zeros(isa: str) -> None:
    packed = cpu.pack(random_stored("signed8", 16, 128))
    for view in VIEWS.values():
        assert (cpu.linear(torch.zeros(2, 128), packed, None, view, some_rows()) == 0).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 576), (5, 100), (3, 4, 64), (17, 2, 128)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    x, weight = gaussian(*shape, dtype=dtype), gaussian(shape[-1], dtype=torch.bfloat16, seed=5)
    actual, expected = cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    assert_close(actual, expected, 1e-6 if dtype is torch.float32 else 4e-4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 128, 40])
def test_rope_of_heads_cut_out_of_wider_rows(head_dim: int, dtype: torch.dtype, isa: str) -> None:
    rows = gaussian(7, 5 * head_dim, dtype=dtype)
    x = rows[:, head_dim : 4 * head_dim].view(7, 3, head_dim)
    cos, sin = (gaussian(7, head_dim // 2, seed=seed) for seed in (8, 9))
    expected = reference.rope(x, cos, sin)
    assert_close(cpu.rope(x, cos, sin), expected, 1e-6 if dtype is torch.float32 else 4e-4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("size", "order"), [(576, 64), (1536, 64), (1536, 512), (45, 1), (24, 8)])
def test_hadamard_is_the_references_bit_for_bit(
    size: int, order: int, dtype: torch.dtype, isa: str
) -> None:
    x = gaussian(5, size, dtype=dtype)
    assert_same_bits(cpu.hadamard(x, order), reference.hadamard(x, order))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [16, 100, 1536])
def test_silu_mul(size: int, dtype: torch.dtype, isa: str) -> None:
    gate_up = gaussian(3, 2 * size, dtype=dtype) * 4
    expected = reference.silu_mul(gate_up)
    assert_close(cpu.silu_mul(gate_up), expected, 1e-6 if dtype is torch.float32 else 4e-4)


@pytest.mark.parametrize("dtype", TYPES)
def test_write_kv_overwrites_the_slots_and_nothing_else(dtype: torch.dtype, isa: str) -> None:
    rows, num_blocks = ragged_rows([3, 1], [40, 9])
    ours, theirs = (random_cache(num_blocks, 2, 64, dtype) for _ in range(2))
    keys, values = gaussian(4, 2, 64, dtype=dtype, seed=2), gaussian(4, 2, 64, dtype=dtype, seed=3)
    cpu.write_kv(keys, values, ours, VERIFY, rows)
    reference.write_kv(keys, values, theirs, VERIFY, rows)
    assert_same_bits(ours.keys, theirs.keys)
    assert_same_bits(ours.values, theirs.values)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("group", "num_kv_heads"), [(1, 3), (3, 3), (4, 2), (7, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 80])
def test_attention(
    group: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, isa: str
) -> None:
    rows, num_blocks = ragged_rows([5, 1, 3], [300, 1, 129])
    kv = random_cache(num_blocks, num_kv_heads, head_dim, dtype)
    query = gaussian(9, group * num_kv_heads, head_dim, dtype=dtype, seed=4)
    actual = cpu.attention(query, kv, VERIFY, rows)
    expected = reference.attention(query, kv, VERIFY, rows)
    assert_close(actual, expected, 2e-6 if dtype is torch.float32 else 3e-3)


def test_attention_of_a_row_does_not_depend_on_the_others(isa: str) -> None:
    rows, num_blocks = ragged_rows([40, 2], [300, 150], is_prompt=True)
    kv = random_cache(num_blocks, 2, 64, torch.bfloat16)
    query = gaussian(42, 6, 64, dtype=torch.bfloat16, seed=4)
    together = cpu.attention(query, kv, VERIFY, rows)
    cpu.set_num_threads(3)
    assert_same_bits(cpu.attention(query, kv, VERIFY, rows), together)
    for row in (0, 7, 39, 41):
        position, span = int(rows.positions[row]), int(row >= 40)
        alone = replace(
            rows,
            positions=rows.positions[row : row + 1],
            slots=rows.slots[row : row + 1],
            cu_rows=torch.tensor([0, 1]),
            contexts=torch.tensor([position + 1]),
            block_tables=rows.block_tables[span : span + 1],
        )
        result = cpu.attention(query[row : row + 1], kv, VERIFY, alone)
        assert_same_bits(result, together[row : row + 1])


def test_masked_keys_may_hold_anything(isa: str) -> None:
    rows, num_blocks = ragged_rows([1], [20])
    kv = random_cache(num_blocks, 1, 64, torch.bfloat16)
    query = gaussian(1, 1, 64, dtype=torch.bfloat16)
    before = cpu.attention(query, kv, VERIFY, rows)
    beyond = slice(int(rows.slots[0]) + 1, int(rows.slots[0]) // 16 * 16 + 16)
    kv.keys[beyond], kv.values[beyond] = torch.nan, torch.nan
    assert_same_bits(cpu.attention(query, kv, VERIFY, rows), before)


CONFIG = ModelConfig(
    family="qwen3", vocab_size=50, hidden_size=96, intermediate_size=160, num_layers=2,
    num_heads=6, num_kv_heads=2, head_dim=16, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
    tied_head=False, context_length=512,
)  # fmt: skip


def tiny_decoder(
    ops: Any, dtype: torch.dtype, form: str, *, is_fused: bool, **changes: Any
) -> Decoder:
    """Two layers of random weights; q, k, v and gate, up in one part each or in several."""
    config, seed = replace(CONFIG, **changes), iter(range(1000))

    def vector(size: int) -> Tensor:
        return gaussian(size, dtype=torch.bfloat16, seed=next(seed)) * 0.1 + 1

    def linear(*sizes: int, num_cols: int) -> Linear:
        sizes = (sum(sizes),) if is_fused else sizes
        parts = []
        for size in sizes:
            stored = random_stored(form, size, num_cols)
            if isinstance(stored, Planes):  # each tensor its own weights
                stored = replace(stored, q4=stored.q4 ^ next(seed) % 256)
            parts.append((ops.pack(stored), gaussian(size, seed=next(seed))))
        return Linear(tuple(parts))

    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.query_size, config.kv_size
    layers = tuple(
        Layer(
            input_norm=vector(hidden),
            qkv=linear(query, kv, kv, num_cols=hidden),
            output=linear(hidden, num_cols=query),
            post_attention_norm=vector(hidden),
            gate_up=linear(inner, inner, num_cols=hidden),
            down=linear(hidden, num_cols=inner),
            q_norm=vector(16),
            k_norm=vector(16),
        )
        for _ in range(2)
    )
    embedding = ops.pack(random_stored("signed8", 50, hidden))
    cos, sin = rope_table(config, 512)
    head = linear(50, num_cols=hidden)
    return Decoder(
        config, ops, dtype, embedding, layers, vector(hidden), head, cos, sin, stored_bytes=0
    )


def without_whole_step() -> SimpleNamespace:
    ops = SimpleNamespace(**{name: getattr(cpu, name) for name in cpu.__all__})
    ops.whole_step = reference.whole_step
    return ops


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("form", "view", "sizes"),
    [
        ("signed16", "verify", {}),
        ("affine4", "a8", {}),
        ("signed16", "a8 g128", {"hidden_size": 384, "intermediate_size": 448}),
    ],
)
def test_whole_step_equals_the_operations_one_by_one(
    form: str,
    view: str,
    sizes: dict[str, int],
    dtype: torch.dtype,
    is_fused: bool,
    isa: str,
) -> None:
    made = {"is_fused": is_fused, **sizes}
    slow, slow_kv = run_passes(tiny_decoder(without_whole_step(), dtype, form, **made), view, 300)
    for count in (1, 2, 3):
        cpu.set_num_threads(count)
        fast, fast_kv = run_passes(tiny_decoder(cpu, dtype, form, **made), view, 300)
        for ours, theirs in zip(fast, slow, strict=True):
            assert_same_bits(ours, theirs)
        for ours, theirs in zip(fast_kv, slow_kv, strict=True):
            assert_same_bits(ours.keys, theirs.keys)
            assert_same_bits(ours.values, theirs.values)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("view", "change"),
    [("verify", {"hadamard": 64}), ("a4", {"hadamard": 64}), ("a4", {"outliers": 64})],
    ids=str,
)
def test_whole_step_of_a_changed_model_equals_the_operations_one_by_one(
    view: str, change: dict[str, int], dtype: torch.dtype, isa: str
) -> None:
    # 96 and 160 columns: Hadamard orders 32 and 32 of 64
    made = {"is_fused": True, "head_draft": Activation.A8, **change}
    slow, slow_kv = run_passes(
        tiny_decoder(without_whole_step(), dtype, "affine4", **made), view, 300
    )
    for count in (1, 2, 3):
        cpu.set_num_threads(count)
        fast, fast_kv = run_passes(tiny_decoder(cpu, dtype, "affine4", **made), view, 300)
        for ours, theirs in zip(fast, slow, strict=True):
            assert_same_bits(ours, theirs)
        for ours, theirs in zip(fast_kv, slow_kv, strict=True):
            assert_same_bits(ours.keys, theirs.keys)
            assert_same_bits(ours.values, theirs.values)
    made = {"is_fused": True, "head_draft": Activation.A8}
    unchanged, _ = run_passes(tiny_decoder(cpu, dtype, "affine4", **made), view, 300)
    assert not torch.equal(unchanged[0], fast[0])


@pytest.mark.parametrize("form", ["signed16", "signed8", "affine4_offset"])
def test_whole_step_in_float32_is_the_references(form: str, isa: str) -> None:
    ours, _ = run_passes(tiny_decoder(cpu, torch.float32, form, is_fused=True), "verify", 300)
    theirs, _ = run_passes(
        tiny_decoder(reference, torch.float32, form, is_fused=True), "verify", 300
    )
    for actual, expected in zip(ours, theirs, strict=True):
        assert_close(actual, expected, 1e-5)


def test_no_logits_wanted() -> None:
    decoder = tiny_decoder(cpu, torch.bfloat16, "affine4", is_fused=True)
    rows, _ = ragged_rows([2], [2])
    none = torch.empty(0, dtype=torch.int64)
    out = decoder.forward(torch.zeros(2).long(), rows, allocate(CONFIG, 4, torch.bfloat16),
                          VERIFY, none)  # fmt: skip
    assert out.shape == (0, 50)


def test_a_forward_pass_outside_of_its_bounds_is_refused() -> None:
    decoder = tiny_decoder(cpu, torch.bfloat16, "affine4", is_fused=True)
    kv = allocate(CONFIG, 4, torch.bfloat16)
    rows, _ = ragged_rows([2], [2])
    wanted = torch.tensor([0])

    def forward(tokens: Tensor, changed: Any = rows, logit_rows: Tensor = wanted) -> None:
        decoder.forward(tokens, changed, kv, VERIFY, logit_rows)

    zeros = torch.zeros(2, dtype=torch.int64)
    with refused("token 50", "50"):
        forward(zeros + 50)
    with refused("int64"):
        forward(zeros.int())
    with refused("row 2"):
        forward(zeros, logit_rows=torch.tensor([2]))
    with refused("slot -1"):
        forward(zeros, replace(rows, slots=rows.slots * 0 - 1))
    with refused("block 99"):
        forward(zeros, replace(rows, block_tables=rows.block_tables * 0 + 99))
    with refused("position 16"):
        forward(zeros, replace(rows, positions=rows.positions + 15))
    with refused("cu_rows"):
        forward(zeros, replace(rows, cu_rows=torch.tensor([0, 3])))


def test_bad_input_is_refused_in_a_sentence() -> None:
    packed, x = cpu.pack(random_stored("affine4", 16, 64)), gaussian(4, 64)
    linear = cpu.linear
    with refused("(4, 63)", "64 columns"):
        linear(x[:, :63].contiguous(), packed, None, VERIFY, some_rows())
    with refused("strides", "contiguous"):
        linear(gaussian(64, 4).T, packed, None, VERIFY, some_rows())
    with refused("torch.float64"):
        linear(x.double(), packed, None, VERIFY, some_rows())
    with refused("bias", "(15,)"):
        linear(x, packed, gaussian(15), VERIFY, some_rows())
    with refused("token 16"):
        cpu.embed(torch.tensor([16]), packed, torch.float32)
    with refused("int64"):
        cpu.embed(torch.tensor([1.0]), packed, torch.float32)
    with refused("torch.int32"):
        cpu.pack(Dense(torch.zeros(4, 4, dtype=torch.int32), "a test"))
    with refused("norm"):
        cpu.rms_norm(x, torch.ones(63), 1e-5)
    with refused("strides"):
        cpu.rms_norm(gaussian(64, 4).T, torch.ones(64), 1e-5)
    with refused("cos"):
        cpu.rope(gaussian(2, 3, 16), gaussian(2, 16), gaussian(2, 8))
    with refused("even"):
        cpu.silu_mul(gaussian(2, 33))
    rows, num_blocks = ragged_rows([1], [4])
    kv = random_cache(num_blocks, 2, 24, torch.float32)
    with refused("multiple of 16"):
        cpu.attention(gaussian(1, 2, 24), kv, VERIFY, rows)
    with refused("queries"):
        cpu.attention(gaussian(1, 3, 24), kv, VERIFY, rows)
    with refused("keys are"):
        cpu.write_kv(gaussian(1, 2, 16), gaussian(1, 2, 16), kv, VERIFY, rows)


def test_a_scale_beyond_what_is_decoded_exactly_is_refused() -> None:
    stored = random_stored("signed16", 16, 64)
    assert isinstance(stored, Planes)
    huge = replace(stored, scale=torch.full_like(stored.scale, 2.0**110))
    with refused("2^100"):
        cpu.pack(huge)


def test_an_isa_the_machine_lacks_is_refused() -> None:
    with refused("'neon'", "generic"):
        cpu.set_isa("neon")
    assert cpu.isa() == cpu.available_isas()[0]


def test_the_number_of_threads_must_be_positive() -> None:
    with refused("0", "at least 1"):
        cpu.set_num_threads(0)
    assert cpu.physical_cores() >= 1


def test_the_backend_is_found_by_name() -> None:
    assert get_backend("cpu") is cpu
    assert cpu.name == "cpu"
    assert all(hasattr(cpu, name) for name in cpu.__all__)


def test_threads_after_a_fork() -> None:
    """A child process has none of its parent's threads."""
    import multiprocessing

    cpu.set_num_threads(2)
    stored = random_stored("affine4", 64, 64)
    expected = cpu.linear(gaussian(1, 64), cpu.pack(stored), None, VERIFY, some_rows())
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert_same_bits(pool.apply(_linear_of, (stored,)), expected)


def _linear_of(stored: Stored) -> Tensor:
    return cpu.linear(gaussian(1, 64), cpu.pack(stored), None, VERIFY, some_rows())


def test_specs_differ_only_in_what_they_say() -> None:
    draft = draft_view(Activation.A8)
    stored = random_stored("signed8_draft8", 16, 64)
    assert isinstance(stored, Planes)
    spec = PlaneSpec(**{**stored.spec.__dict__, "draft_bits": 4})
    x = gaussian(1, 64)
    eight = cpu.linear(x, cpu.pack(stored), None, draft, some_rows())
    four = cpu.linear(x, cpu.pack(replace(stored, spec=spec)), None, draft, some_rows())
    assert not torch.equal(eight, four)
