"""How large the inputs of a model's linears are, channel by channel, on some text."""

from collections.abc import Sequence

from torch import Tensor

from qspec_llm.model.config import ModelConfig
from qspec_llm.model.decoder import rope_table
from qspec_llm.model.load import EMBEDDING, ROPE_FACTORS, expected_shapes
from qspec_llm.quantize.layer import read_floats
from qspec_llm.quantize.streams import advance, start
from qspec_llm.quantize.text import CalibrationText
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.methods import Moments
from qspec_llm.weights.view import Activation

__all__ = ["MAGNITUDE_TOKENS", "input_magnitudes"]

MAGNITUDE_TOKENS = 4096


def input_magnitudes(
    checkpoint: Checkpoint, config: ModelConfig, text: CalibrationText
) -> dict[str, Tensor]:
    """Root mean square of every channel of the linears' inputs, layer by layer.

    Args:
        checkpoint: unrotated weights.
        config: of the model.
        text: of which the first `MAGNITUDE_TOKENS` are read.

    Returns:
        [K] float32 under the full name of the first linear of each input, as
        `weights.rotation.rotated` wants them.
    """
    text = text.first(MAGNITUDE_TOKENS)
    names = [*expected_shapes(config)]
    factors = read_floats(checkpoint, ROPE_FACTORS) if ROPE_FACTORS in checkpoint.names() else None
    streams = start(
        text,
        read_floats(checkpoint, EMBEDDING)[text.tokens],
        rope_table(config, int(text.positions.max()) + 1, factors),
        Activation.A16,
        reads_exact_kv=False,
    )
    found: dict[str, Tensor] = {}

    def note(modules: Sequence[str], weight: Tensor, moments: Moments) -> Tensor:
        found[modules[0]] = moments.second.diagonal().sqrt()
        return weight

    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        layer = {name: read_floats(checkpoint, name) for name in names if name.startswith(prefix)}
        advance(streams, config, layer, prefix, note)
    return found
