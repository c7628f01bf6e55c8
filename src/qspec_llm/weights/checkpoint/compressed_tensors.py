"""compressed-tensors checkpoints in the "pack-quantized" format, as llm-compressor writes them.

    weight_packed      [N, ceil(K bits/32)]       int32  q + 2^(bits - 1), consecutive inputs
    weight_scale       [N, groups]                the model's dtype; groups = 1 for channels
    weight_zero_point  [ceil(N bits/32), groups]  int32, packed along N like the codes; or
                       [N, groups]                int8 in older files; absent if symmetric
    weight_shape       [2]                        N, K
    weight_g_idx       [K]                        the group of each input, under act-order "group"

Codes and zero points are signed there; both are moved by 2^(bits - 1), which changes no weight.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.checkpoint.quantised import Codes, QuantisedCheckpoint, unpack_words

__all__ = ["CompressedTensorsCheckpoint"]


class CompressedTensorsCheckpoint(QuantisedCheckpoint):
    """Reads one module at a time."""

    method = "compressed-tensors"
    packed = "weight_packed"
    parts = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def check(self, config: Metadata) -> None:
        """Refuse other formats, and what is more than integer weights."""
        for reason in _obstacles(config):
            raise QSpecError(f"{self.path} is compressed-tensors, but cannot be imported: {reason}")

    def bits(self, module: str) -> int:
        """Bits of a code."""
        words = self.raw_shape(f"{module}.weight_packed")[1]
        return round(words * 32 / self.matrix_shape(module)[1])

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """Outputs and inputs."""
        num_rows, num_cols = self.tensor(f"{module}.weight_shape").tolist()
        return num_rows, num_cols

    def group_index(self, module: str) -> Tensor | None:
        """The group of each input, where the file has it (-1 means that it has not)."""
        name = f"{module}.weight_g_idx"
        if not self.has(name):
            return None
        index = self.tensor(name).long()
        return None if (index < 0).any() else index

    def codes(self, module: str) -> Codes:
        """A module's codes, scales and zero points."""
        bits, (num_rows, num_cols) = self.bits(module), self.matrix_shape(module)
        values = unpack_words(self.tensor(f"{module}.weight_packed"), bits)[:, :num_cols]
        scale = self.tensor(f"{module}.weight_scale").view(-1, 1)
        scale = scale.view(num_rows, -1) if len(scale) > 1 else scale.expand(num_rows, 1)
        index = self.group_index(module)
        if index is None:
            index = torch.arange(num_cols) // -(-num_cols // scale.shape[1])
        zero = self._zero_points(module, bits, scale)
        return Codes(values.contiguous(), scale, zero, bits, index)

    def _zero_points(self, module: str, bits: int, scale: Tensor) -> Tensor:
        """Zero points [N, groups] int16 of the unsigned codes."""
        name, middle = f"{module}.weight_zero_point", 1 << (bits - 1)
        if not self.has(name):
            return torch.full(scale.shape, middle, dtype=torch.int16)
        stored = self.tensor(name)
        if stored.dtype is torch.int32:
            return unpack_words(stored.T, bits)[:, : scale.shape[0]].T.to(torch.int16)
        return (stored.to(torch.int16) + middle).view(-1, stored.shape[-1]).expand(scale.shape)


def _obstacles(config: Metadata) -> Iterator[str]:
    """Why a quantization_config asks for more than reading integers."""
    if (form := config.get("format")) != "pack-quantized":
        yield f"its format is {form!r}; readable is pack-quantized"
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        # an empty record, or one that says "dense", asks for nothing
        if (value := config.get(key)) and value.get("format", "") != "dense":
            yield f"it has a {key}, which is not applied here"
    for scheme in (config.get("config_groups") or {}).values():
        for key in ("input_activations", "output_activations"):
            if scheme.get(key):
                yield f"it was made for quantised {key.replace('_', ' ')}"
        weights = scheme.get("weights") or {}
        if weights.get("type", "int") != "int":
            yield f"its weights are {weights['type']}, not int"
        if (own := scheme.get("format")) not in (None, "pack-quantized"):
            yield f"a part of it has the format {own!r}; readable is pack-quantized"
