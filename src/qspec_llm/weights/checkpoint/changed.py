"""Checkpoints that are another one with some of its tensors changed as they are read."""

from typing import Literal

from torch import Tensor

from qspec_llm.weights.checkpoint.base import Checkpoint, Metadata
from qspec_llm.weights.planes import Planes, Stored, verify_weight
from qspec_llm.weights.quantize import Target

__all__ = ["ChangedCheckpoint"]


class ChangedCheckpoint:
    """Names, shapes and types of `original`; what derives from this changes values."""

    def __init__(self, original: Checkpoint) -> None:
        self.original = original
        self.path = original.path
        self.kind: Literal["hf", "gguf", "nested"] = original.kind
        self.metadata: Metadata = original.metadata

    def names(self) -> list[str]:
        """The names of all tensors."""
        return self.original.names()

    def type_name(self, name: str) -> str:
        """What the original's file stores for a tensor."""
        return self.original.type_name(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.original.shape(name)

    def read(self, name: str, target: Target) -> Tensor | Stored:
        """One tensor, as the original has it."""
        return self.original.read(name, target)

    def values(self, name: str) -> Tensor:
        """A tensor of the original as numbers, in the file's own dtype or dequantised."""
        value = self.original.read(name, Target.BF16)
        if isinstance(value, Tensor):
            return value
        return verify_weight(value) if isinstance(value, Planes) else value.weight
