"""The reference kernels: right against float64, and a row's result depends on that row alone."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers_weights import (
    FORMS,
    assert_close,
    assert_same_bits,
    assert_same_stored,
    gaussian,
    random_planes,
)
from qspec_llm.errors import QSpecError
from qspec_llm.kernels import LayerKV, Rows, get_backend, reference
from qspec_llm.weights.pack import unpack_nibbles
from qspec_llm.weights.planes import Dense, Grid, Planes, verify_weight
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

BLOCK = 16
A16 = draft_view(Activation.A16)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
ROUNDING = {torch.bfloat16: 4e-3, torch.float32: 2e-6}  # of one result, relative to the norm


def any_rows(is_prompt: bool = False) -> Rows:
    """Rows for operations that look at `is_prompt` alone."""
    none = torch.zeros(0, dtype=torch.int64)
    return Rows(none, none, none, none, none, is_prompt)


def inputs(num_rows: int, num_cols: int, dtype: torch.dtype, seed: int = 7) -> Tensor:
    """Activations [R, K] with rows of different size and one row of zeros."""
    x = gaussian(num_rows, num_cols, seed=seed) * torch.logspace(-2, 2, num_rows)[:, None]
    x[num_rows // 2] = 0
    return x.to(dtype)


# --- linear ----------------------------------------------------------------------------------


def exact_verify(x: Tensor, weight: Planes | Dense) -> Tensor:
    wide = weight.weight if isinstance(weight, Dense) else verify_weight(weight)
    return x.double() @ wide.double().T


def exact_draft(x: Tensor, weight: Planes, activation: Activation, outliers: int = 0) -> Tensor:
    """The draft's product from its integers: dot products in int64, scales in float64."""
    spec, num_rows = weight.spec, len(x)
    code = unpack_nibbles(weight.q4, spec.group).long()  # [N, K/G, G]
    level = torch.where(code >= 8, code - 8, code - 7) if spec.grid is Grid.SIGNED else code
    step, shift = weight.scale.double(), 0.0  # weight = (level + shift) step + offset
    if spec.draft_bits == 8:
        low = unpack_nibbles(weight.r4, spec.group).long()
        level = 16 * level + low - (8 if spec.grid is Grid.SIGNED else 0)
        step = step / 16
    elif spec.grid is Grid.AFFINE and spec.bits == 8:
        shift = 7.5 / 16
    zero = torch.zeros(()).double()
    offset = zero if weight.offset is None else weight.offset.double()[..., None]
    if spec.grid is Grid.AFFINE and weight.offset is None:
        offset = -8 * weight.scale.double()[..., None]

    if activation is Activation.A16:
        q, size = x.double().view(num_rows, -1, 32), torch.ones(num_rows, x.shape[1] // 32)
    else:
        top, group = (127, 64) if activation is Activation.A8 else (7, 32)
        group = group if x.shape[1] % group == 0 else 32
        grouped = x.float().numpy().reshape(num_rows, -1, group)
        tops = np.full((grouped.shape[1], 1), top, np.float32)
        tops[: outliers // group] = 127
        size = np.abs(grouped).max(-1, keepdims=True) / tops
        with np.errstate(invalid="ignore"):
            q = np.nan_to_num(np.rint(grouped / size))  # half to even, like the definition
        assert (np.abs(q) <= tops).all()
        q = torch.from_numpy(q.reshape(num_rows, -1, 32)).long()  # [R, K/32, 32]
        size = torch.from_numpy(size[..., 0]).repeat_interleave(group // 32, 1)

    def per_32(by_group: Tensor) -> Tensor:  # [N, K/G, ...] to [N, K/32, ...]
        return by_group.repeat_interleave(spec.group // 32, 1)

    level = level.view(spec.num_rows, -1, 32)
    dot = torch.einsum("rgk,ngk->rng", q, level.to(q.dtype)).double()
    total = q.sum(-1).double()[:, None]  # [R, 1, K/32]
    step, offset = per_32(step), per_32(offset.expand(*weight.scale.shape, 1))[..., 0]
    terms = ((dot + shift * total) * step + total * offset) * size.double()[:, None]
    return terms.sum(-1)


LINEAR_SHAPES = [(1, 32, 32), (3, 96, 32), (17, 192, 64), (5, 640, 128), (63, 64, 32)]  # N, K, G


@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_verify(form: str, shape: tuple[int, int, int], dtype: str) -> None:
    planes = random_planes(form, *shape)
    for num_rows in (1, 7, 8, 9, 70):
        x = inputs(num_rows, shape[1], DTYPES[dtype])
        for is_prompt in (False, True):
            out = reference.linear(x, planes, None, VERIFY, any_rows(is_prompt))
            assert out.dtype == x.dtype
            assert_close(out, exact_verify(x, planes), ROUNDING[x.dtype])


@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", Activation)
def test_linear_draft(form: str, shape: tuple[int, int, int], activation: Activation) -> None:
    planes = random_planes(form, *shape)
    for num_rows in (1, 9, 70):
        x = inputs(num_rows, shape[1], torch.bfloat16)
        view = draft_view(activation)
        out = reference.linear(x, planes, None, view, any_rows(), torch.float32)
        assert out.dtype == torch.float32
        assert_close(out, exact_draft(x, planes, activation), 2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outliers", [32, 64, 640])
def test_linear_draft_with_outlier_columns(form: str, outliers: int) -> None:
    planes = random_planes(form, 5, 640, 128)
    for num_rows in (1, 9, 70):
        x = inputs(num_rows, 640, torch.bfloat16)
        view = replace(draft_view(Activation.A4), outliers=outliers)
        out = reference.linear(x, planes, None, view, any_rows(), torch.float32)
        assert_close(out, exact_draft(x, planes, Activation.A4, outliers), 2e-6)
        plain = exact_draft(x, planes, Activation.A4)
        assert num_rows == 1 or (out - plain).norm() > 1e-3 * plain.norm()


def test_outlier_columns_have_the_levels_of_a8_and_the_groups_of_a4() -> None:
    x = inputs(6, 96, torch.float32)  # 64 does not divide it: groups of 32 in a8 too
    q, scale = reference.quantize_activations(x, replace(draft_view(Activation.A4), outliers=64))
    wide, wide_scale = reference.quantize_activations(x, draft_view(Activation.A8))
    narrow, narrow_scale = reference.quantize_activations(x, draft_view(Activation.A4))
    assert_same_bits(q, torch.cat((wide[:, :2], narrow[:, 2:]), 1))
    assert_same_bits(scale, torch.cat((wide_scale[:, :2], narrow_scale[:, 2:]), 1))
    for activation in (Activation.A8, Activation.A16):
        view = draft_view(activation)
        plain = reference.round_activations(x, view)
        assert_same_bits(reference.round_activations(x, replace(view, outliers=64)), plain)


@pytest.mark.parametrize("view", [VERIFY, *map(draft_view, Activation)], ids=str)
def test_linear_dense_has_one_precision(view: View) -> None:
    weight = Dense(gaussian(5, 50).to(torch.bfloat16), "a test")
    x = inputs(4, 50, torch.float32)
    out = reference.linear(x, weight, None, view, any_rows())
    assert_close(out, exact_verify(x, weight), 2e-6)


@pytest.mark.parametrize("form", ["signed16", "affine4"])
def test_linear_adds_its_bias_once_before_rounding(form: str) -> None:
    planes, bias = random_planes(form, 24, 64), gaussian(24, seed=5).to(torch.bfloat16) * 10
    x = inputs(3, 64, torch.bfloat16)
    for view in (VERIFY, A16):
        plain = reference.linear(x, planes, None, view, any_rows(), torch.float32)
        out = reference.linear(x, planes, bias, view, any_rows())
        assert_same_bits(out, (plain + bias.float()).to(torch.bfloat16))


def test_linear_over_many_blocks_of_weights() -> None:
    planes = random_planes("signed16", 300, 8192, 128)  # three blocks of BLOCK_WEIGHTS
    x = inputs(2, 8192, torch.float32)
    out = reference.linear(x, planes, None, VERIFY, any_rows())
    assert_close(out, exact_verify(x, planes), 2e-6)


@pytest.mark.parametrize(
    ("view", "num_cols", "group", "top"),
    [
        (draft_view(Activation.A8), 128, 64, 127),
        (draft_view(Activation.A8), 96, 32, 127),
        (draft_view(Activation.A8, 128), 256, 128, 127),
        (draft_view(Activation.A8, 128), 192, 64, 127),
        (draft_view(Activation.A8, 128), 96, 32, 127),
        (draft_view(Activation.A4, 128), 128, 32, 7),
        (draft_view(Activation.A4), 96, 32, 7),
    ],
    ids=str,
)
def test_activations_are_integers_and_a_scale(
    view: View, num_cols: int, group: int, top: int
) -> None:
    x = inputs(6, num_cols, torch.float32)
    q, scale = reference.quantize_activations(x, view)
    assert q.shape == (6, num_cols // group, group)
    assert scale.shape == (6, num_cols // group, 1)
    assert_same_bits(q, q.round())
    assert q.abs().max() == top
    assert (q[3] == 0).all()
    error = (q * scale).view_as(x) - x
    half = scale.expand_as(q).reshape_as(x) / 2
    assert (error.abs() <= half * (1 + 1e-5)).all()
    assert_same_bits(reference.round_activations(x, view), (q * scale).view_as(x))
    assert reference.round_activations(x, A16) is x


# --- embed, norms, rope, silu ----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_embed_reads_every_bit(form: str) -> None:
    planes, tokens = random_planes(form, 20, 64), torch.tensor([19, 0, 7, 7])
    expected = verify_weight(planes)[tokens]
    assert_same_bits(reference.embed(tokens, planes, torch.float32), expected)
    as_bf16 = reference.embed(tokens, planes, torch.bfloat16)
    assert_same_bits(as_bf16, expected.to(torch.bfloat16))


def test_embed_of_a_dense_table() -> None:
    table, tokens = Dense(gaussian(9, 5).to(torch.bfloat16), "a test"), torch.tensor([8, 1, 1])
    assert_same_bits(reference.embed(tokens, table, torch.bfloat16), table.weight[tokens])


@pytest.mark.parametrize("shape", [(1, 64), (9, 576), (70, 33), (5, 3, 64), (2, 7, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(shape: tuple[int, ...], dtype: str) -> None:
    x = (gaussian(*shape) * 3).to(DTYPES[dtype])
    weight = gaussian(shape[-1], seed=4).to(torch.bfloat16)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = reference.rms_norm(x, weight, 1e-5)
    assert out.dtype == x.dtype
    assert_close(out, expected, ROUNDING[x.dtype])


@pytest.mark.parametrize("head_dim", [2, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(head_dim: int, dtype: str) -> None:
    x = gaussian(6, 3, head_dim).to(DTYPES[dtype])
    angles = torch.rand(6, head_dim // 2, generator=torch.Generator().manual_seed(0)) * 100
    wide = x.double()
    turn = torch.polar(torch.ones(()).double(), angles.double())[:, None]
    pairs = torch.complex(wide[..., : head_dim // 2], wide[..., head_dim // 2 :]) * turn
    out = reference.rope(x, angles.cos(), angles.sin())
    assert out.dtype == x.dtype
    assert_close(out, torch.cat((pairs.real, pairs.imag), -1), max(ROUNDING[x.dtype], 2e-6))


@pytest.mark.parametrize("num_rows", [1, 8, 9, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(num_rows: int, dtype: str) -> None:
    x = (gaussian(num_rows, 2 * 45) * 10).to(DTYPES[dtype])
    x[0, 0], x[0, 1], x[0, 2] = 200.0, -200.0, 0.0  # exp overflows and must not give NaN
    gate, up = x.double().chunk(2, -1)
    out = reference.silu_mul(x)
    assert out.dtype == x.dtype
    assert_close(out, gate * torch.sigmoid(gate) * up, ROUNDING[x.dtype])


# --- attention -------------------------------------------------------------------------------


class Case:
    """Sequences in a cache whose blocks are shuffled; every slot no one owns is poisoned.

    `spans` are (first position, number of rows) per sequence.
    """

    def __init__(
        self,
        spans: list[tuple[int, int]],
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.contexts = [first + count for first, count in spans]
        num_blocks = [math.ceil(context / BLOCK) for context in self.contexts]
        self.blocks = list(torch.split(torch.randperm(sum(num_blocks), generator=rng), num_blocks))
        self.blocks = [blocks + 1 for blocks in self.blocks]  # block 0 pads the tables
        shape = ((sum(num_blocks) + 2) * BLOCK, num_kv_heads, head_dim)
        self.keys = torch.full(shape, 1e30).to(dtype)
        self.values = torch.full(shape, -1e30).to(dtype)
        for blocks, context in zip(self.blocks, self.contexts, strict=True):
            slots = self.slots(blocks, torch.arange(context))
            for cache in (self.keys, self.values):
                fresh = torch.randn(context, num_kv_heads, head_dim, generator=rng)
                cache[slots] = fresh.to(dtype)
        self.kv = LayerKV(self.keys, self.values, BLOCK)
        self.positions = [torch.arange(first, first + count) for first, count in spans]
        self.query = [
            torch.randn(count, num_heads, head_dim, generator=rng).to(dtype) for _, count in spans
        ]

    @staticmethod
    def slots(blocks: Tensor, positions: Tensor) -> Tensor:
        return blocks[positions // BLOCK] * BLOCK + positions % BLOCK

    def rows(self, sequences: list[int], is_prompt: bool, pick: slice = slice(None)) -> Rows:
        """The rows `pick` of some sequences, in that order."""
        positions = [self.positions[s][pick] for s in sequences]
        most = max(len(self.blocks[s]) for s in sequences)
        tables = torch.zeros(len(sequences), most, dtype=torch.int64)
        for line, s in zip(tables, sequences, strict=True):
            line[: len(self.blocks[s])] = self.blocks[s]
        return Rows(
            positions=torch.cat(positions),
            slots=torch.cat(
                [self.slots(self.blocks[s], p) for s, p in zip(sequences, positions, strict=True)]
            ),
            cu_rows=torch.tensor([0, *(len(p) for p in positions)]).cumsum(0),
            contexts=torch.tensor([int(p[-1]) + 1 for p in positions]),
            block_tables=tables,
            is_prompt=is_prompt,
        )

    def run(self, sequences: list[int], is_prompt: bool, pick: slice = slice(None)) -> list[Tensor]:
        """Attention of those rows in one batch, split by sequence."""
        query = [self.query[s][pick] for s in sequences]
        out = reference.attention(
            torch.cat(query), self.kv, VERIFY, self.rows(sequences, is_prompt, pick)
        )
        assert out.dtype == self.dtype
        return list(torch.split(out, [len(q) for q in query]))

    def exact(self, sequence: int) -> Tensor:
        """In float64, row by row, from the keys that each row sees."""
        query = self.query[sequence].double()
        slots = self.slots(self.blocks[sequence], torch.arange(self.contexts[sequence]))
        group = query.shape[1] // self.keys.shape[1]
        keys = self.keys[slots].double().repeat_interleave(group, 1)
        values = self.values[slots].double().repeat_interleave(group, 1)
        out = torch.empty_like(query)
        for row, position in enumerate(self.positions[sequence].tolist()):
            seen = slice(0, position + 1)
            scores = torch.einsum("hd,khd->hk", query[row], keys[seen]) / query.shape[-1] ** 0.5
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), values[seen])
        return out


RAGGED = [(0, 1), (0, 5), (62, 4), (63, 1), (64, 1), (200, 9), (130, 3), (15, 2), (300, 1)]


@pytest.mark.parametrize("ratio", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_prompt", [False, True])
def test_attention_of_ragged_batches(ratio: int, head_dim: int, is_prompt: bool) -> None:
    case = Case(RAGGED, 2 * ratio, 2, head_dim, seed=ratio)
    for sequence, out in enumerate(case.run(list(range(len(RAGGED))), is_prompt)):
        assert_close(out, case.exact(sequence), 2e-6)


@pytest.mark.parametrize("num_rows", [63, 64, 65, 150])
def test_attention_of_long_prompts(num_rows: int) -> None:
    case = Case([(0, num_rows), (70, num_rows)], 3, 1, dtype=torch.bfloat16)
    for sequence, out in enumerate(case.run([0, 1], is_prompt=True)):
        assert_close(out, case.exact(sequence), 4e-3)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_attention_of_flat_and_of_sharp_scores(scale: float) -> None:
    case = Case([(150, 6)])
    case.query[0] *= scale
    assert_close(case.run([0], False)[0], case.exact(0), 1e-5)


def test_keys_beyond_a_row_are_not_read() -> None:
    """A row's result stays when later positions of its own sequence turn into large numbers."""
    case = Case([(60, 12)])
    (before,) = case.run([0], False)
    for row in range(12):
        later = torch.arange(60 + row + 1, 72)
        slots = case.slots(case.blocks[0], later)
        kept = case.keys[slots].clone(), case.values[slots].clone()
        case.keys[slots], case.values[slots] = 1e30, -1e30
        (after,) = case.run([0], False)
        assert_same_bits(after[: row + 1], before[: row + 1])
        case.keys[slots], case.values[slots] = kept


def test_write_kv_writes_its_slots_and_no_other() -> None:
    case = Case([(20, 3), (0, 5)])
    rows = case.rows([0, 1], False)
    keys, values = case.keys.clone(), case.values.clone()
    new_keys, new_values = gaussian(8, 2, 64, seed=1), gaussian(8, 2, 64, seed=2)
    for view in (VERIFY, A16):  # both views share the slots
        reference.write_kv(new_keys, new_values, case.kv, view, rows)
        keys[rows.slots], values[rows.slots] = new_keys, new_values
        assert_same_bits(case.keys, keys)
        assert_same_bits(case.values, values)
        new_keys, new_values = -new_keys, -new_values


# --- row independence ------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Libraries may split their work by size once there are threads to split it among."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def assert_rows_independent(
    op: Callable[[Tensor], Tensor], x: Tensor, counts: Iterable[int] = range(2, 18)
) -> None:
    """`op` gives each row of x the same bits alone, among 2..17 others, and among all of them.

    Rows are drawn and shuffled anew for every batch, so that they stand at any position.
    """
    rng = torch.Generator().manual_seed(0)
    alone = torch.cat([op(row[None]) for row in x])
    for count in [*counts, len(x)]:
        index = torch.randperm(len(x), generator=rng)[:count]
        assert_same_bits(op(x[index]), alone[index])


# shapes of SmolLM2-135M, and odd ones
INDEPENDENT_SHAPES = [(192, 576, 64), (576, 1536, 128), (257, 96, 32)]
VIEWS = {"verify": VERIFY, **{f"draft {a}": draft_view(a) for a in Activation}}


@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", ["signed16", "signed8", "affine4", "affine4_f16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_are_independent(form: str, view: str, is_prompt: bool, dtype: str) -> None:
    planes, rows = random_planes(form, 33, 96), any_rows(is_prompt)
    bias = gaussian(33).to(torch.bfloat16)
    assert_rows_independent(
        lambda x: reference.linear(x, planes, bias, VIEWS[view], rows),
        inputs(70, 96, DTYPES[dtype]),
    )


@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("shape", INDEPENDENT_SHAPES, ids=str)
def test_linear_rows_are_independent_at_real_shapes(
    shape: tuple[int, int, int], is_prompt: bool
) -> None:
    planes, rows = random_planes("signed8", *shape), any_rows(is_prompt)
    assert_rows_independent(
        lambda x: reference.linear(x, planes, None, VERIFY, rows, torch.float32),
        inputs(20, shape[1], torch.float32),
    )


@pytest.mark.parametrize("is_prompt", [False, True])
def test_linear_rows_are_independent_when_dense(is_prompt: bool) -> None:
    weight, rows = Dense(gaussian(100, 333).to(torch.bfloat16), "a test"), any_rows(is_prompt)
    assert_rows_independent(
        lambda x: reference.linear(x, weight, None, VERIFY, rows), inputs(20, 333, torch.float32)
    )


@pytest.mark.parametrize("num_cols", [64, 576, 577, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rows_are_independent(num_cols: int, dtype: str) -> None:
    weight = gaussian(num_cols, seed=2).to(torch.bfloat16)
    assert_rows_independent(
        lambda x: reference.rms_norm(x, weight, 1e-5), inputs(40, num_cols, DTYPES[dtype])
    )


def test_rms_norm_of_heads_is_independent() -> None:
    weight = gaussian(64, seed=2)
    assert_rows_independent(lambda x: reference.rms_norm(x, weight, 1e-5), gaussian(40, 3, 64))


@pytest.mark.parametrize("width", [1, 45, 1536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_rows_are_independent(width: int, dtype: str) -> None:
    assert_rows_independent(reference.silu_mul, inputs(40, 2 * width, DTYPES[dtype]))


@pytest.mark.parametrize("activation", [Activation.A8, Activation.A4])
def test_rounded_activations_are_independent(activation: Activation) -> None:
    assert_rows_independent(
        lambda x: reference.round_activations(x, draft_view(activation)),
        inputs(40, 192, torch.float32),
    )


def test_rope_rows_are_independent() -> None:
    table = torch.rand(40, 32, generator=torch.Generator().manual_seed(0)) * 9

    def op(packed: Tensor) -> Tensor:  # a row carries its own angles
        x, angles = packed[:, :192].view(-1, 3, 64), packed[:, 192:]
        return reference.rope(x, angles.cos(), angles.sin()).flatten(1)

    assert_rows_independent(op, torch.cat((gaussian(40, 192), table), 1))


@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (4, 4), (14, 2)])
def test_attention_rows_are_independent(num_heads: int, num_kv_heads: int, is_prompt: bool) -> None:
    """Alone, as a chunk of its sequence, and among other sequences in any order."""
    case = Case(RAGGED, num_heads, num_kv_heads)
    alone = []
    for sequence, (_, count) in enumerate(RAGGED):
        # one row at a time: the context ends at that row
        picks = [case.run([sequence], is_prompt, slice(i, i + 1))[0] for i in range(count)]
        alone.append(torch.cat(picks))
        assert_same_bits(case.run([sequence], is_prompt)[0], alone[-1])
    rng = torch.Generator().manual_seed(0)
    for count in range(2, len(RAGGED) + 1):
        order = torch.randperm(len(RAGGED), generator=rng)[:count].tolist()
        for sequence, out in zip(order, case.run(order, is_prompt), strict=True):
            assert_same_bits(out, alone[sequence])


def test_prompt_rows_are_independent_of_chunking() -> None:
    case = Case([(0, 150)], 9, 3)
    (whole,) = case.run([0], is_prompt=True)
    for size in (1, 7, 64, 100):
        chunks = [
            case.run([0], True, slice(start, min(start + size, 150)))[0]
            for start in range(0, 150, size)
        ]
        assert_same_bits(torch.cat(chunks), whole)


@pytest.mark.parametrize("is_prompt", [False, True])
def test_rows_with_long_contexts_are_independent(is_prompt: bool) -> None:
    """Many chunks of keys: their sum keeps its order when later chunks add zeros to it."""
    case = Case([(30, 2000)], 3, 1)
    picked = slice(None, None, 61)
    (together,) = case.run([0], is_prompt, picked)
    assert_close(together, case.exact(0)[picked], 2e-6)
    for index, row in enumerate(range(0, 2000, 61)):
        (alone,) = case.run([0], is_prompt, slice(row, row + 1))
        assert_same_bits(together[index : index + 1], alone)


# Threads wait for each other on a busy machine, so these are few.


@pytest.mark.parametrize("is_prompt", [False, True])
def test_rows_are_independent_with_two_threads(is_prompt: bool, two_threads: None) -> None:
    planes, norm = random_planes("signed8", 192, 576, 64), gaussian(576).to(torch.bfloat16)

    def op(x: Tensor) -> Tensor:
        x = reference.rms_norm(x, norm, 1e-5)
        x = reference.linear(x, planes, None, VERIFY, any_rows(is_prompt))
        return reference.silu_mul(x)

    assert_rows_independent(op, inputs(10, 576, torch.float32), counts=(2, 8, 9))


def test_attention_rows_are_independent_with_two_threads(two_threads: None) -> None:
    case = Case(RAGGED, 9, 3)
    together = case.run(list(range(len(RAGGED))), is_prompt=False)
    for sequence, out in enumerate(together):
        assert_same_bits(case.run([sequence], False, slice(-1, None))[0], out[-1:])


def test_the_views_of_one_call_do_not_disturb_each_other() -> None:
    """View is an argument: reading at one precision leaves nothing behind for the other."""
    planes, x = random_planes("signed16", 40, 64), inputs(3, 64, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in planes.tensors().items()}
    first = reference.linear(x, planes, None, VERIFY, any_rows())
    reference.linear(x, planes, None, draft_view(Activation.A4), any_rows())
    assert_same_bits(reference.linear(x, planes, None, VERIFY, any_rows()), first)
    for name, tensor in planes.tensors().items():
        assert_same_bits(tensor, before[name])


# --- the contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_pack_is_undone_and_holds_no_copy(form: str) -> None:
    planes = random_planes(form, 4, 64)
    packed = reference.pack(planes)
    assert_same_stored(reference.unpack(packed), planes)
    assert sum(t.nbytes for t in reference.buffers(packed)) == planes.nbytes
    own = {t.data_ptr() for t in planes.tensors().values()}
    assert {t.data_ptr() for t in reference.buffers(packed)} == own


def test_a_dense_tensor_packs_too() -> None:
    dense = Dense(gaussian(3, 5), "a test")
    assert reference.unpack(reference.pack(dense)) is dense
    assert reference.buffers(reference.pack(dense))[0] is dense.weight


def test_backends_are_found_by_name() -> None:
    assert get_backend("reference") is reference
    with pytest.raises(QSpecError, match="'nonsense' is not one of reference"):
        get_backend("nonsense")
