"""The one decoder against `transformers`, on tiny random models and on SmolLM2."""

import contextlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers_weights import assert_close, assert_same_bits, refused
from qspec_llm.kernels import Rows, get_backend
from qspec_llm.kv.blocks import BLOCK_SIZE
from qspec_llm.kv.pool import allocate
from qspec_llm.model.config import read_config
from qspec_llm.model.decoder import Decoder
from qspec_llm.model.load import draft_group, expected_shapes, load_decoder, stored_tensors
from qspec_llm.weights import store
from qspec_llm.weights.checkpoint import Checkpoint, open_checkpoint
from qspec_llm.weights.planes import Dense, Grid, Planes, PlaneSpec
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

NUM_POSITIONS = 160
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, wide heads": ("Llama", {"head_dim": 32, "hidden_size": 96, "num_attention_heads": 6}),
    "llama, no groups of heads": ("Llama", {"num_key_value_heads": 4}),
    "llama, dense fallback": ("Llama", {"hidden_size": 80, "intermediate_size": 104}),
    "llama, large groups": ("Llama", {"hidden_size": 128, "intermediate_size": 256}),
    "mistral": ("Mistral", {"rms_norm_eps": 1e-5, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def make_model(path: Path, kind: str) -> Any:
    """Save a random model in bf16; returns it as transformers runs it, in float32."""
    import transformers

    family, options = MODELS[kind]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # far from the tame start of a training run: every part counts
        for name, value in model.named_parameters():
            if "norm" in name:
                value.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                value.normal_(std=0.5)
            else:
                value.normal_(std=0.15)
    model = model.to(torch.bfloat16)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(path)
    model = model.float().eval()
    # the frequencies were rounded to bf16 with the weights; they are no weights
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def edit_config(path: Path, **changes: Any) -> None:
    """Change config.json; None removes an entry."""
    config = json.loads((path / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))


def load(
    model: Path | Checkpoint,
    target: Target = Target.BF16,
    group: int = 32,
    backend: str = "reference",
    **options: Any,
) -> Decoder:
    checkpoint = open_checkpoint(model) if isinstance(model, Path) else model
    recipe = Recipe(target, group, clip_steps=1)
    options = {"num_positions": NUM_POSITIONS, "dtype": torch.float32, **options}
    ops = get_backend(backend)
    return load_decoder(checkpoint, read_config(checkpoint), recipe, ops, **options)


def logits(
    decoder: Decoder,
    tokens: list[int],
    chunks: list[int] | None = None,
    view: View = VERIFY,
    is_prompt: bool = True,
) -> Tensor:
    """Logits of every position [T, vocabulary], computed in chunks of those sizes."""
    num_blocks = math.ceil(len(tokens) / BLOCK_SIZE)
    kv = allocate(decoder.config, num_blocks + 1, decoder.dtype, decoder.ops.device)
    table = torch.arange(num_blocks, 0, -1)  # block 0 pads
    parts, start = [], 0
    for size in chunks or [len(tokens)]:
        positions = torch.arange(start, start + size)
        rows = Rows(
            positions=positions,
            slots=table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
            cu_rows=torch.tensor([0, size]),
            contexts=torch.tensor([start + size]),
            block_tables=table[None],
            is_prompt=is_prompt,
        )
        ids = torch.tensor(tokens[start : start + size])
        parts.append(decoder.forward(ids, rows, kv, view, torch.arange(size)))
        start += size
    return torch.cat(parts)


def expected_logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def random_tokens(count: int, vocabulary: int = 101) -> list[int]:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(1)).tolist()


# --- against transformers --------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_bf16_target_equals_transformers(tmp_path: Path, kind: str, backend: str) -> None:
    if backend == "cpu" and kind == "llama, dense fallback":
        pytest.skip("its heads of 20 are not a multiple of 16, which the CPU backend needs")
    model, tokens = make_model(tmp_path, kind), random_tokens(90)
    expected = expected_logits(model, tokens)
    decoder = load(tmp_path, backend=backend)
    assert_close(logits(decoder, tokens), expected, 1e-5)
    assert_close(logits(decoder, tokens, [50, 1, 1, 38], is_prompt=False), expected, 1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_bf16_target_equals_transformers_row_by_row(tmp_path: Path, kind: str) -> None:
    model, tokens = make_model(tmp_path, kind), random_tokens(40)
    out = logits(load(tmp_path), tokens, [1] * 40, is_prompt=False)
    assert_close(out, expected_logits(model, tokens), 1e-5)


@pytest.mark.parametrize("group", [64, 128])
def test_larger_groups_change_no_logit(tmp_path: Path, group: int) -> None:
    make_model(tmp_path, "llama, large groups")
    tokens = random_tokens(20)
    small, large = load(tmp_path, group=32), load(tmp_path, group=group)
    assert_same_bits(logits(large, tokens), logits(small, tokens))
    assert large.nbytes() < small.nbytes()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("target", Target)
def test_every_bit_of_the_weights_counts(tmp_path: Path, kind: str, target: Target) -> None:
    """Lower targets come near the model, in order, and the draft of bf16 is not the verifier."""
    model, tokens = make_model(tmp_path, kind), random_tokens(30)
    expected = expected_logits(model, tokens)
    decoder = load(tmp_path, target)
    row_by_row = [1] * len(tokens)
    error = (logits(decoder, tokens, row_by_row) - expected).norm() / expected.norm()
    is_dense = kind == "llama, dense fallback"
    low, high = {
        Target.INT4: (0.02, 0.9), Target.INT8: (1e-3, 0.1), Target.BF16: (0, 1e-5)
    }[target]  # fmt: skip
    assert (0 if is_dense else low) <= error <= high
    draft = logits(decoder, tokens, row_by_row, view=draft_view(Activation.A8))
    assert torch.isfinite(draft).all()
    if target is Target.BF16 and not is_dense:
        assert (draft - expected).norm() > 0.02 * expected.norm()


def test_activations_in_bf16_come_near(tmp_path: Path) -> None:
    model, tokens = make_model(tmp_path, "llama"), random_tokens(30)
    out = logits(load(tmp_path, dtype=torch.bfloat16), tokens)
    assert out.dtype == torch.float32
    assert_close(out, expected_logits(model, tokens), 0.03)


@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2 tied", "qwen3"])
def test_logits_do_not_depend_on_the_chunks(tmp_path: Path, kind: str, is_prompt: bool) -> None:
    make_model(tmp_path, kind)
    decoder, tokens = load(tmp_path, dtype=torch.bfloat16), random_tokens(70)
    whole = logits(decoder, tokens, is_prompt=is_prompt)
    for chunks in ([1] * 70, [69, 1], [3, 60, 7]):
        assert_same_bits(logits(decoder, tokens, chunks, is_prompt=is_prompt), whole)


def test_only_the_rows_asked_for_get_logits(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    decoder, kv = load(tmp_path), None
    kv = allocate(decoder.config, 3, torch.float32)
    positions = torch.arange(9)
    table = torch.tensor([[1, 2]])
    rows = Rows(positions, positions + 16, torch.tensor([0, 9]), torch.tensor([9]), table, True)
    tokens = torch.tensor(random_tokens(9))
    every = decoder.forward(tokens, rows, kv, VERIFY, positions)
    some = torch.tensor([8, 2])
    assert_same_bits(decoder.forward(tokens, rows, kv, VERIFY, some), every[some])
    none = decoder.forward(tokens, rows, kv, VERIFY, some[:0])
    assert (none.shape, none.dtype) == ((0, 101), torch.float32)


# --- bytes, progress, the nested checkpoint --------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama tied", "qwen2", "qwen3 tied"])
@pytest.mark.parametrize("target", Target)
def test_nothing_is_held_twice(tmp_path: Path, kind: str, target: Target) -> None:
    make_model(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    config = read_config(checkpoint)
    tensors = dict(stored_tensors(checkpoint, config, Recipe(target, clip_steps=1)))
    once = sum(stored.nbytes for stored in tensors.values())
    decoder = load(tmp_path, target)
    assert decoder.nbytes() == once == decoder.stored_bytes
    assert ("lm_head.weight" in tensors) is (not config.tied_head)
    for name, stored in tensors.items():
        assert isinstance(stored, Dense if len(expected_shapes(config)[name]) == 1 else Planes)


def test_how_many_activations_of_a_draft_share_a_scale() -> None:
    wide = PlaneSpec(128, 256, group=128, bits=16, grid=Grid.SIGNED)
    assert draft_group([wide, replace(wide, bits=8)], 128) == 128
    assert draft_group([wide], 64) == 64  # or a group would lie in two heads
    assert draft_group([wide, replace(wide, group=64)], 128) == 64
    assert draft_group([wide, replace(wide, bits=4, grid=Grid.AFFINE)], 128) == 64
    assert draft_group([replace(wide, bits=8, draft_bits=8)], 128) == 64  # the target's own
    assert draft_group([], 128) == 64


def test_a_draft_is_read_as_its_model_says(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    decoder = replace(load(tmp_path), draft_group=128)
    draft = decoder.read_view(draft_view(Activation.A4))
    assert draft == draft_view(Activation.A4, 128)
    config = replace(decoder.config, head_draft=Activation.A8)
    assert replace(decoder, config=config).head_view(draft) == draft_view(Activation.A8, 128)
    assert decoder.read_view(VERIFY) == VERIFY


def test_progress_ends_at_the_number_of_tensors(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    seen: list[tuple[int, int]] = []
    decoder = load(tmp_path, progress=lambda done, of: seen.append((done, of)))
    total = len(expected_shapes(decoder.config))
    assert seen == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("kind", ["llama tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("target", Target)
def test_a_nested_checkpoint_gives_the_same_logits(
    tmp_path: Path, kind: str, target: Target
) -> None:
    make_model(tmp_path / "hf", kind)
    checkpoint = open_checkpoint(tmp_path / "hf")
    config, recipe = read_config(checkpoint), Recipe(target, clip_steps=1)
    tensors = stored_tensors(checkpoint, config, recipe)
    store.write(tmp_path / "nested", target, config.to_dict(), tensors, shard_bytes=10_000)
    nested = open_checkpoint(tmp_path / "nested")
    assert read_config(nested) == config
    tokens = random_tokens(20)
    expected = logits(load(tmp_path / "hf", target), tokens, [1] * 20)
    assert_same_bits(logits(load(tmp_path / "nested", target), tokens, [1] * 20), expected)


# --- refusals --------------------------------------------------------------------------------


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "missing": (lambda t: t.pop(UP), ["lacks 1 ", UP]),
    "missing head": (lambda t: t.pop("lm_head.weight"), ["lm_head.weight"]),
    "unused": (lambda t: t.update(extra=torch.zeros(3)), ["'extra'", "1 tensors"]),
    "a bias no one reads": (
        lambda t: t.update({UP.replace("weight", "bias"): torch.zeros(96)}),
        ["up_proj.bias"],
    ),
    "another layer": (
        lambda t: t.update({UP.replace("1", "2"): torch.zeros(96, 64)}),
        ["layers.2.mlp.up_proj"],
    ),
    "transposed": (lambda t: t.update({UP: t[UP].T.contiguous()}), [UP, "(64, 96)", "(96, 64)"]),
    "short norm": (lambda t: t.update({"model.norm.weight": torch.ones(63)}), ["model.norm"]),
    "integers": (lambda t: t.update({UP: torch.ones(96, 64).int()}), [UP, "I32"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(tmp_path: Path, case: str) -> None:
    make_model(tmp_path, "llama")
    change, words = BAD_TENSORS[case]
    change_tensors(tmp_path, change)
    with refused(tmp_path, *words):
        load(tmp_path)


def test_leftovers_of_older_checkpoints_are_ignored(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path, lambda t: t.update({name: torch.ones(8)}))
    load(tmp_path)


def test_norms_and_biases_of_other_types_are_read_as_float32(tmp_path: Path) -> None:
    def vectors_as(dtype: torch.dtype) -> Decoder:
        def change(tensors: dict[str, Tensor]) -> None:
            vectors = {name: one.to(dtype) for name, one in tensors.items() if one.ndim == 1}
            tensors.update(vectors)

        change_tensors(tmp_path, change)
        return load(tmp_path)

    make_model(tmp_path, "qwen2")
    half, full = vectors_as(torch.float16), vectors_as(torch.float32)
    for decoder in (half, full):
        assert decoder.final_norm.dtype is torch.float32
        for layer in decoder.layers:
            norms = [layer.input_norm, layer.post_attention_norm]
            biases = [bias for _, bias in layer.qkv.parts]
            assert all(one is not None and one.dtype is torch.float32 for one in norms + biases)
    assert_same_bits(logits(half, [1, 2, 3]), logits(full, [1, 2, 3]))


def test_a_head_beside_a_tied_embedding_is_ignored(tmp_path: Path) -> None:
    make_model(tmp_path, "llama tied")
    before = logits(load(tmp_path), [1, 2, 3])
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(101, 64)}))
    assert_same_bits(logits(load(tmp_path), [1, 2, 3]), before)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_tensors_of_another_family_are_refused(tmp_path: Path, family: str) -> None:
    make_model(tmp_path, family)
    edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    with refused(tmp_path, "k_proj.bias" if family == "qwen2" else "k_norm"):
        load(tmp_path)


def test_rope_factors_of_gguf_files_are_used(tmp_path: Path) -> None:
    """llama.cpp ships Llama 3's scaling as a tensor that divides the frequencies."""
    model, tokens = make_model(tmp_path, "llama 3"), random_tokens(60)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq
    assert factors.max() > 7
    change_tensors(tmp_path, lambda t: t.update({"rope_freqs.weight": factors}))
    edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert_close(logits(load(tmp_path), tokens), expected_logits(model, tokens), 1e-5)


def test_a_weight_that_cannot_be_nested_is_dense_and_right(tmp_path: Path) -> None:
    model, tokens = make_model(tmp_path, "llama"), random_tokens(20)
    change_tensors(tmp_path, lambda t: t[UP][0].copy_(torch.tensor([1e-30, 1.0] * 32)))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = torch.tensor([1e-30, 1.0] * 32)
    assert_close(logits(load(tmp_path), tokens), expected_logits(model, tokens), 1e-5)


# --- SmolLM2 ---------------------------------------------------------------------------------

# "The tide comes in twice a day because the Moon pulls on the oceans, and the Earth turns
# underneath. In 1687, Isaac Newton wrote:\n\n    def tide(moon, sun): return moon + 0.46 * sun\n\n
# It is a good first guess."
TIDE = [
    504, 17662, 2216, 281, 6757, 253, 1194, 975, 260, 8872, 26648, 335, 260, 10959, 28, 284, 260,
    2591, 6497, 16780, 30, 533, 216, 33, 38, 40, 39, 28, 17801, 15903, 4150, 42, 1004, 753, 17662,
    24, 40043, 28, 2388, 727, 1003, 6783, 1232, 216, 32, 30, 36, 38, 1672, 2388, 198, 198, 1589,
    314, 253, 1123, 808, 6820, 30,
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2_model(smollm2: Path) -> Any:
    """SmolLM2 in transformers, float32: gguf's own dequantisation and the model card's sizes.

    (transformers can read the GGUF file itself, to the same weights, in 20 seconds.)
    """
    import gguf
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    heads = {"attn_q": 9, "attn_k": 3}
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    top = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    state = {}
    for tensor in gguf.GGUFReader(smollm2).tensors:
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        name = top.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"layers.{layer}.{names[part]}.weight"
            if part in heads:  # the converter swapped these two axes
                pairs = values.reshape(heads[part], 32, 2, 576)
                values = pairs.swapaxes(1, 2).reshape(-1, 576)
        state[f"model.{name}"] = torch.from_numpy(values)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    # rotary frequencies are no parameters; build them anew off the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@pytest.fixture(scope="module")
def smollm2_int4(smollm2_checkpoint: Checkpoint) -> Decoder:
    return load(smollm2_checkpoint, Target.INT4)


@pytest.mark.weights
def test_smollm2_int4_equals_transformers(smollm2_int4: Decoder, smollm2_model: Any) -> None:
    decoder = smollm2_int4
    expected = expected_logits(smollm2_model, TIDE)
    out = logits(decoder, TIDE)
    assert_close(out, expected, 1e-5)
    assert_same_bits(out.argmax(-1), expected.argmax(-1))
    # as shipped: 4 bits and a scale and an offset a group; 8 and a scale in the embedding
    config = decoder.config
    embedding = 49152 * 576
    inner = 30 * 576 * (2 * config.query_size + 2 * config.kv_size + 3 * 1536)
    norms = 4 * 576 * (2 * 30 + 1)
    assert decoder.nbytes() == embedding * 8.5 / 8 + inner * 5 / 8 + norms


@pytest.mark.weights
def test_smollm2_bf16_equals_transformers(
    smollm2_checkpoint: Checkpoint, smollm2_model: Any
) -> None:
    expected = {}
    for name, value in smollm2_model.named_parameters():
        if value.ndim == 2:
            expected[name] = value.data
            value.data = value.data.to(torch.bfloat16).float()
    decoder = load(smollm2_checkpoint, Target.BF16)
    assert_close(logits(decoder, TIDE), expected_logits(smollm2_model, TIDE), 1e-5)
    for name, value in smollm2_model.named_parameters():
        value.data = expected.get(name, value.data)
    linears = [part for layer in decoder.layers for part, _ in layer.qkv.parts + layer.down.parts]
    assert all(isinstance(part, Planes) and part.spec.bits == 16 for part in linears)


@pytest.mark.weights
def test_smollm2_chunks_change_no_bit(smollm2_int4: Decoder) -> None:
    decoder = replace(smollm2_int4, dtype=torch.bfloat16)
    whole = logits(decoder, TIDE[:24], is_prompt=False)
    assert_same_bits(logits(decoder, TIDE[:24], [1, 3, 19, 1], is_prompt=False), whole)
