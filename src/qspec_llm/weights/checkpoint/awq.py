"""AWQ checkpoints (Lin et al. 2024) in AutoAWQ's "gemm" packing.

    qweight  [K, N/8]       int32  eight outputs of one input in a word
    qzeros   [groups, N/8]  int32  zero points, packed alike
    scales   [groups, N]    float16 or bfloat16

Within a word, nibble i (the lowest first) belongs to output 0, 2, 4, 6, 1, 3, 5, 7 of the eight.
"""

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.checkpoint.quantised import Codes, QuantisedCheckpoint, unpack_words

__all__ = ["NIBBLE_OUTPUTS", "AWQCheckpoint"]

NIBBLE_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # of nibble i, the output it belongs to


class AWQCheckpoint(QuantisedCheckpoint):
    """Reads one module at a time."""

    method = "awq"
    packed = "qweight"
    parts = ("qzeros", "scales")

    def check(self, config: Metadata) -> None:
        """Refuse other packings."""
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise QSpecError(f"{self.path} is AWQ in the packing {version!r}; readable is gemm")

    def bits(self, module: str) -> int:
        """Bits of a code."""
        words = self.raw_shape(f"{module}.qweight")[1]
        return words * 32 // self.raw_shape(f"{module}.scales")[1]

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.raw_shape(f"{module}.scales")[1], self.raw_shape(f"{module}.qweight")[0]

    def group_index(self, module: str) -> Tensor | None:  # noqa: ARG002  # AWQ keeps the order
        """None: inputs are in order."""
        return None

    def codes(self, module: str) -> Codes:
        """A module's codes, scales and zero points."""
        if (bits := self.bits(module)) != 4:
            raise QSpecError(f"{module!r} of {self.path} has {bits} bits; AWQ is imported at 4")
        values = _in_order(self.tensor(f"{module}.qweight")).T.contiguous()
        zeros = _in_order(self.tensor(f"{module}.qzeros")).to(torch.int16)
        scale = self.tensor(f"{module}.scales")
        index = torch.arange(values.shape[1]) // (values.shape[1] // scale.shape[0])
        return Codes(values, scale.T, zeros.T, bits, index)


def _in_order(words: Tensor) -> Tensor:
    """Codes [R, N] uint8 of words [R, N/8] int32, outputs in order."""
    nibbles = unpack_words(words, 4).view(words.shape[0], -1, 8)
    codes = torch.empty_like(nibbles)
    codes[..., list(NIBBLE_OUTPUTS)] = nibbles
    return codes.view(words.shape[0], -1)
