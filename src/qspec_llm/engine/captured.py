"""Steps to be timed: their rows, a call as a CUDA graph, as cycles run it, and what it takes."""

from collections.abc import Callable
from typing import Any

import torch

from qspec_llm.kernels import Rows
from qspec_llm.kv.blocks import BLOCK_SIZE, blocks_for

__all__ = ["captured", "gpu_seconds", "rows_after"]

REPEATS = 8  # of a timed call, one after the other


def rows_after(
    context: int, num_rows: int, num_sequences: int = 1, *, is_apart: bool = False
) -> Rows:
    """`num_rows` rows after `context` tokens, of each of some sequences.

    They share the cache's first blocks or, where `is_apart`, have blocks of their own, one sequence
    behind the other, as a cache that is measured cold wants.
    """
    stop = context + num_rows
    num_blocks = blocks_for(stop)
    first = torch.arange(num_sequences)[:, None] * (num_blocks if is_apart else 0)
    positions = torch.arange(context, stop).repeat(num_sequences, 1)
    return Rows(
        positions=positions.flatten(),
        slots=(first * BLOCK_SIZE + positions).flatten(),
        cu_rows=torch.arange(num_sequences + 1) * num_rows,
        contexts=torch.full((num_sequences,), stop),
        block_tables=first + torch.arange(num_blocks),
        is_prompt=False,
    )


class _Captured:
    """A graph and the call that it was made of, whose tensors it reads."""

    def __init__(self, graph: Any, call: Callable[[], object]) -> None:
        self._graph, self._call = graph, call

    def __call__(self) -> None:
        self._graph.replay()


def captured(call: Callable[[], object], times: int = 1) -> Callable[[], None]:
    """Capture what `call` launches; the result replays it and does not wait.

    Args:
        call: run once as it is before, so that its kernels are compiled and loaded. What it holds
            lives on in the result; what else it reads and writes must stay where it is as long.
        times: how often it is in the graph.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return _Captured(graph, call)


def gpu_seconds(call: Callable[[], object]) -> float:
    """Seconds that the GPU takes for what a call launches, when it follows upon itself.

    A graph on an idle GPU takes some 0.4 ms more until it runs; in cycles that passes while the one
    before it still does.
    """
    begun, done = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    call()
    begun.record()
    for _ in range(REPEATS):
        call()
    done.record()
    done.synchronize()
    milliseconds: float = begun.elapsed_time(done)
    return milliseconds / 1e3 / REPEATS
