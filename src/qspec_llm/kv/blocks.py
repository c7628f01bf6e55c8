"""Handing out KV blocks. Counts and lists only; no tensors, no torch."""

from qspec_llm.errors import QSpecError

__all__ = ["BLOCK_SIZE", "BlockAllocator", "blocks_for"]

BLOCK_SIZE = 16  # tokens in a block


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockAllocator:
    """A free list of block numbers 0 .. num_blocks - 1.

    Invariant: every block is either free or in exactly one request's table. `check_idle` asserts
    it when no request is left.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise QSpecError(f"a KV cache of {num_blocks} blocks cannot hold a token")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend a block table to hold `num_tokens`; False, changing nothing, if it cannot be."""
        missing = blocks_for(num_tokens) - len(table)
        if missing > len(self._free):
            return False
        table.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, table: list[int]) -> None:
        """Take back every block of a table and empty it."""
        self._free.extend(reversed(table))
        table.clear()

    def check_idle(self) -> None:
        """Assert that every block came back exactly once."""
        assert sorted(self._free) == list(range(self.num_blocks)), "KV blocks leaked"
