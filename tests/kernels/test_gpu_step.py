"""A whole forward pass on the GPU equals its operations one by one, bit for bit."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_cpu import VIEWS, assert_same_bits, ragged_rows
from torch import Tensor

from helpers_engine import tiny_decoder
from qspec_llm.kernels import LayerKV, available_backends, reference
from qspec_llm.kv.pool import allocate
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.quantize import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in available_backends(), reason="no GPU that can run it"),
]


def one_by_one(decoder: Decoder) -> Decoder:
    """The same decoder, without the fused pass."""
    from qspec_llm.kernels.cuda import backend

    ops: Any = SimpleNamespace(**{name: getattr(backend, name) for name in backend.__all__})
    ops.whole_step = reference.whole_step
    return replace(decoder, ops=ops)


def run(decoder: Decoder, view: str) -> tuple[list[Tensor], tuple[LayerKV, ...]]:
    """A prompt of 70 and one of 20, five rows and one, then one row alone."""
    kv = allocate(decoder.config, 16, decoder.dtype, decoder.ops.device)
    tokens = torch.arange(90) * 7 % 50
    outputs = []
    for counts, contexts, is_prompt in (
        ([70, 20], [70, 20], True),
        ([5, 1], [75, 21], False),
        ([1], [76], False),
    ):
        rows, _ = ragged_rows(counts, contexts, is_prompt=is_prompt)
        tables = torch.arange(8)[None] + 8 * torch.arange(len(counts))[:, None]
        spans = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        slots = tables[spans, rows.positions // 16] * 16 + rows.positions % 16
        rows = replace(rows, block_tables=tables, slots=slots)
        wanted = torch.tensor([sum(counts) - 1, 0])
        outputs.append(decoder.forward(tokens[: sum(counts)], rows, kv, VIEWS[view], wanted))
    return outputs, kv


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_a_whole_pass_equals_the_operations_one_by_one(
    head_dim: int, view: str, family: str
) -> None:
    sizes = {"head_dim": head_dim, "hidden_size": 256, "intermediate_size": 192}
    decoder = tiny_decoder(Target.BF16, backend="cuda", family=family, **sizes)
    fused, fused_kv = run(decoder, view)
    plain, plain_kv = run(one_by_one(decoder), view)
    for ours, theirs in zip(fused, plain, strict=True):
        assert torch.isfinite(ours).all()
        assert_same_bits(ours, theirs)
    for ours_kv, theirs_kv in zip(fused_kv, plain_kv, strict=True):
        assert_same_bits(ours_kv.keys, theirs_kv.keys)
        assert_same_bits(ours_kv.values, theirs_kv.values)
