"""GGUF: values equal the `gguf` package's own, shipped codes are kept, rows come in HF's order."""

import contextlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from torch import Tensor

from helpers_weights import assert_same_bits, gaussian, refused
from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.checkpoint.gguf_file import GGUFCheckpoint
from qspec_llm.weights.planes import Dense, Grid, Planes, draft_weight, verify_weight
from qspec_llm.weights.quantize import Target

Array = np.ndarray[Any, Any]
NAME = "blk.0.ffn_up.weight"
HF_NAME = "model.layers.0.mlp.up_proj.weight"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
K_QUANTS = {"Q4_K": (144, [0, 2]), "Q5_K": (176, [0, 2]), "Q6_K": (210, [208])}


def write_gguf(
    path: Path,
    tensors: dict[str, tuple[Array, str]],
    arch: str = "llama",
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> Path:
    """A GGUF file of (bytes or values, type name) per tensor."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    for name, (data, type_name) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=Type[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks_of(type_name: str, num_rows: int = 6, num_cols: int = 512, seed: int = 0) -> Array:
    """Data of one tensor in that type: quantised by gguf, or (K-quants) random valid blocks."""
    if type_name not in K_QUANTS:
        values = gaussian(num_rows, num_cols, seed=seed).numpy()
        return values if type_name == "F32" else quantize(values, Type[type_name])
    size, scales = K_QUANTS[type_name]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (num_rows, num_cols // 256, size), np.uint8)
    for place in scales:
        half = rng.uniform(1e-4, 2e-3, data.shape[:2]).astype(np.float16)
        data[:, :, place : place + 2] = half[..., None].view(np.uint8)
    return data.reshape(num_rows, -1)


def values_of(type_name: str, data: Array) -> Tensor:
    """What gguf says these bytes mean, float32."""
    return torch.from_numpy(np.array(dequantize(data, Type[type_name]), np.float32))


def read(path: Path, target: Target, name: str = HF_NAME) -> Any:
    return open_checkpoint(path).read(name, target)


def one_tensor(path: Path, type_name: str, data: Array | None = None) -> tuple[Path, Tensor]:
    """A file of one tensor of that type, and its values."""
    data = blocks_of(type_name) if data is None else data
    return write_gguf(path / "m.gguf", {NAME: (data, type_name)}), values_of(type_name, data)


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("type_name", FLOATS)
def test_floats_come_in_their_own_dtype(tmp_path: Path, type_name: str, target: Target) -> None:
    path, values = one_tensor(tmp_path, type_name)
    weight = read(path, target)
    assert weight.dtype == FLOATS[type_name]
    assert_same_bits(weight.float(), values)


@pytest.mark.parametrize("type_name", QUANTISED)
def test_quantised_types_are_dequantised_for_the_bf16_target(
    tmp_path: Path, type_name: str
) -> None:
    path, values = one_tensor(tmp_path, type_name)
    weight = read(path, Target.BF16)
    assert isinstance(weight, Tensor)
    assert_same_bits(weight, values)


@pytest.mark.parametrize(
    ("type_name", "target"),
    [("Q4_0", Target.INT4), ("Q4_1", Target.INT4), ("Q8_0", Target.INT4), ("Q8_0", Target.INT8)],
)
def test_shipped_codes_are_kept_exactly(tmp_path: Path, type_name: str, target: Target) -> None:
    path, values = one_tensor(tmp_path, type_name)
    planes = read(path, target)
    assert isinstance(planes, Planes)
    assert_same_bits(verify_weight(planes), values)
    spec = planes.spec
    assert (spec.grid, spec.group, spec.scale_dtype) == (Grid.AFFINE, 32, torch.float16)
    assert spec.has_offset == (type_name == "Q4_1")
    assert spec.bits == (8 if type_name == "Q8_0" else 4)
    assert spec.draft_bits == (8 if target is Target.INT4 and type_name == "Q8_0" else 4)
    # no byte more than the file's own blocks
    assert planes.nbytes == blocks_of(type_name).nbytes
    if type_name == "Q8_0" and target is Target.INT8:
        error = (draft_weight(planes) - values).abs()
        step = planes.scale.float().repeat_interleave(32, 1)
        assert (error <= 7.5 / 16 * step.abs() * (1 + 1e-6)).all()


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"])
def test_other_types_are_values_for_the_int8_target(tmp_path: Path, type_name: str) -> None:
    path, values = one_tensor(tmp_path, type_name)
    weight = read(path, Target.INT8)
    assert isinstance(weight, Tensor)
    assert_same_bits(weight, values)


@pytest.mark.parametrize("type_name", ["Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_types_between_4_and_8_bits_keep_8_for_the_int4_target(
    tmp_path: Path, type_name: str
) -> None:
    path, values = one_tensor(tmp_path, type_name)
    planes = read(path, Target.INT4)
    assert isinstance(planes, Planes)
    assert (planes.spec.grid, planes.spec.bits, planes.spec.draft_bits) == (Grid.SIGNED, 8, 8)
    step = planes.scale.float().repeat_interleave(32, 1)
    error = (verify_weight(planes) - values.to(torch.bfloat16).float()).abs()
    assert (error <= step / 32 * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("type_name", "size"), [("Q4_0", 18), ("Q4_1", 20), ("Q8_0", 34)], ids=lambda v: str(v)
)
def test_any_bytes_with_finite_scales_are_kept(tmp_path: Path, type_name: str, size: int) -> None:
    data = np.random.default_rng(1).integers(0, 256, (50, 4, size), np.uint8)
    data[..., 1] &= 0xB7  # exponents below 2^7: finite, 16 d as well
    data[..., 3] &= 0xB7
    path, values = one_tensor(tmp_path, type_name, data.reshape(50, -1))
    planes = read(path, Target.INT4)
    assert isinstance(planes, Planes)
    assert_same_bits(verify_weight(planes), values)


def test_a_q8_0_scale_too_large_for_16_d_is_not_kept_wrong(tmp_path: Path) -> None:
    data = blocks_of("Q8_0").copy()
    data[0, :2] = np.frombuffer(np.float16(5000).tobytes(), np.uint8)
    path, values = one_tensor(tmp_path, "Q8_0", data)
    planes = read(path, Target.INT4)
    assert planes.spec.grid is Grid.SIGNED
    step = planes.scale.float().repeat_interleave(32, 1)
    error = (verify_weight(planes) - values.to(torch.bfloat16).float()).abs()
    assert (error <= step / 32 * (1 + 1e-6)).all()


@pytest.mark.parametrize("scale", [np.inf, np.nan])
@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the expected values
def test_a_scale_that_is_not_finite_is_not_stored_wrong(
    tmp_path: Path, type_name: str, scale: float
) -> None:
    data = blocks_of(type_name).copy()
    data[0, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    path, _ = one_tensor(tmp_path, type_name, data)
    stored = read(path, Target.INT4)
    if isinstance(stored, Planes | Dense):  # a plain tensor would be refused by `nest`
        assert isinstance(stored, Dense)
        assert "inf or NaN" in stored.reason


# --- the order of rows -----------------------------------------------------------------------


def permute(weight: Tensor, num_heads: int) -> Tensor:
    """What llama.cpp's converter does to q and k of the llama architecture."""
    halves = weight.reshape(num_heads, 2, len(weight) // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


ROLES = {"attn_q": ("q_proj", 4), "attn_k": ("k_proj", 2), "attn_v": ("v_proj", 0)}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("type_name", ["F32", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q6_K"])
def test_rows_of_q_and_k(tmp_path: Path, type_name: str, role: str, arch: str) -> None:
    module, num_heads = ROLES[role]
    num_rows = 16 * (num_heads or 2)
    original = torch.from_numpy(blocks_of(type_name, num_rows))  # rows are whole: bytes or values
    is_permuted = arch == "llama" and num_heads > 0
    shipped = permute(original, num_heads) if is_permuted else original
    tensors = {f"blk.3.{role}.weight": (shipped.numpy(), type_name)}
    path = write_gguf(tmp_path / "m.gguf", tensors, arch)
    expected = values_of(type_name, original.numpy())
    for target in Target:
        stored = read(path, target, f"model.layers.3.self_attn.{module}.weight")
        if isinstance(stored, Tensor):
            assert_same_bits(stored.float(), expected)
        elif stored.spec.grid is Grid.AFFINE:
            assert_same_bits(verify_weight(stored), expected)
        else:
            assert (verify_weight(stored) - expected).norm() < 0.02 * expected.norm()


def test_biases_of_q_follow_their_rows(tmp_path: Path) -> None:
    bias = torch.arange(64.0)
    tensors = {"blk.0.attn_q.bias": (permute(bias, 4).numpy(), "F32")}
    path = write_gguf(tmp_path / "m.gguf", tensors)
    assert_same_bits(read(path, Target.INT4, "model.layers.0.self_attn.q_proj.bias"), bias)


def test_heads_without_groups(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_head_count(4)  # and no head_count_kv: as many
    weight = gaussian(64, 32)
    writer.add_tensor("blk.0.attn_k.weight", permute(weight, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name = "model.layers.0.self_attn.k_proj.weight"
    assert_same_bits(read(tmp_path / "m.gguf", Target.BF16, name), weight)


# --- names -----------------------------------------------------------------------------------

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": "rope_freqs.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.12.ffn_norm.weight": "model.layers.12.post_attention_layernorm.weight",
    "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
    "blk.1.attn_q.bias": "model.layers.1.self_attn.q_proj.bias",
    "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    "blk.1.attn_q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
    "blk.1.attn_k_norm.weight": "model.layers.1.self_attn.k_norm.weight",
    "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
    "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
    "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    "blk.1.ffn_gate_exps.weight": "model.layers.1.ffn_gate_exps.weight",
    "nonsense.weight": "nonsense.weight",
}


def test_names_shapes_and_types(tmp_path: Path) -> None:
    tensors = {name: (gaussian(4, 32).numpy(), "F32") for name in NAMES}
    tensors["output_norm.weight"] = (gaussian(7).numpy(), "F32")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    assert checkpoint.kind == "gguf"
    assert checkpoint.names() == sorted(NAMES.values())
    assert checkpoint.shape("lm_head.weight") == (4, 32)
    assert checkpoint.shape("model.norm.weight") == (7,)
    assert checkpoint.type_name("lm_head.weight") == "F32"
    assert checkpoint.metadata["llama.attention.head_count"] == 4
    assert checkpoint.metadata["general.architecture"] == "llama"


def test_shapes_of_quantised_tensors_count_weights(tmp_path: Path) -> None:
    for type_name in QUANTISED:
        checkpoint = open_checkpoint(one_tensor(tmp_path, type_name)[0])
        assert checkpoint.shape(HF_NAME) == (6, 512)
        assert checkpoint.type_name(HF_NAME) == type_name


# --- refusals --------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return one_tensor(tmp_path, "Q4_1")[0]


def test_a_missing_tensor_is_refused(good: Path) -> None:
    checkpoint = open_checkpoint(good)
    for ask in (checkpoint.shape, checkpoint.type_name, lambda n: checkpoint.read(n, Target.INT4)):
        with refused("'nonsense'", good):
            ask("nonsense")


@pytest.mark.parametrize("type_name", ["Q2_K", "Q3_K", "IQ4_NL", "TQ1_0", "I32"])
def test_an_unsupported_type_is_refused(tmp_path: Path, type_name: str) -> None:
    _, size = gguf.GGML_QUANT_SIZES[Type[type_name]]
    data = np.zeros((2, size * 4), np.uint8)
    if type_name == "I32":
        data = np.zeros((2, 32), np.int32)
    path = write_gguf(tmp_path / "m.gguf", {NAME: (data, type_name)})
    with refused(repr(HF_NAME), path, type_name, "Q4_0"):
        read(path, Target.INT4)


@pytest.mark.parametrize("kept", [0, 1, 4, 8, 24, 40, 100, 150, 200, -1, -1000])
def test_a_truncated_file_is_refused(good: Path, kept: int) -> None:
    good.write_bytes(good.read_bytes()[:kept])
    with refused(good):
        open_checkpoint(good)


@pytest.mark.parametrize(
    ("place", "junk"),
    [
        (0, b"GGML"),  # magic
        (0, b"\0" * 16),
        (4, b"\x09\0\0\0"),  # version
        (8, b"\xff" * 8),  # number of tensors
        (16, b"\xff" * 8),  # number of keys
        (24, b"\xff" * 8),  # length of the first key
        (8, b"\xff" * 60),
    ],
)
def test_a_corrupt_header_is_refused(good: Path, place: int, junk: bytes) -> None:
    data = bytearray(good.read_bytes())
    data[place : place + len(junk)] = junk
    good.write_bytes(data)
    with refused(good):
        open_checkpoint(good)


def test_another_file_by_that_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b'{"this": "is JSON"}' * 100)
    with refused(path):
        open_checkpoint(path)


def test_an_unknown_type_number_is_refused(good: Path) -> None:
    data = good.read_bytes()
    # the name, 2 dimensions, their sizes, then the type
    place = data.index(NAME.encode()) + len(NAME) + 4 + 16
    assert data[place] == Type.Q4_1.value
    good.write_bytes(data[:place] + b"\xf0" + data[place + 1 :])
    with refused(good):
        open_checkpoint(good)


@pytest.mark.parametrize("seed", range(4))
def test_no_damaged_byte_makes_a_traceback(good: Path, seed: int) -> None:
    """Every byte of the header, changed at random: QSpecError, or a file that still reads."""
    whole = good.read_bytes()
    rng = np.random.default_rng(seed)
    for place in range(len(whole) - len(blocks_of("Q4_1").tobytes())):
        data = bytearray(whole)
        data[place] ^= int(rng.integers(1, 256))
        good.write_bytes(data)
        with contextlib.suppress(QSpecError):
            checkpoint = GGUFCheckpoint(good)
            for name in checkpoint.names():
                checkpoint.read(name, Target.INT4)
