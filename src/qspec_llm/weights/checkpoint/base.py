"""What every checkpoint reader offers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from qspec_llm.weights.planes import Stored
from qspec_llm.weights.quantize import Target

__all__ = ["Checkpoint", "Metadata"]

Metadata = Mapping[str, Any]


class Checkpoint(Protocol):
    """A model on disk. Tensor names are Hugging Face's ("model.layers.0.mlp.up_proj.weight")."""

    path: Path
    kind: Literal["hf", "gguf", "nested"]
    metadata: Metadata  # config.json, GGUF keys, or the model record of a nested checkpoint

    def names(self) -> list[str]:
        """The names of all tensors."""

    def type_name(self, name: str) -> str:
        """What the file stores for a tensor: "BF16", "Q4_1", ..."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, outermost dimension first."""

    def read(self, name: str, target: Target) -> Tensor | Stored:
        """One tensor: floating point in the file's own dtype, or stored form where the target
        keeps the file's own codes.

        Raises:
            QSpecError: there is no such tensor, or its bytes cannot be read.
        """
