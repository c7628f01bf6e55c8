"""A LoRA adapter (Hu et al. 2021) in PEFT's format, merged into the 16-bit weights at load.

    DIR/adapter_config.json          r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, ...
    DIR/adapter_model.safetensors    base_model.model.MODULE.lora_A.weight  [r, K]
                                     base_model.model.MODULE.lora_B.weight  [N, r]

W + (alpha / r) B A is computed in float32 and rounded once where the weight is nested; with
rank-stabilised LoRA (Kalajdzievski 2023) the factor is alpha / sqrt(r). Nesting comes after, so the
delta acts in both views by construction, and costs nothing while running.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.checkpoint.changed import ChangedCheckpoint
from qspec_llm.weights.checkpoint.safetensors_dir import open_safetensors, read_json
from qspec_llm.weights.planes import Stored
from qspec_llm.weights.quantize import Target

__all__ = ["AdaptedCheckpoint", "Adapter", "Delta", "merge"]

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# ways to begin training that change the weights an adapter is added to
MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """What is added to one weight: scale * B A."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, [N, K]."""
        return self.b.shape[0], self.a.shape[1]

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight [N, K] with the delta, float32."""
        return weight.float() + (self.b.float() @ self.a.float()).mul_(self.scale)


class Adapter:
    """An adapter on disk: module names to deltas.

    Raises:
        QSpecError: it is no LoRA adapter of matrices, or asks for more than adding a delta.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG_NAME)
        for reason in _obstacles(self.config):
            raise QSpecError(f"the adapter {path} cannot be applied: {reason}")
        if not (path / WEIGHTS_NAME).exists():
            raise QSpecError(f"{path / WEIGHTS_NAME} is missing (pickled adapters are not read)")
        file = open_safetensors(path / WEIGHTS_NAME)
        names = set(file.keys())
        self.deltas = {module: self._delta(file, module) for module in _modules(path, names)}

    def _delta(self, file: Any, module: str) -> Delta:
        a = file.get_tensor(f"{PREFIX}{module}.lora_A.weight")
        b = file.get_tensor(f"{PREFIX}{module}.lora_B.weight")
        rank = int(_by_pattern(self.config.get("rank_pattern"), module, self.config["r"]))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise QSpecError(
                f"{module!r} of {self.path} has A {tuple(a.shape)} and B {tuple(b.shape)}, "
                f"not of rank {rank} as its configuration says"
            )
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self._alpha))
        return Delta(a, b, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    @property
    def _alpha(self) -> float:
        value = self.config.get("lora_alpha")
        return float(8 if value is None else value)  # PEFT's default


def merge(checkpoint: Checkpoint, path: Path) -> "AdaptedCheckpoint":
    """A checkpoint whose weights have an adapter's deltas in them.

    Raises:
        QSpecError: the adapter cannot be applied, or is another model's.
    """
    return AdaptedCheckpoint(checkpoint, Adapter(path))


class AdaptedCheckpoint(ChangedCheckpoint):
    """A checkpoint and an adapter; deltas are added as tensors are read."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        super().__init__(checkpoint)
        self._adapter = adapter
        self.target = getattr(checkpoint, "target", None)
        names = set(checkpoint.names())
        for module, delta in adapter.deltas.items():
            name = f"{module}.weight"
            if name not in names:
                raise QSpecError(f"{adapter.path} adapts {module!r}, which {self.path} has not")
            if (shape := tuple(checkpoint.shape(name))) != delta.shape:
                raise QSpecError(
                    f"{adapter.path} adds {delta.shape} to {name!r}, which is {shape}: it was made "
                    "for another model"
                )
        if "lm_head" in adapter.deltas and checkpoint.metadata.get("tie_word_embeddings"):
            raise QSpecError(f"{adapter.path} adapts an LM head that is tied to the embedding")

    def read(self, name: str, target: Target) -> Tensor | Stored:
        """One tensor; float32 with its delta where the adapter has one."""
        value = super().read(name, target)
        delta = self._adapter.deltas.get(name.removesuffix(".weight"))
        if delta is None or not name.endswith(".weight"):
            return value
        if not isinstance(value, Tensor):
            raise QSpecError(
                f"{name!r} of {self.path} keeps its own {self.type_name(name)} codes under the "
                f"{target.value} target, so no adapter can be merged into it; use --target bf16 or "
                "the 16-bit checkpoint"
            )
        return delta.added_to(value)


def _obstacles(config: Mapping[str, Any]) -> Iterator[str]:
    """Why an adapter is more than a delta for matrices."""
    if (kind := config.get("peft_type")) != "LORA":
        yield f"its type is {kind!r}, not LORA"
    if type(config.get("r")) is not int or config["r"] < 1:
        yield f"its rank is {config.get('r')!r}"
    if (bias := config.get("bias", "none")) != "none" or config.get("lora_bias"):
        yield f"it trains biases ({bias!r})"
    for key in ("use_dora", "fan_in_fan_out", "modules_to_save", "trainable_token_indices"):
        if config.get(key):
            yield f"its {key} is {config[key]!r}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVED_BASES):
        yield f"it was begun with {start!r}, which changes the base; convert it to plain LoRA"


def _modules(path: Path, names: set[str]) -> list[str]:
    """Modules that have A and B; anything else in the file is an error."""
    modules = {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        for name in names
        if name.startswith(PREFIX) and name.endswith(".lora_A.weight")
    }
    expected = {f"{PREFIX}{m}.lora_{side}.weight" for m in modules for side in "AB"}
    if odd := names ^ expected:
        raise QSpecError(
            f"{path / WEIGHTS_NAME} has {min(odd)!r} missing or too much; only A and B of linears "
            "are read"
        )
    if not modules:
        raise QSpecError(f"{path / WEIGHTS_NAME} holds no deltas")
    return sorted(modules)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
