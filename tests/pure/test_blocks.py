"""The block allocator: every block is free or in exactly one table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qspec_llm.errors import QSpecError
from qspec_llm.kv.blocks import BLOCK_SIZE, BlockAllocator, blocks_for


def test_blocks_round_up():
    assert [blocks_for(n) for n in (0, 1, BLOCK_SIZE, BLOCK_SIZE + 1)] == [0, 1, 1, 2]


def test_a_cache_without_blocks_is_refused():
    with pytest.raises(QSpecError, match="0 blocks"):
        BlockAllocator(0)


def test_growing_is_all_or_nothing():
    blocks, table = BlockAllocator(3), []
    assert blocks.grow(table, 2 * BLOCK_SIZE)
    before = list(table)
    assert not blocks.grow(table, 4 * BLOCK_SIZE)
    assert table == before
    assert blocks.num_free == 1
    assert blocks.grow(table, 3 * BLOCK_SIZE)
    assert table[:2] == before


def test_growing_to_less_keeps_the_table():
    blocks, table = BlockAllocator(3), []
    blocks.grow(table, 40)
    before = list(table)
    assert blocks.grow(table, 1)
    assert table == before


def test_release_empties_the_table_and_twice_is_harmless():
    blocks, table = BlockAllocator(3), []
    blocks.grow(table, 48)
    blocks.release(table)
    blocks.release(table)
    assert table == []
    blocks.check_idle()


def test_a_block_that_is_still_held_counts_as_leaked():
    blocks = BlockAllocator(2)
    blocks.grow([], 1)
    with pytest.raises(AssertionError, match="leaked"):
        blocks.check_idle()


@given(
    num_blocks=st.integers(1, 12),
    actions=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 200)), max_size=60),
)
def test_tables_never_share_a_block(num_blocks, actions):
    blocks, tables = BlockAllocator(num_blocks), [[] for _ in range(4)]
    for which, num_tokens in actions:
        if num_tokens < 0:
            blocks.release(tables[which])
        else:
            before = list(tables[which])
            fits = blocks_for(num_tokens) - len(before) <= blocks.num_free
            assert blocks.grow(tables[which], num_tokens) == fits
            assert tables[which][: len(before)] == before
            assert not fits or len(tables[which]) >= blocks_for(num_tokens)
        held = [block for table in tables for block in table]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(num_blocks))
        assert len(held) + blocks.num_free == num_blocks
    for table in tables:
        blocks.release(table)
    blocks.check_idle()
