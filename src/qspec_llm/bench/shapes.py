"""Models of well-known sizes with random weights: speed needs no checkpoint."""

import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qspec_llm.model.config import ModelConfig
from qspec_llm.model.load import expected_shapes
from qspec_llm.weights.checkpoint import Metadata
from qspec_llm.weights.planes import Grid, Planes, PlaneSpec
from qspec_llm.weights.quantize import Target, draft_bits

__all__ = ["SHAPES", "RandomCheckpoint", "spec_of"]

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


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
    """Random weights of one shape, made when they are read; norms are ones.

    On the host they are Gaussian and are nested like any. On a GPU they are made there as random
    planes of the target's form, whose speed is that of any other weights: billions of weights need
    no search for scales to be multiplied with.

    Args:
        name: one of `SHAPES`.
        device: where to make them.
        group: weights that share one scale, for planes.
    """

    kind: Literal["hf", "gguf", "nested"] = "nested"

    def __init__(self, name: str, device: torch.device | None = None, group: int = 32) -> None:
        self._device, self._group = device or torch.device("cpu"), group
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

    def read(self, name: str, target: Target) -> Tensor | Planes:
        """One tensor, the same in every call."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        if self._device.type != "cpu":
            return self._planes(shape, target, name in VOCABULARY, generator)
        weight: Tensor = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        return weight.bfloat16()

    def _planes(
        self, shape: tuple[int, ...], target: Target, is_vocabulary: bool, rng: torch.Generator
    ) -> Planes:
        """Random codes; scales that give weights of about the usual size, K^-1/2."""
        spec = spec_of(target, shape, self._group, is_vocabulary=is_vocabulary)
        tensors = {}
        for plane, (size, dtype) in spec.shapes().items():
            if dtype != torch.uint8:
                spread = torch.rand(size, generator=rng, device=self._device) + 0.5
                tensors[plane] = (spread * shape[1] ** -0.5 / 4).to(dtype)
                continue
            codes = torch.randint(256, size, dtype=dtype, generator=rng, device=self._device)
            if plane == "r4" and spec.bits == 16:  # at most four octaves below the anchor
                codes = (codes & 0x11) + 0xCC
            tensors[plane] = codes
        return Planes.from_tensors(spec, tensors)


def spec_of(
    target: Target, shape: tuple[int, ...], group: int, *, is_vocabulary: bool
) -> PlaneSpec:
    """The form in which a matrix of a target is nested (docs/format.md)."""
    if target is Target.INT4 and not is_vocabulary:
        return PlaneSpec(shape[0], shape[1], group=group, bits=4, grid=Grid.AFFINE)
    bits = 16 if target is Target.BF16 else 8
    draft = 4 if bits == 16 else draft_bits(target)
    return PlaneSpec(shape[0], shape[1], group=group, bits=bits, grid=Grid.SIGNED, draft_bits=draft)
