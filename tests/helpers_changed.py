"""What the tests of checkpoints that are changed as they are read have in common."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from helpers_engine import RandomCheckpoint
from qspec_llm.kernels import Rows, reference
from qspec_llm.kv.pool import allocate
from qspec_llm.model.config import ModelConfig
from qspec_llm.model.decoder import Decoder
from qspec_llm.model.load import load_decoder
from qspec_llm.weights.planes import Dense
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.view import VERIFY


class UnevenCheckpoint(RandomCheckpoint):
    """A random model in which every n-th row of some tensors is larger, by the ends of their names.

    `factors` says which: {end of a name: (n, times)}.
    """

    factors: ClassVar[dict[str, tuple[int, int]]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, seed=1)
        self.metadata: dict[str, Any] = {}
        for name, tensor in self._tensors.items():
            for end, (step, times) in self.factors.items():
                if name.endswith(end):
                    tensor[::step] *= times


class AsFloats:
    """A checkpoint that is neither nested nor rounded."""

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint, self.path = checkpoint, checkpoint.path

    def names(self) -> list[str]:
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def read(self, name: str, target: Target) -> Dense:
        return Dense(self._checkpoint.read(name, target).float(), "a test")


def decoder_of(
    checkpoint: Any, config: ModelConfig, target: Target = Target.BF16, ops: Any = reference
) -> Decoder:
    return load_decoder(
        checkpoint, config, Recipe(target), ops, num_positions=64, dtype=torch.float32
    )


def logits(decoder: Decoder, view: Any = VERIFY, num_tokens: int = 33) -> Tensor:
    positions = torch.arange(num_tokens)
    rows = Rows(
        positions, positions, torch.tensor([0, num_tokens]), torch.tensor([num_tokens]),
        torch.arange(3)[None], is_prompt=True,
    )  # fmt: skip
    kv = allocate(decoder.config, 3, decoder.dtype)
    return decoder.forward(positions * 7 % 97, rows, kv, view, None)
