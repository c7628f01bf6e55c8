"""GPTQ, AWQ and compressed-tensors: packed here bit by bit, compared with w = s (q - z)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers_model_dir import write_model
from helpers_weights import assert_same_bits, gaussian, generator, refused
from qspec_llm.config import resolve_target
from qspec_llm.engine.params import SamplingParams
from qspec_llm.llm import LLM
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.planes import Grid, Planes, draft_weight, verify_weight
from qspec_llm.weights.quantize import Recipe, Target, nest

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
N, K = 16, 256


class Matrix:
    """Random codes, scales and zero points of one matrix; `weight` is the formats' definition."""

    def __init__(
        self,
        *,
        bits: int = 4,
        group: int = 64,
        symmetric: bool = True,
        dtype: torch.dtype = torch.float16,
        order: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        rng = generator(seed)
        num_groups = K // group
        top = 1 << bits
        self.bits, self.group, self.dtype = bits, group, dtype
        self.values = torch.randint(0, top, (N, K), generator=rng)
        self.scale = (torch.rand(N, num_groups, generator=rng) * 0.05 + 0.001).to(dtype)
        self.zero = torch.full((N, num_groups), top // 2)
        if not symmetric:
            self.zero = torch.randint(0, top, (N, num_groups), generator=rng)
        self.index = torch.arange(K) // group if order is None else order

    def weight(self) -> Tensor:
        """[N, K] float32, element by element as the papers have it."""
        out = torch.empty(N, K, dtype=torch.float64)
        for k in range(K):
            g = int(self.index[k])
            out[:, k] = self.scale[:, g].double() * (self.values[:, k] - self.zero[:, g]).double()
        return out.float()


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack consecutive codes of a row into int32 words, the first in the lowest bits."""
    per_word = 32 // bits
    out = torch.zeros(codes.shape[0], -(-codes.shape[1] // per_word), dtype=torch.int64)
    for column in range(codes.shape[1]):
        out[:, column // per_word] |= codes[:, column] << bits * (column % per_word)
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


def gptq(matrix: Matrix, *, zero_step: int = 1) -> dict[str, Tensor]:
    zeros = words(matrix.zero.T.contiguous(), matrix.bits).long()
    ones = {4: 0x11111111, 8: 0x01010101}[matrix.bits]  # v1: taken off whole words
    zeros = (zeros - zero_step * ones) & 0xFFFFFFFF
    return {
        "qweight": words(matrix.values, matrix.bits).T.contiguous(),
        "qzeros": torch.where(zeros >= 1 << 31, zeros - (1 << 32), zeros).to(torch.int32),
        "scales": matrix.scale.T.contiguous(),
        "g_idx": matrix.index.to(torch.int32),
    }


def awq(matrix: Matrix) -> dict[str, Tensor]:
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    shuffled = (torch.arange(N).view(-1, 8)[:, order]).flatten()
    return {
        "qweight": words(matrix.values.T[:, shuffled], 4),
        "qzeros": words(matrix.zero.T[:, shuffled], 4),
        "scales": matrix.scale.T.contiguous(),
    }


def compressed(matrix: Matrix, *, symmetric: bool, index: bool = False) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": words(matrix.values, matrix.bits),
        "weight_scale": matrix.scale,
        "weight_shape": torch.tensor([N, K]),
    }
    if not symmetric:
        packed = words(matrix.zero.T.contiguous(), matrix.bits)
        tensors["weight_zero_point"] = packed.T.contiguous()
    if index:
        tensors["weight_g_idx"] = matrix.index.to(torch.int32)
    return tensors


GPTQ = {"quant_method": "gptq", "bits": 4}
AWQ = {"quant_method": "awq", "version": "gemm"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"type": "int"}, "input_activations": None}},
}


def write(
    path: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    *,
    more: dict[str, Tensor] | None = None,
    model_type: str = "llama",
) -> Path:
    path.mkdir()
    values = {"model_type": model_type, "quantization_config": config}
    (path / "config.json").write_text(json.dumps(values))
    named = {f"{MODULE}.{part}": tensor for part, tensor in tensors.items()}
    save_file({**named, **(more or {})}, path / "model.safetensors")
    return path


def read(path: Path, target: Target) -> Any:
    return open_checkpoint(path).read(NAME, target)


def assert_kept(planes: object, matrix: Matrix, group: int) -> None:
    """Planes that hold a symmetric matrix, bit for bit."""
    assert isinstance(planes, Planes)
    assert (planes.spec.bits, planes.spec.grid) == (matrix.bits, Grid.AFFINE)
    assert (planes.spec.group, planes.spec.has_offset) == (group, False)
    assert planes.spec.scale_dtype is matrix.dtype
    assert_same_bits(verify_weight(planes), matrix.weight())


SYMMETRIC = {
    "gptq v1": lambda m: (gptq(m), GPTQ),
    "gptq v2": lambda m: (gptq(m, zero_step=0), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "awq": lambda m: (awq(m), AWQ),
    "compressed-tensors": lambda m: (compressed(m, symmetric=True), COMPRESSED),
}
ASYMMETRIC = SYMMETRIC | {
    "compressed-tensors": lambda m: (compressed(m, symmetric=False), COMPRESSED)
}


@pytest.mark.parametrize("form", SYMMETRIC)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_symmetric_codes_are_kept_bit_for_bit(
    tmp_path: Path, form: str, group: int, dtype: torch.dtype
) -> None:
    matrix = Matrix(group=group, dtype=dtype)
    path = write(tmp_path / "m", *SYMMETRIC[form](matrix))
    checkpoint = open_checkpoint(path)
    assert checkpoint.names() == [NAME]
    assert checkpoint.shape(NAME) == (N, K)
    assert checkpoint.type_name(NAME).startswith("Q4 ")
    assert resolve_target("auto", checkpoint) is Target.INT4
    planes = checkpoint.read(NAME, Target.INT4)
    assert_kept(planes, matrix, group)
    assert_same_bits(draft_weight(planes), matrix.weight())


@pytest.mark.parametrize("form", ASYMMETRIC)
def test_asymmetric_codes_are_kept_and_the_offset_is_rounded_once(
    tmp_path: Path, form: str
) -> None:
    matrix = Matrix(symmetric=False)
    planes = read(write(tmp_path / "m", *ASYMMETRIC[form](matrix)), Target.INT4)
    assert isinstance(planes, Planes)
    assert planes.spec.has_offset
    exact = -matrix.scale.double() * matrix.zero.double()
    assert_same_bits(planes.offset, exact.to(torch.float16))
    error = (verify_weight(planes) - matrix.weight()).abs().view(N, -1, matrix.group).amax(-1)
    assert (error <= exact.abs() * 2.0**-11 + 1e-7).all()
    assert float((error / matrix.scale.float()).max()) < 1 / 256  # of a step


@pytest.mark.parametrize("form", ASYMMETRIC)
def test_16_bit_targets_take_the_dequantised_weights(tmp_path: Path, form: str) -> None:
    matrix = Matrix(symmetric=False)
    path = write(tmp_path / "m", *ASYMMETRIC[form](matrix))
    value = read(path, Target.BF16)
    assert_same_bits(value, matrix.weight())
    stored = nest(value, Recipe(Target.BF16))
    assert isinstance(stored, Planes)
    assert_same_bits(verify_weight(stored), matrix.weight().to(torch.bfloat16).float())


@pytest.mark.parametrize("group", [K, 16])
def test_groups_of_other_sizes(tmp_path: Path, group: int) -> None:
    """One scale a row becomes equal scales of our groups; too small groups are dequantised."""
    matrix = Matrix(group=group)
    checkpoint = open_checkpoint(
        write(tmp_path / "m", compressed(matrix, symmetric=True), COMPRESSED)
    )
    value = checkpoint.read(NAME, Target.INT4)
    assert isinstance(value, Planes)
    if group == K:
        assert_kept(value, matrix, 128)
    else:
        assert (value.spec.grid, value.spec.bits) == (Grid.SIGNED, 8)
        assert_same_bits(checkpoint.read(NAME, Target.BF16), matrix.weight())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_8_bit_codes(tmp_path: Path, form: str, symmetric: bool) -> None:
    matrix = Matrix(bits=8, symmetric=symmetric)
    tensors = gptq(matrix) if form == "gptq" else compressed(matrix, symmetric=symmetric)
    path = write(tmp_path / "m", tensors, GPTQ if form == "gptq" else COMPRESSED)
    assert resolve_target("auto", open_checkpoint(path)) is Target.INT8
    for target, drafted in ((Target.INT8, 4), (Target.INT4, 8)):
        planes = read(path, target)
        assert isinstance(planes, Planes)
        assert (planes.spec.bits, planes.spec.draft_bits) == (8, drafted)
        if symmetric:
            assert_same_bits(verify_weight(planes), matrix.weight())
        else:
            bound = (matrix.scale.double() * matrix.zero).abs() * 2.0**-11 + 1e-7
            error = (verify_weight(planes) - matrix.weight()).abs().view(N, -1, matrix.group)
            assert (error.amax(-1) <= bound).all()


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_act_order_is_dequantised(tmp_path: Path, form: str) -> None:
    order = torch.arange(K)[torch.randperm(K, generator=generator(3))] // 64
    matrix = Matrix(order=order)
    tensors = gptq(matrix) if form == "gptq" else compressed(matrix, symmetric=True, index=True)
    checkpoint = open_checkpoint(
        write(tmp_path / "m", tensors, GPTQ if form == "gptq" else COMPRESSED)
    )
    assert resolve_target("auto", checkpoint) is Target.BF16
    assert_same_bits(checkpoint.read(NAME, Target.BF16), matrix.weight())
    value = checkpoint.read(NAME, Target.INT4)
    assert isinstance(value, Planes)
    assert (value.spec.grid, value.spec.bits) == (Grid.SIGNED, 8)


def test_an_order_that_is_none_is_kept(tmp_path: Path) -> None:
    matrix = Matrix()
    tensors = compressed(matrix, symmetric=True)
    tensors["weight_g_idx"] = torch.full((K,), -1, dtype=torch.int32)
    assert_kept(read(write(tmp_path / "m", tensors, COMPRESSED), Target.INT4), matrix, 64)


def test_zero_points_of_zero_borrow_in_gptq_v1(tmp_path: Path) -> None:
    """Zero points 0 and 5 make the byte 0x50, which is stored as 0x3F."""
    matrix = Matrix()
    matrix.zero[0::2], matrix.zero[1::2] = 0, 5
    assert gptq(matrix)["qzeros"][0, 0] == 0x3F3F3F3F
    checkpoint = open_checkpoint(write(tmp_path / "m", gptq(matrix), GPTQ))
    assert_same_bits(checkpoint.read(NAME, Target.BF16), matrix.weight())


def test_zero_points_in_int8_of_older_compressed_tensors(tmp_path: Path) -> None:
    matrix = Matrix(symmetric=False)
    tensors = compressed(matrix, symmetric=True)
    tensors["weight_zero_point"] = (matrix.zero - 8).to(torch.int8)
    path = write(tmp_path / "m", tensors, COMPRESSED)
    assert_same_bits(read(path, Target.BF16), matrix.weight())


def test_an_awq_word_by_hand(tmp_path: Path) -> None:
    """0x76543210: nibbles 0..7 belong to outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    tensors = {
        "qweight": torch.full((64, 1), 0x76543210, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    weight = read(write(tmp_path / "m", tensors, AWQ), Target.BF16)
    assert weight[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_gptq_word_by_hand(tmp_path: Path) -> None:
    """Word 0x76543210 holds the codes 0..7 of inputs 0..7; a stored 7 is the zero point 8."""
    tensors = {
        "qweight": torch.full((8, 8), 0x76543210, dtype=torch.int32),
        "qzeros": torch.full((1, 1), 0x77777777, dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    weight = read(write(tmp_path / "m", tensors, GPTQ), Target.BF16)
    assert weight.shape == (8, 64)
    assert weight[3, :8].tolist() == [-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5]


def test_floats_beside_codes_are_read_as_they_are(tmp_path: Path) -> None:
    norm = gaussian(8).to(torch.bfloat16)
    path = write(tmp_path / "m", gptq(Matrix()), GPTQ, more={"model.norm.weight": norm})
    checkpoint = open_checkpoint(path)
    assert checkpoint.names() == [NAME, "model.norm.weight"]
    assert checkpoint.type_name("model.norm.weight") == "BF16"
    assert_same_bits(checkpoint.read("model.norm.weight", Target.INT4), norm)


def test_linears_left_in_floats_keep_every_bit(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    more = {name: gaussian(N, K).to(torch.bfloat16), "lm_head.weight": gaussian(N, K)}
    checkpoint = open_checkpoint(write(tmp_path / "m", gptq(Matrix()), GPTQ, more=more))
    planes = checkpoint.read(name, Target.INT4)
    assert isinstance(planes, Planes)
    assert_same_bits(verify_weight(planes), more[name].float())
    for other, target in ((name, Target.INT8), ("lm_head.weight", Target.INT4)):
        assert_same_bits(checkpoint.read(other, target), more[other])  # `nest` decides


@pytest.mark.parametrize(("model_type", "is_left_out"), [("llama", True), ("qwen2", False)])
def test_biases_of_zero_that_no_family_has_are_left_out(
    tmp_path: Path, model_type: str, is_left_out: bool
) -> None:
    prefix = "model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.{part}": tensor for part, tensor in gptq(Matrix()).items()}
    tensors[f"{prefix}.bias"] = torch.zeros(N, dtype=torch.float16)
    path = write(tmp_path / "m", gptq(Matrix()), GPTQ, more=tensors, model_type=model_type)
    assert (f"{prefix}.bias" not in open_checkpoint(path).names()) == is_left_out


def test_a_bias_that_is_not_zero_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {**gptq(Matrix()), "bias": torch.ones(N)}, GPTQ)
    assert f"{MODULE}.bias" in open_checkpoint(path).names()


@pytest.mark.parametrize(
    ("config", "words_of_error"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("NF4", "original")),
        ({"quant_method": "fp8"}, ("fp8", "original")),
        ({**GPTQ, "checkpoint_format": "marlin"}, ("marlin", "gptq_v2")),
        ({**AWQ, "version": "gemv"}, ("gemv", "gemm")),
    ],
)
def test_other_packings_are_refused(
    tmp_path: Path, config: dict[str, Any], words_of_error: tuple[str, ...]
) -> None:
    path = write(tmp_path / "m", gptq(Matrix()), config)
    with refused(path, *words_of_error):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "float-quantized"}, "pack-quantized"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"config_groups": {"g": {"input_activations": {"num_bits": 8}}}}, "input activations"),
        ({"config_groups": {"g": {"weights": {"type": "float"}}}}, "float"),
    ],
)
def test_compressed_tensors_that_ask_for_more_are_refused(
    tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    tensors = compressed(Matrix(), symmetric=True)
    path = write(tmp_path / "m", tensors, {**COMPRESSED, **change})
    with refused(path, word):
        open_checkpoint(path)


def test_a_config_without_quantised_tensors_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"weight": torch.ones(N, K)}, GPTQ)
    with refused(path, "gptq"):
        open_checkpoint(path)


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    matrix = Matrix()
    matrix.scale[3, 1] = torch.inf
    with refused(NAME, "scale"):
        read(write(tmp_path / "m", gptq(matrix), GPTQ), Target.INT4)


