"""Graphs, events and pinned memory of a GPU, and what stands for them in the tests' interpreter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError

__all__ = ["Recorder"]


class Recorder:
    """What a GPU does and the interpreter of the tests does not: graphs, events, pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        # graphs never run at once, so they share their memory
        self._pool = torch.cuda.graph_pool_handle() if self._is_gpu else None

    def event(self) -> Any:
        """An event that can be timed."""
        if not self._is_gpu:
            return _Instant()
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def pinned(self, values: list[list[int]]) -> Tensor:
        """Values on the host, where the GPU reads them in its own time."""
        tensor = torch.tensor(values)
        return tensor.pin_memory() if self._is_gpu else tensor

    def fetch(self, source: Tensor) -> Tensor:
        """A copy on the host, whole once an event recorded after this call is done."""
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=self._is_gpu)
        return target.copy_(source, non_blocking=True)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` once, so that kernels compile, then capture it."""
        work()
        if not self._is_gpu:
            return work
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                work()
        except torch.OutOfMemoryError:
            raise QSpecError(
                "the GPU has no memory left for a step of this batch; choose a smaller max_batch "
                "or max_tokens_in_kv"
            ) from None
        return graph.replay


class _Instant:
    """An event where everything is done at once."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: "_Instant") -> float:
        return 0.0
