"""`qspec inspect`: how a model would be stored, tensor by tensor, and what stays dense and why."""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from qspec_llm.cli.common import progress_bar
from qspec_llm.config import EngineConfig, resolve_target
from qspec_llm.hub import resolve_model
from qspec_llm.model.config import ModelConfig, read_config
from qspec_llm.model.load import stored_tensors
from qspec_llm.weights.checkpoint import Checkpoint, open_checkpoint
from qspec_llm.weights.planes import Planes, Stored

__all__ = ["run"]


@dataclass(frozen=True)
class _Row:
    """One tensor as stored. `planes` names what is kept, `note` why a tensor is dense."""

    name: str
    shape: tuple[int, ...]
    in_file: str
    planes: str
    group: int | None
    bits_stored: float
    bits_drafted: float
    nbytes: int
    draft_nbytes: int
    note: str


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    checkpoint = open_checkpoint(resolve_model(args.model))
    config = read_config(checkpoint)
    engine = EngineConfig(target=resolve_target(args.target, checkpoint), group=args.group)
    with progress_bar() as bar:
        tensors = stored_tensors(checkpoint, config, engine.recipe)
        total = len(checkpoint.names())
        rows = [
            _row(checkpoint, name, stored)
            for name, stored in bar.track(tensors, total=total, description="nesting weights")
        ]
    if args.json:
        print(json.dumps(_report(args.model, checkpoint, config, engine, rows)))
    else:
        _show(config, engine, rows if args.all else list(_fold(rows)), rows)
        for name in ("made", "plan"):
            if record := getattr(checkpoint, name, {}):
                print(
                    f"{name}:", ", ".join(f"{key} {_short(value)}" for key, value in record.items())
                )


def _row(checkpoint: Checkpoint, name: str, stored: Stored) -> _Row:
    if isinstance(stored, Planes):
        spec = stored.spec
        return _Row(
            name,
            (spec.num_rows, spec.num_cols),
            checkpoint.type_name(name),
            f"{spec.grid} " + "+".join(p for p in ("q4", "r4", "r8") if p in stored.tensors()),
            spec.group,
            spec.bits_stored,
            spec.draft_bits_read,
            stored.nbytes,
            stored.draft_nbytes,
            "",
        )
    bits = 8.0 * stored.weight.itemsize
    nbytes = stored.nbytes
    in_file, shape = checkpoint.type_name(name), tuple(stored.weight.shape)
    return _Row(name, shape, in_file, "dense", None, bits, bits, nbytes, nbytes, stored.reason)


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _fold(rows: list[_Row]) -> Iterator[_Row]:
    """One line for the tensors that every layer stores alike."""
    groups: dict[tuple[Any, ...], list[_Row]] = {}
    for row in rows:
        name = re.sub(r"\.layers\.\d+\.", ".layers.*.", row.name)
        key = (name, row.shape, row.in_file, row.planes, row.group, row.bits_drafted, row.note)
        groups.setdefault(key, []).append(row)
    for (name, *_), members in groups.items():
        suffix = f" x{len(members)}" if len(members) > 1 else ""
        totals = {
            "nbytes": sum(row.nbytes for row in members),
            "draft_nbytes": sum(row.draft_nbytes for row in members),
        }
        yield _Row(**{**asdict(members[0]), "name": name + suffix, **totals})


def _report(
    model: str, checkpoint: Checkpoint, config: ModelConfig, engine: EngineConfig, rows: list[_Row]
) -> dict[str, Any]:
    return {
        "model": model,
        "target": engine.target.value,
        "architecture": config.to_dict(),
        "made": dict(getattr(checkpoint, "made", {})),
        "plan": dict(getattr(checkpoint, "plan", {})),
        "tensors": [asdict(row) for row in rows],
        "bytes": {
            "weights": sum(row.nbytes for row in rows),
            "read_by_draft": sum(row.draft_nbytes for row in rows),
        },
    }


def _show(config: ModelConfig, engine: EngineConfig, lines: list[_Row], rows: list[_Row]) -> None:
    # piped into a file or a pager, nothing is folded
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(
        f"{config.family}: {config.num_layers} layers, {config.hidden_size} wide, "
        f"MLP {config.intermediate_size}, {config.num_heads} heads ({config.num_kv_heads} KV) "
        f"of {config.head_dim}, vocabulary {config.vocab_size}"
        f"{', tied head' if config.tied_head else ''}, context {config.context_length}"
    )
    if config.hadamard is not None:
        head = "" if config.head_draft is None else f"; the LM head drafts with {config.head_draft}"
        console.print(
            f"the linears take inputs rotated by Hadamard matrices of up to {config.hadamard} rows"
            f"{head} or more"
        )
    if config.outliers is not None:
        console.print(
            f"a4 drafts see the first {config.outliers} columns of the inputs of q, k, v, gate, up "
            f"and down in 8 bits, the largest; the LM head drafts with {config.head_draft} or more"
        )
    table = Table(box=None, pad_edge=False)
    for title in ("tensor", "shape", "in file", "stored as"):
        table.add_column(title, overflow="fold")
    for title in ("bits", "draft", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in lines:
        planes = f"dense: {row.note}" if row.note else f"{row.planes} g{row.group}"
        name = row.name.removeprefix("model.").replace(".weight", "")
        bits = f"{row.bits_stored:g}", f"{row.bits_drafted:g}"
        shape = "x".join(map(str, row.shape))
        table.add_row(name, shape, row.in_file, planes, *bits, f"{row.nbytes:,}")
    console.print(table)
    stored, drafted = sum(r.nbytes for r in rows), sum(r.draft_nbytes for r in rows)
    console.print(
        f"target {engine.target.value}: {stored:,} bytes stored, of which the draft view can read "
        f"{drafted:,} ({drafted / stored:.0%})"
    )