def test_three_bits_are_refused(tmp_path: Path) -> None:
    tensors = gptq(Matrix())
    tensors["qzeros"] = torch.zeros(4, N * 3 // 32 + 1, dtype=torch.int32)
    tensors["scales"] = torch.ones(4, 20, dtype=torch.float16)
    with refused(MODULE, "4 and 8"):
        open_checkpoint(write(tmp_path / "m", tensors, GPTQ))


def quantise(weight: Tensor, group: int = 32) -> Matrix:
    """Round a float matrix to nearest, asymmetrically, in the formats' terms."""
    matrix = Matrix.__new__(Matrix)
    grouped = weight.float().view(weight.shape[0], -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    matrix.bits, matrix.group, matrix.dtype = 4, group, torch.float16
    matrix.scale = ((high - low) / 15).to(torch.float16)
    step = matrix.scale.float()
    matrix.zero = torch.round(-low / step).clamp(0, 15).long()
    codes = torch.round(grouped / step[..., None]) + matrix.zero[..., None]
    matrix.values = codes.clamp(0, 15).long().view(weight.shape)
    matrix.index = torch.arange(weight.shape[1]) // group
    return matrix


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_quantised_model_generates_as_its_dequantised_self(tmp_path: Path, form: str) -> None:
    """From config.json to tokens: drafts change nothing, and int4 is bf16 up to rounding."""
    write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        if value.ndim == 1 or "embed" in name or "lm_head" in name or "1.mlp.up" in name:
            tensors[name] = value  # one linear of the second layer stays in floats, too
            continue
        matrix, module = quantise(value), name.removesuffix(".weight")
        parts = gptq(matrix) if form == "gptq" else compressed(matrix, symmetric=False)
        if form != "gptq":
            parts["weight_shape"] = torch.tensor(value.shape)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, file)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "llama", "quantization_config": GPTQ if form == "gptq" else COMPRESSED}
    (tmp_path / "config.json").write_text(json.dumps(config))

    params = SamplingParams(max_tokens=24, temperature=0, logprobs=0)
    llm = LLM(tmp_path, max_tokens_in_kv=1024)
    assert llm.config.target is Target.INT4
    plain, drafted = (llm.generate("hello there", params, gamma=gamma)[0] for gamma in (0, 3))
    assert plain.outputs[0].token_ids == drafted.outputs[0].token_ids
    assert plain.outputs[0].logprobs == drafted.outputs[0].logprobs
    floats = LLM(tmp_path, target="bf16", max_tokens_in_kv=1024)
    other = floats.generate("hello there", params)[0].outputs[0]
    assert other.logprobs is not None
    assert plain.outputs[0].logprobs is not None
    first = plain.outputs[0].logprobs[0]
    assert first.token_id == other.logprobs[0].token_id
    assert first.logprob == pytest.approx(other.logprobs[0].logprob, abs=0.1)
