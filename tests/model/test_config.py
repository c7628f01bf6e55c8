"""What a configuration says: Hugging Face's, GGUF's and our own, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers_weights import refused
from qspec_llm.model.config import ModelConfig, RopeScaling, read_config
from qspec_llm.model.decoder import rope_table
from qspec_llm.weights.checkpoint import Checkpoint

HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 500000.0,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GGUF = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.context_length": 2048,
    "tokenizer.ggml.eos_token_id": 2,
}
DROP = "(dropped)"  # a string, so that test names are the same in every process


class FakeCheckpoint:
    """A checkpoint of metadata alone."""

    def __init__(self, kind: Any, metadata: dict[str, Any], path: Path = Path("m")) -> None:
        self.path, self.kind, self.metadata = path, kind, metadata

    def names(self) -> list[str]:
        return ["model.embed_tokens.weight", "lm_head.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        return (100, 64)


def read(kind: str, base: dict[str, Any], **changes: Any) -> ModelConfig:
    changed = {**base, **changes}
    metadata = {key: value for key, value in changed.items() if value is not DROP}
    return read_config(FakeCheckpoint(kind, metadata))


def hf(**changes: Any) -> ModelConfig:
    return read("hf", HF, **changes)


def gguf(**changes: Any) -> ModelConfig:
    """Keys with two underscores for each dot."""
    return read("gguf", GGUF, **{key.replace("__", "."): v for key, v in changes.items()})


EXPECTED = ModelConfig(
    family="llama",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    tied_head=False,
    context_length=2048,
)


# --- what is read ----------------------------------------------------------------------------


def test_hugging_face() -> None:
    assert hf() == EXPECTED


def test_gguf() -> None:
    config = gguf()
    assert config.eos_token_ids == (2,)
    assert ModelConfig.from_dict({**config.to_dict(), "eos_token_ids": ()}) == EXPECTED


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": LLAMA3}, {"eos_token_id": [1, 2]}])
def test_our_own_round_trip_through_json(changes: dict[str, Any]) -> None:
    config = hf(**changes)
    record = json.loads(json.dumps(config.to_dict()))
    assert read_config(FakeCheckpoint("nested", record)) == config


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("LlamaForCausalLM", "llama"),
        ("MistralForCausalLM", "llama"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
    ],
)
def test_architectures(architecture: str, family: str) -> None:
    assert hf(architectures=[architecture]).family == family


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_architectures(family: str) -> None:
    keys = {key.replace("llama.", f"{family}."): value for key, value in GGUF.items()}
    assert read("gguf", {**keys, "general.architecture": family}).family == family


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_key_value_heads": DROP}, "num_kv_heads", 4),
        ({"head_dim": 32}, "head_dim", 32),
        ({"head_dim": None}, "head_dim", 16),
        ({"tie_word_embeddings": True}, "tied_head", True),
        ({"rope_theta": DROP}, "rope_theta", 10000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta", 7.0),
        ({"rope_scaling": None}, "rope_scaling", None),
        ({"rope_scaling": LLAMA3}, "rope_scaling", RopeScaling(8.0, 1.0, 4.0, 8192)),
        (
            {"rope_parameters": {**LLAMA3, "rope_theta": 1.0}},
            "rope_scaling",
            RopeScaling(8.0, 1.0, 4.0, 8192),
        ),
        ({"eos_token_id": 5}, "eos_token_ids", (5,)),
        ({"eos_token_id": [5, 6]}, "eos_token_ids", (5, 6)),
        ({"eos_token_id": 0}, "eos_token_ids", (0,)),
        ({"sliding_window": 512}, "context_length", 512),
        ({"sliding_window": 99999}, "context_length", 2048),
        ({"sliding_window": None}, "context_length", 2048),
        ({"sliding_window": 512, "use_sliding_window": False}, "context_length", 2048),
    ],
    ids=str,
)
def test_hugging_face_options(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(hf(**changes), field) == value


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"llama__attention__head_count_kv": DROP}, "num_kv_heads", 4),
        ({"llama__attention__key_length": 32}, "head_dim", 32),
        ({"llama__rope__freq_base": DROP}, "rope_theta", 10000.0),
        ({"llama__attention__sliding_window": 512}, "context_length", 512),
        ({"tokenizer__ggml__eot_token_id": 7}, "eos_token_ids", (2, 7)),
        ({"llama__rope__scaling__type": "none"}, "rope_scaling", None),
    ],
    ids=str,
)
def test_gguf_options(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(gguf(**changes), field) == value


def test_generation_config_knows_more_ends(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    config = read_config(FakeCheckpoint("hf", {**HF, "eos_token_id": 7}, tmp_path))
    assert config.eos_token_ids == (7, 8)


def test_sizes_that_follow() -> None:
    config = hf(head_dim=32)
    assert (config.query_size, config.kv_size) == (128, 64)


@pytest.mark.weights
def test_smollm2(smollm2_checkpoint: Checkpoint) -> None:
    config = read_config(smollm2_checkpoint)
    sizes = (config.family, config.vocab_size, config.hidden_size, config.intermediate_size)
    assert sizes == ("llama", 49152, 576, 1536)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.context_length, config.tied_head) == (64, 8192, True)
    assert (config.rope_theta, config.rope_scaling) == (100000.0, None)
    assert 2 in config.eos_token_ids


# --- RoPE ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_rope_tables_equal_transformers(scaling: dict[str, Any] | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 131072}
    embedding = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=rope))
    cos, sin = embedding(torch.zeros(1), torch.arange(3000)[None])
    ours = rope_table(hf(rope_scaling=scaling, head_dim=64), 3000)
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        assert mine.dtype == torch.float32
        # float32 angles up to 3000: an ulp of the frequency moves them by 2e-4
        torch.testing.assert_close(mine, theirs[0, :, :32], rtol=0, atol=5e-4)


def test_rope_factors_of_gguf_files_divide_the_frequencies() -> None:
    scaled, plain = hf(rope_scaling=LLAMA3, head_dim=64), hf(head_dim=64)
    cos, sin = rope_table(plain, 2)
    stretched_cos, stretched_sin = rope_table(scaled, 2)
    angle, stretched = torch.atan2(sin[1], cos[1]), torch.atan2(stretched_sin[1], stretched_cos[1])
    factors = angle / stretched
    assert factors.min() == pytest.approx(1.0, abs=1e-4)
    assert factors.max() == pytest.approx(8.0, rel=1e-4)
    by_factors = rope_table(plain, 100, factors)
    torch.testing.assert_close(by_factors[0], rope_table(scaled, 100)[0], rtol=0, atol=1e-4)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM", "Gemma2ForCausalLM"])
def test_an_unsupported_architecture_is_refused(name: str) -> None:
    with refused(repr(name), "LlamaForCausalLM", "Qwen3ForCausalLM"):
        hf(architectures=[name])


@pytest.mark.parametrize("value", [DROP, None, []])
def test_no_architecture_is_refused(value: object) -> None:
    with refused("none named"):
        hf(architectures=value)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "qwen2moe"])
def test_an_unsupported_gguf_architecture_is_refused(name: str) -> None:
    with refused(repr(name), "llama, qwen2, qwen3"):
        gguf(general__architecture=name)


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope"])
def test_an_unsupported_rope_is_refused(kind: str) -> None:
    with refused(repr(kind), "llama3"):
        hf(rope_scaling={"rope_type": kind, "factor": 4.0})
    with refused(repr(kind)):
        hf(rope_scaling={"type": kind, "factor": 4.0})
    with refused(repr(kind)):
        gguf(llama__rope__scaling__type=kind)


def test_an_unsupported_activation_is_refused() -> None:
    with refused("'gelu'", "silu"):
        hf(hidden_act="gelu")


def test_a_mixture_of_experts_is_refused() -> None:
    with refused("mixture of experts"):
        gguf(llama__expert_count=8)


REQUIRED = sorted(HF.keys() - {"architectures", "num_key_value_heads", "rope_theta"})


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_number_is_refused(name: str) -> None:
    with refused(repr(name), "lacks"):
        hf(**{name: DROP})


OPTIONAL = {"head_count_kv", "freq_base", "eos_token_id"}


@pytest.mark.parametrize("key", [key for key in GGUF if key.split(".")[-1] not in OPTIONAL])
def test_a_missing_gguf_key_is_refused(key: str) -> None:
    with refused(repr(key), "lacks"):
        gguf(**{key: DROP})


def test_a_llama3_rope_without_its_numbers_is_refused() -> None:
    with refused("'factor'", "lacks"):
        hf(rope_scaling={"rope_type": "llama3"})


WRONG_NUMBERS = {
    "no layers": ({"num_hidden_layers": 0}, ["num_layers", "0"]),
    "negative vocabulary": ({"vocab_size": -1}, ["vocab_size", "-1"]),
    "heads that do not divide": ({"num_key_value_heads": 3}, ["4", "3"]),
    "odd heads": ({"head_dim": 15}, ["15", "odd"]),
    "heads in words": ({"num_attention_heads": "four"}, ["damaged"]),
    "hidden size null": ({"hidden_size": None}, ["damaged"]),
    "rope in words": ({"rope_scaling": "llama3"}, ["damaged"]),
    "architectures in words": ({"architectures": {"first": "LlamaForCausalLM"}}, []),
}
UNCHECKED_NUMBERS = {
    "no heads": {"num_attention_heads": 0},
    "layers in words": {"num_hidden_layers": "two"},
    "half a layer": {"num_hidden_layers": 1.5},
    "vocabulary in words": {"vocab_size": "many"},
    "context in words": {"max_position_embeddings": "long"},
    "epsilon in words": {"rms_norm_eps": "small"},
    "theta in words": {"rope_theta": "large"},
    "no theta": {"rope_theta": 0.0},
    "factor in words": {"rope_scaling": {**LLAMA3, "factor": "eight"}},
    "ends in words": {"eos_token_id": "</s>"},
}


@pytest.mark.parametrize("case", WRONG_NUMBERS)
def test_wrong_numbers_are_refused(case: str) -> None:
    changes, words = WRONG_NUMBERS[case]
    with refused(*words):
        hf(**changes)


@pytest.mark.parametrize("case", UNCHECKED_NUMBERS)
def test_values_of_another_kind_are_refused(case: str) -> None:
    with refused():
        hf(**UNCHECKED_NUMBERS[case])


@pytest.mark.parametrize(
    "record", [{}, {"family": "llama"}, {**EXPECTED.to_dict(), "colour": "red"}], ids=str
)
def test_a_damaged_record_of_our_own_is_refused(record: dict[str, Any]) -> None:
    with refused("m"):
        read_config(FakeCheckpoint("nested", record))
