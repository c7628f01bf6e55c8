"""What a decoder looks like, read from config.json, GGUF keys or a nested checkpoint.

Knows the names that other projects give to these numbers; nothing else in `model` does.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.checkpoint.safetensors_dir import read_json
from qspec_llm.weights.outliers import OUTLIERS_KEY
from qspec_llm.weights.rotation import ROTATION_KEY
from qspec_llm.weights.view import OUTLIER_GROUP, Activation

__all__ = ["ModelConfig", "RopeScaling", "read_config"]

HF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent stretching of RoPE (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder.

    `family` is "llama" (also Mistral and SmolLM), "qwen2" (bias on q, k, v) or "qwen3" (RMSNorm on
    each head of q and k). `context_length` is in tokens; a sliding window shortens it, so that
    within it attention is full.

    `hadamard` is the rotation that the linears' weights expect of their inputs, as the order of
    the largest Hadamard matrix (`weights.hadamard.order_for`), None for none; the LM head's input
    is not rotated. `outliers` is how many columns at the beginning of the inputs of q, k, v, gate,
    up and down a4 drafts see in 8 bits (`weights.outliers`), None for none. `head_draft` is the
    narrowest activations that the head's drafts see, None for the view's own.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_head: bool
    context_length: int
    eos_token_ids: tuple[int, ...] = ()
    hadamard: int | None = None
    outliers: int | None = None
    head_draft: Activation | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type not in (int, float):
                continue
            value: Any = getattr(self, field.name)
            if type(value) is not field.type or not value > 0:
                kind = field.type.__name__
                raise QSpecError(f"the model's {field.name} is {value!r}, not a positive {kind}")
        if not all(type(token) is int for token in self.eos_token_ids):
            raise QSpecError(f"the model's end tokens are {self.eos_token_ids}, not token ids")
        if self.num_heads % self.num_kv_heads:
            raise QSpecError(
                f"{self.num_heads} attention heads do not divide among {self.num_kv_heads} KV heads"
            )
        if self.hadamard is not None and (
            type(self.hadamard) is not int or self.hadamard < 1 or self.hadamard.bit_count() != 1
        ):
            raise QSpecError(f"the model's Hadamard order {self.hadamard!r} is no power of two")
        if self.outliers is not None:
            self._check_outliers(self.outliers)
        if self.head_dim % 2:
            raise QSpecError(f"head size {self.head_dim} is odd, so it has no rotary halves")

    def _check_outliers(self, outliers: int) -> None:
        most = min(self.hidden_size, self.intermediate_size)
        is_whole = type(outliers) is int and outliers % OUTLIER_GROUP == 0
        if not is_whole or not 0 < outliers <= most:
            raise QSpecError(
                f"outliers is {outliers!r}; it must be a multiple of {OUTLIER_GROUP} up to "
                f"{most // OUTLIER_GROUP * OUTLIER_GROUP}, as wide as this model's linears are"
            )
        if self.hadamard is not None:
            raise QSpecError("a rotated model has no outlier columns: a rotation spreads them")

    @property
    def can_draft_a4(self) -> bool:
        """Whether 4-bit activations were prepared for, so that drafts with them agree."""
        return self.hadamard is not None or self.outliers is not None

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back. How a4 is prepared for only if it is."""
        values = asdict(self)
        return {
            name: value
            for name, value in values.items()
            if value is not None or name not in ("hadamard", "outliers", "head_draft")
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Undo `to_dict`."""
        given = dict(values)
        if given.get("rope_scaling") is not None:
            given["rope_scaling"] = RopeScaling(**given["rope_scaling"])
        given["eos_token_ids"] = tuple(given.get("eos_token_ids", ()))
        if given.get("head_draft") is not None:
            given["head_draft"] = Activation(given["head_draft"])
        return cls(**given)


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The configuration of an opened checkpoint.

    Raises:
        QSpecError: the architecture, or something it needs, is not supported, or a number is
            missing.
    """
    readers = {"hf": _from_hf, "gguf": _from_gguf, "nested": _from_nested}
    try:
        config = readers[checkpoint.kind](checkpoint)
        changed: dict[str, Any] = {}
        for key in (ROTATION_KEY, OUTLIERS_KEY):
            changed |= checkpoint.metadata.get(key, {})
        return replace(config, **changed)
    except KeyError as error:
        raise QSpecError(f"the configuration of {checkpoint.path} lacks {error}") from None
    except QSpecError:
        raise
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise QSpecError(f"the configuration of {checkpoint.path} is damaged: {error}") from None


def _from_nested(checkpoint: Checkpoint) -> ModelConfig:
    return ModelConfig.from_dict(checkpoint.metadata)


def _from_hf(checkpoint: Checkpoint) -> ModelConfig:
    values = checkpoint.metadata
    architecture = (values.get("architectures") or ["(none named)"])[0]
    if architecture not in HF_ARCHITECTURES:
        raise QSpecError(
            f"architecture {architecture!r} is not supported; "
            f"supported are {', '.join(HF_ARCHITECTURES)}"
        )
    if values.get("hidden_act", "silu") != "silu":
        raise QSpecError(f"activation {values['hidden_act']!r} is not supported; only 'silu' is")
    heads = values["num_attention_heads"]
    # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling
    rope = values.get("rope_parameters") or {
        "rope_theta": values.get("rope_theta", 10000.0), **(values.get("rope_scaling") or {})
    }  # fmt: skip
    # generation_config.json, where there is one, knows the ends of chat turns as well
    generation = checkpoint.path / "generation_config.json"
    eos = (read_json(generation) if generation.exists() else values).get("eos_token_id")
    config = ModelConfig(
        family=HF_ARCHITECTURES[architecture],
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        norm_eps=values["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope),
        tied_head=values.get("tie_word_embeddings", False),
        context_length=values["max_position_embeddings"],
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    return config if window is None else _shorten(config, window)


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise QSpecError(f"RoPE scaling {kind!r} is not supported; 'default' and 'llama3' are")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
    )


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    keys, names = checkpoint.metadata, set(checkpoint.names())
    family = keys["general.architecture"]
    if family not in GGUF_ARCHITECTURES:
        raise QSpecError(
            f"architecture {family!r} is not supported; "
            f"supported in GGUF files are {', '.join(GGUF_ARCHITECTURES)}"
        )
    if family == "llama" and f"{family}.expert_count" in keys:
        raise QSpecError(f"{checkpoint.path} is a mixture of experts, which is not supported")
    kind = keys.get(f"{family}.rope.scaling.type", "none")
    if kind != "none":
        raise QSpecError(f"RoPE scaling {kind!r} in a GGUF file is not supported")

    def get(name: str) -> Any:
        return keys[f"{family}.{name}"]

    heads, hidden = get("attention.head_count"), get("embedding_length")
    config = ModelConfig(
        family=family,
        vocab_size=checkpoint.shape("model.embed_tokens.weight")[0],
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=keys.get(f"{family}.attention.head_count_kv", heads),
        head_dim=keys.get(f"{family}.attention.key_length", hidden // heads),
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_theta=float(keys.get(f"{family}.rope.freq_base", 10000.0)),
        rope_scaling=None,
        tied_head="lm_head.weight" not in names,
        context_length=get("context_length"),
        eos_token_ids=tuple(
            keys[key]
            for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            if key in keys
        ),
    )
    window = keys.get(f"{family}.attention.sliding_window")
    return config if window is None else _shorten(config, window)


def _shorten(config: ModelConfig, window: int) -> ModelConfig:
    return replace(config, context_length=min(config.context_length, window))
