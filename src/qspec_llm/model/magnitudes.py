"""How large the inputs of a model's linears are, channel by channel, on some text."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.rotation import INPUTS
from qspec_llm.weights.view import VERIFY

__all__ = ["input_magnitudes"]

BLOCK = 16  # KV positions in a block


def input_magnitudes(decoder: Decoder, sequences: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """Root mean square of every channel of the linears' inputs in the verify view.

    Args:
        decoder: an unrotated model on any backend.
        sequences: token ids, each read from its first position on.

    Returns:
        [K] float32 under the full name of the first linear of each input, as
        `weights.rotation.rotated` wants them.
    """
    watch = _Watch(decoder)
    for tokens in sequences:
        watch.read(list(tokens))
    return {name: (total / watch.num_rows).sqrt() for name, total in watch.totals.items()}


class _Watch:
    """A decoder that runs operation by operation, and the sums of squares that its linears saw."""

    def __init__(self, decoder: Decoder) -> None:
        self.totals: dict[str, Tensor] = {}
        self.num_rows = 0
        self._names: dict[int, str] = {}
        for index, layer in enumerate(decoder.layers):
            linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
            for linear, modules in zip(linears, INPUTS, strict=True):
                self._names[id(linear.parts[0][0])] = f"model.layers.{index}.{modules[0]}"
        self._decoder = replace(decoder, ops=_WatchedOps(self, decoder.ops))

    def read(self, tokens: list[int]) -> None:
        """One sequence, from its beginning."""
        config, device = self._decoder.config, self._decoder.ops.device
        num_blocks = -(-len(tokens) // BLOCK)
        shape = (num_blocks * BLOCK, config.num_kv_heads, config.head_dim)

        def pool() -> Tensor:
            return torch.zeros(shape, dtype=self._decoder.dtype, device=device)

        kv = [LayerKV(pool(), pool(), BLOCK) for _ in self._decoder.layers]
        positions = torch.arange(len(tokens))
        rows = Rows(
            positions=positions,
            slots=positions,
            cu_rows=torch.tensor([0, len(tokens)]),
            contexts=torch.tensor([len(tokens)]),
            block_tables=torch.arange(num_blocks)[None],
            is_prompt=True,
        )
        nothing = torch.empty(0, dtype=torch.int64)
        self._decoder.forward(torch.tensor(tokens), rows, kv, VERIFY, nothing)
        self.num_rows += len(tokens)

    def note(self, x: Tensor, weight: object) -> None:
        """Add what a linear sees: x [R, K]."""
        if (name := self._names.get(id(weight))) is not None:
            squares = x.float().square().sum(0).cpu()
            self.totals[name] = self.totals.get(name, torch.zeros_like(squares)) + squares


class _WatchedOps:
    """A backend that tells what its linears see."""

    def __init__(self, watch: _Watch, ops: Any) -> None:
        self._watch, self._ops = watch, ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def linear(self, x: Tensor, weight: Any, *arguments: Any) -> Tensor:
        """The backend's `linear`."""
        self._watch.note(x, weight)
        result: Tensor = self._ops.linear(x, weight, *arguments)
        return result

    def whole_step(self, decoder: Any) -> None:
        """None: in one call nothing could be seen."""
