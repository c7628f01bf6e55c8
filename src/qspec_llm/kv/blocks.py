"""Handing out KV blocks, and finding those that already hold what is needed. No tensors, no torch.

A full block whose every position is final (below its request's watermark) is published under a key
and may then be in several tables at once. The key stands for everything its KV depends on: the
tokens of this block and of all before it, and at each position whether the prompt kernels or the
decode kernels computed it. So a block is found only by a request that would have computed the very
same bits itself. A prompt that repeats an earlier answer does not find the answer's blocks: decode
kernels wrote those, and it would use prompt kernels.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from qspec_llm.errors import QSpecError

__all__ = ["BLOCK_SIZE", "BlockAllocator", "blocks_for", "extend_keys"]

BLOCK_SIZE = 16  # tokens in a block


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def extend_keys(keys: list[bytes], tokens: Sequence[int], num_prompt: int, salt: bytes) -> None:
    """Append the keys of a sequence's next full blocks; each stands for all tokens up to its end.

    Args:
        keys: of the blocks before, in order; extended in place.
        tokens: those that follow, from position `len(keys) * BLOCK_SIZE` on.
        num_prompt: positions below this are prompt positions.
        salt: sequences with different salts share nothing.
    """
    for first in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        start = len(keys) * BLOCK_SIZE
        in_prompt = min(max(num_prompt - start, 0), BLOCK_SIZE)
        block = array("q", [in_prompt, *tokens[first : first + BLOCK_SIZE]])
        keys.append(
            blake2b((keys[-1] if keys else salt) + block.tobytes(), digest_size=32).digest()
        )


class BlockAllocator:
    """Reference counts of blocks 0 .. num_blocks - 1.

    Invariant: every block is held by as many tables as its count says; one that nobody holds is
    either blank (in `_blank`) or published (in `_idle`, least recently used first, where it can
    still be found until its room is needed). `check_idle` asserts it when no request is left.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise QSpecError(f"a KV cache of {num_blocks} blocks cannot hold a token")
        self.num_blocks = num_blocks
        self.num_evicted = 0
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._counts = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, published ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_published(self) -> int:
        """Blocks that can be found by their key."""
        return len(self._block_of)

    def count(self, block: int) -> int:
        """Tables that hold a block."""
        return self._counts[block]

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The published blocks of the longest beginning of `keys`, not held yet."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_hold(self, found: Sequence[int], num_tokens: int) -> bool:
        """Whether a new table of `num_tokens`, beginning with the found blocks, has room."""
        num_idle = sum(not self._counts[block] for block in found)
        return blocks_for(num_tokens) - len(found) <= self.num_free - num_idle

    def share(self, table: list[int], found: Sequence[int]) -> None:
        """Begin an empty table with found blocks."""
        assert not table, "only an empty table can begin with shared blocks"
        for block in found:
            self._idle.pop(block, None)
            self._counts[block] += 1
            table.append(block)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend a block table to hold `num_tokens`; False, changing nothing, if it cannot be."""
        missing = blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._take()
            self._counts[block] = 1
            table.append(block)
        return True

    def _take(self) -> int:
        """A blank block, or the published one that was not used for longest."""
        if self._blank:
            return self._blank.pop()
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        self.num_evicted += 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Let a held block, full and final, be found; a second block of the same key stays own."""
        assert self._counts[block] > 0, "a block that nobody holds has no content"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, table: list[int]) -> None:
        """Let go of every block of a table and empty it.

        The last block goes first: it is of use to fewer requests than those before it.
        """
        for block in reversed(table):
            self._counts[block] -= 1
            if self._counts[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._blank.append(block)
        table.clear()

    def check_idle(self) -> None:
        """Assert that nobody holds a block, and that each is in exactly one place."""
        assert not any(self._counts), "KV blocks leaked"
        assert sorted([*self._blank, *self._idle]) == list(range(self.num_blocks)), "KV blocks lost"
        assert self._key_of.keys() == self._idle.keys(), "a published block is in the wrong place"
        assert {key: block for block, key in self._key_of.items()} == self._block_of
