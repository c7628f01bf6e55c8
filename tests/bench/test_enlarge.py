"""An enlarged model gives the small one's logits and tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers_engine import (
    TINY,
    RandomCheckpoint,
    assert_identical,
    greedy,
    ragged_prompts,
    run_model,
)
from helpers_weights import refused
from qspec_llm.bench.enlarge import EnlargedCheckpoint
from qspec_llm.kernels import Rows, get_backend
from qspec_llm.kv.pool import allocate
from qspec_llm.model.config import ModelConfig
from qspec_llm.model.decoder import Decoder
from qspec_llm.model.load import load_decoder
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.view import VERIFY

LARGE = {
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_layers": 5,
    "num_heads": 12,
    "num_kv_heads": 4,
    "head_dim": 64,
    "vocab_size": 130,
}


def decoder_of(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype = torch.float32
) -> Decoder:
    recipe = Recipe(Target.BF16, group=32)
    ops = get_backend("reference")
    return load_decoder(checkpoint, config, recipe, ops, num_positions=128, dtype=dtype)


def pair(
    small: dict[str, Any], large: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Decoder, Decoder]:
    """A small random model and the enlarged one."""
    config = replace(TINY, **small)
    checkpoint = RandomCheckpoint(config, seed=0)
    shape = replace(TINY, tied_head=config.tied_head, **{**LARGE, **large})
    enlarged = EnlargedCheckpoint(checkpoint, config, shape)
    return decoder_of(checkpoint, config, dtype), decoder_of(enlarged, enlarged.config, dtype)


def logits(decoder: Decoder) -> Tensor:
    """Of 40 tokens after one another."""
    positions = torch.arange(40)
    rows = Rows(
        positions, positions, torch.tensor([0, 40]), torch.tensor([40]), torch.arange(3)[None], True
    )
    kv = allocate(decoder.config, 3, decoder.dtype, decoder.ops.device)
    return decoder.forward(positions * 7 % 97, rows, kv, VERIFY, None)


CASES = {
    "llama": ({}, {}),
    "tied": ({"tied_head": True}, {}),
    "biases": ({"family": "qwen2"}, {}),
    "more queries a KV head": ({"num_heads": 4, "num_kv_heads": 1}, {"num_heads": 8}),
    "equal heads": ({}, {"head_dim": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_small_models(case: str) -> None:
    small, large = pair(*CASES[case])
    expected, actual = logits(small), logits(large)
    error = (actual[:, :97] - expected).norm() / expected.norm()
    assert float(error) < 1e-5  # every factor is a power of two: rounding alone
    assert torch.equal(actual[:, 97:], actual[:, : 130 - 97])


def test_factors_that_are_no_powers_of_two_cost_a_rounding_of_q() -> None:
    small, large = pair({}, {"head_dim": 32, "hidden_size": 192})
    expected, actual = logits(small), logits(large)
    error = (actual[:, :97] - expected).norm() / expected.norm()
    assert 0 < float(error) < 5e-3


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_the_small_models_with_and_without_drafts(case: str) -> None:
    small, large = pair(*CASES[case])
    prompts = ragged_prompts(4, 97)
    plain = run_model(large, prompts, greedy(12))
    assert plain.tokens == run_model(small, prompts, greedy(12)).tokens
    drafted = run_model(large, prompts, greedy(12), gamma=3)
    assert_identical(drafted, plain)
    assert drafted.num_accepted > 0


@pytest.mark.parametrize(
    ("small", "large", "words"),
    [
        ({}, {"hidden_size": 32}, ["hidden_size is 32", "64"]),
        ({}, {"num_layers": 1}, ["num_layers is 1", "2"]),
        ({}, {"head_dim": 24}, ["16", "24"]),
        ({"family": "qwen3"}, {}, ["qwen3"]),
        ({"num_heads": 12, "num_kv_heads": 2}, {"num_heads": 4}, ["12 heads", "4"]),
    ],
)
def test_shapes_that_cannot_hold_a_model_are_refused(
    small: dict[str, Any], large: dict[str, Any], words: list[str]
) -> None:
    with refused(*words):
        pair(small, large)
