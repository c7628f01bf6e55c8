"""GPTQ checkpoints (Frantar et al. 2022) as AutoGPTQ and GPTQModel write them.

    qweight  [K bits/32, N]       int32  codes of one output, consecutive inputs in a word
    qzeros   [groups, N bits/32]  int32  zero points; "gptq_v2" holds z, "gptq" (v1) z - 1
    scales   [groups, N]          float16 or bfloat16
    g_idx    [K]                  int32  the group of each input

In v1 the ones were taken off whole words, so a zero point of 0 borrows from its neighbour; they are
added to whole words again, as GPTQModel does.
Under act-order (`desc_act` without static groups) g_idx is a permutation's and the matrix is
dequantised.
"""

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.checkpoint.quantised import Codes, QuantisedCheckpoint, unpack_words

__all__ = ["GPTQCheckpoint"]

FORMATS = {"gptq": True, "gptq_v2": False}  # whether zero points are stored less 1
ONES = {4: 0x11111111, 8: 0x01010101}


class GPTQCheckpoint(QuantisedCheckpoint):
    """Reads one module at a time."""

    method = "gptq"
    packed = "qweight"
    parts = ("qzeros", "scales", "g_idx")

    def check(self, config: Metadata) -> None:
        """Refuse what is not v1 or v2."""
        # older files do not say; all of them are v1
        form = config.get("checkpoint_format") or "gptq"
        if form not in FORMATS or config.get("is_marlin_format"):
            raise QSpecError(
                f"{self.path} is GPTQ in the format {form!r}; readable are {', '.join(FORMATS)}"
            )
        self._is_v1 = FORMATS[form]

    def bits(self, module: str) -> int:
        """Bits of a code: zero points are packed like codes."""
        return self._raw_shape(module, "qzeros")[1] * 32 // self._raw_shape(module, "scales")[1]

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """Outputs and inputs."""
        words, num_rows = self._raw_shape(module, "qweight")
        return num_rows, words * 32 // self.bits(module)

    def group_index(self, module: str) -> Tensor | None:
        """The group of each input, where the file has it."""
        name = f"{module}.g_idx"
        return self.tensor(name).long() if self.has(name) else None

    def codes(self, module: str) -> Codes:
        """A module's codes, scales and zero points."""
        bits = self.bits(module)
        values = unpack_words(self.tensor(f"{module}.qweight").T, bits)
        zeros = self.tensor(f"{module}.qzeros")
        if self._is_v1:
            zeros = _plus(zeros, ONES[bits])
        scale = self.tensor(f"{module}.scales")
        index = self.group_index(module)
        if index is None:
            index = torch.arange(values.shape[1]) // (values.shape[1] // scale.shape[0])
        zero = unpack_words(zeros, bits).to(torch.int16)
        return Codes(values, scale.T, zero.T, bits, index)

    def _raw_shape(self, module: str, part: str) -> tuple[int, ...]:
        return self.raw_shape(f"{module}.{part}")


def _plus(words: Tensor, ones: int) -> Tensor:
    """int32 words plus a constant, modulo 2^32."""
    total = (words.long() + ones) & 0xFFFFFFFF
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)
