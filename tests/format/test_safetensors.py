"""Hugging Face directories: one file or many, and what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers_weights import assert_same_bits, gaussian, refused
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.quantize import Target

INDEX = "model.safetensors.index.json"


def three_tensors() -> dict[str, Tensor]:
    return {
        "a.weight": gaussian(4, 32).to(torch.bfloat16),
        "b.weight": gaussian(3, 5).to(torch.float16),
        "c.bias": gaussian(7),
    }


def single(path: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["X"], **config}))
    save_file(three_tensors() if tensors is None else tensors, path / "model.safetensors")
    return path


def sharded(path: Path) -> Path:
    single(path)
    (path / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(three_tensors().items(), 1):
        weight_map[name] = f"model-0000{number}-of-00003.safetensors"
        save_file({name: tensor}, path / weight_map[name])
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("make", [single, sharded])
@pytest.mark.parametrize("target", Target)
def test_tensors_come_back(tmp_path: Path, make: Any, target: Target) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "m"))
    expected = three_tensors()
    assert checkpoint.kind == "hf"
    assert checkpoint.metadata["architectures"] == ["X"]
    assert checkpoint.names() == sorted(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        read = checkpoint.read(name, target)
        assert isinstance(read, Tensor)
        assert_same_bits(read, tensor)
    assert [checkpoint.type_name(n) for n in checkpoint.names()] == ["BF16", "F16", "F32"]


def test_shards_without_an_index_are_read_too(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    (path / INDEX).unlink()
    assert open_checkpoint(path).names() == sorted(three_tensors())


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    save_file({"extra": torch.zeros(1)}, path / "consolidated.safetensors")
    assert open_checkpoint(path).names() == sorted(three_tensors())


# --- refusals --------------------------------------------------------------------------------


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path / "nowhere", "does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path, "no .safetensors"):
        open_checkpoint(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with refused("notes.txt", ".gguf"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_directory_around_a_gguf_file_says_which_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with refused(tmp_path / "model.gguf"):
        open_checkpoint(tmp_path)


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickle_is_refused_and_never_loaded(tmp_path: Path, name: str) -> None:
    folder, sign = tmp_path / "m", tmp_path / "went off"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(pickle.dumps(Bomb(sign)))
    for path in (folder, folder / name):
        with refused(path, "pickle", "safetensors"):
            open_checkpoint(path)
    assert not sign.exists()


def test_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    path = single(tmp_path / "m")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert open_checkpoint(path).names() == sorted(three_tensors())


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_quantised_checkpoint_without_codes_is_refused(tmp_path: Path, method: str) -> None:
    path = single(tmp_path / "m", quantization_config={"quant_method": method, "bits": 4})
    with refused(path, method):
        open_checkpoint(path)


@pytest.mark.parametrize("value", ["gptq", ["gptq"]])
def test_an_odd_quantization_config_is_refused(tmp_path: Path, value: object) -> None:
    path = single(tmp_path / "m", quantization_config=value)
    with refused(path):
        open_checkpoint(path)


def test_a_quantization_config_of_null_means_none(tmp_path: Path) -> None:
    path = single(tmp_path / "m", quantization_config=None)
    assert open_checkpoint(path).names() == sorted(three_tensors())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
def test_integer_tensors_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(single(tmp_path / "m", {"q": torch.ones(2, 32, dtype=dtype)}))
    with refused("'q'", checkpoint.path, checkpoint.type_name("q"), "BF16"):
        checkpoint.read("q", Target.BF16)


def test_an_8_bit_float_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(2, 32).to(torch.float8_e4m3fn)
    checkpoint = open_checkpoint(single(tmp_path / "m", {"q": weight}))
    with refused("'q'", "F8_E4M3"):
        checkpoint.read("q", Target.BF16)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path / "m"))
    for ask in (checkpoint.shape, checkpoint.type_name, lambda n: checkpoint.read(n, Target.INT4)):
        with refused("'nonsense'", checkpoint.path):
            ask("nonsense")


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 50, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = single(tmp_path / "m")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with refused("model.safetensors"):
        open_checkpoint(path)


@pytest.mark.parametrize("junk", [b"\xff" * 64, b"\x10" + b"\0" * 63, b"\x80\x04pickle" * 9])
def test_a_corrupt_header_is_refused(tmp_path: Path, junk: bytes) -> None:
    path = single(tmp_path / "m")
    (path / "model.safetensors").write_bytes(junk)
    with refused("model.safetensors"):
        open_checkpoint(path)


def test_an_index_naming_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    (path / "model-00002-of-00003.safetensors").unlink()
    with refused("model-00002-of-00003.safetensors", "missing"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"weight_map": ["a"]}',
        '{"weight_map": null}',
        '{"weight_map": "a"}',
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    path = sharded(tmp_path / "m")
    (path / INDEX).write_text(text)
    with refused(INDEX):
        open_checkpoint(path)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3"])
def test_a_missing_or_damaged_configuration_is_refused(tmp_path: Path, text: str | None) -> None:
    path = single(tmp_path / "m")
    (path / "config.json").unlink()
    if text is not None:
        (path / "config.json").write_text(text)
    with refused("config.json"):
        open_checkpoint(path)
