"""Reordered checkpoints compute what the original computes, their largest channels first."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from helpers_changed import AsFloats, UnevenCheckpoint, decoder_of, logits
from helpers_engine import TINY
from helpers_model_dir import write_model
from helpers_weights import assert_close, assert_same_bits, refused
from qspec_llm.cli import main
from qspec_llm.kernels import get_backend
from qspec_llm.model.config import ModelConfig, read_config
from qspec_llm.model.load import expected_shapes, stored_tensors
from qspec_llm.quantize.magnitudes import input_magnitudes
from qspec_llm.quantize.text import CalibrationText
from qspec_llm.weights import store
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.outliers import OUTLIERS_KEY, reordered
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.view import VERIFY, Activation, draft_view

QWEN2 = replace(TINY, family="qwen2", hidden_size=96, num_heads=6, num_kv_heads=2)
QWEN3 = replace(TINY, family="qwen3")
TIED = replace(TINY, tied_head=True)
LARGE = slice(None, None, 9)  # channels of the residual stream that every norm makes larger


class Uneven(UnevenCheckpoint):
    """Every ninth channel of its linears' inputs is 30 times larger."""

    factors: ClassVar = {"layernorm.weight": (9, 30), "up_proj.weight": (9, 10)}


def reorder(checkpoint: Any, config: ModelConfig, outliers: int = 32) -> Any:
    magnitudes = input_magnitudes(checkpoint, config, CalibrationText.of([list(range(40))]))
    return reordered(checkpoint, outliers=outliers, magnitudes=magnitudes)


def changed(config: ModelConfig, checkpoint: Any) -> ModelConfig:
    return replace(config, **checkpoint.metadata[OUTLIERS_KEY])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "config", [TINY, QWEN2, QWEN3, TIED], ids=["llama", "qwen2", "qwen3", "tied"]
)
def test_the_model_computes_what_the_original_computes(config: ModelConfig, backend: str) -> None:
    ops, original = get_backend(backend), Uneven(config)
    checkpoint = reorder(original, config)
    expected = logits(decoder_of(AsFloats(original), config, ops=ops))
    found = logits(decoder_of(AsFloats(checkpoint), changed(config, checkpoint), ops=ops))
    assert_close(found, expected, 1e-5)
    assert not torch.equal(found, expected), "nothing was moved, so nothing was tested"


@pytest.mark.parametrize("config", [TINY, QWEN2], ids=["llama", "qwen2"])
def test_the_largest_channels_come_first(config: ModelConfig) -> None:
    original = Uneven(config)
    checkpoint = reorder(original, config)
    found = input_magnitudes(checkpoint, config, CalibrationText.of([list(range(40))]))
    for layer in (0, 1):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gain = checkpoint.read(f"model.layers.{layer}.{norm}.weight", Target.BF16).float()
            num_large = len(range(config.hidden_size)[LARGE])
            assert (gain[:num_large].abs() > 10).all()
            assert (gain[num_large:].abs() < 10).all()
        down = found[f"model.layers.{layer}.mlp.down_proj"]
        assert (down[1:] <= down[:-1] * 1.01).all()  # bf16 between operations
        assert down[0] > 10 * down[-1]


def test_values_are_moved_and_not_changed() -> None:
    original = Uneven(TINY)
    checkpoint = reorder(original, TINY)
    assert checkpoint.names() == original.names()
    for name in expected_shapes(TINY):
        value, before = (c.read(name, Target.INT4) for c in (checkpoint, original))
        assert checkpoint.shape(name) == tuple(value.shape) == original.shape(name)
        assert_same_bits(
            value.flatten().float().sort().values, before.flatten().float().sort().values
        )


def test_only_a4_drafts_see_outliers_in_eight_bits() -> None:
    config = replace(TINY, outliers=32, head_draft=Activation.A8)
    decoders = [
        decoder_of(Uneven(TINY), c, Target.INT4) for c in (config, replace(config, outliers=None))
    ]
    for view in (VERIFY, *map(draft_view, Activation)):
        wide, narrow = (logits(decoder, view) for decoder in decoders)
        assert torch.equal(wide, narrow) is (view.activation is not Activation.A4)


def test_outlier_columns_make_a4_activations_agree() -> None:
    config = replace(TINY, hidden_size=128, intermediate_size=256, num_heads=8)
    original = Uneven(config)
    errors = []
    for checkpoint in (original, reorder(original, config)):
        fields = checkpoint.metadata.get(OUTLIERS_KEY, {"head_draft": Activation.A8})
        decoder = decoder_of(checkpoint, replace(config, **fields), Target.INT4)
        exact, draft = logits(decoder), logits(decoder, draft_view(Activation.A4))
        errors.append(float((draft - exact).norm() / exact.norm()))
    plain, prepared = errors
    assert prepared < 0.6 * plain


def test_a_reordered_directory_keeps_what_the_model_needs(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    original = open_checkpoint(tmp_path / "model")
    checkpoint = reorder(original, read_config(original))
    config = read_config(checkpoint)
    assert (config.outliers, config.head_draft) == (32, Activation.A8)
    tensors = stored_tensors(checkpoint, config, Recipe(Target.INT4))
    store.write(tmp_path / "nested", Target.INT4, config.to_dict(), tensors)
    nested = open_checkpoint(tmp_path / "nested")
    assert read_config(nested) == config
    assert main(["inspect", str(tmp_path / "nested")]) == 0
    assert "the first 32 columns of the inputs of q, k, v" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "8 bits" not in capsys.readouterr().out
    assert "outliers" not in read_config(original).to_dict()
    for again in (checkpoint, nested):
        with refused("cannot be reordered any more"):
            reordered(again, outliers=32, magnitudes={})


@pytest.mark.parametrize("outliers", [0, -32, 48, 96, True, 32.0])
def test_impossible_numbers_are_refused(outliers: Any) -> None:
    with refused(f"outliers is {outliers}", "a multiple of 32 up to 64"):
        replace(TINY, outliers=outliers)


def test_a_rotated_model_has_no_outliers() -> None:
    with refused("a rotated model has no outlier columns"):
        replace(TINY, outliers=32, hadamard=64)
