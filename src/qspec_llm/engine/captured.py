"""A call captured as a CUDA graph, to be timed as cycles run it: without the host between."""

from collections.abc import Callable

import torch

__all__ = ["captured"]


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Capture what `call` launches; the result replays it and does not wait.

    Args:
        call: run once as it is before, so that its kernels are compiled and loaded. What it reads
            and writes must stay where it is for as long as the result lives.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
