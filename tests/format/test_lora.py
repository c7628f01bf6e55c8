"""LoRA adapters in PEFT's format against the formula, from file to both views."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers_model_dir import write_model
from helpers_weights import assert_same_bits, gaussian, refused
from qspec_llm.cli import main
from qspec_llm.engine.params import SamplingParams
from qspec_llm.llm import LLM
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.lora import merge
from qspec_llm.weights.planes import Planes, verify_weight
from qspec_llm.weights.quantize import Recipe, Target, nest

UP = "model.layers.0.mlp.up_proj"  # [96, 64]
QUERY = "model.layers.1.self_attn.q_proj"  # [64, 64]
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none", "target_modules": ["q"]}


def write_adapter(
    path: Path,
    *,
    ranks: dict[str, int] | None = None,
    tensors: dict[str, Tensor] | None = None,
    **changes: Any,
) -> dict[str, tuple[Tensor, Tensor]]:
    """An adapter of random matrices; A and B by module."""
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    shapes = {UP: (96, 64), QUERY: (64, 64)}
    made = {
        module: (gaussian((ranks or {}).get(module, 4), k, seed=i), gaussian(
            n, (ranks or {}).get(module, 4), seed=i + 7) * 0.01)
        for i, (module, (n, k)) in enumerate(shapes.items())
    }  # fmt: skip
    named = {}
    for module, (a, b) in made.items():
        named[f"base_model.model.{module}.lora_A.weight"] = a
        named[f"base_model.model.{module}.lora_B.weight"] = b
    save_file({**named, **(tensors or {})}, path / "adapter_model.safetensors")
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_model(path)
    return path


def original(model: Path, name: str) -> Tensor:
    with safe_open(model / "model.safetensors", framework="pt") as file:
        weight: Tensor = file.get_tensor(name)
        return weight


@pytest.mark.parametrize("is_rank_stabilised", [False, True])
def test_weights_are_merged_by_the_formula(
    tmp_path: Path, model: Path, is_rank_stabilised: bool
) -> None:
    made = write_adapter(tmp_path / "lora", use_rslora=is_rank_stabilised)
    checkpoint = merge(open_checkpoint(model), tmp_path / "lora")
    factor = 12 / (math.sqrt(4) if is_rank_stabilised else 4)
    for module, (a, b) in made.items():
        expected = original(model, f"{module}.weight").double() + factor * (b.double() @ a.double())
        found = checkpoint.read(f"{module}.weight", Target.BF16)
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(found, original(model, f"{module}.weight").float())
    other = "model.layers.1.mlp.up_proj.weight"
    assert_same_bits(checkpoint.read(other, Target.BF16), original(model, other))
    assert checkpoint.names() == open_checkpoint(model).names()


def test_ranks_and_alphas_by_pattern(tmp_path: Path, model: Path) -> None:
    made = write_adapter(
        tmp_path / "lora",
        ranks={UP: 2},
        rank_pattern={"mlp.up_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 6},
    )
    checkpoint = merge(open_checkpoint(model), tmp_path / "lora")
    for module, factor in ((UP, 12 / 2), (QUERY, 6 / 4)):
        a, b = made[module]
        expected = original(model, f"{module}.weight").float() + factor * (b @ a)
        torch.testing.assert_close(checkpoint.read(f"{module}.weight", Target.INT8), expected)


def test_the_delta_is_in_the_nested_weight(tmp_path: Path, model: Path) -> None:
    """What the verify view reads is the merged weight, rounded once to bf16."""
    write_adapter(tmp_path / "lora")
    checkpoint = merge(open_checkpoint(model), tmp_path / "lora")
    merged = checkpoint.read(f"{UP}.weight", Target.BF16)
    assert isinstance(merged, Tensor)
    planes = nest(merged, Recipe(Target.BF16))
    assert isinstance(planes, Planes)
    assert_same_bits(verify_weight(planes), merged.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 0}, "rank"),
        ({"bias": "all"}, "biases"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 8}, "rank 8"),
    ],
)
def test_what_is_more_than_a_delta_is_refused(
    tmp_path: Path, model: Path, changes: dict[str, Any], word: str
) -> None:
    write_adapter(tmp_path / "lora", **changes)
    with refused(tmp_path / "lora", word):
        merge(open_checkpoint(model), tmp_path / "lora")


def test_tensors_that_are_no_deltas_are_refused(tmp_path: Path, model: Path) -> None:
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    write_adapter(tmp_path / "lora", tensors={name: torch.zeros(4, 4)})
    with refused(name):
        merge(open_checkpoint(model), tmp_path / "lora")


def test_another_models_adapter_is_refused(tmp_path: Path, model: Path) -> None:
    name = "base_model.model.model.layers.7.mlp.up_proj"
    more = {
        f"{name}.lora_A.weight": torch.zeros(4, 64),
        f"{name}.lora_B.weight": torch.zeros(96, 4),
    }
    write_adapter(tmp_path / "lora", tensors=more)
    with refused("layers.7"):
        merge(open_checkpoint(model), tmp_path / "lora")
    narrow = name.replace("layers.7.mlp.up_proj", "layers.1.mlp.up_proj")
    more = {
        f"{narrow}.lora_A.weight": torch.zeros(4, 32),
        f"{narrow}.lora_B.weight": torch.zeros(96, 4),
    }
    write_adapter(tmp_path / "narrow", tensors=more)
    with refused("(96, 32)", "another model"):
        merge(open_checkpoint(model), tmp_path / "narrow")


def test_a_missing_or_pickled_adapter_is_refused(tmp_path: Path, model: Path) -> None:
    with refused("adapter_config.json"):
        merge(open_checkpoint(model), tmp_path / "nowhere")
    write_adapter(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora/adapter_model.bin")
    with refused("adapter_model.safetensors", "pickled"):
        merge(open_checkpoint(model), tmp_path / "lora")


@pytest.mark.parametrize("target", ["bf16", "int8", "int4"])
def test_a_model_with_an_adapter_is_the_model_merged_by_hand(
    tmp_path: Path, model: Path, target: str
) -> None:
    """Tokens and log-probabilities, drafts included, are those of a checkpoint merged on disk."""
    made = write_adapter(tmp_path / "lora")
    merged = shutil.copytree(model, tmp_path / "merged")
    tensors = load_file(model / "model.safetensors")
    for module, (a, b) in made.items():
        weight = tensors[f"{module}.weight"].float() + 12 / 4 * (b @ a)
        tensors[f"{module}.weight"] = weight.to(torch.bfloat16)
    save_file(tensors, merged / "model.safetensors")
    params = SamplingParams(max_tokens=16, temperature=0, logprobs=0)
    options = {"target": target, "gamma": 2, "max_tokens_in_kv": 1024}
    adapted = LLM(model, lora=tmp_path / "lora", **options)
    found = adapted.generate("hello", params)[0].outputs[0]
    assert found == LLM(merged, **options).generate("hello", params)[0].outputs[0]
    assert found.logprobs != LLM(model, **options).generate("hello", params)[0].outputs[0].logprobs


def test_the_command_takes_an_adapter(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "lora", use_dora=True)
    command = ["generate", str(model), "--prompt", "hi", "--max-tokens", "2", "--lora"]
    assert main([*command, str(tmp_path / "lora")]) == 2
    assert "use_dora" in capsys.readouterr().err
    write_adapter(tmp_path / "good")
    assert main([*command, str(tmp_path / "good")]) == 0


class Planar:
    """A checkpoint that keeps the file's own 4-bit codes."""

    kind = "gguf"
    metadata: dict[str, object] = {}  # noqa: RUF012
    path = Path("four-bits.gguf")

    def names(self) -> list[str]:
        return [f"{UP}.weight", f"{QUERY}.weight"]

    def type_name(self, name: str) -> str:
        return "Q4_1"

    def shape(self, name: str) -> tuple[int, ...]:
        return (96, 64) if name.startswith(UP) else (64, 64)

    def read(self, name: str, target: Target) -> object:
        weight = gaussian(*self.shape(name))
        return nest(weight, Recipe(target)) if target is Target.INT4 else weight


def test_weights_that_keep_their_codes_are_refused_with_the_way_out(tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora")
    checkpoint = merge(Planar(), tmp_path / "lora")  # type: ignore[arg-type]
    with refused("Q4_1", "int4", "--target bf16"):
        checkpoint.read(f"{UP}.weight", Target.INT4)
    assert isinstance(checkpoint.read(f"{UP}.weight", Target.BF16), Tensor)
