"""A whole forward pass on the GPU equals its operations one by one, bit for bit."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_cpu import VIEWS, assert_same_bits, run_passes

from helpers_engine import tiny_decoder
from helpers_weights import refused
from qspec_llm.kernels import available_backends, reference
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


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_a_whole_pass_equals_the_operations_one_by_one(
    head_dim: int, view: str, family: str
) -> None:
    sizes = {"head_dim": head_dim, "hidden_size": 256, "intermediate_size": 192}
    decoder = tiny_decoder(Target.BF16, backend="cuda", family=family, **sizes)
    fused, fused_kv = run_passes(decoder, view, 70)
    plain, plain_kv = run_passes(one_by_one(decoder), view, 70)
    for ours, theirs in zip(fused, plain, strict=True):
        assert torch.isfinite(ours).all()
        assert_same_bits(ours, theirs)
    for ours_kv, theirs_kv in zip(fused_kv, plain_kv, strict=True):
        assert_same_bits(ours_kv.keys, theirs_kv.keys)
        assert_same_bits(ours_kv.values, theirs_kv.values)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hadamard": 64}, "rotated inputs"), ({"outliers": 32}, "outlier columns in 8 bits")],
)
def test_models_that_it_cannot_run_are_refused(change: dict[str, int], words: str) -> None:
    decoder = tiny_decoder(Target.INT4, backend="cuda", **change)
    with refused(words, "--backend cpu"):
        run_passes(decoder, "a4", 20)
