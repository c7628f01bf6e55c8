"""The nested checkpoint on disk: planes and scales in safetensors, described by one JSON index.

    DIR/qspec.json               {"format": 1, "target", "model", "tensors": {name: record}}
    DIR/qspec-00001.safetensors  tensors "NAME#q4", "NAME#r4", "NAME#r8", "NAME#scale",
                                 "NAME#offset", or "NAME" for a dense one; at most SHARD_BYTES

A record is {"file", "kind": "dense", "reason", "dtype"} or {"file", "kind": "nested", and the
fields of PlaneSpec}. docs/format.md has the bytes. Writing goes to a temporary directory that is
renamed at the end, so a directory with an index is a whole checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.checkpoint.safetensors_dir import open_safetensors, read_json
from qspec_llm.weights.planes import Dense, Grid, Planes, PlaneSpec, Stored
from qspec_llm.weights.quantize import Target

__all__ = ["FORMAT_VERSION", "INDEX_NAME", "NestedCheckpoint", "write"]

FORMAT_VERSION = 1
INDEX_NAME = "qspec.json"
SHARD_BYTES = 4 << 30


def write(
    path: Path,
    target: Target,
    model: Metadata,
    tensors: Iterable[tuple[str, Stored]],
    *,
    shard_bytes: int = SHARD_BYTES,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write a nested checkpoint, one shard in memory at a time.

    Args:
        path: the directory to create; it must not exist yet.
        target: what the verify view of these tensors reproduces.
        model: the model's configuration, kept as it is under "model".
        tensors: names and stored tensors, in the order to write them.
        shard_bytes: a new file begins once one holds this many bytes.
        write_more: adds other files (the tokenizer's) before the directory gets its name.

    Raises:
        QSpecError: the directory exists already.
    """
    if path.exists():
        raise QSpecError(f"{path} exists already; choose a new directory")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        records = _write_shards(partial, tensors, shard_bytes)
        index = {
            "format": FORMAT_VERSION,
            "target": target.value,
            "model": dict(model),
            "tensors": records,
        }
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
        if write_more is not None:
            write_more(partial)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_shards(
    path: Path, tensors: Iterable[tuple[str, Stored]], shard_bytes: int
) -> dict[str, Any]:
    records: dict[str, Any] = {}
    shard: dict[str, Tensor] = {}
    num_files = 1
    for name, stored in tensors:
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            save_file(shard, path / f"qspec-{num_files:05}.safetensors")
            shard, num_files = {}, num_files + 1
        records[name] = {"file": f"qspec-{num_files:05}.safetensors", **_record(stored)}
        shard.update(_named(name, stored))
    save_file(shard, path / f"qspec-{num_files:05}.safetensors")
    return records


def _record(stored: Stored) -> dict[str, Any]:
    if isinstance(stored, Dense):
        dtype = str(stored.weight.dtype).removeprefix("torch.")
        return {"kind": "dense", "reason": stored.reason, "dtype": dtype}
    fields = asdict(stored.spec)
    return {"kind": "nested", **fields, "scale_dtype": str(fields["scale_dtype"])[len("torch.") :]}


def _named(name: str, stored: Stored) -> dict[str, Tensor]:
    if isinstance(stored, Dense):
        return {name: stored.weight.contiguous()}
    return {f"{name}#{plane}": t.contiguous() for plane, t in stored.tensors().items()}


class NestedCheckpoint:
    """Reads what `write` wrote."""

    kind: Literal["hf", "gguf", "nested"] = "nested"

    def __init__(self, path: Path) -> None:
        self.path = path
        index = read_json(path / INDEX_NAME)
        if index.get("format") != FORMAT_VERSION:
            raise QSpecError(
                f"{path} has format version {index.get('format')!r}; this release reads "
                f"{FORMAT_VERSION}"
            )
        try:
            self.target = Target(index["target"])
            self.metadata: Metadata = index["model"]
            self._records: dict[str, Any] = index["tensors"]
            files = sorted({str(record["file"]) for record in self._records.values()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise QSpecError(f"{path / INDEX_NAME} is damaged: {error!r}") from None
        self._files = {name: open_safetensors(path / name) for name in files}

    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._records)

    def type_name(self, name: str) -> str:
        """ "nested" or the dtype of a dense tensor."""
        record = self._record(name)
        return str(record["dtype"] if record["kind"] == "dense" else record["kind"])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        record = self._record(name)
        if record["kind"] == "nested":
            return record["num_rows"], record["num_cols"]
        return tuple(self._files[record["file"]].get_slice(name).get_shape())

    def read(self, name: str, target: Target) -> Stored:
        """One tensor as stored."""
        if target is not self.target:
            raise QSpecError(
                f"{self.path} was nested for target {self.target.value!r}, not {target.value!r}; "
                "nest the original again"
            )
        record = dict(self._record(name))
        file = self._files[record.pop("file")]
        try:
            if record.pop("kind") == "dense":
                return Dense(file.get_tensor(name), record["reason"])
            record["scale_dtype"] = getattr(torch, record["scale_dtype"])
            spec = PlaneSpec(**{**record, "grid": Grid(record["grid"])})
            return Planes.from_tensors(
                spec, {plane: file.get_tensor(f"{name}#{plane}") for plane in spec.shapes()}
            )
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise QSpecError(f"tensor {name!r} of {self.path} is damaged: {error}") from None

    def _record(self, name: str) -> Metadata:
        if name not in self._records:
            raise QSpecError(f"{self.path} has no tensor {name!r}")
        record: Metadata = self._records[name]
        return record
