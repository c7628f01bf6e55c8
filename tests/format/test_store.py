"""The nested checkpoint: every form comes back bit for bit, and damage is told in a sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers_weights import (
    FORMS,
    assert_same_bits,
    assert_same_stored,
    bits,
    gaussian,
    random_planes,
    refused,
)
from qspec_llm.weights import store
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.pack import pack_nibbles
from qspec_llm.weights.planes import Dense, Planes, PlaneSpec, Stored
from qspec_llm.weights.quantize import Target

MODEL = {"family": "llama", "hidden_size": 64}


def every_form() -> dict[str, Stored]:
    tensors: dict[str, Stored] = {
        f"model.{form}.{group}.weight": random_planes(form, 6, 128, group, seed=index)
        for index, form in enumerate(FORMS)
        for group in (32, 64)
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors[f"model.norm_{dtype}"] = Dense(gaussian(33).to(dtype), "a vector")
    return tensors


def write(path: Path, tensors: dict[str, Stored], **options: Any) -> store.NestedCheckpoint:
    store.write(path, Target.INT4, MODEL, tensors.items(), **options)
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, store.NestedCheckpoint)
    return checkpoint


def small(path: Path) -> Path:
    """A checkpoint of one nested and one dense tensor."""
    write(path, {"w": random_planes("affine4_offset", 2, 32), "n": Dense(gaussian(4), "a vector")})
    return path


def edit_index(path: Path, change: Any) -> None:
    index = json.loads((path / "qspec.json").read_text())
    changed = change(index)
    (path / "qspec.json").write_text(json.dumps(index if changed is None else changed))


# --- round trip ------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 700, store.SHARD_BYTES])
def test_every_form_comes_back(tmp_path: Path, shard_bytes: int) -> None:
    tensors = every_form()
    checkpoint = write(tmp_path / "m", tensors, shard_bytes=shard_bytes)
    assert checkpoint.kind == "nested"
    assert checkpoint.target is Target.INT4
    assert checkpoint.metadata == MODEL
    assert checkpoint.names() == sorted(tensors)
    for name, stored in tensors.items():
        assert_same_stored(checkpoint.read(name, Target.INT4), stored)
        if isinstance(stored, Planes):
            assert checkpoint.type_name(name) == "nested"
            assert checkpoint.shape(name) == (stored.spec.num_rows, stored.spec.num_cols)
        else:
            assert checkpoint.type_name(name) == str(stored.weight.dtype).removeprefix("torch.")
            assert checkpoint.shape(name) == tuple(stored.weight.shape)


def test_a_shard_ends_once_it_holds_enough(tmp_path: Path) -> None:
    tensors = {f"t{i}": Dense(gaussian(25), "a vector") for i in range(7)}  # 100 bytes each
    write(tmp_path / "m", tensors, shard_bytes=200)
    index = json.loads((tmp_path / "m" / "qspec.json").read_text())
    files = [index["tensors"][f"t{i}"]["file"] for i in range(7)]
    assert files == [f"qspec-0000{1 + i // 2}.safetensors" for i in range(7)]
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"qspec.json", *files}


def test_float16_scales_survive_bit_for_bit(tmp_path: Path) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    patterns = patterns[torch.isfinite(patterns)].view(-1, 2)
    num_rows = len(patterns)
    planes = Planes(
        spec=PlaneSpec(num_rows, 64, group=32, **FORMS["affine4_f16"]),
        q4=torch.zeros(num_rows, 32, dtype=torch.uint8),
        scale=patterns.contiguous(),
        offset=patterns.flip(0).contiguous(),
    )
    read = write(tmp_path / "m", {"w": planes}).read("w", Target.INT4)
    assert isinstance(read, Planes)
    assert_same_bits(bits(read.scale), bits(planes.scale))
    assert_same_stored(read, planes)


def test_an_empty_checkpoint(tmp_path: Path) -> None:
    assert write(tmp_path / "m", {}).names() == []


def test_more_files_are_written_before_the_directory_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "m"

    def write_more(partial: Path) -> None:
        assert not path.exists()
        (partial / "tokenizer.json").write_text("{}")

    write(path, {}, write_more=write_more)
    assert (path / "tokenizer.json").read_text() == "{}"


# --- golden bytes ----------------------------------------------------------------------------


def test_the_bytes_on_disk_are_golden(tmp_path: Path) -> None:
    codes = torch.arange(32).to(torch.uint8).view(1, 32) & 15
    nested = Planes(
        spec=PlaneSpec(1, 32, group=32, **FORMS["signed8"]),
        q4=pack_nibbles(codes, 32),
        r4=pack_nibbles(15 - codes, 32),
        scale=torch.tensor([[0.5]], dtype=torch.bfloat16),
    )
    dense = Dense(torch.tensor([1.0, -2.0], dtype=torch.bfloat16), "a vector")
    store.write(tmp_path / "m", Target.INT8, MODEL, [("w", nested), ("n", dense)])

    assert json.loads((tmp_path / "m" / "qspec.json").read_text()) == {
        "format": 1,
        "target": "int8",
        "model": MODEL,
        "tensors": {
            "w": {
                "file": "qspec-00001.safetensors",
                "kind": "nested",
                "num_rows": 1,
                "num_cols": 32,
                "group": 32,
                "bits": 8,
                "grid": "signed",
                "has_offset": False,
                "scale_dtype": "bfloat16",
                "draft_bits": 4,
            },
            "n": {
                "file": "qspec-00001.safetensors",
                "kind": "dense",
                "reason": "a vector",
                "dtype": "bfloat16",
            },
        },
    }
    data = (tmp_path / "m" / "qspec-00001.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    found = {
        name: (field["dtype"], field["shape"], body[slice(*field["data_offsets"])].hex())
        for name, field in header.items()
        if name != "__metadata__"
    }
    assert found == {
        "w#q4": ("U8", [1, 16], "00112233445566778899aabbccddeeff"),
        "w#r4": ("U8", [1, 16], "ffeeddccbbaa99887766554433221100"),
        "w#scale": ("BF16", [1, 1], "003f"),
        "n": ("BF16", [2], "803f00c0"),
    }


# --- writing safely --------------------------------------------------------------------------


def test_an_existing_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    with refused(path, "exists"):
        store.write(path, Target.INT8, MODEL, [("n", Dense(gaussian(4), "a vector"))])
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "mine.txt"]
    assert (path / "mine.txt").read_text() == "mine"


def test_an_existing_file_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text("mine")
    with refused(path, "exists"):
        store.write(path, Target.INT8, MODEL, [])
    assert path.read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_tensors_fail(tmp_path: Path, error: BaseException) -> None:
    def tensors() -> Iterator[tuple[str, Stored]]:
        yield "a", random_planes("signed8", 4, 64)
        yield "b", random_planes("signed8", 4, 64)
        raise error

    with pytest.raises(type(error)):
        store.write(tmp_path / "m", Target.INT8, MODEL, tensors(), shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_the_other_files_fail(tmp_path: Path) -> None:
    def write_more(partial: Path) -> None:
        (partial / "tokenizer.json").write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.write(tmp_path / "m", Target.INT8, MODEL, [], write_more=write_more)
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_directory_of_before_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "qspec-00009.safetensors").write_text("left over")
    write(tmp_path / "m", {"n": Dense(gaussian(4), "a vector")})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    names = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert names == ["qspec-00001.safetensors", "qspec.json"]


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with refused(tmp_path / "file"):
        store.write(tmp_path / "file" / "m", Target.INT8, MODEL, [])


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(tmp_path: Path, version: object) -> None:
    path = small(tmp_path / "m")
    edit_index(path, lambda index: index.update(format=version))
    with refused(path, repr(version), "version", 1):
        open_checkpoint(path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "m")
    (path / "qspec-00001.safetensors").unlink()
    with refused("qspec-00001.safetensors", "missing"):
        open_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_a_truncated_shard_is_refused(tmp_path: Path, kept: int) -> None:
    path = small(tmp_path / "m")
    shard = path / "qspec-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with refused("qspec-00001.safetensors"):
        open_checkpoint(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"qspec"', "\xff"])
def test_an_index_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = small(tmp_path / "m")
    (path / "qspec.json").write_bytes(text.encode("latin-1"))
    with refused("qspec.json"):
        open_checkpoint(path)


DAMAGED_INDEX = {
    "no target": lambda index: index.pop("target") and None,
    "no model": lambda index: index.pop("model") and None,
    "no tensors": lambda index: index.pop("tensors") and None,
    "unknown target": lambda index: index.update(target="int3"),
    "tensors in a list": lambda index: index.update(tensors=["w"]),
    "a record that is no object": lambda index: index["tensors"].update(w="here"),
    "a record without a file": lambda index: index["tensors"]["w"].pop("file") and None,
}


@pytest.mark.parametrize("case", DAMAGED_INDEX)
def test_a_damaged_index_is_refused(tmp_path: Path, case: str) -> None:
    path = small(tmp_path / "m")
    edit_index(path, DAMAGED_INDEX[case])
    with refused("qspec.json", "damaged"):
        open_checkpoint(path)


def set_record(**fields: object) -> Any:
    return lambda index: index["tensors"]["w"].update(fields)


def drop_field(name: str, field: str) -> Any:
    return lambda index: index["tensors"][name].pop(field) and None


DAMAGED_RECORD = {
    "group": set_record(group=48),
    "another group": set_record(group=64),
    "bits": set_record(bits=8),
    "grid": set_record(grid="round"),
    "scale dtype": set_record(scale_dtype="bfloat17"),
    "a dtype that is a function": set_record(scale_dtype="load"),
    "other scale dtype": set_record(scale_dtype="float16"),
    "offset denied": set_record(has_offset=False, num_cols=64),
    "more rows": set_record(num_rows=3),
    "rows in words": set_record(num_rows="two"),
    "unknown field": set_record(colour="red"),
    "no group": drop_field("w", "group"),
    "no rows": drop_field("w", "num_rows"),
    "no kind": drop_field("w", "kind"),
    "unknown kind": set_record(kind="sparse"),
    "called dense": set_record(kind="dense", reason="", dtype="bfloat16"),
}


def read_all(path: Path) -> None:
    """What loading a model does with every tensor of it."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.shape(name)
        checkpoint.type_name(name)
        checkpoint.read(name, Target.INT4)


@pytest.mark.parametrize("case", DAMAGED_RECORD)
def test_a_damaged_record_is_refused(tmp_path: Path, case: str) -> None:
    path = small(tmp_path / "m")
    edit_index(path, DAMAGED_RECORD[case])
    with refused("'w'", path):
        read_all(path)


def test_a_tensor_that_is_in_the_index_only_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "m")
    edit_index(path, lambda i: i["tensors"].update(ghost=i["tensors"]["w"]))
    with refused("'ghost'", path):
        read_all(path)


def test_a_dense_tensor_that_is_in_the_index_only_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "m")
    edit_index(path, lambda i: i["tensors"].update(ghost=i["tensors"]["n"]))
    with refused("'ghost'", path):
        read_all(path)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small(tmp_path / "m"))
    for ask in (checkpoint.shape, checkpoint.type_name, lambda n: checkpoint.read(n, Target.INT4)):
        with refused("'nonsense'", checkpoint.path):
            ask("nonsense")


def test_another_target_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small(tmp_path / "m"))
    for target in (Target.INT8, Target.BF16):
        with refused("'int4'", repr(target.value)):
            checkpoint.read("w", target)
