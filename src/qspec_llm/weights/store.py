"""The nested checkpoint on disk: planes and scales in safetensors, described by one JSON index.

    DIR/qspec.json               {"format": 1, "target", "model", "tensors": {name: record}}, and
                                 "made" and "plan", how its codes were chosen and which of them a
                                 draft reads, where `qspec quantize` wrote it
    DIR/qspec-00001.safetensors  tensors "NAME#q4", "NAME#r4", "NAME#r8", "NAME#scale",
                                 "NAME#offset", or "NAME" for a dense one; at most SHARD_BYTES

A record is {"file", "kind": "dense", "reason", "dtype"} or {"file", "kind": "nested", and the
fields of PlaneSpec}. docs/format.md has the bytes. Writing goes to a temporary directory that is
renamed at the end, so a directory with an index is a whole checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.checkpoint.safetensors_dir import open_safetensors, read_json
from qspec_llm.weights.planes import Dense, Grid, Planes, PlaneSpec, Stored
from qspec_llm.weights.quantize import Target

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "NestedCheckpoint",
    "partial_path",
    "save_shard",
    "write",
    "write_index",
]

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
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise QSpecError(f"{partial} cannot be created: {error.strerror}") from None
    try:
        write_index(partial, target, model, _write_shards(partial, tensors, shard_bytes))
        if write_more is not None:
            write_more(partial)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_path(path: Path) -> Path:
    """Where a checkpoint is written until it is whole.

    Raises:
        QSpecError: the directory that it would become exists already.
    """
    if path.exists():
        raise QSpecError(f"{path} exists already; choose a new directory")
    return path.with_name(path.name + ".partial")


def write_index(
    path: Path,
    target: Target,
    model: Metadata,
    records: Mapping[str, Any],
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write the index: `records` as `save_shard` returned them, `made` how codes were chosen."""
    index = {
        "format": FORMAT_VERSION,
        "target": target.value,
        "model": dict(model),
        **({} if made is None else {"made": dict(made)}),
        "tensors": dict(records),
    }
    (path / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")


def save_shard(path: Path, number: int, tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Write one file of tensors; their records for the index, by name."""
    file = f"qspec-{number:05}.safetensors"
    planes: dict[str, Tensor] = {}
    for name, stored in tensors.items():
        planes.update(_named(name, stored))
    save_file(planes, path / file)
    return {name: {"file": file, **_record(stored)} for name, stored in tensors.items()}


def _write_shards(
    path: Path, tensors: Iterable[tuple[str, Stored]], shard_bytes: int
) -> dict[str, Any]:
    records: dict[str, Any] = {}
    shard: dict[str, Stored] = {}
    num_files = 1
    for name, stored in tensors:
        if sum(stored.nbytes for stored in shard.values()) >= shard_bytes:
            records.update(save_shard(path, num_files, shard))
            shard, num_files = {}, num_files + 1
        shard[name] = stored
    records.update(save_shard(path, num_files, shard))
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


@dataclass(frozen=True)
class _Record:
    """What the index says of one tensor: a spec, or the dtype and reason of a dense one."""

    file: str
    spec: PlaneSpec | None
    dtype: str = ""
    reason: str = ""

    def planes(self, name: str) -> dict[str, tuple[int, ...] | None]:
        """Entries of the safetensors file, with their shapes where the index knows them."""
        if self.spec is None:
            return {name: None}
        return {f"{name}#{plane}": shape for plane, (shape, _) in self.spec.shapes().items()}


def _parse(record: dict[str, Any]) -> _Record:
    fields = dict(record)
    file, kind = str(fields.pop("file")), fields.pop("kind")
    if kind == "dense":
        return _Record(file, None, str(fields["dtype"]), str(fields["reason"]))
    if kind != "nested":
        raise ValueError(f"unknown kind {kind!r}")
    dtype = getattr(torch, fields.pop("scale_dtype"))
    grid = Grid(fields.pop("grid"))
    return _Record(file, PlaneSpec(**fields, grid=grid, scale_dtype=dtype))


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
            self.metadata: Metadata = dict(index["model"])
            self.made: Metadata = dict(index.get("made", {}))
            self.plan: Metadata = dict(index.get("plan", {}))
            self._records = {
                name: self._parse(name, record) for name, record in index["tensors"].items()
            }
        except QSpecError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise QSpecError(f"{path / INDEX_NAME} is damaged: {error!r}") from None
        names = sorted({record.file for record in self._records.values()})
        self._files = {name: open_safetensors(path / name) for name in names}
        self._check_planes()

    def _parse(self, name: str, record: dict[str, Any]) -> _Record:
        try:
            return _parse(record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise QSpecError(
                f"tensor {name!r} of {self.path} is damaged in {INDEX_NAME}: {error!r}"
            ) from None

    def _check_planes(self) -> None:
        """Every plane that the index promises is in its file, in its shape."""
        held = {name: set(file.keys()) for name, file in self._files.items()}
        for name, record in self._records.items():
            for plane, shape in record.planes(name).items():
                found = plane in held[record.file] and tuple(
                    self._files[record.file].get_slice(plane).get_shape()
                )
                if not found or shape not in (None, found):
                    raise QSpecError(
                        f"tensor {name!r} of {self.path} is damaged: {record.file} holds {plane!r} "
                        f"as {found or 'nothing'}"
                    )

    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._records)

    def type_name(self, name: str) -> str:
        """ "nested" or the dtype of a dense tensor."""
        record = self._record(name)
        return "nested" if record.spec is not None else record.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        record = self._record(name)
        if record.spec is not None:
            return record.spec.num_rows, record.spec.num_cols
        return tuple(self._files[record.file].get_slice(name).get_shape())

    def read(self, name: str, target: Target) -> Stored:
        """One tensor as stored."""
        if target is not self.target:
            raise QSpecError(
                f"{self.path} was nested for target {self.target.value!r}, not {target.value!r}; "
                "nest the original again"
            )
        record = self._record(name)
        file = self._files[record.file]
        if record.spec is None:
            return Dense(file.get_tensor(name), record.reason)
        tensors = {plane: file.get_tensor(f"{name}#{plane}") for plane in record.spec.shapes()}
        try:
            return Planes.from_tensors(record.spec, tensors)
        except QSpecError as error:  # a plane of another dtype
            raise QSpecError(f"tensor {name!r} of {self.path} is damaged: {error}") from None

    def _record(self, name: str) -> _Record:
        if name not in self._records:
            raise QSpecError(f"{self.path} has no tensor {name!r}")
        return self._records[name]
