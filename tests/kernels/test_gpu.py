"""The GPU's small kernels against the reference, on a GPU.

With TRITON_INTERPRET=1 the Triton kernels among them run in Triton's interpreter, on the host.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_cpu import (
    assert_close,
    assert_quantizes,
    assert_same_bits,
    gaussian,
    ragged_rows,
    random_cache,
)

from qspec_llm.engine.random import Stream
from qspec_llm.engine.random import uniform as expected_uniform
from qspec_llm.kernels import LayerKV, Rows, available_backends, get_backend, reference
from qspec_llm.weights.view import VERIFY, Activation, draft_view

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in available_backends(), reason="no GPU that can run it"),
]

TYPES = (torch.float32, torch.bfloat16)
SMALL = {torch.float32: 2e-6, torch.bfloat16: 4e-4}  # a bf16 result differs by single roundings
ATTENTION = {torch.float32: 2e-6, torch.bfloat16: 3e-3}
QUANTIZED = (draft_view(Activation.A8), draft_view(Activation.A8, 128), draft_view(Activation.A4))


@pytest.fixture(scope="module")
def ops() -> Any:
    return get_backend("cuda")


@pytest.fixture(scope="module")
def there(ops: Any) -> Callable[[Any], Any]:
    """Moves tensors, rows and caches to the GPU."""

    def move(x: Any) -> Any:
        if isinstance(x, Rows):
            return x.to(ops.device)
        if isinstance(x, LayerKV):
            return LayerKV(x.keys.to(ops.device), x.values.to(ops.device), x.block_size)
        return x.to(ops.device)

    return move


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 576), (5, 100), (3, 4, 64), (17, 2, 128), (2, 4096)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, ops: Any, there: Any) -> None:
    x, weight = gaussian(*shape, dtype=dtype), gaussian(shape[-1], dtype=torch.bfloat16, seed=5)
    actual = ops.rms_norm(there(x), there(weight), 1e-5).cpu()
    assert_close(actual, reference.rms_norm(x, weight, 1e-5), SMALL[dtype])
    alone = ops.rms_norm(there(x[-1:]), there(weight), 1e-5).cpu()
    assert_same_bits(alone, actual[-1:])


def test_rms_norm_of_heads_cut_out_of_wider_rows(ops: Any, there: Any) -> None:
    x, weight = gaussian(4, 6 * 64, dtype=torch.bfloat16), gaussian(64, seed=5)
    heads = there(x)[:, 64 : 5 * 64].view(4, 4, 64)
    expected = ops.rms_norm(heads.contiguous(), there(weight), 1e-5)
    assert_same_bits(ops.rms_norm(heads, there(weight), 1e-5), expected)


# float32 rows go through Triton, which sums a row of 5120 in another order where it quantises it
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(width, dtype) for width in (96, 576, 4096) for dtype in TYPES] + [(5120, torch.bfloat16)],
)
def test_add_norm_and_quantize_equal_the_operations_one_by_one(
    width: int, dtype: torch.dtype, ops: Any, there: Any
) -> None:
    from qspec_llm.kernels.cuda.rows import add_rms_norm
    from qspec_llm.kernels.triton.quantize import quantize

    x, delta = (there(gaussian(5, width, dtype=dtype, seed=s)) for s in (0, 3))
    weight = there(gaussian(width, dtype=torch.bfloat16, seed=5))
    total, normed = add_rms_norm(x, delta, weight, 1e-5, None)
    assert_same_bits(total, x + delta)
    assert_same_bits(normed, ops.rms_norm(total, weight, 1e-5))
    for view in QUANTIZED:
        fused = add_rms_norm(x, delta, weight, 1e-5, view)[1]
        assert_quantizes(fused, normed, view)
        assert_quantizes(quantize(normed, view), normed, view)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [16, 100, 1536])
def test_silu_mul(size: int, dtype: torch.dtype, ops: Any, there: Any) -> None:
    from qspec_llm.kernels.cuda.rows import silu_mul

    gate_up = gaussian(3, 2 * size, dtype=dtype) * 4
    gate_up[0, 0], gate_up[0, 1], gate_up[0, 2] = 200.0, -200.0, 0.0
    actual = ops.silu_mul(there(gate_up))
    assert_close(actual.cpu(), reference.silu_mul(gate_up), SMALL[dtype])
    if size % 32 == 0:
        for view in QUANTIZED:
            assert_quantizes(silu_mul(there(gate_up), view), actual, view)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 128, 40])
def test_rope_equals_the_reference(head_dim: int, dtype: torch.dtype, ops: Any, there: Any) -> None:
    rows = gaussian(7, 5 * head_dim, dtype=dtype)
    x = rows[:, head_dim : 4 * head_dim].view(7, 3, head_dim)
    cos, sin = (gaussian(7, head_dim // 2, seed=seed) for seed in (8, 9))
    cut = there(rows)[:, head_dim : 4 * head_dim].view(7, 3, head_dim)
    assert_same_bits(ops.rope(cut, there(cos), there(sin)).cpu(), reference.rope(x, cos, sin))


def test_rotate_and_write_equals_the_operations_one_by_one(ops: Any, there: Any) -> None:
    from qspec_llm.kernels.triton.rope import rotate_and_write

    rows, num_blocks = ragged_rows([3, 2], [40, 9])
    qkv = there(gaussian(5, 8 * 64, dtype=torch.bfloat16)).view(5, 8, 64)
    query, keys, values = qkv.split([4, 2, 2], dim=1)
    cos, sin = (there(gaussian(50, 32, seed=seed)) for seed in (8, 9))
    ours, theirs = (there(random_cache(num_blocks, 2, 64, torch.bfloat16)) for _ in range(2))
    moved = there(rows)
    slots = moved.slots.clone()
    slots[1] = -1  # a row whose K and V are not kept
    rotated = rotate_and_write(query, keys, values, ours, cos, sin, moved.positions, slots)
    angles = cos[moved.positions], sin[moved.positions]
    assert_same_bits(rotated, ops.rope(query, *angles))
    kept = torch.tensor([0, 2, 3, 4])
    theirs.keys[moved.slots[kept]] = ops.rope(keys, *angles)[kept]
    theirs.values[moved.slots[kept]] = values[kept]
    assert_same_bits(ours.keys, theirs.keys)
    assert_same_bits(ours.values, theirs.values)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("group", "num_kv_heads"), [(1, 3), (3, 3), (4, 2), (7, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 80, 16])
def test_attention(
    group: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, ops: Any, there: Any
) -> None:
    from qspec_llm.kernels.cuda.attention import attend

    heads = group * num_kv_heads
    for counts, contexts, is_prompt in (
        ([17, 1, 3], [300, 1, 129], False),
        ([100, 40], [300, 40], True),
    ):
        rows, num_blocks = ragged_rows(counts, contexts, is_prompt=is_prompt)
        kv = random_cache(num_blocks, num_kv_heads, head_dim, dtype)
        query = gaussian(sum(counts), heads, head_dim, dtype=dtype, seed=4)
        expected = reference.attention(query, kv, VERIFY, rows)
        moved, cache = there(query), there(kv)
        actual = ops.attention(moved, cache, VERIFY, there(rows))
        assert_close(actual.cpu(), expected, ATTENTION[dtype])
        if not is_prompt and head_dim in (64, 128):
            for view in QUANTIZED:
                fused = attend(moved, cache, there(rows), view)
                if head_dim % view.columns_a_scale(heads * head_dim):  # a group lies in two heads
                    assert_same_bits(fused, actual)
                    continue
                assert_quantizes(fused, actual.flatten(1), view)
        for row in (0, 7, sum(counts) - 1):  # alone, its context ends at the row
            at, seq = int(rows.positions[row]), int((rows.cu_rows[1:] <= row).sum())
            alone = Rows(
                rows.positions[row : row + 1], rows.slots[row : row + 1], torch.tensor([0, 1]),
                torch.tensor([at + 1]), rows.block_tables[seq : seq + 1], is_prompt,
            )  # fmt: skip
            result = ops.attention(moved[row : row + 1], cache, VERIFY, there(alone))
            assert_same_bits(result, actual[row : row + 1])


@pytest.mark.parametrize("is_prompt", [False, True])
def test_masked_keys_may_hold_anything(is_prompt: bool, ops: Any, there: Any) -> None:
    rows, num_blocks = ragged_rows([1], [20], is_prompt=is_prompt)
    kv = there(random_cache(num_blocks, 1, 64, torch.bfloat16))
    query = there(gaussian(1, 1, 64, dtype=torch.bfloat16))
    before = ops.attention(query, kv, VERIFY, there(rows))
    beyond = slice(int(rows.slots[0]) + 1, int(rows.slots[0]) // 16 * 16 + 16)
    kv.keys[beyond], kv.values[beyond] = torch.nan, torch.nan
    assert_same_bits(ops.attention(query, kv, VERIFY, there(rows)), before)


def test_the_most_likely_token_and_the_first_of_several(ops: Any) -> None:
    from qspec_llm.kernels.triton.tokens import choose

    logits = torch.randn(5, 10000, generator=torch.Generator().manual_seed(0)).to(ops.device)
    logits[2, 7] = logits[2, 9000] = 9.0
    first, second = (torch.zeros(5, 3, dtype=torch.int64, device=ops.device) for _ in range(2))
    for _ in range(2):  # what a launch leaves behind serves the next one
        choose(logits, first[:, 1], second[:, 2])
        assert torch.equal(first[:, 1], logits.argmax(-1))
        assert torch.equal(second[:, 2], logits.argmax(-1))
        logits = logits.flip(1)


def lines(ops: Any) -> Any:
    from qspec_llm.kernels.triton.tokens import PLAN, Lines

    state = torch.tensor([[5, 10], [6, 20], [7, 31], [8, 3]])
    # gamma, end, tokens held, seed, completion
    plan = [[2, 100, 16, 5, 0], [2, 22, 32, -3, 2], [1, 100, 32, 7, 0], [0] * 5]
    blocks = [[1, 2], [3, 4], [5, 6], [0, 0]]
    plan = [[*head, *[0] * (PLAN - 5), *tail] for head, tail in zip(plan, blocks, strict=True)]
    return Lines(state.to(ops.device), torch.tensor(plan).to(ops.device))


def test_draws_are_those_of_the_definition(ops: Any) -> None:
    from qspec_llm.kernels.triton.tokens import uniform

    for stream in Stream:
        draws = uniform(lines(ops), 3, 1, stream).cpu()
        expected = expected_uniform(-3, 2, torch.tensor([22, 23, 24]), stream)
        assert torch.equal(draws[1], expected)


def test_a_cycle_is_placed_and_accepted(ops: Any) -> None:
    from qspec_llm.kernels.triton.tokens import Places, accept, place

    state = lines(ops)
    places = Places.empty(4, 2, ops.device)
    place(state, places, 16)
    # the second line has room for one token, the third's blocks hold no draft, the last is idle
    assert places.drafts.tolist() == [2, 0, -1, -1]
    assert places.by_line[1].tolist() == [[10, 11, 12], [20, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert places.by_line[2].tolist() == [[26, 27, 28], [68, -1, -1], [-1] * 3, [-1] * 3]
    assert torch.equal(places.by_step[1:], places.by_line[1:].transpose(1, 2))
    assert places.contexts.tolist() == [
        [11, 21, 0, 0],
        [12, 0, 0, 0],
        [13, 0, 0, 0],
        [13, 21, 0, 0],
    ]
    drafted = torch.tensor([[1, 2], [3, 4], [5, 6], [0, 0]], device=ops.device)
    places.by_line[0, :, 1:] = drafted
    choices = torch.tensor([[1, 9, 8], [3, 4, 5], [5, 6, 7], [0, 0, 0]], device=ops.device)
    out = torch.zeros(4, 5, dtype=torch.int64, device=ops.device)
    accept(state, places, choices, out)
    assert out[:, 0].tolist() == [1, 0, -1, -1]
    assert out[:2, 1].tolist() == [10, 20]
    assert out[0, 2:4].tolist() == [1, 9]
    assert int(out[1, 2]) == 3
    assert state.state.tolist() == [[9, 12], [3, 21], [7, 31], [8, 3]]
