"""A Hugging Face model directory: config.json and one or more .safetensors files."""

import json
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.planes import Stored
from qspec_llm.weights.quantize import Target

__all__ = ["SafetensorsCheckpoint", "open_safetensors", "read_json"]

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        QSpecError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QSpecError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise QSpecError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise QSpecError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _files(path: Path) -> list[str]:
    """Names of the weight files: those in the index where there is one, else all."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return sorted(file.name for file in path.glob("*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise QSpecError(f"{index} has no weight_map, so it does not say where tensors are")
    return sorted({str(name) for name in weight_map.values()})


def open_safetensors(path: Path) -> Any:
    """Open one .safetensors file for reading single tensors.

    Raises:
        QSpecError: the file is missing, truncated or corrupt.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise QSpecError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise QSpecError(f"{path} is not a readable safetensors file: {error}") from None


class SafetensorsCheckpoint:
    """Reads one tensor at a time; files stay memory-mapped."""

    kind: Literal["hf", "gguf", "nested"] = "hf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Metadata = read_json(path / "config.json")
        self._where: dict[str, Any] = {}
        for file in _files(path):
            opened = open_safetensors(path / file)
            self._where.update(dict.fromkeys(opened.keys(), opened))

    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._where)

    def type_name(self, name: str) -> str:
        """The safetensors dtype of a tensor."""
        return str(self._slice(name).get_dtype())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def read(
        self,
        name: str,
        target: Target,  # noqa: ARG002  # floats nest for any
    ) -> Tensor | Stored:
        """One tensor in the file's own float dtype."""
        if (dtype := self.type_name(name)) not in FLOAT_TYPES:
            raise QSpecError(f"tensor {name!r} of {self.path} is {dtype}, not one of {FLOAT_TYPES}")
        return self.tensor(name)

    def has(self, name: str) -> bool:
        """Whether the files hold a tensor of that very name."""
        return name in self._where

    def raw_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as the file has it."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One tensor as the file has it, of any dtype."""
        if name not in self._where:
            raise QSpecError(f"{self.path} has no tensor {name!r}")
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        if name not in self._where:
            raise QSpecError(f"{self.path} has no tensor {name!r}")
        return self._where[name].get_slice(name)
