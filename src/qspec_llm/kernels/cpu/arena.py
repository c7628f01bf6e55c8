"""Memory for packed tensors: chunks of large pages that many tensors share.

A decode step reads every byte once. In pages of 2 MB that goes about a fifth faster than in pages
of 4 KB (docs/cpu-notes.md), but a single matrix of a small model is smaller than such a page.
"""

import contextlib
import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Arena"]

CHUNK = 32 << 20  # bytes; what is never written takes no memory
ALIGNMENT = 64  # a cache line


class Arena:
    """Hands out memory, one tensor after another. A chunk lives as long as one of its tensors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that nobody has written to; a large one has a chunk of its own."""
        size = math.prod(shape) * dtype.itemsize
        if size > CHUNK // 4:
            return _chunk(size).view(dtype).view(*shape)
        with self._lock:
            start = -(-self._used // ALIGNMENT) * ALIGNMENT
            if start + size > self._chunk.nbytes:
                self._chunk, start = _chunk(CHUNK), 0
            self._used = start + size
            return self._chunk[start : start + size].view(dtype).view(*shape)


def _chunk(size: int) -> Tensor:
    # not from malloc: what it hands out may have been written before, in small pages
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them: costs speed, nothing else
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
