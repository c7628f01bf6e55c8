"""A nested checkpoint that is being written: what is done stays done when a run is interrupted.

    DIR.partial/progress.json          options, records of tensors, notes; replaced after each part
    DIR.partial/state-N.safetensors    tensors that the next part begins with
    DIR.partial/qspec-0000N.safetensors

`progress.json` is replaced last and in one go, so it never names what is not there.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.checkpoint.safetensors_dir import open_safetensors, read_json
from qspec_llm.weights.planes import Stored
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.store import partial_path, save_shard, write_index

__all__ = ["Unfinished"]

PROGRESS = "progress.json"


class Unfinished:
    """A checkpoint being written to `path`.

    Attributes:
        num_parts: parts that are written.
        notes: what the writer noted after the last part.

    Args:
        path: the directory that it becomes; it must not exist yet.
        options: what decides its content, as JSON values. A partial directory with the same options
            is gone on with.

    Raises:
        QSpecError: `path` exists, or its partial directory belongs to a run with other options.
    """

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self._path, self._options = path, dict(options)
        self._partial = partial_path(path)
        self.num_parts = 0
        self.notes: dict[str, Any] = {}
        self._records: dict[str, Any] = {}
        if (self._partial / PROGRESS).exists():
            self._resume()
            return
        shutil.rmtree(self._partial, ignore_errors=True)
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise QSpecError(f"{self._partial} cannot be created: {error.strerror}") from None

    def _resume(self) -> None:
        progress = read_json(self._partial / PROGRESS)
        if progress.get("options") != self._options:
            raise QSpecError(
                f"{self._partial} was begun with other options; repeat its command, or delete it"
            )
        self.num_parts, self.notes = progress["num_parts"], progress["notes"]
        self._records = progress["records"]

    def state(self) -> dict[str, Tensor]:
        """The tensors that were kept after the last part."""
        if not self.num_parts:
            return {}
        file = open_safetensors(self._state_file(self.num_parts))
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping

    def add(
        self, tensors: Mapping[str, Stored], notes: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> None:
        """Write one part, and what a later run would need to go on after it."""
        number = self.num_parts + 1
        self._records |= save_shard(self._partial, number, tensors)
        save_file({name: tensor.contiguous() for name, tensor in state.items()},
                  self._state_file(number))  # fmt: skip
        self.num_parts, self.notes = number, dict(notes)
        progress = {
            "options": self._options,
            "num_parts": number,
            "notes": self.notes,
            "records": self._records,
        }
        new = self._partial / f"{PROGRESS}.new"
        new.write_text(json.dumps(progress), encoding="utf-8")
        new.replace(self._partial / PROGRESS)
        self._state_file(number - 1).unlink(missing_ok=True)

    def finish(
        self,
        target: Target,
        model: Metadata,
        made: Mapping[str, Any],
        write_more: Callable[[Path], None],
    ) -> None:
        """Write the index and other files, and give the directory its name."""
        write_index(self._partial, target, model, self._records, made)
        write_more(self._partial)
        self._partial.rename(self._path)
        for file in (PROGRESS, self._state_file(self.num_parts).name):
            (self._path / file).unlink(missing_ok=True)

    def _state_file(self, number: int) -> Path:
        return self._partial / f"state-{number}.safetensors"
