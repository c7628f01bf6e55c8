"""Makers and comparisons for the tests of compiled backends."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers_weights import FORMS
from qspec_llm.errors import QSpecError
from qspec_llm.kernels import LayerKV, Rows, reference
from qspec_llm.kv.pool import allocate
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.pack import pack_nibbles, unpack_nibbles
from qspec_llm.weights.planes import (
    Dense,
    Planes,
    PlaneSpec,
    Stored,
    draft_weight,
    verify_weight,
)
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

# What the fixture `compiled` is: source, architecture, macros to a cubin.
Compile = Callable[[str, str, Mapping[str, int]], bytes]

VIEWS: dict[str, View] = {
    "verify": VERIFY,
    "a16": draft_view(Activation.A16),
    "a8": draft_view(Activation.A8),
    "a8 g128": draft_view(Activation.A8, 128),
    "a4": draft_view(Activation.A4),
}
# what a model reads whose drafts have activations in groups of 64
MODEL_VIEWS = [name for name, view in VIEWS.items() if view.group == 64]

DENSE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_stored(form: str, num_rows: int, num_cols: int, group: int = 32) -> Stored:
    """A tensor of a form (or of a dense dtype) with equally likely codes and finite weights."""
    rng = torch.Generator().manual_seed(num_rows * 1000 + num_cols + group)
    if form in DENSE_TYPES:
        weight = torch.randn(num_rows, num_cols, generator=rng) * 0.05
        return Dense(weight.to(DENSE_TYPES[form]), "a test")
    spec = PlaneSpec(num_rows, num_cols, group=group, **FORMS[form])
    tensors = {}
    for name, (shape, dtype) in spec.shapes().items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=dtype, generator=rng)
        else:
            tensors[name] = (torch.rand(shape, generator=rng) * 0.02 + 0.005).to(dtype)
    if spec.bits == 16:  # residuals within an octave of the anchor, and every tenth weight a zero
        is_zero = torch.rand(num_rows, num_cols, generator=rng) < 0.1
        high = unpack_nibbles(tensors["r4"], group).flatten(1) % 2 + 12
        tensors["r4"] = pack_nibbles(high.masked_fill(is_zero, 0), group)
        tensors["r8"] = tensors["r8"].masked_fill(is_zero, 0)
    if "offset" in tensors:
        tensors["offset"] = tensors["offset"] * -8
    return Planes.from_tensors(spec, tensors)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Ordinary values with a few heavy tails."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=rng)
    return torch.where(torch.rand(*shape, generator=rng) < 0.01, x * 20, x).to(dtype)


def some_rows(is_prompt: bool = False) -> Rows:
    """Rows for a linear, which looks at nothing but the kind."""
    return Rows(*[torch.zeros(1, dtype=torch.int64)] * 5, is_prompt)


def ragged_rows(
    counts: list[int], contexts: list[int], *, block_size: int = 16, is_prompt: bool = False
) -> tuple[Rows, int]:
    """The last rows of some sequences whose blocks are shuffled, and the number of blocks."""
    width = -(-max(contexts) // block_size)
    num_blocks = width * len(counts) + 1
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(7))
    tables = order[: width * len(counts)].view(len(counts), width)
    positions = [torch.arange(c - n, c) for n, c in zip(counts, contexts, strict=True)]
    slots = [
        table[at // block_size] * block_size + at % block_size
        for table, at in zip(tables, positions, strict=True)
    ]
    bounds = torch.tensor([0, *counts]).cumsum(0)
    rows = Rows(
        torch.cat(positions), torch.cat(slots), bounds, torch.tensor(contexts), tables.contiguous(),
        is_prompt,
    )  # fmt: skip
    return rows, num_blocks


def random_cache(
    num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int = 16
) -> LayerKV:
    shape = (num_blocks * block_size, num_kv_heads, head_dim)
    return LayerKV(gaussian(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=1), block_size)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Norm-relative error, measured in float64."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) <= tolerance, f"relative error {float(error):.2e} > {tolerance:.0e}"


def expected_product(x: Tensor, stored: Stored, view: View) -> Tensor:
    """x [R, K] times the view's weights [N, K], transposed: the definition, in float64."""
    wide = x.float()
    if isinstance(stored, Dense):
        return wide.double() @ stored.weight.double().t()
    if view.is_draft:
        # on the CPU: torch divides by a scalar on a GPU by multiplying with its rounded inverse
        wide = reference.round_activations(wide.cpu(), view).to(x.device)
    weight = draft_weight(stored) if view.is_draft else verify_weight(stored)
    return wide.double() @ weight.double().t()


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and patterns, so that -0.0 is not 0.0."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if actual.is_floating_point():
        integer = {2: torch.int16, 4: torch.int32}[actual.itemsize]
        actual, expected = actual.contiguous().view(integer), expected.contiguous().view(integer)
    assert torch.equal(actual, expected)


def assert_quantizes(quantized: Any, x: Tensor, view: View) -> None:
    """Codes, scales and sums of a `Quantized` are exactly those of the reference for x [R, K]."""
    expected, scale = reference.quantize_activations(x.cpu().float(), view)
    halves = quantized.codes.cpu().view(len(x), -1, 8, 2)  # of every 16 columns
    assert torch.equal(halves.transpose(2, 3).float().reshape(expected.shape), expected)
    meta = quantized.meta.cpu()[: expected.shape[1], : len(x)]
    assert_same_bits(meta[..., 0].contiguous().view(torch.float32).T.contiguous(), scale[..., 0])
    assert torch.equal(meta[..., 1].T.float(), expected.sum(-1))


@contextmanager
def refused(*words: object) -> Iterator[None]:
    """What runs inside raises QSpecError: one line that holds every one of `words`."""
    with pytest.raises(QSpecError) as caught:
        yield
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


def run_passes(
    decoder: Decoder, view: str, length: int
) -> tuple[list[Tensor], tuple[LayerKV, ...]]:
    """A prompt of `length` and one of 20, five rows and one, then one row alone."""
    if VIEWS[view].is_draft and VIEWS[view].group != decoder.draft_group:
        decoder = replace(decoder, draft_group=VIEWS[view].group)
    width = -(-(length + 6) // 16)  # blocks of a sequence
    kv = allocate(decoder.config, 2 * width, decoder.dtype, decoder.ops.device)
    tokens = torch.arange(length + 20) * 7 % 50
    outputs = []
    for counts, contexts, is_prompt in (
        ([length, 20], [length, 20], True),
        ([5, 1], [length + 5, 21], False),
        ([1], [length + 6], False),
    ):
        rows, _ = ragged_rows(counts, contexts, is_prompt=is_prompt)
        tables = torch.arange(width)[None] + width * torch.arange(len(counts))[:, None]
        spans = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        slots = tables[spans, rows.positions // 16] * 16 + rows.positions % 16
        rows = replace(rows, block_tables=tables, slots=slots)
        wanted = torch.tensor([sum(counts) - 1, 0])
        outputs.append(decoder.forward(tokens[: sum(counts)], rows, kv, VIEWS[view], wanted))
    return outputs, kv
