"""GPTQ checkpoints (Frantar et al. 2022) as AutoGPTQ and GPTQModel write them.

    qweight  [K bits/32, N]       int32  codes of one output, consecutive inputs in a word
    qzeros   [groups, N bits/32]  int32  zero points; format "gptq" (v1) holds z - 1, "gptq_v2" z
    scales   [groups, N]          float16 or bfloat16
    g_idx    [K]                  int32  the group of each input

In v1 a stored zero point of all ones stands for z = 0: it is taken modulo 2^bits, as AutoGPTQ does.
Under act-order (`desc_act` without static groups) g_idx is a permutation's and the matrix is
dequantised.
"""

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.checkpoint.quantised import Codes, QuantisedCheckpoint, unpack_words

__all__ = ["GPTQCheckpoint"]

FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point


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
        self._zero_step = FORMATS[form]

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
        zeros = unpack_words(self.tensor(f"{module}.qzeros"), bits).to(torch.int16)
        scale = self.tensor(f"{module}.scales")
        index = self.group_index(module)
        if index is None:
            index = torch.arange(values.shape[1]) // (values.shape[1] // scale.shape[0])
        zeros = (zeros + self._zero_step) % (1 << bits)
        return Codes(values, scale.T, zeros.T, bits, index)

    def _raw_shape(self, module: str, part: str) -> tuple[int, ...]:
        return self.raw_shape(f"{module}.{part}")
