"""Rotated checkpoints compute what the original computes, and say what they need."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from helpers_changed import AsFloats, UnevenCheckpoint, decoder_of, logits
from helpers_engine import TINY
from helpers_model_dir import write_model
from helpers_weights import assert_close, gaussian, refused
from qspec_llm.cli import main
from qspec_llm.kernels import Rows, get_backend, reference
from qspec_llm.kv.pool import allocate
from qspec_llm.llm import LLM
from qspec_llm.model.config import ModelConfig, read_config
from qspec_llm.model.load import expected_shapes, load_decoder, stored_tensors
from qspec_llm.quantize.magnitudes import input_magnitudes
from qspec_llm.quantize.text import CalibrationText
from qspec_llm.weights import store
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.hadamard import order_for, transform
from qspec_llm.weights.planes import Dense
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.rotation import INPUTS, ROTATION_KEY, rotated
from qspec_llm.weights.view import VERIFY, Activation, draft_view

QWEN2 = replace(TINY, family="qwen2", hidden_size=96, num_heads=6, num_kv_heads=2)
TOKENS = [list(range(40)), [5, 4, 3] * 7]


class Uneven(UnevenCheckpoint):
    """Its norms make some channels 30 times larger than others."""

    factors: ClassVar = {
        "layernorm.weight": (9, 30),
        "up_proj.weight": (7, 10),
        "v_proj.weight": (5, 10),
    }


def rotated_config(config: ModelConfig, checkpoint: Any) -> ModelConfig:
    return replace(config, **checkpoint.metadata[ROTATION_KEY])


def rotate(checkpoint: Any, config: ModelConfig, *, is_balanced: bool = True) -> Any:
    text = CalibrationText.of(TOKENS)
    magnitudes = input_magnitudes(checkpoint, config, text) if is_balanced else None
    return rotated(checkpoint, head_dim=config.head_dim, magnitudes=magnitudes)


@pytest.mark.parametrize("config", [TINY, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("is_balanced", [False, True])
def test_the_model_computes_what_the_original_computes(
    config: ModelConfig, is_balanced: bool
) -> None:
    original = Uneven(config)
    checkpoint = rotate(original, config, is_balanced=is_balanced)
    turned = decoder_of(AsFloats(checkpoint), rotated_config(config, checkpoint))
    expected = logits(decoder_of(AsFloats(original), config))
    assert_close(logits(turned), expected, 1e-4)
    unturned = decoder_of(AsFloats(checkpoint), config)
    error = (logits(unturned) - expected).norm() / expected.norm()
    assert error > 0.5, "the rotation changes nothing, so nothing was tested"


@pytest.mark.parametrize("modules", INPUTS)
def test_weights_meet_rotated_inputs(modules: tuple[str, ...]) -> None:
    """(x d H) ((W / d) H)^T = x W^T, where d is what came to stand in the tensor before."""
    config, prefix = QWEN2, "model.layers.1."
    original = Uneven(config)
    checkpoint = rotate(original, config)
    before = f"{prefix}{INPUTS[modules]}.weight"
    ratio = checkpoint.read(before, Target.BF16).double() / original.read(before, Target.BF16)
    if ratio.ndim == 2:  # v and up are rotated themselves; undo that first
        columns = checkpoint.read(before, Target.BF16)
        columns = transform(columns, order_for(columns.shape[1], 64)).double()
        ratio = columns / original.read(before, Target.BF16)
        ratio = ratio / ratio[:1]  # per column another factor: that of its own input
        ratio = ratio.median(1).values
    if modules == ("self_attn.o_proj",):
        ratio = ratio.view(config.num_kv_heads, 1, -1).expand(-1, 3, -1).flatten()
    weight = original.read(f"{prefix}{modules[-1]}.weight", Target.BF16).double()
    changed = checkpoint.read(f"{prefix}{modules[-1]}.weight", Target.BF16)
    if modules == ("mlp.gate_proj", "mlp.up_proj"):  # the rows of up carry the next balance
        weight = original.read(f"{prefix}mlp.gate_proj.weight", Target.BF16).double()
        changed = checkpoint.read(f"{prefix}mlp.gate_proj.weight", Target.BF16)
    if modules[0] == "self_attn.q_proj":
        weight = original.read(f"{prefix}self_attn.q_proj.weight", Target.BF16).double()
        changed = checkpoint.read(f"{prefix}self_attn.q_proj.weight", Target.BF16)
    x = gaussian(4, weight.shape[1]).double()
    turned = transform((x * ratio).float(), order_for(weight.shape[1], 64)).double()
    found, expected = turned @ changed.double().T, x @ weight.T
    scale = (found * expected).sum() / expected.square().sum()  # ratio[:1] left one factor open
    assert_close(found / scale, expected, 1e-4)


def test_a_balanced_rotation_makes_a4_activations_agree() -> None:
    config = replace(TINY, hidden_size=128, intermediate_size=256, num_heads=8)
    original = Uneven(config)
    errors = []
    for checkpoint in (
        original,
        rotate(original, config, is_balanced=False),
        rotate(original, config),
    ):
        fields = getattr(checkpoint, "metadata", {}).get(ROTATION_KEY, {})
        decoder = decoder_of(checkpoint, replace(config, **fields), Target.INT4)
        exact, draft = logits(decoder), logits(decoder, draft_view(Activation.A4))
        errors.append(float((draft - exact).norm() / exact.norm()))
    plain, unbalanced, balanced = errors
    assert balanced < 0.8 * plain
    assert balanced < 0.9 * unbalanced


def test_magnitudes_are_those_of_the_linears_inputs() -> None:
    original = Uneven(TINY)
    found = input_magnitudes(original, TINY, CalibrationText.of(TOKENS))
    assert found.keys() == {f"model.layers.{i}.{modules[0]}" for i in (0, 1) for modules in INPUTS}
    embedded = original.read("model.embed_tokens.weight", Target.BF16).float()
    embedded = embedded[TOKENS[0] + TOKENS[1]]
    gain = original.read("model.layers.0.input_layernorm.weight", Target.BF16)
    normed = reference.rms_norm(embedded, gain, TINY.norm_eps)
    expected = normed.square().mean(0).sqrt()
    # bf16 between operations, as in the engine
    torch.testing.assert_close(
        found["model.layers.0.self_attn.q_proj"], expected, rtol=0.01, atol=0
    )


def test_a_rotated_directory_keeps_what_the_model_needs(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    original = open_checkpoint(tmp_path / "model")
    checkpoint = rotated(original, head_dim=16)
    config = read_config(checkpoint)
    assert (config.hadamard, config.head_draft) == (64, Activation.A8)
    tensors = stored_tensors(checkpoint, config, Recipe(Target.INT4))
    store.write(tmp_path / "nested", Target.INT4, config.to_dict(), tensors)
    assert read_config(open_checkpoint(tmp_path / "nested")) == config
    assert main(["inspect", str(tmp_path / "nested")]) == 0
    assert "rotated by Hadamard matrices of up to 64 rows" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "rotated" not in capsys.readouterr().out
    assert read_config(original).hadamard is None
    assert "hadamard" not in read_config(original).to_dict()


def test_what_was_not_changed_is_read_as_it_is(tmp_path: Path) -> None:
    original = Uneven(TINY)
    checkpoint = rotate(original, TINY)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert checkpoint.read(name, Target.INT4) is original.read(name, Target.INT4)
    assert checkpoint.names() == original.names()
    for name in expected_shapes(TINY):
        assert checkpoint.shape(name) == tuple(checkpoint.read(name, Target.INT4).shape)


def test_refusals(tmp_path: Path) -> None:
    original = Uneven(TINY)
    once = rotated(original, head_dim=16)
    with refused("rotated any more"):
        rotated(once, head_dim=16)
    with refused("no magnitudes", "model.layers.0.self_attn.q_proj"):
        rotated(original, head_dim=16, magnitudes={}).read(
            "model.layers.0.self_attn.k_proj.weight", Target.INT4
        )
    wrong = {"model.layers.0.mlp.down_proj": torch.ones(5)}
    with refused("shape (5,)", "(96,)"):
        rotated(original, head_dim=16, magnitudes=wrong).read(
            "model.layers.0.mlp.down_proj.weight", Target.INT4
        )
    for order in (48, 0, True):
        with refused("no power of two"):
            replace(TINY, hadamard=order)


def test_a_silent_channel_stays_finite() -> None:
    original = Uneven(TINY)
    magnitudes = input_magnitudes(original, TINY, CalibrationText.of(TOKENS))
    magnitudes = {name: values.clone() for name, values in magnitudes.items()}
    for values in magnitudes.values():
        values[3] = 0.0
    checkpoint = rotated(original, head_dim=16, magnitudes=magnitudes)
    for name in expected_shapes(TINY):
        value = checkpoint.read(name, Target.INT4)
        assert not isinstance(value, Dense)
        assert value.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_head_of_a_rotated_model_drafts_with_wider_activations(backend: str) -> None:
    config = replace(TINY, hadamard=64, head_draft=Activation.A8)
    decoders = [
        load_decoder(Uneven(c), c, Recipe(Target.INT4), get_backend(backend), num_positions=64)
        for c in (config, replace(config, head_draft=None))
    ]
    for activation, same in ((Activation.A4, False), (Activation.A8, True), (Activation.A16, True)):
        wide, narrow = (logits(decoder, draft_view(activation)) for decoder in decoders)
        assert torch.equal(wide, narrow) is same
    assert torch.equal(logits(decoders[0]), logits(decoders[1]))


@pytest.mark.weights
@pytest.mark.soak
def test_smollm2_says_the_same_after_rotation(smollm2: Path) -> None:
    llm = LLM(smollm2, target="bf16", max_tokens_in_kv=512)
    checkpoint = open_checkpoint(smollm2)
    text = llm.encode("The three primary colours are red, yellow and blue. Water boils at 100 C.")
    magnitudes = input_magnitudes(checkpoint, llm.model_config, CalibrationText.of([text]))
    turned = rotated(checkpoint, head_dim=llm.model_config.head_dim, magnitudes=magnitudes)
    config = read_config(turned)
    decoder = load_decoder(turned, config, Recipe(Target.BF16), llm.decoder.ops, num_positions=64)
    tokens = torch.tensor(text)
    size = len(text)
    rows = Rows(
        torch.arange(size), torch.arange(size), torch.tensor([0, size]), torch.tensor([size]),
        torch.arange(-(-size // 16))[None], is_prompt=True,
    )  # fmt: skip
    outs = [
        d.forward(tokens, rows, allocate(config, 4, d.dtype), VERIFY, None)
        for d in (llm.decoder, decoder)
    ]
    assert (outs[0].argmax(-1) == outs[1].argmax(-1)).float().mean() > 0.9
