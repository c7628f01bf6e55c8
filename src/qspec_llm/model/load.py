"""From a checkpoint to a decoder, tensor by tensor: peak memory is what is kept plus one tensor.

Decides which tensor becomes what: matrices are nested, vectors stay dense, the embedding and the
LM head count as vocabulary. A tensor that the decoder would not use is an error, since ignoring it
would compute another model.
"""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import Backend, Packed
from qspec_llm.model.config import ModelConfig
from qspec_llm.model.decoder import Decoder, rope_table
from qspec_llm.model.layers import Layer, Linear
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.planes import Dense, Grid, Planes, PlaneSpec, Stored, concat_rows
from qspec_llm.weights.quantize import Recipe, nest
from qspec_llm.weights.view import ACTIVATION_GROUPS

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "HEAD",
    "ROPE_FACTORS",
    "Progress",
    "draft_group",
    "expected_shapes",
    "load_decoder",
    "stored_tensors",
]

Progress = Callable[[int, int], None]  # tensors done, tensors in all

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
ROPE_FACTORS = "rope_freqs.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the decoder of this configuration has, with its shape.

    Biases are listed where the family has them.
    """
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        FINAL_NORM: (hidden,),
    }
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (config.query_size, hidden),
            f"{prefix}self_attn.k_proj.weight": (config.kv_size, hidden),
            f"{prefix}self_attn.v_proj.weight": (config.kv_size, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, config.query_size),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
        }
        if config.family == "qwen2":
            for name, size in (
                ("q", config.query_size),
                ("k", config.kv_size),
                ("v", config.kv_size),
            ):
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
        if config.family == "qwen3":
            shapes[f"{prefix}self_attn.q_norm.weight"] = (head,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (head,)
    return shapes


def stored_tensors(
    checkpoint: Checkpoint, config: ModelConfig, recipe: Recipe
) -> Iterator[tuple[str, Stored]]:
    """Every tensor of the model in stored form, one at a time.

    Raises:
        QSpecError: a tensor is missing, has another shape, or is one the decoder does not use.
    """
    shapes = expected_shapes(config)
    if ROPE_FACTORS in checkpoint.names():
        shapes[ROPE_FACTORS] = (config.head_dim // 2,)
    _check_names(checkpoint, config, shapes)
    for name, shape in shapes.items():
        if (found := checkpoint.shape(name)) != shape:
            raise QSpecError(
                f"tensor {name!r} of {checkpoint.path} has shape {found}, not {shape} "
                "as the configuration says"
            )
    return ((name, _store(checkpoint, name, recipe)) for name in shapes)


def _check_names(
    checkpoint: Checkpoint, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> None:
    names = set(checkpoint.names())
    if missing := sorted(shapes.keys() - names):
        raise QSpecError(
            f"{checkpoint.path} lacks {len(missing)} tensors of its architecture, "
            f"the first {missing[0]!r}"
        )
    unused = {name for name in names - shapes.keys() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied_head:
        unused.discard(HEAD)
    if unused:
        raise QSpecError(
            f"{checkpoint.path} has {len(unused)} tensors that this architecture does not use, "
            f"the first {min(unused)!r}; it may be another architecture under a known name"
        )


def _store(checkpoint: Checkpoint, name: str, recipe: Recipe) -> Stored:
    value = checkpoint.read(name, recipe.target)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 1:
        return Dense(value, "a vector")
    return nest(value, recipe, is_vocabulary=name in (EMBEDDING, HEAD))


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    ops: Backend,
    *,
    num_positions: int,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> Decoder:
    """Build a decoder whose weights are nested by `recipe` and packed for `ops`.

    Args:
        checkpoint: an opened model.
        config: its configuration.
        recipe: how to nest what is not nested yet.
        ops: the backend that will run it.
        num_positions: longest sequence, in tokens, that will be computed.
        dtype: of activations and KV.
        progress: called after every tensor.
    """
    reader = _Reader(stored_tensors(checkpoint, config, recipe), ops, progress, config)
    embedding = ops.pack(reader.take(EMBEDDING))
    final_norm = reader.vector(FINAL_NORM)
    head = Linear(((embedding, None),)) if config.tied_head else reader.linear("lm_head")
    layers = tuple(reader.layer(f"model.layers.{i}.") for i in range(config.num_layers))
    factors = reader.vector(ROPE_FACTORS).float() if reader.has_rest() else None
    cos, sin = rope_table(config, num_positions, None if factors is None else factors.cpu())
    table = (cos.to(ops.device), sin.to(ops.device))
    counts = reader.num_bytes, reader.num_draft_bytes
    group = draft_group(reader.specs, config.head_dim)
    return Decoder(config, ops, dtype, embedding, layers, final_norm, head, *table, *counts, group)


def draft_group(specs: Collection[PlaneSpec], head_dim: int) -> int:
    """Columns of a8 activations that share a scale (`View.group`): 64, or 128 as those of weights.

    Only where a draft's weights are not the target's own (view.py), and where a group lies within a
    head, whose result is quantised by itself.

    Args:
        specs: of a model's nested tensors.
        head_dim: of the model.
    """
    usual, wide = ACTIVATION_GROUPS
    takes = all(spec.group == wide and spec.draft_bits < spec.bits for spec in specs)
    is_signed = all(spec.grid is Grid.SIGNED for spec in specs)
    return wide if specs and takes and is_signed and head_dim % wide == 0 else usual


class _Reader:
    """Takes stored tensors in the order of `expected_shapes` and puts them together."""

    def __init__(
        self,
        tensors: Iterator[tuple[str, Stored]],
        ops: Backend,
        progress: Progress | None,
        config: ModelConfig,
    ) -> None:
        self._tensors, self._ops, self._progress = tensors, ops, progress
        self._waiting: dict[str, Stored] = {}
        self.num_bytes = self.num_draft_bytes = 0
        self.specs: set[PlaneSpec] = set()  # of what is nested
        self._num_read, self._num_all = 0, len(expected_shapes(config))
        self._family = config.family

    def take(self, name: str) -> Stored:
        """The tensor of that name; reads on until it comes."""
        while name not in self._waiting:
            found, stored = next(self._tensors)
            self._keep(found, stored)
            self._num_read += 1
            if self._progress:
                self._progress(self._num_read, self._num_all)
        return self._waiting.pop(name)

    def has_rest(self) -> bool:
        """Whether a tensor is left (the optional RoPE factors come last)."""
        for found, stored in self._tensors:
            self._keep(found, stored)
        return bool(self._waiting)

    def _keep(self, name: str, stored: Stored) -> None:
        self._waiting[name] = stored
        self.num_bytes += stored.nbytes
        self.num_draft_bytes += stored.draft_nbytes
        if isinstance(stored, Planes):
            self.specs.add(stored.spec)

    def vector(self, name: str) -> Tensor:
        """A norm's weight or a bias: bf16 as it is, other types as float32, which kernels read."""
        stored = self.take(name)
        assert isinstance(stored, Dense)
        is_read = stored.weight.dtype is torch.bfloat16
        return stored.weight.to(self._ops.device, None if is_read else torch.float32)

    def linear(self, *modules: str) -> Linear:
        """Matrices on one input, in one part where their specs allow."""
        matrices = [self.take(f"{module}.weight") for module in modules]
        has_bias = self._family == "qwen2" and modules[0].endswith("q_proj")
        biases = [self.vector(f"{m}.bias") if has_bias else None for m in modules]
        if fused := _fuse(matrices):
            bias = torch.cat([b for b in biases if b is not None]) if has_bias else None
            return Linear(((self._ops.pack(fused), bias),))
        packed: list[Packed] = [self._ops.pack(matrix) for matrix in matrices]
        return Linear(tuple(zip(packed, biases, strict=True)))

    def layer(self, prefix: str) -> Layer:
        """One decoder layer."""
        attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        has_head_norms = self._family == "qwen3"
        return Layer(
            input_norm=self.vector(f"{prefix}input_layernorm.weight"),
            qkv=self.linear(f"{attn}q_proj", f"{attn}k_proj", f"{attn}v_proj"),
            output=self.linear(f"{attn}o_proj"),
            post_attention_norm=self.vector(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.linear(f"{mlp}gate_proj", f"{mlp}up_proj"),
            down=self.linear(f"{mlp}down_proj"),
            q_norm=self.vector(f"{attn}q_norm.weight") if has_head_norms else None,
            k_norm=self.vector(f"{attn}k_norm.weight") if has_head_norms else None,
        )


def _fuse(matrices: list[Stored]) -> Planes | None:
    """The matrices stacked into one, or None where their specs differ."""
    planes = [matrix for matrix in matrices if isinstance(matrix, Planes)]
    if len(planes) < len(matrices):
        return None
    specs = {matrix.spec.__class__(**{**matrix.spec.__dict__, "num_rows": 1}) for matrix in planes}
    if len(specs) > 1:
        return None
    return planes[0] if len(planes) == 1 else concat_rows(planes)
