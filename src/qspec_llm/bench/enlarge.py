"""A small model at the sizes of a large one: the same function, so real text at real speed.

Width, heads and vocabulary are padded and layers are added so that nothing changes:

- New channels are zero everywhere. RMSNorm then averages over D channels instead of d, which a
  weight scaled by sqrt(d / D) and an epsilon scaled by d / D undo.
- A head of E columns turns its E / 2 pairs at the frequencies that the small one's pairs have at
  every (E / e)-th of them: its columns go there. Scores are divided by sqrt(E) instead of sqrt(e),
  so q is scaled by sqrt(E / e).
- A KV head whose query heads are more than the large model's KV heads serve is there several times.
- New layers add zero: their output and down projections are zero, their other weights are those of
  the small model's layers in turn.
- New tokens are copies of old ones with higher numbers, so the most likely token is an old one:
  for greedy decoding only.

What comes out is the small model's answer, up to rounding, and the small model's acceptance, at the
large one's speed. It says nothing about how well a large model's drafts would be accepted.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.model.config import ModelConfig
from qspec_llm.model.load import expected_shapes
from qspec_llm.weights.checkpoint import Checkpoint, Metadata
from qspec_llm.weights.planes import Dense, Planes, Stored, verify_weight
from qspec_llm.weights.quantize import Recipe, Target, nest

__all__ = ["EnlargedCheckpoint"]

EMBEDDING, HEAD, ROPE_FACTORS = "model.embed_tokens.weight", "lm_head.weight", "rope_freqs.weight"


class EnlargedCheckpoint:
    """A checkpoint of a large shape that computes a small one's function; see the module.

    Args:
        small: an opened model.
        config: its configuration.
        shape: the sizes wanted, none smaller than the small model's.
        device: where matrices are nested.
        group: weights that share one scale.

    Raises:
        QSpecError: the shape cannot hold the model.
    """

    kind: Literal["hf", "gguf", "nested"] = "nested"

    def __init__(
        self,
        small: Checkpoint,
        config: ModelConfig,
        shape: ModelConfig,
        device: torch.device | None = None,
        group: int = 32,
    ) -> None:
        _check_fits(config, shape)
        self._small, self._old, self._group = small, config, group
        self._device = device or torch.device("cpu")
        self.path = Path(f"{small.path} enlarged")
        self.config = replace(
            shape,
            family=config.family,
            vocab_size=max(shape.vocab_size, config.vocab_size),
            norm_eps=config.norm_eps * config.hidden_size / shape.hidden_size,
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
            tied_head=shape.tied_head and config.tied_head,
            context_length=config.context_length,
            eos_token_ids=config.eos_token_ids,
        )
        self.metadata: Metadata = self.config.to_dict()
        self._shapes = expected_shapes(self.config)
        if ROPE_FACTORS in small.names():
            self._shapes[ROPE_FACTORS] = (self.config.head_dim // 2,)
        self._sources = self._make_sources()

    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._shapes)

    def type_name(self, name: str) -> str:  # noqa: ARG002  # all alike
        """Every tensor is bf16."""
        return "BF16"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str, target: Target) -> Tensor | Stored:
        """One tensor, nested for the target where it is a matrix."""
        value = self._read_small(name)
        module = name.split(".")[-2]
        if name == ROPE_FACTORS:
            spread = torch.ones(self._shapes[name])
            spread[:: self.config.head_dim // self._old.head_dim] = value
            return spread
        if module == "q_proj":
            value = value * math.sqrt(self.config.head_dim / self._old.head_dim)
        rows = self._rows(name, module)
        if value.ndim == 1:
            if module.endswith("norm"):
                value = value * math.sqrt(self._old.hidden_size / self.config.hidden_size)
            return torch.cat([value, value.new_zeros(1)])[rows]
        value = value.to(self._device)
        value = torch.cat([value, value.new_zeros(len(value), 1)], 1)
        value = value[:, self._sources[_columns_of(module)].to(self._device)]
        value = torch.cat([value, value.new_zeros(1, value.shape[1])])
        is_vocabulary = name in (EMBEDDING, HEAD)
        stored = nest(value, Recipe(target, self._group), is_vocabulary=is_vocabulary)
        if isinstance(stored, Planes):
            return stored.rows(rows.to(self._device))
        return Dense(stored.weight[rows.to(self._device)], stored.reason)

    def _read_small(self, name: str) -> Tensor:
        """The small model's tensor [rows, columns] or [rows] float32 that a large one holds."""
        if name == HEAD and self._old.tied_head:
            name = EMBEDDING
        if name.startswith("model.layers."):
            parts = name.split(".")
            parts[2] = str(int(parts[2]) % self._old.num_layers)
            name = ".".join(parts)
        value = self._small.read(name, Target.BF16)
        if isinstance(value, Planes):
            value = verify_weight(value)
        return (value if isinstance(value, Tensor) else value.weight).float()

    def _rows(self, name: str, module: str) -> Tensor:
        """For each row of a large tensor the small one's, or the one after its last for zeros."""
        is_added = name.startswith("model.layers.")
        is_added = is_added and int(name.split(".")[2]) >= self._old.num_layers
        if is_added and module in ("o_proj", "down_proj"):
            return torch.full((self.config.hidden_size,), self._old.hidden_size)
        return self._sources[ROWS_OF.get(module, "hidden")]

    def _make_sources(self) -> dict[str, Tensor]:
        """For every index along a large model's axis the small one's, or its size for zeros."""
        old, new = self._old, self.config
        old_ratio, ratio = old.num_heads // old.num_kv_heads, new.num_heads // new.num_kv_heads
        copies = -(-old_ratio // ratio)  # of a KV head
        queries, keys = [-1] * new.num_heads, [-1] * new.num_kv_heads
        for head in range(old.num_kv_heads):
            for copy in range(copies):
                keys[head * copies + copy] = head
            for query in range(old_ratio):
                kv_head = head * copies + query // ratio
                queries[kv_head * ratio + query % ratio] = head * old_ratio + query
        return {
            "vocabulary": torch.arange(new.vocab_size) % old.vocab_size,
            "hidden": torch.arange(new.hidden_size).clamp(max=old.hidden_size),
            "inner": torch.arange(new.intermediate_size).clamp(max=old.intermediate_size),
            "queries": self._columns_of_heads(queries, old.query_size),
            "keys": self._columns_of_heads(keys, old.kv_size),
        }

    def _columns_of_heads(self, heads: list[int], nothing: int) -> Tensor:
        """Columns of the large model's heads, which are the small one's `heads`, -1 for none."""
        size, old = self.config.head_dim, self._old.head_dim
        stride = size // old
        columns = torch.full((len(heads), size), nothing)
        for index, head in enumerate(heads):
            if head >= 0:
                low, high = torch.arange(head * old, (head + 1) * old).chunk(2)
                columns[index, : size // 2 : stride] = low
                columns[index, size // 2 :: stride] = high
        return columns.flatten()


ROWS_OF = {
    "embed_tokens": "vocabulary",
    "lm_head": "vocabulary",
    "q_proj": "queries",
    "k_proj": "keys",
    "v_proj": "keys",
    "gate_proj": "inner",
    "up_proj": "inner",
}


def _columns_of(module: str) -> str:
    return {"o_proj": "queries", "down_proj": "inner"}.get(module, "hidden")


def _check_fits(old: ModelConfig, shape: ModelConfig) -> None:
    for field in ("hidden_size", "intermediate_size", "num_layers", "head_dim"):
        if getattr(shape, field) < getattr(old, field):
            raise QSpecError(
                f"the shape's {field} is {getattr(shape, field)}, and the model to enlarge has "
                f"{getattr(old, field)}; choose a larger shape"
            )
    if shape.head_dim % old.head_dim:
        raise QSpecError(
            f"heads of {old.head_dim} columns do not divide the shape's heads of {shape.head_dim}"
        )
    if old.family == "qwen3":
        raise QSpecError("a model with norms on its heads (qwen3) cannot be enlarged")
    ratio = shape.num_heads // shape.num_kv_heads
    wanted = old.num_kv_heads * -(-(old.num_heads // old.num_kv_heads) // ratio)
    if wanted > shape.num_kv_heads:
        raise QSpecError(
            f"the model's {old.num_heads} heads take {wanted} KV heads of {ratio} queries each, "
            f"and the shape has {shape.num_kv_heads}"
        )
