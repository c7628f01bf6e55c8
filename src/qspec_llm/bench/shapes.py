"""Models of well-known sizes with random weights: speed needs no checkpoint."""

import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qspec_llm.model.config import ModelConfig
from qspec_llm.model.load import expected_shapes
from qspec_llm.weights.checkpoint import Metadata
from qspec_llm.weights.quantize import Target

__all__ = ["SHAPES", "RandomCheckpoint"]


def _shape(
    family: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    head_dim: int,
    vocab: int,
    *,
    tied: bool,
) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        norm_eps=1e-5,
        rope_theta=1e5,
        rope_scaling=None,
        tied_head=tied,
        context_length=8192,
    )


SHAPES = {
    "smollm2-135m": _shape("llama", 576, 1536, 30, (9, 3), 64, 49152, tied=True),
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, (14, 2), 64, 151936, tied=True),
    "llama-3.2-1b": _shape("llama", 2048, 8192, 16, (32, 8), 64, 128256, tied=True),
    "llama-3-8b": _shape("llama", 4096, 14336, 32, (32, 8), 128, 128256, tied=False),
    "qwen2.5-32b": _shape("qwen2", 5120, 27648, 64, (40, 8), 128, 152064, tied=False),
}


class RandomCheckpoint:
    """Gaussian weights of one shape, made when they are read; norms are ones."""

    kind: Literal["hf", "gguf", "nested"] = "nested"

    def __init__(self, name: str) -> None:
        self.path = Path(f"random weights of shape {name}")
        self.config = SHAPES[name]
        self.metadata: Metadata = self.config.to_dict()
        self._shapes = expected_shapes(self.config)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._shapes)

    def type_name(self, name: str) -> str:  # noqa: ARG002  # all alike
        """Every tensor is bf16."""
        return "BF16"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str, target: Target) -> Tensor:  # noqa: ARG002  # floats nest for any
        """One tensor, the same in every call."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weight: Tensor = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        return weight.bfloat16()
