"""Every operation of a backend: first against the reference, then its time and bandwidth.

Linears rotate through copies of their matrix that together exceed any last-level cache, so every
pass reads memory; the read bandwidth they are compared with is measured in the same rounds. On a
GPU several launches are captured in a graph and timed together, as the engine runs them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor

from qspec_llm.bench.measure import Advance, interleaved
from qspec_llm.engine.captured import captured, gpu_seconds
from qspec_llm.kernels import Backend, LayerKV, Packed, Rows, reference
from qspec_llm.weights.planes import Dense, Planes, Stored
from qspec_llm.weights.quantize import Recipe, Target, nest
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

__all__ = ["bench", "show"]

LAUNCHES = 16  # in a graph
ROTATE_BYTES = 400 << 20  # more than any last-level cache, read between two uses of a matrix
LARGEST_ERROR = 5e-3  # norm-relative; bf16 results differ by single roundings
VIEWS = {
    "verify": VERIFY,
    "draft a8": draft_view(Activation.A8),
    "draft a4": draft_view(Activation.A4),
}


@dataclass(frozen=True)
class _Case:
    """One call: compute it, compute it by the reference, and the bytes it must read."""

    name: str
    call: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    nbytes: int


def bench(
    ops: Backend,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    group: int,
    rounds: int,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Check and time every operation.

    Args:
        ops: the backend.
        shapes: [N, K] of the linears' matrices.
        rows: numbers of rows.
        group: weights that share one scale.
        rounds: rounds that count.
        advance: called after each timed call.

    Raises:
        AssertionError: an operation differs from the reference.
    """
    results, bandwidths = [], []
    batches = (_linears(ops, shape, n, group) for shape in shapes for n in rows)
    for cases in chain(batches, [_others(ops, max(rows))]):
        errors = {case.name: _error(case) for case in cases}
        memory = torch.ones(ROTATE_BYTES // 8, dtype=torch.int64, device=ops.device)
        read = partial(ops.read_memory, memory.view(torch.uint8))
        calls: dict[str, Callable[[], object]] = {"read": read}
        calls |= {case.name: case.call for case in cases}
        seconds = _seconds(ops, calls, rounds, advance)
        bandwidth = ROTATE_BYTES / seconds["read"]
        bandwidths.append(bandwidth)
        for case in cases:
            rate = case.nbytes / seconds[case.name]
            results.append(
                {
                    "op": case.name,
                    "error": errors[case.name],
                    "seconds": seconds[case.name],
                    "gb_per_second": rate / 1e9,
                    "share_of_read": rate / bandwidth,
                }
            )
    return {
        "backend": ops.name,
        "read_gb_per_second": max(bandwidths) / 1e9,
        "kernels": results,
    }


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    print(f"{report['backend']}: reads memory at {report['read_gb_per_second']:.1f} GB/s")
    for row in report["kernels"]:
        print(
            f"  {row['op']:<44} {row['seconds'] * 1e6:10.1f} us {row['gb_per_second']:7.2f} GB/s "
            f"{row['share_of_read']:6.1%} of read, error {row['error']:.1e}"
        )


def _seconds(
    ops: Backend,
    calls: dict[str, Callable[[], object]],
    rounds: int,
    advance: Advance | None,
) -> dict[str, float]:
    """Median seconds of each call."""
    if ops.device.type != "cuda":
        return interleaved(calls, rounds, advance)
    graphs = {name: captured(call, LAUNCHES) for name, call in calls.items()}
    seconds = interleaved(graphs, rounds, advance, gpu_seconds)
    return {name: value / LAUNCHES for name, value in seconds.items()}


def _error(case: _Case) -> float:
    out, expected = case.call().cpu().double(), case.expected().double()
    error = float((out - expected).norm() / expected.norm())
    assert error < LARGEST_ERROR, f"{case.name} differs from the reference by {error:.1e}"
    return error


def _rows(count: int, context: int = 0) -> Rows:
    positions = torch.arange(context, context + count)
    blocks = torch.arange(math.ceil((context + count) / 16))[None]
    cu_rows, contexts = torch.tensor([0, count]), torch.tensor([context + count])
    return Rows(positions, positions, cu_rows, contexts, blocks, is_prompt=False)


def _linears(ops: Backend, shape: tuple[int, int], count: int, group: int) -> list[_Case]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).bfloat16()
    x = torch.randn(count, shape[1], generator=generator).bfloat16()
    forms: dict[str, Stored] = {
        target.value: nest(weight, Recipe(target, group, clip_steps=1)) for target in Target
    }
    forms["dense bf16"] = Dense(weight, "the plain kernel to compare with")
    cases = []
    for name, stored in forms.items():
        # enough copies that the view which reads least still leaves the cache
        copies = [ops.pack(_copy(stored)) for _ in range(ROTATE_BYTES // stored.draft_nbytes + 1)]
        turn = cycle(copies)  # shared by the views: none finds what another has just read
        for label, view in VIEWS.items():
            if label == "verify" or isinstance(stored, Planes):
                title = f"{name} {label} {shape[0]}x{shape[1]} rows {count}"
                cases.append(_linear(ops, title, stored, turn, x, view))
    return cases


def _linear(
    ops: Backend, name: str, stored: Stored, turn: Iterator[Packed], x: Tensor, view: View
) -> _Case:
    nbytes = stored.draft_nbytes if view.is_draft else stored.nbytes
    rows, there = _rows(len(x)), x.to(ops.device)

    def call() -> Tensor:
        return ops.linear(there, next(turn), None, view, rows, torch.float32)

    def expected() -> Tensor:
        return reference.linear(x, stored, None, view, rows, torch.float32)

    return _Case(name, call, expected, nbytes)


def _to(argument: Any, device: torch.device) -> Any:
    """An operation's argument on a device."""
    if isinstance(argument, LayerKV):
        keys, values = argument.keys.to(device), argument.values.to(device)
        return LayerKV(keys, values, argument.block_size)
    return argument.to(device) if isinstance(argument, Tensor | Rows) else argument


def _copy(stored: Stored) -> Stored:
    if isinstance(stored, Dense):
        return Dense(stored.weight.clone(), stored.reason)
    tensors = {name: tensor.clone() for name, tensor in stored.tensors().items()}
    return Planes.from_tensors(stored.spec, tensors)


def _others(ops: Backend, count: int) -> list[_Case]:
    """The operations that read activations and KV: small, so no memory speed is claimed."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    heads, kv_heads, size, context = 14, 2, 64, 1024
    rows = _rows(count, context)
    x, scale, gate_up = random(count, 896), random(896), random(count, 2 * 4864)
    query = random(count, heads, size)
    angles = torch.rand(count, size // 2, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    slots = math.ceil((context + count) / 16) * 16
    kv = LayerKV(random(slots, kv_heads, size), random(slots, kv_heads, size), 16)
    kv_bytes = 2 * (context + count) * kv_heads * size * 2
    arguments: dict[str, tuple[tuple[Any, ...], int]] = {
        "rms_norm": ((x, scale, 1e-6), x.nbytes),
        "rope": ((query, cos, sin), query.nbytes),
        "silu_mul": ((gate_up,), gate_up.nbytes),
        "attention": ((query, kv, VERIFY, rows), kv_bytes),
    }
    return [
        _Case(
            f"{name} rows {count}",
            partial(getattr(ops, name), *(_to(arg, ops.device) for arg in args)),
            partial(getattr(reference, name), *args),
            nbytes,
        )
        for name, (args, nbytes) in arguments.items()
    ]
