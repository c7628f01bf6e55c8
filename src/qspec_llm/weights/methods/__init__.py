"""Rules that choose scales and levels with the help of a layer's inputs: pure functions of tensors.

`clip` searches scales, `gptq` levels; both weigh an error by what the inputs of the layer make of
it.
What the levels mean is `qspec_llm.weights.planes`, how they become planes
`qspec_llm.weights.quantize`.
"""

from qspec_llm.weights.methods.awq import input_scale
from qspec_llm.weights.methods.clip import search_offset, search_scale
from qspec_llm.weights.methods.gptq import fit_levels, refit_scale
from qspec_llm.weights.methods.levels import (
    LevelRange,
    symmetric_range,
    toward_zero_range,
    unsigned_range,
)
from qspec_llm.weights.methods.moments import Moments, compensated

__all__ = [
    "LevelRange",
    "Moments",
    "compensated",
    "fit_levels",
    "input_scale",
    "refit_scale",
    "search_offset",
    "search_scale",
    "symmetric_range",
    "toward_zero_range",
    "unsigned_range",
]
